"""As few states as the user likes: the same hypergradient, in exactly as many steps as the schedule's theory says."""

from __future__ import annotations

import functools
from typing import Any

import inner_loops
import pytest
import torch
from inner_loops import Make, of_small
from reference import relative_error
from small import assert_same, one_stage, two_stages
from small_models import Network
from torch import Tensor

import metaopt
from metaopt.estimators import Captured, Checkpointed, FirstOrder, Truncated, Unrolled
from metaopt.estimators.places import on_device
from metaopt.estimators.revolve import ahead, enough_states, num_runs
from metaopt.estimators.storage import Tape

EXACT = 1e-12
LENGTHS = range(1, 21)


# --- the schedule


@functools.cache
def fewest(num_steps: int, num_states: int) -> int:
    """The fewest steps that must be run before one of `num_steps` is swept, over all choices of the next state."""
    if num_steps == 1:
        return 0
    if num_states == 1:
        return num_steps * (num_steps - 1) // 2
    return min(n + fewest(n, num_states) + fewest(num_steps - n, num_states - 1) for n in range(1, num_steps))


@functools.cache
def scheduled(num_steps: int, num_states: int) -> int:
    """The steps that are run where `ahead` chooses the next state."""
    if num_steps == 1:
        return 0
    first = ahead(num_steps, num_states)
    return (
        first + scheduled(first, num_states) + (scheduled(num_steps - first, num_states - 1) if num_states > 1 else 0)
    )


def test_no_other_choice_of_states_runs_fewer_steps():
    for num_steps in range(2, 120):
        for num_states in range(1, num_steps + 3):
            assert scheduled(num_steps, num_states) == fewest(num_steps, num_states), (num_steps, num_states)
            assert num_runs(num_steps - 1, num_states) == fewest(num_steps, num_states)


@pytest.mark.parametrize(
    ("num_steps", "num_states", "plain_trainings"),
    [(1000, 16, 5.9), (10000, 16, 7.4), (1000, 32, 5.4), (10000, 32, 6.3), (1000, 64, 4.9), (10000, 64, 5.8)],
)
def test_what_it_costs_in_plain_trainings(num_steps, num_states, plain_trainings):
    """Each step's double backward takes three."""
    assert round(3 + num_runs(num_steps, num_states) / num_steps, 1) == plain_trainings


def test_enough_states_are_the_fewest_for_two_runs_of_each_step():
    """From s states on, s + 1 steps can be run to be swept in one run each; s more from the next, and so on."""
    for num_steps in range(1, 500):
        states = enough_states(num_steps)
        assert num_runs(num_steps, states) <= 2 * num_steps
        assert sum(range(1, states + 2)) > num_steps >= sum(range(1, states + 1))
    assert [enough_states(t) for t in (100, 1000, 10000)] == [13, 44, 140]  # √2T


# --- the steps that are run


class Counter:
    """A training whose weights say how many steps it has behind it; it counts the gradients, and the states alive."""

    runs = 0

    def __init__(self, params: Any, state: Any, buffers: Any) -> None:
        self.t, self.buffers = int(params["t"]), buffers

    def gradient(self, t: int) -> tuple[Tensor, Any]:
        assert t == self.t
        Counter.runs += 1
        self.buffers = {"of": torch.tensor(t + 1)}
        return torch.zeros(()), {"t": torch.tensor(t)}

    def update(self, t: int, gradient: Any) -> None:
        assert t == self.t == gradient["t"]
        self.t += 1

    def weights(self) -> Any:
        return {"t": torch.tensor(self.t)}

    def state(self) -> Any:
        return {}


def elsewhere(tensors: Any) -> Any:
    """A place that is not the device."""
    return on_device(tensors)


def recorded(
    kept: str, num_states: int, num_steps: int, first: int = 0, with_gradients: bool = False, place: Any = on_device
) -> Tape:
    """A tape after its forward; `Counter.runs` counts from there on."""
    start: Any = Counter
    tape = Tape(kept, place, num_states, num_steps, start, first, with_gradients)
    steps: Any = Counter({"t": 0}, {}, {"of": torch.tensor(0)})
    for t in range(num_steps):
        tape.record(t, steps)
        buffers, (_, gradient) = steps.buffers, steps.gradient(t)
        tape.record_gradient(t, gradient, buffers)
        steps.update(t, gradient)
    Counter.runs = 0
    return tape


def step_of(gradient: Any) -> Tensor:
    """Of which step a counter's gradient is."""
    return gradient["t"]


