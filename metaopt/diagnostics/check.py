"""Central differences of the whole pipeline, set beside the hypergradient."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.chain import Chain, TrainedChain
from metaopt.diagnostics.backward import hypergradient
from metaopt.errors import ConfigError, did_you_mean
from metaopt.meta_params import AnyMetaParameters, as_named, named_tensors
from metaopt.objectives import MetaObjective
from metaopt.random_state import seeded

STEPS = (1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True)
class CheckRow:
    """One direction of one meta-parameter: its slope by the hypergradient and by central differences.

    `uncertainty` is what the difference itself cannot decide: the change between neighbouring steps of its sweep, or
    the rounding of the meta-loss.
    """

    meta_param: str
    direction: str
    hypergradient: float
    difference: float
    uncertainty: float
    step: float
    tolerance: float

    @property
    def error(self) -> float:
        """Relative error of the hypergradient against the difference."""
        scale = max(abs(self.hypergradient), abs(self.difference))
        return abs(self.hypergradient - self.difference) / scale if scale else 0.0

    @property
    def verdict(self) -> str:
        """`agrees`, `undecided` (the difference is too uncertain to tell), or `differs`."""
        gap = abs(self.hypergradient - self.difference)
        scale = max(abs(self.hypergradient), abs(self.difference))
        if gap <= self.tolerance * scale and self.uncertainty <= 10 * self.tolerance * scale:
            return "agrees"
        return "undecided" if gap <= 10 * self.uncertainty else "differs"


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check; prints as a table. `ok` when no row differs, and at least one agrees."""

    rows: tuple[CheckRow, ...]
    meta_loss: float
    gradient: dict[str, Tensor]
    moved: tuple[str, ...] = ()  # buffers that training moves: running statistics

    @property
    def ok(self) -> bool:
        verdicts = [row.verdict for row in self.rows]
        return "differs" not in verdicts and "agrees" in verdicts

    def __str__(self) -> str:
        head = ("meta-parameter", "direction", "hypergradient", "central difference", "rel. error", "verdict")
        rows = [
            (r.meta_param, r.direction, f"{r.hypergradient:+.8e}", f"{r.difference:+.8e}", f"{r.error:.1e}", r.verdict)
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in [head, *rows]]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, *self.remarks])

    @property
    def remarks(self) -> list[str]:
        """What the table alone does not say."""
        verdicts = {row.verdict for row in self.rows}
        found = []
        if "undecided" in verdicts:
            worst = max(row.uncertainty for row in self.rows if row.verdict == "undecided")
            found.append(
                f"undecided: the difference is uncertain by {worst:.1e} (rounding of the meta-loss, a float32 "
                "operation inside a model, or a kink), which is too much beside the slope; neither right nor wrong "
                "is shown"
            )
        if "differs" in verdicts and self.moved:
            first, *rest = self.moved
            more = ", …" if rest else ""
            found.append(
                f"differs: training moves running statistics ({first}{more}) that eval mode reads; they carry "
                "no graph, so the difference holds a part that the hypergradient leaves out. Read that model in train "
                "mode (trained[...].train()), or freeze its statistics"
            )
        return found


