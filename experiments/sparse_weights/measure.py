"""What a meta-step costs with wide meta-parameters: ten million example weights, a network of 10^5, or next to none.

    python experiments/sparse_weights/measure.py

Each row is measured in a process of its own. Time is processor time, the median of the meta-steps after the first
three; memory is what the process gained at its peak over what it held before the meta-parameters were made.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

import metaopt
from metaopt.models.small import MLP

FEATURES, BATCH, INNER_STEPS, META_STEPS = 64, 64, 5, 33


def batches(num_examples: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Random batches whose examples are spread over the whole table."""
    return [
        {
            "inputs": torch.randn(BATCH, FEATURES),
            "labels": torch.randint(10, (BATCH,)),
            "index": torch.randint(num_examples, (BATCH,)),
        }
        for _ in range(count)
    ]


def measure(num_examples: int, kind: str, inner_steps: int = INNER_STEPS) -> dict[str, float]:
    """Return milliseconds per meta-step and megabytes gained, of a one-stage chain."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    loss, data = metaopt.WeightedLoss(), batches(num_examples, 100)
    stage = metaopt.Stage(MLP(FEATURES, [64], 10), sgd, loss, data, inner_steps, seed=0)
    chain, objective, validation = metaopt.Chain(model=stage), metaopt.ValidationLoss("model"), batches(1, 1)
    small = metaopt.ExampleWeights(num_examples=1)  # what torch itself loads at the first meta-step is not counted
    at_zero = [{**batch, "index": torch.zeros_like(batch["index"])} for batch in batches(1, 1)]
    rehearsal = metaopt.Chain(model=metaopt.Stage(MLP(FEATURES, [64], 10), sgd, loss, at_zero, INNER_STEPS))
    metaopt.backward(objective(rehearsal.unroll(small), validation[0], small), small)
    torch.optim.Adam(small.parameters()).step()
    before = peak()
    network = metaopt.WeightNetwork(hidden_size=num_examples // 3) if kind == "network" else None
    weights = network or metaopt.ExampleWeights(num_examples, sparse=kind == "sparse")
    optimizer = (torch.optim.SparseAdam if kind == "sparse" else torch.optim.Adam)(weights.parameters(), lr=0.1)
    trainer = metaopt.MetaTrainer(chain, objective, weights, optimizer, validation, seed=0)
    seconds = []
    for _ in range(META_STEPS):
        began = time.process_time()
        trainer.meta_step()
        seconds.append(time.process_time() - began)
    return {"milliseconds": 1000 * statistics.median(seconds[3:]), "megabytes": peak() - before}


def peak() -> float:
    """Return the largest resident size of this process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 1_000_000, 10_000_000], metavar="N")
    parser.add_argument("--steps", type=int, nargs="+", default=[INNER_STEPS, 4 * INNER_STEPS], metavar="T")
    parser.add_argument("--one", nargs=3, metavar=("N", "KIND", "T"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(int(chosen.one[0]), chosen.one[1], int(chosen.one[2]))))
        return
    rows = [(size, kind) for size in chosen.sizes for kind in ("dense", "sparse")] + [(100_000, "network")]
    print(f"{'numbers':>10}  {'gradient':<8}  {'T':>3}  {'ms per meta-step':>16}  {'MB gained':>9}")
    for size, kind in rows:
        for steps in chosen.steps:
            line = [sys.executable, __file__, "--one", str(size), kind, str(steps)]
            found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
            cost = f"{found['milliseconds']:>16.1f}  {found['megabytes']:>9.1f}"
            print(f"{size:>10}  {kind:<8}  {steps:>3}  {cost}", flush=True)


if __name__ == "__main__":
    main()
