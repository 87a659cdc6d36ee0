"""Rows of tokens of unlike lengths, and the collator that makes a batch of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metaopt.losses.logits import IGNORED

Row = Mapping[str, Any]


class Rows(Dataset[dict[str, Any]]):
    """A data set of equally long named columns.

    Args:
        columns: `inputs` (tokens), and what there is of `answers` (tokens), `num_prompt`, `labels`, `index`, `source`.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(self.columns["inputs"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows: fills up to the longest, marks the filler, and shifts what is predicted.

    - `answers` become `labels`, and `decoder_input_ids`: the same behind `start`, without their last token.
    - With `causal`, the inputs are a whole text, and `labels` are its tokens, which a causal model's loss shifts. The
      first `num_prompt` tokens (the begin token at least) are given and not predicted.
    - `labels`, `index` and `source` are taken as they are.

    Args:
        pad: the filler token. Filled positions count in no loss (`attention_mask` 0, label −100).
        start: the token with which a decoder begins; None for models without one.
        causal: the inputs are texts to be continued.
    """

    pad: int
    start: int | None = None
    causal: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        tokens = [row["inputs"] for row in rows]
        batch = {name: torch.tensor([row[name] for row in rows]) for name in ("index", "source") if name in rows[0]}
        if self.causal:
            given = [row.get("num_prompt", 1) for row in rows]
            predicted = [[IGNORED] * n + list(text[n:]) for text, n in zip(tokens, given, strict=True)]
            batch["labels"] = filled(predicted, IGNORED)
        batch["input_ids"] = filled(tokens, self.pad)
        batch["attention_mask"] = filled([[1] * len(text) for text in tokens], 0)
        if "answers" in rows[0]:
            answers = [row["answers"] for row in rows]
            batch["labels"] = filled(answers, IGNORED)
            batch["decoder_input_ids"] = filled([[self.start, *answer[:-1]] for answer in answers], self.pad)
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def filled(rows: Sequence[Sequence[int | None]], filler: int) -> Tensor:
    """Return rows of numbers as one tensor [B, longest], filled up at the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def loader(
    columns: Mapping[str, Sequence[Any]], collator: Collator, batch_size: int, shuffle: bool
) -> DataLoader[dict[str, Tensor]]:
    """Return batches, in an order that torch's global generator draws anew in each epoch or always in the same one.

    Shuffled, a last and smaller batch is left out when there are others.
    """
    rows = Rows(columns)
    last = shuffle and len(rows) > batch_size
    return DataLoader(rows, batch_size, shuffle=shuffle, drop_last=last, collate_fn=collator)  # type: ignore[arg-type]
