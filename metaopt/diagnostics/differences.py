"""The whole pipeline as a function of the meta-parameters, and its differences over a sweep of steps."""

from __future__ import annotations

import copy
import itertools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError
from metaopt.base.random_state import seeded
from metaopt.core.chain import Chain, TrainedChain
from metaopt.core.contracts import MetaObjective, evaluate
from metaopt.core.guards import moved_buffers
from metaopt.core.meta_params import AnyMetaParameters, as_named, named_tensors

NUM_NOISE_RUNS = 9  # of `Pipeline.noise`
_FINE, _COARSE = 1e-6, 1e-4  # spacings


class Pipeline:
    """The meta-loss of the whole pipeline, on float64 copies, as a function of the meta-parameters.

    Args:
        chain, objective, batch, meta_params: as in a meta-step; copied.
        seed: of the random state in which the objective is evaluated.
        on_run: called after every run of the pipeline.
    """

    def __init__(
        self,
        chain: Chain,
        objective: MetaObjective,
        batch: Any,
        meta_params: AnyMetaParameters,
        seed: int,
        on_run: Callable[[], object] = lambda: None,
    ) -> None:
        self._chain, self._objective, self._seed, self._on_run = chain.twin(torch.float64), objective, seed, on_run
        if isinstance(objective, nn.Module):
            self._objective = copy.deepcopy(objective).double()
        as_named(meta_params)  # refuses a tensor that cannot be copied
        self.meta_params = copy.deepcopy(meta_params)
        for module in as_named(self.meta_params).values():
            module.double()
        self._batch = self._chain.move(batch)
        self._slots = {"objective": (self, "_objective")} | {
            f"{name}.{slot}": (stage, slot)
            for name, stage in self._chain.stages.items()
            for slot in ("loss", "transform", "overrides", "initial")
        }
        self._unused = {slot: _copy_of(part) for slot, part in self.plug_ins.items()}
        for slot, part in self._unused.items():  # so that the user's own do not keep something of these runs
            if part is not None:
                setattr(*self._slots[slot], copy.deepcopy(part))

    @property
    def plug_ins(self) -> dict[str, Any]:
        """The objective and what each stage calls, by where they are."""
        return {slot: getattr(holder, attribute) for slot, (holder, attribute) in self._slots.items()}

    @property
    def biases(self) -> tuple[str, ...]:
        """Why some gradient is an estimate by design, as plug-ins say themselves."""
        return tuple(dict.fromkeys(_biases(self.plug_ins.values())))

    @property
    def inexact(self) -> tuple[str, ...]:
        """The estimators that approximate, and whose they are."""
        stages = self._chain.stages.items()
        return tuple(f"{stage.estimator!r} of stage {name!r}" for name, stage in stages if not stage.estimator.exact)

    def run(self) -> tuple[TrainedChain, Tensor]:
        """Return the trained models and the meta-loss, in the graph where there is one."""
        with seeded(self._seed):  # an objective in train mode would draw new dropout masks at every call
            trained = self._chain.unroll(self.meta_params)
            loss = evaluate(self._objective, trained, self._batch, self.meta_params)
        self._on_run()
        return trained, loss

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Let runs that are not always taken go unreported: a progress bar does not expect them."""
        on_run, self._on_run = self._on_run, lambda: None
        try:
            yield
        finally:
            self._on_run = on_run

    @torch.no_grad()
    def along(self, name: str, direction: Tensor, offsets: Sequence[float]) -> list[float]:
        """Return the meta-loss at `φ + offset · direction`, by torch's own optimizers."""
        tensor = named_tensors(self.meta_params)[name]
        before, values = tensor.detach().clone(), []
        try:
            for offset in offsets:
                tensor.copy_(before + offset * direction)
                values.append(float(self.run()[1]))
        finally:
            tensor.copy_(before)
        return values

    def noise(self, name: str, direction: Tensor) -> tuple[float, float]:
        """Return the meta-loss here, and what noise may change in it (as `noise_of`).

        Measured at the finest steps, where a sharp bend is smooth still; where those are too fine to change the
        meta-loss (it comes in grains), at coarser ones. All are to one side, which is smooth at a kink right here.
        """
        values = self.along(name, direction, [_FINE * k for k in range(NUM_NOISE_RUNS)])
        here, flat = values[0], sum(a == b for a, b in itertools.pairwise(values))
        if flat >= NUM_NOISE_RUNS // 2:
            with self._uncounted():
                values = self.along(name, direction, [_COARSE * k for k in range(NUM_NOISE_RUNS)])
        return here, noise_of(values)

    def keepers(self, name: str, direction: Tensor, offset: float, noise: float) -> tuple[str, ...]:
        """Name the plug-ins that answer otherwise than a copy of them that was never called: they keep something."""

        def answer(slots: Iterable[str]) -> float:
            used = self.plug_ins
            try:
                for slot in slots:
                    setattr(*self._slots[slot], copy.deepcopy(self._unused[slot]))
                return self.along(name, direction, [offset])[0]
            finally:
                for slot in slots:
                    setattr(*self._slots[slot], used[slot])

        candidates = [slot for slot, part in self._unused.items() if part is not None]
        with self._uncounted():
            expected = answer([])
            if not candidates or abs(answer(candidates) - expected) <= 10 * noise:
                return ()
            guilty = [slot for slot in candidates if abs(answer([slot]) - expected) > 10 * noise]
        return tuple(f"{slot} ({type(self._unused[slot]).__name__})" for slot in guilty or candidates)

    def moved_buffers(self, trained: TrainedChain) -> tuple[str, ...]:
        """Name the floating buffers that training has changed."""
        return tuple(f"{stage}.{name}" for stage, model in trained.items() for name in moved_buffers(model))


