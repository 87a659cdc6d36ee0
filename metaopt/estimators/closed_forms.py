"""The steps of torch's SGD, Adam and AdamW pulled back by formula: a few elementwise passes, and no graph.

Nothing is taken on trust: before a formula is used for a block of parameters in a new situation, it is compared with
the derivative of the optimizer's own step, and where the two differ, the block goes on by the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import threshold

from metaopt.optimizers.rule import Block, JointStep
from metaopt.optimizers.step import carries_gradient, per_element

Key = tuple[str, str]
PARAM, GRADIENT = ("param", ""), ("gradient", "")  # state entries are ("state", their key)
Pieces = Mapping[Key, Tensor | None]
State = Mapping[str, Any]
# step, param, gradient, state, cotangents (of the weights under no key, of state by key), elements → cotangents below
Pullback = Callable[[JointStep, Tensor, Tensor, State, Mapping[str, Tensor], slice | None], Pieces]


def sgd(param: Tensor, gradient: Tensor, state: State, above: Mapping[str, Tensor], given: Mapping[str, Any]) -> Pieces:
    """Pull back `b₁ = μ b + (1 − τ) g` (at first `b₁ = g`), `θ₁ = θ − η d` with d = b₁, or g + μ b₁ (Nesterov).

    `∂b₁ += −η ∂θ₁` (times μ), `∂b = μ ∂b₁`, `∂g = (1 − τ) ∂b₁` (− η ∂θ₁). g is ±∂L/∂θ + λ θ, so that
    `∂θ = ∂θ₁ + λ ∂g`.
    """
    found: dict[Key, Tensor] = {}
    momentum, decay, moved, rate = given["momentum"], given["weight_decay"], given["moved"], given["rate"]
    if momentum:
        of_buffer = _plus(above.get("momentum_buffer"), moved, -rate * (momentum if given["nesterov"] else 1.0))
        of_gradient = of_buffer
        if state.get("momentum_buffer") is not None:
            found["state", "momentum_buffer"] = of_buffer * momentum
            of_gradient = of_buffer * (1 - given["dampening"]) if given["dampening"] else of_buffer
        if given["nesterov"]:
            of_gradient = of_gradient.add(moved, alpha=-rate)
    else:
        of_gradient = moved * -rate
    found[PARAM] = above[""].add(of_gradient, alpha=decay) if decay else above[""]
    found[GRADIENT] = -of_gradient if given["maximize"] else of_gradient
    return found


def adam(
    param: Tensor, gradient: Tensor, state: State, above: Mapping[str, Tensor], given: Mapping[str, Any]
) -> Pieces:
    """Pull back `m₁ = β₁ m + (1 − β₁) g`, `v₁ = β₂ v + (1 − β₂) g²`, `θ₁ = θ − c m₁ / D` with D = √v₁ + ε √(1 − β₂ᵗ).

    c is `η √(1 − β₂ᵗ) / (1 − β₁ᵗ)`. `∂m₁ −= c ∂θ₁ / D`; `∂v₁ += c ∂θ₁ m₁ / (2 D² √v₁)`, but 0 at v₁ = 0; then
    `∂g = (1 − β₁) ∂m₁ + 2 (1 − β₂) g ∂v₁`. g is ±∂L/∂θ + λ θ, and `∂θ = ∂θ₁ + λ ∂g`; decoupled (AdamW), λ scales
    `∂θ = (1 − η λ) ∂θ₁` instead.
    """
    (beta1, beta2), decay, moved, rate = given["betas"], given["weight_decay"], given["moved"], given["rate"]
    coupled = decay and not given.get("decoupled_weight_decay")
    t = float(state["step"]) + 1 if state else 1.0
    root_of_correction = (1 - beta2**t) ** 0.5
    scale = rate * root_of_correction / (1 - beta1**t)
    g = -gradient if given["maximize"] else gradient
    g = g.add(param, alpha=decay) if coupled else g
    mean = state["exp_avg"].lerp(g, 1 - beta1) if state else g * (1 - beta1)
    root = ((state["exp_avg_sq"] * beta2).addcmul_(g, g, value=1 - beta2) if state else (g * g).mul_(1 - beta2)).sqrt_()
    denominator = root + given["eps"] * root_of_correction
    ratio = moved / denominator
    slope = mean.mul_(ratio).div_(denominator).div_(threshold(root, 0.0, torch.inf))  # 0 where the root is
    of_mean = _plus(above.get("exp_avg"), ratio, -scale)
    of_square = _plus(above.get("exp_avg_sq"), slope, scale / 2)
    of_gradient = (of_mean * (1 - beta1)).addcmul_(g, of_square, value=2 * (1 - beta2))
    found = {PARAM: above[""], GRADIENT: -of_gradient if given["maximize"] else of_gradient}
    if decay:
        found[PARAM] = above[""].add(of_gradient if coupled else moved, alpha=decay if coupled else -rate * decay)
    if state:
        found["state", "exp_avg"], found["state", "exp_avg_sq"] = of_mean.mul_(beta1), of_square.mul_(beta2)
    return found


def _plus(above: Tensor | None, found: Tensor, scale: float) -> Tensor:
    return found * scale if above is None else torch.add(above, found, alpha=scale)


FORMULAS = {torch.optim.SGD: sgd, torch.optim.Adam: adam, torch.optim.AdamW: adam}
_agreed: WeakKeyDictionary[Block, dict[Any, bool]] = WeakKeyDictionary()  # a block is a stage's own


def closed_form(
    cls: type[torch.optim.Optimizer],
    step: JointStep,
    param: Tensor,
    state: State,
    above: Mapping[str, Tensor],
    generic: Pullback,
) -> Pullback | None:
    """Return a step's pull-back as a formula: for a class that has one, at plain hyperparameters, where it is right."""
    formula, given = FORMULAS.get(cls), step.group.hyperparameters
    if formula is None or "" not in above or given.get("amsgrad") or not param.is_floating_point():
        return None
    if isinstance(param, FakeTensor) and (formula is adam or step.group.rates):  # no count of steps to raise to
        return None

    def pullback(
        step: JointStep, param: Tensor, gradient: Tensor, state: State, above: Mapping[str, Tensor], part: slice | None
    ) -> Pieces:
        rate = step.rate(param, part)
        by_element = isinstance(rate, Tensor)
        scaled = {"moved": above[""] * rate if by_element else above[""], "rate": 1.0 if by_element else rate}
        return formula(param, gradient, state, above, {**given, **scaled})

    which = tuple([(key, value if isinstance(value, bool) else bool(value)) for key, value in given.items()])
    kept = tuple([(key, value is None) for key, value in state.items()])
    situation = (formula, cls.step, kept, tuple(above), which, step.group.rates is None)
    known = _agreed.setdefault(step.block, {})
    if situation not in known:
        known[situation] = _agree(pullback, generic, step, param, state, above)
    return pullback if known[situation] else None


