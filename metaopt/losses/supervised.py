"""Losses on labels: what a supervised stage minimises, and targets that are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.base.errors import ConfigError
from metaopt.base.ranges import check_counts
from metaopt.core.contracts import InnerLoss, Upstream
from metaopt.core.meta_params import AnyMetaParameters, MetaParameters
from metaopt.core.view import FunctionalModel
from metaopt.losses.logits import counted, label_losses, logits_of, mean_over_positions, model_inputs, weighted_mean
from metaopt.meta_params.tables import in_bounds, look_up, select


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
        names = [self.weights] if self.weights is None or isinstance(self.weights, str) else self.weights
        modules = [select(meta_params, name, "WeightedLoss") for name in names]
        return weighted_mean(*label_losses(model, batch), modules, batch)


class SoftTargets(MetaParameters):
    """A learned distribution over the classes for each training example (Vyas et al., 2020, arXiv:2009.09496).

    `q_i = softmax(c · onehot(y_i) + r_i)`: it starts at the given label, smoothed, and r moves it elsewhere.

    Args:
        num_examples, num_labels: size of r.
        confidence: c > 0; the given label starts with probability `e^c / (e^c + num_labels − 1)`.
        sparse: as in `ExampleWeights`.
    """

    def __init__(self, num_examples: int, num_labels: int, confidence: float = 4.0, sparse: bool = False) -> None:
        super().__init__()
        check_counts("SoftTargets", num_examples=num_examples, num_labels=num_labels)
        if not confidence > 0:
            raise ConfigError(f"SoftTargets: confidence={confidence} must be above 0")
        self.confidence, self.sparse = confidence, sparse
        self.offsets = nn.Parameter(torch.zeros(num_examples, num_labels))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the targets of a batch [B, C], from its `labels` [B] and `index`."""
        offsets = look_up(self.offsets, batch, "index", "SoftTargets", self.sparse)
        labels = batch["labels"]
        if labels.dim() != 1 or not in_bounds(labels, offsets.shape[1]):
            raise ConfigError(
                f"SoftTargets: labels of shape {list(labels.shape)}, up to {int(labels.max())}, do not fit "
                f"{offsets.shape[1]} classes with one label per example"
            )
        given = F.one_hot(labels, offsets.shape[1]).to(offsets.dtype)
        return (self.confidence * given + offsets).softmax(-1)

    def baseline(self) -> nn.Module:
        """Return the smoothed given labels."""
        return SoftTargets(*self.offsets.shape, confidence=self.confidence)


class SoftTargetLoss(InnerLoss):
    """Cross-entropy against learned targets: `L = −1/B Σ_i Σ_c q_ic(φ) log p_ic`.

    Args:
        targets: which of several meta-parameters is the `SoftTargets`; None when there is only one.
    """

    def __init__(self, targets: str | None = None) -> None:
        self.targets = targets

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        log_p = logits_of(model(**model_inputs(batch, model))).log_softmax(-1)
        targets = select(meta_params, self.targets, "SoftTargetLoss")(batch)
        return -(targets.to(log_p.dtype) * log_p).sum(-1).mean()
