"""What a sweep makes of losses that cut a path, raise in a replay, change their batch, or make leaves of their own.

That it gives what `Unrolled` gives, where it can, is in test_agreement.py.
"""

from __future__ import annotations

from typing import Any

import library
import pytest
import torch
from differences import difference_error
from inner_loops import asking
from small import ADAM, assert_same, example_weights, feature_batches, meta_loss, two_stages
from torch import Tensor
from users_losses import LEAVES, of_leaves, once, penalty, with_penalty, without_grad

import metaopt
from metaopt.estimators import Captured, Checkpointed, Unrolled


@pytest.mark.parametrize("estimator", [Unrolled(), Checkpointed(), Checkpointed(Captured())], ids=repr)
def test_a_path_that_no_grad_cuts_is_missing(estimator):
    with pytest.raises(metaopt.MissingPathError):
        asking(without_grad)(estimator).hypergradient()


def test_a_second_backward_gives_the_same_also_after_one_that_raised():
    failing = False

    def failing_at_times(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        if failing and model.step == 1:
            raise ArithmeticError("now")
        return once(model, batch, phi, upstream)

    work = asking(failing_at_times)(Checkpointed())
    loss = work.meta_loss()
    first = metaopt.hypergradient(loss, work.phi, retain_graph=True)
    failing = True
    with pytest.raises(ArithmeticError):
        metaopt.hypergradient(loss, work.phi, retain_graph=True)
    failing = False
    assert_same(metaopt.hypergradient(loss, work.phi), first)


# --- batches that change


def changing_the_batch(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    batch["index"].add_(5).remainder_(15)
    return metaopt.WeightedLoss()(model, batch, phi, upstream)


def test_a_batch_that_the_loss_changes_in_place_is_refused():
    """At once: its steps cannot be run again as they were."""
    work = asking(changing_the_batch)(Checkpointed())
    with pytest.raises(metaopt.StageError, match=r"'student': a batch was changed in place.*clone\(\)"):
        work.chain.unroll(work.phi)


def test_a_batch_that_is_changed_before_the_backward_is_refused():
    batches, phi = feature_batches(2), example_weights()
    chain = two_stages(ADAM, batches=batches, estimator=Checkpointed())
    loss = meta_loss(chain, phi)
    batches[0]["inputs"] += 1.0
    with pytest.raises(metaopt.StageError, match="a batch was changed in place"):
        metaopt.hypergradient(loss, phi)


# --- leaves of the loss's own: gradient penalties, adversarial training


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_that_a_loss_makes_are_its_own(name):
    problem = of_leaves(LEAVES[name])
    problem = library.replayed(problem, library.as_chain(problem))
    found = library.hypergradient(problem, library.as_chain(problem))
    assert difference_error(found, problem, num_random=1) < 1e-8


def test_leaves_that_were_there_before_are_refused():
    """Also beside one that the loss makes; and one that it keeps from its first call."""
    outside = torch.ones((), dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []

    def closing_over(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        return with_penalty(model, batch, phi, upstream) * outside

    def keeping(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        kept[1:] = [kept[0] if kept else torch.ones((), dtype=torch.float64, requires_grad=True)]
        kept[:] = kept[-1:]
        return with_penalty(model, batch, phi, upstream) * kept[0]

    def marking_the_batch(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        return penalty(model, batch["inputs"].requires_grad_())

    for loss in (closing_over, keeping, marking_the_batch):
        problem = of_leaves(loss)
        with pytest.raises(metaopt.StageError, match=r"closes over 1 tensor\(s\) that require grad"):
            library.as_chain(problem, estimator=Checkpointed()).unroll(problem.phi)
