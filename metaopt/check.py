"""Central differences of the whole pipeline, set beside the hypergradient."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.chain import Chain
from metaopt.diagnostics import hypergradient
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
        unsure = [row for row in self.rows if row.verdict == "undecided"]
        if not unsure:
            return []
        worst = max(row.uncertainty for row in unsure)
        return [
            f"undecided: the difference is uncertain by {worst:.1e} (rounding of the meta-loss, a float32 operation "
            "inside a model, or a kink), which is too much beside the slope; neither right nor wrong is shown"
        ]


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
    twin = chain.twin(torch.float64)
    params = copy.deepcopy(meta_params)
    for module in as_named(params).values():
        module.double()
    batch = twin.move(batch)
    _check_sweep(steps)

    def meta_loss_in_graph() -> Tensor:
        with seeded(seed):  # an objective in train mode would draw new dropout masks at every call
            return objective(twin.unroll(params), batch, params)

    loss = meta_loss_in_graph()
    gradient = hypergradient(loss, params)
    directions = _directions(named_tensors(params), num_directions, coordinates or {}, seed)

    def meta_loss() -> float:
        with torch.no_grad():
            return float(meta_loss_in_graph())

    rows = []
    for name, label, direction in directions:
        tensor = named_tensors(params)[name]
        slopes = [_central_difference(meta_loss, tensor, direction, h) for h in steps]
        slope = float((gradient[name] * direction).sum())
        best, uncertainty = _most_certain(slopes, steps, abs(float(loss.detach())))
        if slope == 0.0 and not any(slopes):
            uncertainty = 0.0  # nothing reaches this entry, by both routes
        rows.append(CheckRow(name, label, slope, slopes[best], uncertainty, steps[best], tolerance))
    return CheckResult(tuple(rows), float(loss.detach()), gradient)


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


@torch.no_grad()
def _central_difference(meta_loss: Any, tensor: Tensor, direction: Tensor, h: float) -> float:
    before = tensor.detach().clone()
    try:
        tensor.copy_(before + h * direction)
        above = meta_loss()
        tensor.copy_(before - h * direction)
        below = meta_loss()
    finally:
        tensor.copy_(before)
    return (above - below) / (2 * h)


def _most_certain(slopes: Sequence[float], steps: Sequence[float], meta_loss: float) -> tuple[int, float]:
    """Pick the step whose slope changes least from its neighbour, but never below the rounding of the meta-loss."""
    rounding = [torch.finfo(torch.float64).eps * max(meta_loss, 1e-300) / h for h in steps]
    changes = [abs(a - b) for a, b in itertools.pairwise(slopes)]
    bounds = [max(change, rounding[i + 1]) for i, change in enumerate(changes)]
    best = min(range(len(bounds)), key=bounds.__getitem__)
    return best + 1, bounds[best]
