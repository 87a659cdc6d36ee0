"""Linear stages whose trained weights and their derivative are matrix expressions, without autograd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from reference import Tensors, Training
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearTraining:
    """A ridge stage, trained by full-batch heavy-ball descent from (`start`, `velocity`).

    L(θ) = 1/(2n) Σᵢ wᵢ (zᵢᵀθ − yᵢ − Σⱼ cⱼ zᵢᵀθⱼ)² + ½ρ‖θ‖²,
    with wᵢ = φᵢ if `weighted` else 1, and θⱼ the trained weights of the upstream stage j.
    """

    features: Tensor  # Z, [n, d]
    labels: Tensor  # y, [n]
    start: Tensor  # [d]
    num_steps: int
    lr: float
    momentum: float = 0.0
    ridge: float = 0.0
    weighted: bool = False
    upstream: Mapping[str, float] = field(default_factory=dict)
    velocity: Tensor | None = None

    def loss(self, model: Any, batch: Tensors, phi: Any, upstream: Mapping[str, Any]) -> Tensor:
        """The same L as an inner loss: the model is a bias-free `nn.Linear`, φ is `phi.values` [n]."""
        error = model(batch["inputs"])[:, 0] - batch["labels"]
        for name, coefficient in self.upstream.items():
            error = error - coefficient * upstream[name](batch["inputs"])[:, 0]
        square = phi.values * error**2 if self.weighted else error**2
        return square.mean() / 2 + self.ridge / 2 * sum((w**2).sum() for w in model.params.values())

    def training(self) -> Training:
        """The same stage for the two other routes."""
        model = nn.Linear(len(self.start), 1, bias=False, dtype=torch.float64)
        model.weight.data.copy_(self.start[None])
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)
        if self.velocity is not None:
            optimizer.state[model.weight]["momentum_buffer"] = self.velocity[None].clone()
        batch = {"inputs": self.features, "labels": self.labels}
        return Training(model, optimizer, self.loss, [batch], self.num_steps)


def _trained_in_closed_form(
    stage: LinearTraining, phi: Tensor, upstream: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """θ_T = [Bᵀ(z₀ − z*)]₁ + θ* and dθ_T/dφ = [Σₖ Bᵀ⁻¹⁻ᵏ S Rₖ]₁ with z = (θ, v), S = (−η I; I).

    B is the constant map of one step, θ* its fixed point, and Rₖ = Zᵀ(diag(residuals at k) − W Z Σⱼ cⱼ dθⱼ/dφ)/n
    the derivative of ∇L at step k with respect to φ, θₖ held.
    """
    features, (rows, size) = stage.features, stage.features.shape
    identity = torch.eye(size, dtype=phi.dtype)
    weight = phi if stage.weighted else torch.ones_like(stage.labels)
    target = stage.labels + sum(c * features @ upstream[name][0] for name, c in stage.upstream.items())
    hessian = features.T * weight @ features / rows + stage.ridge * identity
    fixed_point = torch.linalg.solve(hessian, features.T @ (weight * target) / rows)
    top = torch.cat([identity - stage.lr * hessian, -stage.lr * stage.momentum * identity], dim=1)
    step = torch.cat([top, torch.cat([hessian, stage.momentum * identity], dim=1)])
    inlet = torch.cat([-stage.lr * identity, identity])
    velocity = torch.zeros_like(stage.start) if stage.velocity is None else stage.velocity
    offset = torch.cat([stage.start - fixed_point, velocity])

    jacobian = torch.zeros(2 * size, len(phi), dtype=phi.dtype)
    moved_target = sum(c * features @ upstream[name][1] for name, c in stage.upstream.items())
    through_upstream = (features.T * weight) @ (moved_target + torch.zeros(rows, len(phi), dtype=phi.dtype))
    for k in range(stage.num_steps):
        theta = (torch.linalg.matrix_power(step, k) @ offset)[:size] + fixed_point
        direct = features.T * (features @ theta - target) if stage.weighted else 0.0
        later = torch.linalg.matrix_power(step, stage.num_steps - 1 - k)
        jacobian += later @ inlet @ (direct - through_upstream) / rows
    end = (torch.linalg.matrix_power(step, stage.num_steps) @ offset)[:size] + fixed_point
    return end, jacobian[:size]


def closed_form(stages: Mapping[str, LinearTraining], phi: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Per stage, the trained weights θ_T [d] and their whole derivative dθ_T/dφ [d, len(φ)]."""
    trained: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for name, stage in stages.items():
            trained[name] = _trained_in_closed_form(stage, phi, trained)
    return trained
