"""Losses around other losses: several terms with learned weights, and data augmentation of learned strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, StageError, did_you_mean
from metaopt.base.ranges import check_counts
from metaopt.core.contracts import InnerLoss, Upstream
from metaopt.core.meta_params import AnyMetaParameters, MetaParameters, Uniform
from metaopt.core.view import FunctionalModel
from metaopt.losses.logits import model_inputs
from metaopt.meta_params.tables import select

EMBEDDINGS = "inputs_embeds"


class TermWeights(MetaParameters):
    """One positive weight per named term of a loss, `w_k = exp(a_k)`, that starts at `initial` > 0."""

    def __init__(self, names: Sequence[str], initial: float = 1.0) -> None:
        super().__init__()
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"TermWeights: names={list(names)}: at least one is needed, and each once")
        self.names, self.initial = tuple(names), initial
        self.log_weights = _logs("TermWeights", initial, len(names))

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
        self.reads = tuple(read for term in terms.values() for read in getattr(term, "reads", ()))

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


class GaussianNoise(MetaParameters):
    """Noise of learned strength on continuous inputs: `x' = x + σ ε`, `σ = exp(s)`, ε standard normal.

    ε is drawn at each inner step from the replayed random state, so that the hypergradient of σ is exact.

    Args:
        initial: σ at the start, above 0.
        size: 1, or the number of features for a strength each.
        key: entry of a batch; `inputs_embeds` for a model of tokens, whose own embeddings of them get the noise.
    """

    def __init__(self, initial: float = 0.1, size: int = 1, key: str = "inputs") -> None:
        super().__init__()
        check_counts("GaussianNoise", size=size)
        self.key = key
        self.log_strength = _logs("GaussianNoise", initial, size)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch with noise."""
        values = batch.get(self.key)
        if values is None or not values.is_floating_point():
            raise ConfigError(
                f"GaussianNoise reads batch[{self.key!r}], which must be there and floating (there are: "
                f"{', '.join(batch)}); for models of tokens: key='{EMBEDDINGS}'"
            )
        strength = self.log_strength.exp().to(values.dtype)
        return {**batch, self.key: values + strength * torch.randn_like(values)}

    def summary(self) -> dict[str, float]:
        """Return the mean strength."""
        return {"noise strength": self.log_strength.exp().mean().item()}


class AugmentedLoss(InnerLoss):
    """Another loss on augmented data.

    Args:
        loss: what is computed on the augmented batch.
        augmentation: which of several meta-parameters augments; None when there is only one.
    """

    def __init__(self, loss: InnerLoss, augmentation: str | None = None) -> None:
        self.loss, self.augmentation = loss, augmentation
        self.reads = getattr(loss, "reads", ())

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        module = select(meta_params, self.augmentation, "AugmentedLoss")
        if not isinstance(module, Uniform):  # the baseline: nothing is augmented
            if getattr(module, "key", None) == EMBEDDINGS and EMBEDDINGS not in batch:
                batch = _embedded(model, batch)
            batch = module(batch)
        return self.loss(model, batch, meta_params, upstream)

    def problem_with(self, model: nn.Module, upstream: Mapping[str, nn.Module]) -> str | None:
        """Say what the loss inside says."""
        return self.loss.problem_with(model, upstream) if isinstance(self.loss, InnerLoss) else None


def _embedded(model: FunctionalModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with its `input_ids` replaced by the model's own embeddings of them, in the graph."""
    batch = dict(batch)
    model.note_reading(model_inputs(batch))
    with model.as_module() as module:
        table: Any = getattr(module, "get_input_embeddings", lambda: None)()
        if table is None or "input_ids" not in batch:
            raise StageError(f"{model!r} has no get_input_embeddings(), or the batch no input_ids to embed")
        batch[EMBEDDINGS] = table(batch.pop("input_ids"))
    return batch


def _logs(where: str, initial: float, size: int) -> nn.Parameter:
    if not initial > 0:
        raise ConfigError(f"{where}: initial={initial} must be above 0")
    return nn.Parameter(torch.full((size,), initial).log())
