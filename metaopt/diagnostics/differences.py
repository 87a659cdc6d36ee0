"""The whole pipeline as a function of the meta-parameters, and its differences over a sweep of steps."""

from __future__ import annotations

import copy
import itertools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.streams import seeded
from metaopt.core.chain import Chain, TrainedChain
from metaopt.core.contracts import Estimator, evaluate
from metaopt.core.meta_params import AnyMetaParameters, as_named, named_tensors
from metaopt.diagnostics.non_finite import locating_in_training

NUM_NOISE_RUNS = 9  # of `Pipeline.noise`
_FINE, _COARSE = 1e-6, 1e-4  # spacings


@dataclass
class Pipeline:
    """The meta-loss of the whole pipeline as a function of the meta-parameters; nothing of it moves.

    `seed` is of the random state in which the objective is evaluated; `on_run` is called after every run.
    """

    chain: Chain
    objective: Any
    batch: Any
    meta_params: AnyMetaParameters
    seed: int = 0
    on_run: Callable[[], object] = lambda: None
    unused: dict[str, Any] = field(default_factory=dict)  # plug-ins that may keep something, as copied at the start

    def in_float64(self) -> Pipeline:
        """Return the same of float64 copies."""
        chain, objective = self.chain.twin(torch.float64), self.objective
        if isinstance(objective, nn.Module):
            objective = copy.deepcopy(objective).double()
        as_named(self.meta_params)  # refuses a tensor that cannot be copied
        meta_params = copy.deepcopy(self.meta_params)
        for module in as_named(meta_params).values():
            module.double()
        made = replace(self, chain=chain, objective=objective, batch=chain.move(self.batch), meta_params=meta_params)
        made.unused = {}
        for slot, part in made.plug_ins.items():
            if part is not None and not isinstance(part, (types.FunctionType, types.MethodType)):
                with suppress(Exception):  # what cannot be copied is not suspected
                    made.unused[slot] = copy.deepcopy(part)
        made.plug(copy.deepcopy(made.unused))  # so that the user's own do not keep something of these runs
        return made

    def by(self, estimator: Estimator | None) -> Pipeline:
        """Return the same with all stages differentiated by this estimator; None for their own."""
        if estimator is None:
            return self
        stages = {name: copy.copy(stage) for name, stage in self.chain.stages.items()}
        for stage in stages.values():
            stage.estimator = estimator
        return replace(self, chain=Chain(**stages))

    @property
    def _slots(self) -> dict[str, tuple[Any, str]]:
        stages, slots = self.chain.stages.items(), ("loss", "transform", "overrides", "initial")
        of_stages = {f"{name}.{slot}": (stage, slot) for name, stage in stages for slot in slots}
        return {"objective": (self, "objective"), **of_stages}

    @property
    def plug_ins(self) -> dict[str, Any]:
        """The objective and what each stage calls, by where they are."""
        return {slot: getattr(holder, attribute) for slot, (holder, attribute) in self._slots.items()}

    def plug(self, parts: Mapping[str, Any]) -> None:
        """Put plug-ins where they belong."""
        for slot, part in parts.items():
            setattr(*self._slots[slot], part)

    @property
    def biases(self) -> tuple[str, ...]:
        """Why some gradient is an estimate by design, as plug-ins say themselves."""
        return tuple(dict.fromkeys(_biases(self.plug_ins.values())))

    def run(self) -> tuple[TrainedChain, Tensor]:
        """Return the trained models and the meta-loss, in the graph where there is one."""
        with seeded(self.seed, self.chain.device):  # an objective in train mode draws new dropout masks at every call
            with locating_in_training():
                trained = self.chain.unroll(self.meta_params)
            loss = evaluate(self.objective, trained, self.batch, self.meta_params)
        self.on_run()
        return trained, loss

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

    def _quiet(self) -> Pipeline:
        """Return the same for runs that are not always taken: a progress bar does not expect them."""
        return replace(self, on_run=lambda: None)

    def noise(self, name: str, direction: Tensor) -> tuple[float, float]:
        """Return the meta-loss here, and what noise may change in it (as `noise_of`).

        Measured at the finest steps, where a sharp bend is smooth still; where those are too fine to change the
        meta-loss (it comes in grains), at coarser ones. All are to one side, which is smooth at a kink right here.
        """
        values = self.along(name, direction, [_FINE * k for k in range(NUM_NOISE_RUNS)])
        here, flat = values[0], sum(a == b for a, b in itertools.pairwise(values))
        if flat >= NUM_NOISE_RUNS // 2:
            values = self._quiet().along(name, direction, [_COARSE * k for k in range(NUM_NOISE_RUNS)])
        return here, noise_of(values)

    def keepers(self, name: str, direction: Tensor, offset: float, noise: float) -> tuple[str, ...]:
        """Name the plug-ins that answer otherwise than a copy of them that was never called: they keep something."""
        quiet = self._quiet()
        used = quiet.plug_ins

        def differs(slots: Iterable[str]) -> bool:
            quiet.plug({slot: copy.deepcopy(self.unused[slot]) for slot in slots})
            try:
                return abs(quiet.along(name, direction, [offset])[0] - expected) > 10 * noise
            finally:
                quiet.plug(used)

        (expected,) = quiet.along(name, direction, [offset])
        if not self.unused or not differs(self.unused):
            return ()
        guilty = [slot for slot in self.unused if differs([slot])]
        return tuple(f"{slot} ({type(self.unused[slot]).__name__})" for slot in guilty or self.unused)


