"""The exact product, by differentiating the gradient's own graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt.core.guards import refuse_single_derivative
from metaopt.estimators.products.base import Cotangents, Loss, Product, Pullback, Wanted, leaves, linearized


class DoubleBackward(Product):
    """Differentiate the gradient's own graph: exact; costs two plain steps beyond the gradient."""

    uses_known_gradient = False

    def __repr__(self) -> str:
        return "DoubleBackward()"

    def linearize(
        self, loss: Loss, params: Sequence[Tensor], others: Sequence[Tensor], wanted: Wanted
    ) -> tuple[Cotangents, Pullback]:
        """Build the gradient with its graph; the pullback walks that graph."""
        with torch.enable_grad():
            at, beside = leaves(params), leaves(others)
            gradients = torch.autograd.grad(loss(at, beside), at, create_graph=True, allow_unused=True)
        if loss.is_last:
            refuse_single_derivative(dict(enumerate(gradients)), loss.stage)

        def pullback(cotangents: Sequence[Tensor | None]) -> tuple[Cotangents, Cotangents]:
            below = at if wanted.params else []
            found = linearized(gradients, cotangents, [*below, *beside], wanted.repeatedly)
            return found[: len(below)] or [None] * len(at), found[len(below) :]

        return [None if g is None else g.detach() for g in gradients], pullback
