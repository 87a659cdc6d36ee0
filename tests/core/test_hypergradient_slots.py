"""What a stage can be given beside a loss: several meta-parameters, learned starts and rates, transforms, schedules.

Bounds as in `test_hypergradients.py`.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import library
import pytest
import torch
from differences import difference_error, train_plainly
from problems import (
    ADAM,
    MOMENTUM,
    ByPosition,
    Values,
    cross_entropy,
    distilled_features,
    distilled_text,
    in_float32,
    inputs_of,
    normal,
    soft_labels,
    weighted_cross_entropy,
)
from reference import hypergradient, relative_error, unroll
from torch import nn

import metaopt
from metaopt.estimators import Checkpointed

EXACT, DIFFERENCE = 1e-12, 1e-8
ADAMW = functools.partial(torch.optim.AdamW, lr=0.02, eps=1e-2, weight_decay=0.1)


def assert_proven(problem, chain=None, **kwargs):
    """The library's hypergradient equals the hand unroll's, and the central difference of plain training."""
    found = library.hypergradient(problem, chain)
    exact = hypergradient(problem)
    assert all(float(part.norm()) > 0 for part in exact.values())
    assert relative_error(found, exact) < EXACT
    assert difference_error(found, problem, num_random=1, **kwargs) < DIFFERENCE
    if chain is None:
        swept = library.hypergradient(problem, library.as_chain(problem, estimator=Checkpointed()))
        assert relative_error(swept, exact) < EXACT


class Both(nn.Module):
    """Example weights, and a vector `values` for whatever the test learns beside them."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weights = ByPosition(normal(5)(4), "index")
        self.values = nn.Parameter(values)

    def forward(self, batch):
        return self.weights(batch)


# --- several meta-parameters, read in several places


def test_every_stage_and_the_meta_objective_may_read_a_named_mapping():
    phi = {"weights": ByPosition(normal(6)(3), "source"), "scales": Values(torch.tensor([0.3, -0.2]).double())}

    def teach(model, batch, phi, upstream):
        return weighted_cross_entropy(model, batch, phi["weights"], upstream)

    def study(model, batch, phi, upstream):
        soft = soft_labels(model, batch, phi, upstream, teacher="teacher", temperature=1.5)
        hard = weighted_cross_entropy(model, batch, phi["weights"], upstream)
        return phi["scales"].values[0].exp() * soft + hard

    def objective(trained, batch, phi):
        losses = [cross_entropy(trained[n](**inputs_of(batch)), batch["labels"]).mean() for n in ("teacher", "student")]
        return losses[1] + phi["scales"].values[1] * losses[0] + 0.1 * (phi["weights"].logits ** 2).sum()

    problem = replace(distilled_features(), phi=phi, objective=objective)
    problem = problem.with_stage("teacher", loss=teach).with_stage("student", loss=study)
    assert_proven(problem, coordinates=[("weights.logits", 2), ("scales.values", 0), ("scales.values", 1)])


def test_the_library_s_weighted_loss_reads_the_named_one():
    problem = distilled_features()
    weights = metaopt.SourceWeights(3).double()
    weights.logits.data.copy_(normal(7)(3))
    other = Values(normal(8)(2))
    by_hand = ByPosition(weights.logits.detach().clone(), "source")

    def objective(trained, batch, phi):
        return problem.objective(trained, batch, phi) + (phi["other"].values ** 2).sum()

    def teach(model, batch, phi, upstream):
        return weighted_cross_entropy(model, batch, phi["weights"], upstream)

    named = replace(problem, phi={"weights": by_hand, "other": other}, objective=objective)
    exact = hypergradient(named.with_stage("teacher", loss=teach))
    given = replace(named, phi={"weights": weights, "other": other})
    chain = library.as_chain(given, {"teacher": metaopt.WeightedLoss("weights"), "student": metaopt.Distillation()})
    assert relative_error(library.hypergradient(given, chain), exact) < EXACT


# --- initial, overrides, transform, schedule, accumulate


def test_learned_initial_weights():
    problem = replace(distilled_features(), phi=Both(normal(9)(3)))
    problem = problem.with_stage("teacher", initial=lambda phi, upstream: {"layers.3.bias": phi.values})
    assert_proven(problem, coordinates=[("values", 1), ("weights.logits", 0)])


def test_initial_weights_from_the_upstream_model():
    problem = distilled_text(MOMENTUM, MOMENTUM)
    name = "encoder.embeddings.word_embeddings.weight"
    assert_proven(
        problem.with_stage("student", initial=lambda phi, upstream: {name: 0.5 * upstream["teacher"].params[name]})
    )


def test_fixed_initial_weights_are_trained_too():
    problem = distilled_features(MOMENTUM, ADAM)
    problem = problem.with_stage("teacher", initial=lambda phi, upstream: {"layers.3.bias": torch.ones(3).double()})
    plain = train_plainly(problem.chain, problem.phi)["teacher"].params["layers.3.bias"]
    trained = library.as_chain(problem).unroll(problem.phi)["teacher"].params["layers.3.bias"]
    torch.testing.assert_close(trained.detach(), plain, rtol=1e-12, atol=1e-12)


def test_overrides_hold_for_their_own_step_only():
    problem = distilled_features(MOMENTUM, ADAM)
    problem = problem.with_stage("teacher", overrides=lambda phi, t: {"lr": 0.7} if t == 0 else {})
    by_hand = unroll(problem.chain, problem.phi)
    chain = library.as_chain(problem)
    for trained in (chain.unroll(problem.phi), chain.train(problem.phi)):
        assert relative_error(parameters(trained, "teacher"), parameters(by_hand, "teacher")) < 1e-12


