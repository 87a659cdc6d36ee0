"""The one backward, with what can be wrong with it said aloud."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError, MissingPathError, NonFiniteError
from metaopt.core.contracts import require_scalar
from metaopt.core.graphs import entries
from metaopt.core.meta_params import AnyMetaParameters, TensorWeights, as_named, named_tensors


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
    found = {name: grad for name, grad in zip(tensors, grads, strict=True) if grad is not None}
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
