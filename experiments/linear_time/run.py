"""Time of one hypergradient of a BERT2BERT chain against the number of inner steps, beside `higher` by hand.

    python experiments/linear_time/run.py            # T = 10, 20, 40 per stage; about five minutes on one core
    python experiments/linear_time/run.py 5 10       # other T

Both contestants run in one process and by turns, on one thread, with Adam; the ratio within a row is what counts.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable

import higher
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

import metaopt
from metaopt.losses.distillation import soft_label_loss
from metaopt.losses.logits import cross_entropy_per_example, model_inputs

BATCH, LENGTH, VOCABULARY = 8, 16, 40
Batch = dict[str, Tensor]


def bert2bert() -> EncoderDecoderModel:
    """Two BERTs of 2 layers, hidden size 64, with their unused poolers, as transformers builds them."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    half = functools.partial(BertConfig, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes)
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(half(), half()))


def batch() -> Batch:
    tokens = functools.partial(torch.randint, VOCABULARY, (BATCH, LENGTH))
    names = ("input_ids", "decoder_input_ids", "labels")
    return {**{name: tokens() for name in names}, "index": torch.arange(BATCH)}


def by_metaopt(teacher: nn.Module, student: nn.Module, data: Batch, num_steps: int) -> float:
    weights = metaopt.ExampleWeights(num_examples=BATCH)
    adam = functools.partial(torch.optim.Adam, lr=1e-4)
    chain = metaopt.Chain(
        teacher=metaopt.Stage(teacher, adam, metaopt.WeightedLoss(), [data], num_steps),
        student=metaopt.Stage(student, adam, metaopt.Distillation("teacher"), [data], num_steps),
    )
    start = time.perf_counter()
    loss = metaopt.ValidationLoss("student")(chain.unroll(weights), data, weights)
    metaopt.backward(loss, weights)
    return time.perf_counter() - start


def by_hand(teacher: nn.Module, student: nn.Module, data: Batch, num_steps: int) -> float:
    logits = torch.zeros(BATCH, requires_grad=True)
    inputs, labels = model_inputs(data), data["labels"]
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-4) for model in (teacher, student)]
    start = time.perf_counter()
    with (
        sdpa_kernel(SDPBackend.MATH),
        higher.innerloop_ctx(teacher, optimizers[0]) as (first, first_optimizer),
        higher.innerloop_ctx(student, optimizers[1]) as (second, second_optimizer),
    ):
        for _ in range(num_steps):
            losses = cross_entropy_per_example(first(**inputs).logits, labels)
            first_optimizer.step((logits.sigmoid() * losses).mean())
        for _ in range(num_steps):
            second_optimizer.step(soft_label_loss(second(**inputs).logits, first(**inputs).logits, labels, 1.0))
        torch.autograd.grad(cross_entropy_per_example(second(**inputs).logits, labels).mean(), logits)
    return time.perf_counter() - start


def median_times(num_steps: int, repeats: int = 3) -> tuple[float, float]:
    """Return the median seconds of both contestants, run by turns."""
    torch.manual_seed(0)
    data = batch()
    contestants: tuple[Callable[..., float], ...] = (by_metaopt, by_hand)
    times = [[run(bert2bert(), bert2bert(), data, num_steps) for run in contestants] for _ in range(repeats)]
    ours, by_hand_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    return ours, by_hand_seconds


def main() -> None:
    torch.set_num_threads(1)
    median_times(2, repeats=1)  # the first optimizer and the first kernels cost extra
    print(
        f"{'T per stage':>11}  {'metaopt':>9}  {'per step':>9}  {'higher by hand':>14}  {'per step':>9}  {'ratio':>5}"
    )
    for num_steps in [int(argument) for argument in sys.argv[1:]] or [10, 20, 40]:
        ours, hand = median_times(num_steps)
        per = 1e3 / (2 * num_steps)
        print(
            f"{num_steps:>11}  {ours:>7.2f} s  {ours * per:>6.1f} ms  {hand:>12.2f} s  {hand * per:>6.1f} ms  "
            f"{ours / hand:>5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
