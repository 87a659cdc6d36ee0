"""Second-order products: `u ↦ u · ∂(∂L/∂θ)/∂(θ, others)` for one inner step."""

from metaopt.estimators.products.base import Product
from metaopt.estimators.products.captured import Captured
from metaopt.estimators.products.double_backward import DoubleBackward
from metaopt.estimators.products.finite_difference import FiniteDifference

__all__ = ["Captured", "DoubleBackward", "FiniteDifference", "Product"]
