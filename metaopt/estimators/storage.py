"""What is kept of an inner loop so that its steps can be rebuilt in reverse, and where; `auto` chooses by a budget."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import check_counts
from metaopt.core.contracts import Gradients
from metaopt.core.inner_loop import InnerLoop
from metaopt.core.plain import PlainSteps
from metaopt.core.view import Tensors
from metaopt.estimators.places import PLACES, Place, PlaceName, make_place, on_device, put_tree
from metaopt.estimators.revolve import enough_states, kept_between, num_runs
from metaopt.optimizers.rule import State

log = logging.getLogger("metaopt")
Kept = Literal["states", "gradients", "recompute"]
KEPT: tuple[Kept, ...] = ("states", "gradients", "recompute")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# For how many plain inner steps `auto` takes it to move a state off the device and back. On a CPU a file of 0.1 MB took
# 9, of 2 MB 0.1, and of 1.3 GB 0.03: rather many, as no budget bounds the disk. On an accelerator they are guesses.
MOVED: dict[str, dict[PlaceName, float]] = {"cpu": {"disk": 4.0}, "cuda": {"host": 2.0, "disk": 20.0}}
# weights, optimizer state, buffers → steps from there
StepsFrom = Callable[[Mapping[str, Tensor], State, Tensors], PlainSteps]


class Plan(NamedTuple):
    """What is kept and where, and the most states on the device, beside that of the step in hand."""

    kept: Kept | str
    place: PlaceName
    num_states: int


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
    num_states: int | None = None
    chosen: dict[str, Plan] = field(default_factory=dict, compare=False)

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
        if self.num_states is not None:
            check_counts("Checkpointed", num_states=self.num_states)
            if self.store not in ("gradients", "recompute"):
                does = "chooses num_states too" if auto else "keeps the state of every step"
                raise ConfigError(
                    f"store={self.store!r} {does}; leave out num_states={self.num_states}, or write store='recompute'"
                )
        self._bytes = parse_bytes(self.budget) if self.budget is not None else None

    def __str__(self) -> str:
        given = {"budget": self.budget, "num_states": self.num_states}
        beside = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
        return f"store={self.store!r}, place={self.place!r}{beside}"

    def tape(self, loop: InnerLoop, steps_from: StepsFrom, first: int, with_gradients: bool) -> Tape:
        """Return an empty tape for the steps of a loop from `first` on."""
        num_steps = loop.num_steps - first
        if self._bytes is not None:
            plan = self._choose(loop, num_steps, steps_from, with_gradients, self._bytes)
        else:
            every = num_steps if self.store == "states" else enough_states(num_steps)
            plan = Plan(self.store, self.place, self.num_states or every)
        place = make_place(plan.place, loop.device, self.folder)
        return Tape(plan.kept, place, plan.num_states, loop.num_steps, steps_from, first, with_gradients)

    def _choose(
        self, loop: InnerLoop, num_steps: int, steps_from: StepsFrom, with_gradients: bool, budget: int
    ) -> Plan:
        key = f"{loop.name} ({num_steps} steps)"
        if key not in self.chosen:
            params = {name: loop.structure.params[name] for name in loop.rule.names}
            steps = steps_from(params, loop.rule.initial_state(), loop.start_buffers())
            steps.update(0, steps.gradient(0)[1])  # most optimizers have no state before
            weights = num_bytes(steps.weights())
            state = weights + num_bytes(steps.state()) + num_bytes(steps.buffers)
            sizes = Sizes(num_steps, weights, state, state + weights if with_gradients else state)
            found = list(options(sizes, loop.device.type, budget))
            fits = [option for option in found if option.size <= budget]
            if not fits:
                raise ConfigError(
                    f"stage {loop.name!r}: budget={self.budget!r} is less than the {min(o.size for o in found):,} "
                    "bytes that any number of inner steps takes; raise the budget"
                )
            plan, size, cost = min(fits, key=lambda option: option.cost)
            self.chosen[key] = plan
            log.info(
                "stage %r, %d steps, budget %s: store=%s on %s, %d states and %.3g MB on the device, %.3g times plain",
                loop.name, num_steps, self.budget, *plan, size / 1e6, cost,
            )  # fmt: skip
        return self.chosen[key]


class Sizes(NamedTuple):
    """Of a stage's stored steps: how many, and the bytes of weights, of a state, and of a state that is kept."""

    num_steps: int
    weights: int
    state: int
    kept: int

    def room(self, budget: int, beside: int = 0) -> int:
        """Return how many states can be kept in a budget, beside those in hand and some more bytes; at least 1."""
        return max(1, min((budget - self.in_hand - beside) // self.kept, self.num_steps))

    @property
    def in_hand(self) -> int:
        """Bytes of the state that is run on from a kept one, and of the copy that a step is swept from."""
        return 2 * self.state


class Option(NamedTuple):
    """A plan, its bytes on the device, and what it costs, in plain trainings."""

    plan: Plan
    size: int
    cost: float


def options(sizes: Sizes, device: str, budget: int) -> Iterator[Option]:
    """Yield what can be kept and where, with as many states on the device as a budget in bytes has room for."""
    steps, weights, state, kept = sizes
    enough, room, hand = enough_states(steps), sizes.room(budget), sizes.in_hand
    yield Option(Plan("states", "device", steps), steps * state, 4)
    yield Option(Plan("gradients", "device", enough), hand + steps * weights + enough * state, 4)
    yield Option(Plan("recompute", "device", room), hand + room * kept, 3 + num_runs(steps, room) / steps)
    for place, moved in MOVED.get(device, MOVED["cpu"]).items():
        few = min(enough, sizes.room(budget, beside=weights))
        moves = moved * (weights / state + 1 / (few + 1))
        yield Option(Plan("gradients", place, few), hand + weights + few * state, 4 + moves)
        few = min(enough, room)
        yield Option(Plan("recompute", place, few), hand + few * kept, 5 + moved / (few + 1))


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


@dataclass
class StepRecord:
    """An inner step as it was: weights, optimizer state and buffers before it, its raw gradient and loss if known.

    `handed` are, in a trace, its hyperparameters, and those of them that are learned, by what their cotangents are for.
    """

    params: Mapping[str, Tensor]
    state: State
    buffers: Tensors
    gradient: Gradients | None = None
    loss: Tensor | None = None
    handed: tuple[Mapping[str, Any], dict[Any, Tensor]] | None = None


class Tape:
    """The stored steps of one inner loop; `rebuild(t)` gives a step back, from the last to the first.

    On the device, states are kept by the schedule of `revolve`, and the steps between are run again from them; a step
    whose gradient is kept is run again by its update alone. Elsewhere than on the device lie the gradients, and a state
    every few steps: so few that each is run again only once, with the states between on the device.

    Args:
        kept, place: what is kept, and where it lies.
        num_states: the most states on the device, beside that of the step in hand.
        num_steps, steps_from: of the loop; how to go on from a kept state.
        first: the first step that will be rebuilt; nothing is kept of those before.
        with_gradients: give back the gradients too that had to be computed to rebuild the states.
    """

    def __init__(
        self,
        kept: Kept | str,
        place: Place,
        num_states: int,
        num_steps: int,
        steps_from: StepsFrom,
        first: int,
        with_gradients: bool,
    ) -> None:
        self._place, self._steps_from, self._num_states, self._first = place, steps_from, num_states, first
        self._keeps_gradients, self._gives_gradients = kept == "gradients", with_gradients
        on_it = place is on_device
        self._every = 1 if kept == "states" else num_states + 1
        self._marks = {first, *kept_between(first, num_steps, num_states)} if on_it else set[int]()
        self._far_marks = range(first, first if on_it else num_steps, self._every)
        self._near: dict[int, StepRecord] = {}
        self._far: dict[int, Callable[[], Any]] = {}
        self._gradients: dict[int, Callable[[], Any]] = {}
        self._buffers: dict[int, Tensors] = {}  # small, and shared between steps that do not move them

    def record(self, t: int, steps: PlainSteps) -> None:
        """Keep the state before step t, if the schedule says so."""
        if t in self._marks:
            self._near[t] = _present(steps)
        elif t in self._far_marks:
            self._far[t] = put_tree(self._place, (steps.weights(), steps.state(), steps.buffers))

    def record_gradient(self, t: int, gradient: Gradients, buffers: Tensors) -> None:
        """Keep the raw gradient of step t and the buffers before it, if this store keeps gradients."""
        if t >= self._first and self._keeps_gradients:
            self._gradients[t], self._buffers[t] = put_tree(self._place, gradient), buffers

    def rebuild(self, t: int, free: bool) -> StepRecord:
        """Return step t as it was; those after it have been asked for before. It is forgotten if `free`."""
        start = self._nearest(t)
        record = self._near[t] if start == t else self._run(start, t)
        if t in self._gradients:
            record = replace(record, gradient=self._gradients[t]())
        if free:
            for kept in (self._near, self._far, self._gradients, self._buffers):
                kept.pop(t, None)
        return record

    def _nearest(self, t: int) -> int:
        """Return the last step up to t whose state is kept; it is on the device now."""
        if t in self._near:
            return t
        near = max((s for s in self._near if s <= t), default=-1)
        far = t - (t - self._first) % self._every
        if far <= near or far not in self._far:
            return near
        self._near = {far: StepRecord(*self._far[far]())}
        return far

    def _run(self, start: int, end: int) -> StepRecord:
        """Return step `end`, run from the state of step `start`, and keep states between as the schedule says."""
        record = self._near[start]
        steps = self._steps_from(record.params, record.state, record.buffers)
        free = self._num_states - sum(s <= start for s in self._near)
        marks = {start, *kept_between(start, end, 1 + free)}
        for t in range(start, end):
            gradient = self._gradients[t]() if t in self._gradients else steps.gradient(t)[1]
            if self._gives_gradients and t in marks and (t + 1 in marks or t + 1 == end):
                self._near[t].gradient = gradient  # the step is not run again
            steps.update(t, gradient)
            if t + 1 in marks:
                self._make_room()
                self._near[t + 1] = self._after(t, steps)
        return self._after(end - 1, steps)

    def _after(self, t: int, steps: PlainSteps) -> StepRecord:
        record = _present(steps)
        return replace(record, buffers=self._buffers.get(t + 1, record.buffers))

    def _make_room(self) -> None:
        """Drop the last of the kept states: there are too many only where an earlier backward has left its own."""
        if len(self._near) == self._num_states:
            del self._near[max(self._near)]


def _present(steps: PlainSteps) -> StepRecord:
    return StepRecord(steps.weights(), steps.state(), steps.buffers)
