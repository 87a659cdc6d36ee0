"""Learning-rate schedules as functions of the inner step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metaopt.base.errors import ConfigError
from metaopt.optimizers.step import number, shallow

_EXAMPLE = "torch.optim.lr_scheduler.StepLR, step_size=10"


class Schedule:
    """A learning-rate schedule as a function of the step: any `torch.optim.lr_scheduler` without a metric.

    Whatever the scheduler moves is followed: `lr`, and what OneCycleLR and CyclicLR do to `momentum` or `betas`.

    Args:
        factory: optimizer → scheduler, for example `functools.partial(StepLR, step_size=10)`.
        optimizer: the user's optimizer, whose groups at this moment are the schedule's start.
    """

    def __init__(self, factory: Callable[[Optimizer], Any], optimizer: Optimizer) -> None:
        hint = "give what makes one for the stage's optimizer: schedule=functools.partial("
        if isinstance(factory, LRScheduler) or not callable(factory):
            cls = type(factory).__name__
            example = f"{cls}, ..." if isinstance(factory, LRScheduler) else _EXAMPLE
            raise ConfigError(f"schedule: a {cls} was given; {hint}{example})")
        groups = [{**group, "params": [torch.zeros(1)]} for group in optimizer.param_groups]
        self._before = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self._shadow = shallow(optimizer, groups)
        self._scheduler = factory(self._shadow)
        if isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError("schedule: ReduceLROnPlateau needs a metric; use one that depends on the step only")
        if not hasattr(self._scheduler, "step"):
            made = type(self._scheduler).__name__
            raise ConfigError(f"schedule: the factory returned a {made} and no scheduler; {hint}{_EXAMPLE})")
        self._moved = {"lr"}
        self._values = [self._read()]

    def _read(self) -> dict[str, list[Any]]:
        groups = self._shadow.param_groups
        for group, before in zip(groups, self._before, strict=True):
            self._moved |= {key for key, value in before.items() if group[key] != value}
        return {key: [group[key] for group in groups] for key in sorted(self._moved)}

    def at(self, step: int) -> dict[str, list[Any]]:
        """Return the hyperparameters of the given step as overrides, one value per group."""
        while len(self._values) <= step:
            self._shadow.__dict__["_opt_called"] = True  # else torch warns; a step could write into the groups
            try:
                self._scheduler.step()
            except ValueError as error:  # OneCycleLR after its last step
                raise ConfigError(
                    f"schedule: {type(self._scheduler).__name__} at step {len(self._values)}: {error}"
                ) from error
            self._values.append(self._read())
        return self._values[step]

    def set(self, optimizer: Optimizer, step: int) -> None:
        """Give the groups of the user's own optimizer the hyperparameters of the given step."""
        for key, values in self.at(step).items():
            for group, value in zip(optimizer.param_groups, values, strict=True):
                group[key] = number(value)
