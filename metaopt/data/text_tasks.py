"""What each task makes of text: tokens per stream, and how models are scored."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.data.text_files import LABELLED, Texts
from metaopt.data.text_tokens import decoding
from metaopt.losses.decoding import Shown, accuracy_measure, guesses, sequence_answers, sequence_measure
from metaopt.losses.logits import IGNORED, Batch, logits_of

log = logging.getLogger(__name__)


class Task:
    """Encodes texts: `columns` are what a `Collator` reads of each stream, `facts` what models must know.

    A subclass says what a stream's columns are (`encode`), what a model gets right of a batch (`measure`, for
    `scored`), and what it is asked and answers (`read`, for `shown`).

    Args:
        limits: tokens of an input (`max_length`) and of a target (`max_target_length`).
        special: the tokens that begin, end and fill, as facts.
    """

    metrics: tuple[str, ...] = ("exact_match", "token_accuracy")  # the first selects

    def __init__(self, texts: Texts, tokenizer: Any, limits: Mapping[str, int], special: Mapping[str, Any]) -> None:
        self.texts, self.tokenizer, self.limits = texts, tokenizer, limits
        self.cut: dict[str, list[str]] = {option: [] for option in limits}
        self.begin, self.end = special["bos_token_id"], special["eos_token_id"]
        self.has_targets = "target" in texts["train"]
        self.columns = {stream: self.encode(stream) for stream in texts}
        longest = max(len(row) for columns in self.columns.values() for row in columns["input_ids"])
        self.facts: dict[str, Any] = {**special, "vocab_size": len(tokenizer), "max_length": longest}
        if self.has_targets and "exact_match" in self.metrics:
            labels = [row for stream in LABELLED for row in self.columns[stream]["labels"]]
            self.facts["max_target_length"] = max(len(row) - row.count(IGNORED) for row in labels)
        cut = "; ".join(f"cut to {o}={limits[o]} tokens: {', '.join(said)}" for o, said in self.cut.items() if said)
        if cut:
            log.warning("text: %s; raise the limit (data.max_length=...) to keep them whole", cut)

    def encode(self, stream: str) -> dict[str, list[Any]]:
        raise NotImplementedError

    def tokens(self, stream: str, role: str, special: bool = True, room: int = 0) -> list[list[int]]:
        """Return texts as tokens, the tokenizer's special ones included, cut so that `room` is left for others."""
        option, texts = {"input": "max_length", "target": "max_target_length"}[role], self.texts[stream][role]
        most, added = self.limits[option] - room, self.tokenizer.num_special_tokens_to_add() if special else 0
        if most <= added:
            raise ConfigError(
                f"text: {option}={self.limits[option]} leaves no room for text: {room + added} tokens are added to "
                f"each of the {stream} {role}s; raise it"
            )
        options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        encoded = self.tokenizer(texts, **options)["input_ids"]
        long = [len(tokens) + room for tokens in encoded if len(tokens) > most]
        if long:
            self.cut[option].append(f"{len(long)} of {len(texts)} {stream} {role}s (longest: {max(long)})")
            encoded = self.tokenizer(texts, truncation=True, max_length=most, **options)["input_ids"]
        return encoded

    def decoded(self, rows: Any) -> list[str]:
        """Return rows of tokens as text."""
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]


class SequenceToSequence(Task):
    """Labels are a target's tokens up to the end token, without the one that a decoder begins with."""

    def encode(self, stream: str) -> dict[str, list[Any]]:
        columns = {"input_ids": self.tokens(stream, "input")}
        if "target" in self.texts[stream]:
            ending = [] if self.tokenizer("")["input_ids"][-1:] == [self.end] else [self.end]
            answers = self.tokens(stream, "target", room=len(ending))
            columns["labels"] = [[*(row[1:] if row[:1] == [self.begin] else row), *ending] for row in answers]
        return columns

    def measure(self, module: Any, batch: Batch) -> Mapping[str, Tensor]:
        return sequence_measure(module, batch, **decoding(self.facts))

    def read(self, module: Any, batch: Batch) -> Iterable[Shown]:
        return sequence_answers(self.decoded, self.decoded, decoding(self.facts), module, batch)


