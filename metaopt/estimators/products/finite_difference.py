"""The product by central differences of first-order gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError
from metaopt.core.graphs import refuse_given_weights
from metaopt.estimators.products.base import Cotangents, Product, Pullback, Wanted, leaves
from metaopt.estimators.step_loss import StepLoss


class FiniteDifference(Product):
    """Central difference of first-order gradients along u: no double backward, so any kernel will do.

    `u · ∂g/∂x ≈ (∂L/∂x (θ + εu) − ∂L/∂x (θ − εu)) / 2ε` with ε = epsilon · (1 + ‖θ‖) / ‖u‖ (Pearlmutter, 1994;
    Liu et al., 2019, arXiv:1806.09055). Error: O(ε²) truncation plus O(machine epsilon / ε) rounding.
    The inner gradient must be that of a function: a padding row of an embedding that is read, which torch gives no
    gradient, or something detached in the loss makes it another one.

    Args:
        epsilon: relative step; None for the cube root of the dtype's machine epsilon.
    """

    exact = False

    def __init__(self, epsilon: float | None = None) -> None:
        if epsilon is not None and not epsilon > 0:
            raise ConfigError(f"FiniteDifference: epsilon={epsilon} must be above 0")
        self.epsilon = epsilon

    def __repr__(self) -> str:
        return f"FiniteDifference(epsilon={self.epsilon})"

    def linearize(
        self, loss: StepLoss, params: Sequence[Tensor], others: Sequence[Tensor], wanted: Wanted
    ) -> tuple[Cotangents, Pullback]:
        """Compute the gradient, if it is wanted; the pullback computes two more."""
        num_params = len(params)
        skipped = 0 if wanted.params else num_params

        def gradients(at: Sequence[Tensor], start: int, end: int | None) -> Cotangents:
            with torch.enable_grad():
                inputs = [*leaves(at), *leaves(others)]
                value = loss(inputs[:num_params], inputs[num_params:])
                if loss.is_last:
                    refuse_given_weights(value, loss.loop.name)
                asked = inputs[start:end]
                found = torch.autograd.grad(value, asked, allow_unused=True) if asked else ()
            return [None] * start + list(found)

        def pullback(cotangents: Sequence[Tensor | None]) -> tuple[Cotangents, Cotangents]:
            direction = [torch.zeros_like(p) if u is None else u for p, u in zip(params, cotangents, strict=True)]
            length = _norm(direction)
            if float(length) == 0.0:
                return [None] * num_params, [None] * len(others)
            relative = self.epsilon or torch.finfo(params[0].dtype).eps ** (1 / 3)
            step = relative * (1 + _norm(params)) / length
            above = gradients([p + step * u for p, u in zip(params, direction, strict=True)], skipped, None)
            below = gradients([p - step * u for p, u in zip(params, direction, strict=True)], skipped, None)
            pairs = zip(above, below, strict=True)
            found = [None if a is None or b is None else (a - b) / (2 * step) for a, b in pairs]
            return found[:num_params], found[num_params:]

        return gradients(params, 0, num_params) if wanted.gradient else [None] * num_params, pullback


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().norm() for tensor in tensors]).norm()
