"""What is kept of an inner loop so that its steps can be rebuilt in reverse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from metaopt.errors import ConfigError, did_you_mean
from metaopt.inner_loop import InnerLoop, PlainSteps, Upstream
from metaopt.meta_params import AnyMetaParameters
from metaopt.optimizers import State

Kept = Literal["states", "gradients", "recompute"]
KEPT: tuple[Kept, ...] = ("states", "gradients", "recompute")
Gradients = dict[str, Tensor | None]


@dataclass
class StepRecord:
    """An inner step as it was: weights, optimizer state and buffers before it, and its raw gradient if kept."""

    params: dict[str, Tensor]
    state: State
    buffers: dict[str, Tensor]
    gradient: Gradients | None = None


class Tape:
    """The stored steps of one inner loop; `rebuild(t)` gives a step back, from the last to the first.

    `states` keeps every step's weights and optimizer state. `gradients` keeps every step's gradient and a state every
    √T steps, from which the states between are rebuilt by elementwise updates. `recompute` keeps a state every √T
    steps only, and computes the gradients between anew.

    Args:
        kept: which of the three.
        loop, meta_params, upstream: what is run; meta-parameters and upstream weights outside the graph.
        first: the first step that will be rebuilt; nothing is kept of those before.
    """

    def __init__(
        self, kept: Kept, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream, first: int = 0
    ) -> None:
        if kept not in KEPT:
            raise ConfigError(f"store: there is no {kept!r}{did_you_mean(kept, KEPT)}")
        self._kept, self._loop, self._meta_params, self._upstream = kept, loop, meta_params, upstream
        self._first = first
        self._every = 1 if kept == "states" else max(1, math.isqrt(max(loop.num_steps - first - 1, 0)) + 1)
        self._records: dict[int, StepRecord] = {}
        self._gradients: dict[int, Gradients] = {}
        self._buffers: dict[int, dict[str, Tensor]] = {}
        self._segment: dict[int, StepRecord] = {}

    def record(self, t: int, steps: PlainSteps) -> None:
        """Keep what is needed of the state before step t."""
        if t >= self._first and (t - self._first) % self._every == 0:
            self._records[t] = StepRecord(steps.weights(), steps.state(), steps.buffers)

    def record_gradient(self, t: int, gradient: Gradients, buffers: dict[str, Tensor]) -> None:
        """Keep the raw gradient of step t and the buffers before it, if this store keeps gradients."""
        if t >= self._first and self._kept == "gradients":
            self._gradients[t], self._buffers[t] = gradient, buffers

    def rebuild(self, t: int) -> StepRecord:
        """Return step t as it was."""
        if t not in self._segment:
            self._segment = self._run_segment(t)
        return self._segment.pop(t)

    def _run_segment(self, t: int) -> dict[int, StepRecord]:
        start = self._first + (t - self._first) // self._every * self._every
        record = self._records[start]
        segment = {start: record}
        steps = PlainSteps(self._loop, record.params, record.state, record.buffers, self._meta_params, self._upstream)
        for s in range(start, t):
            if self._kept == "gradients":
                segment[s].gradient, steps.buffers = self._gradients[s], self._buffers[s + 1]
                steps.update(s, self._gradients[s])
            else:
                steps.update(s, steps.gradient(s)[1])
            segment[s + 1] = StepRecord(steps.weights(), steps.state(), steps.buffers)
        segment[t].gradient = self._gradients.get(t)
        return segment
