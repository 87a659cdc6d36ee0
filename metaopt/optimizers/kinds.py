"""Which inner optimizers can be differentiated, what of them can be learned, and why the others are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metaopt.base.errors import ConfigError, StageError

# (param, gradient, its state, the group's hyperparameters) → (param, state), in the graph of all of them
StepFunction = Callable[[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any]], tuple[Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class Kind:
    """What is known of a class of optimizers."""

    learnable: tuple[str, ...] = ()  # hyperparameters that may be tensors in the graph
    linear_in_rate: bool = True  # `lr` scales the whole step and nothing else, so that a learned one enters as that
    elementwise: bool = True  # the step treats every element alike, so that it may be taken on joined parameters
    step: StepFunction | None = None  # the step as a function; None for the class's own `step()`
    # → keys that a step writes into its group; it raises where the step cannot be right; None if our tests prove it
    proof: Callable[[Optimizer, Kind], tuple[str, ...]] | None = None
    reasons: Mapping[str, str] | None = None  # hyperparameter → why it cannot be learned


_OF_ASGD = "it enters ASGD's own decaying rate, which torch keeps as a number outside the graph"
_ADAM = Kind(("lr", "betas", "eps", "weight_decay"))
SUPPORTED: dict[type[Optimizer], Kind] = {
    torch.optim.SGD: Kind(("lr", "momentum", "dampening", "weight_decay")),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: Kind(("lr", "betas", "eps", "weight_decay", "momentum_decay")),
    torch.optim.RAdam: _ADAM,
    torch.optim.Adamax: _ADAM,
    torch.optim.Adagrad: Kind(("lr", "lr_decay", "eps", "weight_decay")),
    torch.optim.Adadelta: Kind(("lr", "rho", "eps", "weight_decay")),
    torch.optim.RMSprop: Kind(("lr", "alpha", "eps", "weight_decay", "momentum")),
    torch.optim.ASGD: Kind(
        ("weight_decay",), linear_in_rate=False, reasons=dict.fromkeys(("lr", "lambd", "alpha", "t0"), _OF_ASGD)
    ),
}
REFUSED = {
    "Rprop": "it follows the sign of the gradient only, so the derivative of its step is zero almost everywhere",
    "Adafactor": "torch reads norms out of the graph by .item(); metaopt.Adafactor is differentiable",
    "Muon": "torch orthogonalises in bfloat16 under no_grad; metaopt.Muon does it in the weights' own dtype",
    "LBFGS": "it evaluates the loss several times per step, in a line search under no_grad",
    "SparseAdam": "it takes sparse gradients, which torch cannot differentiate again",
}
registered: dict[type[Optimizer], Kind] = {}


def kind_of(optimizer: Optimizer) -> Kind:
    """Return what is known of an optimizer's class.

    Raises:
        ConfigError: not an optimizer, or one that cannot be differentiated.
        StageError: one with step hooks, which the differentiable step would not run.
    """
    cls, name = type(optimizer), type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"the optimizer is a {name}; give a torch.optim.Optimizer over the stage's model, or a callable that makes "
            "one from parameters: functools.partial(torch.optim.Adam, lr=1e-3)"
        )
    kind, names = SUPPORTED.get(cls) or registered.get(cls), ", ".join(known.__name__ for known in SUPPORTED)
    if kind is None and getattr(torch.optim, name, None) is cls:
        reason = REFUSED.get(name, "its hypergradient is not proven")
        use = f"use one of {names}, say functools.partial(torch.optim.AdamW, lr=1e-3)"
        raise ConfigError(f"{name} cannot train a stage: {reason}; {use}")
    if kind is None:
        ours = f"take metaopt.{name}, or " if name in ("Muon", "Adafactor") else ""
        raise ConfigError(
            f"{name} is not among the inner optimizers whose hypergradient is proven ({names}); {ours}write "
            f"metaopt.register_optimizer({name}), which tries it out, or give its update as a function, step=..."
        )
    hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    if hooks:
        raise StageError(
            f"{name} has {hooks} step hook(s), which the differentiable step would not run; remove them, and give what "
            "changes gradients as Stage(..., transform=...)"
        )
    for key, value in ((key, value) for group in optimizer.param_groups for key, value in group.items()):
        values = value if isinstance(value, (list, tuple)) else [value]
        if key != "params" and any(isinstance(v, Tensor) and v.requires_grad for v in values):
            raise ConfigError(
                f"{name} was given a {key!r} that requires grad, and nothing would reach it; learn it by "
                f"metaopt.LearnedHyperparameters({key}=...) and Stage(..., overrides=metaopt.FromMeta())"
            )
    return kind


def make_optimizer(optimizer: Any, model: nn.Module) -> Optimizer:
    """Return the user's optimizer, or the one that a factory makes over the parameters that require grad."""
    factory: Any = optimizer
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        return factory  # what it is, is asked where it is used
    trained = NamedParameters({n: p for n, p in model.named_parameters() if p.requires_grad})
    if not trained:
        raise ConfigError("Stage: every parameter of the model is frozen; set requires_grad_(True) on what to train")
    built: Optimizer = factory(trained)
    return built


class NamedParameters(list):
    """A plain list of parameters that knows their names: what a stage hands an optimizer's factory."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        super().__init__(named.values())
        self.names = list(named)
