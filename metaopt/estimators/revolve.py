"""Which states to keep of a long training, so that as few of its steps as possible are run again in reverse.

The binomial schedule (Griewank and Walther, 2000, doi:10.1145/347837.347846). With s states and no step run more than r
times, `β(s, r) = (s+r choose s)` steps can be reversed; for l steps, with the least such r, `r·l − β(s+1, r−1)` are run
before one is swept, the first run of them all among these, and no other choice of s states needs fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator


def ahead(num_steps: int, num_states: int) -> int:
    """Return how many of `num_steps` ≥ 2 steps to run from a kept state before the next one is kept.

    `num_states` counts the state that is kept already; with no other to keep, it is all steps but the last.
    """
    if num_states == 1:
        return num_steps - 1
    r = _most_runs(num_steps, num_states)
    # As many as r − 1 runs can reverse with all states, if the rest is enough for r runs with one state fewer.
    return min(math.comb(num_states + r - 1, num_states), num_steps - math.comb(num_states + r - 2, num_states - 1))


def kept_between(start: int, end: int, num_states: int) -> Iterator[int]:
    """Yield which states to keep after that of `start`, on the way to step `end`, which is swept first.

    `num_states` counts the one of `start`.
    """
    for left in range(num_states, 1, -1):
        if start < end:
            start += ahead(end - start + 1, left)
        if start < end:
            yield start


def num_runs(num_steps: int, num_states: int) -> int:
    """Return how many inner steps are run in all, those of the training itself included, before they are swept.

    The training is run to its end before the meta-objective is known: as if that were one more step, swept first.
    """
    r = _most_runs(num_steps + 1, num_states)
    return r * (num_steps + 1) - math.comb(num_states + r, r - 1)


def enough_states(num_steps: int) -> int:
    """Return the fewest states with which no step is run more than twice before it is swept: about √2T."""
    num_states = max(1, math.isqrt(2 * num_steps) - 2)
    while math.comb(num_states + 2, 2) <= num_steps:
        num_states += 1
    return num_states


def _most_runs(num_steps: int, num_states: int) -> int:
    """Return the least r with β(num_states, r) ≥ num_steps: the most often that one of them is run."""
    r = 1
    while math.comb(num_states + r, r) < num_steps:
        r += 1
    return r
