"""Examples held as columns, and the streams of batches cut out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, StackDataset

Columns = Mapping[str, Any]  # name → tensor [N, ...], or a sequence of N values
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Rows(Dataset[dict[str, Tensor]]):
    """Tensors [N, ...] by name, of which a DataLoader takes a whole batch at once."""

    def __init__(self, columns: Columns) -> None:
        self.columns = {name: torch.as_tensor(column) for name, column in columns.items()}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int | Tensor) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self[torch.as_tensor(indices)]


def streams(
    columns: Mapping[str, Columns],
    batch_size: int,
    validation_batch_size: int,
    scoring_batch_size: int,
    collate: Collate | None = None,
) -> dict[str, Any]:
    """Return a DataLoader for each stream of a `DataBundle`; `train` and `unlabelled` have each example's `index` [B].

    What is trained on comes in an order that torch's global generator draws anew in each epoch, without a last and
    smaller batch if there are others; `selection` and `test` are whole and always in the same order. Columns that are
    no tensors are made batches of, row by row, by `collate`.
    """
    sizes = {"train": batch_size, "unlabelled": batch_size, "validation": validation_batch_size}
    found = {}
    for name, given in columns.items():
        count = len(next(iter(given.values())))
        whole: dict[str, Any] = {**given, "index": range(count)} if name in ("train", "unlabelled") else {**given}
        rows: Any = StackDataset(**whole) if collate else Rows(whole)
        size, shuffle = sizes.get(name, scoring_batch_size), name in sizes
        last = shuffle and count > size
        found[name] = DataLoader(rows, size, shuffle=shuffle, drop_last=last, collate_fn=collate or dict)
    return found
