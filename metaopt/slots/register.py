"""Optimizers of a user's own, proven when a stage is built."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from metaopt.base.errors import ConfigError
from metaopt.optimizers import kinds
from metaopt.optimizers.kinds import COUNTERS, SUPPORTED, Kind, StepFunction
from metaopt.slots.probe import probe


def register_optimizer(
    cls: type[Optimizer],
    step: StepFunction | None = None,
    *,
    learnable: tuple[str, ...] = (),
    elementwise: bool = False,
    counters: tuple[str, ...] = ("step",),
) -> None:
    """Let stages train with an optimizer of your own.

    Without `step`, the class's own `step()` runs on copies in the graph, its `no_grad` and `.data` overruled unless it
    has an option `differentiable`, as torch's have. With `step`, that function is the update: `step(param, gradient,
    state, group) -> (param, state)`, all in the graph, nothing in place. Building a stage takes eight steps in float64
    and compares them with the class's own `step()`, and their derivatives with central differences.

    Args:
        cls: your class.
        step: the update as a function.
        learnable: hyperparameters that may be learned.
        elementwise: the step treats every element alike, so that it may be taken on concatenated parameters, which is
            quicker; if not, each parameter is stepped by itself.
        counters: state that is 0-dim and the same for all parameters of one age.

    Raises:
        ConfigError: not a class of optimizers, or one of torch's own.
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ConfigError(f"register_optimizer: {cls!r} is not a subclass of torch.optim.Optimizer")
    if cls in SUPPORTED:
        raise ConfigError(f"register_optimizer: {cls.__name__} is supported as it is; to change it, subclass it")
    if getattr(torch.optim, cls.__name__, None) is cls:
        raise ConfigError(f"register_optimizer: {cls.__name__} is torch's own; subclass it under a name of your own")
    COUNTERS.update(counters)
    kinds.registered[cls] = Kind(
        tuple(learnable), linear_in_rate=False, elementwise=elementwise, step=step, proof=probe
    )
