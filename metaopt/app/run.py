"""What a run does around the outer loop: check, warm up, learn, compare, save."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from transformers.utils.logging import disable_progress_bar

from metaopt.app import report
from metaopt.app.build import build, stage_steps
from metaopt.app.config import with_note
from metaopt.app.final import doubts, weight_quality, weights_of
from metaopt.app.folder import CHECKPOINTS, CONFIG, METRICS, RESULT, digest, flat, read_config
from metaopt.app.interrupts import Interrupted
from metaopt.app.job import Job
from metaopt.app.loggers import Logger
from metaopt.app.steady import error_of
from metaopt.app.tracking import save_meta_params, save_models
from metaopt.base.errors import MetaoptError, first_line
from metaopt.base.streams import seeded
from metaopt.core.chain import TrainedChain
from metaopt.data.checks import checked
from metaopt.diagnostics.check import check_hypergradient
from metaopt.losses.objectives import as_trained
from metaopt.meta_params.tables import baseline, summary
from metaopt.saving.checkpoints import Checkpoints, refuse_other
from metaopt.saving.files import as_json, write_text

NUM_ANSWERS = 6
HOW = ("resume", "resume_force", "overwrite")  # of the config: how the folder is taken, and nothing of the run


def train(config: DictConfig, folder: str | Path, overrides: Sequence[str] = ()) -> float:
    """Build the parts, learn the meta-parameters, compare, report; return the selection metric.

    `config` is as `metaopt.app.config.prepare` returns it; the run writes to `folder`, `overrides` among it.

    Raises:
        LateError: what was learned is on disk, and something that came after has failed.
    """
    with Run(config, folder, overrides) as run:
        if not run.is_over:
            run.build()
            run.begin()
            run.warm_up()
            run.check_first_step()
            run.learn()
            run.compare()
            run.save()
    if run.errors:
        raise LateError(run)
    return run.score


class LateError(MetaoptError):
    """A run has learned what it should, and something that came after has failed."""

    def __init__(self, run: Run) -> None:
        self.score, lines = run.score, "\n".join(f"  - {error}" for error in run.errors)
        super().__init__(f"what was learned is in {run.path}; what came after has failed in part:\n{lines}")


class Run(Job):
    """One run in a folder that it holds alone: a new one, or one that it goes on with."""

    def __init__(self, config: DictConfig, folder: str | Path, overrides: Sequence[str] = ()) -> None:
        super().__init__(OmegaConf.masked_copy(config, [str(key) for key in config if key not in HOW]), folder)
        self.resume, self.force, self.overwrite = (config.get(key) for key in HOW)
        self._given = cast(dict[str, Any], OmegaConf.to_container(self.config, resolve=False))
        self.overrides = list(overrides)
        self.records: list[Mapping[str, Any]] = []
        self.metrics: dict[str, float] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.answers: dict[str, Sequence[tuple[str, str, str]]] = {}
        self.errors: list[str] = []
        self.logger: Any = None

    # --- the folder ----------------------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        """Whether there is a run in the folder with which this one goes on."""
        return self.folder.holds_run and not self.overwrite

    @property
    def is_over(self) -> bool:
        """Whether that run is complete."""
        return self.goes_on and self.folder.found.get("status") == "complete" and not self.force

    @property
    def score(self) -> float:
        """What a sweep compares runs by: the best selection metric; without a look, the last meta-loss."""
        found = (self.folder.written or self.folder.found).get("score")
        return float("nan") if found is None else float(found)

    def claim(self) -> None:
        """Take the folder; refuse to go on with a run of another config."""
        self.folder.claim(may_hold=bool(self.resume or self.overwrite))
        if self.goes_on and not self.force:
            how = "give that run's options, or resume_force=true to go on with those of now (nothing was changed)"
            try:
                refuse_other(flat(read_config(self.path)), flat(self._given), self.path / CONFIG, how)
            except BaseException:
                self.folder.release()
                raise
        if self.is_over:
            report.say(self.console, [f"{self.path}: complete already, with score {self.score:.6g}"])
        elif not self.folder.holds_run:
            self.folder.open(self.facts())

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "config_digest": digest(self._given), "overrides": self.overrides}

    def finish(self, error: BaseException | None) -> None:
        if self.logger is not None:
            with self.going_on("the logger"):
                self.logger.close()
        checkpoints = self.trainer.checkpoints.error if hasattr(self, "trainer") and self.trainer.checkpoints else ""
        found = {"the checkpoints": checkpoints, "the console": error_of(self.console), RESULT: self.folder.error}
        self.errors += [f"{what}: {text}" for what, text in found.items() if text]
        if error is None and self.errors:
            self.folder.tell(status="complete_with_errors", errors=self.errors)
        super().finish(error)
        if isinstance(error, Interrupted):
            of = f"of {self.config.trainer.meta_steps}" if hasattr(self, "trainer") else ""
            step = f" after meta-step {self.trainer.step} {of}" if of else ""
            error.said = (
                f"{error.name}: the run was interrupted{step}; go on: metaopt resume={shlex.quote(str(self.path))}"
            )

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Tell what fails in the block, and go on: what was learned is on disk."""
        try:
            yield
        except Exception as error:
            if (told := f"{what}: {with_note(error)}") not in self.errors:
                self.errors.append(told)
                report.say(self.console, [f"{told}; the run goes on"], "red")

    # --- what happens, in order ----------------------------------------------------------------------------------

    def build(self) -> None:  # type: ignore[override]
        """Build everything, and load the state of the run to go on with; nothing is written before that."""
        period = self.config.trainer
        kept = Checkpoints(self.path / CHECKPOINTS, period.get("checkpoint_every"), period.get("keep_checkpoints", 2))
        super().build([self.observe], kept)
        self._fresh = copy.deepcopy(self.trainer.chain.state_dict())
        self._from = self.trainer.resume(bool(self.force)) if self.goes_on else None

    def begin(self) -> None:
        """Begin to write, start the logger, and take up what the run to go on with has left."""
        before = read_records(self.path, self._from) if self._from is not None else []
        if not self.folder.is_open:
            self.folder.open(self.facts(), anew=not self.goes_on)
        write_text(self.path / METRICS, "".join(as_json(record) + "\n" for record in before))
        super().begin()
        if self._from is not None:
            report.say(self.console, [f"going on after meta-step {self._from}"])
        if self.config.get("logger"):
            self.logger = build("logger", self.config.logger, self.path, kind=Logger)
        self.records = [*before]
        for record in before:
            self._log(record)
        if self.folder.found.get("test") and (self._from == self.config.trainer.meta_steps or self.trainer.stopped):
            self.scores, self.answers = dict(self.folder.found["test"]), dict(self.folder.found["answers"])
            self.folder.tell(test=self.scores, answers=self.answers)

    def warm_up(self, num_steps: int | None = None) -> None:
        """Train the stages by plain optimizers, unless a checkpoint has it."""
        if self._from is None:
            super().warm_up(num_steps)
            if any(self.config.stages[name].warmup_steps for name in self.config.chain):
                self.trainer.save()

    def check_first_step(self) -> None:
        """Show the first hypergradient beside a central difference of the whole chain."""
        config = self.config.trainer
        if self._from or not (config.check_first_step and self.trainer.learns and config.meta_steps):
            return
        try:
            check = check_hypergradient(*self.trainer.parts(), coordinates=self.small_entries(), seed=config.seed)
        except Exception as error:  # what is wrong with the training itself, its first meta-step says better
            reason = f"on a float64 copy: {first_line(error)}"
            report.say(self.console, [f"the first meta-step could not be checked, {reason}; the run goes on"])
        else:
            report.print_check(self.console, check)

    def learn(self) -> None:
        """Take the meta-steps, with a progress bar, and write what was learned."""
        trainer = self.trainer
        result = trainer.fit(self.config.trainer.meta_steps, progress=self.console)
        self._save_learned()
        if self.config.trainer.meta_steps:
            self.metrics["meta_loss"] = result.meta_loss
        score = result.meta_loss if result.score is None else result.score
        best = {"meta_step": result.best_step, "score": result.score}
        self.folder.tell(metrics=self.metrics, score=score, best=best, stopped_early=result.stopped_early)

    def observe(self, record: Mapping[str, Any]) -> None:
        """Write one meta-step's numbers, at once; what was learned by then is written before them."""
        step = self.trainer.step
        if step in (self.trainer.best_step, self.config.trainer.meta_steps):
            self._save_learned()
        self.records.append(record)
        with self.going_on(METRICS), (self.path / METRICS).open("a") as file:
            file.write(as_json(record) + "\n")
        self._log(record)

    def _log(self, record: Mapping[str, Any]) -> None:
        if self.logger is not None:
            with self.going_on("the logger"):
                self.logger(record)

    def _save_learned(self) -> None:
        """Write the best meta-parameters so far, and the last ones; on a full disk, instead of the checkpoints."""
        states = self.trainer.best_meta_params(), self.trainer.last_meta_params
        try:
            save_meta_params(*states, self.path)
        except OSError:
            assert self.trainer.checkpoints is not None
            self.trainer.checkpoints.clear()
            save_meta_params(*states, self.path)

    def compare(self) -> None:
        """Train fresh models with frozen weights (learned, uniform) and read the test stream, once each."""
        trainer, final = self.trainer, self.config.final
        self.metrics |= weight_quality(trainer.meta_params, self.data.good_sources, self.data.is_clean)
        if self.config.output.save_models:
            disable_progress_bar()  # transformers' own, one per model
            with self.going_on("saving the models"):
                save_models(trainer.chain, self.path / "models")
        names = [name for name in final.compare if trainer.learns or name == "uniform"]
        steps = stage_steps(self.config, trainer.step)
        for name in names or ["trained"]:
            if name not in self.scores:
                with self.going_on(f"the test of {name} weights" if names else "the test"):
                    self._contest(name, steps if names else None, final.save_models and name == names[0])
        self.metrics |= next(iter(self.scores.values()), {})
        plain = ", ".join(f"{n} {name} steps" for name, n in steps.items())
        trained_how = f"after training fresh models ({plain})" if names else "of the models trained on the way"
        with self.going_on("the report"):
            if trainer.learns:
                report.print_learned(self.console, trainer.meta_params, self.data)
                report.print_quality(self.console, self.metrics)
            report.print_answers(self.console, self.answers)
            report.print_scores(self.console, self.scores, f"test, {trained_how}")
            found = doubts(trainer, self.records, self.data, self.metrics)
            report.say(self.console, [*found, report.REMEDIES] if found else [], "yellow")
            self.folder.tell(metrics=self.metrics, **({"doubts": found} if found else {}))

    def _contest(self, name: str, steps: Mapping[str, int] | None, save: bool) -> None:
        """Test the models that fresh ones become with these weights, or, without steps, those trained on the way."""
        trainer = self.trainer
        if steps is None:
            trained = trainer.chain.train(trainer.meta_params, num_steps=0)
        else:
            trainer.chain.load_state_dict(copy.deepcopy(self._fresh))
            weights = trainer.meta_params if name == "learned" else baseline(trainer.meta_params)
            trained = self.train(weights, steps, f"fresh models, {name} weights")
        scores, answers = self._test(trained)
        if save:
            save_models(trainer.chain, self.path / "final_models")
        self.scores[name], self.answers[name] = scores, answers
        self.folder.tell(test=self.scores, answers=self.answers)

    def _test(self, trained: TrainedChain) -> tuple[dict[str, float], Sequence[tuple[str, str, str]]]:
        """Score the last stage on the test stream, fed as it was in training; return some of its answers too."""
        data, model, test = self.data, as_trained(trained, self.config.chain[-1]), checked("test", self.data.test)
        if data.score is None:
            scores = {"loss": self.trainer.mean_loss(trained, test)}
        else:
            with torch.no_grad(), seeded(0):  # a hand-over may sample what the stage reads
                scores = dict(data.score(model, [self.trainer.chain.move(batch) for batch in test]))
        return scores, [] if data.answers is None else data.answers(model, data.test, NUM_ANSWERS)

    def save(self) -> None:
        """Draw the plots, and tell the logger how it ended."""
        meta_params = self.trainer.meta_params
        found = weights_of(meta_params) if self.trainer.learns else None
        if self.config.output.plots:
            with self.going_on("the plots"):
                if self.records:
                    report.plot_meta_loss(self.records, self.path / "meta_loss.png", self.trainer.best_step)
                if len(self.scores) > 1:
                    report.plot_scores(self.scores, self.path / "comparison.png")
                if found is not None:
                    report.plot_weights(*found, self.data, self.path)
        if self.logger is not None:
            with self.going_on("the logger"):
                weights = None if found is None else found[1]
                self.logger.finish({**self.metrics, **summary(meta_params)}, weights, self.path)


def read_records(folder: Path, last: int) -> list[dict[str, Any]]:
    """Return the records of a run's meta-steps up to this one; a line that was cut short is not one."""
    found: list[dict[str, Any]] = []
    for line in (folder / METRICS).read_text().splitlines() if (folder / METRICS).is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("meta_step", last + 1) <= last:
            found.append(record)
    return found
