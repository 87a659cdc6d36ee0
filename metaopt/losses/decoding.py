"""Greedy decoding, and what is measured with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError
from metaopt.core.view import FunctionalModel
from metaopt.losses.logits import IGNORED, logits_of, model_inputs

Batch = Mapping[str, Tensor]


@contextmanager
def evaluating(model: Any) -> Iterator[Callable[..., Any]]:
    """Lend a module or a trained model in eval mode and without a graph; the mode it had comes back on leaving."""
    if isinstance(model, FunctionalModel):
        with torch.no_grad(), model.eval().as_module() as module:
            yield module
        return
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode


def to_model(batch: Batch, model: Any) -> dict[str, Tensor]:
    """Return the batch on the device of the model's first parameter; a plain function gets it as it is."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if first is None:
        return dict(batch)
    return {name: x.to(first.device) if isinstance(x, Tensor) else x for name, x in batch.items()}


@torch.no_grad()
def greedy_decode(
    model: Callable[..., Any],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    bos: int,
    eos: int,
    pad: int,
    max_length: int,
) -> Tensor:
    """Return the tokens that a sequence-to-sequence model finds most likely, one after the other.

    A Hugging Face encoder-decoder encodes its inputs once; anything else that is called
    `model(input_ids=, attention_mask=, decoder_input_ids=)` is called whole for every token.

    Args:
        model: in the mode in which it shall answer.
        input_ids, attention_mask: [B, L].
        bos, eos, pad: the tokens that begin an answer, end it, and fill what follows the end.
        max_length: tokens of an answer, the end token included.

    Returns:
        [B, max_length], without the begin token.
    """
    if max_length < 1:
        raise ConfigError(f"greedy_decode: max_length={max_length} must be at least 1")
    next_logits = _next_token_logits(model, input_ids, attention_mask)
    answers = input_ids.new_full((len(input_ids), max_length + 1), pad)
    answers[:, 0] = bos
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for length in range(1, max_length + 1):
        tokens = next_logits(answers[:, :length]).argmax(-1)
        answers[:, length] = torch.where(running, tokens, pad)
        running = running & (tokens != eos)
        if not running.any():
            break
    return answers[:, 1:]


def _next_token_logits(
    model: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Return the function from an answer so far [B, L] to the logits of its next token [B, V]."""
    config = getattr(model, "config", None)
    inputs: dict[str, Any] = {"attention_mask": attention_mask}
    if isinstance(model, nn.Module) and getattr(config, "is_encoder_decoder", False):
        encoder: Any = model.get_encoder()  # pyright: ignore[reportCallIssue]
        inputs["encoder_outputs"] = encoder(input_ids=input_ids, attention_mask=attention_mask)
        inputs["use_cache"] = False  # the answers are short: filling a cache costs more than it saves
    else:
        inputs["input_ids"] = input_ids
    return lambda answers: logits_of(model(**inputs, decoder_input_ids=answers))[:, -1]


def sequence_score(
    model: Any, batches: Iterable[Batch], *, bos: int, eos: int, pad: int, max_length: int
) -> dict[str, float]:
    """Score a sequence-to-sequence model on labelled batches, in eval mode.

    Returns:
        `exact_match`, the fraction of examples whose greedy answer is right in every token, and `token_accuracy`,
        the fraction of tokens that are right when all tokens before are the right ones.
    """
    right, examples, right_tokens, tokens = 0, 0, 0, 0
    with evaluating(model) as module:
        for batch in batches:
            batch = to_model(batch, module)
            labels, counts = batch["labels"], batch["labels"] != IGNORED
            guesses = logits_of(module(**model_inputs(batch, module))).argmax(-1)
            right_tokens += int(((guesses == labels) & counts).sum())
            tokens += int(counts.sum())
            inputs = batch["input_ids"], batch.get("attention_mask")
            answers = greedy_decode(module, *inputs, bos, eos, pad, max(max_length, labels.shape[1]))
            wanted = torch.nn.functional.pad(
                labels.masked_fill(~counts, pad), (0, answers.shape[1] - labels.shape[1]), value=pad
            )
            right += int((answers == wanted).all(1).sum())
            examples += len(labels)
    if not examples:
        raise ConfigError("score: there is not a single batch to score; give the stream itself, not a spent iterator")
    return {"exact_match": right / examples, "token_accuracy": right_tokens / max(tokens, 1)}


def accuracy_score(model: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Return `accuracy` of a classifier on labelled batches, in eval mode: the fraction of right labels."""
    right, examples = 0, 0
    with evaluating(model) as module:
        for batch in batches:
            batch = to_model(batch, module)
            guesses = logits_of(module(**model_inputs(batch, module))).argmax(-1)
            right += int((guesses == batch["labels"]).sum())
            examples += len(batch["labels"])
    if not examples:
        raise ConfigError("score: there is not a single batch to score; give the stream itself, not a spent iterator")
    return {"accuracy": right / examples}
