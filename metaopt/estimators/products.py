"""Second-order products: `u ↦ u · ∂(∂L/∂θ)/∂(θ, others)` for one inner step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metaopt.errors import ConfigError

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]  # (params, others) → inner loss
Cotangents = list[Tensor | None]
Pullback = Callable[[Sequence[Tensor | None]], tuple[Cotangents, Cotangents]]


class Product(ABC):
    """How the second-order product of an inner step is computed, in two phases."""

    @abstractmethod
    def linearize(self, loss: Loss, params: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Cotangents, Pullback]:
        """Return the gradient of the loss, detached, and the map from its cotangent u to the cotangents below it.

        Args:
            loss: (params, others) → scalar; deterministic, so that it can be evaluated again.
            params: θ, detached.
            others: meta-parameters and upstream weights, detached.

        Returns:
            `∂L/∂θ` (None where the loss does not use a parameter), and `u ↦ (u·∂²L/∂θ², u·∂²L/∂θ∂others)`.
        """


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the same values as leaves of a new graph."""
    return [tensor.detach().requires_grad_() for tensor in tensors]


class DoubleBackward(Product):
    """Differentiate the gradient's own graph: exact; costs two plain steps beyond the gradient."""

    def __repr__(self) -> str:
        return "DoubleBackward()"

    def linearize(self, loss: Loss, params: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Cotangents, Pullback]:
        """Build the gradient with its graph; the pullback walks that graph once."""
        with torch.enable_grad():
            at, beside = leaves(params), leaves(others)
            gradients = torch.autograd.grad(loss(at, beside), at, create_graph=True, allow_unused=True)

        def pullback(cotangents: Sequence[Tensor | None]) -> tuple[Cotangents, Cotangents]:
            pairs = [(g, u) for g, u in zip(gradients, cotangents, strict=True) if g is not None and u is not None]
            pairs = [(g, u) for g, u in pairs if g.requires_grad]  # a linear loss has a constant gradient
            if not pairs:
                return [None] * len(at), [None] * len(beside)
            outputs, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, [*at, *beside], weights, allow_unused=True)
            return list(found[: len(at)]), list(found[len(at) :])

        return [None if g is None else g.detach() for g in gradients], pullback


class FiniteDifference(Product):
    """Central difference of first-order gradients along u: no double backward, so any kernel will do.

    `u · ∂g/∂x ≈ (∂L/∂x (θ + εu) − ∂L/∂x (θ − εu)) / 2ε` with ε = epsilon · (1 + ‖θ‖) / ‖u‖ (Pearlmutter, 1994;
    Liu et al., 2019, arXiv:1806.09055). Error: O(ε²) truncation plus O(machine epsilon / ε) rounding.

    Args:
        epsilon: relative step; None for the cube root of the dtype's machine epsilon.
    """

    def __init__(self, epsilon: float | None = None) -> None:
        if epsilon is not None and not epsilon > 0:
            raise ConfigError(f"FiniteDifference: epsilon={epsilon} must be above 0")
        self.epsilon = epsilon

    def __repr__(self) -> str:
        return f"FiniteDifference(epsilon={self.epsilon})"

    def linearize(self, loss: Loss, params: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Cotangents, Pullback]:
        """Compute the gradient; the pullback computes two more."""

        def gradients(at: Sequence[Tensor], wanted: int) -> Cotangents:
            with torch.enable_grad():
                at, beside = leaves(at), leaves(others)
                return list(torch.autograd.grad(loss(at, beside), [*at, *beside][:wanted], allow_unused=True))

        def pullback(cotangents: Sequence[Tensor | None]) -> tuple[Cotangents, Cotangents]:
            direction = [torch.zeros_like(p) if u is None else u for p, u in zip(params, cotangents, strict=True)]
            length = _norm(direction)
            if float(length) == 0.0:
                return [None] * len(params), [None] * len(others)
            relative = self.epsilon or torch.finfo(params[0].dtype).eps ** (1 / 3)
            step = relative * (1 + _norm(params)) / length
            above, below = (
                gradients(
                    [p + sign * step * u for p, u in zip(params, direction, strict=True)], len(params) + len(others)
                )
                for sign in (1, -1)
            )
            found = [
                None if a is None or b is None else (a - b) / (2 * step) for a, b in zip(above, below, strict=True)
            ]
            return found[: len(params)], found[len(params) :]

        return gradients(params, len(params)), pullback


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().norm() for tensor in tensors]).norm()
