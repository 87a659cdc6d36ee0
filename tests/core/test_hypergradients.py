"""Hypergradients of whole chains, against closed forms, a hand-written unroll and central differences.

Bounds in float64: 1e-12 between exact routes (rounding through a few steps is 1e-16 to 1e-13), 1e-8 against
central differences, whose own error on these smooth problems is below 1e-9.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import library
import pytest
import torch
from differences import difference_error, train_plainly
from networks import Perceptron
from problems import (
    ADAM,
    MOMENTUM,
    ByPosition,
    closed_hypergradient,
    cross_entropy,
    distilled_features,
    distilled_text,
    fed_with_hidden_states,
    in_float32,
    inputs_of,
    linear_stages,
    normal,
    probed_text,
)
from reference import hypergradient, relative_error

import metaopt

EXACT, DIFFERENCE = 1e-12, 1e-8


def assert_proven(problem, chain=None, objective=None, difference=DIFFERENCE, coordinates=()):
    """The library's hypergradient equals the hand unroll's, and the central difference of plain training."""
    found = library.hypergradient(problem, chain, objective)
    assert relative_error(found, hypergradient(problem)) < EXACT
    assert difference_error(found, problem, num_random=1, coordinates=coordinates) < difference


# --- against closed forms


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_chains_of_ridge_stages_equal_the_closed_form(num_stages, momentum):
    stages, problem = linear_stages(num_stages, momentum)
    assert relative_error(library.hypergradient(problem), closed_hypergradient(stages, problem)) < EXACT
    assert_proven(problem, coordinates=[("values", 0), ("values", 4)])


# --- unlike models, and the library's own losses


@pytest.mark.sampled(2)
@pytest.mark.parametrize("make", [distilled_features, distilled_text, fed_with_hidden_states, probed_text])
def test_two_stages_of_unlike_models(make):
    problem = make()
    assert_proven(problem, coordinates=[("logits", 1)])


@pytest.mark.parametrize("key", ["source", "index"])
@pytest.mark.parametrize("parametrisation", ["softmax", "sigmoid"])
def test_the_library_s_losses_and_weights_are_what_they_say(key, parametrisation):
    problem = distilled_text()
    kind, size = {"source": (metaopt.SourceWeights, 3), "index": (metaopt.ExampleWeights, 4)}[key]
    weights = kind(size, parametrisation).double()
    weights.logits.data.copy_(normal(4)(size))
    by_hand = ByPosition(weights.logits.detach().clone(), key, parametrisation)
    losses = {"teacher": metaopt.WeightedLoss(), "student": metaopt.Distillation("teacher", temperature=2.0)}
    chain, objective = library.as_chain(problem, losses), metaopt.ValidationLoss("student")
    found = library.hypergradient(replace(problem, phi=weights), chain, objective)
    assert relative_error(found, hypergradient(replace(problem, phi=by_hand))) < EXACT


def test_hidden_states_loss_is_what_it_says():
    problem = fed_with_hidden_states()
    losses = {"teacher": metaopt.WeightedLoss(), "student": metaopt.HiddenStates()}
    chain = library.as_chain(problem, losses)
    found = library.hypergradient(problem, chain, metaopt.PipelineLoss("student"))
    assert relative_error(found, hypergradient(problem)) < EXACT


def on_fixed_labels(model, batch, phi, upstream):
    return cross_entropy(model(**inputs_of(batch)), batch["labels"]).mean()


def on_argmax_labels(model, batch, phi, upstream):
    return cross_entropy(model(**inputs_of(batch)), upstream["teacher"](**inputs_of(batch)).argmax(-1)).mean()


@pytest.mark.parametrize("cut", [on_fixed_labels, on_argmax_labels])
@pytest.mark.parametrize("teacher", [MOMENTUM, ADAM], ids=["sgd", "adam"])
def test_a_cut_between_stages_is_an_error_and_not_a_zero(teacher, cut):
    problem = distilled_features(teacher, ADAM).with_stage("student", loss=cut)
    with pytest.raises(metaopt.MissingPathError, match="'logits'"):
        library.hypergradient(problem)


class Cube(torch.autograd.Function):
    """x³; like most functions that users write, its backward receives zeros for a missing gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, *gradients):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradients[0]


class Cubed(Perceptron):
    def forward(self, inputs):
        return Cube.apply(super().forward(inputs))


def test_a_cut_behind_a_user_s_own_function_is_an_error_too():
    problem = distilled_features(MOMENTUM, ADAM).with_stage("teacher", model=Cubed(16, 3).double())
    assert_proven(problem)
    with pytest.raises(metaopt.MissingPathError, match="'logits'"):
        library.hypergradient(problem.with_stage("student", loss=on_fixed_labels))


