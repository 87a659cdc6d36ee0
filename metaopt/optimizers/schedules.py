"""Learning-rate schedules as functions of the inner step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metaopt.base.errors import ConfigError
from metaopt.optimizers.step import shallow


class Schedule:
    """A learning-rate schedule as a function of the step: any `torch.optim.lr_scheduler` without a metric.

    Whatever the scheduler moves is followed: `lr`, and what OneCycleLR and CyclicLR do to `momentum` or `betas`.

    Args:
        factory: optimizer → scheduler, for example `functools.partial(StepLR, step_size=10)`.
        optimizer: the user's optimizer, whose groups at this moment are the schedule's start.
    """

    def __init__(self, factory: Callable[[Optimizer], Any], optimizer: Optimizer) -> None:
        _require_factory(factory)
        groups = [{**group, "params": [torch.zeros(1)]} for group in copy.copy(optimizer.param_groups)]
        self._before = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self._shadow = shallow(optimizer, groups)
        self._scheduler = factory(self._shadow)
        if isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError(
                "schedule: ReduceLROnPlateau needs a metric; use a schedule that depends on the step only"
            )
        if not hasattr(self._scheduler, "step"):
            raise ConfigError(
                f"schedule: the factory returned a {type(self._scheduler).__name__}; give a callable that makes a "
                "scheduler from an optimizer: functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10)"
            )
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


def _require_factory(given: Any) -> None:
    if isinstance(given, LRScheduler):
        settings = [n for n in inspect.signature(type(given)).parameters if n in vars(given)]
        shown = [f"{n}={vars(given)[n]!r}" for n in settings if n not in ("optimizer", "last_epoch")] or ["..."]
        raise ConfigError(
            f"schedule: a {type(given).__name__} over an optimizer of its own was given; give what makes one for the "
            f"stage's: schedule=functools.partial({type(given).__name__}, {', '.join(shown)})"
        )
    if not callable(given):
        raise ConfigError(
            f"schedule: a {type(given).__name__} was given; give what makes a scheduler from an optimizer: "
            "schedule=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10)"
        )
