"""What each task makes of text: tokens per stream, how a batch is made of them, and how models are scored."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.data.padding import Collator
from metaopt.data.text_files import LABELLED, Columns
from metaopt.data.text_scores import causal_answers, causal_score, class_answers, sequence_answers
from metaopt.data.text_tokens import Lengths, begin_token, end_token
from metaopt.losses.decoding import accuracy_score, sequence_score


@dataclass(frozen=True)
class ReadText:
    """What was read: each stream's columns, and the tokenizer for them."""

    columns: Mapping[str, Columns]
    tokenizer: Any

    def texts(self, stream: str, role: str) -> list[str]:
        return [str(value) for value in self.columns[stream][role]]


@dataclass
class Parts:
    """What a task makes of the text: token columns per stream, and what goes with them."""

    columns: dict[str, dict[str, Sequence[Any]]]
    collator: Collator
    score: Any
    metrics: tuple[str, ...]  # of the score; the first selects
    answers: Any = None
    facts: dict[str, Any] = field(default_factory=dict)


def sequence_to_sequence(read: ReadText, lengths: Mapping[str, Lengths], start: int) -> Parts:
    tokenizer, columns = read.tokenizer, _inputs(read, lengths["max_length"])
    end = _end_of(tokenizer)
    adds_end = tokenizer("")["input_ids"][-1:] == [end]
    longest = 0
    for stream in LABELLED:
        encoded = lengths["max_target_length"].encode(
            tokenizer, read.texts(stream, "target"), f"{stream} targets", room=0 if adds_end else 1
        )
        answers = [tokens[1:] if tokens[:1] == [start] else tokens for tokens in encoded]
        columns[stream]["answers"] = [tokens if adds_end else [*tokens, end] for tokens in answers]
        longest = max(longest, *map(len, columns[stream]["answers"]))
    decoding = {"bos": start, "eos": end, "pad": tokenizer.pad_token_id, "max_length": longest}
    return Parts(
        columns,
        Collator(tokenizer.pad_token_id, start=start),
        functools.partial(sequence_score, **decoding),
        ("exact_match", "token_accuracy"),
        functools.partial(sequence_answers, tokenizer, decoding),
        {"bos_token_id": start, "max_length": lengths["max_length"].longest, "max_target_length": longest},
    )


def causal(read: ReadText, lengths: Mapping[str, Lengths], separator: str) -> Parts:
    """A text is: begin token, input, and where there is a target, separator and target; end token."""
    tokenizer, columns = read.tokenizer, {}
    end = _end_of(tokenizer)
    begin = begin_token(tokenizer)
    begin = end if begin is None else begin
    with_target = "target" in read.columns["train"]
    longest = longest_answer = 0
    for stream in read.columns:
        has_target = "target" in read.columns[stream]
        inputs = [input + separator if with_target else input for input in read.texts(stream, "input")]
        room = 1 if with_target else 2
        encoded = lengths["max_length"].encode(tokenizer, inputs, f"{stream} inputs", special=False, room=room)
        texts = [[begin, *tokens] for tokens in encoded]
        columns[stream] = {}
        if has_target:
            columns[stream]["num_prompt"] = [len(text) for text in texts]
            answers = lengths["max_target_length"].encode(
                tokenizer, read.texts(stream, "target"), f"{stream} targets", special=False, room=1
            )
            texts = [[*text, *answer, end] for text, answer in zip(texts, answers, strict=True)]
            longest_answer = max(longest_answer, 1 + max(map(len, answers)))
        elif not with_target:
            texts = [[*text, end] for text in texts]
        columns[stream]["inputs"] = texts
        longest = max(longest, *map(len, texts))
    decoding = {"eos": end, "pad": tokenizer.pad_token_id, "max_length": longest_answer}
    facts = {"bos_token_id": begin, "max_length": longest}
    return Parts(
        columns,
        Collator(tokenizer.pad_token_id, causal=True),
        functools.partial(causal_score, **decoding, with_answers=with_target),
        ("exact_match", "token_accuracy") if with_target else ("token_accuracy",),
        functools.partial(causal_answers, tokenizer, decoding) if with_target else None,
        {**facts, "max_target_length": longest_answer} if with_target else facts,
    )


def classification(read: ReadText, lengths: Mapping[str, Lengths]) -> Parts:
    columns = _inputs(read, lengths["max_length"])
    names = in_order(read.texts("train", "target"))
    if len(names) < 2:
        raise ConfigError(f"text: every target in train is {names[0]!r}; a classifier needs two classes or more")
    number = {name: i for i, name in enumerate(names)}
    for stream in LABELLED:
        targets = read.texts(stream, "target")
        unknown = sorted(set(targets) - set(number))
        if unknown:
            raise ConfigError(
                f"text: {stream} has the class {unknown[0]!r}, which train lacks{did_you_mean(unknown[0], names)}"
            )
        columns[stream]["labels"] = [number[target] for target in targets]
    answers = functools.partial(class_answers, read.tokenizer, names)
    facts = {"num_labels": len(names), "max_length": lengths["max_length"].longest}
    facts |= {"bos_token_id": begin_token(read.tokenizer)}
    return Parts(columns, Collator(read.tokenizer.pad_token_id), accuracy_score, ("accuracy",), answers, facts)


def _inputs(read: ReadText, lengths: Lengths) -> dict[str, dict[str, Sequence[Any]]]:
    return {
        stream: {"inputs": lengths.encode(read.tokenizer, read.texts(stream, "input"), f"{stream} inputs")}
        for stream in read.columns
    }


def _end_of(tokenizer: Any) -> int:
    end = end_token(tokenizer)
    if end is None:
        raise ConfigError(
            "text: the tokenizer has no end token, without which no answer ends; set one and save it: "
            "tokenizer.eos_token = ...; tokenizer.save_pretrained(folder)"
        )
    return end


def in_order(values: Sequence[str]) -> list[str]:
    """Return the different values: numbers by size, so that classes numbered from 0 keep their numbers."""
    different = set(values)
    return (
        sorted(different, key=int) if all(value.lstrip("-").isdecimal() for value in different) else sorted(different)
    )
