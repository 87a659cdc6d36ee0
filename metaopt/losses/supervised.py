"""Losses on labels: what a supervised stage minimises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metaopt.core.contracts import InnerLoss, Upstream
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.view import FunctionalModel
from metaopt.losses.logits import (
    counted,
    label_losses,
    logits_of,
    mean_over_positions,
    model_inputs,
    weighted_mean,
)
from metaopt.meta_params.tables import select


class CrossEntropy(InnerLoss):
    """Plain mean cross-entropy, without meta-parameters: `L = 1/B Σ_i ℓ_i`.

    ℓ_i is the mean over the labels of example i that count, and labels are read as the model's own loss reads them
    (`aligned_labels`). Hugging Face's loss is the mean over all labels of the batch, `Σ_i n_i ℓ_i / Σ_i n_i`: the same
    where every example has as many.
    """

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        return mean_over_positions(*label_losses(model, batch)).mean()


class LabelSmoothing(InnerLoss):
    """Cross-entropy against the uniform distribution, `L = −1/C Σ_c log p_c`: a term that keeps a model unsure.

    With learned weights of the terms its strength is learned (`SumOfLosses`).
    """

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        log_p = logits_of(model(**model_inputs(batch, model))).log_softmax(-1)
        return mean_over_positions(-log_p.mean(-1), counted(model, batch)).mean()


class WeightedLoss(InnerLoss):
    """Cross-entropy weighted by meta-parameters: `L = 1/B Σ_i w_i(φ) ℓ_i`; `w_i ℓ_i` is `mean_t w_it ℓ_it` where there
    is a weight for each label (`labels` [B, L] in the batch's own places).

    The inner gradient takes weights that are computed from the losses as given, as in Meta-Weight-Net; the
    hypergradient still knows that they move with the model.

    Args:
        weights: which of several meta-parameters gives the weights; several names multiply theirs; None when there is
            only one.
    """

    def __init__(self, weights: str | Sequence[str] | None = None) -> None:
        self.weights = weights

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        return weighted_mean(*label_losses(model, batch), self._modules(meta_params), batch)

    def _modules(self, meta_params: AnyMetaParameters) -> list[Any]:
        names = [self.weights] if self.weights is None or isinstance(self.weights, str) else self.weights
        return [select(meta_params, name, "WeightedLoss") for name in names]
