"""A pair of small networks trained for many steps, in a process of its own: what one hypergradient takes.

    python long_training.py '{"num_states": 64}' 1000 200 200

prints, for each number of steps in turn, the inner steps run per step of the training, the processor time per step in
seconds, and the peak of the resident size in bytes above that at the start, as one line of JSON.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from typing import Any

import torch

import metaopt
from metaopt.core.plain import PlainSteps
from metaopt.diagnostics.meters import resident_peak
from metaopt.models.small import MLP

FEATURES, CLASSES, SIZE, EXAMPLES = 16, 4, 16, 320
MOMENTUM = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)


def batches() -> list[dict[str, torch.Tensor]]:
    """Twenty of them, which the stages cast to float64 and go through again and again."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(EXAMPLES, FEATURES), torch.randint(CLASSES, (EXAMPLES,))
    parts = zip(inputs.split(SIZE), labels.split(SIZE), torch.arange(EXAMPLES).split(SIZE), strict=True)
    return [{"inputs": x, "labels": y, "index": i} for x, y, i in parts]


def hypergradient(num_steps: int, **options: Any) -> torch.Tensor:
    """That of the example weights, through teacher and student."""
    data = batches()
    weights = metaopt.ExampleWeights(EXAMPLES).double()

    def stage(loss: Any) -> metaopt.Stage:
        model = MLP(FEATURES, (16,), CLASSES).double()
        estimator = metaopt.Checkpointed(**options)
        return metaopt.Stage(model, MOMENTUM, loss, data, num_steps, estimator, seed=1)

    chain = metaopt.Chain(teacher=stage(metaopt.WeightedLoss()), student=stage(metaopt.Distillation("teacher")))
    loss = metaopt.ValidationLoss("student")(chain.unroll(weights), chain.move(data[0]), weights)
    return metaopt.hypergradient(loss, weights)["logits"]


def counted() -> list[int]:
    """Let every gradient of a plain inner step be counted from here on; the count is the list's one number."""
    count, gradient = [0], PlainSteps.gradient

    def counting(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return gradient(*args, **kwargs)

    PlainSteps.gradient = counting
    return count


def main(options: str, *lengths: str) -> None:
    """See above."""
    torch.set_num_threads(1)
    runs = counted()
    hypergradient(20, **json.loads(options))  # what is made once
    for num_steps in map(int, lengths):
        runs[0], start = 0, time.process_time()
        peak = resident_peak(functools.partial(hypergradient, num_steps, **json.loads(options)))
        seconds = time.process_time() - start
        print(json.dumps({"runs": runs[0] / 2 / num_steps, "seconds": seconds / num_steps, "peak": peak}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