def _biases(parts: Iterable[Any], depth: int = 4) -> Iterator[str]:
    """Yield the `biased_because` of plug-ins, and of those inside them (a sum of losses)."""
    for part in parts:
        if reason := getattr(part, "biased_because", None):
            yield reason
        inside = part if isinstance(part, Mapping) else getattr(part, "__dict__", {})
        if depth and not isinstance(part, type):
            yield from _biases([p for p in inside.values() if isinstance(p, Mapping) or callable(p)], depth - 1)


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
    """Central differences of one direction over steps h, and the one of them that is the most certain.

    `uncertainty` is what the `difference` at `step` cannot decide: how far it is from its neighbour, and never below
    `rounding`, what noise of the meta-loss may change in it. `jump` is how much the slope differs between the two sides
    of a kink, and `sweep` has each step with its difference.
    """

    difference: float
    uncertainty: float
    step: float
    rounding: float
    jump: float
    sweep: tuple[tuple[float, float], ...]


def sweep(ends: Sequence[float], here: float, steps: Sequence[float], noise: float) -> Sweep:
    """Read a sweep: the meta-loss at its `ends`, +h and −h for each of the `steps` h in turn, and in the middle."""
    above, below = ends[::2], ends[1::2]
    slopes = tuple((a - b) / (2 * h) for a, b, h in zip(above, below, steps, strict=True))
    # The two one-sided slopes differ by h·f'' where f is smooth, and by the same at every step where it has a kink.
    bends = [(a + b - 2 * here) / h for a, b, h in zip(above, below, steps, strict=True)]
    best, uncertainty = _most_certain(slopes, steps, noise)
    (h, bend), (wider, more) = (steps[best], bends[best]), (steps[best - 1], bends[best - 1])
    jump = abs(bend * wider - more * h) / abs(wider - h)
    doubt = 4 * noise * (wider / h + h / wider) / abs(wider - h)
    is_kink = jump > max(10 * doubt, 0.5 * abs(more))
    found = tuple(zip(steps, slopes, strict=True))
    return Sweep(slopes[best], uncertainty, h, noise / h, jump if is_kink else 0.0, found)


def _most_certain(slopes: Sequence[float], steps: Sequence[float], noise: float) -> tuple[int, float]:
    """Pick the step whose slope changes least from its neighbour, but never below what noise may change in it."""
    bounds = [
        math.inf if after == 0.0 and any(slopes) else max(abs(after - before), noise / h)
        for (before, after), h in zip(itertools.pairwise(slopes), steps[1:], strict=True)
    ]
    best = min(range(len(bounds)), key=bounds.__getitem__)
    return best + 1, bounds[best]
