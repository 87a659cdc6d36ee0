"""Chains as they are put together, trained plainly, saved and resumed."""

from __future__ import annotations

import copy
import functools
import io
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from chains import full_chain, shuffled
from small import (
    ADAM,
    SGD,
    assert_same,
    chain_state,
    cross_entropy,
    example_weights,
    feature_batches,
    module_state,
    one_stage,
    tensors_of,
    two_stages,
)
from small_models import Linear, Network
from torch import Tensor

import metaopt

# --- plain training


def test_train_gives_detached_models_and_reports_every_step():
    chain, seen = full_chain(), []
    outcome = chain.train(example_weights(), 2, on_step=lambda name, t, loss: seen.append((name, t, float(loss))))
    assert [(name, t) for name, t, _ in seen] == [("teacher", 0), ("teacher", 1), ("student", 0), ("student", 1)]
    assert [loss for name, _, loss in seen if name == "student"] == outcome.losses["student"].tolist()
    assert not any(p.requires_grad for model in outcome.values() for p in model.params.values())
    assert_same(tensors_of(outcome)["student"]["params"], module_state(chain.stages["student"].model)["params"])


def test_a_long_training_is_one_sweep():
    """Its batches are drawn step by step, and it ends in every state as a sweep that drew them at once."""
    whole, parts = (full_chain(num_steps=150) for _ in range(2))
    with torch.no_grad():
        expected = whole.unroll(example_weights())
    found = parts.train(example_weights())
    assert_same(tensors_of(found), tensors_of(expected))
    whole.commit(expected)
    assert_same(chain_state(parts)["state"], chain_state(whole)["state"])


def test_a_long_training_holds_the_batches_of_one_step():
    alive: list[weakref.ref[Tensor]] = []

    class Fresh:
        """Made anew at every pass, so that nothing but the training holds them."""

        def __iter__(self) -> Iterator[Any]:
            for batch in feature_batches():
                alive.append(weakref.ref(batch["inputs"]))
                yield batch

    held = []
    one_stage(batches=Fresh(), num_steps=300).train(
        example_weights(), on_step=lambda *_: held.append(sum(reference() is not None for reference in alive))
    )
    assert len(held) == 300
    assert max(held) <= 2 * len(feature_batches())  # `feature_batches` itself makes those of a pass at once


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_training_that_fails_leaves_its_stage_as_it_was(error):
    def stop(name: str, t: int, loss: Tensor) -> None:
        if (name, t) == ("student", 4):
            raise error

    chain, other = full_chain(num_steps=6), full_chain(num_steps=6)
    with pytest.raises(error):
        chain.train(example_weights(), on_step=stop)
    other.train(example_weights(), num_steps={"student": 0})
    assert_same(chain_state(chain)["state"], chain_state(other)["state"])
    for c in (chain, other):
        c.train(example_weights(), num_steps={"teacher": 0})
    assert_same(chain_state(chain)["state"], chain_state(other)["state"])


def test_no_steps_leave_a_stage_as_it_is_whatever_its_batches():
    def refuse(upstream: Any) -> Any:
        raise AssertionError("must not be called")

    student = metaopt.Stage(Network(), SGD, metaopt.CrossEntropy(), refuse, num_steps=2, seed=1)
    chain = metaopt.Chain(teacher=two_stages().stages["teacher"], student=student)
    before = chain_state(chain)["state"]
    outcome = chain.train(example_weights(), num_steps={"teacher": 1, "student": 0})
    assert list(outcome.losses["student"]) == []
    after = chain_state(chain)["state"]
    assert_same(after["student"], before["student"])
    assert after["teacher"]["random"]["steps"] == 1


@pytest.mark.parametrize("num_steps", [-1, 1.5, {"student": -2}])
def test_step_counts_that_are_none_are_refused(num_steps):
    with pytest.raises(metaopt.ConfigError, match=r"must be a whole number from 0"):
        full_chain().train(example_weights(), num_steps=num_steps)


def test_a_training_that_fails_half_way_makes_earlier_outcomes_stale():
    chain = full_chain()
    outcome = chain.unroll(example_weights())
    chain.stages["student"].loss = lambda *args: torch.tensor(float("nan"), requires_grad=True)
    with pytest.raises(metaopt.StageError):
        chain.train(example_weights())
    with pytest.raises(metaopt.StageError, match="a state that the chain has left"):
        chain.commit(outcome)


# --- saved and resumed