def check_hypergradient(
    chain: Chain,
    objective: MetaObjective,
    batch: Any,
    meta_params: AnyMetaParameters,
    *,
    num_directions: int = 1,
    coordinates: Mapping[str, Sequence[int]] | None = None,
    steps: Sequence[float] = STEPS,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> CheckResult:
    """Compare the hypergradient with central differences of the whole pipeline, on float64 copies.

    `(f(φ + h d) − f(φ − h d)) / 2h`, where f runs every stage with torch's own optimizers and no graph, over a sweep
    of h that tells rounding from truncation. The user's chain and meta-parameters are not changed.

    Args:
        chain, objective, batch, meta_params: as in a meta-step.
        num_directions: random unit directions per meta-parameter.
        coordinates: meta-parameter name → flat indices to check one by one.
        steps: of the sweep, relative to a unit direction.
        tolerance: relative error up to which the two agree.
        seed: of the directions.
    """
    _check_sweep(steps)
    pipeline = _Pipeline(chain, objective, batch, meta_params, seed)
    trained, loss = pipeline.run()
    gradient = hypergradient(loss, pipeline.meta_params)
    directions = _directions(named_tensors(pipeline.meta_params), num_directions, coordinates or {}, seed)
    rounding = pipeline.rounding(directions[0][0], directions[0][2]) if directions else 0.0
    rows = []
    for name, label, direction in directions:
        ends = pipeline.along(name, direction, [sign * h for h in steps for sign in (1, -1)])
        slopes = [(a - b) / (2 * h) for a, b, h in zip(ends[::2], ends[1::2], steps, strict=True)]
        slope = float((gradient[name] * direction).sum())
        best, uncertainty = _most_certain(slopes, steps, rounding)
        if slope == 0.0 and not any(slopes):
            uncertainty = 0.0  # nothing reaches this entry, by both routes
        rows.append(CheckRow(name, label, slope, slopes[best], uncertainty, steps[best], tolerance))
    return CheckResult(tuple(rows), float(loss.detach()), gradient, pipeline.moved_buffers(trained))


class _Pipeline:
    """The whole pipeline on float64 copies, as a function of the meta-parameters."""

    def __init__(
        self, chain: Chain, objective: MetaObjective, batch: Any, meta_params: AnyMetaParameters, seed: int
    ) -> None:
        self._chain, self._objective, self._seed = chain.twin(torch.float64), objective, seed
        self.meta_params = copy.deepcopy(meta_params)
        for module in as_named(self.meta_params).values():
            module.double()
        self._batch = self._chain.move(batch)

    def run(self) -> tuple[TrainedChain, Tensor]:
        """Return the trained models and the meta-loss, in the graph where there is one."""
        with seeded(self._seed):  # an objective in train mode would draw new dropout masks at every call
            trained = self._chain.unroll(self.meta_params)
            return trained, self._objective(trained, self._batch, self.meta_params)

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

    def rounding(self, name: str, direction: Tensor) -> float:
        """Return what rounding may change in a meta-loss: 3σ, with `σ² = mean((Δ⁶f)²) / C(12, 6)`.

        Sixth differences leave nothing of a smooth function (Moré and Wild, 2011, doi:10.1137/100786125).
        """
        values = self.along(name, direction, [1e-4 * k for k in range(-4, 5)])
        least = torch.finfo(torch.float64).eps * abs(values[4])
        for _ in range(6):
            values = [b - a for a, b in itertools.pairwise(values)]
        return max(3 * math.sqrt(sum(v * v for v in values) / len(values) / math.comb(12, 6)), least)

    def moved_buffers(self, trained: TrainedChain) -> tuple[str, ...]:
        """Name the floating buffers that training has changed."""
        return tuple(
            f"{stage}.{name}"
            for stage, model in trained.items()
            for name, buffer in model.buffers.items()
            if buffer.is_floating_point() and not torch.equal(buffer, self._chain.stages[stage].structure.buffers[name])
        )


def _directions(
    tensors: Mapping[str, Tensor], num_random: int, coordinates: Mapping[str, Sequence[int]], seed: int
) -> list[tuple[str, str, Tensor]]:
    for name, indices in coordinates.items():
        if name not in tensors:
            raise ConfigError(f"coordinates: there is no meta-parameter {name!r}{did_you_mean(name, tensors)}")
        for index in indices:
            if not 0 <= index < tensors[name].numel():
                raise ConfigError(f"coordinates: {name!r} has {tensors[name].numel()} entries, there is no {index}")
    found = []
    with seeded(seed):
        for name, tensor in tensors.items():
            for i in range(num_random):
                direction = torch.randn(tensor.shape, dtype=tensor.dtype).to(tensor.device)
                found.append((name, f"random {i + 1}", direction / direction.norm()))
            for index in coordinates.get(name, ()):
                direction = torch.zeros_like(tensor)
                direction.view(-1)[index] = 1.0
                found.append((name, f"entry {index}", direction))
    return found


def _check_sweep(steps: Sequence[float]) -> None:
    if len(steps) < 2 or any(step <= 0 for step in steps):
        raise ConfigError(f"steps={list(steps)}: a sweep needs two steps or more, all above 0")


def _most_certain(slopes: Sequence[float], steps: Sequence[float], rounding: float) -> tuple[int, float]:
    """Pick the step whose slope changes least from its neighbour, but never below what rounding may change in it."""
    bounds = [
        math.inf if after == 0.0 and any(slopes) else max(abs(after - before), rounding / h)
        for (before, after), h in zip(itertools.pairwise(slopes), steps[1:], strict=True)
    ]
    best = min(range(len(bounds)), key=bounds.__getitem__)
    return best + 1, bounds[best]