def _agree(
    one: Pullback, other: Pullback, step: JointStep, param: Tensor, state: State, above: Mapping[str, Tensor]
) -> bool:
    """Whether two pull-backs give the same, but for rounding in float64, at a few random numbers and a dead unit."""
    size = min(8, param.numel())
    source = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(
            size, generator=source, dtype=torch.float64
        )  # on the CPU, so that no accelerator is waited for

    gradient, drawn = draw(), {key: draw() if per_element(key, value) else value for key, value in state.items()}
    drawn = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in drawn.items()}
    for tensor in (gradient, *(value for key, value in drawn.items() if carries_gradient(key, value))):
        tensor[-1:] = 0.0
    drawn |= {key: value.square() for key, value in drawn.items() if key == "exp_avg_sq"}
    at = (step, draw(), gradient, drawn, {key: draw() for key in above}, slice(0, size))
    found, expected = ({k: v for k, v in pull(*at).items() if v is not None} for pull in (one, other))
    # beside what cancels: Adam's first step is nearly ±η, whatever the gradient
    allowed = {key: 1e-10 * value.abs() + 1e-12 * at[4][""].abs() for key, value in expected.items()}
    alike = [bool(((found[k] - v).abs() <= allowed[k]).all()) for k, v in expected.items() if k in found]
    return found.keys() == expected.keys() and all(alike)
