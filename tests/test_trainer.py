"""The outer loop: what a meta-step does, what stops it, what it selects, and that it resumes bitwise."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import full_chain
from small import SGD, assert_same, chain_state, cross_entropy, example_weights, feature_batches, one_stage
from torch import Tensor
from trainers import META, learned, trainer

import metaopt

# --- a meta-step


def test_a_run_is_the_loop_that_a_user_would_write():
    chain, weights, records = full_chain(), example_weights(), []
    run = trainer(full_chain(), observers=[records.append], validation=feature_batches(4, seed=8))
    result = run.fit(3)
    optimizer, losses, norms, last = META(weights.parameters()), [], [], 0.0
    for batch in feature_batches(4, seed=8)[:3]:
        outcome = chain.unroll(weights)
        loss = metaopt.ValidationLoss("student")(outcome, batch, weights)
        optimizer.zero_grad()
        metaopt.backward(loss, weights)
        norms.append(float(weights.logits.grad.norm()))  # type: ignore[union-attr]
        optimizer.step()
        chain.commit(outcome)
        losses.append(loss.item())
        last = float(outcome.losses["student"][-1])
    assert [record["meta_loss"] for record in records] == losses
    assert [record["hypergradient_norm"] for record in records] == pytest.approx(norms, rel=1e-12)
    assert [record["meta_step"] for record in records] == [1, 2, 3]
    assert [record["inner_loss/student"] for record in records][-1] == last
    assert all(record["seconds"] > 0 for record in records)
    assert torch.equal(learned(run), weights.logits.detach())
    assert_same(chain_state(run.chain)["state"], chain_state(chain)["state"])
    assert (result.meta_steps, result.meta_loss, result.score, result.best_step) == (3, losses[-1], None, None)
    assert not result.stopped_early


def test_fit_counts_meta_steps_from_the_start_of_the_run():
    run = trainer()
    run.fit(2)
    assert run.step == 2
    before = learned(run)
    assert math.isfinite(run.fit(2).meta_loss)  # of the last meta-step there was
    assert torch.equal(learned(run), before)
    assert run.fit(3).meta_steps == 3


def test_uniform_learns_nothing_and_takes_the_same_inner_steps():
    records: list[dict[str, Any]] = []
    run = trainer(meta_params=metaopt.Uniform(), meta_optimizer=None, observers=[records.append])
    run.fit(2)
    chain = full_chain()
    for record in records:
        outcome = chain.unroll(metaopt.Uniform())
        chain.commit(outcome)
        assert record["inner_loss/teacher"] == float(outcome.losses["teacher"][-1])
        assert "hypergradient_norm" not in record
    assert_same(chain_state(run.chain)["state"], chain_state(chain)["state"])


def test_learning_lowers_the_meta_loss_and_uniform_does_not():
    """One stage that starts anew at every meta-step: the weights are all that can improve."""

    def losses(meta_params: Any, meta_optimizer: Any) -> list[float]:
        records: list[dict[str, Any]] = []
        chain = one_stage(batches=feature_batches(3), optimizer=functools.partial(SGD, lr=1.0))
        run = trainer(
            chain,
            meta_params,
            carry={"only": "never"},
            validation=feature_batches(1, seed=8),
            meta_optimizer=meta_optimizer,
            observers=[records.append],
        )
        run.fit(10)
        return [record["meta_loss"] for record in records]

    weights = example_weights()
    falling = losses(weights, META(weights.parameters()))
    assert len(set(losses(metaopt.Uniform(), None))) == 1
    assert falling[-1] < falling[0] - 0.05
    assert falling == sorted(falling, reverse=True)


# --- carry


@pytest.mark.parametrize(("carry", "restarts"), [("always", []), ("never", [1, 2, 3, 4]), (2, [2, 4])])
def test_carry_says_when_a_stage_starts_anew(carry, restarts):
    chain = full_chain()
    start = {n: p.detach().clone() for n, p in chain.stages["student"].model.named_parameters()}
    found: list[int] = []

    def observe(record: dict[str, Any]) -> None:
        now = dict(chain.stages["student"].model.named_parameters())
        if all(torch.equal(now[n], p) for n, p in start.items()):
            found.append(record["meta_step"])

    teacher = chain.stages["teacher"].model.last.weight.detach().clone()  # type: ignore[union-attr]
    trainer(chain, carry={"student": carry}, observers=[observe]).fit(4)
    assert found == restarts
    assert not torch.equal(chain.stages["teacher"].model.last.weight, teacher)  # type: ignore[union-attr]
    assert chain.stages["student"].state_dict()["random"]["steps"] == 12


# --- what stops it before A moves


def nan_objective(trained: Any, batch: Any, meta_params: Any) -> Tensor:
    return metaopt.ValidationLoss("student")(trained, batch, meta_params) * float("nan")


def cut_objective(trained: Any, batch: Any, meta_params: Any) -> Tensor:
    return cross_entropy(trained["student"].detach(), batch, None, None)


def slope_of_root_at_zero(trained: Any, batch: Any, meta_params: Any) -> Tensor:
    loss = metaopt.ValidationLoss("student")(trained, batch, meta_params)
    return loss + (meta_params.logits * 0).sum().sqrt()


def per_example(trained: Any, batch: Any, meta_params: Any) -> Tensor:
    return trained["student"](batch["inputs"])


STOPS: dict[str, tuple[Callable[..., Tensor], type[Exception], str]] = {
    "a NaN meta-loss": (nan_objective, metaopt.NonFiniteError, "the meta-loss is nan"),
    "no path": (cut_objective, metaopt.MissingPathError, "meta-parameter 'logits': the meta-loss has no graph"),
    "an infinite slope": (slope_of_root_at_zero, metaopt.NonFiniteError, "hypergradient of 'logits' is not finite"),
    "no scalar": (per_example, metaopt.StageError, "the meta-objective function must return a scalar"),
}


@pytest.mark.parametrize("case", STOPS)
def test_an_error_stops_the_run_before_anything_moves(case):
    objective, error, message = STOPS[case]
    run = trainer(objective=objective)
    before = copy.deepcopy(run.state_dict())
    with pytest.raises(error, match=message):
        run.fit(2)
    assert_same(run.state_dict(), before)


def test_a_nan_meta_loss_stops_a_run_that_learns_nothing_too():
    run = trainer(meta_params=metaopt.Uniform(), meta_optimizer=None, objective=nan_objective)
    with pytest.raises(metaopt.NonFiniteError, match="the meta-loss is nan"):
        run.fit(1)


def test_a_hypergradient_that_is_not_finite_is_traced_to_its_step_and_line() -> None:
    def corner(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        bias = model.params["linear.bias"] - model.params["linear.bias"].detach()
        term = torch.where(bias > 0, bias, bias.pow(1.5)).sum() if model.step == 1 else 0.0  # the slope's slope
        return metaopt.WeightedLoss()(model, batch, meta_params, upstream) + term

    training = trainer(one_stage(corner))
    with pytest.raises(metaopt.NonFiniteError, match=r"in stage 'only', at inner step 1 of 3.*the slope's slope"):
        training.meta_step()


def test_what_an_objective_draws_is_decided_by_the_trainers_seed_and_the_meta_step():
    drawn: list[float] = []

    class Drawing(metaopt.ValidationLoss):
        def __call__(self, *args: Any) -> Tensor:
            drawn.append(torch.rand(()).item())
            return super().__call__(*args)

    for seed, outside in ((1, 0), (1, 7), (2, 0)):
        run = trainer(one_stage(num_steps=1), objective=Drawing("only"), seed=seed)
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        run.meta_step()
        run.meta_step()
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = drawn[:2], drawn[2:4], drawn[4:]
    assert first == again
    assert len({*first, *other}) == 4
