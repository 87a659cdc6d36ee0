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
    """Mean cross-entropy of one trained `stage` on validation data: the same mean of the same labels as in training."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.reads = (stage,)

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        return mean_over_positions(*label_losses(trained[self._stage(trained, batch)], batch)).mean()

    def _stage(self, trained: Trained, batch: Any) -> str:
        """Return the stage's name, after checking that it is there and the batch labelled."""
        if self.stage not in trained:
            raise ConfigError(f"{type(self).__name__}: no stage {self.stage!r}{did_you_mean(self.stage, trained)}")
        if "labels" not in batch:
            raise ConfigError(
                f"{type(self).__name__} reads batch['labels'], which the validation batch lacks (it has: "
                f"{', '.join(batch)}); give it labels, or write a MetaObjective of your own"
            )
        return self.stage


class PipelineLoss(ValidationLoss):
    """Mean cross-entropy of one trained `stage` on validation data, its inputs made as they were in training.

    Where the stage's hand-over feeds it with something of an earlier stage's (`FromUpstream.student_inputs`), so does
    this, in the graph of both models, with what the earlier stages make of the validation batch; elsewhere it is
    `ValidationLoss`.
    """

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        model = as_trained(trained, self._stage(trained, batch))
        return mean_over_positions(*label_losses(model, batch)).mean()


class SurrogateLoss(ValidationLoss):
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
        super().__init__(stage)
        self.surrogate = surrogate

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        model = trained[self._stage(trained, batch)]
        return self.surrogate(logits_of(model(**model_inputs(batch, model))), aligned_labels(model, batch["labels"]))


def expected_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `1 − mean p(label)`: the error rate of a model that answers at random by its own probabilities.

    Logits are [B, C] or [B, L, C], labels [B] or [B, L]; −100 marks positions that do not count.
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
        self.reads = tuple(read for term in terms.values() for read in getattr(term, "reads", ()))

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        found = [self.weights.get(name, 1.0) * term(trained, batch, meta_params) for name, term in self.terms.items()]
        return torch.stack([term.reshape(()) for term in found]).sum()


class _OfWeights(MetaObjective):
    """Base of what is asked of a table of weights: `weights` says which of several meta-parameters that is."""

    def __init__(self, weights: str | None = None) -> None:
        self.weights = weights

    def _table(self, meta_params: AnyMetaParameters) -> Tensor:
        """Return all weights [n], in the graph."""
        reader = type(self).__name__
        module = select(meta_params, self.weights, reader)
        if not callable(getattr(module, "weights", None)):
            raise ConfigError(
                f"{reader} reads a table of weights, and {type(module).__name__} is none: give it a method weights() "
                "that returns them all"
            )
        return module.weights()


class Sparsity(_OfWeights):
    """Mean absolute weight of a table, `1/n Σ |w_i|`: added to a meta-loss, it switches off what does not help."""

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        return self._table(meta_params).abs().mean()


class Entropy(_OfWeights):
    """Entropy of a table of weights, as a share of the largest possible: `−Σ p_i log p_i / log n`, `p = w / Σw`.

    1 where all weights are alike, 0 where one has everything: added to a meta-loss it concentrates the weights,
    subtracted it evens them out.
    """

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        weights = self._table(meta_params)
        if len(weights) < 2:
            raise ConfigError("Entropy: a table of one weight has none; at least 2 are needed")
        shares = weights / weights.sum()
        return torch.special.entr(shares).sum() / math.log(len(weights))
