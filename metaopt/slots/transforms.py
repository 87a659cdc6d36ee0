"""Ready parts of an inner training: gradient clipping, optimizers with parameter groups, schedules in sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import matching
from metaopt.optimizers.rule import Tensors


@dataclass(frozen=True)
class ClipNorm:
    """Scale all gradients of a step so that their joint norm is at most `max_norm`; differentiated through.

    `g ← g · min(1, max_norm / (‖g‖ + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`; `norm_type` inf: the largest entry.
    """

    max_norm: float
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        if not (self.max_norm > 0 and self.norm_type > 0):
            raise ConfigError(f"{self}: max_norm and norm_type must be above 0")

    def __call__(self, gradients: Tensors) -> Tensors:
        """Return the clipped gradients, by the same names."""
        if not gradients:
            return {}
        if self.norm_type == 2.0:
            clipped: Any = _ClipNorm.apply(self.max_norm, *gradients.values())
            return dict(zip(gradients, clipped, strict=True))
        scale = _scale(self.max_norm, _norm(list(gradients.values()), self.norm_type))
        return {name: g * scale.to(g) for name, g in gradients.items()}


def _norm(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    norms = [torch.linalg.vector_norm(g, norm_type) for g in gradients]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]), norm_type)


def _scale(max_norm: float, norm: Tensor) -> Tensor:
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


class _ClipNorm(torch.autograd.Function):
    """`y = s g`, `s = min(1, c / (‖g‖ + 1e-6))`, whose adjoint writes each element twice (autograd's own: six times).

    `∂g = s ∂y + k g`, `k = −(∂y·g) s / ((‖g‖ + 1e-6) ‖g‖)`, or 0 where nothing is clipped. The norm is taken again in
    the backward, in the graph of g, so that it can be differentiated once more.
    """

    @staticmethod
    def forward(ctx: Any, max_norm: float, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.max_norm = max_norm
        ctx.save_for_backward(*gradients)
        scale = _scale(max_norm, _norm(gradients, 2.0))
        return tuple([g * scale.to(g) for g in gradients])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, ...] = ctx.saved_tensors
        norm = _norm(gradients, 2.0)
        scale = _scale(ctx.max_norm, norm)
        along = [torch.dot(u.reshape(-1), g.reshape(-1)).to(norm) for u, g in zip(grads, gradients, strict=True)]
        clipped = (norm > 0) & (ctx.max_norm / (norm + 1e-6) <= 1.0)
        length = torch.where(clipped, norm, 1.0)
        factor = torch.where(clipped, -torch.stack(along).sum() * scale / ((length + 1e-6) * length), 0.0)
        pairs = zip(grads, gradients, strict=True)
        return None, *[torch.addcmul(u * scale.to(u), g, factor.to(g)) for u, g in pairs]


@dataclass(frozen=True)
class ClipValue:
    """Clip every entry of every gradient to [−value, value], as `torch.nn.utils.clip_grad_value_`.

    The derivative is 1 inside and 0 outside; `value` is above 0.
    """

    value: float

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ConfigError(f"{self}: value must be above 0")

    def __call__(self, gradients: Tensors) -> Tensors:
        """Return the clipped gradients, by the same names."""
        return {name: g.clamp(-self.value, self.value) for name, g in gradients.items()}


def grouped(
    params: Sequence[Any],
    optimizer: Callable[[list[dict[str, Any]]], Optimizer],
    no_decay: Sequence[str] = (),
    groups: Sequence[Mapping[str, Any]] = (),
) -> Optimizer:
    """Build an optimizer over parameter groups that are chosen by name.

    An optimizer's factory for a stage: `functools.partial(metaopt.grouped, optimizer=adamw, no_decay=["*.bias"])`.

    Args:
        params: the trained parameters, as a stage hands them over (with their names).
        no_decay: patterns (`*.bias`, `encoder.*`) of the parameters whose weight decay is 0.
        groups: `{"names": patterns, option: value, …}`; a parameter belongs to the first one that names it.

    Raises:
        ConfigError: a pattern that matches nothing, an unknown option, or parameters that come without names.
    """
    names = getattr(params, "names", None)
    if names is None:
        raise ConfigError(
            "grouped: the parameters come without names; give it to a stage as a factory: Stage(model, "
            "functools.partial(metaopt.grouped, optimizer=..., no_decay=[...]), ...)"
        )
    undecayed = matching("grouped: no_decay", no_decay, names, "trained parameter")
    group_of: dict[str, int] = {}
    for i, group in enumerate(groups):
        for name in matching(f"grouped: groups[{i}].names", group.get("names", ()), names, "trained parameter"):
            group_of.setdefault(name, i)
    members: dict[tuple[int, bool], list[Any]] = {}
    for name, param in zip(names, params, strict=True):
        members.setdefault((group_of.get(name, -1), name in undecayed), []).append(param)
    specs = []
    for (which, without), group_params in sorted(members.items()):
        options = {} if which < 0 else {k: v for k, v in groups[which].items() if k != "names"}
        specs.append({"params": group_params, **options, **({"weight_decay": 0.0} if without else {})})
    built = optimizer(specs)
    for key in {key for spec in specs for key in spec} - {"params"}:
        if key not in built.defaults:
            kind = type(built).__name__
            raise ConfigError(f"grouped: {kind} has no hyperparameter {key!r}{did_you_mean(key, built.defaults)}")
    return built


def sequential(
    optimizer: Optimizer, schedules: Sequence[Callable[[Optimizer], LRScheduler]], milestones: Sequence[int]
) -> SequentialLR:
    """Build `torch.optim.lr_scheduler.SequentialLR` of schedules that are partial (optimizer → scheduler).

    Each but the first begins at its milestone, a step.
    """
    return SequentialLR(optimizer, [schedule(optimizer) for schedule in schedules], milestones=list(milestones))
