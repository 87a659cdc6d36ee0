"""`metaopt.backward` and `metaopt.hypergradient`, whose error names the line where a path is cut; and the mixed second
derivatives of one loss, `∂²L/∂θ∂φ`, that a hypergradient is made of.

The Jacobian of `∂L/∂θ` with respect to φ has a row per weight and a column per meta-parameter. A backward never builds
it: it multiplies a vector v, of θ's shape, from the left, and gives `vᵀ ∂²L/∂θ∂φ`, of φ's shape. With v = ones that is
the sum of the rows. In a hypergradient v is what the later steps hand back, `∂F/∂θ` through the optimizer, so such
products by hand are the chain rule of one step; `Chain.unroll` does all steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaopt.base.errors import MissingPathError, StageError
from metaopt.core import unrolled as layer
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.diagnostics.paths.explain import explained_by_graph
from metaopt.estimators.products.base import linearized

Tensors = Mapping[str, Tensor]


def hypergradient(meta_loss: Tensor, meta_params: AnyMetaParameters, retain_graph: bool = False) -> dict[str, Tensor]:
    """Return d meta-loss / d meta-parameters by name (nothing if there is nothing to learn); no `.grad` is touched.

    Raises:
        NonFiniteError: the meta-loss or a hypergradient is NaN or infinite.
        MissingPathError: a meta-parameter has no path to the meta-loss; the stages are run once more for a message that
            names the lines which cut it.
    """
    try:
        return layer.hypergradient(meta_loss, meta_params, retain_graph)
    except MissingPathError as error:
        raise explained_by_graph(error, meta_loss, meta_params) from None


def backward(meta_loss: Tensor, meta_params: AnyMetaParameters) -> dict[str, Tensor]:
    """Add the exact hypergradient to the `.grad` of the meta-parameters, and of nothing else; return it by name.

    `meta_loss.backward()` computes the same, but leaves `.grad = None` in silence where a path is missing. Raises what
    `hypergradient` raises, and touches no `.grad` then.
    """
    grads = hypergradient(meta_loss, meta_params)
    layer.accumulate(grads, meta_params)
    return grads


def mixed_vjp(
    loss: Tensor, params: Tensors, meta_params: AnyMetaParameters, cotangent: Tensors | None = None
) -> dict[str, Tensor]:
    """Return `Σ_θ v_θ · ∂²L/∂θ∂φ` for each meta-parameter φ, in its shape.

    Args:
        loss: L, a scalar in the graph of `params` and `meta_params`; the graph is kept.
        params: name → θ, such as `dict(model.named_parameters())`.
        meta_params: a tensor, a module or a named mapping.
        cotangent: name → v, in θ's shape; ones for all if None, and none for names that are left out.

    Raises:
        MissingPathError: the gradient of the loss depends on no meta-parameter.
        StageError: a cotangent does not fit.
    """
    gradients, learned = _gradients(loss, params), named_tensors(meta_params)
    vectors = {name: torch.ones_like(g) for name, g in gradients.items()} if cotangent is None else cotangent
    for name, vector in vectors.items():
        if name not in params or vector.shape != params[name].shape:
            shape = list(vector.shape)
            raise StageError(f"cotangent {name!r} of shape {shape} fits no parameter of that name and shape")
    used = [vectors.get(name) for name in gradients]
    (found,) = _or_zeros([linearized(list(gradients.values()), used, list(learned.values()), True)], learned)
    return dict(zip(learned, found, strict=True))


def mixed_jacobian(loss: Tensor, params: Tensors, meta_params: AnyMetaParameters) -> dict[tuple[str, str], Tensor]:
    """Return the whole `∂²L/∂θ∂φ` as blocks (θ's name, φ's name) → tensor of shape θ's + φ's; for small problems.

    One backward per weight. Checked against `torch.autograd.functional.jacobian`.

    Raises:
        MissingPathError: the gradient of the loss depends on no meta-parameter.
    """
    gradients, learned = _gradients(loss, params), named_tensors(meta_params)
    entries = [entry for gradient in gradients.values() for entry in gradient.flatten()]
    rows = [linearized([entry], [torch.ones_like(entry)], list(learned.values()), True) for entry in entries]
    blocks: dict[tuple[str, str], Tensor] = {}
    for (other, tensor), column in zip(learned.items(), zip(*_or_zeros(rows, learned), strict=True), strict=True):
        parts = torch.stack(column).split([gradient.numel() for gradient in gradients.values()])
        for (name, gradient), part in zip(gradients.items(), parts, strict=True):
            blocks[name, other] = part.view((*gradient.shape, *tensor.shape))
    return blocks


def _gradients(loss: Tensor, params: Tensors) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}


def _or_zeros(rows: Sequence[Sequence[Tensor | None]], learned: Tensors) -> list[list[Tensor]]:
    """Return products with zeros for None; raise if there is nothing but None."""
    if all(part is None for row in rows for part in row):
        raise MissingPathError(
            f"the gradient of this loss depends on none of the meta-parameters {', '.join(map(repr, learned))}: the "
            "loss must be computed from them, and in more than a term added to it"
        )
    return [
        [torch.zeros_like(t) if x is None else x for x, t in zip(row, learned.values(), strict=True)] for row in rows
    ]
