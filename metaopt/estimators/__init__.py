"""How a stage is differentiated, apart from how it is run."""

from metaopt.core.contracts import Estimator
from metaopt.core.unrolled import Unrolled
from metaopt.estimators.checkpointed import Checkpointed, FirstOrder, OneStep, Truncated
from metaopt.estimators.fixed_point import ConjugateGradient, Neumann
from metaopt.estimators.products.base import DoubleBackward, Product
from metaopt.estimators.products.captured import Captured
from metaopt.estimators.products.finite_difference import FiniteDifference

__all__ = [
    "Captured",
    "Checkpointed",
    "ConjugateGradient",
    "DoubleBackward",
    "Estimator",
    "FiniteDifference",
    "FirstOrder",
    "Neumann",
    "OneStep",
    "Product",
    "Truncated",
    "Unrolled",
]
