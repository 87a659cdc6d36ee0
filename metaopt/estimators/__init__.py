"""How a stage is differentiated, apart from how it is run."""

from metaopt.estimators.base import Estimator
from metaopt.estimators.unrolled import Unrolled

__all__ = ["Estimator", "Unrolled"]
