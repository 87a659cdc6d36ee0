"""The final retrain: A is frozen, and fresh models go through the whole chain by plain training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.chain import Chain, TrainedChain
from metaopt.meta_params import AnyMetaParameters, as_named


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
    found = weights_of(meta_params)
    if found is None:
        return {}
    key, weights = found
    if key == "source" and good_sources is not None:
        return {"good_source_weight": float(weights[good_sources].sum() / weights.sum())}
    if key == "index" and is_clean is not None and 0 < int(is_clean.sum()) < len(is_clean):
        return {"noise_auc": auc(weights, is_clean)}
    return {}


def auc(scores: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve: the probability that a positive scores above a negative."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive.numpy(), scores.numpy()))


def retrain(
    chain: Chain,
    start: Mapping[str, Any],
    meta_params: AnyMetaParameters,
    num_steps: Mapping[str, int],
    on_step: Callable[[str, int, Tensor], None] | None = None,
) -> TrainedChain:
    """Train the whole chain from a saved state by plain `torch.optim`, with frozen meta-parameters.

    Args:
        chain: left in the trained state.
        start: `chain.state_dict()` of the fresh chain, so that each comparison starts from the same weights and data.
        meta_params: read only.
        num_steps: per stage name.
        on_step: called with stage name, step, detached loss.
    """
    chain.load_state_dict(start)
    return chain.train(meta_params, num_steps=num_steps, on_step=on_step)


def scored(
    chain: Chain, trained: TrainedChain, stage: str, score: Callable[..., Mapping[str, float]], batches: Iterable[Any]
) -> dict[str, float]:
    """Return the metrics of one trained stage on a stream."""
    with torch.no_grad():
        return dict(score(trained[stage], [chain.move(batch) for batch in batches]))
