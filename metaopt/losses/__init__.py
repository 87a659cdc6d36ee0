"""What a stage minimises, who writes its data, what the meta-parameters minimise; helpers for losses of one's own."""

from metaopt.core.contracts import InnerLoss, Upstream, require_scalar
from metaopt.losses.distillation import (
    Distillation,
    FromUpstream,
    HardLabels,
    HiddenStates,
    find_upstream,
    soft_label_loss,
)
from metaopt.losses.logits import (
    IGNORED,
    NOT_FOR_MODELS,
    Batch,
    aligned_labels,
    counted,
    cross_entropies,
    cross_entropy_per_example,
    label_losses,
    logits_of,
    mean_over_positions,
    model_inputs,
    num_classes,
    weighted_mean,
)
from metaopt.losses.supervised import CrossEntropy, LabelSmoothing, WeightedLoss

__all__ = [
    "IGNORED",
    "NOT_FOR_MODELS",
    "Batch",
    "CrossEntropy",
    "Distillation",
    "FromUpstream",
    "HardLabels",
    "HiddenStates",
    "InnerLoss",
    "LabelSmoothing",
    "Upstream",
    "WeightedLoss",
    "aligned_labels",
    "counted",
    "cross_entropies",
    "cross_entropy_per_example",
    "find_upstream",
    "label_losses",
    "logits_of",
    "mean_over_positions",
    "model_inputs",
    "num_classes",
    "require_scalar",
    "soft_label_loss",
    "weighted_mean",
]
