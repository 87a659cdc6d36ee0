"""Inner steps by torch's own optimizer, without a graph: the two halves, one call each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metaopt.core.contracts import Tensors, Upstream
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.optimizers.flattened import State

if TYPE_CHECKING:
    from metaopt.core.inner_loop import InnerLoop


class PlainSteps:
    """Inner steps by torch's own optimizer, without a graph: the two halves, one call each.

    Args:
        loop: what to run.
        params, state, buffers: where to start; copied.
        meta_params, upstream: read, outside the graph.
    """

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
        self._frozen = loop.frozen
        self._params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        self._optimizer = loop.rule.bind(self._params, state)

    def gradient(
        self, t: int, inspect: Callable[[Tensor, Tensors], None] | None = None
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the loss of step t, detached, and its raw gradient; buffers move on.

        Args:
            t: the step.
            inspect: called with the loss in its graph and the weights that it may depend on.
        """
        params = {**self._frozen, **self._params}
        with torch.enable_grad():
            loss, buffers = self._loop.loss_at(t, params, self.buffers, self._meta_params, self._upstream)
            if inspect is not None:
                inspect(loss, self._params)
            gradients = torch.autograd.grad(loss, list(self._params.values()), allow_unused=True)
        self.buffers = {name: b.detach() if b.requires_grad else b for name, b in buffers.items()}
        return loss.detach(), dict(zip(self._params, gradients, strict=True))

    @torch.no_grad()
    def update(self, t: int, gradients: Mapping[str, Tensor | None]) -> None:
        """Transform the raw gradient of step t, and let the optimizer step."""
        transformed = self._loop.transformed(gradients)
        for name, param in self._params.items():
            param.grad = self._loop.rule.to_change(transformed[name])
        self._loop.rule.set_hyperparameters(self._optimizer, self._loop.hyperparameters(t, self._meta_params))
        self._optimizer.step()

    def weights(self) -> Tensors:
        """Return copies of the present weights."""
        return {name: p.detach().clone() for name, p in self._params.items()}

    def state(self) -> State:
        """Return a copy of the present optimizer state."""
        return self._loop.rule.read(self._optimizer, self._params)