@pytest.mark.parametrize("factory", [MOMENTUM, ADAM, ADAMW], ids=["momentum", "adam", "adamw"])
def test_learned_learning_rates(factory):
    rates = torch.tensor([0.05, 0.0, 0.02]).double()
    problem = replace(distilled_features(factory, factory), phi=Both(rates))
    problem = problem.with_stage("teacher", overrides=lambda phi, t: {"lr": phi.values[t]})
    problem = problem.with_stage(
        "student", overrides=lambda phi, t: {"lr": phi.values.square().sum() if t == 1 else 0.1}
    )
    assert_proven(problem, coordinates=[("values", t) for t in range(3)])


@pytest.mark.parametrize("factory", [MOMENTUM, ADAM, ADAMW], ids=["momentum", "adam", "adamw"])
def test_a_small_learned_rate_keeps_its_precision(factory):
    def problem_in(dtype):
        problem = replace(distilled_features(factory, factory), phi=Both(torch.tensor([1e-5])).double())
        problem = problem.with_stage("teacher", overrides=lambda phi, t: {"lr": phi.values[0]})
        return problem if dtype == torch.float64 else in_float32(problem)

    exact = hypergradient(problem_in(torch.float64))["values"]
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        found = library.hypergradient(problem_in(dtype))["values"]
        assert relative_error({"lr": found}, {"lr": exact}) < bound


def clipped(gradients):
    """Scale all gradients to a joint norm of 0.05."""
    size = torch.cat([g.flatten() for g in gradients.values()]).norm()
    return {name: g * (0.05 / size) for name, g in gradients.items()}


def test_a_gradient_transform_is_differentiated():
    problem = distilled_features(MOMENTUM, ADAM)
    plain = library.hypergradient(problem)
    problem = problem.with_stage("teacher", transform=clipped).with_stage("student", transform=clipped)
    assert relative_error(library.hypergradient(problem), plain) > 1e-2
    assert_proven(problem)


def test_a_schedule_moves_at_every_inner_step_and_goes_on_after_a_commit():
    problem = distilled_features(MOMENTUM, MOMENTUM)
    schedule = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    stages = library.as_chain(problem).stages
    teacher = problem.chain["teacher"]
    model, optimizer = teacher.private_copy()
    stages["teacher"] = metaopt.Stage(
        model, optimizer, teacher.loss, teacher.batches, teacher.num_steps, schedule=schedule, seed=5
    )
    chain = metaopt.Chain(**stages)
    by_hand = problem.with_stage("teacher", overrides=lambda phi, t: {"lr": 0.1 * 0.5**t})
    assert_proven(by_hand, chain)
    chain.commit(chain.unroll(problem.phi))
    assert chain.stages["teacher"].optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def test_accumulated_batches_give_the_gradient_of_their_union():
    problem = distilled_features(MOMENTUM, ADAM)
    teacher = problem.chain["teacher"]
    union = {key: torch.cat([batch[key] for batch in teacher.batches]) for key in teacher.batches[0]}
    model, optimizer = teacher.private_copy()
    stages = library.as_chain(problem).stages
    stages["teacher"] = metaopt.Stage(model, optimizer, teacher.loss, teacher.batches, 3, accumulate=2, seed=5)
    found = library.hypergradient(problem, metaopt.Chain(**stages))
    assert relative_error(found, hypergradient(problem.with_stage("teacher", batches=[union]))) < EXACT


# --- the inner trajectory is torch's own


def parameters(trained, name):
    return {key: value.detach() for key, value in trained[name].params.items()}


@pytest.mark.parametrize(("teacher", "student"), [(ADAM, MOMENTUM), (MOMENTUM, ADAMW)], ids=["adam-sgd", "sgd-adamw"])
@pytest.mark.parametrize("make", [distilled_features, distilled_text])
def test_inner_trajectories_are_torch_s(make, teacher, student):
    problem = make(teacher, student, dropout=0.2)
    chain = library.as_chain(problem)
    plain = train_plainly(library.replayed(problem, chain).chain, problem.phi)
    unrolled, repeated = chain.unroll(problem.phi), chain.unroll(problem.phi)
    with torch.no_grad():
        swept = chain.unroll(problem.phi)
    trained = chain.train(problem.phi)
    for name in problem.chain:
        expected = parameters(plain, name)
        assert relative_error(parameters(unrolled, name), expected) < 1e-12
        assert relative_error(parameters(trained, name), expected) < 1e-13
        for key, value in parameters(trained, name).items():
            assert torch.equal(value, swept[name].params[key])
            assert torch.equal(value, chain.stages[name].model.get_parameter(key))
            assert torch.equal(unrolled[name].params[key], repeated[name].params[key])


def test_hand_unroll_and_library_keep_the_same_optimizer_state():
    problem = distilled_features(ADAM, MOMENTUM)
    chain = library.as_chain(problem)
    chain.commit(chain.unroll(problem.phi))
    again = chain.unroll(problem.phi)
    for name, stage in chain.stages.items():
        training = replace(problem.chain[name], model=stage.model, optimizer=stage.optimizer)
        training = replace(training, batches=training.batches[::-1])
        problem = problem.with_stage(name, **vars(training))
    by_hand = unroll(problem.chain, problem.phi)
    for name in problem.chain:
        assert relative_error(parameters(again, name), parameters(by_hand, name)) < 1e-12