# --- random state, buffers, warm starts, precision


@pytest.mark.parametrize("make", [distilled_text, distilled_features])
def test_dropout_is_the_same_in_every_route(make):
    problem = make(dropout=0.3)
    chain = library.as_chain(problem)
    without = library.hypergradient(make())
    found = library.hypergradient(problem, chain)
    assert relative_error(found, without) > 1e-2
    assert_proven(library.replayed(problem, chain), chain, metaopt.ValidationLoss("student"))


def test_dropout_moves_on_at_a_commit():
    problem = distilled_features(dropout=0.3)
    chain = library.as_chain(problem)
    first = [chain.stages["teacher"].step_seed(t) for t in range(6)]
    chain.commit(chain.unroll(problem.phi))
    assert chain.stages["teacher"].step_seed(0) == first[3]
    assert len(set(first)) == 6


def test_batch_norm_statistics_move_as_in_torch():
    problem = distilled_features(batch_norm=True)
    trained, plain = library.as_chain(problem).unroll(problem.phi), train_plainly(problem.chain, problem.phi)
    for name, buffer in plain["student"].buffers.items():
        torch.testing.assert_close(trained["student"].buffers[name], buffer, rtol=1e-12, atol=1e-12)
    # The meta-loss reads the running statistics, which carry no graph in any route, so differences cannot judge.
    assert relative_error(library.hypergradient(problem), hypergradient(problem)) < EXACT


def classifier_warmed_up(model, factory, batches):
    optimizer = factory(model.parameters())
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(model(**inputs_of(batch)), batch["labels"]).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(("teacher", "student"), [(ADAM, MOMENTUM), (MOMENTUM, ADAM)], ids=["adam-sgd", "sgd-adam"])
def test_used_optimizers_go_on_from_their_state(teacher, student):
    problem = distilled_features(teacher, student)
    cold = library.hypergradient(problem)
    for name, factory in (("teacher", teacher), ("student", student)):
        stage = problem.chain[name]
        used = classifier_warmed_up(stage.model, factory, stage.batches)
        problem = problem.with_stage(name, optimizer=used)
    fresh = replace(
        problem,
        chain={n: replace(s, optimizer=f) for (n, s), f in zip(problem.chain.items(), (teacher, student), strict=True)},
    )
    assert relative_error(library.hypergradient(fresh), cold) > 1e-2  # the weights have moved
    assert relative_error(library.hypergradient(problem), library.hypergradient(fresh)) > 1e-2  # the state counts
    assert_proven(problem)


def test_after_a_commit_the_next_hypergradient_is_that_of_the_state_reached():
    problem = distilled_features(ADAM, MOMENTUM)
    chain = library.as_chain(problem)
    trained = chain.unroll(problem.phi)
    chain.commit(trained)
    plain = train_plainly(problem.chain, problem.phi)
    reached = problem
    for name, stage in chain.stages.items():
        for key, value in plain[name].params.items():
            torch.testing.assert_close(stage.model.get_parameter(key), value, rtol=1e-12, atol=1e-13)
        batches = problem.chain[name].batches  # 3 steps over 2 batches: the second unroll begins with the other one
        reached = reached.with_stage(name, model=stage.model, optimizer=stage.optimizer, batches=batches[::-1])
    found = library.hypergradient(problem, chain)
    assert relative_error(found, hypergradient(reached)) < EXACT
    assert difference_error(found, reached, num_random=1) < DIFFERENCE


SHARP = functools.partial(torch.optim.Adam, lr=0.02, eps=1e-5)


@pytest.mark.parametrize(
    ("make", "factory", "bound"),
    [
        (distilled_features, MOMENTUM, 1e-5),
        (distilled_features, SHARP, 1e-4),
        (distilled_text, MOMENTUM, 1e-5),
        (distilled_text, ADAM, 1e-5),
        # From a cold start at eps=1e-5 a step is almost the sign of a gradient: ill-conditioned in any float32 route.
        (distilled_text, SHARP, 1e-3),
    ],
)
def test_float32_agrees_with_a_float64_hand_unroll(make, factory, bound):
    exact = hypergradient(make(factory, factory))
    problem = in_float32(make(factory, factory))
    found = library.hypergradient(problem)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    rounding = relative_error(hypergradient(problem), exact)
    assert relative_error(found, exact) < min(bound, max(5 * rounding, 1e-5))
