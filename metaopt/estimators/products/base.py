"""What a second-order product is, and the exact one, by differentiating the gradient's own graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.core.graphs import refuse_single_derivative
from metaopt.estimators.step_loss import StepLoss

Cotangents = list[Tensor | None]
PullBack = Callable[["Product", StepLoss, Sequence[Tensor], Any], Any]  # the whole step, by a product
Pullback = Callable[[Sequence[Tensor | None]], tuple[Cotangents, Cotangents]]


@dataclass(frozen=True)
class Wanted:
    """What of a product is asked for; the rest need not be computed.

    Args:
        gradient: `∂L/∂θ` (a store may have it already).
        params: `u·∂²L/∂θ²` (a first-order estimator drops it).
        repeatedly: the pullback will be called more than once.
    """

    gradient: bool = True
    params: bool = True
    repeatedly: bool = False


class Product(ABC):
    """How the second-order product of an inner step is computed, in two phases."""

    exact = True
    replays = False  # something captured before, which must be told when it is stale
    uses_known_gradient = True  # a gradient that a store has, it need not compute; so stores keep it

    def take(self, pull_back: PullBack, loss: StepLoss, others: Sequence[Tensor], above: Any) -> Any:
        """Return what `pull_back(self, loss, others, above)` does: cotangents below a whole step, and of `others`."""
        return pull_back(self, loss, others, above)

    @abstractmethod
    def linearize(
        self, loss: StepLoss, params: Sequence[Tensor], others: Sequence[Tensor], wanted: Wanted
    ) -> tuple[Cotangents, Pullback]:
        """Return the gradient of the loss, detached, and the map from its cotangent u to the cotangents below it.

        Args:
            loss: (params, others) → scalar; deterministic, so that it can be evaluated again.
            params: θ as it is held (several parameters may be one tensor), detached.
            others: meta-parameters and upstream weights, detached.
            wanted: what may be left out.

        Returns:
            `∂L/∂θ` of each parameter (None where the loss does not use it, or where it is not wanted), and
            `u ↦ (u·∂²L/∂θ², u·∂²L/∂θ∂others)`, u of each parameter, the first of these as θ is held.
        """


class DoubleBackward(Product):
    """Differentiate the gradient's own graph: exact; costs two plain steps beyond the gradient."""

    uses_known_gradient = False

    def __repr__(self) -> str:
        return "DoubleBackward()"

    def linearize(
        self, loss: StepLoss, params: Sequence[Tensor], others: Sequence[Tensor], wanted: Wanted
    ) -> tuple[Cotangents, Pullback]:
        """Build the gradient with its graph; the pullback walks that graph."""
        with torch.enable_grad():
            at, beside = leaves(params), leaves(others)
            weights = loss.named(at)
            value = loss(weights, beside)
            gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
        if loss.is_last:
            refuse_single_derivative(dict(enumerate(gradients)), loss.loop.name)

        def pullback(cotangents: Sequence[Tensor | None]) -> tuple[Cotangents, Cotangents]:
            below = at if wanted.params else []
            found = linearized(gradients, cotangents, [*below, *beside], wanted.repeatedly)
            return found[: len(below)] or [None] * len(at), found[len(below) :]

        return [None if g is None else g.detach() for g in gradients], pullback


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the same values as leaves of a new graph."""
    return [t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors]


def linearized(
    gradients: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    retain_graph: bool = False,
) -> Cotangents:
    """Return `u · ∂g/∂inputs` by the gradient's own graph, or that of any other outputs g."""
    pairs = [(g, u) for g, u in zip(gradients, cotangents, strict=True) if g is not None and u is not None]
    pairs = [(g, u) for g, u in pairs if g.requires_grad]  # a linear loss has a constant gradient
    if not pairs or not inputs:
        return [None] * len(inputs)
    outputs, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True, retain_graph=retain_graph))


def agree(found: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> bool:
    """Whether two lists of tensors are equal but for rounding."""
    if [x is None for x in found] != [x is None for x in right]:
        return False
    pairs = [(_dense(a), _dense(b)) for a, b in zip(found, right, strict=True) if a is not None and b is not None]
    scale = max((float(b.norm()) for _, b in pairs), default=0.0)
    return all(
        torch.equal(a, b) or float((a - b).norm()) <= torch.finfo(b.dtype).eps ** 0.5 * scale or bool(b.isnan().any())
        for a, b in pairs
    )


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor
