"""Several validation batches per meta-loss: the same gradient as that of their sum, one batch's graph at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import example_weights, feature_batches, two_stages
from torch import Tensor, nn
from trainers import learned, trainer

import metaopt
from metaopt.losses.objectives import mean_meta_loss

BATCHES = feature_batches(3, seed=8)


class BothStages(metaopt.MetaObjective):
    """Reads both trained models and the meta-parameters themselves."""

    def __call__(self, trained: Any, batch: Any, meta_params: Any) -> Tensor:
        losses = [metaopt.ValidationLoss(stage)(trained, batch, meta_params) for stage in trained]
        return sum(losses, torch.zeros(())) + 0.1 * meta_params.logits.square().mean()


@pytest.mark.parametrize("objective", [metaopt.ValidationLoss("student"), BothStages()], ids=["student", "both"])
def test_the_mean_and_its_hypergradient(objective: Any) -> None:
    weights = example_weights()
    trained = two_stages().unroll(weights)
    expected = torch.stack([objective(trained, batch, weights) for batch in BATCHES]).mean()
    (gradient,) = torch.autograd.grad(expected, [weights.logits], retain_graph=True)
    found = mean_meta_loss(objective, trained, BATCHES, weights)
    metaopt.backward(2 * found, weights)
    assert found.item() == pytest.approx(expected.item(), rel=1e-14)
    assert weights.logits.grad is not None
    assert torch.allclose(weights.logits.grad, 2 * gradient, rtol=1e-12, atol=1e-16)
    assert float(gradient.norm()) > 1e-6


def test_a_batchs_graph_is_freed_before_the_next_one() -> None:
    alive: list[int] = []

    def objective(trained: Any, batch: Any, meta_params: Any) -> Tensor:
        loss = Counted.apply(metaopt.ValidationLoss("student")(trained, batch, meta_params))
        alive.append(Counted.held)
        return loss

    Counted.held = 0
    weights = example_weights()
    mean_meta_loss(objective, two_stages().unroll(weights), BATCHES, weights)
    assert alive == [1, 1, 1]


class Counted(torch.autograd.Function):
    """Identity that counts how many of it wait for their backward."""

    held = 0

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        Counted.held += 1
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
        Counted.held -= 1
        return cotangent


def test_a_cut_path_stays_missing() -> None:
    def cut(trained: Any, batch: Any, meta_params: Any) -> Tensor:
        return metaopt.ValidationLoss("student")({"student": trained["student"].detach()}, batch, meta_params)

    weights = example_weights()
    with pytest.raises(metaopt.MissingPathError, match="logits"):
        metaopt.backward(mean_meta_loss(cut, two_stages().unroll(weights), BATCHES, weights), weights)


def test_a_meta_parameter_that_nothing_reads_stays_missing() -> None:
    weights = example_weights()
    unread = {"weights": weights, "other": nn.Linear(1, 1)}
    trained = two_stages().unroll(weights)
    loss = mean_meta_loss(metaopt.ValidationLoss("student"), trained, BATCHES, unread)
    with pytest.raises(metaopt.MissingPathError, match=r"other\.weight"):
        metaopt.backward(loss, unread)


def test_no_batch_has_no_mean() -> None:
    weights = example_weights()
    with pytest.raises(metaopt.ConfigError, match="not a single batch"):
        mean_meta_loss(metaopt.ValidationLoss("student"), two_stages().unroll(weights), [], weights)


# --- in the outer loop ------------------------------------------------------------------------------------------


def test_the_trainer_takes_the_mean_over_the_next_batches() -> None:
    seen: list[list[Any]] = []

    class Watched(metaopt.ValidationLoss):
        def __call__(self, trained: Any, batch: Any, meta_params: Any) -> Tensor:
            seen[-1].append(int(batch["index"][0]))
            return super().__call__(trained, batch, meta_params)

    data = feature_batches(4, seed=8)
    run = trainer(objective=Watched("student"), validation=data, validation_batches=2)
    for _ in range(3):
        seen.append([])
        run.meta_step()
    first, second, third, fourth = (int(batch["index"][0]) for batch in data)
    assert seen == [[first, second], [third, fourth], [first, second]]


def test_two_batches_of_one_are_the_step_of_one() -> None:
    data = feature_batches(1, seed=8)
    one, two = trainer(validation=data), trainer(validation=data, validation_batches=2)
    one.fit(2)
    two.fit(2)
    assert torch.allclose(learned(one), learned(two), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_count_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(metaopt.ConfigError, match="validation_batches="):
        trainer(validation_batches=count)
