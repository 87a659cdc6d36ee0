"""A chain's four states (weights, optimizer, streams, random state): who moves them, and when."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chains import ESTIMATORS, full_chain, shuffled
from small import (
    ADAM,
    MOMENTUM,
    assert_same,
    chain_state,
    cross_entropy,
    example_weights,
    feature_batches,
    meta_loss,
    one_stage,
    tensors_of,
    two_stages,
)
from small_models import Network
from torch import Tensor

import metaopt

both = pytest.mark.parametrize("estimator", ESTIMATORS)

# --- unroll


@both
def test_unroll_changes_nothing_and_repeats_bitwise(estimator):
    chain, weights = full_chain(estimator=estimator), example_weights()
    chain.commit(chain.unroll(weights))  # warm optimizers, moved statistics
    before = chain_state(chain)
    first, again = chain.unroll(weights), chain.unroll(weights)
    assert_same(tensors_of(again), tensors_of(first))
    gradients = [
        metaopt.hypergradient(F.cross_entropy(t["student"](b["inputs"]), b["labels"]), weights)
        for t, b in ((first, feature_batches(1)[0]), (again, feature_batches(1)[0]))
    ]
    assert_same(gradients[0], gradients[1])
    assert gradients[0]["logits"].abs().sum() > 0
    torch.rand(3)  # what others draw between two unrolls makes no difference
    assert_same(tensors_of(chain.unroll(weights)), tensors_of(first))
    after = chain_state(chain)
    del before["random"], after["random"]
    assert_same(after, before)


def test_unroll_leaves_the_global_random_state_alone():
    def mixed(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        scale = random.random() + np.random.beta(1.0, 1.0) + float(torch.rand(()))
        return scale * cross_entropy(model, batch, meta_params, upstream)

    chain = one_stage(mixed, shuffled(), model=Network(0.5))
    before = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    first, again = (tensors_of(chain.unroll(example_weights())) for _ in range(2))
    assert_same(first, again)
    assert len(set(first["only"]["losses"].tolist())) == 3
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


@both
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["momentum", "adam"])
def test_unroll_without_a_graph_is_the_same_sweep(optimizer, estimator):
    chain, weights = full_chain(optimizer, estimator), example_weights()
    graph = chain.unroll(weights)
    with torch.no_grad():
        plain = chain.unroll(weights)
    assert_same(tensors_of(plain), tensors_of(graph), 1e-12)
    assert all(p.requires_grad for p in graph["student"].params.values())
    assert not any(p.requires_grad for model in plain.values() for p in model.params.values())


def test_unroll_never_touches_gradients_of_the_users_models():
    chain, weights = full_chain(), example_weights()
    for stage in chain.stages.values():
        for param in stage.model.parameters():
            param.grad = torch.ones_like(param)
    before = chain_state(chain)["modules"]
    metaopt.backward(meta_loss(chain, weights), weights)
    chain.train(weights, num_steps=0)
    assert_same(chain_state(chain)["modules"], before)


def test_a_trained_chain_is_a_mapping_of_stages():
    outcome = two_stages().unroll(example_weights())
    assert list(outcome) == ["teacher", "student"]
    assert len(outcome) == 2
    assert "student" in outcome
    assert "assistant" not in outcome
    assert {name: list(losses.shape) for name, losses in outcome.losses.items()} == {"teacher": [3], "student": [3]}
    assert not outcome.losses["student"].requires_grad
    with pytest.raises(KeyError, match="did you mean 'student'"):
        _ = outcome["studnet"]


def test_a_loss_that_reads_a_stage_that_is_not_there_says_which_are():
    chain = two_stages()
    chain.stages["student"].loss = lambda model, batch, meta, upstream: upstream["techer"](batch["inputs"]).mean()
    with pytest.raises(metaopt.ConfigError, match="did you mean 'teacher'"):
        chain.unroll(example_weights())


def test_training_inside_autocast_follows_the_weights():
    """Autocast caches the low-precision copy of a leaf; it must not outlive an optimizer step."""

    def inside(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(batch["inputs"]).float(), batch["labels"])

    def bare(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return F.cross_entropy(model(batch["inputs"]).float(), batch["labels"])

    chains = [one_stage(loss, feature_batches(1), num_steps=6) for loss in (inside, bare)]
    expected = chains[0].twin(torch.float32).train(example_weights())
    with torch.autocast("cpu", torch.bfloat16):
        found = chains[1].twin(torch.float32).train(example_weights())
    assert len(set(found.losses["only"].tolist())) == 6
    assert_same(tensors_of(found), tensors_of(expected))


# --- commit


@both
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["momentum", "adam"])
def test_commit_carries_on_all_four_states(optimizer, estimator):
    """Three times unroll and commit is one plain training of three times the steps."""
    chain, plain = full_chain(optimizer, estimator), full_chain(optimizer)
    student = chain.stages["student"]
    for _ in range(3):
        # A student learns from the teacher of its own unroll, so the plain chain takes the same turns.
        chain.commit(chain.unroll(example_weights()))
        plain.train(example_weights())
    assert_same(chain_state(chain)["state"], chain_state(plain)["state"], 1e-12)
    long = full_chain(optimizer)
    long.train(example_weights(), num_steps={"teacher": 9, "student": 0})
    found, expected = (c.state_dict()["teacher"] for c in (chain, long))
    for part in ("model", "optimizer", "stream", "random"):
        assert_same(found[part], expected[part], 1e-12)
    assert student.state_dict()["random"]["steps"] == 9


def test_commit_moves_only_what_training_moves():
    chain = full_chain()
    outcome = chain.unroll(example_weights())
    objects = chain_state(chain)["modules"]["teacher"]["objects"]
    optimizer, groups = chain.stages["teacher"].optimizer, chain.stages["teacher"].optimizer.param_groups
    chain.commit(outcome)
    after = chain_state(chain)["modules"]["teacher"]
    assert after["objects"] == objects
    assert chain.stages["teacher"].optimizer is optimizer
    assert chain.stages["teacher"].optimizer.param_groups is groups
    assert_same(after["params"], {n: p.detach() for n, p in outcome["teacher"].params.items()})
    assert set(after["types"].values()) == {"Parameter"}
    assert all(p.requires_grad for p in chain.stages["teacher"].model.parameters())


def test_an_outcome_keeps_its_values_after_its_commit_and_the_next():
    chain = full_chain()
    outcome = chain.unroll(example_weights())
    kept = tensors_of(outcome)
    chain.commit(outcome)
    chain.commit(chain.unroll(example_weights()))
    assert_same(tensors_of(outcome), kept)


def test_commit_of_some_stages_leaves_the_others():
    chain = full_chain()
    before = chain_state(chain)
    outcome = chain.unroll(example_weights())
    chain.commit(outcome, stages=["teacher"])
    after = chain_state(chain)
    for part in ("state", "modules"):
        assert_same(after[part]["student"], before[part]["student"])
    assert_same(after["modules"]["teacher"]["params"], {n: p.detach() for n, p in outcome["teacher"].params.items()})
    assert after["state"]["teacher"]["random"]["steps"] == 3


MOVES = {
    "commit": lambda chain, outcome: chain.commit(outcome),
    "commit of one stage": lambda chain, outcome: chain.commit(outcome, "teacher"),
    "reset": lambda chain, outcome: chain.reset(),
    "train": lambda chain, outcome: chain.train(example_weights(), num_steps=1),
    "load": lambda chain, outcome: chain.load_state_dict(chain.state_dict()),
}


@pytest.mark.parametrize("move", MOVES)
def test_commit_of_a_stale_outcome_is_refused_and_changes_nothing(move):
    chain = full_chain()
    outcome, same = chain.unroll(example_weights()), chain.unroll(example_weights())
    MOVES[move](chain, same)
    before = chain_state(chain)
    with pytest.raises(metaopt.StageError, match=r"commit: this unroll started from a state .* unroll again"):
        chain.commit(outcome)
    assert_same(chain_state(chain), before)


def test_commit_of_another_chains_outcome_or_of_a_training_is_refused():
    chain, other = full_chain(), full_chain()
    for outcome in (other.unroll(example_weights()), chain.train(example_weights())):
        with pytest.raises(metaopt.StageError, match="from another chain"):
            chain.commit(outcome)


@pytest.mark.parametrize("call", ["commit", "reset", "train"])
def test_unknown_stage_names_are_refused(call):
    chain = full_chain()
    outcome = chain.unroll(example_weights())
    calls = {
        "commit": lambda: chain.commit(outcome, ["studnet"]),
        "reset": lambda: chain.reset(["studnet"]),
        "train": lambda: chain.train(example_weights(), num_steps={"studnet": 3}),
    }
    before = chain_state(chain)
    with pytest.raises(metaopt.ConfigError, match=r"no stage 'studnet' \(did you mean 'student'"):
        calls[call]()
    assert_same(chain_state(chain), before)
    chain.commit(outcome)  # and the outcome is still good


def test_reset_goes_back_while_streams_and_random_state_move_on():
    chain = full_chain()
    start = chain_state(chain)
    first = chain.unroll(example_weights())
    chain.commit(first)
    moved = chain.state_dict()
    chain.reset(["student"])
    after = chain.state_dict()
    assert_same(after["teacher"], moved["teacher"])
    for part in ("model", "optimizer"):
        assert_same(after["student"][part], start["state"]["student"][part])
    for part in ("stream", "random"):
        assert after["student"][part] != start["state"]["student"][part]
    chain.reset()
    again = chain.unroll(example_weights())
    assert not torch.equal(again.losses["teacher"], first.losses["teacher"])  # other batches, other masks


def test_the_step_that_a_loss_reads_goes_on_after_a_commit_and_begins_again_after_a_reset():
    seen: list[int] = []

    def noting(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        seen.append(model.step)
        return cross_entropy(model, batch, meta_params, upstream)

    chain = one_stage(noting, num_steps=2)
    for _ in range(2):
        chain.commit(chain.unroll(example_weights()))
    chain.reset()
    chain.unroll(example_weights())
    assert seen == [0, 1, 2, 3, 0, 1]
