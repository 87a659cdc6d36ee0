"""What each estimator costs, in flops of plain training and in bytes of weights: counted, not timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaopt
from metaopt.diagnostics.meters import count_flops, peak_bytes
from metaopt.estimators import Captured, Checkpointed, Estimator, Truncated, Unrolled
from metaopt.estimators.revolve import num_runs

WIDTH, SIZE, LAYERS = 24, 4, 3
WEIGHTS = 4 * (LAYERS * WIDTH**2 + 1)  # bytes of one model
FORWARD = LAYERS * 2 * SIZE * WIDTH**2  # flops
STAGES = 2
ADAM = functools.partial(torch.optim.Adam, lr=1e-3, eps=1e-5)
SGD = functools.partial(torch.optim.SGD, lr=1e-2)


class Layers(nn.Module):
    """Products of matrices, and elementwise work that counts as nothing.

    The scale of the inputs makes the first layer's backward cost what the others' does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5) for _ in range(LAYERS))

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs * self.scale
        for weight in self.weights:
            x = (x @ weight).tanh()
        return x


def weighted(model: Any, batch: Any, weights: Any, upstream: Any) -> Tensor:
    return (weights(batch) * model(batch["inputs"]).square().mean(1)).mean()


def distilled(model: Any, batch: Any, weights: Any, upstream: Any) -> Tensor:
    return (model(batch["inputs"]) - upstream["teacher"](batch["inputs"])).square().mean()


def batches(count: int) -> list[dict[str, Tensor]]:
    """One for every step."""
    return [{"inputs": torch.randn(SIZE, WIDTH), "index": torch.arange(SIZE)} for _ in range(count)]


Meter = Callable[[Callable[[], object]], int]


def chain_of(estimator: Callable[[], Estimator], num_steps: int, optimizer: Any = ADAM) -> metaopt.Chain:
    torch.manual_seed(0)
    stage = functools.partial(metaopt.Stage, optimizer=optimizer, num_steps=num_steps)
    return metaopt.Chain(
        teacher=stage(Layers(), loss=weighted, batches=batches(num_steps), estimator=estimator()),
        student=stage(Layers(), loss=distilled, batches=batches(num_steps), estimator=estimator()),
    )


def cost_of(meter: Meter, estimator: Callable[[], Estimator], num_steps: int, optimizer: Any = ADAM) -> int:
    """Cost of one hypergradient through both stages; the meta-loss itself takes no matrix product."""
    chain, weights = chain_of(estimator, num_steps, optimizer), metaopt.ExampleWeights(SIZE)

    def run() -> None:
        trained = chain.unroll(weights)
        metaopt.backward(torch.stack([p.sum() for p in trained["student"].params.values()]).sum(), weights)

    if meter is count_flops:
        run()  # a capture is done once
    return meter(run)


def test_plain_training_is_the_unit():
    """A step is three forwards' worth; the student's has the teacher's forward beside it."""
    chain, weights = chain_of(Unrolled, 5), metaopt.ExampleWeights(SIZE)
    assert count_flops(lambda: chain.train(weights)) == 5 * (3 + 1 + 3) * FORWARD


FLOORS = {
    "unrolled": (Unrolled, 3.0),
    "states": (functools.partial(Checkpointed, store="states"), 4.0),
    "gradients": (Checkpointed, 4.0),
    "recompute": (functools.partial(Checkpointed, store="recompute"), 5.0),
    "captured": (lambda: Checkpointed(Captured()), 11 / 3),
}


@pytest.mark.parametrize("name", FLOORS)
def test_flops_reach_their_floor(name):
    """In units of plain training: 3 for the graph kept, one more for a second sweep, one more for a third."""
    estimator, floor = FLOORS[name]
    plain = 9 * (3 + 1 + 3) * FORWARD
    assert cost_of(count_flops, estimator, 9) / plain <= 1.03 * floor


@pytest.mark.sampled(2)
@pytest.mark.parametrize("num_states", [8, 2, 5, 3])
def test_flops_with_few_states_are_the_schedules(num_states):
    """The steps that the schedule runs, and a double backward of each step, which takes three: to the last flop."""
    flops = cost_of(count_flops, functools.partial(Checkpointed, store="recompute", num_states=num_states), 35)
    assert flops == (num_runs(35, num_states) + 3 * 35) * (3 + 1 + 3) * FORWARD


def growth(estimator: Callable[[], Estimator], optimizer: Any) -> tuple[float, float]:
    """Return b and c of `peak = a + b √(T + 9/8) + c T` through three T, in weights per stage."""
    steps = (5, 9, 20)  # the most for 2, 3 and 5 states: √(2T + 9/4) − 3/2
    peaks = [cost_of(peak_bytes, estimator, t, optimizer) / WEIGHTS / STAGES for t in steps]
    powers = torch.tensor([[1.0, (t + 9 / 8) ** 0.5, t] for t in steps], dtype=torch.float64)
    _, root, linear = torch.linalg.solve(powers, torch.tensor(peaks, dtype=torch.float64)).tolist()
    return root, linear


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "state"), [pytest.param(SGD, 1, id="sgd"), pytest.param(ADAM, 3, id="adam", marks=pytest.mark.slow)]
)
def test_memory_grows_by_what_is_stored(optimizer, state):
    """`state`: weights and optimizer state, in weights. √2T states are kept, or kept beside."""
    root, linear = growth(Checkpointed, optimizer)
    assert 0.9 <= linear <= 1.1
    assert root <= 1.5 * state
    root, linear = growth(functools.partial(Checkpointed, store="recompute"), optimizer)
    assert linear <= 0.01
    assert root <= 1.5 * state
    root, linear = growth(functools.partial(Checkpointed, store="states"), optimizer)
    assert state - 0.1 <= linear <= 1.1 * state


def test_off_the_device_only_a_segment_is_held():
    root, linear = growth(functools.partial(Checkpointed, place="disk"), SGD)
    assert linear <= 0.01
    assert root <= 1.5


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("store", "place"), [("recompute", "device"), ("recompute", "disk"), ("gradients", "disk")])
def test_with_as_many_states_memory_does_not_grow(store, place):
    estimator = functools.partial(Checkpointed, store=store, place=place, num_states=2)
    few, many = (cost_of(peak_bytes, estimator, t) for t in (9, 27))
    assert many - few < 0.05 * WEIGHTS


def test_truncated_holds_no_more_for_a_longer_stage():
    few, many = (cost_of(peak_bytes, functools.partial(Truncated, 2), t) for t in (4, 12))
    assert many - few < 0.01 * WEIGHTS


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_unrolled_keeps_weights_and_activations_alone(momentum):
    """A step's graph needs no gradient and no momentum: neither is a factor of anything."""
    optimizer = functools.partial(torch.optim.SGD, lr=1e-2, momentum=momentum)
    few, many = (cost_of(peak_bytes, Unrolled, t, optimizer) / WEIGHTS / STAGES for t in (4, 12))
    assert 1.7 < (many - few) / 8 < 1.8


@pytest.mark.slow
def test_unrolled_grows_by_a_step_per_step():
    """What `Checkpointed` is for: here a step's graph is several times its weights."""
    assert growth(Unrolled, ADAM)[1] > 4
