"""Examples held as tensors, and batches cut out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


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