class Causal(Task):
    """Texts are begin token, input, target, end token; labelled are the last two, without targets all but the first."""

    def __init__(self, *encoding: Any) -> None:
        super().__init__(*encoding)
        self.facts["is_causal"] = True

    def encode(self, stream: str) -> dict[str, list[Any]]:
        inputs = self.tokens(stream, "input", special=False, room=1 if self.has_targets else 2)
        if "target" in self.texts[stream]:
            answers = self.tokens(stream, "target", special=False, room=1)
            pairs = [([self.begin, *i], [*a, self.end]) for i, a in zip(inputs, answers, strict=True)]
        else:  # all but the begin token is predicted; what is still to be answered has no end
            ending = [] if self.has_targets else [self.end]
            pairs = [([self.begin], [*i, *ending]) for i in inputs]
        return {
            "input_ids": [prompt + answer for prompt, answer in pairs],
            "labels": [[IGNORED] * len(prompt) + answer for prompt, answer in pairs],
        }

    def measure(self, module: Any, batch: Batch) -> Mapping[str, Tensor]:
        labels = batch["labels"][:, 1:]  # of a text the model is asked for each next token
        right = {"token_accuracy": (guesses(module, batch)[:, :-1] == labels)[labels != IGNORED]}
        if not self.has_targets:
            return right
        _, wanted, found = self.continued(module, batch)
        return {"exact_match": torch.tensor([a == b for a, b in zip(wanted, found, strict=True)]), **right}

    def read(self, module: Any, batch: Batch) -> Iterable[Shown]:
        return zip(*map(self.decoded, self.continued(module, batch)), strict=True)

    def continued(self, module: Any, batch: Batch) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Return what is given of each text, and how it goes on and how a model does, both without the end token."""
        prompts, answers, pad = [], [], self.facts["pad_token_id"]
        for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            counts = labels != IGNORED
            prompts.append(tokens[: int(counts.int().argmax())].tolist())
            answers.append(labels[counts].tolist()[:-1])
        return prompts, answers, greedy_continue(module, prompts, self.end, pad, self.facts["max_target_length"])


class Classification(Task):
    """Labels number the different targets in `train`."""

    metrics = ("accuracy",)

    def __init__(self, texts: Texts, *encoding: Any) -> None:
        self.classes = in_order(texts["train"]["target"])
        if len(self.classes) < 2:
            only = self.classes[0]
            raise ConfigError(f"text: every target in train is {only!r}; a classifier needs two classes or more")
        super().__init__(texts, *encoding)
        self.facts["num_labels"] = len(self.classes)

    def encode(self, stream: str) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"input_ids": self.tokens(stream, "input")}
        if "target" in self.texts[stream]:
            columns["labels"] = numbered(self.texts[stream]["target"], self.classes, stream)
        return columns

    def measure(self, module: Any, batch: Batch) -> Mapping[str, Tensor]:
        return accuracy_measure(module, batch)

    def read(self, module: Any, batch: Batch) -> Iterable[Shown]:
        named = ([self.classes[i] for i in found.tolist()] for found in (batch["labels"], guesses(module, batch)))
        return zip(self.decoded(batch["input_ids"]), *named, strict=True)


TASKS = {"seq2seq": SequenceToSequence, "causal": Causal, "classification": Classification}


@torch.no_grad()
def greedy_continue(
    model: Callable[..., Any], prompts: Sequence[Sequence[int]], eos: int, pad: int, max_length: int
) -> list[list[int]]:
    """Return how a causal model goes on, the most likely token after the other, without its end token.

    The prompts are filled up at the right, so that every token has the position that it has in training; the model is
    called whole for every token, up to `max_length` of them, the end token included.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else None
    fill = functools.partial(pad_sequence, batch_first=True)
    for _ in range(max_length):
        texts = [torch.tensor([*prompts[i], *answers[i]], device=device) for i in running]
        ids, mask = fill(texts, padding_value=pad), fill([torch.ones_like(text) for text in texts])
        guessed = logits_of(model(input_ids=ids, attention_mask=mask)).argmax(-1)
        tokens = [int(row[len(text) - 1]) for row, text in zip(guessed, texts, strict=True)]
        going_on = [(i, token) for i, token in zip(running, tokens, strict=True) if token != eos]
        for i, token in going_on:
            answers[i].append(token)
        running = [i for i, _ in going_on]
        if not running:
            break
    return answers


def in_order(values: Sequence[str]) -> list[str]:
    """Return the different values: numbers by size, so that classes numbered from 0 keep their numbers."""
    different = set(values)
    are_numbers = all(value.lstrip("-").isdecimal() for value in different)
    return sorted(different, key=int) if are_numbers else sorted(different)


def numbered(values: Sequence[str], names: Sequence[str], stream: str) -> list[int]:
    """Return each value's place among the names."""
    places = {name: i for i, name in enumerate(names)}
    for value in values:
        if value not in places:
            raise ConfigError(f"text: {stream} has the class {value!r}, which train lacks{did_you_mean(value, names)}")
    return [places[value] for value in values]