def saved(state: Any) -> Any:
    """The state through a file that may hold nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_a_chain_resumes_bitwise_from_a_file(num_before):
    """In another process: other initial weights, other seeds; in the middle of a shuffled epoch."""
    chain, weights = full_chain(), example_weights()
    for _ in range(num_before):
        chain.commit(chain.unroll(weights))
    state = saved(chain.state_dict())
    torch.manual_seed(99)
    resumed = metaopt.Chain(
        teacher=metaopt.Stage(Network(0.3, batch_norm=True), ADAM, metaopt.WeightedLoss(), shuffled(), 3),
        student=metaopt.Stage(Network(0.3, batch_norm=True), ADAM, metaopt.Distillation(), shuffled(), 3),
    )
    resumed.load_state_dict(state)
    for _ in range(3):
        outcomes = [c.unroll(weights) for c in (chain, resumed)]
        assert_same(tensors_of(outcomes[1]), tensors_of(outcomes[0]))
        for c, outcome in zip((chain, resumed), outcomes, strict=True):
            c.commit(outcome)
            c.reset(["student"])
    assert_same(chain_state(resumed)["state"], chain_state(chain)["state"])


def test_a_state_held_in_memory_does_not_move_with_the_chain():
    chain = full_chain()
    state = chain.state_dict()
    kept = copy.deepcopy(state)
    expected = tensors_of(chain.unroll(example_weights()))
    for _ in range(2):
        chain.commit(chain.unroll(example_weights()))
        chain.stages["teacher"].optimizer.param_groups[0]["lr"] = 3.0
        assert_same(state, kept)
        chain.load_state_dict(state)
        assert_same(chain_state(chain)["state"], kept)
        assert_same(tensors_of(chain.unroll(example_weights())), expected)


def test_a_factory_draws_the_same_models_after_a_resume():
    def chain(seed: int) -> metaopt.Chain:
        return metaopt.Chain(only=metaopt.Stage(Linear, SGD, metaopt.WeightedLoss(), feature_batches(), 2, seed=seed))

    first, second = chain(1), chain(2)
    first.reset()
    second.load_state_dict(saved(first.state_dict()))
    first.reset()
    second.reset()
    assert_same(chain_state(first)["state"], chain_state(second)["state"])


def test_a_state_that_does_not_fit_is_refused():
    chain = full_chain()
    with pytest.raises(metaopt.ConfigError, match=r"stages \['teacher'\] do not fit the chain's"):
        chain.load_state_dict({"teacher": chain.state_dict()["teacher"]})
    state = chain.state_dict()
    del state["student"]["model"]["last.bias"]
    with pytest.raises(metaopt.ConfigError, match=r"no 'last\.bias'"):
        chain.load_state_dict(state)


# --- what goes wrong leaves the chain as it was


def test_a_non_finite_inner_loss_names_the_stage_and_the_step():
    def overflows(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return cross_entropy(model, batch, meta_params, upstream) / (0.0 if int(batch["index"][0]) else 1.0)

    chain = one_stage(overflows)
    before = chain_state(chain)
    for run in (chain.unroll, chain.train):
        with pytest.raises(metaopt.NonFiniteError, match=r"stage 'only': the inner loss is inf at inner step 1 of 3"):
            run(example_weights())
    assert_same(chain_state(chain), before)


def test_non_finite_weights_are_named():
    huge = functools.partial(torch.optim.SGD, lr=1e308)
    chain = one_stage(
        lambda model, batch, meta, up: 100 * model.params["linear.weight"].sum(), optimizer=huge, num_steps=1
    )
    with pytest.raises(metaopt.NonFiniteError, match=r"parameter 'linear\.weight' is not finite after 1 inner steps"):
        chain.unroll(example_weights())


# --- putting a chain together


def test_a_chain_needs_stages_in_the_order_in_which_they_read_each_other():
    teacher = one_stage().stages["only"]

    def reading(name: str) -> metaopt.Stage:
        return metaopt.Stage(Linear(), SGD, metaopt.Distillation(name), feature_batches(), 2)

    with pytest.raises(metaopt.ConfigError, match="no stages"):
        metaopt.Chain()
    with pytest.raises(metaopt.ConfigError, match="'teacher' is a Linear, not a Stage"):
        metaopt.Chain(teacher=Linear())  # type: ignore[arg-type]
    with pytest.raises(metaopt.ConfigError, match=r"Distillation reads stage 'techer', .*did you mean 'teacher'"):
        metaopt.Chain(teacher=teacher, student=reading("techer"))
    with pytest.raises(metaopt.ConfigError, match=r"stage 'student': .* does not come before it"):
        metaopt.Chain(student=reading("teacher"), teacher=teacher)
    assert repr(metaopt.Chain(teacher=teacher, student=reading("teacher"))) == "Chain(teacher → student)"


def test_a_loss_without_a_name_learns_from_the_stage_just_before():
    chain = two_stages()
    chain.stages["student"].loss = metaopt.Distillation()
    assert_same(tensors_of(chain.unroll(example_weights())), tensors_of(two_stages().unroll(example_weights())))
    with pytest.raises(metaopt.ConfigError, match="its stage is the first of the chain"):
        one_stage(metaopt.Distillation()).unroll(example_weights())


def test_stages_that_share_a_parameter_are_refused():
    model = Linear()
    shared = [metaopt.Stage(model, SGD, metaopt.CrossEntropy(), feature_batches(), 2) for _ in range(2)]
    with pytest.raises(metaopt.ConfigError, match=r"'first' and 'second' share the parameter .*initial="):
        metaopt.Chain(first=shared[0], second=shared[1])
    with pytest.raises(metaopt.ConfigError, match="share the parameter"):
        metaopt.Chain(first=shared[0], second=shared[0])