@pytest.mark.parametrize("place", [on_device, elsewhere])
@pytest.mark.parametrize("kept", ["gradients", "recompute"])
def test_every_step_is_rebuilt_in_the_runs_of_the_theory(kept, place):
    """For all lengths and numbers of states, from whatever step on, and once more after a graph was retained.

    Off the device a state is kept every few steps, and each step between is run once.
    """
    for num_steps in LENGTHS:
        for num_states in range(1, num_steps + 2):
            for first in {0, num_steps // 3}:
                tape, swept = recorded(kept, num_states, num_steps, first, place=place), num_steps - first
                for free in (False, True):
                    for t in reversed(range(first, num_steps)):
                        step = tape.rebuild(t, free)
                        assert int(step.params["t"]) == int(step.buffers["of"]) == t
                        assert len(tape._near) <= num_states
                        if free and kept == "gradients":
                            assert Counter.runs == 0
                            assert step_of(step.gradient) == t
                    if not free and kept == "recompute":
                        runs = num_runs(swept, num_states) - swept
                        between = swept - len(range(first, num_steps, num_states + 1))
                        assert Counter.runs == (runs if place is on_device else between)
                assert not {**tape._near, **tape._far, **tape._gradients, **tape._buffers}


def test_a_gradient_that_was_computed_on_the_way_is_given_back():
    """Of each step that is not run again; where none is run more than twice, of each that is run twice."""
    for num_steps in LENGTHS:
        for num_states in range(1, num_steps + 2):
            tape = recorded("recompute", num_states, num_steps, with_gradients=True)
            steps = {t: tape.rebuild(t, True).gradient for t in reversed(range(num_steps))}
            known = {t: int(step_of(g)) for t, g in steps.items() if g is not None}
            assert known == {t: t for t in known}
            if num_states == enough_states(num_steps):
                assert len(known) == num_runs(num_steps, num_states) - num_steps


# --- the same hypergradient


class Remembering(Network):
    """Dropout and batch norm; its answers depend on the running mean and on how often it was called."""

    def __init__(self) -> None:
        super().__init__(0.3, batch_norm=True)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls = self.calls + 1.0
        return super().forward(inputs) * (0.5 + 0.1 * self.calls) + self.norm.running_mean.mean()


def of_all(num_steps: int) -> Make:
    """All that a step depends on beside its weights: buffers, random numbers, Adam's moments, a schedule, a clip."""
    schedule = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    options = {"optimizer": inner_loops.ADAM, "transform": metaopt.ClipNorm(0.3), "schedule": schedule}
    return of_small(one_stage, model=Remembering, num_steps=num_steps, **options)


KEPT: Any = (("recompute", "device"), ("gradients", "device"), ("recompute", "disk"))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("num_steps", [pytest.param(t, marks=[pytest.mark.slow] if t > 9 else []) for t in LENGTHS])
def test_every_number_of_states_gives_the_hypergradient_of_unrolled(num_steps, tmp_path):
    make = of_all(num_steps)
    expected = make(Unrolled()).hypergradient()
    for c in range(1, num_steps + 1):
        # By turns: every length and every number meets each, and what is rebuilt from how many is seen above.
        store, place = KEPT[(num_steps + c) % 3]
        found = make(Checkpointed(store=store, place=place, folder=tmp_path, num_states=c)).hypergradient()
        assert relative_error(found, expected) < EXACT, (store, place, c)


@pytest.mark.parametrize("kind", [functools.partial(Truncated, 7), FirstOrder])
def test_what_is_approximate_is_so_with_any_number_of_states(kind):
    make = of_all(12)
    expected = make(kind(store="states")).hypergradient()
    for c in (1, 2, 3, 5, 20):
        assert relative_error(make(kind(store="recompute", num_states=c)).hypergradient(), expected) < EXACT


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_two_stages_and_a_graph_that_is_retained(place):
    make = of_small(two_stages, optimizer=inner_loops.ADAM, num_steps=9)
    work = make(Checkpointed(store="recompute", place=place, num_states=2))
    loss = work.meta_loss()
    first = metaopt.hypergradient(loss, work.phi, retain_graph=True)
    assert_same(first, metaopt.hypergradient(loss, work.phi))
    assert relative_error(first, make(Unrolled()).hypergradient()) < EXACT


def test_a_captured_product_takes_the_gradients_that_there_are():
    make = of_small(two_stages, optimizer=inner_loops.ADAM, num_steps=9)
    found = make(Checkpointed(Captured(), "recompute", num_states=3)).hypergradient()
    assert relative_error(found, make(Unrolled()).hypergradient()) < EXACT


# --- refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"store": "recompute", "num_states": 0}, "num_states=0 must be a whole number of at least 1"),
    "all are kept": ({"store": "states", "num_states": 3}, "keeps the state of every step; leave out num_states=3"),
    "auto": ({"store": "auto", "budget": 10, "num_states": 3}, "chooses num_states too; leave out num_states=3"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", [Checkpointed, FirstOrder, functools.partial(Truncated, 2)])
def test_numbers_of_states_that_cannot_be_are_refused(case, kind):
    options, message = REFUSED[case]
    with pytest.raises(metaopt.ConfigError, match=message):
        kind(**options)


def test_the_representation_is_the_call():
    assert repr(Checkpointed(store="recompute", num_states=16)) == (
        "Checkpointed(product=DoubleBackward(), store='recompute', place='device', num_states=16)"
    )
