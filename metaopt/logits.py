"""From a batch to a model's logits, and from logits to losses per example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.errors import ConfigError, StageError

Batch = Mapping[str, Tensor]

NOT_FOR_MODELS = ("index", "source", "labels")  # entries of a batch that models never receive
IGNORED = -100  # label of a position that counts in no loss


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the entries of a batch that a model receives: all but `index`, `source` and `labels`."""
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"a batch is a {type(batch).__name__}; metaopt's own losses need a mapping of names to tensors, such as "
            "{'input_ids': ..., 'labels': ..., 'index': ...}; for other batches write an InnerLoss of your own"
        )
    return {name: value for name, value in batch.items() if name not in NOT_FOR_MODELS}


def logits_of(output: Any) -> Tensor:
    """Return a model's logits: the output itself, or its `.logits`."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise StageError(
            f"the model returned a {type(output).__name__} without .logits; return a tensor of logits or an object "
            "with .logits, or write an InnerLoss that reads what it returns"
        )
    return logits


def cross_entropy_per_example(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each example's cross-entropy, mean over its positions.

    Args:
        logits: [B, C] or [B, L, C].
        labels: [B] or [B, L]; −100 marks positions that do not count.

    Returns:
        [B], in nats.
    """
    return mean_over_positions(*cross_entropies(logits, labels))


def cross_entropies(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each label, and which ones count; both of the labels' shape."""
    if labels.shape != logits.shape[:-1]:
        raise StageError(
            f"logits of shape {list(logits.shape)} do not fit labels of shape {list(labels.shape)}: labels must have "
            f"the shape {list(logits.shape[:-1])}"
        )
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(labels.shape), labels != IGNORED


def mean_over_positions(values: Tensor, counts: Tensor | None) -> Tensor:
    """Return the mean over all but the first axis [B], over the positions that `counts` marks."""
    if values.dim() == 1:
        return values
    if counts is None:
        return values.flatten(1).mean(1)
    counts = counts.to(values.dtype)
    return (values * counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)


def num_classes(module: nn.Module) -> int | None:
    """Return how many classes or tokens a model's logits tell apart, where it says so."""
    try:
        head = getattr(module, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):
        head = None
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor):
        return len(weight)
    labels = getattr(module, "num_labels", None)
    return labels if isinstance(labels, int) else None


def require_scalar(loss: Any, where: str, needs_graph: bool = True) -> Tensor:
    """Return `loss` if it is a scalar tensor (in the graph); raise what is wrong with it otherwise."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise StageError(f"{where} must return a scalar tensor, got {shape}; reduce it with .mean() or .sum()")
    if needs_graph and torch.is_grad_enabled() and not loss.requires_grad:
        raise StageError(
            f"{where} returned a tensor without a graph: something in it ran under torch.no_grad(), was detached, or "
            "was rebuilt with torch.tensor(...); compute it from the model that is handed in"
        )
    return loss.reshape(())
