"""The autograd graph: where an inner loss's ends, what it reaches, what in it is refused; and the one backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError, MissingPathError, NonFiniteError, StageError
from metaopt.core.contracts import require_scalar
from metaopt.core.meta_params import AnyMetaParameters, TensorWeights, as_named, named_tensors
from metaopt.core.view import RECOMPUTES, FunctionalModel, Models
from metaopt.optimizers.flattened import Joined

_OF = "trained by metaopt"  # in the metadata of the nodes of trained weights: chain, stage


class _Boundary(torch.autograd.Function):
    """Identity over many tensors as one node of the graph.

    `autograd.grad(loss, params)` walks back until it is past every target. A parameter that the loss does not use
    would make it walk the whole history at every step: O(T²). Behind one common node, no target lies deeper.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(map(Tensor.view_as, tensors, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


def behind_boundary(params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Pass an inner step's parameters through one identity node, unless they are views of one tensor already."""
    if isinstance(params, Joined) and len(params.pieces) == 1 and not params.alone:
        return params
    live = {name: tensor for name, tensor in params.items() if tensor.requires_grad}
    return {**params, **dict(zip(live, _Boundary.apply(*live.values()), strict=True))} if live else params


def models_behind_boundary(upstream: Mapping[str, FunctionalModel]) -> Models:
    """Pass each upstream model's weights through an identity node: what a stage's own graph ends at.

    From the second step on a stage's weights lie above the upstream ones that their gradient read: no walk goes past.
    """
    return Models({n: model.with_params(dict(behind_boundary(model.params))) for n, model in upstream.items()})


def sign(weights: Iterable[Tensor], chain: object, stage: str) -> None:
    """Note in the graph of trained weights whose they are, for an error that has nothing but the graph."""
    last: set[Any] = {weight.grad_fn for weight in weights} - {None}
    for node in last:
        node.metadata[_OF] = (weakref.ref(chain), stage)


def signatures(loss: Tensor) -> set[tuple[Any, str]]:
    """Return (chain, stage) of the trained weights that a meta-loss reads in its graph, where the chain is alive."""
    found = [node.metadata.get(_OF) for node in nodes([loss], ends=lambda node: _OF in node.metadata)]
    return {(chain, stage) for reference, stage in filter(None, found) if (chain := reference()) is not None}


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


def entries(gradient: Tensor) -> Tensor:
    """Return a gradient's entries; of a sparse one, those of the rows that it holds."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def graph_leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors that require grad and that a loss reaches this side of the boundary."""
    return (node.variable for node in nodes([loss]) if hasattr(node, "variable"))


# --- what is refused --------------------------------------------------------------------------------------------


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


def refuse_given_weights(loss: Tensor, stage: str) -> None:
    """Raise if the first derivative of a loss takes weights as given that are computed from the losses.

    It is no function's gradient then, and its Jacobian is not symmetric.
    """
    if any(type(node).__name__ == "_GivenWeightsBackward" for node in nodes([loss])):
        raise StageError(
            f"stage {stage!r}: FiniteDifference takes the Jacobian of the inner gradient to be symmetric; with weights "
            "computed from the losses (WeightNetwork), which that gradient takes as given, it is not. Use "
            "product=metaopt.DoubleBackward()"
        )


def refuse_second_derivative(node: str, instead: str) -> None:
    """Raise if the running backward is to leave a graph (create_graph=True), in which `node` would be missing."""
    if torch.is_grad_enabled():
        raise StageError(
            f"{node}: create_graph=True asks for the hypergradient's own graph, and this node has none, so that a "
            f"second derivative would leave it out; {instead}"
        )


# --- the one backward, with what can be wrong with it said aloud ------------------------------------------------


def hypergradient(meta_loss: Tensor, meta_params: AnyMetaParameters, retain_graph: bool = False) -> dict[str, Tensor]:
    """Return d meta-loss / d meta-parameters by name (nothing if there is nothing to learn); no `.grad` is touched.

    Raises:
        NonFiniteError: the meta-loss or a hypergradient is NaN or infinite.
        MissingPathError: a meta-parameter has no path to the meta-loss.
    """
    meta_loss = require_scalar(meta_loss, "the meta-objective", needs_graph=False)
    tensors = named_tensors(meta_params)
    if not bool(meta_loss.isfinite()):
        raise NonFiniteError(
            f"the meta-loss is {meta_loss.item()}: the trained models overflowed on the validation batch; "
            "lower the inner learning rate or the number of inner steps. No meta-parameter was changed"
        )
    if not tensors:
        if any(isinstance(module, TensorWeights) for module in as_named(meta_params).values()):
            raise ConfigError(
                "the meta-parameters are given as a tensor that does not require grad, so nothing can be learned: "
                "torch.rand(2, requires_grad=True), or A.requires_grad_()"
            )
        return {}
    if not meta_loss.requires_grad:
        raise _missing(list(tensors), "the meta-loss has no graph at all")
    grads = torch.autograd.grad(meta_loss, list(tensors.values()), retain_graph=retain_graph, allow_unused=True)
    modules = [module for root in as_named(meta_params).values() for module in root.modules()]
    dense = {id(p) for m in modules if getattr(m, "sparse", None) is False for p in m.parameters(recurse=False)}
    found = {
        name: grad.to_dense() if grad.is_sparse and id(tensor) in dense else grad
        for (name, tensor), grad in zip(tensors.items(), grads, strict=True)
        if grad is not None
    }
    if missing := [name for name in tensors if name not in found]:
        raise _missing(missing, "no path of the graph leads from it to the meta-loss")
    if broken := [name for name, grad in found.items() if not bool(entries(grad).isfinite().all())]:
        raise NonFiniteError(
            f"the hypergradient of {', '.join(map(repr, broken))} is not finite though the meta-loss is "
            f"{meta_loss.item():.6g}: look for a division by zero or a root at zero in a loss, or lower the inner "
            "learning rate. metaopt.locate_non_finite(...) says where it arises. No meta-parameter was changed"
        )
    return found


def accumulate(hypergradients: Mapping[str, Tensor], meta_params: AnyMetaParameters) -> None:
    """Add hypergradients to the `.grad` of the meta-parameters, by name."""
    for name, tensor in named_tensors(meta_params).items():
        found = hypergradients[name]
        tensor.grad = found if tensor.grad is None else tensor.grad + found


def _missing(names: list[str], what: str) -> MissingPathError:
    listed = ", ".join(repr(name) for name in names)
    return MissingPathError(f"meta-parameter {listed}: {what}, so there is no hypergradient. {WHERE}", names)


WHERE = (
    "No loss or objective reads it, or argmax, .detach(), .item(), torch.no_grad() or torch.tensor(...) stands between "
    "it and the loss; at which line, says print(metaopt.explain_hypergradient(chain, objective, batch, meta_params))"
)
