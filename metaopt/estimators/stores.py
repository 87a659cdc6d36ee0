"""What is kept of an inner loop so that its steps can be rebuilt in reverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from metaopt.core.contracts import Upstream
from metaopt.core.inner_loop import InnerLoop
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.plain import PlainSteps
from metaopt.estimators.places import Place, put_tree
from metaopt.optimizers.flattened import State

Kept = Literal["states", "gradients", "recompute"]
KEPT: tuple[Kept, ...] = ("states", "gradients", "recompute")
Gradients = dict[str, Tensor | None]


@dataclass
class StepRecord:
    """An inner step as it was: weights, optimizer state and buffers before it, its raw gradient and loss if known."""

    params: dict[str, Tensor]
    state: State
    buffers: dict[str, Tensor]
    gradient: Gradients | None = None
    loss: Tensor | None = None


class Tape:
    """The stored steps of one inner loop; `rebuild(t)` gives a step back, from the last to the first.

    `states` keeps every step's weights and optimizer state. `gradients` keeps every step's gradient and a state every
    √2T steps, from which the states between are rebuilt by elementwise updates. `recompute` keeps a state every √2T
    steps only, and computes the gradients between anew.

    Args:
        kept: which of the three.
        place: where it lies.
        loop, meta_params, upstream: what is run; meta-parameters and upstream weights outside the graph.
        first: the first step that will be rebuilt; nothing is kept of those before.
        with_gradients: give back the gradients too that had to be computed to rebuild the states.
    """

    def __init__(
        self,
        kept: Kept,
        place: Place,
        loop: InnerLoop,
        meta_params: AnyMetaParameters,
        upstream: Upstream,
        first: int = 0,
        with_gradients: bool = False,
    ) -> None:
        self._kept, self._place, self._first = kept, place, first
        self._with_gradients = with_gradients or kept == "gradients"
        self._loop, self._meta_params, self._upstream = loop, meta_params, upstream
        self._every = 1 if kept == "states" else spacing(loop.num_steps - first)
        self._records: dict[int, Callable[[], Any]] = {}
        self._gradients: dict[int, Callable[[], Any]] = {}
        self._buffers: dict[int, dict[str, Tensor]] = {}  # small, and shared between steps that do not move them
        self._segment: dict[int, StepRecord] = {}

    def record(self, t: int, steps: PlainSteps) -> None:
        """Keep what is needed of the state before step t."""
        if t >= self._first and (t - self._first) % self._every == 0:
            self._records[t] = put_tree(self._place, (steps.weights(), steps.state(), steps.buffers))

    def record_gradient(self, t: int, gradient: Gradients, buffers: dict[str, Tensor]) -> None:
        """Keep the raw gradient of step t and the buffers before it, if this store keeps gradients."""
        if t >= self._first and self._kept == "gradients":
            self._gradients[t], self._buffers[t] = put_tree(self._place, gradient), buffers

    def rebuild(self, t: int, free: bool) -> StepRecord:
        """Return step t as it was.

        Args:
            t: the step; those after it have been asked for before.
            free: forget it and all steps after it, since they will not be asked for again.
        """
        if t not in self._segment:
            self._segment = self._run_segment(t)
        if free:
            for kept in (self._records, self._gradients, self._buffers):
                for s in [s for s in kept if s >= t]:
                    del kept[s]
        return self._segment.pop(t)

    def _run_segment(self, t: int) -> dict[int, StepRecord]:
        start = self._first + (t - self._first) // self._every * self._every
        record = StepRecord(*self._records[start]())
        segment = {start: record}
        steps = PlainSteps(self._loop, record.params, record.state, record.buffers, self._meta_params, self._upstream)
        for s in range(start, t):
            gradient = self._gradients[s]() if s in self._gradients else steps.gradient(s)[1]
            steps.update(s, gradient)
            after = self._buffers.get(s + 1, steps.buffers)
            segment[s + 1] = StepRecord(steps.weights(), steps.state(), after)
            if self._with_gradients:
                segment[s].gradient = gradient
        if t in self._gradients:
            segment[t].gradient = self._gradients[t]()
        return segment


def spacing(num_steps: int) -> int:
    """Return how many steps lie between two kept states: √2T, which is best where two stages keep states at once."""
    return max(1, math.isqrt(max(2 * num_steps - 1, 0)) + 1) if num_steps > 1 else 1
