"""What a run does around the outer loop: check, warm up, show, compare, save."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from metaopt.app import report
from metaopt.app.build import build_logger, stage_steps
from metaopt.app.config import as_yaml
from metaopt.app.final import doubts, retrain, scored, weight_quality, weights_of
from metaopt.app.tracking import RunFolder
from metaopt.base.errors import with_note
from metaopt.core.chain import TrainedChain
from metaopt.core.contracts import MetaObjective
from metaopt.core.meta_params import baseline, named_tensors, summary
from metaopt.data.bundle import DataBundle
from metaopt.diagnostics.check import check_hypergradient
from metaopt.losses.pipeline import as_trained
from metaopt.progress import progress_bar
from metaopt.trainer import MetaResult, MetaTrainer

NUM_ANSWERS = 6
NUM_PICTURED = 20
FEW = 4  # entries of a meta-parameter that are checked one by one
WIDTH = 110


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads on the CPU inside the block; None for as many as it does already."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Run:
    """One run: its folder, its console, and the parts that `begin` hands over.

    A context: `result.json` says `complete` or `failed` when it is left.

    Args:
        config: the prepared config.
        folder: where the run writes.
    """

    data: DataBundle
    trainer: MetaTrainer

    def __init__(self, config: DictConfig, folder: str | Path) -> None:
        self.config = config
        self.folder = RunFolder(Path(folder))
        self.console = Console(width=None if sys.stdout.isatty() else WIDTH)  # a log file has no width of its own
        self.metrics: dict[str, float] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.doubts: list[str] = []
        self.best_step: int | None = None
        self.logger: Any = None
        self._fresh: dict[str, Any] = {}

    def __enter__(self) -> Run:
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        more: dict[str, Any] = {} if error is None else {"error": with_note(error)}
        more |= {name: found for name, found in (("test", self.scores), ("doubts", self.doubts)) if found}
        status = "complete" if error is None else "failed"
        seconds = time.perf_counter() - self._start
        self.folder.write_result(status, seconds, self.config.trainer.seed, self.metrics, **more)
        if self.logger is not None:
            self.logger.close()

    # --- before the outer loop ----------------------------------------------------------------------------------

    def begin(self, data: DataBundle, trainer: MetaTrainer) -> None:
        """Take the built parts, and keep the fresh chain's state for the comparison."""
        self.data, self.trainer = data, trainer
        (self.folder.path / "config.yaml").write_text(as_yaml(self.config))
        self.logger = build_logger(self.config, self.folder.path)
        self._fresh = copy.deepcopy(trainer.chain.state_dict())
        sizes = ", ".join(f"{name} {size}" for name, size in data.sizes.items())
        examples = f"; examples: {sizes}" if sizes else ""
        self.console.print(f"{self.trainer.chain!r}{examples}; writing to {self.folder.path}")

    def warm_up(self) -> None:
        """Train each stage for its `warmup_steps`, by plain optimizers."""
        steps = {name: self.config.stages[name].warmup_steps for name in self.config.chain}
        if any(steps.values()):
            self._train(self.trainer.meta_params, steps, "warm-up")

    def check_first_step(self) -> None:
        """Show the first hypergradient beside a central difference of the whole chain."""
        trainer, config = self.trainer, self.config.trainer
        if config.check_first_step and trainer.learns and config.meta_steps:
            objective, batch = cast(MetaObjective, trainer.objective), trainer.next_batch()
            small = {n: range(t.numel()) for n, t in named_tensors(trainer.meta_params).items() if t.numel() <= FEW}
            parts = (trainer.chain, objective, batch, trainer.meta_params)
            try:
                check = check_hypergradient(*parts, coordinates=small, seed=config.seed)
            except Exception as error:  # what is wrong with the training itself, its first meta-step says better
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                said = f"the first meta-step could not be checked, on a float64 copy: {reason}; the run goes on"
                self.console.print(Text(said))
            else:
                report.print_check(self.console, check)

    # --- the outer loop -----------------------------------------------------------------------------------------

    def learn(self) -> MetaResult:
        """Take the meta-steps, with a progress bar."""
        meta_steps = self.config.trainer.meta_steps
        result = self.trainer.fit(meta_steps, progress=self.console)
        self.best_step = result.best_step
        if meta_steps:
            self.metrics["meta_loss"] = result.meta_loss
        quality = weight_quality(self.trainer.meta_params, self.data.good_sources, self.data.is_clean)
        self.metrics.update(quality)
        return result

    def observe(self, record: Mapping[str, Any]) -> None:
        """Log one meta-step."""
        self.folder.log(record)
        if self.logger is not None:
            self.logger(record)

    # --- after it -----------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """Train fresh models with frozen weights (learned, uniform) and read the test stream, once each."""
        trainer = self.trainer
        if self.config.output.save_models:
            disable_progress_bar()  # transformers' own, one per model
            self.folder.save_models(trainer.chain)
        contestants = {"learned": trainer.meta_params, "uniform": baseline(trainer.meta_params)}
        steps = stage_steps(self.config, trainer.step)
        names = [name for name in self.config.final.compare if trainer.learns or name == "uniform"]
        answers: dict[str, list[tuple[str, str, str]]] = {}
        for name in names:
            trained = self._train(contestants[name], steps, f"fresh models, {name} weights", self._fresh)
            self._read_test(name, trained, answers)
            if self.config.final.save_models and name == names[0]:
                self.folder.save_models(trainer.chain, "final_models")
        if not names:
            self._read_test("trained", trainer.chain.train(trainer.meta_params, num_steps=0), answers)
        self.metrics.update(next(iter(self.scores.values()), {}))
        self._show_weights()
        report.print_answers(self.console, answers)
        plain = ", ".join(f"{n} {name} steps" for name, n in steps.items())
        trained_how = f"after training fresh models ({plain})" if names else "of the models trained on the way"
        report.print_scores(self.console, self.scores, f"test, {trained_how}")
        self.doubts = doubts(self.trainer, self.folder.records, self.data, self.metrics)
        report.print_doubts(self.console, self.doubts)

    def _train(
        self, meta_params: Any, steps: Mapping[str, int], label: str, start: Mapping[str, Any] | None = None
    ) -> TrainedChain:
        chain = self.trainer.chain
        start = copy.deepcopy(chain.state_dict() if start is None else start)
        with progress_bar(self.console, label, sum(steps.values())) as advance:
            return retrain(chain, start, meta_params, steps, lambda name, step, loss: advance(name))

    def _read_test(self, name: str, trained: TrainedChain, answers: dict[str, list[tuple[str, str, str]]]) -> None:
        data, stage = self.data, self.config.chain[-1]
        if data.test is None:
            return
        if data.score is not None:
            self.scores[name] = scored(self.trainer.chain, trained, stage, data.score, data.test)
        else:
            self.scores[name] = {"loss": self.trainer.mean_loss(trained, data.test)}
        if data.answers is not None:
            answers[name] = data.answers(as_trained(trained, stage), data.test, NUM_ANSWERS)

    def _show_weights(self) -> None:
        if not self.trainer.learns:
            return
        found, learned = weights_of(self.trainer.meta_params), summary(self.trainer.meta_params)
        if learned:
            report.print_summary(self.console, learned)
        elif found is None:
            report.print_meta_params(self.console, named_tensors(self.trainer.meta_params))
        if found is None:
            return
        key, weights = found
        if key == "source":
            report.print_source_weights(self.console, weights, self.data.source_names, self.data.good_sources)
        else:
            report.print_example_weights(self.console, weights, self.data.is_clean)
        report.print_quality(self.console, self.metrics)

    def save(self) -> None:
        """Write the meta-parameters and the plots."""
        self.folder.save_meta_params(self.trainer.meta_params, self.trainer.last_meta_params)
        self._plot()
        if self.logger is not None:
            found = weights_of(self.trainer.meta_params) if self.trainer.learns else None
            learned = summary(self.trainer.meta_params)
            self.logger.finish({**self.metrics, **learned}, None if found is None else found[1], self.folder.path)

    def _plot(self) -> None:
        if not self.config.output.plots:
            return
        path, data = self.folder.path, self.data
        if self.folder.records:
            report.plot_meta_loss(self.folder.records, path / "meta_loss.png", self.best_step)
        if len(self.scores) > 1:
            report.plot_scores(self.scores, path / "comparison.png")
        found = weights_of(self.trainer.meta_params) if self.trainer.learns else None
        if found is not None and found[0] == "source":
            report.plot_source_weights(found[1], data.source_names, data.good_sources, path / "weights.png")
        elif found is not None:
            report.plot_example_weights(found[1], data.is_clean, path / "weights.png")
            lowest = torch.argsort(found[1])[:NUM_PICTURED].tolist()
            if data.picture is not None:
                data.picture(lowest, path / "lowest_weights.png", "Lowest learned weights")
