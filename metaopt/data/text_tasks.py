"""What each task makes of text: tokens per stream, how a batch is made of them, and how models are scored."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.data.text_files import LABELLED
from metaopt.data.text_tokens import Collator, Lengths, begin_token, end_token
from metaopt.losses.decoding import Shown, accuracy_measure, guesses, sequence_answers, sequence_measure
from metaopt.losses.logits import IGNORED, Batch, logits_of

Texts = Mapping[str, Mapping[str, list[str]]]  # stream → role (`input`, `target`) → one text per example


class Task(ABC):
    """Encodes texts; `columns` are what `Collator` reads of each stream, and `facts` what models must know."""

    metrics: tuple[str, ...]  # the first selects
    has_answers = True

    def __init__(self, texts: Texts, inputs: Lengths, targets: Lengths, start: int | None = None) -> None:
        self.texts, self.inputs, self.targets, self.tokenizer = texts, inputs, targets, inputs.tokenizer
        self.start, self.collate = start, Collator(self.tokenizer, start)
        self.columns: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id}
        self.facts["eos_token_id"] = end_token(self.tokenizer)
        self.encode()

    @abstractmethod
    def encode(self) -> None:
        """Fill `columns` and `facts`."""

    @abstractmethod
    def measure(self, module: Any, batch: Batch) -> Mapping[str, Tensor]:
        """Return what is right in a batch, as `scored` reads it."""

    @abstractmethod
    def read(self, module: Any, batch: Batch) -> Iterable[Shown]:
        """Return the texts, the right answers and the model's, as `shown` reads them."""

    def decoded(self, rows: Any) -> list[str]:
        """Return rows of tokens as text."""
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def encode_inputs(self) -> None:
        for stream, texts in self.texts.items():
            self.columns[stream] = {"input_ids": self.inputs.encode(texts["input"], f"{stream} inputs")}
        self.facts["max_length"] = self.inputs.longest

    def end(self) -> int:
        """Return the end token, without which no answer ends."""
        if self.facts["eos_token_id"] is None:
            raise ConfigError(
                "text: the tokenizer has no end token, without which no answer ends; set one and save it: "
                "tokenizer.eos_token = ...; tokenizer.save_pretrained(folder)"
            )
        return self.facts["eos_token_id"]


class SequenceToSequence(Task):
    metrics = ("exact_match", "token_accuracy")

    def encode(self) -> None:
        start, end = self.start, self.end()
        adds_end = self.tokenizer("")["input_ids"][-1:] == [end]
        self.encode_inputs()
        longest = 0
        for stream in LABELLED:
            texts = self.texts[stream]["target"]
            answers = self.targets.encode(texts, f"{stream} targets", room=0 if adds_end else 1)
            answers = [tokens[1:] if tokens[:1] == [start] else tokens for tokens in answers]
            answers = answers if adds_end else [[*tokens, end] for tokens in answers]
            self.columns[stream]["labels"] = answers
            longest = max(longest, *map(len, answers))
        self.facts |= {"bos_token_id": start, "max_target_length": longest}
        self.decoding = {"bos": start, "eos": end, "pad": self.tokenizer.pad_token_id, "max_length": longest}

    def measure(self, module: Any, batch: Batch) -> Mapping[str, Tensor]:
        return sequence_measure(module, batch, **self.decoding)

    def read(self, module: Any, batch: Batch) -> Iterable[Shown]:
        return sequence_answers(self.decoded, self.decoded, self.decoding, module, batch)


