"""The one backward, with what can be wrong with it said aloud; central differences beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.diagnostics.explain import WHERE, explained_by_graph
from metaopt.errors import ConfigError, MissingPathError, NonFiniteError
from metaopt.graphs import entries
from metaopt.losses import require_scalar
from metaopt.meta_params import AnyMetaParameters, TensorWeights, as_named, named_tensors


def hypergradient(meta_loss: Tensor, meta_params: AnyMetaParameters, retain_graph: bool = False) -> dict[str, Tensor]:
    """Return d meta-loss / d meta-parameters by name (nothing if there is nothing to learn); no `.grad` is touched.

    Raises:
        NonFiniteError: the meta-loss or a hypergradient is NaN or infinite.
        MissingPathError: a meta-parameter has no path to the meta-loss; the message names the lines of the chain that
            cut it, by running the stages once more.
    """
    meta_loss = require_scalar(meta_loss, "the meta-objective", needs_graph=False)
    tensors = named_tensors(meta_params)
    if not bool(meta_loss.detach().isfinite()):
        raise NonFiniteError(
            f"the meta-loss is {meta_loss.detach().item()}: the trained models overflowed on the validation batch; "
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
    missing = [name for name, grad in zip(tensors, grads, strict=True) if grad is None]
    if missing:
        error = _missing(missing, "no path of the graph leads from it to the meta-loss")
        raise explained_by_graph(error, missing, meta_loss, meta_params)
    found = {name: grad for name, grad in zip(tensors, grads, strict=True) if grad is not None}
    broken = [name for name, grad in found.items() if not bool(entries(grad).isfinite().all())]
    if broken:
        raise NonFiniteError(
            f"the hypergradient of {', '.join(map(repr, broken))} is not finite though the meta-loss is "
            f"{meta_loss.detach().item():.6g}: look for a division by zero or a root at zero in a loss, or lower the "
            "inner learning rate. metaopt.locate_non_finite(...) says where it arises. No meta-parameter was changed"
        )
    return found


def backward(meta_loss: Tensor, meta_params: AnyMetaParameters) -> dict[str, Tensor]:
    """Add the exact hypergradient to the `.grad` of the meta-parameters, and of nothing else.

    `meta_loss.backward()` computes the same, but leaves `.grad = None` in silence where a path is missing.

    Args:
        meta_loss: scalar.
        meta_params: a tensor, a module or a named mapping.

    Returns:
        Name → hypergradient.

    Raises:
        NonFiniteError, MissingPathError: as `hypergradient`; no `.grad` is touched then.
    """
    grads = hypergradient(meta_loss, meta_params)
    for name, tensor in named_tensors(meta_params).items():
        tensor.grad = grads[name] if tensor.grad is None else tensor.grad + grads[name]
    return grads


def _missing(names: list[str], what: str) -> MissingPathError:
    listed = ", ".join(repr(name) for name in names)
    return MissingPathError(f"meta-parameter {listed}: {what}, so there is no hypergradient. {WHERE}")
