"""The outer loop: unroll, meta-loss, backward, meta-optimizer step, commit or reset, log."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from metaopt.base.errors import ConfigError, MissingPathError, NonFiniteError, did_you_mean
from metaopt.base.ranges import check_counts
from metaopt.base.streams import BatchStream, derived_seed, draw_seed, seeded
from metaopt.core.chain import Chain, TrainedChain
from metaopt.core.contracts import MetaObjective, evaluate, require_arguments, require_scalar
from metaopt.core.meta_params import AnyMetaParameters, as_named, named_tensors
from metaopt.core.unrolled import accumulate, entries, hypergradient
from metaopt.diagnostics.non_finite import located, located_in_training
from metaopt.diagnostics.paths.explain import explained
from metaopt.losses.objectives import as_trained, mean_meta_loss
from metaopt.progress import progress_bar
from metaopt.saving.checkpoints import Checkpoints, refuse_other
from metaopt.saving.trainer_state import made_of, parts_with_state, random_state, set_random_state, without

_LOOK = 1  # what a seed is derived for, beside the meta-losses
Carry = str | int  # "always", "never", or N: start anew after every N meta-steps
Score = Callable[[Any, Iterable[Any]], Mapping[str, float]]
Observer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class MetaResult:
    """What a run of the outer loop ended with.

    `score` is the selection metric at the best look (a loss where there is no metric), `best_step` its meta-step.
    """

    meta_steps: int
    meta_loss: float
    score: float | None
    best_step: int | None
    seconds: float
    stopped_early: bool


@dataclass
class Selection:
    """Which stage is looked at on the selection stream, how often, and when to stop.

    Args:
        batches: of the selection stream: neither trained on nor seen by the meta-parameters.
        stage: name of the stage to look at.
        score: (model, batches) → metrics by name; None for the meta-objective itself, minimised.
        metric: the metric to maximise.
        every: meta-steps between two looks.
        patience: looks without improvement until the run stops; None for never.
    """

    batches: Sequence[Any]
    stage: str
    score: Score | None = None
    metric: str | None = None
    every: int = 10
    patience: int | None = None

    def __post_init__(self) -> None:
        self.batches = list(self.batches)
        if not self.batches:
            raise ConfigError("selection: there is not a single batch to score")
        check_counts("selection", every=self.every, **({} if self.patience is None else {"patience": self.patience}))


class MetaTrainer:
    """The outer loop over a chain.

    Args:
        chain: what is unrolled at each meta-step.
        objective: what the meta-parameters minimise.
        meta_params: one module or a named mapping; without anything to learn, the same inner steps run and no
            meta-step is taken.
        meta_optimizer: over the meta-parameters; None when there is nothing to learn.
        validation: batches of the meta-loss: a sequence or re-iterable, cycled.
        carry: stage name → `always` (carry on from the trained weights), `never` (start each meta-step from the
            initial weights), or N (start anew after every N meta-steps); `always` where it is not given.
        selection: early stopping and the best meta-parameters; None for none.
        observers: called with each meta-step's record: functions, or loggers such as `metaopt.CSVLogger(folder)`.
        validation_batches: of each meta-step; the meta-loss is their mean, for the memory of one of them.
        checkpoint: a folder, or `Checkpoints(folder, every=...)`: the complete state is written there as `fit` goes,
            and `fit` goes on from the last one that it finds there, bit for bit.
    """

    def __init__(
        self,
        chain: Chain,
        objective: MetaObjective | Callable[..., Tensor],
        meta_params: AnyMetaParameters,
        meta_optimizer: Optimizer | None,
        validation: Iterable[Any],
        *,
        carry: Mapping[str, Carry] | None = None,
        selection: Selection | None = None,
        observers: Sequence[Observer] = (),
        seed: int | None = None,
        validation_batches: int = 1,
        checkpoint: str | Path | Checkpoints | None = None,
    ) -> None:
        check_counts("MetaTrainer", validation_batches=validation_batches)
        require_arguments(objective, ("trained", "batch", "meta_params"), "MetaTrainer: the objective")
        self.chain, self.objective, self.meta_params = chain, objective, meta_params
        self.meta_optimizer, self.selection, self.observers = meta_optimizer, selection, tuple(observers)
        self.seed = draw_seed() if seed is None else seed
        self.validation, self.validation_batches = BatchStream(validation, self.seed), validation_batches
        self.carry = _checked_carry(carry or {}, chain)
        for read in getattr(objective, "reads", ()):
            if read not in chain.stages:
                kind, there = type(objective).__name__, did_you_mean(read, chain.stages)
                raise ConfigError(f"{kind} reads stage {read!r}, which the chain does not have{there}")
        _check_covers(meta_optimizer, meta_params)
        if selection is not None and selection.stage not in chain.stages:
            raise ConfigError(f"selection: no stage {selection.stage!r}{did_you_mean(selection.stage, chain.stages)}")
        self.step = 0
        self.last_meta_params: dict[str, Any] | None = None  # where `fit` ended with better ones than the last
        self._best: dict[str, Any] = {"score": None, "step": None, "meta_params": None, "looks_since": 0}
        self._meta_loss: float | None = None  # the last one
        self._seconds = 0.0  # of all meta-steps
        self.checkpoints = Checkpoints(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
        self._sought = False  # whether a checkpoint was looked for

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return bool(named_tensors(self.meta_params))

    def next_batch(self) -> Any:
        """Return the validation batch of the next meta-step; the stream stays where it is."""
        return self.chain.move(self.validation.peek(1)[0])

    def parts(self) -> tuple[Chain, Any, Any, AnyMetaParameters]:
        """Return chain, objective, next batch and meta-parameters: what the diagnostics take."""
        return self.chain, self.objective, self.next_batch(), self.meta_params

    def fit(self, meta_steps: int, progress: bool | Console = False) -> MetaResult:
        """Take meta-steps until `meta_steps` are done in all, or selection stops the run.

        `progress=True` shows a bar in a terminal or a notebook, and nothing elsewhere.

        Afterwards the meta-parameters are those of the best look at the selection stream, if there was one; to go on
        with a run, take `state_dict()` in an observer, before that.
        """
        if not self._sought and self.step == 0:
            self.resume()
        selection, last = self.selection, self.step
        with progress_bar(progress, "meta-steps", meta_steps, done=self.step) as advance:
            while self.step < meta_steps and not self.stopped:
                began, step = time.perf_counter(), self.step + 1
                looks = selection is not None and (step % selection.every == 0 or step == meta_steps)
                used = self._meta_state() if looks else {}
                trained, record = self.meta_step()
                self._meta_loss = record["meta_loss"]
                if selection is not None and looks:
                    record |= self._look(selection, trained, used)
                record["seconds"] = time.perf_counter() - began
                self._seconds += record["seconds"]
                for observe in self.observers:
                    observe(record)
                if self.checkpoints is not None and self.checkpoints.due(step):
                    last = self.save()
                advance(f"meta-loss {record['meta_loss']:.4f}")
        if self.checkpoints is not None and last != self.step:
            self.save()
        best = self._best
        self.last_meta_params = None
        if best["meta_params"] is not None:
            self.last_meta_params = self._meta_state() if self.learns else None
            self._load_meta_params(best["meta_params"])
        meta_loss = float("nan") if self._meta_loss is None else self._meta_loss
        return MetaResult(self.step, meta_loss, best["score"], best["step"], self._seconds, self.stopped)

    @property
    def stopped(self) -> bool:
        """Whether selection has run out of patience."""
        patience = None if self.selection is None else self.selection.patience
        return patience is not None and self._best["looks_since"] >= patience

    @property
    def best_step(self) -> int | None:
        """The meta-step of the best look at the selection stream so far."""
        return self._best["step"]

    def best_meta_params(self) -> dict[str, Any]:
        """Return the state dicts, by module name, of the best meta-parameters so far; without a look, of today's."""
        return self._meta_state() if self._best["meta_params"] is None else self._best["meta_params"]

    def save(self) -> int:
        """Write a checkpoint; return its meta-step."""
        if self.checkpoints is not None:
            self.checkpoints.write(self.step, self._all_state, best=self.step == self.best_step)
        return self.step

    def _all_state(self) -> dict[str, Any]:
        return {"trainer": self.state_dict(), "random": random_state(), "made_of": made_of(self)}

    def resume(self, force: bool = False) -> int | None:
        """Go to the last whole checkpoint, and return its meta-step; None if there is none.

        `force=True` starts those optimizers anew that are of another class than in the checkpoint.

        Raises:
            ConfigError: it is of another training; each difference is named, and nothing was loaded.
        """
        self._sought = True
        found = None if self.checkpoints is None else self.checkpoints.newest()
        if found is None:
            return None
        saved, ours = dict(found.state["made_of"]), made_of(self)
        others = {key for key in ours if key.endswith("optimizer") and saved.get(key) != ours[key]} if force else set()
        refuse_other(
            saved | {key: ours[key] for key in others},
            ours,
            found.path,
            "build the same one, or give another folder (nothing was loaded)",
        )
        self.load_state_dict(without(found.state["trainer"], others))
        set_random_state(found.state["random"])
        return self.step

    def meta_step(self) -> tuple[TrainedChain, dict[str, Any]]:
        """Take one meta-step, and return the trained models with the record of the step.

        Raises:
            NonFiniteError, MissingPathError: before the meta-parameters move.
        """
        try:
            trained = self.chain.unroll(self.meta_params)  # every stage's inner loop, in the graph or stored
        except NonFiniteError as error:
            raise located_in_training(error) from error
        meta_loss = self.meta_loss(trained)  # on the next validation batches
        found = self.differentiate(meta_loss)  # one backward; what is wrong is located and explained here
        self.update(found, trained)  # meta-optimizer, commit, resets, streams
        record = {"meta_step": self.step, "meta_loss": meta_loss.item()}
        if found:
            record["hypergradient_norm"] = torch.cat([entries(g).flatten() for g in found.values()]).norm().item()
        return trained, record | {f"inner_loss/{name}": losses[-1].item() for name, losses in trained.losses.items()}

    def meta_loss(self, trained: TrainedChain) -> Tensor:
        """Return the meta-loss of trained models on the next validation batches; the stream stays where it is."""
        with seeded(derived_seed(self.seed, self.step), self.chain.device):
            batches = [self.chain.move(batch) for batch in self.validation.peek(self.validation_batches)]
            if len(batches) == 1:
                found = evaluate(self.objective, trained, batches[0], self.meta_params)
            else:
                found = mean_meta_loss(self.objective, trained, batches, self.meta_params)
        return require_scalar(found, f"the meta-objective {type(self.objective).__name__}", needs_graph=False)

    def differentiate(self, meta_loss: Tensor) -> dict[str, Tensor]:
        """Return the hypergradient by name, empty where there is nothing to learn.

        Raises:
            NonFiniteError, MissingPathError: with the stage, the step and the line where it is lost.
        """
        if not self.learns:
            if not bool(meta_loss.detach().isfinite()):
                raise NonFiniteError(f"the meta-loss is {meta_loss.item()}; lower the inner learning rate")
            return {}
        try:
            return hypergradient(meta_loss, self.meta_params)
        except MissingPathError as error:
            raise explained(error, *self.parts()) from error
        except NonFiniteError as error:
            raise located(error, self.chain, self.meta_loss, self.meta_params) from error

    def update(self, found: Mapping[str, Tensor], trained: TrainedChain) -> None:
        """Move the meta-parameters by their hypergradient, carry the stages on or start them anew, pass the batches."""
        if found and self.meta_optimizer is not None:
            self.meta_optimizer.zero_grad()
            accumulate(found, self.meta_params)
            self.meta_optimizer.step()
        self.validation.advance(self.validation_batches)
        self.step += 1
        self.chain.commit(trained)
        self.chain.reset([name for name, period in self.carry.items() if period and self.step % period == 0])

    def _meta_state(self) -> dict[str, Any]:
        return {name: copy.deepcopy(module.state_dict()) for name, module in as_named(self.meta_params).items()}

    def _look(self, selection: Selection, trained: TrainedChain, used: dict[str, Any]) -> dict[str, float]:
        """Score a trained stage on the selection stream; of the best score, keep the meta-parameters it used."""
        batches = [self.chain.move(batch) for batch in selection.batches]
        with torch.no_grad(), seeded(derived_seed(self.seed, self.step, _LOOK), self.chain.device):
            if selection.score is None or selection.metric is None:
                key, sign, metrics = "loss", -1, {"loss": self.mean_loss(trained, batches)}
            else:
                key, sign, metrics = selection.metric, 1, selection.score(as_trained(trained, selection.stage), batches)
        if key not in metrics:
            raise ConfigError(f"selection: no metric {key!r}{did_you_mean(key, metrics)}")
        score, best = metrics[key], self._best["score"]
        if math.isfinite(score) and (best is None or sign * score > sign * best):
            self._best = {"score": score, "step": self.step, "meta_params": used, "looks_since": 0}
        else:
            self._best["looks_since"] += 1
        return {f"selection/{name}": value for name, value in metrics.items()}

    @torch.no_grad()
    def mean_loss(self, trained: TrainedChain, batches: Iterable[Any]) -> float:
        """Return the meta-objective's mean over batches."""
        moved = (self.chain.move(batch) for batch in batches)
        found = (evaluate(self.objective, trained, batch, self.meta_params) for batch in moved)
        where = f"the meta-objective {type(self.objective).__name__}"
        losses = [require_scalar(loss, where, needs_graph=False).item() for loss in found]
        return sum(losses) / len(losses)

    def _load_meta_params(self, state: Mapping[str, Any]) -> None:
        for name, module in as_named(self.meta_params).items():
            module.load_state_dict(state[name])

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on."""
        return {
            "step": self.step,
            "chain": self.chain.state_dict(),
            "meta_params": self._meta_state(),
            "meta_optimizer": None if self.meta_optimizer is None else copy.deepcopy(self.meta_optimizer.state_dict()),
            "seed": self.seed,
            "validation": self.validation.state_dict(),
            "best": copy.deepcopy(self._best),
            "meta_loss": self._meta_loss,
            "seconds": self._seconds,
            "parts": {name: copy.deepcopy(part.state_dict()) for name, part in parts_with_state(self)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the run goes on bit for bit."""
        self.chain.load_state_dict(state["chain"])
        self._load_meta_params(state["meta_params"])
        if self.meta_optimizer is not None and "meta_optimizer" in state:
            self.meta_optimizer.load_state_dict(copy.deepcopy(state["meta_optimizer"]))
        self.validation.load_state_dict(state["validation"])
        self.step, self.seed, self._best = state["step"], state["seed"], copy.deepcopy(state["best"])
        self._meta_loss, self._seconds, self._sought = state["meta_loss"], state["seconds"], True
        for name, part in parts_with_state(self):
            part.load_state_dict(copy.deepcopy(state["parts"][name]))


def _check_covers(optimizer: Optimizer | None, meta_params: AnyMetaParameters) -> None:
    learned = named_tensors(meta_params)
    if learned and optimizer is None:
        raise ConfigError("MetaTrainer: there are meta-parameters to learn, and no meta_optimizer to move them")
    moved = {id(param) for group in (optimizer.param_groups if optimizer else ()) for param in group["params"]}
    still = [name for name, tensor in learned.items() if id(tensor) not in moved]
    if still:
        raise ConfigError(
            f"the meta-optimizer does not hold the meta-parameter {', '.join(map(repr, still))}, which would never "
            "move; build it over meta_params.parameters(), or over [A] of a tensor A"
        )


def _checked_carry(carry: Mapping[str, Carry], chain: Chain) -> dict[str, int]:
    """Return stage name → period of resets, 0 for never."""
    periods: dict[str, int] = {}
    for name, value in carry.items():
        if name not in chain.stages:
            raise ConfigError(f"carry: no stage {name!r}{did_you_mean(name, chain.stages)}")
        if value in ("always", "never"):
            periods[name] = int(value == "never")
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            periods[name] = value
        else:
            raise ConfigError(f"carry: {value!r} of stage {name!r} must be always, never, or a whole number ≥ 1")
    return periods
