"""Losses that differentiate by leaves of their own: gradient penalties and adversarial training.

Every estimator that sweeps gives what `Unrolled` gives, which is compared with central differences; what a loss closes
over is refused still.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import library
import pytest
import torch
from differences import difference_error
from networks import Gained
from problems import Values, normal, regularised_error, weighted_squared_error
from reference import Problem, Training, relative_error
from torch import Tensor, nn

import metaopt
from metaopt.estimators import (
    Captured,
    Checkpointed,
    ConjugateGradient,
    FiniteDifference,
    FirstOrder,
    Neumann,
    Unrolled,
)


def penalty(model: Any, x: Tensor) -> Tensor:
    """Mean squared norm of the output's slope by the inputs."""
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().sum(1).mean()


def with_penalty(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    error = weighted_squared_error(model, batch, phi, upstream)
    return error + 0.3 * penalty(model, batch["inputs"].clone().requires_grad_())


def weighted_penalty(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Its strength is learned, its inputs are noised, and the leaf is a Parameter."""
    error = weighted_squared_error(model, batch, phi, upstream)
    noised = nn.Parameter(batch["inputs"] + 0.1 * torch.randn_like(batch["inputs"]))
    return error + phi.values[0] * penalty(model, noised)


def adversarial(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """At inputs moved along their loss's slope, which depends on the weights; the leaf stays in the graph."""
    shift = torch.zeros_like(batch["inputs"], requires_grad=True)
    error = weighted_squared_error(model, {**batch, "inputs": batch["inputs"] + shift}, phi, upstream)
    (slope,) = torch.autograd.grad(error, shift, create_graph=True)
    worst = batch["inputs"] + shift + 0.5 * slope / slope.norm()
    return weighted_squared_error(model, {**batch, "inputs": worst}, phi, upstream)


def marked_inside(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """As wav2vec2's feature extractor marks what it reads."""
    read = batch["inputs"][:]
    read.requires_grad = True
    return weighted_squared_error(model, {**batch, "inputs": read}, phi, upstream)


LOSSES: list[Callable[..., Tensor]] = [with_penalty, weighted_penalty, adversarial, marked_inside]
EXACT = [*(Checkpointed(store=store) for store in ("states", "gradients", "recompute")), Checkpointed(Captured())]


def problem_of(loss: Any) -> Problem:
    """Three steps of a tanh network by Adam, over two batches."""
    draw = normal(0)
    batches = [{"inputs": draw(4, 3), "labels": draw(4)} for _ in range(2)]
    adam = lambda params: torch.optim.Adam(params, lr=0.05, eps=1e-3)  # noqa: E731
    stage = Training(Gained(), adam, loss, batches, num_steps=3)
    batch = {"inputs": draw(4, 3), "labels": draw(4)}
    problem = Problem({"only": stage}, regularised_error("only"), batch, Values(draw(4) ** 2))
    return library.replayed(problem, library.as_chain(problem))


def found_by(problem: Problem, estimator: Any) -> dict[str, Tensor]:
    return library.hypergradient(problem, library.as_chain(problem, estimator=estimator))


@pytest.mark.parametrize("loss", LOSSES)
def test_leaves_that_a_loss_makes_are_its_own(loss):
    problem = problem_of(loss)
    expected = found_by(problem, Unrolled())
    assert difference_error(expected, problem, num_random=1) < 1e-8
    for estimator in EXACT:
        assert relative_error(found_by(problem, estimator), expected) < 1e-12
    assert relative_error(found_by(problem, Checkpointed(FiniteDifference())), expected) < 1e-5
    for estimator in (FirstOrder(), Neumann(2), ConjugateGradient(2, damping=50.0)):
        assert found_by(problem, estimator)["values"].norm() > 0


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
        with pytest.raises(metaopt.StageError, match=r"closes over 1 tensor\(s\) that require grad"):
            found_by(problem_of(loss), Checkpointed())
