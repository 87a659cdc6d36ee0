"""Selection (looks, best meta-parameters, early stopping) and resuming of the outer loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from chains import full_chain
from small import assert_same, chain_state, feature_batches, tensors_of
from torch import Tensor
from trainers import learned, saved, trainer, without_seconds

import metaopt
from metaopt.trainer import Selection


def scoring(scores: list[float]) -> tuple[Any, list[tuple[Any, int]]]:
    """A score function that returns these values in turn, and what it was called with."""
    calls: list[tuple[Any, int]] = []

    def score(model: Any, batches: Any) -> dict[str, float]:
        calls.append((model, len(batches)))
        return {"accuracy": scores[len(calls) - 1], "other": 0.0}

    return score, calls


def test_looks_are_taken_every_so_often_and_at_the_end():
    score, calls = scoring([0.1, 0.2, 0.3])
    records: list[dict[str, Any]] = []
    run = trainer(
        selection=Selection(feature_batches(2), "teacher", score, "accuracy", every=2), observers=[records.append]
    )
    result = run.fit(5)
    assert [r["meta_step"] for r in records if "selection/accuracy" in r] == [2, 4, 5]
    assert [count for _, count in calls] == [2, 2, 2]
    assert records[1]["selection/other"] == 0.0
    assert (result.score, result.best_step) == (0.3, 5)


def test_the_meta_parameters_of_the_best_look_come_back_as_they_were_when_its_models_were_trained():
    score, _ = scoring([0.1, 0.9, 0.5])
    chain, used = full_chain(), []
    run = trainer(chain, selection=Selection(feature_batches(2), "student", score, "accuracy", every=1))
    unroll = chain.unroll
    chain.unroll = lambda meta_params: used.append(learned(run)) or unroll(meta_params)  # type: ignore[method-assign]
    result = run.fit(3)
    assert (result.score, result.best_step) == (0.9, 2)
    assert torch.equal(learned(run), used[1])
    assert not torch.equal(used[1], used[2])


def test_a_run_stops_when_its_patience_is_spent():
    score, calls = scoring([0.5, 0.4, 0.6, 0.6, 0.1, 0.9])
    selection = Selection(feature_batches(1), "student", score, "accuracy", every=1, patience=2)
    result = trainer(selection=selection).fit(10)
    assert result.stopped_early
    assert (result.meta_steps, result.best_step, result.score) == (5, 3, 0.6)
    assert len(calls) == 5


@pytest.mark.parametrize("metric", ["accuracy", None], ids=["metric", "loss"])
def test_a_score_that_is_nan_is_never_the_best(metric):
    scores = [float("nan"), 0.2, float("nan")]
    values = iter(scores)

    def objective(trained: Any, batch: Any, meta_params: Any) -> Tensor:
        loss = metaopt.ValidationLoss("student")(trained, batch, meta_params)
        return loss if torch.is_grad_enabled() else torch.tensor(next(values))

    selection = Selection(feature_batches(1), "student", scoring(scores)[0], metric, every=1)
    result = trainer(objective=objective, selection=selection).fit(3)
    assert result.best_step == 2
    assert result.score == pytest.approx(0.2)


def test_without_a_metric_the_meta_objective_on_the_selection_stream_is_minimised():
    scores = [3.0, 1.0, 2.0, 5.0, 4.0]
    values = iter(scores)

    def objective(trained: Any, batch: Any, meta_params: Any) -> Tensor:
        loss = metaopt.ValidationLoss("student")(trained, batch, meta_params)
        return loss if torch.is_grad_enabled() else torch.tensor(next(values))

    records: list[dict[str, Any]] = []
    selection = Selection(feature_batches(1), "student", every=1)
    result = trainer(objective=objective, selection=selection, observers=[records.append]).fit(5)
    assert (result.score, result.best_step) == (1.0, 2)
    assert [record["selection/loss"] for record in records] == scores


def in_train_mode(trained: Any, batch: Any, meta_params: Any) -> Tensor:
    """An objective that draws random numbers."""
    return torch.nn.functional.cross_entropy(trained["teacher"].train()(batch["inputs"]), batch["labels"])


@pytest.mark.parametrize("objective", [None, in_train_mode], ids=["validation", "random"])
def test_a_run_resumes_bitwise_from_any_meta_step(objective):
    """In another process: the state goes through a file, the objects are new, and torch's random state is another."""
    carry: dict[str, Any] = {"teacher": 2, "student": "never"}

    def run(**options: Any) -> Any:
        selection = Selection(feature_batches(1), "student", every=2)
        return trainer(full_chain(), objective=objective, carry=carry, selection=selection, **options)

    states: list[Any] = []
    records: list[dict[str, Any]] = []
    whole = run(observers=[records.append, lambda record: states.append(copy.deepcopy(whole.state_dict()))])
    expected = whole.fit(5)
    for step in (1, 2, 3):
        torch.manual_seed(step)
        rest: list[dict[str, Any]] = []
        resumed = run(observers=[rest.append], seed=step)
        resumed.load_state_dict(saved(states[step - 1]))
        result = resumed.fit(5)
        assert without_seconds(rest) == without_seconds(records[step:])
        assert torch.equal(learned(resumed), learned(whole))
        assert_same(chain_state(resumed.chain)["state"], chain_state(whole.chain)["state"])
        assert (result.score, result.best_step) == (expected.score, expected.best_step)


def test_a_state_held_in_memory_does_not_move_with_the_run():
    run = trainer()
    run.fit(1)
    state = run.state_dict()
    kept = copy.deepcopy(state)
    run.fit(3)
    assert_same(state, kept)
    run.load_state_dict(state)
    assert_same(run.state_dict(), kept)
    run.fit(3)
    assert_same(state, kept)


def test_two_runs_of_one_seed_are_bitwise_the_same():
    found: list[list[dict[str, Any]]] = []
    for noise in (1, 2):
        records: list[dict[str, Any]] = []
        run = trainer(observers=[records.append])
        torch.manual_seed(noise)
        run.fit(3)
        found.append(without_seconds(records))
    assert found[0] == found[1]
    assert_same(tensors_of(run.chain.unroll(run.meta_params)), tensors_of(run.chain.unroll(run.meta_params)))
