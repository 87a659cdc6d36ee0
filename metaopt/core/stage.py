"""A stage: one training, as a function (initial weights, meta-parameters, upstream) → trained weights."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metaopt.base.drawn import Epochs
from metaopt.base.errors import ConfigError, StageError
from metaopt.base.ranges import check_counts
from metaopt.base.streams import Ahead, BatchStream, Passing, derived_seed, draw_seed, move, seeded
from metaopt.core.contracts import (
    Estimator,
    HandOver,
    InnerLoss,
    LossFunction,
    Transform,
    Upstream,
    require_arguments,
    telling,
)
from metaopt.core.guards import refuse_unsupported, refuse_unusable
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters, as_given
from metaopt.core.unrolled import Unrolled
from metaopt.core.view import ModelStructure
from metaopt.optimizers.kinds import make_optimizer
from metaopt.optimizers.rule import UpdateRule
from metaopt.optimizers.schedules import Schedule
from metaopt.optimizers.step import attributes, per_element, with_attributes

MOST_HELD = 1000  # batches of an unroll that are drawn and held; of a longer one, an epoch is
_BATCHES, _INIT = 1, 2  # what a seed is derived for, beside the inner steps


class Stage:
    """One training: a model, its inner optimizer, what it minimises, on what data, for how many steps.

    Args:
        model: an `nn.Module`, or a factory of one (fresh initialisations at `reset`).
        optimizer: a callable params → `torch.optim.Optimizer`, or the user's own optimizer over that module.
        loss: an `InnerLoss`, or a function with its arguments.
        batches: a sequence or re-iterable such as a DataLoader; a `HandOver`; or a callable upstream → iterable that
            is run once per unroll, without a graph. Floating tensors are cast to the model's dtype.
        num_steps: inner steps per unroll, T ≥ 1.
        estimator: how the stage is differentiated.
        schedule: optimizer → `torch.optim.lr_scheduler`, moved at every inner step.
        overrides: meta-parameters, t → hyperparameters of inner step t, as numbers or tensors in the graph: one for
            all, a list of one per parameter group, or a mapping from parameter names; or `FromMeta()`.
        transform: gradients by name → gradients by name, before the optimizer (`ClipNorm`, `ClipValue`, all-reduce).
        initial: meta-parameters, upstream → learned initial weights by parameter name; or `FromMeta()`.
        accumulate: batches per inner step; their losses are averaged.
        autocast: `bfloat16` runs the inner loss under `torch.autocast`; the weights keep their dtype.
        seed: of the stage's random state (dropout, order of the data); drawn from torch's generator if None.

    Raises:
        ConfigError: an argument that cannot be used; the message says what to give instead.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        optimizer: Optimizer | Callable[[Any], Optimizer],
        loss: InnerLoss | LossFunction,
        batches: Iterable[Any] | HandOver | Callable[[Upstream], Iterable[Any]],
        num_steps: int,
        estimator: Estimator | None = None,
        *,
        schedule: Callable[[Optimizer], Any] | None = None,
        overrides: Callable[[AnyMetaParameters, int], Mapping[str, Any]] | None = None,
        transform: Transform | None = None,
        initial: Callable[[AnyMetaParameters, Upstream], Mapping[str, Tensor]] | None = None,
        accumulate: int = 1,
        autocast: str | None = None,
        seed: int | None = None,
    ) -> None:
        check_counts("Stage", num_steps=num_steps, accumulate=accumulate)
        require_arguments(loss, ("model", "batch", "meta_params", "upstream"), "Stage: the loss")
        for slot, given, arguments in (
            ("overrides", overrides, ("meta_params", "t")),
            ("initial", initial, ("meta_params", "upstream")),
            ("transform", transform, ("gradients",)),
        ):
            if given is not None:
                require_arguments(given, arguments, f"Stage: {slot}")
        if autocast not in (None, "bfloat16"):
            raise ConfigError(f"Stage: autocast={autocast!r} must be 'bfloat16' or None; float16 needs a loss scale")
        if seed is not None and seed < 0:
            raise ConfigError(f"Stage: seed={seed} must not be negative")
        self.num_steps, self.accumulate, self.batches = num_steps, accumulate, batches
        self.loss, self.overrides, self.transform, self.initial = loss, overrides, transform, initial
        self.estimator, self.autocast = estimator or Unrolled(), None if autocast is None else torch.bfloat16
        self.seed = draw_seed() if seed is None else seed
        self._steps, self._schedule_steps, self._resets = 0, 0, 0
        self._read: set[frozenset[str]] = set()  # see `Training`
        self._seen: set[str] = set()
        self._factory = None if isinstance(model, nn.Module) else model
        self.model: nn.Module = model if isinstance(model, nn.Module) else self._draw_model(model)
        refuse_unusable(self.model, "Stage")
        self.structure = ModelStructure(self.model)
        self.optimizer = make_optimizer(optimizer, self.model)
        self.rule = UpdateRule(self.optimizer, self.structure.params)
        self._schedule = Schedule(schedule, self.optimizer) if schedule is not None else None
        self._initial = self._tensors() if self._factory is None else None
        self._initial_optimizer = copy.deepcopy(self.optimizer.state_dict())
        self._stream = self._open_stream()

    @property
    def like(self) -> Tensor:
        """A parameter whose device and dtype the batches take: a floating one, beside which there may be quantised."""
        return next(p for p in self.structure.params.values() if p.is_floating_point() or p.is_complex())

    def step_seed(self, t: int) -> int:
        """Return the seed of the random state in which the t-th inner step from now is evaluated."""
        return derived_seed(self.seed, self._steps + t)

    def check(self, name: str, meta_params: AnyMetaParameters) -> None:
        """Raise if the stage, of this name, cannot be differentiated or a slot misreads the meta-parameters."""
        self._seen.clear()
        refuse_unsupported(self.model, name)
        params = self.structure.params
        if frozen := [n for n in self.rule.names if not params[n].requires_grad]:
            raise StageError(
                f"stage {name!r}: parameter {frozen[0]!r} was frozen after the Stage was built, not before"
            )
        for slot in (self.overrides, self.initial):
            if check := getattr(slot, "check", None):  # as FromMeta has
                check(self, meta_params)
        self.estimator.check(name, self)

    def begin(
        self,
        name: str,
        upstream: Upstream,
        owners: Mapping[int, str],
        num_steps: int | None = None,
        passing: bool = False,
    ) -> InnerLoop:
        """Fix the batches, the random state and the starting point of the next inner steps (the stage's own if None).

        `upstream` has the trained models of the earlier stages, `owners` is `Chain.owners`. `passing` draws each step's
        batches from the stream when it comes, and lets go of them after.
        """
        self.structure.stage = name
        steps = self.num_steps if num_steps is None else num_steps
        like = self.like
        with telling(lambda: f"the batches of stage {name!r} ({type(self.batches).__name__})"):
            if self._stream is not None and not isinstance(self.batches, HandOver):
                draw = Passing if passing else _batches_ahead
                batches = draw(self._stream, steps, self.accumulate, like)
            else:
                drawn = move(self._write_batches(upstream, steps * self.accumulate), like)
                batches = [drawn[i * self.accumulate : (i + 1) * self.accumulate] for i in range(steps)]
        return InnerLoop(
            name=name,
            structure=self.structure,
            rule=self.rule.snapshot(),
            loss=self.loss,
            batches=batches,
            seeds=[self.step_seed(t) for t in range(steps)],
            device=like.device,
            transform=self.transform,
            autocast=self.autocast,
            initial=self.initial,
            hyperparameters=functools.partial(self._hyperparameters, name, self._schedule_steps),
            first_step=self._schedule_steps,
            owners=owners,
            read=self._read,
            seen=self._seen,
        )

    def _write_batches(self, upstream: Upstream, count: int) -> list[Any]:
        """Return the next `count` batches, made from the trained models before; the stream stays where it is."""
        if count == 0:
            return []
        ahead = [] if self._stream is None else self._stream.peek(count)
        with torch.no_grad(), seeded(derived_seed(self.seed, self._steps, _BATCHES), self.like.device):
            if isinstance(self.batches, HandOver):
                written = list(self.batches.write(upstream, ahead))
                if len(written) != count:
                    kind = type(self.batches).__name__
                    raise StageError(f"{kind}.write returned {len(written)} batches for {count}; return one for each")
                return written
            made = list(itertools.islice(self.batches(upstream), count))  # type: ignore[operator]
        if not made:
            raise StageError("batches: the callable made no batch from the upstream models; it must yield at least one")
        return list(itertools.islice(itertools.cycle(made), count))

    def _hyperparameters(self, name: str, before: int, t: int, meta_params: AnyMetaParameters) -> dict[str, Any]:
        """Return the overrides of step t of a training before which the schedule had taken `before` steps."""
        scheduled = self._schedule.at(before + t) if self._schedule is not None else {}
        if self.overrides is None:
            return scheduled
        with telling(lambda: f"the overrides of stage {name!r}, inner step {t}"):
            learned = self.overrides(as_given(meta_params), t)
        if both := ", ".join(repr(key) for key in scheduled if key in learned):
            raise ConfigError(f"schedule and overrides both give {both}; leave one out, or let overrides compute both")
        return {**scheduled, **learned}

    def commit(self, result: InnerResult, passed: bool = False) -> None:
        """Carry on from a trained model: weights, buffers, optimizer state, random state, and the batch stream.

        `passed` says that the stream has moved on already.
        """
        self._load_tensors({**result.model.params, **result.model.buffers})
        self.rule.write_back(result.model.optimizer_state)
        self._steps += len(result.losses)
        self._schedule_steps += len(result.losses)
        if self._stream is not None and not passed:
            self._stream.advance(len(result.losses) * self.accumulate)
        if self._schedule is not None:
            self._schedule.set(self.optimizer, self._schedule_steps)

    def _tensors(self) -> dict[str, Tensor]:
        """Return copies of what a training changes: trained parameters, and buffers (non-persistent ones too)."""
        params, buffers = self.structure.params, self.structure.buffers
        return {n: t.detach().clone() for n, t in [*((n, params[n]) for n in self.rule.names), *buffers.items()]}

    @torch.no_grad()
    def _load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        changing = {*self.rule.names, *self.structure.buffers}
        for name, own in [*self.structure.params.items(), *self.structure.buffers.items()]:
            if name in tensors and tensors[name].data_ptr() != own.data_ptr():
                own.copy_(tensors[name])
            elif name not in tensors and name in changing:
                raise ConfigError(f"the saved state has no {name!r}, which the stage's model has")

    def reset(self) -> None:
        """Go back to the initial weights (a factory draws new ones) and optimizer state; the data move on."""
        self._resets += 1
        initial = self._initial
        if initial is None and self._factory is not None:
            drawn = ModelStructure(self._draw_model(self._factory))
            initial = {**drawn.params, **drawn.buffers}
        self._load_tensors(initial or {})
        self.optimizer.load_state_dict(copy.deepcopy(self._initial_optimizer))
        self._schedule_steps = 0

    def _draw_model(self, factory: Callable[[], nn.Module]) -> nn.Module:
        with seeded(derived_seed(self.seed, self._resets, _INIT)):
            model = factory()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"Stage: the model factory returned a {type(model).__name__}, not an nn.Module")
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return all that an unroll depends on and `reset` goes back to; frozen weights are the module's own."""
        frozen = {name: p.detach() for name, p in self.structure.params.items() if name not in self.rule.names}
        return {
            "model": {**frozen, **self._tensors()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "stream": None if self._stream is None else self._stream.state_dict(),
            "random": {"seed": self.seed, "steps": self._steps, "resets": self._resets},
            "schedule_steps": self._schedule_steps,
            "initial": copy.deepcopy({"model": self._initial, "optimizer": self._initial_optimizer}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._load_tensors(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state.get("optimizer", self.optimizer.state_dict())))
        if self._stream is not None:
            self._stream.load_state_dict(state["stream"])
        random = state["random"]
        self.seed, self._steps, self._resets = random["seed"], random["steps"], random["resets"]
        self._schedule_steps = state["schedule_steps"]
        initial = copy.deepcopy(state["initial"])
        self._initial, self._initial_optimizer = initial["model"], initial["optimizer"]

    def twin(self, dtype: torch.dtype) -> Stage:
        """Return an independent copy of this stage in another dtype, with the same data ahead of it."""
        twin = copy.copy(self)
        twin.model, kept = copy.deepcopy((self.model, attributes(self.optimizer)))
        twin.optimizer = with_attributes(type(self.optimizer), kept)
        twin.model.to(dtype)
        for module in twin.model.modules():  # transformers' quick kernels of mixtures of experts refuse float64
            chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
            if chosen not in (None, "eager") and hasattr(module, "set_experts_implementation"):
                module.set_experts_implementation("eager")  # type: ignore[operator]
        if isinstance(self.loss, nn.Module):
            twin.loss = copy.deepcopy(self.loss).to(dtype)  # its class weights, say
        for param, entry in twin.optimizer.state.items():
            twin.optimizer.state[param] = {k: v.to(dtype) if per_element(k, v) else v for k, v in entry.items()}
        twin.structure = ModelStructure(twin.model)
        twin.structure.unsaid = []
        twin.rule = UpdateRule(twin.optimizer, twin.structure.params)
        twin._stream = twin._open_stream()
        if self._stream is not None and twin._stream is not None:
            twin._stream.load_state_dict(self._stream.state_dict())
        return twin

    def _open_stream(self) -> BatchStream | None:
        source = self.batches.batches if isinstance(self.batches, HandOver) else self.batches
        if callable(source) and not isinstance(source, Iterable):
            return None
        return BatchStream(source, derived_seed(self.seed, 0, _BATCHES))


def _batches_ahead(stream: BatchStream, num_steps: int, per_step: int, like: Tensor) -> Sequence[list[Any]]:
    """Return the batches of a stream's next steps, fit for `like`; the stream stays where it is.

    Those of a list are looked up when a step asks. Those of a DataLoader are drawn and held; where there are many, and
    no worker processes would have to be started again, they are drawn once more when a step goes back.
    """
    held = stream.peek(min(num_steps, 1))  # raises where there is none
    if stream.is_list and held:
        source, start = list(stream.source), stream.state_dict()["position"]
        return Ahead(lambda i: source[(start + i) % len(source)], num_steps, per_step, like, source)
    if num_steps * per_step > MOST_HELD and not getattr(stream.source, "num_workers", 0):
        return Ahead(Epochs(stream), num_steps, per_step, like)
    held = move(stream.peek(num_steps * per_step), like)
    return [held[i * per_step : (i + 1) * per_step] for i in range(num_steps)]
