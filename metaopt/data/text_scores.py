"""What is measured of models of text, and their answers side by side with the right ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError
from metaopt.data.padding import filled
from metaopt.losses.decoding import Batch, evaluating, greedy_decode, to_model
from metaopt.losses.logits import IGNORED, logits_of, model_inputs

Shown = list[tuple[str, str, str]]


@torch.no_grad()
def greedy_continue(
    model: Callable[..., Any], prompts: Sequence[Sequence[int]], eos: int, pad: int, max_length: int
) -> list[list[int]]:
    """Return how a causal model goes on, the most likely token after the other, until its end token.

    The prompts are filled up at the right, so that every token has the position that it has in training; the model is
    called whole for every token.

    Args:
        model: in the mode in which it shall answer.
        prompts: tokens, of unlike lengths.
        eos, pad: the tokens that end a text and fill what follows.
        max_length: tokens of an answer, the end token included.

    Returns:
        The answers without end token.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else None
    for _ in range(max_length):
        texts = [[*prompts[i], *answers[i]] for i in running]
        mask = filled([[1] * len(text) for text in texts], 0).to(device)
        logits = logits_of(model(input_ids=filled(texts, pad).to(device), attention_mask=mask))
        last = torch.tensor([len(text) - 1 for text in texts], device=logits.device)
        tokens = logits[torch.arange(len(texts), device=logits.device), last].argmax(-1).tolist()
        for i, token in zip(running, tokens, strict=True):
            answers[i].append(token)
        running = [i for i in running if answers[i][-1] != eos]
        if not running:
            break
    return [answer[:-1] if answer[-1] == eos else answer for answer in answers]


def causal_score(
    model: Any, batches: Iterable[Batch], *, eos: int, pad: int, max_length: int, with_answers: bool
) -> dict[str, float]:
    """Score a causal model on texts, in eval mode.

    Returns:
        `token_accuracy`, the fraction of predicted tokens that are right when all before are the right ones, and
        `exact_match` where the texts are a prompt and its answer: the fraction answered right in every token.
    """
    right, examples, right_tokens, tokens = 0, 0, 0, 0
    with evaluating(model) as module:
        for batch in batches:
            batch = to_model(batch, module)
            labels = batch["labels"][:, 1:]  # of a text the model is asked for each next token
            counts = labels != IGNORED
            guesses = logits_of(module(**model_inputs(batch, module))).argmax(-1)[:, :-1]
            right_tokens += int(((guesses == labels) & counts).sum())
            tokens += int(counts.sum())
            examples += len(counts)
            if with_answers:
                prompts, wanted = prompts_and_answers(batch)
                found = greedy_continue(module, prompts, eos, pad, max_length)
                right += sum(a == _without(b, eos) for a, b in zip(found, wanted, strict=True))
    if not examples:
        raise ConfigError("score: there is not a single batch to score; give the stream itself, not a spent iterator")
    exact = {"exact_match": right / examples} if with_answers else {}
    return {**exact, "token_accuracy": right_tokens / max(tokens, 1)}


def prompts_and_answers(batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """Return, from a batch of texts to be continued, what is given of each and what is to be predicted."""
    prompts, answers = [], []
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        first = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
        prompts.append(tokens[:first])
        answers.append([label for label in labels if label != IGNORED])
    return prompts, answers


def sequence_answers(
    tokenizer: Any, decoding: Mapping[str, int], model: Any, batches: Iterable[Batch], count: int
) -> Shown:
    """Return (input, right answer, the model's greedy answer) of the first examples, for encoder-decoders."""
    shown: Shown = []
    with evaluating(model) as module:
        for batch in _first(batches, count):
            batch = to_model(batch, module)
            guesses = greedy_decode(module, batch["input_ids"], batch["attention_mask"], **decoding)
            wanted = batch["labels"].masked_fill(batch["labels"] == IGNORED, decoding["pad"])
            read = [_read(tokenizer, tokens.tolist()) for tokens in (batch["input_ids"], wanted, guesses)]
            shown += zip(*read, strict=True)
    return shown


def causal_answers(
    tokenizer: Any, decoding: Mapping[str, int], model: Any, batches: Iterable[Batch], count: int
) -> Shown:
    """Return (prompt, right answer, the model's greedy answer) of the first examples, for causal models."""
    shown: Shown = []
    with evaluating(model) as module:
        for batch in _first(batches, count):
            prompts, wanted = prompts_and_answers(batch)
            guesses = greedy_continue(module, prompts, **decoding)
            shown += zip(*(_read(tokenizer, tokens) for tokens in (prompts, wanted, guesses)), strict=True)
    return shown


def class_answers(tokenizer: Any, names: Sequence[str], model: Any, batches: Iterable[Batch], count: int) -> Shown:
    """Return (text, right class, the model's class) of the first examples."""
    shown: Shown = []
    with evaluating(model) as module:
        for batch in _first(batches, count):
            batch = to_model(batch, module)
            guesses = logits_of(module(**model_inputs(batch, module))).argmax(-1)
            texts = _read(tokenizer, batch["input_ids"].tolist())
            named = [[names[i] for i in numbers.tolist()] for numbers in (batch["labels"], guesses)]
            shown += zip(texts, *named, strict=True)
    return shown


def _first(batches: Iterable[Batch], count: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches, cut so that they hold `count` examples in all."""
    for batch in batches:
        cut = {name: value[:count] for name, value in batch.items()}
        yield cut
        count -= len(cut["input_ids"])
        if count < 1:
            return


def _read(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def _without(tokens: Sequence[int], eos: int) -> list[int]:
    return list(tokens[:-1] if tokens and tokens[-1] == eos else tokens)
