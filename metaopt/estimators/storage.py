"""What is kept of an inner loop so that its steps can be rebuilt in reverse, and where; `auto` chooses by a budget."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.core.inner_loop import InnerLoop
from metaopt.core.plain import PlainSteps
from metaopt.core.view import Tensors
from metaopt.estimators.places import PLACES, Place, PlaceName, make_place, put_tree
from metaopt.optimizers.rule import State

log = logging.getLogger("metaopt")
Kept = Literal["states", "gradients", "recompute"]
KEPT: tuple[Kept, ...] = ("states", "gradients", "recompute")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Gradients = dict[str, Tensor | None]
# weights, optimizer state, buffers → steps from there
StepsFrom = Callable[[Mapping[str, Tensor], State, Tensors], PlainSteps]


@dataclass
class Storage:
    """What an estimator was asked to keep of the steps, and where: see `Checkpointed`.

    Raises:
        ConfigError: an unknown name, or options that do not go together.
    """

    store: Kept | str = "gradients"
    place: PlaceName = "device"
    budget: int | str | None = None
    folder: str | Path | None = None
    chosen: dict[str, tuple[Kept, PlaceName]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        auto = self.store == "auto"
        if not auto and self.store not in KEPT:
            raise ConfigError(f"store={self.store!r}{did_you_mean(str(self.store), (*KEPT, 'auto'))}")
        if self.place not in PLACES:
            raise ConfigError(f"place={self.place!r}{did_you_mean(self.place, PLACES)}")
        if auto != (self.budget is not None):
            raise ConfigError(
                f"store={self.store!r}, budget={self.budget!r}: auto needs a budget and no other store reads one; "
                "write Checkpointed(store='auto', budget='2 GB')"
            )
        if auto and self.place != "device":
            raise ConfigError(f"store='auto' chooses the place too; leave out place={self.place!r}")
        self._bytes = parse_bytes(self.budget) if self.budget is not None else None

    def __str__(self) -> str:
        beside = f", budget={self.budget!r}" if self.budget is not None else ""
        return f"store={self.store!r}, place={self.place!r}{beside}"

    def tape(self, loop: InnerLoop, steps_from: StepsFrom, first: int, with_gradients: bool) -> Tape:
        """Return an empty tape for the steps of a loop from `first` on."""
        kept, place = self.store, self.place
        if self._bytes is not None:
            kept, place = self._choose(loop, loop.num_steps - first, steps_from, self._bytes)
        return Tape(
            kept, make_place(place, loop.device, self.folder), loop.num_steps, steps_from, first, with_gradients
        )

    def _choose(self, loop: InnerLoop, num_steps: int, steps_from: StepsFrom, budget: int) -> tuple[Kept, PlaceName]:
        key = f"{loop.name} ({num_steps} steps)"
        if key not in self.chosen:
            params = {name: loop.structure.params[name] for name in loop.rule.names}
            steps = steps_from(params, loop.rule.initial_state(), loop.start_buffers())
            steps.update(0, steps.gradient(0)[1])  # most optimizers have no state before
            weights = num_bytes(steps.weights())
            state = weights + num_bytes(steps.state()) + num_bytes(steps.buffers)
            options = list(_options(num_steps, weights, state, loop.device.type))
            fits = [option for option in options if option[2] <= budget]
            if not fits:
                raise ConfigError(
                    f"stage {loop.name!r}: budget={self.budget!r} is less than the {min(o[2] for o in options):,} "
                    f"bytes that {num_steps} steps take at least; raise the budget, or take fewer inner steps"
                )
            kept, place, size = fits[0]
            self.chosen[key] = (kept, place)
            log.info(
                "stage %r, %d steps, budget %s: store=%s on %s, %.3g MB on the device",
                loop.name, num_steps, self.budget, kept, place, size / 1e6,
            )  # fmt: skip
        return self.chosen[key]


def _options(num_steps: int, weights: int, state: int, device: str) -> Iterator[tuple[Kept, PlaceName, int]]:
    """Yield what can be kept and where, with its bytes on the device, the quickest first."""
    segment = spacing(num_steps)
    kept_states = -(-num_steps // segment)
    yield "states", "device", num_steps * state
    yield "gradients", "device", num_steps * weights + (kept_states + segment) * state
    if device == "cuda":
        yield "gradients", "host", segment * (state + weights)
    yield "recompute", "device", (kept_states + segment) * state
    if device == "cuda":
        yield "recompute", "host", segment * state
    yield "gradients", "disk", segment * (state + weights)
    yield "recompute", "disk", segment * state


def num_bytes(tree: object) -> int:
    """Return the bytes of the tensors in a nested structure."""
    return sum(x.nbytes for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


def parse_bytes(budget: int | str) -> int:
    """Return bytes from a number, or from a text such as `"2 GB"` or `"500 MiB"`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmg]?i?b)?\s*", str(budget), re.IGNORECASE)
    size = float(found[1]) * UNITS.get((found[2] or "B").upper(), 0) if found else 0.0
    if size < 1:
        raise ConfigError(f"budget={budget!r} is no number of bytes; write 500000000, '500 MB' or '2 GiB'")
    return int(size)


