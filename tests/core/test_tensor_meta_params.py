"""A user's own tensors as meta-parameters: a tensor, an `nn.Parameter`, a mapping, tensors beside a module."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaopt
from metaopt.app.tracking import save_meta_params

RATE, STEPS = 0.3, 3


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BATCH = {"inputs": draws(2, 3), "targets": draws(2, 1, seed=1)}


class Scale(nn.Module):
    """A module beside the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))


def errors(model: Any, batch: Any) -> Tensor:
    return (model(batch["inputs"]) - batch["targets"]).square().mean(-1)


def by_tensor(meta_params: Any) -> Tensor:
    return meta_params


def by_name(meta_params: Any) -> Tensor:
    return meta_params["A"] * (meta_params["b"] if "b" in meta_params else meta_params["scale"].gain)


A = functools.partial(torch.tensor, [0.2, 0.9], dtype=torch.float64)
GIVEN: dict[str, tuple[Any, Any]] = {
    "a tensor": (lambda: A(requires_grad=True), by_tensor),
    "a parameter": (lambda: nn.Parameter(A()), by_tensor),
    "a mapping": (lambda: {"A": A(requires_grad=True), "b": draws(1).requires_grad_()}, by_name),
    "beside a module": (lambda: {"A": A(requires_grad=True), "scale": Scale()}, by_name),
}
ESTIMATORS = {
    "Unrolled": metaopt.Unrolled(),
    **{store: metaopt.Checkpointed(store=store) for store in ("states", "gradients", "recompute")},
    "Captured": metaopt.Checkpointed(metaopt.Captured()),
}


def linear(seed: int) -> nn.Module:
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(draws(*param.shape, seed=seed + i))
    return model


