"""One inner step that can be evaluated again, as far as the gradients that the optimizer gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import StageError
from metaopt.core.inner_loop import InnerLoop
from metaopt.diagnostics.paths.cuts import Part
from metaopt.diagnostics.paths.marks import Watch


class Step:
    """One inner step, to be evaluated again: its loss, raw gradients and moved buffers."""

    def __init__(self, watch: Watch, loop: InnerLoop, t: int, params: Any, buffers: Any, *read: Any) -> None:
        self._watch, self._loop, self._t = watch, loop, t
        self._params, self._before, self._read = params, buffers, read
        self.loss: Any = None
        self.buffers = buffers
        self.gradients: dict[str, Tensor | None] = dict.fromkeys(params)
        self.failure: str | None = None

    def evaluate(self) -> list[Any]:
        """Return the step's gradients as the optimizer gets them; of a loss without a graph, the loss."""
        loop = self._loop
        try:
            self._watch.run(Part("the loss", loop.name), self._take_loss)
        except StageError as error:  # that it has no graph is what is to be explained
            if self.loss is None:
                raise
            self.failure = str(error)
            return [self.loss]
        found = torch.autograd.grad(self.loss, list(self._params.values()), create_graph=True, allow_unused=True)
        self.gradients = dict(zip(self._params, found, strict=True))
        after = self._watch.run(Part("the transform", loop.name), lambda: loop.transformed(self.gradients), more=True)
        return [g for g in after.values() if g is not None] or [self.loss]

    def _take_loss(self) -> None:
        """Evaluate the loss; what it returns is kept whether or not it can be differentiated."""
        loop, given = self._loop, self._loop.loss
        self.loss = None

        def recorded(*args: Any) -> Any:
            self.loss = given(*args)
            return self.loss

        loop.loss = recorded
        try:
            params = {**loop.frozen, **self._params}
            self.loss, self.buffers = loop.loss_at(self._t, params, self._before, *self._read)
        finally:
            loop.loss = given

    def mixed(self, values: list[Any]) -> Tensor | None:
        """Return one number that depends on every entry of the gradients, each with another factor; None of none."""
        live = [g for g in values if isinstance(g, Tensor) and g.requires_grad]
        if not live or not self.trains:
            return None
        factors = [torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype, device=g.device).view_as(g) for g in live]
        return torch.stack([(g * f).sum().to(live[0]) for g, f in zip(live, factors, strict=True)]).sum()

    @property
    def trains(self) -> bool:
        """Whether the loss has a gradient by any weight."""
        return any(g is not None for g in self.gradients.values())
