"""Estimators that store an inner loop's steps instead of their graph, and sweep back over them."""

from __future__ import annotations

from pathlib import Path

from metaopt.base.ranges import check_counts
from metaopt.core.contracts import Estimator, Upstream
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.estimators.places import PlaceName
from metaopt.estimators.products.base import DoubleBackward, Product
from metaopt.estimators.storage import Kept, Storage
from metaopt.estimators.sweep import Sweep


class Checkpointed(Estimator):
    """The exact hypergradient, without keeping the inner steps' graph.

    With `λ_T = ∂F/∂θ_T`, for t = T−1 … 0: `u = λ_{t+1} ∂Φ/∂g`, `λ_t = λ_{t+1} ∂Φ/∂θ + u ∂²L/∂θ²`, and the hypergradient
    gains `λ_{t+1} ∂Φ/∂φ + u ∂²L/∂θ∂φ` (Maclaurin et al., 2015, arXiv:1502.03492). Memory is one step's graph plus what
    `store` keeps; with θ the bytes of the weights and S those of weights and optimizer state:

    | store | kept | plain trainings' flops, in all |
    |---|---|---|
    | `states` | T·S | 4 |
    | `gradients` | T·θ + c·S | 4 |
    | `recompute` | c·S | 5 for c = √2T; less for more states, more for fewer |

    With c states and no step run more than r times before it is swept, `recompute` takes `3 + r − (c+r choose r−1)/T`
    plain trainings for T steps, about, and no schedule takes fewer (Griewank and Walther, 2000,
    doi:10.1145/347837.347846): at c = 16, 5.9 for T = 1,000 and 7.4 for T = 10,000.

    Args:
        product: how `u ∂²L` is computed; `DoubleBackward()` if None.
        store: `gradients`, `states`, `recompute`, or `auto`: the quickest whose stored steps fit in `budget`.
        place: where the stored steps lie: `device`, `host` (pinned memory; on a CPU, the same) or `disk`. The last two
            have a state every c + 1 steps, and those between are on the device while these steps are swept: no step is
            run more than twice, whatever c.
        budget: of `auto`: bytes on the device, or a text such as `"2 GB"`.
        folder: of `disk`: where to write; the system's temporary folder if None.
        num_states: of `gradients` and `recompute`: c, the most states that are kept on the device, beside that of the
            step in hand; the fewest with which no step is run more than twice, about √2T, if None.
    """

    def __init__(
        self,
        product: Product | None = None,
        store: Kept | str = "gradients",
        place: PlaceName = "device",
        budget: int | str | None = None,
        folder: str | Path | None = None,
        num_states: int | None = None,
    ) -> None:
        self.product = product or DoubleBackward()
        self.storage = Storage(store, place, budget, folder, num_states)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(product={self.product!r}, {self.storage})"

    @property
    def exact(self) -> bool:
        """Whether the product is."""
        return self.product.exact

    def differentiate(self, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> InnerResult:
        """Run the loop as one autograd function."""
        return self._sweep(loop, meta_params, upstream)

    def _sweep(
        self,
        loop: InnerLoop,
        meta_params: AnyMetaParameters,
        upstream: Upstream,
        first: int = 0,
        first_order: bool = False,
    ) -> InnerResult:
        return Sweep(loop, meta_params, upstream, self.product, self.storage, first, first_order).run()


class Truncated(Checkpointed):
    """Only the last steps of the stage are differentiated; the weights before them count as constants.

    `dθ_T/dφ ≈ Σ_{t ≥ T−last} (∂θ_T/∂θ_{t+1}) (∂Φ_t/∂φ)` (Shaban et al., 2019, arXiv:1810.10667). The error falls
    geometrically in `last` where the inner loss is strongly convex. Learned initial weights get no hypergradient.

    Args:
        last: how many steps, at least 1; the whole stage if it is shorter. The rest is as of `Checkpointed`.
    """

    def __init__(
        self,
        last: int,
        product: Product | None = None,
        store: Kept | str = "gradients",
        place: PlaceName = "device",
        budget: int | str | None = None,
        folder: str | Path | None = None,
        num_states: int | None = None,
    ) -> None:
        super().__init__(product, store, place, budget, folder, num_states)
        check_counts(type(self).__name__, last=last)
        self.last = last

    def __repr__(self) -> str:
        return f"Truncated({self.last}, product={self.product!r}, {self.storage})"

    @property
    def exact(self) -> bool:
        """False: steps are left out."""
        return False

    def differentiate(self, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> InnerResult:
        """Run the loop as one autograd function, and store its last steps."""
        return self._sweep(loop, meta_params, upstream, first=max(0, loop.num_steps - self.last))


class OneStep(Truncated):
    """The chain rule of the last step of the stage alone: `dθ_T/dφ ≈ ∂Φ_{T−1}/∂φ + ∂Φ_{T−1}/∂g · ∂²L/∂θ∂φ`.

    In a chain of two such stages this is `dL3/dW · d²L2/dW dWo · d²L1/dWo dA`, with each optimizer's own derivative
    between the factors (T1–T2 of Luketina et al., 2016, arXiv:1511.06727).
    """

    def __init__(self, product: Product | None = None) -> None:
        super().__init__(1, product, store="states")

    def __repr__(self) -> str:
        return f"OneStep(product={self.product!r})"


class FirstOrder(Checkpointed):
    """All steps are swept, but without `∂²L/∂θ²`: `λ_t = λ_{t+1} ∂Φ/∂θ`.

    The hypergradient keeps `Σ_t u_t ∂²L/∂θ∂φ`, so what a loss reads still gets one; initial weights get that of
    first-order MAML (Nichol et al., 2018, arXiv:1803.02999). The error is of the order of the inner learning rate times
    the number of steps. The arguments are those of `Checkpointed`.
    """

    @property
    def exact(self) -> bool:
        """False: second derivatives are left out."""
        return False

    def differentiate(self, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> InnerResult:
        """Run the loop as one autograd function."""
        return self._sweep(loop, meta_params, upstream, first_order=True)
