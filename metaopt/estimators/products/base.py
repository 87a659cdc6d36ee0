"""What a second-order product is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Cotangents = list[Tensor | None]
Pullback = Callable[[Sequence[Tensor | None]], tuple[Cotangents, Cotangents]]


class Loss(Protocol):
    """The inner loss of one step, as a function of all tensors that enter it; deterministic."""

    @property
    def context(self) -> list[Tensor]:
        """What is read and not differentiated: batch, buffers, frozen weights."""
        ...

    @property
    def signature(self) -> Hashable:
        """Equal for two steps that differ in nothing but tensors, and in what else a batch holds."""
        ...

    @property
    def anchors(self) -> tuple[object, ...]:
        """The objects whose identity is part of the signature."""
        ...

    expected: Tensor | None
    """The loss that the forward had at these weights; another one shows that something beside tensors has changed."""

    @property
    def stage(self) -> str:
        """Whose loss it is, for messages."""
        ...

    @property
    def is_last(self) -> bool:
        """Whether it is of the stage's last step: the first that a sweep comes to."""
        ...

    @property
    def obstacle(self) -> str | None:
        """What else the steps differ in, if there is something; a captured graph would freeze it."""
        ...

    def replaying(self) -> AbstractContextManager[None]:
        """Return the random state in which the loss is evaluated."""
        ...

    def __call__(
        self, params: Sequence[Tensor], others: Sequence[Tensor], context: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return the loss; `context` replaces the step's own."""
        ...


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

    @abstractmethod
    def linearize(
        self, loss: Loss, params: Sequence[Tensor], others: Sequence[Tensor], wanted: Wanted
    ) -> tuple[Cotangents, Pullback]:
        """Return the gradient of the loss, detached, and the map from its cotangent u to the cotangents below it.

        Args:
            loss: (params, others) → scalar; deterministic, so that it can be evaluated again.
            params: θ, detached.
            others: meta-parameters and upstream weights, detached.
            wanted: what may be left out.

        Returns:
            `∂L/∂θ` (None where the loss does not use a parameter, or where it is not wanted), and
            `u ↦ (u·∂²L/∂θ², u·∂²L/∂θ∂others)`.
        """


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the same values as leaves of a new graph."""
    return [t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors]


def linearized(
    gradients: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    retain_graph: bool = False,
) -> Cotangents:
    """Return `u · ∂g/∂inputs` by the gradient's own graph."""
    pairs = [(g, u) for g, u in zip(gradients, cotangents, strict=True) if g is not None and u is not None]
    pairs = [(g, u) for g, u in pairs if g.requires_grad]  # a linear loss has a constant gradient
    if not pairs or not inputs:
        return [None] * len(inputs)
    outputs, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True, retain_graph=retain_graph))
