"""The autograd graph of an inner loss: where it ends, what it reaches, and whose parameters those are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.core.view import FunctionalModel, Models

Tensors = dict[str, Tensor]
_OF = "trained by metaopt"  # in the metadata of the nodes of trained weights: chain, stage


class _Boundary(torch.autograd.Function):
    """Identity over many tensors as one node of the graph.

    `autograd.grad(loss, params)` walks back until it is past every target. A parameter that the loss does not use
    would make it walk the whole history at every step: O(T²). Behind one common node, no target lies deeper.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


def behind_boundary(
    params: Mapping[str, Tensor], upstream: Mapping[str, FunctionalModel], joint: Collection[str]
) -> tuple[Tensors, Models]:
    """Pass an inner step's parameters, and all upstream weights, through identity nodes.

    Args:
        params: of the step.
        upstream: name → model.
        joint: the stages that the loss is known to read. The node of `params` stands above theirs in the graph (by an
            input that nothing comes out of), so that no walk towards `params` goes past them, nor computes gradients
            of their weights. Not above the others: a path that is cut would look like one that is there.
    """
    models = Models()
    below: list[Tensor] = []
    for stage, model in upstream.items():
        bounded = _bounded(model.params)
        models[stage] = model._with({**model.params, **bounded})
        below += list(bounded.values())[:1] if stage in joint else []
    return {**params, **_bounded(params, below)}, models


def _bounded(tensors: Mapping[str, Tensor], below: Collection[Tensor] = ()) -> Tensors:
    live = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    return dict(zip(live, _Boundary.apply(*live.values(), *below), strict=False)) if live else {}


def stages_read(loss: Tensor, upstream: Mapping[str, FunctionalModel]) -> list[str]:
    """Return the upstream stages whose boundary a loss reaches, each behind a node of its own."""
    reached = set(nodes([loss]))
    boundaries = {stage: {p.grad_fn for p in model.params.values()} - {None} for stage, model in upstream.items()}
    return [stage for stage, own in boundaries.items() if own & reached]


def sign(weights: Iterable[Tensor], chain: object, stage: str) -> None:
    """Note in the graph of trained weights whose they are, for an error that has nothing but the graph."""
    last: set[Any] = {weight.grad_fn for weight in weights} - {None}
    for node in last:
        node.metadata[_OF] = (weakref.ref(chain), stage)


def signatures(loss: Tensor) -> set[tuple[Any, str]]:
    """Return (chain, stage) of the trained weights that a meta-loss reads in its graph, where the chain is alive."""
    found = [node.metadata.get(_OF) for node in nodes([loss], ends=lambda node: _OF in node.metadata)]
    return {(chain, stage) for reference, stage in filter(None, found) if (chain := reference()) is not None}


def _is_boundary(node: Any) -> bool:
    return type(node).__name__ == "_BoundaryBackward"


def nodes(heads: Iterable[Tensor], ends: Callable[[Any], bool] = _is_boundary) -> Iterator[Any]:
    """Yield the nodes of the graph of some tensors, up to the boundary and with it."""
    seen: set[Any] = set()
    stack: list[Any] = [head.grad_fn for head in heads]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not ends(node):
            stack += [parent for parent, _ in node.next_functions]


def entries(gradient: Tensor) -> Tensor:
    """Return a gradient's entries; of a sparse one, those of the rows that it holds."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def graph_leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors that require grad and that a loss reaches this side of the boundary."""
    return (node.variable for node in nodes([loss]) if hasattr(node, "variable"))


def foreign_parameters(loss: Tensor, owners: Mapping[int, str]) -> list[str]:
    """Name the modules' own parameters that a loss reaches directly, past the differentiable copies.

    Args:
        loss: an inner loss whose parameters stand behind a boundary.
        owners: `id(parameter)` → its name, for every parameter of every stage's own module.
    """
    return sorted({owners[id(leaf)] for leaf in graph_leaves(loss) if id(leaf) in owners})
