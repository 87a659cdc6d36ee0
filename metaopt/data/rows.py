"""Examples held as tensors, and batches cut out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metaopt.errors import ConfigError


class TensorRows(Dataset[dict[str, Tensor]]):
    """A data set of equally long named tensors; a DataLoader asks for a batch of rows at once.

    Args:
        columns: name → tensor [N, ...].
    """

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(indices)
        return {name: column[rows] for name, column in self.columns.items()}


def shuffled(columns: Mapping[str, Tensor], batch_size: int) -> DataLoader[dict[str, Tensor]]:
    """Return batches in an order that torch's global generator draws anew in each epoch; a last, smaller one is left
    out when there are others."""
    rows = TensorRows(columns)
    return DataLoader(rows, batch_size, shuffle=True, drop_last=len(rows) > batch_size, collate_fn=_as_it_is)


def in_order(columns: Mapping[str, Tensor], batch_size: int) -> DataLoader[dict[str, Tensor]]:
    """Return all rows in batches, always in the same order."""
    return DataLoader(TensorRows(columns), batch_size, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


def check_counts(where: str, **counts: Any) -> None:
    """Raise for a count that is not a whole number of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{where}: {name}={value!r} must be a whole number of at least 1")


def check_fraction(where: str, **fractions: Any) -> None:
    """Raise for a fraction that does not lie between 0 and 1."""
    for name, value in fractions.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"{where}: {name}={value!r} must be a fraction between 0 and 1")
