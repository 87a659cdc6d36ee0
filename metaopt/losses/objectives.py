"""Meta-objectives: what the meta-parameters minimise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.core.contracts import MetaObjective, Trained
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.losses.logits import IGNORED, aligned_labels, label_losses, logits_of, mean_over_positions, model_inputs
from metaopt.losses.pipeline import as_trained
from metaopt.meta_params.tables import select


class ValidationLoss(MetaObjective):
    """Mean cross-entropy of one trained stage on validation data; the same mean of the same labels as `CrossEntropy`.

    Args:
        stage: its name.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.reads = (stage,)

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        return mean_over_positions(*label_losses(trained[_stage_of(self, trained, batch)], batch)).mean()


class PipelineLoss(ValidationLoss):
    """Mean cross-entropy of one trained stage on validation data, its inputs made as they were in training.

    Where the stage's hand-over feeds it with something of an earlier stage's (`FromUpstream.student_inputs`), so does
    this, in the graph of both models, with what the earlier stages make of the validation batch; elsewhere it is
    `ValidationLoss`.

    Args:
        stage: its name.
    """

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        model = as_trained(trained, _stage_of(self, trained, batch))
        return mean_over_positions(*label_losses(model, batch)).mean()


class SurrogateLoss(MetaObjective):
    """A differentiable stand-in for a metric, computed from one trained stage's logits on validation data.

    Args:
        stage: its name.
        surrogate: (logits [B, C] or [B, L, C], labels [B] or [B, L]) → scalar to be minimised; a causal model's labels
            are shifted to its logits.
    """

    def __init__(self, stage: str, surrogate: Callable[[Tensor, Tensor], Tensor]) -> None:
        if not callable(surrogate):
            raise ConfigError(
                f"SurrogateLoss: surrogate is a {type(surrogate).__name__}; give a function of (logits, labels); in a "
                "config: surrogate: {_target_: my_module.my_function, _partial_: true}"
            )
        self.stage, self.surrogate = stage, surrogate
        self.reads = (stage,)

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        model = trained[_stage_of(self, trained, batch)]
        return self.surrogate(logits_of(model(**model_inputs(batch, model))), aligned_labels(model, batch["labels"]))


def expected_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `1 − mean p(label)`: the error rate of a model that answers at random by its own probabilities.

    Args:
        logits: [B, C] or [B, L, C].
        labels: [B] or [B, L]; −100 marks positions that do not count.
    """
    right = logits.softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return 1 - right[labels != IGNORED].mean()


class SumOfObjectives(MetaObjective):
    """A weighted sum of meta-objectives: over several stages, or a validation loss with regularisers of A.

    Args:
        terms: name → meta-objective.
        weights: name → factor; 1 where it is not given.
    """

    def __init__(self, terms: Mapping[str, MetaObjective], weights: Mapping[str, float] | None = None) -> None:
        if not terms:
            raise ConfigError("SumOfObjectives: terms is empty; give at least one: {'loss': ValidationLoss('student')}")
        self.terms, self.weights = dict(terms), dict(weights or {})
        for name in self.weights:
            if name not in self.terms:
                raise ConfigError(f"SumOfObjectives: weights names no term {name!r}{did_you_mean(name, terms)}")
        self.reads = tuple(dict.fromkeys(read for term in terms.values() for read in getattr(term, "reads", ())))

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        found = [self.weights.get(name, 1.0) * term(trained, batch, meta_params) for name, term in self.terms.items()]
        return torch.stack([term.reshape(()) for term in found]).sum()


class Entropy(MetaObjective):
    """Entropy of a table of weights, as a share of the largest possible: `−Σ p_i log p_i / log n`, `p = w / Σw`.

    1 where all weights are alike, 0 where one has everything: added to a meta-loss it concentrates the weights,
    subtracted it evens them out.

    Args:
        weights: which of several meta-parameters; None when there is only one.
    """

    def __init__(self, weights: str | None = None) -> None:
        self.weights = weights

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        weights = _all_weights(self, meta_params)
        if len(weights) < 2:
            raise ConfigError("Entropy: a table of one weight has none; at least 2 are needed")
        shares = weights / weights.sum()
        return torch.special.entr(shares).sum() / math.log(len(weights))


class Sparsity(MetaObjective):
    """Mean absolute weight of a table, `1/n Σ |w_i|`: added to a meta-loss, it switches off what does not help.

    Args:
        weights: which of several meta-parameters; None when there is only one.
    """

    def __init__(self, weights: str | None = None) -> None:
        self.weights = weights

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        return _all_weights(self, meta_params).abs().mean()


def _stage_of(objective: Any, trained: Trained, batch: Any) -> str:
    stage = objective.stage
    if stage not in trained:
        raise ConfigError(f"{type(objective).__name__}: no stage {stage!r}{did_you_mean(stage, trained)}")
    if "labels" not in batch:
        raise ConfigError(
            f"{type(objective).__name__} reads batch['labels'], which the validation batch lacks (it has: "
            f"{', '.join(batch)}); give it labels, or write a MetaObjective of your own"
        )
    return stage


def _all_weights(objective: Any, meta_params: AnyMetaParameters) -> Tensor:
    reader = type(objective).__name__
    module = select(meta_params, objective.weights, reader)
    if not callable(getattr(module, "weights", None)):
        raise ConfigError(
            f"{reader} reads a table of weights, and {type(module).__name__} is none: give it a method weights() that "
            "returns them all"
        )
    return module.weights()
