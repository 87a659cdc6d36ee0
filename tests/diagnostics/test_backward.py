"""The one backward: what it adds, what it leaves alone, and what it says when something is missing."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from cut_lines import shown
from small import (
    assert_same,
    chain_state,
    cross_entropy,
    drawing,
    example_weights,
    feature_batches,
    meta_loss,
    one_stage,
    two_stages,
)
from torch import nn

import metaopt
from metaopt.core.meta_params import named_tensors
from metaopt.estimators import Checkpointed, Unrolled


def test_backward_fills_what_plain_backward_fills():
    ours, theirs = example_weights(), example_weights()
    chain = two_stages()
    found = metaopt.backward(meta_loss(chain, ours), ours)
    meta_loss(chain, theirs).backward()
    assert ours.logits.grad is not None
    assert ours.logits.grad.abs().sum() > 0
    assert_same(ours.logits.grad, theirs.logits.grad)
    assert_same(found, {"logits": theirs.logits.grad})


def test_backward_adds_and_leaves_what_it_added_to():
    weights = example_weights()
    chain = two_stages()
    once = metaopt.hypergradient(meta_loss(chain, weights), weights)["logits"]
    assert weights.logits.grad is None
    before = weights.logits.grad = drawing(1)(15)
    kept = before.clone()
    metaopt.backward(meta_loss(chain, weights), weights)
    assert_same(weights.logits.grad, kept + once)
    assert_same(before, kept)


def test_backward_touches_no_gradient_of_the_users_models():
    chain, weights = two_stages(), example_weights()
    before = chain_state(chain)
    metaopt.backward(meta_loss(chain, weights), weights)
    assert_same(chain_state(chain), before)
    assert all(p.grad is None for stage in chain.stages.values() for p in stage.model.parameters())


def test_hypergradient_of_several_modules_by_name():
    several = {"teacher": example_weights(), "unused": example_weights(), "scale": nn.Linear(1, 1, dtype=torch.float64)}
    chain = two_stages()
    chain.stages["teacher"].loss = metaopt.WeightedLoss("teacher")
    loss = meta_loss(chain, several)
    with pytest.raises(metaopt.MissingPathError, match=r"'unused\.logits', 'scale\.weight', 'scale\.bias': no path"):
        metaopt.backward(loss, several)
    assert all(tensor.grad is None for tensor in named_tensors(several).values())
    found = metaopt.hypergradient(meta_loss(chain, several), {"teacher": several["teacher"]})
    assert list(found) == ["teacher.logits"]


def test_a_graph_can_be_kept_for_another_look():
    weights = example_weights()
    loss = meta_loss(two_stages(), weights)
    first = metaopt.hypergradient(loss, weights, retain_graph=True)
    assert_same(metaopt.hypergradient(loss, weights), first)
    with pytest.raises(RuntimeError, match="second time"):
        metaopt.hypergradient(loss, weights)


def test_a_meta_loss_without_a_graph_names_every_meta_parameter():
    weights = example_weights()
    with pytest.raises(metaopt.MissingPathError, match=r"'logits': the meta-loss has no graph at all.*\.detach\(\)"):
        metaopt.backward(meta_loss(two_stages(), weights).detach(), weights)
    with torch.no_grad():
        loss = meta_loss(two_stages(), weights)
    with pytest.raises(metaopt.MissingPathError, match="no graph at all"):
        metaopt.backward(loss, weights)
    assert weights.logits.grad is None


def test_a_missing_path_tells_what_to_call():
    weights = example_weights()
    with pytest.raises(metaopt.MissingPathError) as raised:
        metaopt.hypergradient(meta_loss(two_stages(), weights).detach(), weights)
    assert "print(metaopt.explain_hypergradient(chain, objective, batch, meta_params))" in str(raised.value)


def on_labels(model, batch, meta_params, upstream):
    labels = upstream["teacher"](batch["inputs"]).argmax(-1)  # cut
    return F.cross_entropy(model(batch["inputs"]), labels)


@pytest.mark.parametrize("estimator", [Unrolled(), Checkpointed()], ids=["unrolled", "checkpointed"])
def test_the_line_that_cuts_a_path_is_named_with_nothing_but_the_graph(estimator):
    chain, weights = two_stages(estimator=estimator), example_weights()
    chain.stages["student"].loss = on_labels
    loss, before = meta_loss(chain, weights), chain_state(chain)
    with pytest.raises(metaopt.MissingPathError) as raised:
        metaopt.backward(loss, weights)
    said = str(raised.value)
    for part in ("'logits': no path of the graph", "the loss of stage 'student'", "argmax", shown(on_labels)):
        assert part in said
    assert "explain_hypergradient" not in said
    assert_same(chain_state(chain), before)
    assert weights.logits.grad is None


def test_what_the_graph_does_not_show_is_said_to_be_elsewhere():
    chain, weights = two_stages(), example_weights()
    chain.stages["student"].loss = cross_entropy
    loss = meta_loss(chain, weights)
    with pytest.raises(metaopt.MissingPathError) as raised:
        metaopt.backward(loss, weights)
    assert "take upstream['teacher'] in a loss" in str(raised.value)
    assert "print(metaopt.explain_hypergradient(chain, objective, batch, meta_params)) looks there" in str(raised.value)


def test_without_its_chain_the_error_says_what_to_call():
    chain, weights = two_stages(), example_weights()
    chain.stages["student"].loss = on_labels
    loss = meta_loss(chain, weights)
    del chain
    gc.collect()
    with pytest.raises(metaopt.MissingPathError, match=r"at which line, says print\(metaopt\.explain_hypergradient"):
        metaopt.backward(loss, weights)


def test_what_learns_nothing_has_no_hypergradient():
    uniform = metaopt.Uniform()
    assert metaopt.backward(meta_loss(one_stage(), uniform), uniform) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_meta_loss_is_an_error_before_any_gradient(value):
    weights = example_weights()
    weights.logits.grad = torch.ones_like(weights.logits)
    with pytest.raises(metaopt.NonFiniteError, match=rf"the meta-loss is {value}"):
        metaopt.backward(meta_loss(two_stages(), weights) * value, weights)
    assert_same(weights.logits.grad, torch.ones_like(weights.logits))


def test_a_non_finite_hypergradient_is_named_and_touches_nothing():
    weights = {"good": example_weights(), "bad": example_weights(seed=1)}
    loss = meta_loss(one_stage(metaopt.WeightedLoss("good")), weights) + (weights["bad"].logits * 0).sum().sqrt()
    with pytest.raises(metaopt.NonFiniteError, match=r"the hypergradient of 'bad\.logits' is not finite though"):
        metaopt.backward(loss, weights)
    assert weights["good"].logits.grad is None
    assert weights["bad"].logits.grad is None


@pytest.mark.parametrize("loss", [1.0, torch.ones(2, requires_grad=True)])
def test_a_meta_loss_that_is_no_scalar_is_refused(loss):
    with pytest.raises(metaopt.StageError, match="must return a scalar tensor"):
        metaopt.backward(loss, example_weights())


def test_several_batches_make_one_meta_loss():
    weights, chain = example_weights(), two_stages()
    objective, batches = metaopt.ValidationLoss("student"), feature_batches(2, seed=8)
    outcome = chain.unroll(weights)
    together = metaopt.hypergradient(
        torch.stack([objective(outcome, batch, weights) for batch in batches]).mean(), weights
    )["logits"]
    apart = []
    for batch in batches:
        loss = objective(chain.unroll(weights), batch, weights)
        apart.append(metaopt.hypergradient(loss, weights)["logits"])
    assert torch.allclose(together, (apart[0] + apart[1]) / 2, rtol=0, atol=1e-15)
