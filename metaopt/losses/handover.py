"""Hand-overs: how a trained model's output becomes the next stage's data."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.base.errors import StageError
from metaopt.base.ranges import check_counts
from metaopt.core.contracts import HandOver, Upstream
from metaopt.core.view import FunctionalModel
from metaopt.losses.decoding import greedy_decode
from metaopt.losses.distillation import find_upstream
from metaopt.losses.logits import IGNORED, is_encoder_decoder, model_inputs

_TOGETHER = 16  # batches that are decoded in one go


class Answered(HandOver):
    """Base of the hand-overs in which the trained teacher answers each input, and its answer is the student's sequence.

    Writing is discrete and carries no gradient; `Distillation` (or another loss that reads `upstream`) then takes what
    the teacher says along the written sequence, in the graph. `upstream` is the teacher's stage, None for the one just
    before.
    """

    def __init__(self, batches: Iterable[Any], upstream: str | None = None) -> None:
        super().__init__(batches)
        self.upstream = upstream
        self.reads = (upstream,) if upstream else ()

    @abstractmethod
    def answer(self, module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a few batches together gain: `decoder_input_ids` and `labels`, say, one row per input.

        `module` is the teacher's own, with the trained weights and in eval mode.
        """

    def write(self, upstream: Upstream, batches: Sequence[Any]) -> Sequence[Any]:
        """Let the teacher answer all batches, a few of one shape together."""
        teacher = find_upstream(upstream, self.upstream, type(self).__name__)

        def shapes(batch: Any) -> dict[str, Any]:
            return {key: value.shape[1:] for key, value in _inputs(batch, teacher).items()}

        written = []
        for _, run in itertools.groupby(batches, key=shapes):
            alike = list(run)
            for start in range(0, len(alike), _TOGETHER):
                written += self._answered(teacher, alike[start : start + _TOGETHER])
        return written

    def _answered(self, teacher: FunctionalModel, few: Sequence[Any]) -> list[dict[str, Any]]:
        """Return a few batches of one shape with the teacher's answers to them."""
        inputs = [_inputs(batch, teacher) for batch in few]
        with teacher.as_module() as module:
            device = next(module.parameters()).device
            joined = {key: torch.cat([one[key] for one in inputs]).to(device) for key in inputs[0]}
            answers = self.answer(module, joined)
        sizes = [len(next(iter(one.values()))) for one in inputs]
        parts = {key: value.split(sizes) for key, value in answers.items()}
        return [{**batch, **{key: part[i] for key, part in parts.items()}} for i, batch in enumerate(few)]


def _inputs(batch: Mapping[str, Tensor], teacher: FunctionalModel) -> dict[str, Tensor]:
    unanswered = {key: value for key, value in batch.items() if key != "labels" and not key.startswith("decoder_")}
    return model_inputs(unanswered, teacher)


def until_end(answers: Tensor, ends: Sequence[int]) -> Tensor:
    """Return labels: the answers [B, L], what follows the first end token marked as not to be counted."""
    ended = torch.isin(answers, torch.tensor(ends, dtype=answers.dtype, device=answers.device)).int()
    return answers.masked_fill(ended.cumsum(1) - ended > 0, IGNORED)


class Decoded(Answered):
    """The trained teacher answers each input by greedy decoding; its answer is the student's sequence.

    Each batch, of `input_ids` and `attention_mask`, gains `decoder_input_ids` and `labels` [B, max_length], the end
    token included; what follows it is not counted. It needs no `generate`: anything that is called
    `model(input_ids=, attention_mask=, decoder_input_ids=)` will do.
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
        super().__init__(batches, upstream)
        check_counts("Decoded", max_length=max_length)
        self.tokens = {"bos": bos_token_id, "eos": eos_token_id, "pad": pad_token_id}
        self.max_length = max_length

    def answer(self, module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        read = inputs["input_ids"], inputs["attention_mask"]
        answers = greedy_decode(module, *read, **self.tokens, max_length=self.max_length)
        first = torch.full_like(answers[:, :1], self.tokens["bos"])
        ids = torch.cat([first, answers[:, :-1]], dim=1)
        return {"decoder_input_ids": ids, "labels": until_end(answers, [self.tokens["eos"]])}


class Generated(Answered):
    """The trained teacher writes by Hugging Face's own `generate`: sampling, beams, penalties, whatever it can do.

    An encoder-decoder's batch gains `decoder_input_ids` and `labels` [B, L]. A causal model's prompts `input_ids`
    [B, P] become prompt and continuation, `labels` the same tokens, which a causal model's loss shifts; prompts and
    what follows the end token are not counted, and they are padded on the left. Samples are drawn from the stage's
    replayed random state. `generation` has arguments of `generate`, such as `max_new_tokens`, `num_beams` and
    `do_sample`, on top of the model's own generation config.
    """

    def __init__(
        self, batches: Iterable[Any], generation: Mapping[str, Any] | None = None, upstream: str | None = None
    ) -> None:
        super().__init__(batches, upstream)
        self.generation = dict(generation or {})

    def answer(self, module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        teacher: Any = module
        if not hasattr(teacher, "generate"):
            raise StageError(f"Generated: {type(module).__name__} has no generate(); use Decoded(...) or a HandOver")
        causal = not is_encoder_decoder(teacher)
        mask = inputs.get("attention_mask")
        if causal and mask is not None and not bool(mask[:, -1].all()):
            raise StageError("Generated: a causal model's prompts must be padded on the left: padding_side='left'")
        written: Tensor = teacher.generate(**inputs, **self.generation, return_dict_in_generate=False)
        ends = self.generation.get("eos_token_id", teacher.generation_config.eos_token_id)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        if not causal:
            return {"decoder_input_ids": written[:, :-1], "labels": until_end(written[:, 1:], ends)}
        prompt = inputs["input_ids"].shape[1]
        labels = F.pad(until_end(written[:, prompt:], ends), (prompt, 0), value=IGNORED)
        found = {"input_ids": written, "labels": labels}
        if mask is not None:
            found["attention_mask"] = F.pad(mask, (0, written.shape[1] - prompt), value=1)
            found["position_ids"] = (found["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return found
