"""Whatever a loss asks an upstream model, and however, a reverse sweep differentiates as the unrolled graph does."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from problems import soft_labels
from reference import relative_error
from small import ADAM, assert_same, example_weights, feature_batches, meta_loss, two_stages
from small_models import Network
from torch import Tensor, nn

import metaopt
from metaopt.estimators import Captured, Checkpointed, Unrolled

EXACT = 1e-12


class Drawing(nn.Module):
    """Scales its answers in eval mode by a random number, if it is given any."""

    def __init__(self, draws: Any = None) -> None:
        super().__init__()
        self.network, self.draws = Network(0.3), draws

    def forward(self, inputs: Tensor) -> Tensor:
        scale = 1.0 if self.draws is None or self.training else self.draws()
        return self.network(inputs) * scale


def chain_of(loss: Any, estimator: Any, draws: Any = None) -> metaopt.Chain:
    """A chain whose student has this loss: five steps over two batches."""
    torch.manual_seed(2)
    options: dict[str, Any] = {"batches": feature_batches(2), "num_steps": 5, "estimator": estimator}
    chain = two_stages(ADAM, Drawing(draws), Network(0.2), **options)
    chain.stages["student"].loss = loss
    return chain


def distilled(loss: Any, estimator: Any, draws: Any = None) -> dict[str, Tensor]:
    """Its hypergradient."""
    phi = example_weights()
    return metaopt.hypergradient(meta_loss(chain_of(loss, estimator, draws), phi), phi)


def once(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    return soft_labels(model, batch, phi, upstream, teacher="teacher", temperature=2.0)


def twice(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Asks with the batch, with a tensor of its own, and with the batch again."""
    log_q = model(batch["inputs"]).log_softmax(-1)
    asked = [batch["inputs"], batch["inputs"].tanh(), batch["inputs"]]
    answers = [upstream["teacher"](x).softmax(-1) for x in asked]
    return -sum((p * log_q).sum(-1).mean() * (i + 1) for i, p in enumerate(answers))  # type: ignore[return-value]


def sometimes(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Asks at the steps of the first batch only."""
    if int(batch["index"][0]) == 0:
        return once(model, batch, phi, upstream)
    return metaopt.WeightedLoss()(model, batch, phi, upstream)


def in_train_mode(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    return once(model, batch, phi, {"teacher": upstream["teacher"].train()})


def writing_into_the_answer(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Divides the teacher's logits in place, from the second batch on."""
    logits = upstream["teacher"](batch["inputs"])
    if int(batch["index"][0]) > 0:
        logits /= 3.0
    return -(logits.softmax(-1) * model(batch["inputs"]).log_softmax(-1)).sum(-1).mean()


def without_grad(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Asks outside the graph."""
    with torch.no_grad():
        logits = upstream["teacher"](batch["inputs"])
    return -(logits.softmax(-1) * model(batch["inputs"]).log_softmax(-1)).sum(-1).mean()


def partly_without_grad(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Asks inside and outside the graph."""
    return once(model, batch, phi, upstream) + without_grad(model, batch, phi, upstream)


ASKING = [once, twice, sometimes, in_train_mode, writing_into_the_answer, partly_without_grad]


@pytest.mark.parametrize("loss", ASKING)
def test_whatever_a_loss_asks_the_hypergradient_is_exact(loss):
    expected = distilled(loss, Unrolled())
    for store in ("states", "recompute"):
        assert relative_error(distilled(loss, Checkpointed(store=store)), expected) < EXACT
    if loss not in (sometimes, writing_into_the_answer):  # they branch on the values of a batch
        assert relative_error(distilled(loss, Checkpointed(Captured())), expected) < EXACT


@pytest.mark.parametrize("estimator", [Unrolled(), Checkpointed(), Checkpointed(Captured())], ids=repr)
def test_a_path_that_no_grad_cuts_is_missing(estimator):
    with pytest.raises(metaopt.MissingPathError):
        distilled(without_grad, estimator)


@pytest.mark.parametrize("draws", [lambda: torch.rand(()), random.random, np.random.rand], ids=["torch", "py", "numpy"])
def test_a_teacher_that_draws_random_numbers_draws_them_anew_at_every_step(draws):
    expected = distilled(once, Unrolled(), draws)
    for store in ("states", "recompute"):
        assert relative_error(distilled(once, Checkpointed(store=store), draws), expected) < EXACT


def test_a_second_backward_gives_the_same_also_after_one_that_raised():
    failing = False

    def failing_at_times(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        if failing and model.step == 1:
            raise ArithmeticError("now")
        return once(model, batch, phi, upstream)

    chain, phi = chain_of(failing_at_times, Checkpointed()), example_weights()
    loss = meta_loss(chain, phi)
    first = metaopt.hypergradient(loss, phi, retain_graph=True)
    failing = True
    with pytest.raises(ArithmeticError):
        metaopt.hypergradient(loss, phi, retain_graph=True)
    failing = False
    assert_same(metaopt.hypergradient(loss, phi), first)


# --- batches that change


def changing_the_batch(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    batch["index"].add_(5).remainder_(15)
    return metaopt.WeightedLoss()(model, batch, phi, upstream)


def test_a_batch_that_the_loss_changes_in_place_is_refused():
    """Its steps cannot be run again as they were."""
    with pytest.raises(metaopt.StageError, match=r"'student': a batch was changed in place.*clone\(\)"):
        distilled(changing_the_batch, Checkpointed())


def test_a_batch_that_is_changed_before_the_backward_is_refused():
    batches, phi = feature_batches(2), example_weights()
    chain = two_stages(ADAM, batches=batches, estimator=Checkpointed())
    loss = meta_loss(chain, phi)
    batches[0]["inputs"] += 1.0
    with pytest.raises(metaopt.StageError, match="a batch was changed in place"):
        metaopt.hypergradient(loss, phi)
