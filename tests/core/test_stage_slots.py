"""Each slot of a stage does what plain torch would: accumulation, schedule, overrides, transform, initial weights."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import ADAM, MOMENTUM, SGD, assert_same, cross_entropy, example_weights, feature_batches, one_stage
from small_models import FEATURES, Network
from torch import Tensor, nn

import metaopt


def weights_of(outcome: Any, name: str = "only") -> dict[str, Tensor]:
    return {n: p.detach() for n, p in outcome[name].params.items()}


def trained_plainly(model: nn.Module, optimizer: Any, batches: list[Any], change: Any = None) -> dict[str, Tensor]:
    """Ordinary training on a copy; `change(model)` may touch the gradients before each optimizer step."""
    model = copy.deepcopy(model).train()
    optimizer = optimizer(model.parameters())
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(model, batch, None, None).backward()
        if change is not None:
            change(model, optimizer)
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("run", ["unroll", "train"])
def test_accumulated_batches_are_one_larger_batch(run):
    parts = feature_batches(6)
    wholes = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(parts[::2], parts[1::2], strict=True)]
    accumulated, whole = (
        one_stage(metaopt.CrossEntropy(), batches, model=Network, optimizer=MOMENTUM, accumulate=count)
        for batches, count in ((parts, 2), (wholes, 1))
    )
    outcome, expected = (getattr(chain, run)(example_weights()) for chain in (accumulated, whole))
    assert_same(weights_of(outcome), weights_of(expected), 1e-14)
    assert_same(outcome.losses, expected.losses, 1e-14)
    if run == "unroll":
        accumulated.commit(outcome)
    assert accumulated.state_dict()["only"]["stream"]["position"] == 6


# --- schedule, overrides, transform, initial


@pytest.mark.parametrize("run", ["unroll", "train"])
def test_a_schedule_is_that_of_plain_torch(run):
    schedule = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: min(1.0, step / 4))
    chain = one_stage(metaopt.CrossEntropy(), model=Network, optimizer=ADAM, schedule=schedule)
    model, batches = copy.deepcopy(chain.stages["only"].model), feature_batches()
    optimizer = ADAM(model.parameters())
    scheduler = schedule(optimizer)
    for batch in batches * 2:
        optimizer.zero_grad()
        cross_entropy(model, batch, None, None).backward()
        optimizer.step()
        scheduler.step()
    found = []
    for _ in range(2):
        outcome = getattr(chain, run)(example_weights())
        found.append(weights_of(outcome))
        if run == "unroll":
            chain.commit(outcome)
    assert_same(dict(chain.stages["only"].model.named_parameters()), dict(model.named_parameters()), 1e-12)
    assert chain.stages["only"].optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    chain.reset()  # the schedule begins again; the batches are the first ones again after two rounds
    assert_same(weights_of(getattr(chain, run)(example_weights())), found[0])


@pytest.mark.parametrize("run", ["unroll", "train"])
def test_overrides_hold_for_their_step_and_leave_the_users_optimizer_alone(run):
    chain = one_stage(metaopt.CrossEntropy(), overrides=lambda meta, t: {"lr": 0.0 if t == 1 else 0.3})
    batches = feature_batches()
    model = chain.stages["only"].model
    expected = trained_plainly(model, functools.partial(SGD, lr=0.3), [batches[0], batches[2]])
    outcome = getattr(chain, run)(example_weights())
    assert_same(weights_of(outcome), expected, 1e-14)
    assert chain.stages["only"].optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("run", ["unroll", "train"])
def test_a_transform_that_clips_agrees_with_clip_grad_norm(run):
    def clip(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        return {name: g * (0.05 / (norm + 1e-6)).clamp(max=1.0) for name, g in gradients.items()}

    chain = one_stage(metaopt.CrossEntropy(), model=Network, optimizer=MOMENTUM, transform=clip)
    model = chain.stages["only"].model
    expected = trained_plainly(
        model, MOMENTUM, feature_batches(), lambda m, opt: nn.utils.clip_grad_norm_(m.parameters(), 0.05)
    )
    free = trained_plainly(model, MOMENTUM, feature_batches())
    assert_same(weights_of(getattr(chain, run)(example_weights())), expected, 1e-14)
    assert not torch.allclose(free["last.weight"], expected["last.weight"], atol=1e-3)


def test_a_transform_must_return_every_gradient():
    with pytest.raises(metaopt.StageError, match="must return a gradient for each name"):
        one_stage(transform=lambda gradients: {}).unroll(example_weights())


@pytest.mark.parametrize(
    "given", [{"linear.weigth": torch.zeros(3, FEATURES)}, {"linear.weight": torch.zeros(2, 2)}], ids=["name", "shape"]
)
def test_initial_weights_that_do_not_fit_are_refused(given):
    with pytest.raises(metaopt.StageError, match=r"no trained parameter of that shape; there are: linear\.weight"):
        one_stage(initial=lambda meta, upstream: given).unroll(example_weights())


def test_initial_weights_start_a_training_once_however_long_it_is():
    """Plain training runs in parts; only the first of them starts from `initial`, and `overrides` counts on."""
    steps: list[int] = []

    def overrides(meta_params: Any, t: int) -> dict[str, Any]:
        steps.append(t)
        return {}

    zeros = {"linear.weight": torch.zeros(3, FEATURES, dtype=torch.float64)}
    chain = one_stage(metaopt.CrossEntropy(), initial=lambda meta, upstream: zeros, overrides=overrides, num_steps=150)
    with torch.no_grad():
        expected = weights_of(chain.unroll(example_weights()))
    assert steps == list(range(150))
    steps.clear()
    assert_same(weights_of(chain.train(example_weights())), expected)
    assert steps == list(range(150))
    assert F.mse_loss(expected["linear.weight"], zeros["linear.weight"]) > 1e-3
