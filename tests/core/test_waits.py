"""How often an unroll waits for its device: counted on torch's meta device, where a tensor has no value to wait for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import ADAM, MOMENTUM, feature_batches
from small_models import Network

import metaopt
from metaopt.core import inner_loop
from metaopt.estimators import Checkpointed, FiniteDifference, FirstOrder, Truncated


@pytest.fixture
def looks(monkeypatch):
    """A list that grows by one with each look at values; any other one is an error on the meta device."""
    made: list[int] = []

    def look(tensors: Any) -> bool:
        made.append(len(list(tensors)))
        return True

    monkeypatch.setattr(inner_loop, "all_finite", look)
    return made


ESTIMATORS = [metaopt.Unrolled(), Checkpointed(), Checkpointed(store="recompute"), Truncated(2), FirstOrder()]


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["momentum", "adam"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_stage_waits_once_per_unroll_and_no_inner_step_does(estimator, optimizer, looks):
    weights = metaopt.ExampleWeights(15).to("meta")
    options: dict[str, Any] = {"estimator": estimator, "transform": metaopt.ClipNorm(1.0)}
    models = Network(0.4).to("meta"), Network().to("meta")
    losses = metaopt.WeightedLoss(), metaopt.Distillation("teacher")
    stages = [
        metaopt.Stage(model, optimizer, loss, feature_batches(), num_steps=5, seed=0, **options)
        for model, loss in zip(models, losses, strict=True)
    ]
    chain = metaopt.Chain(teacher=stages[0], student=stages[1])
    trained = chain.unroll(weights)
    meta_loss = metaopt.ValidationLoss("student")(trained, chain.move(feature_batches(1)[0]), weights)
    (gradient,) = torch.autograd.grad(meta_loss, list(weights.parameters()))
    assert gradient.shape == (15,)
    assert len(looks) == 2


def test_a_finite_difference_alone_waits_for_the_length_of_its_direction(looks):
    model, weights = Network().to("meta"), metaopt.ExampleWeights(15).to("meta")
    estimator = Checkpointed(FiniteDifference())
    stage = metaopt.Stage(model, MOMENTUM, metaopt.WeightedLoss(), feature_batches(), 2, estimator)
    chain = metaopt.Chain(only=stage)
    meta_loss = metaopt.ValidationLoss("only")(chain.unroll(weights), chain.move(feature_batches(1)[0]), weights)
    with pytest.raises(RuntimeError, match="meta"):
        torch.autograd.grad(meta_loss, list(weights.parameters()))
