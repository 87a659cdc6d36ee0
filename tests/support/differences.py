"""A chain of trainings by plain `torch.optim`, without a graph through its steps, and central differences of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference import Chain, Problem, Tensors, Trained, Training, named_tensors, norm, replayable


def _train_plainly(stage: Training, phi: Any, upstream: Mapping[str, Trained]) -> Trained:
    module, optimizer = stage.private_copy()
    trainable = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    names = {parameter: name for name, parameter in module.named_parameters()}
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    model = Trained(module.train(), dict(module.named_parameters()), dict(module.named_buffers()))
    if stage.initial is not None:
        with torch.no_grad():
            for name, value in stage.initial(phi, upstream).items():
                model.params[name].copy_(value)
    for step in range(stage.num_steps):
        loss = stage.loss(model, stage.step_inputs(step), phi, upstream)
        found = torch.autograd.grad(loss, trainable, allow_unused=True)
        gradients = {names[p]: g for p, g in zip(trainable, found, strict=True) if g is not None}
        gradients = gradients if stage.transform is None else stage.transform(gradients)
        for parameter in trainable:
            parameter.grad = gradients.get(names[parameter])
        changes = {} if stage.overrides is None else stage.overrides(phi, step)
        for group, given in zip(optimizer.param_groups, options, strict=True):
            group.update({**given, **{key: float(value) for key, value in changes.items()}})
        optimizer.step()
    return Trained(module.eval().requires_grad_(False), model.params, model.buffers)


def train_plainly(chain: Chain, phi: Any) -> dict[str, Trained]:
    """Train every stage in order with its own `torch.optim` optimizer; no graph links the steps."""
    trained: dict[str, Trained] = {}
    frozen = copy.deepcopy(phi)
    for tensor in named_tensors(frozen).values():
        tensor.requires_grad_(False)
    with replayable():
        for name, stage in chain.items():
            trained[name] = _train_plainly(stage, frozen, dict(trained))
    return trained


@dataclass(frozen=True)
class Difference:
    """A finite difference: its best estimate and how far the estimates around it lie."""

    value: float
    error: float


def central_difference(function: Callable[[float], float], first: float, levels: int = 6) -> Difference:
    """Derivative of `function` at 0: central differences at steps first/3ᵏ, extrapolated to step 0 (Ridders' table).

    The step shrinks until rounding wins; the entry whose neighbours agree best is kept. Its error is what they
    disagree by, or the rounding of the values over the step if that is more.
    """
    row: list[float] = []
    best = Difference(float("nan"), float("inf"))
    for level in range(levels):
        step = first / 3**level
        ahead, behind = function(step), function(-step)
        rounding = torch.finfo(torch.float64).eps * (abs(ahead) + abs(behind)) / step
        previous, row = row, [(ahead - behind) / (2 * step)]
        for order, coarse in enumerate(previous, start=1):
            row.append(row[-1] + (row[-1] - coarse) / (9**order - 1))
            error = max(abs(row[-1] - row[-2]), abs(row[-1] - coarse), rounding)
            best = Difference(row[-1], error) if error < best.error else best
    return best


def directional_difference(problem: Problem, direction: Tensors, first: float = 1e-2) -> Difference:
    """Derivative of the plain pipeline's meta-loss along `direction` in the space of meta-parameters."""

    def meta_loss(distance: float) -> float:
        moved = copy.deepcopy(problem.phi)
        with torch.no_grad():
            for name, tensor in named_tensors(moved).items():
                tensor.add_(direction[name], alpha=distance)
        trained = train_plainly(problem.chain, moved)
        with torch.no_grad(), replayable():
            return float(problem.objective(trained, problem.batch, moved))

    return central_difference(meta_loss, first)


def directions(phi: Any, num_random: int = 2, coordinates: Sequence[tuple[str, int]] = ()) -> list[Tensors]:
    """Random unit directions over all meta-parameters, then chosen coordinates (name, flat position)."""
    generator = torch.Generator().manual_seed(0)
    tensors, found = named_tensors(phi), []
    for _ in range(num_random):
        normal = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in tensors.items()}
        found.append({n: t / norm(normal) for n, t in normal.items()})
    for name, position in coordinates:
        unit = {n: torch.zeros_like(t, requires_grad=False) for n, t in tensors.items()}
        unit[name].view(-1)[position] = 1.0
        found.append(unit)
    return found


def difference_error(found: Tensors, problem: Problem, **kwargs: Any) -> float:
    """Largest |⟨found, d⟩ − central difference along d| / ‖found‖ over `directions(problem.phi, **kwargs)`."""
    errors = []
    for direction in directions(problem.phi, **kwargs):
        difference = directional_difference(problem, direction)
        slope = sum(float((found[name] * d).sum()) for name, d in direction.items())
        errors.append(abs(slope - difference.value) / norm(found))
    return max(errors)
