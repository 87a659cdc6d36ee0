"""Whole steps whose hyperparameters a schedule or a meta-parameter gives: captured once for all of them, and exact."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from reference import relative_error
from small import ADAM, MOMENTUM, SGD, example_weights, meta_loss, one_stage
from small_models import Network
from test_captured import counted
from torch import nn
from torch.optim import lr_scheduler

import metaopt
from metaopt.estimators import Captured, Checkpointed, Unrolled
from metaopt.estimators.products import whole_step

NUM_STEPS = 7
WARMUP = functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda t: min(t / 3, 1.0))  # 0 at first
COSINE = functools.partial(lr_scheduler.CosineAnnealingLR, T_max=NUM_STEPS)
ONE_CYCLE = functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=NUM_STEPS + 1)  # moves momentum, betas
NESTEROV = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
ASGD = functools.partial(torch.optim.ASGD, lr=0.1)  # whose rate cannot be learned
RMSPROP = functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, eps=1e-2)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.05, weight_decay=0.3)


def two_groups(params: Any) -> torch.optim.Optimizer:
    first, *rest = params
    return torch.optim.Adam([{"params": [first], "lr": 0.01}, {"params": rest}], lr=0.05)


class Rates(metaopt.MetaParameters):
    """Example weights, and a number per inner step."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = example_weights()
        self.rates = nn.Parameter(torch.linspace(0.0, 0.1, NUM_STEPS, dtype=torch.float64))

    def forward(self, batch: Any) -> Any:
        return self.weights(batch)


def decay_from_the_third(phi: Any, t: int) -> dict[str, Any]:
    return {"weight_decay": 0.0 if t < 3 else 0.01 * t, "nesterov": False}


def momentum_from_the_third(phi: Any, t: int) -> dict[str, Any]:
    return {"momentum": 0.0 if t < 3 else 0.1 * t, "lr": 0.1 / (1 + t)}


def all_learned(phi: Any, t: int) -> dict[str, Any]:
    rate = phi.rates[t]
    return {"lr": rate, "betas": (0.5 + rate, 0.9 + rate / 2), "weight_decay": rate.square(), "eps": 1e-3 * (1 + t)}


CASES: dict[str, tuple[Any, dict[str, Any], int]] = {  # optimizer, slots, captures
    "sgd, warm-up": (SGD, {"schedule": WARMUP}, 2),
    "nesterov, cosine": (NESTEROV, {"schedule": COSINE}, 3),
    "adam, warm-up": (ADAM, {"schedule": WARMUP}, 3),
    "adamw, cosine": (ADAMW, {"schedule": COSINE}, 3),
    "groups, cosine": (two_groups, {"schedule": COSINE}, 3),
    "momentum, one cycle": (MOMENTUM, {"schedule": ONE_CYCLE}, 3),
    "rmsprop, one cycle": (RMSPROP, {"schedule": ONE_CYCLE}, 3),
    "adam, one cycle": (ADAM, {"schedule": ONE_CYCLE}, 3),
    "sgd, a learned rate per step": (SGD, {"overrides": lambda phi, t: {"lr": phi.rates[t]}}, 2),
    "adam, all learned": (ADAM, {"overrides": all_learned}, 3),
    "sgd, a decay that begins": (SGD, {"overrides": decay_from_the_third}, 3),
    "momentum that begins": (SGD, {"overrides": momentum_from_the_third}, 4),
}


@pytest.mark.parametrize("store", ["states", "gradients"])
@pytest.mark.parametrize("case", CASES)
def test_a_schedule_is_captured_once_for_all_its_steps(case, store, monkeypatch):
    made = counted(whole_step, monkeypatch)
    optimizer, slots, captures = CASES[case]
    torch.manual_seed(1)
    model, phi, product = Network(0.4), Rates(), Captured()
    chains = [
        one_stage(model=model, optimizer=optimizer, num_steps=NUM_STEPS, estimator=estimator, **slots)
        for estimator in (Unrolled(), Checkpointed(product, store))
    ]
    reached = phi if "learned" in case else phi.weights
    expected = metaopt.hypergradient(meta_loss(chains[0], phi), reached)
    for _ in range(2):  # the second traces nothing
        assert relative_error(metaopt.hypergradient(meta_loss(chains[1], phi), reached), expected) < 1e-12
        assert len(made) == captures
    assert all(product._steps._steps.values())  # each has agreed with eager code, and is in use


def test_a_schedule_that_goes_on_is_captured_no_more(monkeypatch):
    """A commit writes the next step's rate into the optimizer, which is none of a captured step's affair."""
    made, phi, counts = counted(whole_step, monkeypatch), example_weights(), []
    estimators = Unrolled(), Checkpointed(Captured())
    chains = [one_stage(optimizer=MOMENTUM, estimator=estimator, schedule=COSINE) for estimator in estimators]
    for _ in range(3):
        expected, found = (metaopt.hypergradient(meta_loss(chain, phi), phi) for chain in chains)
        assert relative_error(found, expected) < 1e-12
        counts.append(len(made))
        for chain in chains:
            chain.commit(chain.unroll(phi))
    assert counts[1] == counts[2] > 0


@pytest.mark.parametrize("slots", [{"transform": metaopt.ClipNorm(0.1)}, {"schedule": COSINE, "optimizer": ASGD}])
def test_a_step_that_more_than_tensors_steer_is_not_captured_whole(slots, monkeypatch):
    made, phi = counted(whole_step, monkeypatch), example_weights()
    chains = [one_stage(estimator=e, **slots) for e in (Unrolled(), Checkpointed(Captured()))]
    expected, found = (metaopt.hypergradient(meta_loss(chain, phi), phi) for chain in chains)
    assert relative_error(found, expected) < 1e-12
    assert not made