def _biases(parts: Iterable[Any], depth: int = 4) -> Iterator[str]:
    """Yield the `biased_because` of plug-ins, and of those inside them (a sum of losses)."""
    for part in parts:
        reason = getattr(part, "biased_because", None)
        if reason:
            yield reason
        inside = part if isinstance(part, Mapping) else getattr(part, "__dict__", {})
        if depth and not isinstance(part, type):
            yield from _biases([p for p in inside.values() if isinstance(p, Mapping) or callable(p)], depth - 1)


def _copy_of(part: Any) -> Any:
    """Return a copy of a plug-in that may keep something; None of a function, or of what cannot be copied."""
    if part is None or isinstance(part, (types.FunctionType, types.MethodType)):
        return None
    try:
        return copy.deepcopy(part)
    except Exception:
        return None


def noise_of(values: Sequence[float]) -> float:
    """Return what noise may change in a function, from its values at even spacing: 3σ, `σ² = mean((Δ⁶f)²) / C(12, 6)`.

    Sixth differences leave nothing of a smooth function (Moré and Wild, 2011, doi:10.1137/100786125).
    """
    least = torch.finfo(torch.float64).eps * abs(values[0])
    for _ in range(6):
        values = [b - a for a, b in itertools.pairwise(values)]
    return max(3 * math.sqrt(sum(v * v for v in values) / len(values) / math.comb(12, 6)), least)


@dataclass(frozen=True)
class Sweep:
    """Central differences of one direction over steps h, and which of them is the most certain.

    `uncertainty` is what the best one cannot decide: how far it is from its neighbour, and never below `rounding`, what
    noise of the meta-loss may change in it. `jump` is how much the slope differs between the two sides of a kink.
    """

    slopes: tuple[float, ...]
    best: int
    uncertainty: float
    rounding: float
    jump: float


def sweep(ends: Sequence[float], here: float, steps: Sequence[float], noise: float) -> Sweep:
    """Read a sweep.

    Args:
        ends: the meta-loss at +h and −h, for each step h in turn.
        here: the meta-loss in the middle.
        steps: h.
        noise: of the meta-loss.
    """
    above, below = ends[::2], ends[1::2]
    slopes = tuple((a - b) / (2 * h) for a, b, h in zip(above, below, steps, strict=True))
    # The two one-sided slopes differ by h·f'' where f is smooth, and by the same at every step where it has a kink.
    bends = [(a + b - 2 * here) / h for a, b, h in zip(above, below, steps, strict=True)]
    best, uncertainty = _most_certain(slopes, steps, noise)
    (h, bend), (wider, more) = (steps[best], bends[best]), (steps[best - 1], bends[best - 1])
    jump = abs(bend * wider - more * h) / abs(wider - h)
    doubt = 4 * noise * (wider / h + h / wider) / abs(wider - h)
    is_kink = jump > max(10 * doubt, 0.5 * abs(more))
    return Sweep(slopes, best, uncertainty, noise / h, jump if is_kink else 0.0)


def check_steps(steps: Sequence[float]) -> None:
    """Raise if these steps are no sweep."""
    if len(steps) < 2 or any(step <= 0 for step in steps) or len(set(steps)) < len(steps):
        raise ConfigError(f"steps={list(steps)}: a sweep needs two steps or more, all above 0 and each once")


def _most_certain(slopes: Sequence[float], steps: Sequence[float], noise: float) -> tuple[int, float]:
    """Pick the step whose slope changes least from its neighbour, but never below what noise may change in it."""
    bounds = [
        math.inf if after == 0.0 and any(slopes) else max(abs(after - before), noise / h)
        for (before, after), h in zip(itertools.pairwise(slopes), steps[1:], strict=True)
    ]
    best = min(range(len(bounds)), key=bounds.__getitem__)
    return best + 1, bounds[best]
