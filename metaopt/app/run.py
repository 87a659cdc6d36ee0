"""What a run does around the outer loop: check, warm up, show, compare, save."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from omegaconf import DictConfig
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from metaopt.app import report
from metaopt.app.build import build, stage_steps
from metaopt.app.final import doubts, weight_quality, weights_of
from metaopt.app.job import FEW, Job
from metaopt.app.tracking import save_meta_params, save_models
from metaopt.base.errors import with_note
from metaopt.base.streams import seeded
from metaopt.core.chain import TrainedChain
from metaopt.core.contracts import MetaObjective
from metaopt.core.meta_params import named_tensors
from metaopt.data.bundle import DataBundle
from metaopt.diagnostics.check import check_hypergradient
from metaopt.losses.objectives import as_trained
from metaopt.meta_params.tables import baseline, summary
from metaopt.trainer import MetaResult, MetaTrainer

NUM_ANSWERS = 6
NUM_PICTURED = 20


class Run(Job):
    """One run. A context: `result.json` says `complete` or `failed` when it is left.

    Args:
        config: the prepared config.
        folder: where the run writes.
    """

    data: DataBundle

    def __init__(self, config: DictConfig, folder: str | Path) -> None:
        super().__init__(config, folder)
        self.records: list[Mapping[str, Any]] = []
        self.metrics: dict[str, float] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.answers: dict[str, Sequence[tuple[str, str, str]]] = {}
        self.doubts: list[str] = []
        self.best_step: int | None = None
        self.logger: Any = None

    def __enter__(self) -> Run:
        (self.path / "metrics.jsonl").write_text("")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        found: dict[str, Any] = {"status": "complete" if error is None else "failed", "metrics": self.metrics}
        found |= {"error": with_note(error)} if error is not None else {}
        found |= {name: value for name, value in (("test", self.scores), ("doubts", self.doubts)) if value}
        self.write("result.json", found)
        if self.logger is not None:
            self.logger.close()

    def begin(self, data: DataBundle, trainer: MetaTrainer) -> None:
        """Take the built parts, and keep the fresh chain's state for the comparison."""
        self.data = data
        self._fresh = copy.deepcopy(trainer.chain.state_dict())
        sizes = ", ".join(f"{name} {size}" for name, size in data.sizes.items())
        self.take(trainer, f"; examples: {sizes}" if sizes else "")
        if self.config.get("logger"):
            self.logger = build("logger", self.config.logger, self.path)

    def check_first_step(self) -> None:
        """Show the first hypergradient beside a central difference of the whole chain."""
        trainer, config = self.trainer, self.config.trainer
        if not (config.check_first_step and trainer.learns and config.meta_steps):
            return
        parts = trainer.chain, cast(MetaObjective, trainer.objective), trainer.next_batch(), trainer.meta_params
        small = {n: range(t.numel()) for n, t in named_tensors(trainer.meta_params).items() if t.numel() <= FEW}
        try:
            check = check_hypergradient(*parts, coordinates=small, seed=config.seed)
        except Exception as error:  # what is wrong with the training itself, its first meta-step says better
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            said = f"the first meta-step could not be checked, on a float64 copy: {reason}; the run goes on"
            self.console.print(Text(said))
        else:
            report.print_check(self.console, check)

    def learn(self) -> MetaResult:
        """Take the meta-steps, with a progress bar."""
        result = self.trainer.fit(self.config.trainer.meta_steps, progress=self.console)
        self.best_step = result.best_step
        if self.config.trainer.meta_steps:
            self.metrics["meta_loss"] = result.meta_loss
        self.metrics |= weight_quality(self.trainer.meta_params, self.data.good_sources, self.data.is_clean)
        return result

    def observe(self, record: Mapping[str, Any]) -> None:
        """Log one meta-step, at once."""
        self.records.append(record)
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.logger is not None:
            self.logger(record)

    def compare(self) -> None:
        """Train fresh models with frozen weights (learned, uniform) and read the test stream, once each."""
        trainer, final = self.trainer, self.config.final
        if self.config.output.save_models:
            disable_progress_bar()  # transformers' own, one per model
            save_models(trainer.chain, self.path / "models")
        contestants = {"learned": trainer.meta_params, "uniform": baseline(trainer.meta_params)}
        names = [name for name in final.compare if trainer.learns or name == "uniform"]
        steps = stage_steps(self.config, trainer.step)
        for name in names:
            trainer.chain.load_state_dict(copy.deepcopy(self._fresh))
            self._test(name, self.train(contestants[name], steps, f"fresh models, {name} weights"))
            if final.save_models and name == names[0]:
                save_models(trainer.chain, self.path / "final_models")
        if not names:
            self._test("trained", trainer.chain.train(trainer.meta_params, num_steps=0))
        self.metrics |= next(iter(self.scores.values()), {})
        self._show_weights()
        report.print_answers(self.console, self.answers)
        plain = ", ".join(f"{n} {name} steps" for name, n in steps.items())
        trained_how = f"after training fresh models ({plain})" if names else "of the models trained on the way"
        report.print_scores(self.console, self.scores, f"test, {trained_how}")
        self.doubts = doubts(trainer, self.records, self.data, self.metrics)
        report.print_doubts(self.console, self.doubts)

    def _test(self, name: str, trained: TrainedChain) -> None:
        """Score the last stage on the test stream, fed as it was in training."""
        data, model = self.data, as_trained(trained, self.config.chain[-1])
        if data.score is None:
            self.scores[name] = {"loss": self.trainer.mean_loss(trained, data.test)}
        else:
            with torch.no_grad(), seeded(0):  # a hand-over may sample what the stage reads
                self.scores[name] = dict(data.score(model, [self.trainer.chain.move(batch) for batch in data.test]))
        if data.answers is not None:
            self.answers[name] = data.answers(model, data.test, NUM_ANSWERS)

    def _show_weights(self) -> None:
        meta_params, data = self.trainer.meta_params, self.data
        if not self.trainer.learns:
            return
        found, learned = weights_of(meta_params), summary(meta_params)
        if learned:
            report.print_summary(self.console, learned)
        elif found is None:
            report.print_meta_params(self.console, named_tensors(meta_params))
        if found is not None:
            key, weights = found
            if key == "source":
                report.print_source_weights(self.console, weights, data.source_names, data.good_sources)
            else:
                report.print_example_weights(self.console, weights, data.is_clean)
            report.print_quality(self.console, self.metrics)

    def save(self) -> None:
        """Write the meta-parameters and the plots, and tell the logger how it ended."""
        meta_params = self.trainer.meta_params
        key, weights = (weights_of(meta_params) if self.trainer.learns else None) or ("", None)
        save_meta_params(meta_params, self.path, self.trainer.last_meta_params)
        if self.config.output.plots:
            self._plot(key, weights)
        if self.logger is not None:
            self.logger.finish({**self.metrics, **summary(meta_params)}, weights, self.path)

    def _plot(self, key: str, weights: torch.Tensor | None) -> None:
        path, data = self.path, self.data
        if self.records:
            report.plot_meta_loss(self.records, path / "meta_loss.png", self.best_step)
        if len(self.scores) > 1:
            report.plot_scores(self.scores, path / "comparison.png")
        if weights is not None and key == "source":
            report.plot_source_weights(weights, data.source_names, data.good_sources, path / "weights.png")
        elif weights is not None:
            report.plot_example_weights(weights, data.is_clean, path / "weights.png")
            if data.picture is not None:
                lowest = torch.argsort(weights)[:NUM_PICTURED].tolist()
                data.picture(lowest, path / "lowest_weights.png", "Lowest learned weights")
