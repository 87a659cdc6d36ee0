"""What was learned, and whether it is any good: the weights, their quality, and what speaks against a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from metaopt.core.meta_params import AnyMetaParameters, as_named
from metaopt.data.bundle import DataBundle
from metaopt.losses.supervised import ValidationLoss
from metaopt.trainer import MetaTrainer

FEWEST = 10  # meta-steps of which a trend is told


def weights_of(meta_params: AnyMetaParameters) -> tuple[str, Tensor] | None:
    """Return (`source` or `index`, all weights) of meta-parameters that weigh sources or examples, or None."""
    for module in as_named(meta_params).values():
        weights, key = getattr(module, "weights", None), str(getattr(module, "key", "index"))
        if callable(weights) and key in ("source", "index"):
            return key, torch.as_tensor(weights()).detach().cpu()
    return None


def weight_quality(meta_params: AnyMetaParameters, good_sources: Tensor | None, is_clean: Tensor | None) -> dict:
    """Return how well the weights tell good from bad data, which the training never sees.

    `good_source_weight`: the good sources' share of all weight. `noise_auc`: the probability that an uncorrupted
    example outweighs a corrupted one.
    """
    key, weights = weights_of(meta_params) or ("", Tensor())
    if key == "source" and good_sources is not None:
        return {"good_source_weight": float(weights[good_sources].sum() / weights.sum())}
    if key == "index" and is_clean is not None and 0 < int(is_clean.sum()) < len(is_clean):
        return {"noise_auc": auc(weights, is_clean)}
    return {}


def auc(scores: Tensor, positive: Tensor) -> float:
    """Return the probability that a positive scores above a negative: the area under the ROC curve."""
    return float(roc_auc_score(positive.numpy(), scores.numpy()))


def doubts(
    trainer: MetaTrainer, records: Sequence[Mapping[str, Any]], data: DataBundle, metrics: Mapping[str, float]
) -> list[str]:
    """Return what speaks against a run: a meta-loss that has not fallen or is that of guessing, a metric at chance.

    Guessing among C classes has the loss log C and the accuracy 1/C; a validation loss within a hundredth of it, or an
    accuracy within two standard errors, counts as guessed. The first and the last tenth of the meta-steps are compared.
    """
    found = []
    losses = [record["meta_loss"] for record in records]
    part = max(1, len(losses) // 10)
    start, end = sum(losses[:part]) / part, sum(losses[-part:]) / part
    classes = num_classes(trainer, data)
    if losses and classes and isinstance(trainer.objective, ValidationLoss) and end > 0.99 * math.log(classes):
        guess = f"guessing among {classes} classes gives {math.log(classes):.3f}"
        found.append(f"The meta-loss ends at {end:.3f}, no better than chance: {guess}.")
    if trainer.learns and len(losses) >= FEWEST and end >= start:
        found.append(f"The meta-loss has not fallen: {start:.4g} at the start, {end:.4g} at the end.")
    size = data.sizes.get("test", 0)
    by_chance = {"accuracy": 1 / classes, "token_accuracy": 1 / classes, "exact_match": 0.0} if classes else {}
    for name, chance in by_chance.items():
        error = math.sqrt(chance * (1 - chance) / size) if size else 0.0
        if name in metrics and metrics[name] <= chance + 2 * error:
            told = f"{name.replace('_', ' ')} on test, {metrics[name]:.3f}"
            found.append(f"The {told}, is no better than chance ({chance:.3g}).")
    return found


def num_classes(trainer: MetaTrainer, data: DataBundle) -> int | None:
    """Return among how many classes, or tokens, the validated model chooses, by the data or its output layer."""
    stages = trainer.chain.stages
    model = stages[getattr(trainer.objective, "stage", list(stages)[-1])].model
    head = getattr(model, "get_output_embeddings", lambda: None)()
    known = data.facts.get("num_labels") or data.facts.get("vocab_size")
    return known or (None if head is None else len(head.weight))
