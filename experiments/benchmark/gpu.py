"""BERT2BERT of BERT-base's size on a GPU, in bfloat16: time of a meta-step, and the largest T that fits.

    python experiments/benchmark/gpu.py --device cuda
    python experiments/benchmark/gpu.py --small --device cpu         # does it run?

Two models of 12+12 layers, hidden size 768, from their config; batches of 8 × 128 tokens, Adam. Each contestant runs in
processes of its own. The largest T is found by doubling and halving, until the device's memory (or `--budget`) is full.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from contestants import BY_NAME
from largest import largest
from machine import describe
from report import number, table
from rich.progress import track
from work import Spec
from worker import started

HERE = Path(__file__).resolve().parent
NAMES = ("plain", "higher", "unrolled", "gradients", "recompute", "host", "host-recompute", "captured-host")


def fits(spec: Spec, name: str, budget: float | None) -> bool:
    """Return whether a hypergradient can be computed, within the budget in bytes if there is one."""
    with started(spec) as process:
        found = process.ask(name, "bytes_held")
    return "value" in found and (budget is None or found["value"] <= budget)


def timed(spec: Spec, names: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Return seconds and bytes of each contestant, or what failed; one after the other, since a GPU is not shared."""
    found = {}
    for name in track(names, description=f"time, T = {spec.num_steps}"):
        with started(spec) as process:
            held = process.ask(name, "bytes_held")  # the first call captures what is captured
            answers = [process.ask(name, "seconds") for _ in range(repeats)] if "value" in held else [held]
        seconds = [answer["value"] for answer in answers if "value" in answer]
        failed = next((answer["failed"] for answer in answers if "failed" in answer), None)
        found[name] = {"bytes": held.get("value"), "seconds": seconds, "failed": failed}
    return found


def show(times: dict[str, dict[str, Any]], most: dict[str, int], num_steps: int) -> str:
    """Return the table."""
    baseline = times.get("higher", {}).get("seconds")
    rows = []
    for name in dict.fromkeys((*times, *most)):
        seconds, held = times.get(name, {}).get("seconds"), times.get(name, {}).get("bytes")
        median = statistics.median(seconds) if seconds else None
        ratio = median / statistics.median(baseline) if median and baseline else None
        told = times.get(name, {}).get("failed") or ""
        size = number(held / 1e9 if held else None, ".3g")
        rows.append([BY_NAME[name].label, number(median), number(ratio), size, str(most.get(name, "–")), told])
    head = ["contestant", f"seconds, T = {num_steps}", "over `higher`", f"GB, T = {num_steps}", "largest T", ""]
    return table(head, rows)


def main() -> None:
    """Measure, print the table, and write gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, a budget of 2 MB")
    parser.add_argument("--steps", type=int, help="T of the times; 4, or 3 if small")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(NAMES), help=", ".join(NAMES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, help="bytes; the device's memory if not given")
    parser.add_argument("--most", type=int, help="where the search for the largest T ends; 512, or 16 if small")
    parser.add_argument("--out", type=Path, default=HERE / "gpu.json")
    options = parser.parse_args()
    steps = options.steps or (3 if options.small else 4)
    budget = options.budget or (2e6 if options.small else None)
    if options.device == "cpu" and budget is None:
        parser.error("on a CPU give --budget, or --small: a process that fills the machine's memory is killed")
    spec = Spec("bert2bert", steps, "adam", device=options.device, autocast=True, small=options.small)
    spec = spec if options.small else replace(spec, hidden=768, layers=12)
    times = timed(spec, options.only, options.repeats)
    searched = [name for name in options.only if name != "plain" and times[name]["seconds"]]
    limit = options.most or (16 if options.small else 512)
    most = {
        name: largest(lambda steps, name=name: fits(replace(spec, num_steps=steps), name, budget), limit)
        for name in track(searched, description="largest T")
    }
    found = {"machine": describe(), "spec": asdict(spec), "times": times, "largest": most, "budget": budget}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(show(times, most, steps))


if __name__ == "__main__":
    main()
