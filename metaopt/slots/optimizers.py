"""Muon and Adafactor, differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metaopt.base.errors import ConfigError
from metaopt.optimizers.kinds import SUPPORTED, Kind

Group = Mapping[str, Any]


class _InGraph(Optimizer):
    """`θ ← _stepped(θ, g, state, group)` of each parameter, in the graph with the option `differentiable`."""

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        super().__init__(params, {k: v for k, v in options.items() if k not in ("self", "params", "__class__")})

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
                        param.copy_(self._stepped(param.clone(), param.grad, self.state[param], group))
        return loss

    def _stepped(self, param: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> Tensor:
        raise NotImplementedError


def _averaged(state: dict[str, Any], key: str, value: Tensor, decay: float) -> Tensor:
    """Move a decaying average in the state on, and return it."""
    state[key] = state.get(key, torch.zeros_like(value)) * decay + value * (1 - decay)
    return state[key]


def _age(state: dict[str, Any]) -> float:
    step = state.setdefault("step", torch.tensor(0.0))
    step += 1
    return step.item()


class Muon(_InGraph):
    """`B' = μB + g`, `θ' = (1 − ηλ)θ − η·s·NS(g + μB')` for matrices, with NS the Newton–Schulz iteration; AdamW else.

    The formulas and options are those of `torch.optim.Muon` (Jordan et al., 2024), but NS runs in the weights' own
    dtype, where torch's runs in bfloat16 under `no_grad`, and `differentiable` keeps the step in the graph.

    η and λ are `lr` and `weight_decay`, μ `momentum`; without `nesterov`, NS sees B'. `adjust_lr_fn` makes s
    √max(1, rows/columns) (`original`) or 0.2·√max(rows, columns) (`match_rms_adamw`). A group with `use_muon=False`
    (embeddings, the last layer) is AdamW's altogether; `adamw_betas` and `adamw_eps` are AdamW's.

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
        super().__init__(params, locals())
        if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise ConfigError(f"Muon: adjust_lr_fn is {adjust_lr_fn!r}; give 'original' or 'match_rms_adamw'")
        for name in ("lr", "weight_decay", "momentum"):
            if self.defaults[name] < 0:
                raise ConfigError(f"Muon: {name} is {self.defaults[name]}; give a number of at least 0")

    def _stepped(self, param: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> Tensor:
        update = (_muon if group["use_muon"] and param.dim() == 2 else _adamw)(gradient, state, group)
        return param * (1 - group["lr"] * group["weight_decay"]) - update * group["lr"]


def _muon(gradient: Tensor, state: dict[str, Any], group: Group) -> Tensor:
    momentum, (rows, columns) = group["momentum"], gradient.shape
    state["momentum_buffer"] = buffer = state.get("momentum_buffer", torch.zeros_like(gradient)) * momentum + gradient
    by_rms = group["adjust_lr_fn"] == "match_rms_adamw"
    scale = 0.2 * math.sqrt(max(rows, columns)) if by_rms else math.sqrt(max(1, rows / columns))
    return _orthogonalised(gradient + buffer * momentum if group["nesterov"] else buffer, group) * scale


def _orthogonalised(matrix: Tensor, group: Group) -> Tensor:
    """Return the Newton–Schulz approximation of UVᵀ, where `matrix` [rows, columns] is USVᵀ."""
    a, b, c = group["ns_coefficients"]
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _adamw(gradient: Tensor, state: dict[str, Any], group: Group) -> Tensor:
    first, second = group["adamw_betas"]
    age = _age(state)
    mean = _averaged(state, "exp_avg", gradient, first)
    square = _averaged(state, "exp_avg_sq", gradient * gradient, second)
    root = square.sqrt() / math.sqrt(1 - second**age) + group["adamw_eps"]
    return mean / (1 - first**age) / root


class Adafactor(_InGraph):
    """`θ' = (1 − λα)θ − α·û/max(1, rms(û)/d)` with `û = g/√v̂` (Shazeer and Stern, 2018, arXiv:1804.04235).

    Of a matrix's second moment v̂ it keeps the row and column means. The formulas, options and state are those of
    `transformers.Adafactor`; `differentiable` keeps the step in the graph.

    `clip_threshold` is d, and v̂ decays by `1 − t^decay_rate`. α is `lr`, `min(1e-2, 1/√t)` with `relative_step`,
    `min(1e-6 t, 1/√t)` with `warmup_init`, too; `scale_parameter` multiplies it by `max(eps[1], rms(θ))`. `eps[0]` is
    added to g²; `beta1` averages the updates.

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
        super().__init__(params, locals())
        if warmup_init and not relative_step:
            raise ConfigError("Adafactor: warmup_init is an option of relative_step=True")
        for group in self.param_groups:
            _check_rate(group)

    def _stepped(self, param: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> Tensor:
        _check_rate(group)
        age = _age(state)
        rate = group["lr"]
        if group["relative_step"]:
            rate = min(1e-6 * age if group["warmup_init"] else 1e-2, 1 / math.sqrt(age))
        if group["scale_parameter"]:
            rate = rate * _rms(param).clamp(min=group["eps"][1])
        update = gradient * _inverse_root(gradient.square() + group["eps"][0], 1 - age ** group["decay_rate"], state)
        update = update / (_rms(update) / group["clip_threshold"]).clamp(min=1.0) * rate
        if group["beta1"] is not None:
            update = _averaged(state, "exp_avg", update, group["beta1"])
        return param * (1 - rate * group["weight_decay"]) - update


def _check_rate(group: Group) -> None:
    if group["relative_step"] == (group["lr"] is not None):
        raise ConfigError(
            f"Adafactor: lr is {group['lr']} with relative_step={group['relative_step']}; with its own relative step "
            "it takes no rate and no schedule, else it needs one: Adafactor(params, lr=1e-3, relative_step=False)"
        )


def _rms(tensor: Tensor) -> Tensor:
    return tensor.norm() / math.sqrt(tensor.numel())


def _inverse_root(square: Tensor, decay: float, state: dict[str, Any]) -> Tensor:
    """Move the second moment on by g² + ε, and return its inverse root, of the shape of the gradient."""
    if square.dim() < 2:
        return _averaged(state, "exp_avg_sq", square, decay).rsqrt()
    row = _averaged(state, "exp_avg_sq_row", square.mean(-1), decay)
    column = _averaged(state, "exp_avg_sq_col", square.mean(-2), decay)
    # not (row / mean).rsqrt(): the slope of a division by 1e-30 is infinite in float32
    return (row.rsqrt() * row.mean(-1, keepdim=True).sqrt()).unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


SUPPORTED[Muon] = Kind(("lr", "momentum", "weight_decay"), elementwise=False)
SUPPORTED[Adafactor] = Kind(("lr", "weight_decay"), linear_in_rate=False, elementwise=False)
