"""What a meta-step costs with one weight per example, from a thousand to a million examples, dense and sparse.

    python experiments/sparse_weights/measure.py

Each row is measured in a process of its own. Time is the median of the meta-steps after the first three; memory is what
the process gained at its peak over what it held before the meta-parameters were made.
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


def measure(num_examples: int, sparse: bool) -> dict[str, float]:
    """Return milliseconds per meta-step and megabytes gained, of a one-stage chain."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    loss, data = metaopt.WeightedLoss(), batches(num_examples, 100)
    stage = metaopt.Stage(MLP(FEATURES, [64], 10), sgd, loss, data, INNER_STEPS, seed=0)
    chain, objective, validation = metaopt.Chain(model=stage), metaopt.ValidationLoss("model"), batches(1, 1)
    small = metaopt.ExampleWeights(num_examples=1)  # what torch itself loads at the first meta-step is not counted
    at_zero = [{**batch, "index": torch.zeros_like(batch["index"])} for batch in batches(1, 1)]
    rehearsal = metaopt.Chain(model=metaopt.Stage(MLP(FEATURES, [64], 10), sgd, loss, at_zero, INNER_STEPS))
    metaopt.backward(objective(rehearsal.unroll(small), validation[0], small), small)
    torch.optim.Adam(small.parameters()).step()
    before = peak()
    weights = metaopt.ExampleWeights(num_examples, sparse=sparse)
    kind = torch.optim.SparseAdam if sparse else torch.optim.Adam
    trainer = metaopt.MetaTrainer(chain, objective, weights, kind(weights.parameters(), lr=0.1), validation, seed=0)
    seconds = []
    for _ in range(META_STEPS):
        began = time.perf_counter()
        trainer.meta_step()
        seconds.append(time.perf_counter() - began)
    return {"milliseconds": 1000 * statistics.median(seconds[3:]), "megabytes": peak() - before}


def peak() -> float:
    """Return the largest resident size of this process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], metavar="N")
    parser.add_argument("--one", nargs=2, metavar=("N", "SPARSE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(int(chosen.one[0]), chosen.one[1] == "1")))
        return
    print(f"{'examples':>10}  {'gradient':<8}  {'ms per meta-step':>16}  {'MB gained':>9}")
    for size in chosen.sizes:
        for sparse in (False, True):
            line = [sys.executable, __file__, "--one", str(size), str(int(sparse))]
            found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
            name = "sparse" if sparse else "dense"
            print(f"{size:>10}  {name:<8}  {found['milliseconds']:>16.1f}  {found['megabytes']:>9.1f}")


if __name__ == "__main__":
    main()
