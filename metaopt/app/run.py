"""What a run does around the outer loop: check, warm up, show, compare, save."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from omegaconf import DictConfig
from transformers.utils.logging import disable_progress_bar

from metaopt.app import report
from metaopt.app.build import build, stage_steps
from metaopt.app.config import with_note
from metaopt.app.final import doubts, weight_quality, weights_of
from metaopt.app.job import Job, threads
from metaopt.app.tracking import save_meta_params, save_models
from metaopt.base.errors import first_line
from metaopt.base.streams import seeded
from metaopt.core.chain import TrainedChain
from metaopt.diagnostics.check import check_hypergradient
from metaopt.losses.objectives import as_trained
from metaopt.meta_params.tables import baseline, summary
from metaopt.trainer import MetaResult

NUM_ANSWERS = 6


def train(config: DictConfig, folder: str | Path) -> float:
    """Build the parts, learn the meta-parameters, compare, report; return the selection metric.

    `config` is as `metaopt.app.config.prepare` returns it; the run writes to `folder`.
    """
    with threads(config.trainer.num_threads), Run(config, folder) as run:
        run.build([run.observe])
        run.begin()
        run.warm_up()
        run.check_first_step()
        result = run.learn()
        run.compare()
        run.save()
    return result.meta_loss if result.score is None else result.score


class Run(Job):
    """One run. A context: `result.json` says `complete` or `failed` when it is left."""

    def __init__(self, config: DictConfig, folder: str | Path) -> None:
        super().__init__(config, folder)
        self.records: list[Mapping[str, Any]] = []
        self.metrics: dict[str, float] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.doubts: list[str] = []
        self.best_step: int | None = None
        self.logger: Any = None

    def __enter__(self) -> Run:
        (self.path / "metrics.jsonl").write_text("")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        found = {"error": error and with_note(error), "test": self.scores, "doubts": self.doubts}
        status = {"status": "failed" if error else "complete", "metrics": self.metrics}
        self.write("result.json", status | {name: value for name, value in found.items() if value})
        if self.logger is not None:
            self.logger.close()

    def begin(self) -> None:
        """Write the config, keep the fresh chain's state for the comparison, and start the logger."""
        super().begin()
        self._fresh = copy.deepcopy(self.trainer.chain.state_dict())
        if self.config.get("logger"):
            self.logger = build("logger", self.config.logger, self.path)

    def check_first_step(self) -> None:
        """Show the first hypergradient beside a central difference of the whole chain."""
        config = self.config.trainer
        if not (config.check_first_step and self.trainer.learns and config.meta_steps):
            return
        try:
            check = check_hypergradient(*self.trainer.parts(), coordinates=self.small_entries(), seed=config.seed)
        except Exception as error:  # what is wrong with the training itself, its first meta-step says better
            reason = f"on a float64 copy: {first_line(error)}"
            report.say(self.console, [f"the first meta-step could not be checked, {reason}; the run goes on"])
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
        trainer, final, answers = self.trainer, self.config.final, {}
        if self.config.output.save_models:
            disable_progress_bar()  # transformers' own, one per model
            save_models(trainer.chain, self.path / "models")
        contestants = {"learned": trainer.meta_params, "uniform": baseline(trainer.meta_params)}
        names = [name for name in final.compare if trainer.learns or name == "uniform"]
        steps = stage_steps(self.config, trainer.step)
        for name in names:
            trainer.chain.load_state_dict(copy.deepcopy(self._fresh))
            trained = self.train(contestants[name], steps, f"fresh models, {name} weights")
            answers[name] = self._test(name, trained)
            if final.save_models and name == names[0]:
                save_models(trainer.chain, self.path / "final_models")
        if not names:
            answers["trained"] = self._test("trained", trainer.chain.train(trainer.meta_params, num_steps=0))
        self.metrics |= next(iter(self.scores.values()))
        if trainer.learns:
            report.print_learned(self.console, trainer.meta_params, self.data)
            report.print_quality(self.console, self.metrics)
        report.print_answers(self.console, answers)
        plain = ", ".join(f"{n} {name} steps" for name, n in steps.items())
        trained_how = f"after training fresh models ({plain})" if names else "of the models trained on the way"
        report.print_scores(self.console, self.scores, f"test, {trained_how}")
        self.doubts = doubts(trainer, self.records, self.data, self.metrics)
        report.say(self.console, [*self.doubts, report.REMEDIES] if self.doubts else [], "yellow")

    def _test(self, name: str, trained: TrainedChain) -> Sequence[tuple[str, str, str]]:
        """Score the last stage on the test stream, fed as it was in training; return some of its answers."""
        data, model = self.data, as_trained(trained, self.config.chain[-1])
        if data.score is None:
            self.scores[name] = {"loss": self.trainer.mean_loss(trained, data.test)}
        else:
            with torch.no_grad(), seeded(0):  # a hand-over may sample what the stage reads
                self.scores[name] = dict(data.score(model, [self.trainer.chain.move(batch) for batch in data.test]))
        return [] if data.answers is None else data.answers(model, data.test, NUM_ANSWERS)

    def save(self) -> None:
        """Write the meta-parameters and the plots, and tell the logger how it ended."""
        meta_params = self.trainer.meta_params
        found = weights_of(meta_params) if self.trainer.learns else None
        save_meta_params(meta_params, self.path, self.trainer.last_meta_params)
        if self.config.output.plots:
            if self.records:
                report.plot_meta_loss(self.records, self.path / "meta_loss.png", self.best_step)
            if len(self.scores) > 1:
                report.plot_scores(self.scores, self.path / "comparison.png")
            if found is not None:
                report.plot_weights(*found, self.data, self.path)
        if self.logger is not None:
            weights = None if found is None else found[1]
            self.logger.finish({**self.metrics, **summary(meta_params)}, weights, self.path)
