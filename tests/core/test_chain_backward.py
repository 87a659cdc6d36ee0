"""The hypergradient of an unroll is that of the unroll, whatever happens to the chain before the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import full_chain
from small import assert_same, example_weights, feature_batches

import metaopt

LATER: dict[str, Callable[[metaopt.Chain, Any], object]] = {
    "commit": lambda chain, outcome: chain.commit(outcome),
    "reset": lambda chain, outcome: chain.reset(),
    "train": lambda chain, outcome: chain.train(example_weights(), num_steps=2),
    "another rate": lambda chain, outcome: chain.stages["teacher"].optimizer.param_groups[0].update(lr=1.0),
}
stale = (AssertionError, RuntimeError)


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
@pytest.mark.parametrize("estimator", ["unrolled", pytest.param("checkpointed")])
def test_what_happens_before_the_backward_does_not_spoil_the_hypergradient(estimator, scheduled, later):
    schedule = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.7) if scheduled else None
    chain, weights = full_chain(estimator=estimator, schedule=schedule), example_weights()
    objective, batch = metaopt.ValidationLoss("student"), feature_batches(1, seed=8)[0]
    expected = metaopt.hypergradient(objective(chain.unroll(weights), batch, weights), weights)
    outcome = chain.unroll(weights)
    loss = objective(outcome, batch, weights)
    LATER[later](chain, outcome)
    assert_same(metaopt.hypergradient(loss, weights), expected)
    assert expected["logits"].abs().sum() > 0
