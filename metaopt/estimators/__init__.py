"""How a stage is differentiated, apart from how it is run."""

from metaopt.estimators.base import Estimator
from metaopt.estimators.checkpointed import Checkpointed
from metaopt.estimators.products import DoubleBackward, FiniteDifference, Product
from metaopt.estimators.unrolled import Unrolled

__all__ = ["Checkpointed", "DoubleBackward", "Estimator", "FiniteDifference", "Product", "Unrolled"]
