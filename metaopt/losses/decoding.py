"""Greedy decoding, and what is measured and shown of a model's answers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.base.errors import ConfigError
from metaopt.base.ranges import check_counts
from metaopt.core.view import FunctionalModel
from metaopt.losses.logits import IGNORED, Batch, is_encoder_decoder, logits_of, model_inputs

Shown = tuple[str, str, str]  # an input, its right answer, the model's answer
Read = Callable[[Tensor], list[str]]  # rows of tokens as texts


@contextmanager
def evaluating(model: Any) -> Iterator[Callable[..., Any]]:
    """Lend a module or a trained model in eval mode and without a graph; the mode it had comes back on leaving."""
    if isinstance(model, FunctionalModel):
        with torch.no_grad(), model.eval().as_module() as module:
            yield module
        return
    modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def greedy_decode(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, bos: int, eos: int, pad: int, max_length: int
) -> Tensor:
    """Return the tokens that a sequence-to-sequence model finds most likely, one after the other [B, max_length].

    A Hugging Face encoder-decoder encodes its inputs [B, L] once; anything else that is called
    `model(input_ids=, attention_mask=, decoder_input_ids=)` is called whole for every token. `bos` begins an answer (it
    is not returned), `eos` ends it and is one of its `max_length` tokens, `pad` fills what follows.
    """
    check_counts("greedy_decode", max_length=max_length)
    call = functools.partial(model, attention_mask=attention_mask)
    if isinstance(model, nn.Module) and is_encoder_decoder(model):
        encoder: Any = model.get_encoder()  # pyright: ignore[reportCallIssue]
        encoded = encoder(input_ids=input_ids, attention_mask=attention_mask)
        # The answers are short: filling a cache costs more than it saves.
        call = functools.partial(call, encoder_outputs=encoded, use_cache=False)
    else:
        call = functools.partial(call, input_ids=input_ids)
    answers = input_ids.new_full((len(input_ids), max_length + 1), pad)
    answers[:, 0] = bos
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for length in range(1, max_length + 1):
        tokens = logits_of(call(decoder_input_ids=answers[:, :length]))[:, -1].argmax(-1)
        answers[:, length] = torch.where(running, tokens, pad)
        running = running & (tokens != eos)
        if not running.any():
            break
    return answers[:, 1:]


def scored(
    measure: Callable[[Any, Batch], Mapping[str, Tensor]], model: Any, batches: Iterable[Batch]
) -> dict[str, float]:
    """Return the share of what is right by each measure over labelled batches, in eval mode.

    `measure(model, batch)` returns name → bool [n], one for each example, or for each token that counts.
    """
    right, counts = Counter[str](), Counter[str]()
    with evaluating(model) as module:
        for batch in batches:
            for name, found in measure(module, _on_device_of(module, batch)).items():
                right[name] += int(found.sum())
                counts[name] += found.numel()
    if not counts:
        raise ConfigError("score: there is not a single batch to score; give the stream itself, not a spent iterator")
    return {name: right[name] / max(counts[name], 1) for name in counts}


def sequence_score(model: Any, batches: Iterable[Batch], **decoding: int) -> dict[str, float]:
    """Score a sequence-to-sequence model on labelled batches, in eval mode, by what `sequence_measure` measures."""
    return scored(functools.partial(sequence_measure, **decoding), model, batches)


def sequence_measure(module: Any, batch: Batch, bos: int, eos: int, pad: int, max_length: int) -> dict[str, Tensor]:
    """Return `exact_match`, whose greedy answer is right, and `token_accuracy`, which token is after the right ones."""
    labels, counts = batch["labels"], batch["labels"] != IGNORED
    inputs = batch["input_ids"], batch.get("attention_mask")
    answers = greedy_decode(module, *inputs, bos, eos, pad, max(max_length, labels.shape[1]))
    wanted = F.pad(labels.masked_fill(~counts, pad), (0, answers.shape[1] - labels.shape[1]), value=pad)
    right = guesses(module, batch) == labels
    return {"exact_match": (answers == wanted).all(1), "token_accuracy": right[counts]}


def accuracy_measure(module: Any, batch: Batch) -> dict[str, Tensor]:
    """Return `accuracy`, whose class is guessed right."""
    return {"accuracy": guesses(module, batch) == batch["labels"]}


accuracy_score = functools.partial(scored, accuracy_measure)  # (a classifier, labelled batches) → its `accuracy`


def shown(
    read: Callable[[Any, Batch], Iterable[Shown]], model: Any, batches: Iterable[Batch], count: int
) -> list[Shown]:
    """Return (input, right answer, the model's answer) of the first `count` examples, read batch by batch."""
    rows: list[Shown] = []
    with evaluating(model) as module:
        for batch in batches:
            first = {name: value[: count - len(rows)] for name, value in batch.items()}
            rows += read(module, _on_device_of(module, first))
            if len(rows) >= count:
                break
    return rows


def sequence_answers(
    read_inputs: Read, read_answers: Read, decoding: Mapping[str, int], module: Any, batch: Batch
) -> Iterable[Shown]:
    """Return what `shown` reads of a batch for encoder-decoders, which answer greedily."""
    answers = greedy_decode(module, batch["input_ids"], batch["attention_mask"], **decoding)
    wanted = batch["labels"].masked_fill(batch["labels"] == IGNORED, decoding["pad"])
    return zip(read_inputs(batch["input_ids"]), read_answers(wanted), read_answers(answers), strict=True)


def guesses(module: Any, batch: Batch) -> Tensor:
    """Return the class or token that a model finds most likely, [B] or [B, L]."""
    return logits_of(module(**model_inputs(batch, module))).argmax(-1)


def _on_device_of(model: Any, batch: Batch) -> Batch:
    """Return the batch on the device of the model's first parameter; a plain function gets it as it is."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if first is None:
        return batch
    return {name: x.to(first.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
