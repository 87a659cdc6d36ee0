"""A loss of several terms, and learned weights of the terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.core.contracts import InnerLoss, Upstream
from metaopt.core.meta_params import AnyMetaParameters, MetaParameters, Uniform
from metaopt.core.view import FunctionalModel
from metaopt.meta_params.tables import select


class TermWeights(MetaParameters):
    """One positive weight per term of a loss: `w_k = exp(a_k)`.

    Args:
        names: of the terms.
        initial: the weights' start, above 0.
    """

    def __init__(self, names: Sequence[str], initial: float = 1.0) -> None:
        super().__init__()
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"TermWeights: names={list(names)}: at least one is needed, and each once")
        if not initial > 0:
            raise ConfigError(f"TermWeights: initial={initial} must be above 0")
        self.names, self.initial = tuple(names), initial
        self.log_weights = nn.Parameter(torch.full((len(names),), initial).log())

    def forward(self) -> dict[str, Tensor]:
        """Return name → weight, in the graph."""
        return dict(zip(self.names, self.log_weights.exp(), strict=True))

    def summary(self) -> dict[str, float]:
        """Return the weights."""
        return {name: weight.item() for name, weight in self().items()}

    def baseline(self) -> nn.Module:
        """Return the weights as they start."""
        return TermWeights(self.names, self.initial)


class SumOfLosses(InnerLoss):
    """Several losses, each with a learned weight: `L = Σ_k w_k(φ) L_k`.

    Args:
        terms: name → loss; a term may read meta-parameters of its own.
        weights: which of several meta-parameters is the `TermWeights`; None when there is only one.
    """

    def __init__(self, terms: Mapping[str, InnerLoss], weights: str | None = None) -> None:
        if not terms:
            raise ConfigError("SumOfLosses: terms is empty; give at least one: terms={'hard': CrossEntropy()}")
        self.terms, self.weights = dict(terms), weights
        self.reads = tuple(dict.fromkeys(read for term in terms.values() for read in getattr(term, "reads", ())))

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        module = select(meta_params, self.weights, "SumOfLosses")
        weights = dict.fromkeys(self.terms, 1.0) if isinstance(module, Uniform) else module()
        for name in self.terms:
            if name not in weights:
                raise ConfigError(
                    f"SumOfLosses: {type(module).__name__} has no weight {name!r}{did_you_mean(name, weights)}"
                )
        found = [weights[name] * term(model, batch, meta_params, upstream) for name, term in self.terms.items()]
        return torch.stack(found).sum()

    def problem_with(self, model: nn.Module, upstream: Mapping[str, nn.Module]) -> str | None:
        """Say what the first of the terms that cannot work says."""
        found = (term.problem_with(model, upstream) for term in self.terms.values() if isinstance(term, InnerLoss))
        return next((problem for problem in found if problem), None)
