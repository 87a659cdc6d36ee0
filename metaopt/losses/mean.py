"""One meta-loss over several validation batches, with the memory of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError
from metaopt.core.chain import TrainedChain
from metaopt.core.contracts import evaluate, require_scalar
from metaopt.core.graphs import refuse_second_derivative
from metaopt.core.meta_params import AnyMetaParameters, named_tensors


def mean_meta_loss(
    objective: Callable[..., Tensor], trained: TrainedChain, batches: Iterable[Any], meta_params: AnyMetaParameters
) -> Tensor:
    """Return the mean of a meta-objective over batches, `1/n Σ_i f(trained, batch_i, φ)`, to be differentiated once.

    Each batch is differentiated as far as the trained weights and the meta-parameters at once, and its graph is freed;
    the one backward of the result then carries the summed gradients through the chain: the gradient of the sum over
    all n ≥ 1 batches, for the memory of one.
    """
    batches = list(batches)
    if not batches:
        raise ConfigError("mean_meta_loss: there is not a single batch; the mean of none is no meta-loss")
    sources, leaves, apart = _cut(trained)
    sources += named_tensors(meta_params).values()
    leaves += named_tensors(meta_params).values()
    total, sums = torch.zeros(()), [None] * len(leaves)
    where = f"the meta-objective {type(objective).__name__}"
    for batch in batches:
        loss = require_scalar(evaluate(objective, apart, batch, meta_params), where, needs_graph=False) / len(batches)
        total = loss.detach() + total.to(loss)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
            sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, found, strict=True)]
    reached = [(source, grad) for source, grad in zip(sources, sums, strict=True) if grad is not None]
    if not reached:
        return total
    tensors, grads = zip(*reached, strict=True)
    return _Differentiated.apply(total, grads, *tensors)


def _cut(trained: TrainedChain) -> tuple[list[Tensor], list[Tensor], TrainedChain]:
    """Return the trained weights in the graph, leaves of the same values, and the trained models made of the leaves."""
    sources: list[Tensor] = []
    leaves: list[Tensor] = []
    results = {}
    for name, result in trained.results.items():
        params = dict(result.model.params)
        for key, param in params.items():
            if param.requires_grad:
                sources.append(param)
                leaves.append(param.detach().requires_grad_())
                params[key] = leaves[-1]
        results[name] = replace(result, model=result.model.with_params(params))
    return sources, leaves, TrainedChain(results, trained.version)


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
