"""Truncated, OneStep and FirstOrder are what they say: expressions of explicit Jacobians, and unrolls by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from inner_loops import ADAM
from matrices import OPTIMIZERS, SIZE, alone, error, exact, first_order, pair, truncated
from reference import relative_error
from small import example_weights, feature_batches, meta_loss, one_stage
from small_models import Linear, Network

import metaopt
from metaopt.diagnostics.meters import HeldBytes, count_flops
from metaopt.estimators import Captured, Checkpointed, DoubleBackward, FirstOrder, OneStep, Truncated, Unrolled

EXACT = 1e-12
PRODUCTS = [DoubleBackward, Captured]
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@optimizers
def test_the_matrices_are_those_of_the_chain(optimizer):
    problem = pair(optimizer)
    assert error(problem.by_metaopt(Unrolled()), problem.by(exact)) < EXACT


# --- Truncated


@pytest.mark.sampled(3)
@optimizers
@pytest.mark.parametrize("last", [1, 2, 4])
def test_truncated_is_the_sum_over_the_last_steps(optimizer, last):
    problem = pair(optimizer)
    expected = problem.by(truncated(last))
    for product, store in ((DoubleBackward, "states"), (Captured, "gradients"), (DoubleBackward, "recompute")):
        assert error(problem.by_metaopt(Truncated(last, product(), store)), expected) < EXACT
    assert error(expected, problem.by(exact)) > 1e-2


@optimizers
def test_truncated_is_an_unroll_that_is_cut_off(optimizer):
    """Weights and optimizer state are detached before the last steps; later stages see the cut."""
    problem, last = pair(optimizer), 2
    phi = problem.vector.requires_grad_()
    inputs, trained = (phi,), []
    for stage in problem.stages:
        z = stage.run(inputs, stage.num_steps - last).detach()
        for t in range(stage.num_steps - last, stage.num_steps):
            z = stage.step(z, inputs, t)
        trained.append(z[:SIZE])
        inputs = (phi, z[:SIZE])
    (expected,) = torch.autograd.grad(problem.meta_loss(trained), phi)
    assert error(problem.by_metaopt(Truncated(last)), expected) < EXACT


@pytest.mark.parametrize("last", [5, 100])
def test_truncated_to_the_whole_stage_is_exact(last):
    problem = pair("adam")
    assert error(problem.by_metaopt(Truncated(last)), problem.by(exact)) < EXACT


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("store", ["states", "gradients", "recompute"])
def test_truncated_is_training_and_then_the_last_steps(store, product):
    """On a network with dropout and batch norm: the first steps are plain training."""
    torch.manual_seed(1)
    model, phi = Network(0.3, batch_norm=True), example_weights()
    chain = one_stage(model=model, optimizer=ADAM, num_steps=7, estimator=Truncated(3, product(), store))
    found = metaopt.hypergradient(meta_loss(chain, phi), phi)
    chain.train(phi, 4)
    chain.stages["only"].num_steps, chain.stages["only"].estimator = 3, Unrolled()
    assert relative_error(found, metaopt.hypergradient(meta_loss(chain, phi), phi)) < EXACT


def test_truncated_keeps_its_last_steps_only():
    held, phi = HeldBytes(), example_weights()
    kept = {}
    for num_steps in (10, 40):
        chain = one_stage(
            model=Linear, optimizer=ADAM, num_steps=num_steps, estimator=Truncated(4, store="states"),
            batches=feature_batches(1),
        )  # fmt: skip
        before = held.now
        with held:
            trained = chain.unroll(phi)
        kept[num_steps] = held.now - before
        del trained
    losses = 30 * 8  # the returned losses are one number for each step
    assert kept[40] - kept[10] == losses


# --- OneStep


@optimizers
@pytest.mark.parametrize("product", PRODUCTS)
def test_one_step_is_the_chain_rule_of_the_last_steps(optimizer, product):
    problem = pair(optimizer)
    assert error(problem.by_metaopt(OneStep(product())), problem.by(truncated(1))) < EXACT


@optimizers
def test_one_step_is_the_product_of_the_matrices(optimizer):
    """dL3/dW · ∂Φ/∂g · d²L2/dW dWo · ∂Φ/∂g · d²L1/dWo dA: A is read by the first stage's loss alone."""
    whole = pair(optimizer, learned=False)
    stages = (whole.stages[0], replace(whole.stages[1], weighted=False))
    problem = replace(whole, stages=stages, reads_last=True)
    of_first, of_second = (stage.at(stage.num_steps - 1, problem.inputs(i)) for i, stage in enumerate(stages))
    dl3_dw = torch.func.grad(lambda theta: problem.meta_loss([theta]))(stages[1].run(problem.inputs(1))[:SIZE])
    dw_dg, dwo_dg = (at.update_of_gradient[:SIZE] for at in (of_second, of_first))
    expected = dl3_dw @ dw_dg @ of_second.mixed[1] @ dwo_dg @ of_first.mixed[0]
    assert error(problem.by_metaopt(OneStep()), expected) < EXACT


# --- FirstOrder


@optimizers
def test_first_order_keeps_the_mixed_terms_alone(optimizer):
    problem = pair(optimizer)
    expected = problem.by(first_order)
    for product, store in ((DoubleBackward, "states"), (Captured, "gradients"), (Captured, "recompute")):
        assert error(problem.by_metaopt(FirstOrder(product(), store)), expected) < EXACT
    assert error(expected, problem.by(exact)) > 1e-3


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_initial_weights_get_the_gradient_of_first_order_maml(optimizer):
    """The gradient at the trained weights, carried back by the update alone: for plain SGD, as it is."""
    problem = alone(pair(optimizer))
    stage, inputs = problem.stages[0], problem.inputs(0)
    trained = stage.run(inputs)[:SIZE]
    gradient = torch.func.grad(lambda theta: problem.meta_loss([theta]))(trained)
    decay = stage.inner.options()["weight_decay"]
    expected = gradient * (1 - float(problem.phi.rate.detach().exp()) * decay) ** stage.num_steps
    assert error(problem.by_metaopt(FirstOrder())[-SIZE:], expected) < EXACT


def test_first_order_nears_the_exact_one_as_the_rate_falls():
    def error_at(rate: float) -> float:
        problem = alone(pair("sgd"))
        with torch.no_grad():
            problem.phi.rate.fill_(rate)
        return error(problem.by_metaopt(FirstOrder()), problem.by(exact))

    assert error_at(-6.0) < error_at(-4.0) / 5 < error_at(-2.0) / 25


def test_first_order_leaves_out_the_hessian_s_flops():
    def flops(estimator: Any) -> int:
        torch.manual_seed(1)
        chain = one_stage(model=Network(), num_steps=6, batches=feature_batches(1), estimator=estimator)
        phi = example_weights()
        metaopt.hypergradient(meta_loss(chain, phi), phi)
        return count_flops(lambda: metaopt.hypergradient(meta_loss(chain, phi), phi))

    assert flops(FirstOrder(Captured())) < 0.8 * flops(Checkpointed(Captured()))


# --- all of them


def test_unlike_estimators_in_one_chain():
    problem = pair("momentum")
    expected = problem.by(truncated(2), first_order)
    assert error(problem.by_metaopt(Truncated(2), FirstOrder()), expected) < EXACT


def test_how_they_are_printed():
    assert repr(Truncated(3)).startswith("Truncated(3, product=DoubleBackward()")
    assert repr(OneStep(Captured())) == "OneStep(product=Captured())"
