"""Mixed second derivatives of one loss: `∂²L/∂θ∂φ`, as a product with a vector, or whole.

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
from metaopt.core.meta_params import AnyMetaParameters, named_tensors

Tensors = Mapping[str, Tensor]


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
            raise StageError(
                f"cotangent {name!r} of shape {list(vector.shape)} fits no parameter of that name and shape"
            )
    used = [name for name in gradients if name in vectors]
    found = _products([gradients[name] for name in used], [vectors[name] for name in used], learned)
    _require_path(found, learned)
    return _or_zeros(found, learned)


def mixed_jacobian(loss: Tensor, params: Tensors, meta_params: AnyMetaParameters) -> dict[tuple[str, str], Tensor]:
    """Return the whole `∂²L/∂θ∂φ` as blocks (θ's name, φ's name) → tensor of shape θ's + φ's; for small problems.

    One backward per weight. Checked against `torch.autograd.functional.jacobian`.

    Raises:
        MissingPathError: the gradient of the loss depends on no meta-parameter.
    """
    learned = named_tensors(meta_params)
    blocks: dict[tuple[str, str], Tensor] = {}
    reached: list[Tensor | None] = []
    for name, gradient in _gradients(loss, params).items():
        one = torch.ones((), dtype=gradient.dtype, device=gradient.device)
        products = [_products([entry], [one], learned) for entry in gradient.flatten()]
        rows = [_or_zeros(row, learned) for row in products]
        reached += [part for row in products for part in row if part is not None and part.any()]
        for other, tensor in learned.items():
            blocks[name, other] = torch.stack([row[other] for row in rows]).view((*gradient.shape, *tensor.shape))
    _require_path(reached, learned)
    return blocks


def _gradients(loss: Tensor, params: Tensors) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}


def _products(heads: list[Tensor], vectors: list[Tensor], learned: Tensors) -> Sequence[Tensor | None]:
    pairs = [(head, vector) for head, vector in zip(heads, vectors, strict=True) if head.requires_grad]
    if not pairs:
        return [None] * len(learned)
    outputs, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, list(learned.values()), weights, retain_graph=True, allow_unused=True)


def _or_zeros(found: Sequence[Tensor | None], learned: Tensors) -> dict[str, Tensor]:
    pairs = zip(learned.items(), found, strict=True)
    return {name: torch.zeros_like(tensor) if part is None else part for (name, tensor), part in pairs}


def _require_path(found: Sequence[Tensor | None], learned: Tensors) -> None:
    if all(part is None for part in found):
        raise MissingPathError(
            f"the gradient of this loss depends on none of the meta-parameters {', '.join(map(repr, learned))}: the "
            "loss must be computed from them, and in more than a term added to it"
        )