def chain_of(weights: Any, estimator: Any) -> metaopt.Chain:
    """The thread's own losses: `(losses * A).sum()`, and a second model that learns from the first."""

    def teach(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return (errors(model, batch) * weights(meta_params)).sum()

    def learn(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        said = upstream["teacher"](batch["inputs"])
        return (model(batch["inputs"]) - said).square().mean() + weights(meta_params).square().sum() * model.params[
            "bias"
        ].square().sum()

    def stage(seed: int, loss: Any) -> metaopt.Stage:
        return metaopt.Stage(
            linear(seed), lambda params: torch.optim.SGD(params, lr=RATE), loss, [BATCH], STEPS, estimator
        )

    return metaopt.Chain(teacher=stage(2, teach), student=stage(4, learn))


def objective(trained: Any, batch: Any, meta_params: Any) -> Tensor:
    return errors(trained["student"], batch).mean()


def learned(meta_params: Any) -> list[Tensor]:
    parts = list(meta_params.values()) if isinstance(meta_params, dict) else [meta_params]
    return [t for part in parts for t in (part.parameters() if isinstance(part, nn.Module) else [part])]


def by_hand(meta_params: Any, weights: Any) -> list[Tensor]:
    """The same two trainings in plain torch: gradients with their graph, then one derivative through all of it."""
    own = [[p.detach().clone().requires_grad_() for p in linear(seed).parameters()] for seed in (2, 4)]
    x, y, w = BATCH["inputs"], BATCH["targets"], weights(meta_params)
    for _ in range(STEPS):
        loss = ((x @ own[0][0].T + own[0][1] - y).square().mean(-1) * w).sum()
        own[0] = [p - RATE * g for p, g in zip(own[0], torch.autograd.grad(loss, own[0], create_graph=True))]  # noqa: B905
    said = x @ own[0][0].T + own[0][1]
    for _ in range(STEPS):
        loss = (x @ own[1][0].T + own[1][1] - said).square().mean() + w.square().sum() * own[1][1].square().sum()
        own[1] = [p - RATE * g for p, g in zip(own[1], torch.autograd.grad(loss, own[1], create_graph=True))]  # noqa: B905
    meta_loss = (x @ own[1][0].T + own[1][1] - y).square().mean(-1).mean()
    return list(torch.autograd.grad(meta_loss, learned(meta_params)))


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_hypergradient_lands_on_the_users_tensor(given: str, estimator: str) -> None:
    make, weights = GIVEN[given]
    meta_params = make()
    chain = chain_of(weights, ESTIMATORS[estimator])
    for _ in range(2):
        meta_loss = objective(chain.unroll(meta_params), BATCH, meta_params)
        metaopt.backward(meta_loss, meta_params)
    for tensor, right in zip(learned(meta_params), by_hand(meta_params, weights), strict=True):
        torch.testing.assert_close(tensor.grad, 2 * right, rtol=1e-12, atol=1e-14)


def test_the_loss_gets_what_the_user_gave() -> None:
    got: list[Any] = []
    weights = A(requires_grad=True)
    chain_of(lambda m: got.append(m) or m, metaopt.Unrolled()).unroll(weights)
    assert all(one is weights for one in got)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["a tensor", pytest.param("beside a module", marks=pytest.mark.slow)])
def test_check_explain_and_compare_take_them(given: str) -> None:
    make, weights = GIVEN[given]
    meta_params, chain = make(), chain_of(weights, metaopt.Unrolled())
    parts: Any = (chain, objective, BATCH, meta_params)
    assert metaopt.check_hypergradient(*parts).verdict == "agrees"
    assert metaopt.explain_hypergradient(*parts).whole
    found = metaopt.compare_estimators(*parts, estimators={"stored": metaopt.Checkpointed()}, num_runs=1)
    assert all(row.in_float64 and row.in_float64.relative_error < 1e-10 for row in found.rows)


@pytest.mark.parametrize("given", GIVEN)
def test_a_run_of_the_trainer_resumes_and_saves_them(given: str, tmp_path: Any) -> None:
    make, weights = GIVEN[given]

    def trainer() -> metaopt.MetaTrainer:
        meta_params = make()
        optimizer = torch.optim.Adam(learned(meta_params), lr=0.1)
        chain = chain_of(weights, metaopt.Checkpointed())
        return metaopt.MetaTrainer(
            chain, objective, meta_params, optimizer, [BATCH], seed=0, validation_batches=2, carry={"student": "never"}
        )

    whole, first, second = trainer(), trainer(), trainer()
    whole.fit(4)
    first.fit(2)
    second.load_state_dict(first.state_dict())
    second.fit(4)
    assert [t.tolist() for t in learned(second.meta_params)] == [t.tolist() for t in learned(whole.meta_params)]
    save_meta_params(whole.best_meta_params(), None, tmp_path)
    loaded = make()
    metaopt.load_meta_params(loaded, tmp_path)
    assert [t.tolist() for t in learned(loaded)] == [t.tolist() for t in learned(whole.meta_params)]


def test_the_mixed_derivative_by_a_tensor() -> None:
    weights, model = A(requires_grad=True), linear(2)
    loss = (errors(model, BATCH) * weights).sum()
    (found,) = metaopt.mixed_vjp(loss, dict(model.named_parameters()), weights).values()
    grads = [torch.autograd.grad(e, list(model.parameters()), retain_graph=True) for e in errors(model, BATCH)]
    torch.testing.assert_close(found, torch.stack([torch.cat([g.flatten() for g in row]).sum() for row in grads]))


def test_a_tensor_weighs_examples_by_their_index() -> None:
    batch = {"x": draws(4, 3), "labels": torch.tensor([0, 1, 1, 0]), "index": torch.tensor([2, 0, 1, 2])}
    weights = draws(3).abs().requires_grad_()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model = Model()
    start = model.linear.weight.detach().clone()
    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    chain = metaopt.Chain(m=metaopt.Stage(model, sgd, metaopt.WeightedLoss(), [batch], 1, metaopt.Checkpointed()))
    step = start - chain.unroll(weights)["m"].params["linear.weight"]
    losses = nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
    right = torch.autograd.grad((weights.detach()[batch["index"]] * losses).mean(), model.linear.weight)[0]
    torch.testing.assert_close(step, right)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "computed": (
        lambda: A(requires_grad=True).sigmoid(),
        by_tensor,
        r"computed from others \(<SigmoidBackward0.*meta_par",
    ),
    "computed, in a mapping": (lambda: {"A": A(requires_grad=True) * 2, "b": A()}, by_name, r"meta_params\['A'\]"),
    "nothing to learn": (A, by_tensor, "does not require grad.*requires_grad=True"),
    "a list": (lambda: [A(requires_grad=True)], by_tensor, "a list; give a tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_line_to_write(case: str) -> None:
    make, weights, message = REFUSED[case]
    meta_params = make()

    def take_a_meta_step() -> None:
        trained = chain_of(weights, metaopt.Unrolled()).unroll(meta_params)
        metaopt.backward(objective(trained, BATCH, meta_params), meta_params)

    with pytest.raises(metaopt.ConfigError, match=message):
        take_a_meta_step()


def test_a_loss_that_reads_the_tensor_from_around_it() -> None:
    weights = A(requires_grad=True)
    trained = chain_of(lambda _: weights, metaopt.Unrolled()).unroll(weights)
    metaopt.backward(objective(trained, BATCH, weights), weights)
    torch.testing.assert_close(weights.grad, by_hand(weights, by_tensor)[0], rtol=1e-12, atol=1e-14)
    with pytest.raises(metaopt.StageError, match="read it from the `meta_params`"):
        chain_of(lambda _: weights, metaopt.Checkpointed()).unroll(weights)
