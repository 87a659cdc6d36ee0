"""Estimators that take the trained weights for a fixed point of the inner training, and differentiate that."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError, StageError
from metaopt.base.ranges import check_counts
from metaopt.core.contracts import Estimator, Upstream
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.view import Tensors
from metaopt.estimators.products.base import DoubleBackward, Product, Wanted
from metaopt.estimators.step_loss import Key
from metaopt.estimators.sweep import Sweep
from metaopt.estimators.update_vjp import Below, added


class FixedPoint(Estimator, ABC):
    """What the two share: one step is stored, and the cotangents of the trained weights are solved for at it."""

    product: Product

    @property
    def exact(self) -> bool:
        """False: no training of finitely many steps is a fixed point."""
        return False

    def differentiate(self, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> InnerResult:
        """Run the loop as one autograd function, and store its last step."""
        return FixedPointSweep(self, loop, meta_params, upstream).run()

    @abstractmethod
    def solve(self, sweep: FixedPointSweep, cotangents: Tensors, others: dict[Key, Tensor]) -> None:
        """Add the cotangents of meta-parameters and upstream weights to `others`, from those of the trained weights."""


class FixedPointSweep(Sweep):
    """A sweep over the last step alone, which its estimator solves for a fixed point."""

    trained: Tensors

    def __init__(
        self, estimator: FixedPoint, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> None:
        super().__init__(loop, meta_params, upstream, estimator.product, first=loop.num_steps - 1)
        self._estimator = estimator

    def forward(self, start: Sequence[Tensor]) -> InnerResult:
        """Run every step; keep the last one, and the weights after it."""
        result = super().forward(start)
        # detached: the stage's node, which these tensors get, refers to this sweep
        self.trained = {name: result.model.params[name].detach() for name in self.loop.rule.names}
        return result

    def sweep_back(self, cotangents: Tensors, free: bool, others: dict[Key, Tensor]) -> Tensors:
        """Return no cotangent of the initial weights: a fixed point has forgotten them."""
        self.last_step = self.rebuild(self.first, free)
        self._estimator.solve(self, cotangents, others)
        return {}


class Neumann(FixedPoint):
    """The last step, swept again and again as if training stood still: a truncated Neumann series.

    With Φ the last step as a map of z = (weights, optimizer state),
    `dz/dφ ≈ Σ_{k < terms} (∂Φ/∂z)^k ∂Φ/∂φ`, which tends to `(I − ∂Φ/∂z)⁻¹ ∂Φ/∂φ`, the derivative of a fixed point
    (Lorraine et al., 2020, arXiv:1911.02590; for SGD of rate η the series is theirs with α = η). `Neumann(1)` is
    `OneStep()`. Right where the stage has converged on a loss whose batch does not change; learned initial weights get
    no hypergradient. Memory: one step.

    Args:
        terms: of the series, at least 1.
        product: how `u ∂²L` is computed; `DoubleBackward()` if None.
    """

    def __init__(self, terms: int, product: Product | None = None) -> None:
        check_counts("Neumann", terms=terms)
        self.terms, self.product = terms, product or DoubleBackward()

    def __repr__(self) -> str:
        return f"Neumann({self.terms}, product={self.product!r})"

    def solve(self, sweep: FixedPointSweep, cotangents: Tensors, others: dict[Key, Tensor]) -> None:
        """Pull the cotangents back through the last step `terms` times."""
        t, record = sweep.first, sweep.last_step
        gradient, pullback = sweep.linearize(t, record, Wanted(repeatedly=self.terms > 1))
        raw = dict(zip(record.params, gradient, strict=True))
        below = Below(cotangents)
        for _ in range(self.terms):
            below, of_gradient = sweep.update_back(t, record, raw, below, others)
            below = replace(below, params=added(below.params, pullback(of_gradient, others)))


class ConjugateGradient(FixedPoint):
    """The implicit function theorem at the trained weights, its linear system solved by conjugate gradients.

    `dθ/dφ ≈ −(∂²L/∂θ² + damping·I)⁻¹ ∂²L/∂θ∂φ` with L the loss of the last step (Rajeswaran et al., 2019,
    arXiv:1909.04630). It knows nothing of the optimizer: hyperparameters and initial weights get no hypergradient, and
    a gradient transform is refused. It is right where the stage has converged; where the Hessian has a direction of no
    positive curvature, the iteration stops there and warns. Memory: one step.

    Args:
        iterations: at most so many, at least 1; each costs one second-order product.
        damping: added to the Hessian's diagonal, ≥ 0.
        product: how `u ∂²L` is computed; `DoubleBackward()` if None.
    """

    def __init__(self, iterations: int, damping: float = 0.0, product: Product | None = None) -> None:
        check_counts("ConjugateGradient", iterations=iterations)
        if damping < 0:
            raise ConfigError(f"ConjugateGradient: damping={damping} must not be negative")
        self.iterations, self.damping, self.product = iterations, damping, product or DoubleBackward()

    def __repr__(self) -> str:
        return f"ConjugateGradient({self.iterations}, damping={self.damping}, product={self.product!r})"

    def check(self, name: str, stage: Any) -> None:
        """Raise for a gradient transform T: `∂T/∂g ∂²L/∂θ²` is not symmetric, as conjugate gradients need it."""
        if stage.transform is not None:
            raise StageError(
                f"stage {name!r}: ConjugateGradient never runs the transform ({stage.transform!r}); leave it out, or "
                f"use Neumann(terms={self.iterations}), which differentiates the whole update"
            )

    def solve(self, sweep: FixedPointSweep, cotangents: Tensors, others: dict[Key, Tensor]) -> None:
        """Solve `(H + damping·I) q = λ` and pull −q back to what the loss reads."""
        record = replace(sweep.last_step, params=sweep.trained, gradient=None, loss=None)
        gradient, pullback = sweep.linearize(sweep.first, record, Wanted(repeatedly=True))
        used = [name for name, g in zip(record.params, gradient, strict=True) if g is not None]
        zeros = {name: torch.zeros_like(record.params[name]) for name in used}

        def curved(v: Tensors) -> Tensors:
            product = pullback(v, None)
            return {n: product.get(n, zeros[n]) + self.damping * x for n, x in v.items()}

        solution = self._solved(curved, {name: cotangents.get(name, zeros[name]) for name in used}, sweep.loop.name)
        pullback({name: -q for name, q in solution.items()}, others)

    def _solved(self, curved: Callable[[Tensors], Tensors], right: Tensors, stage: str) -> Tensors:
        solution = {name: torch.zeros_like(b) for name, b in right.items()}
        residual, direction, size = right, right, _dot(right, right)
        start = float(size)
        for i in range(self.iterations):
            if float(size) <= torch.finfo(size.dtype).eps ** 2 * start:
                break
            image = curved(direction)
            curvature = _dot(direction, image)
            if not float(curvature) > 0:
                warnings.warn(
                    f"ConjugateGradient, stage {stage!r}: the Hessian has curvature {float(curvature):.2g} along the "
                    f"direction of iteration {i + 1}, so the solution is what {i} iterations gave; train the stage "
                    "longer, or raise ConjugateGradient(damping=...)",
                    RuntimeWarning,
                    stacklevel=2,
                )
                break
            rate = size / curvature
            solution = {n: x + rate * direction[n] for n, x in solution.items()}
            residual = {n: r - rate * image[n] for n, r in residual.items()}
            size, before = _dot(residual, residual), size
            direction = {n: r + size / before * direction[n] for n, r in residual.items()}
        return solution


def _dot(a: Tensors, b: Tensors) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()
