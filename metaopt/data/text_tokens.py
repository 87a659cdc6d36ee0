"""Text as tokens: the tokenizer, its special tokens, and batches."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from metaopt.base.errors import ConfigError, first_line
from metaopt.data.text_files import Texts
from metaopt.losses.logits import IGNORED
from metaopt.models.hugging_face import local_first

CHARACTERS = "characters"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def word_tokenizer(
    vocabulary: Iterable[str], splitter: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word of the vocabulary, numbered behind the special tokens."""
    numbers = {token: i for i, token in enumerate([*SPECIAL.values(), *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.Fuse()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character that occurs in these texts; any other is `<unk>`."""
    alphabet = sorted({character for text in texts for character in text})
    return word_tokenizer(alphabet, pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated"))


def load_tokenizer(name: str, texts: Texts) -> Any:
    """Return the tokenizer of a folder or hub name, or of the characters in the texts that models are trained on.

    One without a filler token fills with its end token.
    """
    if name == CHARACTERS:
        read = (texts["train"], texts.get("unlabelled", {}))
        return character_tokenizer(
            text for found in read for role in ("input", "target") for text in found.get(role, ())
        )
    try:
        tokenizer: Any = local_first(AutoTokenizer.from_pretrained, name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"text: cannot load tokenizer={name!r}: give a folder that holds one, a name on the Hugging Face hub, or "
            f"{CHARACTERS!r} to make one of the characters in the training data ({first_line(error)})"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        advice = "set tokenizer.pad_token = ... and save it"
        raise ConfigError(f"text: tokenizer={name!r} has neither a filler nor an end token; {advice}")
    return tokenizer


def special_tokens(tokenizer: Any, task: str, decoder_start: int | None) -> dict[str, int | None]:
    """Return which tokens begin (of an encoder-decoder: its answers), end and fill texts, as facts for a model."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None and task != "classification":
        raise ConfigError("text: no answer ends without an end token: set tokenizer.eos_token = ... and save it")
    if task == "causal" and begin is None:
        begin = end
    if task == "seq2seq":
        begin = _decoder_start(tokenizer, decoder_start, begin)
    return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}


def _decoder_start(tokenizer: Any, given: int | None, begin: int | None) -> int:
    """Return the token as given, as the model beside the tokenizer says, or the one that begins a text."""
    if given is not None:
        if not 0 <= given < len(tokenizer):
            last = len(tokenizer) - 1
            raise ConfigError(
                f"text: decoder_start_token_id={given} must be a token of the vocabulary, from 0 to {last}"
            )
        return given
    folder, start = tokenizer.name_or_path, None
    if folder:
        with contextlib.suppress(OSError, ValueError):  # a tokenizer on its own
            start = getattr(AutoConfig.from_pretrained(folder), "decoder_start_token_id", None)
    start = begin if start is None else start
    if start is None:
        raise ConfigError(
            f"text: tokenizer={folder!r} does not say which token begins an answer; give decoder_start_token_id (for "
            f"T5 that is its filler, {tokenizer.pad_token_id})"
        )
    return start


def decoding(facts: Mapping[str, Any]) -> dict[str, int]:
    """Return what greedy decoding needs of a bundle's facts."""
    return {name: facts[f"{name}_token_id"] for name in ("bos", "eos", "pad")} | {
        "max_length": facts["max_target_length"]
    }


class Collator:
    """Makes a batch of rows by Hugging Face's collators, filled up at the right.

    Filled positions count in no loss (`attention_mask` 0, label −100). `labels` of tokens also become what a decoder
    reads, `decoder_input_ids`: the same behind `start`, without their last token.
    """

    def __init__(self, tokenizer: Any, start: int | None = None) -> None:
        own = copy.copy(tokenizer)  # the user's keeps the side on which it fills up
        own.padding_side, own.model_input_names = "right", ["input_ids", "attention_mask"]
        self.plain, self.labelled = (
            DataCollatorWithPadding(own),
            DataCollatorForSeq2Seq(own, label_pad_token_id=IGNORED),
        )
        self.start, self.pad = start, tokenizer.pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if not isinstance(rows[0].get("labels"), list):
            return dict(self.plain(rows))
        batch: dict[str, Tensor] = dict(self.labelled(rows))
        if self.start is not None:
            behind = F.pad(batch["labels"], (1, 0), value=self.start)[:, :-1]
            batch["decoder_input_ids"] = behind.masked_fill(batch["labels"] == IGNORED, self.pad)
        return batch
