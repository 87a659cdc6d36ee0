"""Neumann and ConjugateGradient are what they say: explicit matrix series, Krylov spaces and implicit gradients."""

from __future__ import annotations

import functools
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from inner_loops import ADAM
from matrices import (
    OPTIMIZERS,
    SIZE,
    Derivative,
    Inner,
    Pair,
    Vectors,
    alone,
    error,
    exact,
    hessian_and_mixed,
    neumann,
    pair,
    truncated,
)
from reference import sgd
from small import SGD, assert_same, example_weights, feature_batches, meta_loss, one_stage, two_stages
from small_models import Linear, Network
from torch import Tensor

import metaopt
from metaopt.diagnostics.meters import HeldBytes
from metaopt.estimators import (
    Captured,
    Checkpointed,
    ConjugateGradient,
    DoubleBackward,
    Neumann,
    OneStep,
    Truncated,
    Unrolled,
)

EXACT = 1e-12
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def identity(x: Tensor) -> Tensor:
    return x


def convex(optimizer: str = "sgd", **changes: Any) -> Pair:
    """Quadratic inner losses, one batch each."""
    whole = pair(optimizer, **{"bend": identity, "ridge": 0.3, **changes})
    return replace(whole, stages=tuple(replace(stage, batches=stage.batches[:1]) for stage in whole.stages))


# --- Neumann


@pytest.mark.sampled(3)
@optimizers
@pytest.mark.parametrize("terms", [1, 2, 7])
@pytest.mark.parametrize("product", [DoubleBackward, Captured])
def test_neumann_is_the_series_of_the_last_step(optimizer, terms, product):
    """Of weights and optimizer state together."""
    problem = pair(optimizer)
    assert error(problem.by_metaopt(Neumann(terms, product())), problem.by(neumann(terms))) < EXACT


@optimizers
def test_clipping_is_part_of_the_step_that_neumann_repeats(optimizer):
    problem = pair(optimizer, clip=0.1)
    found = problem.by_metaopt(Neumann(3))
    assert error(found, problem.by(neumann(3))) < EXACT
    assert error(pair(optimizer).by_metaopt(Neumann(3)), found) > 1e-2


def test_conjugate_gradient_refuses_a_transform_before_any_training():
    problem = pair()
    clipped = replace(problem, stages=(problem.stages[0], replace(problem.stages[1], clip=0.1)))
    trained = []
    first = replace(clipped.stages[0], bend=lambda x: trained.append(x) or x)
    with pytest.raises(metaopt.StageError, match=r"stage 'second': .*\(ClipNorm\(.* or use Neumann\(terms=3\)"):
        replace(clipped, stages=(first, clipped.stages[1])).by_metaopt(ConjugateGradient(3))
    assert not trained


@optimizers
def test_one_term_is_one_step(optimizer):
    problem = pair(optimizer)
    assert torch.equal(problem.by_metaopt(Neumann(1)), problem.by_metaopt(OneStep()))


