"""Inner steps by torch's own optimizer, without a graph: a training as it is without metaopt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt.core.contracts import Gradients, OnStep, Upstream
from metaopt.core.graphs import entries
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.core.view import Models, Tensors
from metaopt.optimizers.flattened import State
from metaopt.optimizers.rule import InPlace

if TYPE_CHECKING:
    from metaopt.core.inner_loop import InnerLoop, InnerResult

LOWER = "lower the inner learning rate, or clip: Stage(..., transform=metaopt.ClipNorm(1.0))"
LOOK = "look for a root or norm at 0, a log of 0 or 0/0 in the loss"


class PlainSteps:
    """The two halves of an inner step, one call each, from copies of `params` and `state` on."""

    def __init__(
        self,
        loop: InnerLoop,
        params: Mapping[str, Tensor],
        state: State,
        buffers: Tensors,
        meta_params: AnyMetaParameters,
        upstream: Upstream,
    ) -> None:
        self.buffers = buffers
        self._loop, self._meta_params, self._upstream = loop, meta_params, upstream
        self._optimizer = InPlace(loop.rule, params, state)

    def gradient(self, t: int, inspect: Callable[[Tensor, Tensors], None] | None = None) -> tuple[Tensor, Gradients]:
        """Return the loss of step t, detached, and its raw gradient; buffers move on.

        `inspect` is called with the loss in its graph and the weights that it may depend on.
        """
        own = self._optimizer.params
        params = {**self._loop.frozen, **own}
        with torch.enable_grad():
            loss, buffers = self._loop.loss_at(t, params, self.buffers, self._meta_params, self._upstream)
            if inspect is not None:
                inspect(loss, own)
            gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        self.buffers = {name: b.detach() if b.requires_grad else b for name, b in buffers.items()}
        return loss.detach(), self._optimizer.join(dict(zip(own, gradients, strict=True)))

    @torch.no_grad()
    def update(self, t: int, gradients: Gradients) -> None:
        """Transform the raw gradient of step t, and let the optimizer step."""
        self._optimizer.step(self._loop.transformed(gradients), self._loop.hyperparameters(t, self._meta_params))

    def weights(self) -> Tensors:
        """Return copies of the present weights."""
        return self._optimizer.weights()

    def state(self) -> State:
        """Return a copy of the present optimizer state."""
        return self._optimizer.state()


def _from_start(loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> PlainSteps:
    with torch.no_grad():
        start = loop.start(loop.own, meta_params, upstream)
    models = Models({name: model.detach() for name, model in upstream.items()})
    return PlainSteps(loop, start, loop.rule.initial_state(), loop.start_buffers(), meta_params, models)


def train_plainly(
    loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream, on_step: OnStep | None = None
) -> InnerResult:
    """Run the same steps with torch's own optimizer, keeping nothing."""
    steps = _from_start(loop, meta_params, upstream)
    losses = []
    with nullcontext() if on_step else loop.opened(upstream):  # what is called meanwhile may draw random numbers
        for t in range(loop.num_steps):
            loss, gradients = steps.gradient(t, (lambda loss, params: loop.check_graph(loss)) if t == 0 else None)
            if t == 0:
                loop.check_gradients(gradients)
            steps.update(t, gradients)
            losses.append(loss)
            loop.watch(losses)
            if on_step is not None:
                on_step(loop.name, t, loss)
    return loop.finish(steps.weights(), steps.buffers, steps.state(), losses)


def first_in_training(loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> str | None:
    """Run a stage's steps once more, looking at each, and say what stops being finite first; None if nothing does."""
    if found := broken(named_tensors(meta_params)):
        return f"meta-parameter {found} is not finite before the first inner step; lower the meta-learning rate"
    steps = _from_start(loop, meta_params, upstream)
    if found := broken(steps.weights()):
        return f"parameter {found} is not finite before the first inner step"
    for t in range(loop.num_steps):
        where, weights = f"inner step {t} of {loop.num_steps}", steps.weights().values()
        loss, gradients = steps.gradient(t)
        if not bool(loss.isfinite()):
            largest = max((float(w.abs().max()) for w in weights if w.numel()), default=0.0)
            return (
                f"the inner loss is {loss.item()} at {where}, with finite weights of up to {largest:.3g}; where they "
                f"grow, {LOWER}; otherwise {LOOK} or what is not finite in the batch"
            )
        if found := broken(gradients):
            return (
                f"the inner gradient of {found} is not finite at {where}, though the loss is {loss.item():.6g}; {LOOK}"
            )
        steps.update(t, gradients)
        if found := broken(steps.weights()):
            return f"parameter {found} is not finite after {t + 1} inner steps of {loop.num_steps}; {LOWER}"
    return None


def broken(tensors: Mapping[Any, Tensor | None]) -> str:
    """Name the tensors that are not finite, or return an empty string."""
    bad = [key for key, t in tensors.items() if t is not None and not bool(entries(t.detach()).isfinite().all())]
    return ", ".join(repr(key) for key in bad[:3]) + (", …" if len(bad) > 3 else "")
