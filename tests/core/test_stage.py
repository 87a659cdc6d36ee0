"""A stage: what it is given, what it refuses, and what it goes back to."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from small import (
    ADAM,
    MOMENTUM,
    SGD,
    SIZE,
    assert_same,
    chain_state,
    cross_entropy,
    example_weights,
    feature_batches,
    one_stage,
    tensors_of,
    two_stages,
)
from small_models import FEATURES, Linear, Network
from torch import Tensor

import metaopt

# --- model and optimizer


def test_a_factory_draws_from_the_stages_seed_and_leaves_torchs_random_state_alone():
    before = torch.get_rng_state()
    first, same, other = (
        metaopt.Stage(Linear, SGD, metaopt.WeightedLoss(), feature_batches(), 1, seed=seed).model for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.linear.weight, same.linear.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(first.linear.weight, other.linear.weight)  # type: ignore[union-attr, arg-type]


def test_without_a_seed_torchs_generator_decides():
    found = []
    for _ in range(2):
        torch.manual_seed(11)
        found.append(metaopt.Stage(Linear, SGD, metaopt.WeightedLoss(), feature_batches(), 1).seed)
    torch.manual_seed(12)
    found.append(metaopt.Stage(Linear, SGD, metaopt.WeightedLoss(), feature_batches(), 1).seed)
    assert found[0] == found[1] != found[2]


def test_the_users_own_warm_optimizer_is_used_and_handed_back():
    model, batches = Network(), feature_batches()
    optimizer = MOMENTUM(model.parameters())
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(model, batch, None, None).backward()
        optimizer.step()
    plain_model, plain = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(optimizer.state_dict())
    chain = one_stage(metaopt.CrossEntropy(), batches, model=model, optimizer=optimizer)
    outcome = chain.unroll(example_weights())
    assert_same(optimizer.state_dict(), before)
    chain.commit(outcome)
    for batch in batches:
        plain.zero_grad()
        cross_entropy(plain_model, batch, None, None).backward()
        plain.step()
    assert chain.stages["only"].optimizer is optimizer
    assert_same(dict(model.named_parameters()), dict(plain_model.named_parameters()), 1e-14)
    assert_same(optimizer.state_dict(), plain.state_dict(), 1e-14)
    optimizer.step()  # the user goes on with it


def test_a_hyperparameter_that_the_user_changes_between_unrolls_holds_from_then_on():
    chain = one_stage(metaopt.CrossEntropy(), num_steps=1)
    before = {n: p.detach().clone() for n, p in chain.stages["only"].model.named_parameters()}
    moved = {}
    for lr in (0.1, 0.2):
        chain.stages["only"].optimizer.param_groups[0]["lr"] = lr
        with torch.no_grad():
            moved[lr] = chain.unroll(example_weights())["only"].params["linear.bias"] - before["linear.bias"]
        graph = chain.unroll(example_weights())["only"].params["linear.bias"] - before["linear.bias"]
        assert torch.allclose(graph, moved[lr], rtol=0, atol=1e-15)
    assert torch.allclose(moved[0.2], 2 * moved[0.1], rtol=0, atol=1e-14)


# --- batches


class Pair(NamedTuple):
    inputs: Any
    labels: Any


def test_floating_tensors_take_the_models_dtype_whatever_holds_them():
    seen: list[Any] = []

    def loss(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        seen.append(batch)
        return sum((p.square().sum() for p in model.params.values()), torch.zeros(()))

    x, y = torch.ones(2, 3), torch.ones(2, dtype=torch.int32)
    given = [{"inputs": x, "more": [x, y], "name": "text"}, (x, y), Pair(x, y)]
    one_stage(loss, given).unroll(example_weights())
    mapping, pair, named = seen
    assert mapping["inputs"].dtype == mapping["more"][0].dtype == pair[0].dtype == torch.float64
    assert mapping["more"][1].dtype == pair[1].dtype == named.labels.dtype == torch.int32
    assert mapping["name"] == "text"
    assert isinstance(named, Pair)
    assert named.inputs.dtype == torch.float64
    assert x.dtype == torch.float32


def test_callable_batches_are_made_once_per_unroll_without_a_graph_and_cycled():
    calls: list[list[str]] = []
    inputs: list[Tensor] = []

    def write(upstream: Any) -> Any:
        calls.append(list(upstream))
        answers = upstream["teacher"](feature_batches(1)[0]["inputs"])
        assert not answers.requires_grad
        yield from ({"inputs": noise, "labels": answers.argmax(-1)} for noise in torch.randn(2, SIZE, FEATURES))

    def loss(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        inputs.append(batch["inputs"])
        return metaopt.Distillation()(model, batch, meta_params, upstream)

    student = metaopt.Stage(Network(), SGD, loss, write, num_steps=3, seed=5)
    chain = metaopt.Chain(teacher=two_stages().stages["teacher"], student=student)
    before = chain_state(chain)
    first = chain.unroll(example_weights())
    assert_same(tensors_of(chain.unroll(example_weights())), tensors_of(first))
    assert_same(chain_state(chain), before)
    chain.commit(first)
    chain.unroll(example_weights())
    assert calls == [["teacher"]] * 3
    assert torch.equal(inputs[0], inputs[2])
    assert not torch.equal(inputs[0], inputs[1])
    assert torch.equal(inputs[0], inputs[3])  # the same random state, as nothing was committed
    assert not torch.equal(inputs[0], inputs[6])


def test_a_callable_that_makes_nothing_is_refused():
    with pytest.raises(metaopt.StageError, match="made no batch"):
        one_stage(batches=lambda upstream: []).unroll(example_weights())


# --- reset


def test_reset_restores_weights_buffers_optimizer_and_hyperparameters():
    class Counting(Network):
        def __init__(self) -> None:
            super().__init__(batch_norm=True)
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(inputs)

    chain = one_stage(model=Counting, optimizer=ADAM)
    stage = chain.stages["only"]
    before = chain_state(chain)
    chain.commit(chain.unroll(example_weights()))
    stage.optimizer.param_groups[0]["lr"] = 7.0
    assert float(stage.model.calls) == 3.0  # type: ignore[arg-type]
    chain.reset()
    after = chain_state(chain)
    assert_same(after["modules"], before["modules"])
    assert_same(after["state"]["only"]["optimizer"], before["state"]["only"]["optimizer"])
    assert after["state"]["only"]["stream"]["position"] == 3
    assert after["state"]["only"]["random"]["steps"] == 3


def test_reset_of_a_factory_draws_new_weights_each_time():
    chain = metaopt.Chain(only=metaopt.Stage(Linear, ADAM, metaopt.WeightedLoss(), feature_batches(), 2, seed=1))
    stage, found = chain.stages["only"], []
    for _ in range(3):
        found.append(copy.deepcopy(stage.model.state_dict()))
        chain.commit(chain.unroll(example_weights()))
        chain.reset()
        assert stage.optimizer.state_dict()["state"] == {}
    assert len({float(weights["linear.weight"].sum()) for weights in found}) == 3
    assert all(p is q for p, q in zip(stage.model.parameters(), stage.optimizer.param_groups[0]["params"], strict=True))


# --- twins


def test_a_twin_is_independent_and_has_the_same_data_ahead():
    chain = two_stages()
    chain.commit(chain.unroll(example_weights()))
    before = chain_state(chain)
    twin = chain.twin(torch.float64)
    found, expected = (tensors_of(c.unroll(example_weights())) for c in (twin, chain))
    assert_same(found, expected)
    twin.commit(twin.unroll(example_weights()))
    twin.reset()
    assert_same(chain_state(chain), before)
    single = chain.twin(torch.float32).unroll(example_weights().float())
    assert all(p.dtype == torch.float32 for p in single["student"].params.values())
