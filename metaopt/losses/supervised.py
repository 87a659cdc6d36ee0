"""Losses on labels, and losses around other losses: several terms with learned weights, and augmented data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, StageError, did_you_mean
from metaopt.core.contracts import InnerLoss, MetaObjective, Trained, Upstream
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.view import FunctionalModel
from metaopt.losses.logits import counted, label_losses, logits_of, mean_over_positions, model_inputs, weighted_mean
from metaopt.meta_params.learned import EMBEDDINGS
from metaopt.meta_params.tables import Uniform, select


class CrossEntropy(InnerLoss):
    """Plain mean cross-entropy, without meta-parameters: `L = 1/B Σ_i ℓ_i`.

    ℓ_i is the mean over the labels of example i that count, and labels are read as the model's own loss reads them
    (`aligned_labels`). Hugging Face's loss is the mean over all labels of the batch, `Σ_i n_i ℓ_i / Σ_i n_i`: the same
    where every example has as many.
    """

    def __call__(self, model: FunctionalModel, batch: Any, meta_params: Any, upstream: Upstream) -> Tensor:
        return mean_over_positions(*label_losses(model, batch)).mean()


class ValidationLoss(MetaObjective):
    """Mean cross-entropy of one trained `stage` on validation data: the same mean of the same labels as in training."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.reads = (stage,)

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        return mean_over_positions(*label_losses(trained[self.stage], batch)).mean()


class LabelSmoothing(InnerLoss):
    """Cross-entropy against the uniform distribution, `L = −1/C Σ_c log p_c`: a term that keeps a model unsure.

    With learned weights of the terms its strength is learned (`SumOfLosses`).
    """

    def __call__(self, model: FunctionalModel, batch: Any, meta_params: Any, upstream: Upstream) -> Tensor:
        log_p = logits_of(model(**model_inputs(batch, model))).log_softmax(-1)
        return mean_over_positions(-log_p.mean(-1), counted(model, batch)).mean()


class WeightedLoss(InnerLoss):
    """Cross-entropy weighted by meta-parameters: `L = 1/B Σ_i w_i(φ) ℓ_i`; `w_i ℓ_i` is `mean_t w_it ℓ_it` where there
    is a weight for each label (`labels` [B, L] in the batch's own places).

    The inner gradient takes weights that are computed from the losses as given, as in Meta-Weight-Net; the
    hypergradient still knows that they move with the model. `weights` says which of several meta-parameters gives
    them; several names multiply theirs.
    """

    def __init__(self, weights: str | Sequence[str] | None = None) -> None:
        self.weights = weights

    def __call__(self, model: FunctionalModel, batch: Any, meta_params: Any, upstream: Upstream) -> Tensor:
        names = [self.weights] if self.weights is None or isinstance(self.weights, str) else self.weights
        modules = [select(meta_params, name, "WeightedLoss") for name in names]
        return weighted_mean(*label_losses(model, batch), modules, batch)


class SoftTargetLoss(InnerLoss):
    """Cross-entropy against learned targets: `L = −1/B Σ_i Σ_c q_ic(φ) log p_ic`.

    `targets` says which of several meta-parameters is the `SoftTargets`.
    """

    def __init__(self, targets: str | None = None) -> None:
        self.targets = targets

    def __call__(self, model: FunctionalModel, batch: Any, meta_params: Any, upstream: Upstream) -> Tensor:
        log_p = logits_of(model(**model_inputs(batch, model))).log_softmax(-1)
        targets = select(meta_params, self.targets, "SoftTargetLoss")(batch)
        return -(targets.to(log_p.dtype) * log_p).sum(-1).mean()


class SumOfLosses(InnerLoss):
    """Several losses by name, each with a learned weight: `L = Σ_k w_k(φ) L_k`.

    `weights` says which of several meta-parameters is the `TermWeights`; a term may read meta-parameters of its own.
    """

    def __init__(self, terms: Mapping[str, InnerLoss], weights: str | None = None) -> None:
        if not terms:
            raise ConfigError("SumOfLosses: terms is empty; give at least one: terms={'hard': CrossEntropy()}")
        self.terms, self.weights = dict(terms), weights
        self.reads = tuple(read for term in terms.values() for read in getattr(term, "reads", ()))

    def __call__(self, model: FunctionalModel, batch: Any, meta_params: Any, upstream: Upstream) -> Tensor:
        module = select(meta_params, self.weights, "SumOfLosses")
        weights = dict.fromkeys(self.terms, 1.0) if isinstance(module, Uniform) else module()
        found = []
        for name, term in self.terms.items():
            if name not in weights:
                hint = did_you_mean(name, weights)
                raise ConfigError(f"SumOfLosses: {type(module).__name__} has no weight {name!r}{hint}")
            found.append(weights[name] * term(model, batch, meta_params, upstream))
        return torch.stack(found).sum()

    def problem_with(self, model: nn.Module, upstream: Mapping[str, nn.Module]) -> str | None:
        found = (term.problem_with(model, upstream) for term in self.terms.values() if isinstance(term, InnerLoss))
        return next((problem for problem in found if problem), None)


class AugmentedLoss(InnerLoss):
    """Another `loss` on data that a meta-parameter augments; `augmentation` says which of several."""

    def __init__(self, loss: InnerLoss, augmentation: str | None = None) -> None:
        self.loss, self.augmentation = loss, augmentation
        self.reads = getattr(loss, "reads", ())

    def __call__(self, model: FunctionalModel, batch: Any, meta_params: Any, upstream: Upstream) -> Tensor:
        module = select(meta_params, self.augmentation, "AugmentedLoss")
        if not isinstance(module, Uniform):  # the baseline: nothing is augmented
            if getattr(module, "key", None) == EMBEDDINGS and EMBEDDINGS not in batch:
                batch = _embedded(model, batch)
            batch = module(batch)
        return self.loss(model, batch, meta_params, upstream)

    def problem_with(self, model: nn.Module, upstream: Mapping[str, nn.Module]) -> str | None:
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
