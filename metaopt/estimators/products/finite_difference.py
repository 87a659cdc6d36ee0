"""The product by central differences of first-order gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError, StageError
from metaopt.core.graphs import nodes
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
        named = loss.named(params)

        def derivatives(weights: Mapping[str, Tensor], beside: Sequence[Tensor], by: Sequence[Tensor]) -> Cotangents:
            value = loss(weights, beside)
            if loss.is_last:
                _refuse_given_weights(value, loss.loop.name)
            return list(torch.autograd.grad(value, by, allow_unused=True)) if by else []

        def moved(along: Sequence[Tensor], step: Tensor) -> tuple[Cotangents, Cotangents]:
            """Return the first derivatives at θ + step · along: by θ as it is held, and by the others."""
            with torch.enable_grad():
                at, beside = leaves(params), leaves(others)
                weights = {n: w + step * u for (n, w), u in zip(loss.named(at).items(), along, strict=True)}
                by = at if wanted.params else []
                found = derivatives(weights, beside, [*by, *beside])
            return found[: len(by)] or [None] * len(at), found[len(by) :]

        def gradient() -> Cotangents:
            with torch.enable_grad():
                weights = dict(zip(named, leaves(list(named.values())), strict=True))
                return derivatives(weights, others, list(weights.values()))

        def pullback(cotangents: Sequence[Tensor | None]) -> tuple[Cotangents, Cotangents]:
            along = [torch.zeros_like(p) if u is None else u for p, u in zip(named.values(), cotangents, strict=True)]
            length = _norm(along)
            if float(length) == 0.0:
                return [None] * len(params), [None] * len(others)
            relative = self.epsilon or torch.finfo(params[0].dtype).eps ** (1 / 3)
            step = relative * (1 + _norm(params)) / length
            above, below = moved(along, step), moved(along, -step)
            pairs = (zip(a, b, strict=True) for a, b in zip(above, below, strict=True))
            found = [[None if a is None or b is None else (a - b) / (2 * step) for a, b in both] for both in pairs]
            return found[0], found[1]

        return gradient() if wanted.gradient else [None] * len(named), pullback


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().norm() for tensor in tensors]).norm()


def _refuse_given_weights(loss: Tensor, stage: str) -> None:
    """Raise if the gradient of a loss takes weights made of the losses as given: its Jacobian is not symmetric."""
    if any(type(node).__name__ == "_GivenWeightsBackward" for node in nodes([loss])):
        raise StageError(
            f"stage {stage!r}: FiniteDifference takes the Jacobian of the inner gradient to be symmetric; with weights "
            "computed from the losses (WeightNetwork) it is not. Use product=metaopt.DoubleBackward()"
        )
