"""The largest T under a cap on memory, by running: doubling until a training no longer fits, then halving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from work import Spec
from worker import started

CAPS = {"mlp": 64e6, "bert2bert": 256e6}  # bytes that a process may grow by
MOST = {"mlp": 3200, "bert2bert": 400}  # where the search ends, for time's sake


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest T that fits, within a tenth below; `most` if that fits, 0 if T = 1 does not."""
    low, high = 0, 1
    while fits(high):
        if high == most:
            return most
        low, high = high, min(2 * high, most)
    while high - low > max(1, low // 10):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def grows_by_at_most(cap: float, spec: Spec, name: str) -> bool:
    """Return whether a fresh process grows by at most so many bytes during a call; one that grows further is ended."""
    with started(spec) as process:
        if "failed" in process.ask(name, "weight_bytes"):
            return False
        found = process.ask(name, "resident", cap)
    return found.get("value", cap + 1) <= cap


def largest_resident(spec: Spec, name: str, cap: float, most: int) -> int:
    """Return the largest T for which a fresh process grows by at most `cap` bytes."""
    return largest(lambda steps: grows_by_at_most(cap, replace(spec, num_steps=steps), name), most)
