"""The hypergradient's own derivative: right under `Unrolled`; under every other estimator refused, never left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import ADAM, SIZE, feature_batches, two_stages
from small_models import Linear, Network
from torch import Tensor

import metaopt
from metaopt.estimators import (
    Captured,
    Checkpointed,
    ConjugateGradient,
    FiniteDifference,
    FirstOrder,
    Neumann,
    OneStep,
    Truncated,
    Unrolled,
)
from metaopt.losses.objectives import mean_meta_loss

SWEPT = [
    *(Checkpointed(store=store) for store in ("states", "gradients", "recompute")),
    *(Checkpointed(product) for product in (Captured(), FiniteDifference())),
    *(Truncated(1), OneStep(), FirstOrder(), Neumann(2), ConjugateGradient(2)),
]


def linear_objective(weights: Any, estimator: Any, teacher: Any = None) -> Tensor:
    """Linear in the trained weights, so that their cotangents are constants."""
    torch.manual_seed(0)
    chain = two_stages(ADAM, Network(), Linear(), batches=feature_batches(1), num_steps=2, estimator=estimator)
    chain.stages["teacher"].estimator = teacher or estimator
    return sum(p.sum() for p in chain.unroll(weights)["student"].params.values())  # type: ignore[return-value]


def objective(weights: Any, estimator: Any, teacher: Any = None) -> Tensor:
    return linear_objective(weights, estimator, teacher).square()


def weights_at(distance: float = 0.0) -> Any:
    weights = metaopt.ExampleWeights(SIZE).double()
    with torch.no_grad():
        weights.logits.add_(distance * torch.linspace(-1, 1, SIZE, dtype=torch.float64))
    return weights


def slope(weights: Any, create_graph: bool = False) -> Tensor:
    (found,) = torch.autograd.grad(objective(weights, Unrolled()), [weights.logits], create_graph=create_graph)
    return found


def test_unrolled_is_differentiated_twice():
    weights, step = weights_at(), 1e-5
    direction = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    (found,) = torch.autograd.grad(slope(weights, create_graph=True) @ direction, [weights.logits])
    expected = (slope(weights_at(step)) - slope(weights_at(-step))) / (2 * step)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("loss", [objective, linear_objective])
@pytest.mark.parametrize("estimator", SWEPT, ids=repr)
@pytest.mark.filterwarnings("ignore:ConjugateGradient")
def test_a_graph_of_the_sweep_is_refused(estimator, loss):
    weights = weights_at()
    value = loss(weights, estimator)
    with pytest.raises(metaopt.StageError, match=r"stage 'student': create_graph=True.*metaopt.Unrolled\(\)"):
        torch.autograd.grad(value, [weights.logits], create_graph=True)
    with pytest.raises(metaopt.StageError, match=r"stage 'student': create_graph=True"):
        loss(weights, estimator).backward(create_graph=True)
    assert torch.autograd.grad(value, [weights.logits])[0].norm() > 0


def test_the_stage_that_has_none_is_named():
    weights = weights_at()
    with pytest.raises(metaopt.StageError, match="stage 'teacher': create_graph=True"):
        torch.autograd.grad(objective(weights, Unrolled(), Checkpointed()), [weights.logits], create_graph=True)


def test_the_mean_over_batches_is_refused_too():
    weights = weights_at()
    chain = two_stages(ADAM, Network(), Linear(), batches=feature_batches(1), num_steps=1)
    batches, trained = feature_batches(2, seed=8), chain.unroll(weights)
    loss = mean_meta_loss(metaopt.ValidationLoss("student"), trained, batches, weights)
    with pytest.raises(metaopt.StageError, match="mean_meta_loss: create_graph=True asks"):
        torch.autograd.grad(loss, [weights.logits], create_graph=True)
