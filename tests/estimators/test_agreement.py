"""One table: whatever an inner loop does × every store, place and product gives the hypergradient of `Unrolled`.

What `Unrolled` gives is compared with closed forms, hand unrolls and central differences in tests/core.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import inner_loops
import pytest
from inner_loops import LOSSES, OF_USERS, OPTIMIZERS, OPTIONS, of_small
from problems import MOMENTUM, distilled_features
from reference import relative_error
from small import assert_same, two_stages
from small_models import Network
from torch import Tensor
from users_losses import ASKING, LEAVES

import metaopt
from metaopt.estimators import (
    Captured,
    Checkpointed,
    ConjugateGradient,
    DoubleBackward,
    FiniteDifference,
    FirstOrder,
    Neumann,
    OneStep,
    Truncated,
    Unrolled,
)

EXACT = 1e-12
STORES, PLACES = ("states", "gradients", "recompute"), ("device", "host", "disk")
# All nine pairs, so that three in a row are of three stores and three places.
KEPT: list[Any] = [(STORES[k % 3], PLACES[(k + k // 3) % 3]) for k in range(9)]
EVERYTHING = {**OPTIONS, **LOSSES, **OPTIMIZERS, **OF_USERS}
OF_TEXT = ("hidden states", "decoded", "expected embeddings", "probed hidden states")
SAMPLES = ("Gumbel samples", "straight-through samples")


def pairs_of(name: str) -> list[Any]:
    """Three stores and places for each, all nine in turn; two where a step takes long."""
    turn = 2 * list(EVERYTHING).index(name)
    return [KEPT[(turn + k) % 9] for k in range(2 if name in OF_TEXT else 3)]


@functools.cache
def exact(name: str) -> dict[str, Tensor]:
    if name == "LoRA":
        pytest.importorskip("peft")
    return EVERYTHING[name](Unrolled()).hypergradient()


def error_of(name: str, estimator: Any) -> float:
    """Against `Unrolled`, which must itself have found a hypergradient for every meta-parameter."""
    assert all(float(part.norm()) > 0 for part in exact(name).values())
    return relative_error(EVERYTHING[name](estimator).hypergradient(), exact(name))


# --- exact


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", EVERYTHING)
def test_whatever_an_inner_loop_does_is_swept(name):
    for store, place in pairs_of(name):
        assert error_of(name, Checkpointed(store=store, place=place)) < EXACT, (store, place)


@pytest.mark.parametrize(("store", "place"), KEPT)
def test_every_store_and_place_over_segments_of_several_steps(store, place):
    make = of_small(two_stages, optimizer=inner_loops.ADAM, teacher=Network(0.2), student=Network(), num_steps=6)
    found = make(Checkpointed(store=store, place=place)).hypergradient()
    assert relative_error(found, make(Unrolled()).hypergradient()) < EXACT


# Tracing takes its time, and a product sees the loss alone: one of each kind of loss and module is quick.
QUICK = ("dropout and batch norm", "LSTM", "soft labels", "weight network", "sparse tables", "straight-through samples")
CAPTURED = [name for name in EVERYTHING if name not in ASKING or ASKING[name][2]]
SLOW = {*CAPTURED} - {*QUICK, "tied weights", "asks twice", "gradient penalty"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CAPTURED])
def test_whatever_a_loss_does_is_captured(name):
    store, place = pairs_of(name)[0]
    with warnings.catch_warnings():
        if name in SAMPLES:  # may read model.step, and fall back
            warnings.simplefilter("ignore", RuntimeWarning)
        assert error_of(name, Checkpointed(Captured(), store, place)) < EXACT


def test_a_temperature_that_falls_with_the_step_is_swept_and_not_frozen_into_a_captured_graph():
    expected = inner_loops.annealed(Unrolled()).hypergradient()
    assert relative_error(inner_loops.annealed(Checkpointed()).hypergradient(), expected) < EXACT
    with pytest.warns(RuntimeWarning, match="model.step") as told:
        found = inner_loops.annealed(Checkpointed(Captured(), "gradients")).hypergradient()
    assert relative_error(found, expected) < EXACT
    assert len(told) == 1


def test_unlike_estimators_in_one_chain_agree():
    make = inner_loops.of_problem(lambda: distilled_features(MOMENTUM, inner_loops.ADAM))
    work = make(None)
    work.chain.stages["teacher"].estimator = Checkpointed(DoubleBackward(), "recompute")
    assert relative_error(work.hypergradient(), make(Unrolled()).hypergradient()) < EXACT


# --- near

NEAR = {"soft labels": 1e-4, "three linear stages": 1e-4, "clipping by norm": 1e-4, "RMSprop": 1e-4}


@pytest.mark.parametrize("name", [*NEAR, *LEAVES])
def test_finite_differences_are_near(name):
    assert error_of(name, Checkpointed(FiniteDifference())) < NEAR.get(name, 1e-5)


@pytest.mark.parametrize("product", [DoubleBackward, Captured])
def test_in_bfloat16_the_sweep_is_near(product):
    """Rounding to 8 bits amplifies any difference in the order of operations."""
    expected = inner_loops.in_bfloat16(Unrolled()).hypergradient()
    assert relative_error(inner_loops.in_bfloat16(Checkpointed(product())).hypergradient(), expected) < 1e-3


# --- the estimators that are not exact agree with themselves, whatever the product

SHORTENED: dict[str, Callable[[Any], metaopt.Estimator]] = {
    "Truncated": lambda product: Truncated(2, product),
    "OneStep": OneStep,
    "FirstOrder": FirstOrder,
    "Neumann": lambda product: Neumann(4, product),
    "ConjugateGradient": lambda product: ConjugateGradient(4, 0.5, product),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", SHORTENED)
def test_products_of_what_is_not_exact_agree(kind):
    """Dropout, Adam, batch norm where no linear system is solved: each step's own random state and batch."""
    solves = kind in ("Neumann", "ConjugateGradient")
    networks = {"teacher": Network(0.2), "student": Network(0.2)} if solves else {}
    make = of_small(two_stages, optimizer=inner_loops.ADAM, **networks)
    expected = make(SHORTENED[kind](DoubleBackward())).hypergradient()
    assert relative_error(make(SHORTENED[kind](Captured())).hypergradient(), expected) < EXACT
    assert relative_error(make(SHORTENED[kind](FiniteDifference())).hypergradient(), expected) < 1e-4


@pytest.mark.parametrize("name", ["accumulation", "clipping by norm", "tied weights", "frozen parameters", "LSTM"])
def test_one_term_of_neumann_is_the_last_step_whatever_an_inner_loop_does(name):
    assert_same(OPTIONS[name](Neumann(1)).hypergradient(), OPTIONS[name](Truncated(1)).hypergradient())


@pytest.mark.parametrize("last", [5, 100])
def test_truncated_to_the_whole_stage_is_exact(last):
    """Learned initial weights too, which a shorter one cuts off."""
    assert error_of("initial weights", Truncated(last)) < EXACT


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_of_the_loss_do_not_stop_what_is_not_exact(name):
    for estimator in (FirstOrder(), Neumann(2), ConjugateGradient(2, damping=50.0)):
        assert EVERYTHING[name](estimator).hypergradient()["values"].norm() > 0
