"""The reverse sweep equals the unrolled graph, for every store and product, on everything that an inner loop can do."""

import functools
from dataclasses import replace

import library
import pytest
import torch
from problems import (
    ADAM,
    MOMENTUM,
    distilled_features,
    distilled_text,
    fed_with_hidden_states,
    linear_stages,
    probed_text,
)
from reference import relative_error

import metaopt
from metaopt.estimators import Checkpointed, DoubleBackward, FiniteDifference, Unrolled

STORES = ("states", "gradients", "recompute")
EXACT = 1e-12


def hypergradients(problem, estimator):
    return library.hypergradient(problem, library.as_chain(problem, estimator=estimator))


PROBLEMS = {
    "ridge-3": lambda: linear_stages(3, 0.9)[1],
    "features-adam": lambda: distilled_features(ADAM, ADAM),
    "text": lambda: distilled_text(MOMENTUM, ADAM),
    "hidden-states": fed_with_hidden_states,
    "probed": probed_text,
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_sweep_equals_unrolled(name, store):
    problem = PROBLEMS[name]()
    exact = hypergradients(problem, Unrolled())
    assert relative_error(hypergradients(problem, Checkpointed(store=store)), exact) < EXACT


@pytest.mark.parametrize("name", PROBLEMS)
def test_finite_difference_product_is_near(name):
    problem = PROBLEMS[name]()
    exact = hypergradients(problem, Unrolled())
    assert relative_error(hypergradients(problem, Checkpointed(FiniteDifference())), exact) < 1e-4


def clipped(gradients):
    size = torch.cat([g.flatten() for g in gradients.values()]).norm()
    return {name: g * (0.05 / size) for name, g in gradients.items()}


@pytest.mark.parametrize("store", STORES)
def test_slots_are_differentiated_alike(store):
    problem = replace(distilled_features(MOMENTUM, ADAM))
    problem = problem.with_stage("teacher", transform=clipped)
    exact = hypergradients(problem, Unrolled())
    assert relative_error(hypergradients(problem, Checkpointed(store=store)), exact) < EXACT


def test_unlike_estimators_in_one_chain_agree():
    problem = distilled_features(MOMENTUM, ADAM)
    exact = hypergradients(problem, Unrolled())
    chain = library.as_chain(problem)
    chain.stages["teacher"].estimator = Checkpointed(DoubleBackward(), "recompute")
    assert relative_error(library.hypergradient(problem, chain), exact) < EXACT


def test_a_second_backward_needs_retain_graph():
    problem = distilled_features(MOMENTUM, ADAM)
    chain = library.as_chain(problem, estimator=Checkpointed())
    loss = problem.objective(chain.unroll(problem.phi), chain.move(problem.batch), problem.phi)
    first = metaopt.hypergradient(loss, problem.phi, retain_graph=True)
    second = metaopt.hypergradient(loss, problem.phi)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(RuntimeError, match="second time"):
        metaopt.hypergradient(loss, problem.phi)


def test_a_tensor_that_the_loss_closes_over_is_refused():
    problem = distilled_features(functools.partial(torch.optim.SGD, lr=0.1), ADAM)
    outside = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = problem.chain["teacher"].loss
    problem = problem.with_stage("teacher", loss=lambda *args: outside * loss(*args))
    with pytest.raises(metaopt.StageError, match="closes over 1 tensor"):
        hypergradients(problem, Checkpointed())


def test_unknown_store_is_refused():
    with pytest.raises(metaopt.ConfigError, match="did you mean 'gradients'"):
        Checkpointed(store="gradient")  # pyright: ignore[reportArgumentType]
