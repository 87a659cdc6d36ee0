"""Hand-overs: how a trained model's output becomes the next stage's data."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.data.decoding import greedy_decode
from metaopt.errors import ConfigError
from metaopt.functional import FunctionalModel
from metaopt.losses import IGNORED, find_upstream

_TOGETHER = 16  # batches that are decoded in one go

Upstream = Mapping[str, FunctionalModel]


class HandOver(ABC):
    """Writes a stage's data set with the upstream models, once per unroll and without a graph.

    Give it to a stage in place of its batches. What must carry gradient is computed in the stage's loss.

    Args:
        batches: what it starts from: a sequence or re-iterable; the stage keeps its position.
    """

    reads: tuple[str, ...] = ()

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    @abstractmethod
    def write(self, upstream: Upstream, batches: Sequence[Any]) -> Sequence[Any]:
        """Return one batch for each of these, written by the upstream models."""


class Decoded(HandOver):
    """The trained teacher answers each input by greedy decoding; its answer is the student's sequence.

    Decoding is discrete and carries no gradient; `Distillation` then takes the teacher's soft labels along the decoded
    sequence, in the graph. Each batch gains `decoder_input_ids` and `labels` [B, max_length]; what follows the end
    token is not counted.

    Args:
        batches: of inputs for an encoder-decoder: `input_ids`, `attention_mask`.
        bos_token_id, eos_token_id, pad_token_id: the tokens that begin, end and fill an answer.
        max_length: tokens of an answer, the end token included.
        upstream: the teacher's stage; None for the stage just before.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        bos_token_id: int,
        eos_token_id: int,
        pad_token_id: int,
        max_length: int,
        upstream: str | None = None,
    ) -> None:
        super().__init__(batches)
        if max_length < 1:
            raise ConfigError(f"Decoded: max_length={max_length} must be at least 1")
        self.tokens = {"bos": bos_token_id, "eos": eos_token_id, "pad": pad_token_id}
        self.max_length = max_length
        self.upstream = upstream
        self.reads = (upstream,) if upstream else ()

    def write(self, upstream: Upstream, batches: Sequence[Any]) -> Sequence[Any]:
        """Decode all batches, a few of one shape together."""
        teacher = find_upstream(upstream, self.upstream, "Decoded")
        written = []
        for _, alike in itertools.groupby(batches, key=lambda batch: batch["input_ids"].shape[1:]):
            rest = list(alike)
            while rest:
                few, rest = rest[:_TOGETHER], rest[_TOGETHER:]
                joined = {key: torch.cat([batch[key] for batch in few]) for key in ("input_ids", "attention_mask")}
                answers = self._decode(teacher, joined).split([len(batch["input_ids"]) for batch in few])
                written += [self._with_answers(batch, answer) for batch, answer in zip(few, answers, strict=True)]
        return written

    def _decode(self, teacher: FunctionalModel, batch: Mapping[str, Tensor]) -> Tensor:
        with teacher.as_module() as module:
            device = next(module.parameters()).device
            inputs = (batch["input_ids"].to(device), batch["attention_mask"].to(device))
            return greedy_decode(module, *inputs, **self.tokens, max_length=self.max_length)

    def _with_answers(self, batch: Mapping[str, Tensor], answers: Tensor) -> dict[str, Tensor]:
        first = torch.full_like(answers[:, :1], self.tokens["bos"])
        ended = (answers == self.tokens["eos"]).int().cumsum(1) - (answers == self.tokens["eos"]).int() > 0
        return {
            **batch,
            "decoder_input_ids": torch.cat([first, answers[:, :-1]], dim=1),
            "labels": answers.masked_fill(ended, IGNORED),
        }
