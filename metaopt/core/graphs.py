"""The autograd graph of a loss: what it reaches, and what in it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import StageError
from metaopt.core.view import RECOMPUTES


def nodes(heads: Iterable[Tensor | None], ends: Callable[[Any], bool] | None = None) -> dict[Any, None]:
    """Return the nodes of the graph of some tensors, up to where it `ends` and with that: at boundaries, by default."""
    found: dict[Any, None] = {}
    stack: list[Any] = []
    for head in heads:
        stack.append(None if head is None else head.grad_fn)
    while stack:
        node = stack.pop()
        if node is None or node in found:
            continue
        found[node] = None
        if type(node).__name__ != "_BoundaryBackward" if ends is None else not ends(node):
            for parent, _ in node.next_functions:
                stack.append(parent)
    return found


def graph_leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors that require grad and that a loss reaches this side of the boundary."""
    return (node.variable for node in nodes([loss]) if hasattr(node, "variable"))


def refuse_graph(loss: Tensor, owners: Mapping[int, str], stage: str) -> None:
    """Raise if an inner loss reaches weights in `owners`, past the copies in training, or recomputes its forward."""
    foreign = set()
    for node in nodes([loss]):
        if type(node).__name__ == "CheckpointFunctionBackward":  # reentrant: `autograd.grad` does not see its weights
            raise StageError(f"stage {stage!r}: {RECOMPUTES}")
        foreign.add(owners.get(id(getattr(node, "variable", None))))
    if foreign := sorted(foreign - {None}):
        shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise StageError(
            f"the loss of stage {stage!r} reaches the weights of a user's own module ({shown}), which this unroll does "
            "not train; call the `model` and `upstream[...]` that the loss is handed instead"
        )


def refuse_single_derivative(gradients: Mapping[Any, Tensor | None], stage: str) -> None:
    """Raise if a gradient, in its graph, was computed by something that cannot be differentiated again.

    At `@once_differentiable` torch raises in `backward()` alone: `autograd.grad` walks past, and the second derivative
    is lost.
    """
    for node in nodes(gradients.values()):
        problem = _ONCE.get(node.name())
        if problem:
            raise StageError(
                f"stage {stage!r}: the inner loss has no second derivative, since it runs through "
                f"{problem}{_operation(node)}, or take "
                "estimator=metaopt.Checkpointed(product=metaopt.FiniteDifference()), which needs first ones only"
            )


_NOT_IMPLEMENTED = "torch::autograd::NotImplemented"
_ONCE = {
    "CdistBackwardBackward0": "torch.cdist: write (x[:, None] - y).square().sum(-1).sqrt()",
    "EmbeddingBagBackwardBackward0": "nn.EmbeddingBag: write nn.Embedding(...)(ids).mean(1)",
    _NOT_IMPLEMENTED: "an operation of which torch has the first derivative only: write it in others",
    "torch::autograd::Error": "a torch.autograd.Function whose backward is marked @once_differentiable: write it in "
    "differentiable operations",
    "CompiledFunctionBackwardBackward": "a function compiled by torch.compile: give the stage the uncompiled one",
}


def _operation(node: Any) -> str:
    """Return which operation a node stands for that only raises: it says so when it is run."""
    try:
        return "" if node.name() != _NOT_IMPLEMENTED else str(node(torch.zeros(())))
    except RuntimeError as error:
        return f" ({error})"


def refuse_second_derivative(node: str, instead: str) -> None:
    """Raise if the running backward is to leave a graph (create_graph=True), in which `node` would be missing."""
    if torch.is_grad_enabled():
        raise StageError(
            f"{node}: create_graph=True asks for the hypergradient's own graph, which this node leaves out; {instead}"
        )
