"""How a stage is differentiated, apart from how it is run."""

from metaopt.estimators.base import Estimator
from metaopt.estimators.checkpointed import Checkpointed, FirstOrder, OneStep, Truncated
from metaopt.estimators.fixed_point import ConjugateGradient, Neumann
from metaopt.estimators.products import Captured, DoubleBackward, FiniteDifference, Product
from metaopt.estimators.unrolled import Unrolled

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
