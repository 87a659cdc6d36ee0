"""Two threads that share meta-parameters or a module: the second is refused, and the first's results are right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import assert_same, cross_entropy, example_weights, feature_batches, meta_loss, module_state, one_stage
from small_models import Linear, Network
from torch import nn

import metaopt

ESTIMATORS = {"Unrolled": metaopt.Unrolled, "Checkpointed": metaopt.Checkpointed}


class Paused:
    """A weighted loss that waits inside one of its calls, until it is told to go on."""

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == self.call:
            self.inside.set()
            assert self.go_on.wait(30)
        return metaopt.WeightedLoss()(*args)


def hypergradient(chain: metaopt.Chain, weights: Any) -> Any:
    return metaopt.hypergradient(meta_loss(chain, weights), weights)["logits"]


def while_another_thread_is_inside(loss: Paused, run: Callable[[], Any], then: Callable[[], Any]) -> Any:
    """What `run` returns in a thread of its own, if `then` is called while it waits in the loss."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    try:
        assert loss.inside.wait(30)
        then()
    finally:
        loss.go_on.set()
        thread.join(30)
    return results[0]


class Wrapper(nn.Module):
    """Another model around the same submodule."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, inputs: Any) -> Any:
        return self.linear(inputs)


@pytest.mark.parametrize("second", ESTIMATORS)
@pytest.mark.parametrize(
    ("shared", "first", "call"),
    [
        *((shared, first, 2) for shared in ("meta-parameters", "a model", "a submodule") for first in ESTIMATORS),
        ("meta-parameters", "Checkpointed", 5),  # in the backward
    ],
)
def test_what_two_threads_share_is_refused_and_left_alone(shared: str, first: str, call: int, second: str) -> None:
    weights, model, loss = example_weights(), Linear(), Paused(call)
    chain = one_stage(loss, model=model, estimator=ESTIMATORS[first]())
    others = {"a model": lambda: model, "a submodule": lambda: Wrapper(model.linear)}
    other = one_stage(model=others.get(shared, Linear)(), estimator=ESTIMATORS[second]())
    other_weights = weights if shared == "meta-parameters" else example_weights()
    right = hypergradient(one_stage(model=model), weights)
    before = module_state(weights), module_state(model)

    def intrude() -> None:
        with pytest.raises(metaopt.StageError, match=r"in use by another thread.*'MainThread'.*copy\.deepcopy"):
            other.unroll(other_weights)

    found = while_another_thread_is_inside(loss, lambda: hypergradient(chain, weights), intrude)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-15)
    assert_same((module_state(weights), module_state(model)), before)
    hypergradient(other, other_weights)  # it is free again


def test_an_objective_and_a_commit_do_not_meet_lent_weights() -> None:
    weights, model, loss = example_weights(), Network(0.3), Paused(2)
    chain, other = one_stage(loss, model=model), one_stage(cross_entropy, model=model)
    trained = other.unroll(weights)

    def intrude() -> None:
        for act in (lambda: trained["only"](feature_batches()[0]["inputs"]), lambda: other.commit(trained)):
            with pytest.raises(metaopt.StageError, match="Network is in use by another thread"):
                act()

    while_another_thread_is_inside(loss, lambda: chain.train(weights), intrude)
    assert all(module.training for module in model.modules())


def test_chains_that_share_nothing_but_a_tensor_run_in_two_threads() -> None:
    weights = torch.rand(15, dtype=torch.float64, requires_grad=True)
    loss = Paused(2)
    found: list[Any] = []

    def run(loss: Any) -> Any:
        estimator = metaopt.Checkpointed()
        return metaopt.hypergradient(meta_loss(one_stage(loss, estimator=estimator), weights), weights)["meta_params"]

    right = run(metaopt.WeightedLoss())
    first = while_another_thread_is_inside(loss, lambda: run(loss), lambda: found.append(run(metaopt.WeightedLoss())))
    assert torch.equal(first, right)
    assert torch.equal(found[0], right)