class Causal(Task):
    """A text is: begin token, input, and where there is a target, separator and target; end token."""

    metrics = ("exact_match", "token_accuracy")

    def __init__(self, texts: Texts, inputs: Lengths, targets: Lengths, separator: str) -> None:
        self.has_answers, self.separator = "target" in texts["train"], separator
        self.metrics = self.metrics if self.has_answers else ("token_accuracy",)
        super().__init__(texts, inputs, targets)

    def encode(self) -> None:
        end, begin = self.end(), begin_token(self.tokenizer)
        begin = end if begin is None else begin
        separator, room = (self.separator, 1) if self.has_answers else ("", 2)
        longest = longest_answer = 0
        for stream, given in self.texts.items():
            inputs = [text + separator for text in given["input"]]
            encoded = self.inputs.encode(inputs, f"{stream} inputs", special=False, room=room)
            prompts = [[begin, *tokens] for tokens in encoded]
            if "target" in given:
                answers = self.targets.encode(given["target"], f"{stream} targets", special=False, room=1)
                answers = [[*answer, end] for answer in answers]
                longest_answer = max(longest_answer, *map(len, answers))
            else:  # all but the begin token is predicted; what is still to be answered has no end
                ending = [] if self.has_answers else [end]
                prompts, answers = [[begin]] * len(encoded), [[*tokens, *ending] for tokens in encoded]
            pairs = list(zip(prompts, answers, strict=True))
            self.columns[stream] = {
                "input_ids": [prompt + answer for prompt, answer in pairs],
                "labels": [[IGNORED] * len(prompt) + answer for prompt, answer in pairs],
            }
            longest = max(longest, *map(len, self.columns[stream]["input_ids"]))
        self.facts |= {"bos_token_id": begin, "max_length": longest}
        if self.has_answers:
            self.facts["max_target_length"] = longest_answer
        self.decoding = {"eos": end, "pad": self.tokenizer.pad_token_id, "max_length": longest_answer}

    def measure(self, module: Any, batch: Batch) -> Mapping[str, Tensor]:
        labels = batch["labels"][:, 1:]  # of a text the model is asked for each next token
        right = {"token_accuracy": (guesses(module, batch)[:, :-1] == labels)[labels != IGNORED]}
        if not self.has_answers:
            return right
        prompts, wanted = prompts_and_answers(batch)
        found = greedy_continue(module, prompts, **self.decoding)
        exact = [a == _until(self.decoding["eos"], b) for a, b in zip(found, wanted, strict=True)]
        return {"exact_match": torch.tensor(exact), **right}

    def read(self, module: Any, batch: Batch) -> Iterable[Shown]:
        prompts, wanted = prompts_and_answers(batch)
        found = greedy_continue(module, prompts, **self.decoding)
        return zip(*map(self.decoded, (prompts, wanted, found)), strict=True)


class Classification(Task):
    metrics = ("accuracy",)

    def encode(self) -> None:
        self.encode_inputs()
        self.names = in_order(self.texts["train"]["target"])
        if len(self.names) < 2:
            raise ConfigError(
                f"text: every target in train is {self.names[0]!r}; a classifier needs two classes or more"
            )
        number = {name: i for i, name in enumerate(self.names)}
        for stream in LABELLED:
            for name in self.texts[stream]["target"]:
                if name not in number:
                    raise ConfigError(
                        f"text: {stream} has the class {name!r}, which train lacks{did_you_mean(name, self.names)}"
                    )
            self.columns[stream]["labels"] = [number[name] for name in self.texts[stream]["target"]]
        self.facts |= {"num_labels": len(self.names), "bos_token_id": begin_token(self.tokenizer)}

    def measure(self, module: Any, batch: Batch) -> Mapping[str, Tensor]:
        return accuracy_measure(module, batch)

    def read(self, module: Any, batch: Batch) -> Iterable[Shown]:
        numbers = batch["labels"], guesses(module, batch)
        named = [[self.names[i] for i in found.tolist()] for found in numbers]
        return zip(self.decoded(batch["input_ids"]), *named, strict=True)


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
        logits = logits_of(model(input_ids=ids, attention_mask=mask))
        last = torch.tensor([len(text) - 1 for text in texts], device=logits.device)
        tokens = logits[torch.arange(len(texts), device=logits.device), last].argmax(-1).tolist()
        for i, token in zip(running, tokens, strict=True):
            answers[i].append(token)
        running = [i for i in running if answers[i][-1] != eos]
        if not running:
            break
    return [_until(eos, answer) for answer in answers]


def _until(eos: int, tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] == eos else tokens


def prompts_and_answers(batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """Return, from a batch of texts to be continued, what is given of each and what is to be predicted."""
    prompts, answers = [], []
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        answers.append([label for label in labels if label != IGNORED])
        first = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
        prompts.append(tokens[:first])
    return prompts, answers


def in_order(values: Sequence[str]) -> list[str]:
    """Return the different values: numbers by size, so that classes numbered from 0 keep their numbers."""
    different = set(values)
    are_numbers = all(value.lstrip("-").isdecimal() for value in different)
    return sorted(different, key=int) if are_numbers else sorted(different)
