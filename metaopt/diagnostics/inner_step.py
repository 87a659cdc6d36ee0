"""One inner step that can be evaluated again, as far as the gradients that the optimizer gets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import StageError
from metaopt.core.inner_loop import InnerLoop
from metaopt.diagnostics.cuts import LOSS, TRANSFORM
from metaopt.diagnostics.marks import Watch


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
        loop, names = self._loop, list(self._params)
        with self._watch.over(LOSS, loop.name), self._recording():
            try:
                params = {**loop.frozen, **self._params}
                self.loss, self.buffers = loop.loss_at(self._t, params, self._before, *self._read)
            except StageError as error:  # that it has no graph is what is to be explained
                if self.loss is None:
                    raise
                self.failure = str(error)
                return [self.loss]
        found = torch.autograd.grad(self.loss, list(self._params.values()), create_graph=True, allow_unused=True)
        self.gradients = dict(zip(names, found, strict=True))
        with self._watch.over(TRANSFORM, loop.name, more=True):
            return [g for g in loop.transformed(self.gradients).values() if g is not None] or [self.loss]

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Keep what the loss returns, whether or not it can be differentiated."""
        given, self.loss = self._loop.loss, None

        def recorded(*args: Any) -> Any:
            self.loss = given(*args)
            return self.loss

        self._loop.loss = recorded
        try:
            yield
        finally:
            self._loop.loss = given


def mixed(gradients: Iterable[Any]) -> Tensor | None:
    """Return one number that depends on every entry of the gradients there are, each with another factor."""
    live = [g for g in gradients if isinstance(g, Tensor) and g.requires_grad]
    if not live:
        return None
    factors = [torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype, device=g.device).view_as(g) for g in live]
    return torch.stack([(g * f).sum().to(live[0]) for g, f in zip(live, factors, strict=True)]).sum()
