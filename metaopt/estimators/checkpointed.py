"""Estimators that store an inner loop's steps instead of their graph, and sweep back over them."""

from __future__ import annotations

from metaopt.errors import ConfigError, did_you_mean
from metaopt.estimators.base import Estimator
from metaopt.estimators.products import DoubleBackward, Product
from metaopt.estimators.stores import KEPT, Kept
from metaopt.estimators.sweep import Sweep
from metaopt.inner_loop import InnerLoop, InnerResult, Upstream
from metaopt.meta_params import AnyMetaParameters


class Checkpointed(Estimator):
    """The exact hypergradient, without keeping the inner steps' graph.

    With `λ_T = ∂F/∂θ_T`, for t = T−1 … 0: `u = λ_{t+1} ∂Φ/∂g`, `λ_t = λ_{t+1} ∂Φ/∂θ + u ∂²L/∂θ²`, and the hypergradient
    gains `λ_{t+1} ∂Φ/∂φ + u ∂²L/∂θ∂φ` (Maclaurin et al., 2015, arXiv:1502.03492). Memory is one step's graph plus what
    `store` keeps.

    Args:
        product: how `u ∂²L` is computed; `DoubleBackward()` if None.
        store: `gradients` (one gradient per step, a state every √T steps; 4 plain trainings in all), `states` (every
            state), or `recompute` (a state every √T steps; 5 plain trainings).
    """

    def __init__(self, product: Product | None = None, store: Kept = "gradients") -> None:
        if store not in KEPT:
            raise ConfigError(f"{type(self).__name__}: store={store!r}{did_you_mean(store, KEPT)}")
        self.product = product or DoubleBackward()
        self.store: Kept = store

    def __repr__(self) -> str:
        return f"{type(self).__name__}(product={self.product!r}, store={self.store!r})"

    def differentiate(self, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> InnerResult:
        """Run the loop as one autograd function."""
        return Sweep(loop, meta_params, upstream, self.product, self.store).run()
