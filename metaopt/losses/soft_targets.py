"""Soft targets that are learned: label correction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.base.errors import ConfigError
from metaopt.base.ranges import check_counts
from metaopt.core.contracts import InnerLoss, Upstream
from metaopt.core.meta_params import AnyMetaParameters, MetaParameters
from metaopt.core.view import FunctionalModel
from metaopt.losses.logits import logits_of, model_inputs
from metaopt.meta_params.tables import in_bounds, look_up, select


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
