"""From a batch to a model's logits, and from logits to losses per example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
            "was rebuilt with torch.tensor(...); compute it from the model that is handed in. At which line, says "
            "print(metaopt.explain_hypergradient(chain, objective, batch, meta_params))"
        )
    return loss.reshape(())


def weighted_mean(losses: Tensor, counts: Tensor, modules: Sequence[Any], batch: Batch) -> Tensor:
    """Return the mean of losses [B] or [B, L] over examples and counted positions, each weighted by all modules."""
    plain = mean_over_positions(losses, counts)
    per_example: Tensor | None = None
    for module in modules:
        read = (plain,) if getattr(module, "reads_losses", False) else ()
        weights = module(batch, *read).to(losses.dtype)
        if weights.shape == losses.shape and losses.dim() > 1:
            losses = weights * losses
        elif weights.shape == plain.shape:
            per_example = weights if per_example is None else per_example * weights
        else:
            raise StageError(
                f"{type(module).__name__} gives weights of shape {list(weights.shape)} for losses of shape "
                f"{list(losses.shape)}; give one per example{' or per position' if losses.dim() > 1 else ''}"
            )
    found = mean_over_positions(losses, counts)
    if per_example is None:
        return found.mean()
    if any(getattr(module, "reads_losses", False) for module in modules):
        return _GivenWeights.apply(per_example, found).mean()
    return (per_example * found).mean()


class _GivenWeights(torch.autograd.Function):
    """`w · ℓ`, whose first derivative takes w as given; w stays in the graph of that derivative.

    `w.detach()` would do the former and lose the latter: from the second inner step on, w moves with the weights in
    training, and the hypergradient would miss it.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, losses: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return weights * losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (weights,) = ctx.saved_tensors
        return None, gradients[0] * weights
