"""Muon, differentiable: orthogonalised momentum for matrices, AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metaopt.base.errors import ConfigError
from metaopt.optimizers.kinds import SUPPORTED, Kind


class Muon(Optimizer):
    """`B' = μB + g`, `θ' = (1 − ηλ)θ − η·s·NS(g + μB')` for matrices, with NS the Newton–Schulz iteration; AdamW else.

    The formulas and options are those of `torch.optim.Muon` (Jordan et al., 2024), but NS runs in the weights' own
    dtype, where torch's runs in bfloat16 under `no_grad`, and the step may stay in the graph.

    Args:
        params: parameters or groups; one with `use_muon=False` (embeddings, the last layer) is AdamW's altogether.
        lr, weight_decay: η and λ, decoupled; of matrices and of the rest.
        momentum, nesterov: μ, and whether NS sees `g + μB'` or `B'`.
        ns_coefficients, ns_steps, eps: of the Newton–Schulz iteration.
        adjust_lr_fn: s is `original`: √max(1, rows/columns), or `match_rms_adamw`: 0.2·√max(rows, columns).
        use_muon: of matrices.
        adamw_betas, adamw_eps: of the rest.
        differentiable: keep the step in the graph, as torch's optimizers do.

    Raises:
        ConfigError: an unknown `adjust_lr_fn`, or a negative number.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        use_muon: bool = True,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        differentiable: bool = False,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise ConfigError(f"Muon: adjust_lr_fn is {adjust_lr_fn!r}; give 'original' or 'match_rms_adamw'")
        for name in ("lr", "weight_decay", "momentum"):
            if options[name] < 0:
                raise ConfigError(f"Muon: {name} is {options[name]}; give a number of at least 0")
        super().__init__(params, options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        is_matrix = group["use_muon"] and param.dim() == 2
                        update = (_muon if is_matrix else _adamw)(param.grad, self.state[param], group)
                        param.copy_(param * (1 - group["lr"] * group["weight_decay"]) - update * group["lr"])
        return loss


def _muon(gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    momentum = group["momentum"]
    buffer = state.get("momentum_buffer", torch.zeros_like(gradient)) * momentum + gradient
    state["momentum_buffer"] = buffer
    rows, columns = gradient.shape
    by_rms = group["adjust_lr_fn"] == "match_rms_adamw"
    scale = 0.2 * math.sqrt(max(rows, columns)) if by_rms else math.sqrt(max(1, rows / columns))
    return orthogonalised(gradient + buffer * momentum if group["nesterov"] else buffer, group) * scale


def orthogonalised(matrix: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return the Newton–Schulz approximation of UVᵀ, where `matrix` [rows, columns] is USVᵀ."""
    a, b, c = group["ns_coefficients"]
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _adamw(gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    first, second = group["adamw_betas"]
    step = state.setdefault("step", torch.tensor(0.0))
    step += 1
    mean = state["exp_avg"] = state.get("exp_avg", torch.zeros_like(gradient)) * first + gradient * (1 - first)
    square = state.get("exp_avg_sq", torch.zeros_like(gradient)) * second + gradient * gradient * (1 - second)
    state["exp_avg_sq"] = square
    age = step.item()
    root = square.sqrt() / math.sqrt(1 - second**age) + group["adamw_eps"]
    return mean / (1 - first**age) / root


SUPPORTED[Muon] = Kind(("lr", "momentum", "weight_decay"), elementwise=False)