def spacing(num_steps: int) -> int:
    """Return how many steps lie between two kept states: √2T, which is best where two stages keep states at once."""
    return math.isqrt(2 * num_steps - 1) + 1 if num_steps > 1 else 1


@dataclass
class StepRecord:
    """An inner step as it was: weights, optimizer state and buffers before it, its raw gradient and loss if known."""

    params: Tensors
    state: State
    buffers: Tensors
    gradient: Gradients | None = None
    loss: Tensor | None = None


class Tape:
    """The stored steps of one inner loop; `rebuild(t)` gives a step back, from the last to the first.

    `states` keeps every step's weights and optimizer state. `gradients` keeps every step's gradient and a state every
    √2T steps, from which the states between are rebuilt by elementwise updates. `recompute` keeps a state every √2T
    steps only, and computes the gradients between anew.

    Args:
        kept, place: which of the three, and where it lies.
        num_steps, steps_from: of the loop; how to go on from a kept state.
        first: the first step that will be rebuilt; nothing is kept of those before.
        with_gradients: give back the gradients too that had to be computed to rebuild the states.
    """

    def __init__(
        self, kept: Kept | str, place: Place, num_steps: int, steps_from: StepsFrom, first: int, with_gradients: bool
    ) -> None:
        self._place, self._steps_from, self._first = place, steps_from, first
        self._keeps_gradients = kept == "gradients"
        self._gives_gradients = with_gradients or self._keeps_gradients
        self._every = 1 if kept == "states" else spacing(num_steps - first)
        self._records: dict[int, Callable[[], Any]] = {}
        self._gradients: dict[int, Callable[[], Any]] = {}
        self._buffers: dict[int, Tensors] = {}  # small, and shared between steps that do not move them
        self._segment: dict[int, StepRecord] = {}

    def record(self, t: int, steps: PlainSteps) -> None:
        """Keep what is needed of the state before step t."""
        if t >= self._first and (t - self._first) % self._every == 0:
            self._records[t] = put_tree(self._place, (steps.weights(), steps.state(), steps.buffers))

    def record_gradient(self, t: int, gradient: Gradients, buffers: Tensors) -> None:
        """Keep the raw gradient of step t and the buffers before it, if this store keeps gradients."""
        if t >= self._first and self._keeps_gradients:
            self._gradients[t], self._buffers[t] = put_tree(self._place, gradient), buffers

    def rebuild(self, t: int, free: bool) -> StepRecord:
        """Return step t as it was; those after it have been asked for before, and are forgotten with it if `free`."""
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
        steps = self._steps_from(record.params, record.state, record.buffers)
        for s in range(start, t):
            gradient = self._gradients[s]() if s in self._gradients else steps.gradient(s)[1]
            steps.update(s, gradient)
            after = self._buffers.get(s + 1, steps.buffers)
            segment[s + 1] = StepRecord(steps.weights(), steps.state(), after)
            if self._gives_gradients:
                segment[s].gradient = gradient
        if t in self._gradients:
            segment[t].gradient = self._gradients[t]()
        return segment
