"""Examples held as columns, and the streams of batches cut out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

Columns = Mapping[str, Any]  # name → tensor [N, ...], or a list of N values
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Rows(Dataset[dict[str, Any]]):
    """A data set of equally long named columns; a DataLoader asks it for a batch of rows at once.

    Args:
        columns: tensors, or lists that `collate` makes batches of, row by row.
    """

    def __init__(self, columns: Columns, collate: Collate | None = None) -> None:
        self.columns, self.collate = dict(columns), collate

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        if self.collate is not None:
            return self.collate([self[index] for index in indices])
        return self[torch.as_tensor(indices)]  # type: ignore[index]


def streams(
    columns: Mapping[str, Columns],
    batch_size: int,
    validation_batch_size: int,
    scoring_batch_size: int,
    collate: Collate | None = None,
) -> dict[str, Any]:
    """Return a DataLoader for each stream of a `DataBundle`; `train` and `unlabelled` have each example's `index` [B].

    What is trained on comes in an order that torch's global generator draws anew in each epoch, without a last and
    smaller batch if there are others; `selection` and `test` are whole and always in the same order.
    """
    sizes = {"train": batch_size, "unlabelled": batch_size, "validation": validation_batch_size}
    found = {}
    for name, given in columns.items():
        rows = Rows(given, collate)
        if name in ("train", "unlabelled"):
            rows.columns["index"] = range(len(rows)) if collate else torch.arange(len(rows))
        size, shuffle = sizes.get(name, scoring_batch_size), name in sizes
        last = shuffle and len(rows) > size
        found[name] = DataLoader(rows, size, shuffle=shuffle, drop_last=last, collate_fn=_as_it_is)
    return found


def _as_it_is(batch: Any) -> Any:
    return batch
