"""Adafactor, differentiable: Adam's second moment of a matrix kept as its row and column means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metaopt.base.errors import ConfigError
from metaopt.optimizers.kinds import SUPPORTED, Kind


class Adafactor(Optimizer):
    """`θ' = (1 − λα)θ − α·û/max(1, rms(û)/d)` with `û = g/√v̂` (Shazeer and Stern, 2018, arXiv:1804.04235).

    The formulas, options and state are those of `transformers.Adafactor`; the step may stay in the graph.

    Args:
        params: parameters or groups.
        lr: the rate; None with `relative_step`.
        eps: added to g², and the least scale of a parameter.
        clip_threshold: d.
        decay_rate: the second moment's decay of step t is `1 − t^decay_rate`.
        beta1: of a mean of the updates; None for none.
        weight_decay: λ.
        scale_parameter: `α = lr · max(eps[1], rms(θ))` instead of lr.
        relative_step: `lr = min(1e-2, 1/√t)`.
        warmup_init: `lr = min(1e-6 t, 1/√t)`, of `relative_step`.
        differentiable: keep the step in the graph, as torch's optimizers do.

    Raises:
        ConfigError: a rate with `relative_step`, none without, or `warmup_init` without `relative_step`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        differentiable: bool = False,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        if warmup_init and not relative_step:
            raise ConfigError("Adafactor: warmup_init is an option of relative_step=True")
        super().__init__(params, options)
        for group in self.param_groups:
            _check_rate(group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                _check_rate(group)
                for param in group["params"]:
                    if param.grad is not None:
                        param.copy_(_stepped(param.clone(), param.grad, self.state[param], group))
        return loss


def _check_rate(group: Mapping[str, Any]) -> None:
    if group["relative_step"] == (group["lr"] is not None):
        raise ConfigError(
            f"Adafactor: lr is {group['lr']} with relative_step={group['relative_step']}; with its own relative step "
            "it takes no rate and no schedule, else it needs one: Adafactor(params, lr=1e-3, relative_step=False)"
        )


def _stepped(param: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    step = state.setdefault("step", torch.tensor(0.0))
    step += 1
    age = step.item()
    rate = _rate(param, age, group)
    update = gradient * _inverse_root(gradient.square() + group["eps"][0], 1 - age ** group["decay_rate"], state)
    update = update / (_rms(update) / group["clip_threshold"]).clamp(min=1.0) * rate
    beta1 = group["beta1"]
    if beta1 is not None:
        update = state["exp_avg"] = state.get("exp_avg", torch.zeros_like(update)) * beta1 + update * (1 - beta1)
    return param * (1 - rate * group["weight_decay"]) - update


def _rate(param: Tensor, age: float, group: Mapping[str, Any]) -> Any:
    rate = group["lr"]
    if group["relative_step"]:
        rate = min(1e-6 * age if group["warmup_init"] else 1e-2, 1 / math.sqrt(age))
    return rate * _rms(param).clamp(min=group["eps"][1]) if group["scale_parameter"] else rate


def _rms(tensor: Tensor) -> Tensor:
    return tensor.norm() / math.sqrt(tensor.numel())


def _inverse_root(square: Tensor, decay: float, state: dict[str, Any]) -> Tensor:
    """Move the second moment on by g² + ε, and return its inverse root, of the shape of the gradient."""

    def moved(key: str, value: Tensor) -> Tensor:
        state[key] = state.get(key, torch.zeros_like(value)) * decay + value * (1 - decay)
        return state[key]

    if square.dim() < 2:
        return moved("exp_avg_sq", square).rsqrt()
    row, column = moved("exp_avg_sq_row", square.mean(-1)), moved("exp_avg_sq_col", square.mean(-2))
    # not (row / mean).rsqrt(): the slope of a division by 1e-30 is infinite in float32
    return (row.rsqrt() * row.mean(-1, keepdim=True).sqrt()).unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


SUPPORTED[Adafactor] = Kind(("lr", "weight_decay"), linear_in_rate=False, elementwise=False)
