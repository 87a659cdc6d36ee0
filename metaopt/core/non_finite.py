"""Where a training first stops being finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt.core.contracts import Upstream
from metaopt.core.graphs import entries
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.core.plain import PlainSteps
from metaopt.core.view import Models

if TYPE_CHECKING:
    from metaopt.core.inner_loop import InnerLoop

LOWER = "lower the inner learning rate, or clip: Stage(..., transform=metaopt.ClipNorm(1.0))"
LOOK = "look for a root or norm at 0, a log of 0 or 0/0 in the loss"


def first_in_training(loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> str | None:
    """Run a stage's steps once more, looking at each, and say what stops being finite first; None if nothing does."""
    broken = _broken(named_tensors(meta_params))
    if broken:
        return f"meta-parameter {broken} is not finite before the first inner step; lower the meta-learning rate"
    with torch.no_grad():
        start = loop.start({name: loop.structure.params[name] for name in loop.rule.names}, meta_params, upstream)
    if _broken(start):
        return f"parameter {_broken(start)} is not finite before the first inner step"
    models = Models({name: model.detach() for name, model in upstream.items()})
    steps = PlainSteps(loop, start, loop.rule.initial_state(), loop.start_buffers(), meta_params, models)
    of_all = f"of {loop.total or loop.num_steps}"
    for t in range(loop.num_steps):
        where, largest = f"inner step {loop.offset + t} {of_all}", _largest(steps.weights())
        loss, gradients = steps.gradient(t)
        if not bool(loss.isfinite()):
            return (
                f"the inner loss is {loss.item()} at {where}, with finite weights of up to {largest:.3g}; where they "
                f"grow, {LOWER}; otherwise {LOOK} or what is not finite in the batch"
            )
        if _broken(gradients):
            return (
                f"the inner gradient of {_broken(gradients)} is not finite at {where}, though the loss is "
                f"{loss.item():.6g}; {LOOK}"
            )
        steps.update(t, gradients)
        if _broken(steps.weights()):
            taken = loop.offset + t + 1
            return f"parameter {_broken(steps.weights())} is not finite after {taken} inner steps {of_all}; {LOWER}"
    return None


def _broken(tensors: Mapping[Any, Tensor | None]) -> str:
    """Name the tensors that are not finite, or return an empty string."""
    bad = [key for key, t in tensors.items() if t is not None and not bool(entries(t.detach()).isfinite().all())]
    return ", ".join(repr(key) for key in bad[:3]) + (", …" if len(bad) > 3 else "")


def _largest(tensors: Mapping[str, Tensor]) -> float:
    return max((float(t.abs().max()) for t in tensors.values() if t.numel()), default=0.0)