def implicit(damping: float = 0.0) -> Derivative:
    """dθ/dinputs = −(H + damping I)⁻¹ ∂²L/∂θ∂inputs."""

    def derivative(stage: Vectors, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hessian, mixed = hessian_and_mixed(stage, inputs)
        damped = hessian + damping * torch.eye(SIZE, dtype=torch.float64)
        return tuple(-torch.linalg.solve(damped, b) for b in mixed)

    return derivative


@pytest.mark.sampled(2)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_many_terms_at_a_converged_quadratic_are_the_implicit_gradient(momentum):
    """And both are the exact one, which has forgotten where it started."""
    inner = Inner(
        functools.partial(torch.optim.SGD, lr=0.2, momentum=momentum), sgd, ("momentum_buffer",)[: momentum > 0]
    )
    problem = convex(inner=inner, num_steps=120, ridge=0.6)
    with torch.no_grad():
        problem.phi.rate.fill_(-1.5)
    expected = problem.by(implicit())
    assert error(problem.by_metaopt(Neumann(120)), expected) < 1e-7
    assert error(problem.by_metaopt(ConjugateGradient(SIZE)), expected) < 1e-7
    assert error(problem.by_metaopt(Checkpointed(store="recompute")), expected) < 1e-7
    assert error(problem.by_metaopt(Neumann(3)), expected) > 1e-2


# --- ConjugateGradient


def krylov(iterations: int, damping: float = 0.0) -> Any:
    """−qᵀ ∂²L/∂θ∂inputs with q the minimiser of ½ qᵀ(H + damping I)q − λᵀq over span{λ, Hλ, …}."""

    def pulled(stage: Vectors, inputs: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
        hessian, mixed = hessian_and_mixed(stage, inputs)
        damped = hessian + damping * torch.eye(SIZE, dtype=torch.float64)
        powers = [torch.linalg.matrix_power(damped, k) @ cotangent for k in range(iterations)]
        basis = torch.linalg.qr(torch.stack(powers, 1))[0]
        q = basis @ torch.linalg.solve(basis.T @ damped @ basis, basis.T @ cotangent)
        return tuple(-q @ b for b in mixed)

    return pulled


def by_krylov(problem: Pair, iterations: int, damping: float = 0.0) -> Tensor:
    """The hypergradient; conjugate gradients are no linear map of λ, so the chain rule goes backwards here."""
    trained = [stage.run(problem.inputs(i))[:SIZE] for i, stage in enumerate(problem.stages)]
    cotangents = problem.cotangents(trained)
    total = torch.zeros_like(problem.vector)
    for i in reversed(range(len(trained))):
        of_phi, *of_upstream = krylov(iterations, damping)(problem.stages[i], problem.inputs(i), cotangents[i])
        total = total + of_phi
        if of_upstream:
            cotangents[0] = cotangents[0] + of_upstream[0]
    return total


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("product", [DoubleBackward, Captured])
def test_conjugate_gradient_minimises_over_the_krylov_space(iterations, damping, product):
    problem = convex("adam")
    found = problem.by_metaopt(ConjugateGradient(iterations, damping, product()))
    assert error(found, by_krylov(problem, iterations, damping)) < EXACT
    expected = problem.by(implicit(damping))
    assert (error(found, expected) < 1e-10) is (iterations == SIZE)


def test_more_iterations_than_dimensions_change_nothing():
    problem = convex()
    assert error(problem.by_metaopt(ConjugateGradient(50)), problem.by(implicit())) < 1e-10


def test_of_the_second_stage_alone_what_the_first_has_become_gets_its_part():
    """The first is exact, and gets the second's cotangent of its weights."""
    problem = replace(convex("momentum"), reads_last=True)
    found = problem.by_metaopt(Unrolled(), ConjugateGradient(SIZE))
    assert error(found, problem.by(exact, implicit())) < 1e-10
    only_upstream = replace(problem, stages=(problem.stages[0], replace(problem.stages[1], weighted=False)))
    found = only_upstream.by_metaopt(Unrolled(), ConjugateGradient(SIZE))
    assert error(found, only_upstream.by(exact, implicit())) < 1e-10


def test_it_knows_nothing_of_rate_and_start():
    found = alone(convex()).by_metaopt(ConjugateGradient(2))
    assert float(found[: -SIZE - 1].norm()) > 0
    assert float(found[-SIZE - 1 :].norm()) == 0


def test_a_direction_of_negative_curvature_ends_the_iteration_with_a_warning():
    problem = alone(convex(ridge=-9.0, num_steps=1))
    with pytest.warns(RuntimeWarning, match=r"stage 'first': the Hessian has curvature -.* iteration 1.*damping"):
        found = problem.by_metaopt(ConjugateGradient(3))
    assert float(found.norm()) == 0
    damped = problem.by_metaopt(ConjugateGradient(3, damping=20.0))
    assert error(damped, problem.by(implicit(20.0))) < 1e-10


def is_saddle(problem: Pair) -> bool:
    """Whether curvature is negative somewhere, and positive along the meta-loss's gradient."""
    stage, inputs = problem.stages[0], problem.inputs(0)
    hessian, _ = hessian_and_mixed(stage, inputs)
    (cotangent,) = problem.cotangents([stage.run(inputs)[:SIZE]])
    return bool(torch.linalg.eigvalsh(hessian)[0] < 0 < cotangent @ hessian @ cotangent)


def test_a_saddle_keeps_what_the_iterations_before_have_found():
    tried = (alone(convex(ridge=ridge, num_steps=1)) for ridge in torch.linspace(0.0, -3.0, 61).tolist())
    problem = next(one for one in tried if is_saddle(one))
    with pytest.warns(RuntimeWarning, match="what [12] iterations gave") as told:
        found = problem.by_metaopt(ConjugateGradient(9))
    (iterations,) = [i for i in (1, 2) if f"what {i} iterations gave" in str(told[0].message)]
    assert error(found, by_krylov(problem, iterations)) < EXACT


# --- both


def test_unlike_estimators_in_one_chain():
    problem = convex("momentum")
    found = problem.by_metaopt(Neumann(4), ConjugateGradient(SIZE))
    assert error(found, problem.by(neumann(4), implicit())) < 1e-10
    found = problem.by_metaopt(Truncated(2), Neumann(3))
    assert error(found, problem.by(truncated(2), neumann(3))) < EXACT
    found = problem.by_metaopt(ConjugateGradient(SIZE), Checkpointed())
    assert error(found, problem.by(implicit(), exact)) < 1e-10


KINDS = {"Neumann": lambda p: Neumann(4, p), "ConjugateGradient": lambda p: ConjugateGradient(4, 0.5, p)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_needs_retain_graph(kind):
    chain = two_stages(SGD, Network(), Network(), estimator=KINDS[kind](DoubleBackward()))
    phi = example_weights()
    loss = meta_loss(chain, phi)
    first = metaopt.hypergradient(loss, phi, retain_graph=True)
    assert_same(metaopt.hypergradient(loss, phi), first)
    with pytest.raises(RuntimeError, match="second time"):
        metaopt.hypergradient(loss, phi)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_one_step_and_goes_with_the_graph(kind):
    phi, peaks = example_weights(), []
    for num_steps in (5, 50):
        options: dict[str, Any] = {"model": Linear, "batches": feature_batches(1), "optimizer": ADAM}
        chain = one_stage(num_steps=num_steps, estimator=KINDS[kind](DoubleBackward()), **options)
        held = HeldBytes()
        gc.collect()
        gc.disable()
        try:
            with held:
                loss = meta_loss(chain, phi)
                found = metaopt.hypergradient(loss, phi)
                del loss
            assert held.now <= sum(g.nbytes for g in found.values()) + 64
        finally:
            gc.enable()
        peaks.append(held.peak)
    assert peaks[1] - peaks[0] <= 3 * 45 * 8  # the losses of 45 steps, listed, stacked and tested


def test_how_they_are_printed():
    assert repr(Neumann(3)) == "Neumann(3, product=DoubleBackward())"
    assert repr(ConjugateGradient(3)) == "ConjugateGradient(3, damping=0.0, product=DoubleBackward())"
