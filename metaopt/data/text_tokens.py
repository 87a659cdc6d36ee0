"""Text as tokens: the tokenizer, its special tokens, lengths with a word on what was cut, and batches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from metaopt.base.errors import ConfigError, first_line
from metaopt.losses.logits import IGNORED

CHARACTERS = "characters"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
NO_LIMIT = 10**6  # what a tokenizer without a limit says is far above


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character that occurs in these texts; any other is `<unk>`."""
    alphabet = sorted({character for text in texts for character in text})
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub name; one without a filler token fills with its end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"text: cannot load tokenizer={name!r}: give a folder that holds one, a name on the Hugging Face hub, or "
            f"{CHARACTERS!r} to make one of the characters in the training data ({first_line(error)})"
        ) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"text: tokenizer={name!r} has neither a filler nor an end token; set one and save it: "
            "tokenizer.pad_token = ...; tokenizer.save_pretrained(folder)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_token(tokenizer: Any) -> int | None:
    """Return the token that ends a text: `eos`, or BERT's `sep`."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def begin_token(tokenizer: Any) -> int | None:
    """Return the token that begins a text: `bos`, or BERT's `cls`."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id


def decoder_start(tokenizer: PreTrainedTokenizerBase, name: str, given: int | None) -> int:
    """Return the token with which a decoder begins: as given, as the model beside the tokenizer says, or `bos`."""
    if given is not None and not 0 <= given < len(tokenizer):
        raise ConfigError(
            f"text: decoder_start_token_id={given} must be a token of the vocabulary, from 0 to {len(tokenizer) - 1}"
        )
    start = given
    if start is None and name != CHARACTERS:
        try:
            start = getattr(AutoConfig.from_pretrained(name), "decoder_start_token_id", None)
        except (OSError, ValueError):  # a tokenizer on its own
            start = None
    start = begin_token(tokenizer) if start is None else start
    if start is None:
        raise ConfigError(
            f"text: tokenizer={name!r} does not say which token begins an answer; give decoder_start_token_id (for T5 "
            f"that is its filler, {tokenizer.pad_token_id})"
        )
    return start


@dataclass
class Lengths:
    """Limits the tokens of texts, the limit being called `option` (None for none), and notes what it cuts."""

    tokenizer: PreTrainedTokenizerBase
    option: str
    limit: int | None
    longest: int = 0  # after cutting
    cut: list[str] = field(default_factory=list)

    def encode(self, texts: Sequence[str], what: str, special: bool = True, room: int = 0) -> list[list[int]]:
        """Return each text's tokens, cut to the limit.

        Args:
            what: these texts, in a message: `train inputs`.
            special: with the tokens that the tokenizer itself adds.
            room: tokens that will be added afterwards and count, too.
        """
        options: dict[str, Any] = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        limit = NO_LIMIT if self.limit is None else self.limit - room
        added = self.tokenizer.num_special_tokens_to_add() if special else 0
        if limit <= added:
            raise ConfigError(
                f"text: {self.option}={self.limit} leaves no room for text: {room + added} tokens are added to each of "
                f"the {what}; raise it"
            )
        encoded: Any = self.tokenizer(list(texts), **options)["input_ids"]
        long = [len(tokens) + room for tokens in encoded if len(tokens) > limit]
        if long:
            self.cut.append(f"{len(long)} of {len(texts)} {what} (longest: {max(long)})")
            encoded = self.tokenizer(list(texts), truncation=True, max_length=limit, **options)["input_ids"]
        self.longest = max(self.longest, *(len(tokens) + room for tokens in encoded))
        return encoded


class Collator:
    """Makes a batch of rows by Hugging Face's collators, filled up at the right.

    Filled positions count in no loss (`attention_mask` 0, label −100). `labels` of tokens also become what a decoder
    reads, `decoder_input_ids`: the same behind `start`, without their last token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int | None = None) -> None:
        own = copy.copy(tokenizer)  # the user's keeps the side on which it fills up
        own.padding_side, own.model_input_names = "right", ["input_ids", "attention_mask"]
        self.pad: Any = tokenizer.pad_token_id
        self.start = start
        self.plain = DataCollatorWithPadding(own)
        self.labelled = DataCollatorForSeq2Seq(own, label_pad_token_id=IGNORED)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        has_tokens = isinstance(rows[0].get("labels"), list)
        batch: dict[str, Tensor] = dict(self.labelled(rows) if has_tokens else self.plain(rows))
        if has_tokens and self.start is not None:
            behind = F.pad(batch["labels"], (1, 0), value=self.start)[:, :-1]
            batch["decoder_input_ids"] = behind.masked_fill(batch["labels"] == IGNORED, self.pad)
        return batch
