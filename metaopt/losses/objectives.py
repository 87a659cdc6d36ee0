"""Meta-objectives: what the meta-parameters minimise, over one validation batch or several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.core.chain import TrainedChain
from metaopt.core.contracts import MetaObjective, Trained, evaluate, require_arguments, require_scalar
from metaopt.core.graphs import refuse_second_derivative
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.core.view import FunctionalModel, Models
from metaopt.losses.distillation import FromUpstream
from metaopt.losses.logits import IGNORED, label_losses, logits_and_labels, mean_over_positions
from metaopt.losses.supervised import ValidationLoss
from metaopt.meta_params.tables import select


class PipelineLoss(ValidationLoss):
    """Mean cross-entropy of one trained `stage` on validation data, its inputs made as they were in training.

    Where the stage's hand-over feeds it with something of an earlier stage's (`FromUpstream.student_inputs`), so does
    this, in the graph of both models; elsewhere it is `ValidationLoss`.
    """

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        return mean_over_positions(*label_losses(as_trained(trained, self.stage), batch)).mean()


class SurrogateLoss(ValidationLoss):
    """A differentiable stand-in for a metric, computed from one trained stage's logits on validation data.

    `surrogate(logits [B, C] or [B, L, C], labels [B] or [B, L])` returns a scalar to be minimised; a causal model's
    labels are shifted to its logits.
    """

    def __init__(self, stage: str, surrogate: Callable[[Tensor, Tensor], Tensor]) -> None:
        require_arguments(surrogate, ("logits", "labels"), "SurrogateLoss: surrogate")
        super().__init__(stage)
        self.surrogate = surrogate

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        return self.surrogate(*logits_and_labels(trained[self.stage], batch))


def expected_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `1 − mean p(label)`: the error rate of a model that answers at random by its own probabilities.

    Logits are [B, C] or [B, L, C], labels [B] or [B, L]; −100 marks positions that do not count.
    """
    right = logits.softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return 1 - right[labels != IGNORED].mean()


class SumOfObjectives(MetaObjective):
    """A weighted sum of meta-objectives: over several stages, or a validation loss with regularisers of A.

    `terms` are by name, `weights` the factors of some; 1 for the others.
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
            raise ConfigError(f"{reader} reads a table of weights, and {type(module).__name__} has no weights()")
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
        return torch.special.entr(weights / weights.sum()).sum() / math.log(len(weights))


# --- a trained stage used as it was trained: the earlier stages' models make what it reads ----------------------


class Pipeline(nn.Module):
    """A trained student behind the trained models that feed it, called with a batch or with the inputs in it."""

    def __init__(self, student: FunctionalModel, hand_over: FromUpstream, upstream: Models) -> None:
        super().__init__()
        self.module = student.structure.module  # says on which device the tensors are
        self._student, self._hand_over, self._upstream = student, hand_over, upstream

    def forward(self, **batch: Any) -> Any:
        inputs, _ = self._hand_over.student_inputs(self._student, batch, self._upstream)
        return self._student(**inputs)

    def train(self, mode: bool = True) -> Pipeline:
        return self  # its models have modes of their own

    @contextmanager
    def as_module(self) -> Iterator[nn.Module]:
        yield self


def as_trained(trained: Mapping[str, FunctionalModel], stage: str) -> FunctionalModel | Pipeline:
    """Return a stage's trained model, behind those that fed it in training where they did."""
    student = trained[stage]
    loss = None if student.trained is None else student.trained.loss
    for part in (loss, getattr(loss, "loss", None), *getattr(loss, "terms", {}).values()):
        if isinstance(part, FromUpstream) and type(part).student_inputs != FromUpstream.student_inputs:
            earlier = itertools.takewhile(lambda name: name != stage, trained)
            return Pipeline(student, part, Models({name: trained[name] for name in earlier}))
    return student


# --- one meta-loss over several validation batches, with the memory of one --------------------------------------


def mean_meta_loss(
    objective: Callable[..., Tensor], trained: TrainedChain, batches: Iterable[Any], meta_params: AnyMetaParameters
) -> Tensor:
    """Return the mean of a meta-objective over n ≥ 1 batches, `1/n Σ_i f(trained, batch_i, φ)`, for the memory of one.

    Each batch is differentiated as far as the trained weights and the meta-parameters at once, and its graph is freed;
    the one backward of the result then carries the summed gradients through the chain.
    """
    batches = list(batches)
    if not batches:
        raise ConfigError("mean_meta_loss: there is not a single batch; the mean of none is no meta-loss")
    pairs, apart = _cut(trained)
    pairs += [(tensor, tensor) for tensor in named_tensors(meta_params).values()]
    leaves = [leaf for _, leaf in pairs]
    total, sums = torch.zeros(()), [None] * len(leaves)
    where = f"the meta-objective {type(objective).__name__}"
    for batch in batches:
        loss = require_scalar(evaluate(objective, apart, batch, meta_params), where, needs_graph=False) / len(batches)
        total = loss.detach() + total.to(loss)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
            sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, found, strict=True)]
    reached = [(source, grad) for (source, _), grad in zip(pairs, sums, strict=True) if grad is not None]
    if not reached:
        return total
    tensors, grads = zip(*reached, strict=True)
    return _Differentiated.apply(total, grads, *tensors)


def _cut(trained: TrainedChain) -> tuple[list[tuple[Tensor, Tensor]], TrainedChain]:
    """Return pairs of a trained weight in the graph and a leaf of its values, and the models made of the leaves."""
    pairs: list[tuple[Tensor, Tensor]] = []
    results = {}
    for name, result in trained.results.items():
        own = result.model.params
        leaves = {key: p.detach().requires_grad_() if p.requires_grad else p for key, p in own.items()}
        pairs += [(p, leaves[key]) for key, p in own.items() if p.requires_grad]
        results[name] = replace(result, model=result.model.with_params(leaves))
    return pairs, TrainedChain(results, trained.version)


class _Differentiated(torch.autograd.Function):
    """A number whose gradient at each of the tensors is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative("mean_meta_loss", "add up the objective's values over the batches instead")
        return (None, None, *(grad * cotangent for grad in ctx.grads))
