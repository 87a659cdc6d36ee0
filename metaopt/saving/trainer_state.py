"""What a checkpoint of the outer loop has beside tensors: what it is made of, whose state it is, random state."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from metaopt.core.meta_params import named_tensors


def made_of(trainer: Any) -> dict[str, str]:
    """Return what a checkpoint must have in common with the training that takes it up: classes, shapes and dtypes."""
    made = {"objective": _kind(trainer.objective), "meta_optimizer": _kind(trainer.meta_optimizer)}
    tensors = {f"meta_params.{name}": tensor for name, tensor in named_tensors(trainer.meta_params).items()}
    for name, stage in trainer.chain.stages.items():
        made |= {f"{name}.loss": _kind(stage.loss), f"{name}.optimizer": _kind(stage.optimizer)}
        tensors |= {f"{name}.model.{n}": p for n, p in stage.model.named_parameters()}
    return made | {key: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for key, t in tensors.items()}


def parts_with_state(trainer: Any) -> Iterator[tuple[str, Any]]:
    """Yield what was given beside models and optimizers and has a state: losses, transforms, hand-overs, objectives."""
    slots = [("objective", trainer.objective)]
    for name, stage in trainer.chain.stages.items():
        slots += [(f"{name}.{slot}", getattr(stage, slot)) for slot in _SLOTS]
    for name, part in slots:
        if callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None)):
            yield name, part


_SLOTS = ("loss", "transform", "overrides", "initial", "batches")


def without(state: Mapping[str, Any], optimizers: Iterable[str]) -> dict[str, Any]:
    """Return a trainer's state without that of the optimizers of these names, as `made_of` has them."""
    found = {**state, "chain": {name: dict(stage) for name, stage in state["chain"].items()}}
    for key in optimizers:
        stage, _, which = key.rpartition(".")
        (found["chain"][stage] if stage else found).pop(which, None)
    return found


def random_state() -> dict[str, Any]:
    """Return the state of the global generators of torch, numpy and random."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the global generators where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _kind(part: Any) -> str:
    return part.__qualname__ if hasattr(part, "__qualname__") else type(part).__name__
