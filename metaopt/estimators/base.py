"""What an estimator is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from metaopt.inner_loop import InnerLoop, InnerResult, Upstream
from metaopt.meta_params import AnyMetaParameters


class Estimator(ABC):
    """How a stage is differentiated: it runs an inner loop and connects the trained weights to what they depend on."""

    @property
    def exact(self) -> bool:
        """Whether the hypergradient is that of the training as it is run, but for rounding."""
        return True

    def check(self, name: str, stage: Any) -> None:  # noqa: B027
        """Raise if this stage cannot be differentiated so; called before any training."""

    @abstractmethod
    def differentiate(self, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> InnerResult:
        """Run the inner loop; the result's `params` are in the graph of the meta-parameters and upstream weights.

        Args:
            loop: the steps to run, and their two halves.
            meta_params: one module or a named mapping.
            upstream: name → trained model of every earlier stage, in the graph.
        """
