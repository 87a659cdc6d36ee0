"""Whether batches can be used: not empty, finite, their numbers within range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError
from metaopt.losses.logits import IGNORED


def problem_with(batch: Any, sizes: Mapping[str, int | None] | None = None) -> str:
    """Say what is wrong with a batch, or return an empty string.

    Args:
        sizes: entry → how many values it may take, from 0 (`labels`: −100, too); of `inputs` [B, F] the width F.
    """
    for name, value in batch.items() if isinstance(batch, Mapping) else enumerate(batch) if _is_list(batch) else ():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.dim() == 0:
            continue
        if len(value) == 0:
            return f"{name!r} has no example"
        size = (sizes or {}).get(str(name))
        if value.is_floating_point():
            rows = (~value.isfinite()).nonzero()[:1].tolist()
            if rows:
                return f"{name!r} holds {value[tuple(rows[0])].item()}, first in row {rows[0][0]}"
            if name == "inputs" and size is not None and value.dim() == 2 and value.shape[1] != size:
                return f"{name!r} is {list(value.shape)}, and the models take {size} features"
        elif size is not None and name != "inputs":
            counts = value[value != IGNORED] if name == "labels" else value
            if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) < size:
                return f"{name!r} runs from {int(counts.min())} to {int(counts.max())}, and must lie in 0 to {size - 1}"
    return ""


def checked(stream: str, batches: Iterable[Any], sizes: Mapping[str, int | None] | None = None) -> Iterator[Any]:
    """Yield the batches of a stream.

    Raises:
        ConfigError: one cannot be used, or there is none.
    """
    number = -1
    for number, batch in enumerate(batches):
        if problem := problem_with(batch, sizes):
            raise ConfigError(f"data: {stream}, batch {number}: {problem}")
        yield batch
    if number < 0:
        raise ConfigError(f"data: {stream} has not a single batch; check the data set and drop_last")


def _is_list(batch: Any) -> bool:
    return isinstance(batch, (list, tuple))
