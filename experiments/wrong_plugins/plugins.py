"""Three plug-ins with a mistake that trains without complaint, and gives a wrong hypergradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import metaopt
from metaopt.losses.logits import logits_of, model_inputs


class DetachedNormaliser(metaopt.InnerLoss):
    """A weighted mean whose normaliser is taken out of the graph: one of the two paths of A is cut.

    Right: `(weights * losses).sum() / weights.sum()`.
    """

    def __call__(self, model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        weights = meta_params(batch)
        losses = F.cross_entropy(logits_of(model(**model_inputs(batch))), batch["labels"], reduction="none")
        return (weights * losses).sum() / weights.detach().sum()


class StaleTeacher(metaopt.Distillation):
    """Soft labels, half of them of a teacher that is kept from the first call.

    Right: read `upstream[...]` at every call, and keep nothing.
    """

    def __init__(self, upstream: str | None = None, temperature: float = 1.0) -> None:
        super().__init__(upstream, temperature)
        self.kept: Any = None

    def __call__(self, model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        if self.kept is None:
            self.kept = upstream["teacher"]
        losses = [
            super(StaleTeacher, self).__call__(model, batch, meta_params, {"teacher": teacher})
            for teacher in (upstream["teacher"], self.kept)
        ]
        return torch.stack(losses).mean()


class DecayInPlace(metaopt.WeightedLoss):
    """Weight decay by hand: the weights shrink, and the graph does not know of it.

    Right: the optimizer's own, `optimizer.weight_decay=0.1`.
    """

    def __call__(self, model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        with torch.no_grad():
            for param in model.params.values():
                param.mul_(0.9)
        return super().__call__(model, batch, meta_params, upstream)


def clip_in_place(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clip by norm in place: the graph keeps the gradients as they were.

    Right: `metaopt.ClipNorm(0.01)`, or `g * scale` outside `no_grad`.
    """
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    with torch.no_grad():
        for gradient in gradients.values():
            gradient.mul_((0.01 / norm).clamp(max=1.0))
    return gradients
