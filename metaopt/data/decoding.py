"""Greedy decoding of encoder-decoders: what a model answers, as token ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def greedy_decode(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, bos: int, eos: int, pad: int, max_length: int
) -> Tensor:
    """Return the most probable next token, step by step, until every answer has ended.

    Args:
        model: an encoder-decoder; its mode (train, eval) is left as it is.
        input_ids, attention_mask: [B, L].
        bos, eos, pad: the tokens that begin, end and fill an answer.
        max_length: tokens of an answer, the end token included.

    Returns:
        [B, max_length] without the begin token; `pad` after the end token.
    """
    encoded = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)  # type: ignore[operator]
    answers = torch.full((len(input_ids), max_length + 1), pad, device=input_ids.device)
    answers[:, 0] = bos
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for end in range(1, max_length + 1):
        output = model(encoder_outputs=encoded, attention_mask=attention_mask, decoder_input_ids=answers[:, :end])
        following = output.logits[:, -1].argmax(-1)
        answers[:, end] = torch.where(running, following, pad)
        running &= following != eos
        if not bool(running.any()):
            break
    return answers[:, 1:]
