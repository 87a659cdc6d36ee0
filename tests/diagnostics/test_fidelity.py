"""Estimators beside the exact hypergradient: errors known in closed form, costs, failures, and what is recommended."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import library
import pytest
import torch
import torch.nn.functional as F
from closed_forms import closed_form
from problems import REGULARISATION, closed_hypergradient, linear_stages
from small import ADAM, MOMENTUM, assert_same, chain_state, example_weights, feature_batches, one_stage, two_stages
from small_models import Network
from torch import Tensor

import metaopt
from metaopt.diagnostics.fidelity import OWN, TruncatedShare, num_calls
from metaopt.diagnostics.fidelity_result import Cost, Deviation, FidelityResult, FidelityRow
from metaopt.estimators import Checkpointed, FiniteDifference, Truncated, Unrolled

BATCH = feature_batches(1, seed=8)[0]


@pytest.fixture(autouse=True)
def _few_objects() -> Iterator[None]:
    """Peaks are read after a collection of garbage, which goes through all that the test run holds: seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


def distilled(**options: Any) -> metaopt.Chain:
    """Two stages of two steps, with dropout."""
    torch.manual_seed(1)
    return two_stages(ADAM, Network(0.3), Network(0.3), **{"num_steps": 2, **options})


def network() -> metaopt.Chain:
    """One stage of two steps."""
    torch.manual_seed(1)
    return one_stage(model=Network(0.3), num_steps=2)


def compare(chain: metaopt.Chain, estimators: Any, weights: Any = None, **options: Any) -> FidelityResult:
    weights = weights or example_weights()
    objective = options.pop("objective", metaopt.ValidationLoss(list(chain.stages)[-1]))
    return metaopt.compare_estimators(chain, objective, BATCH, weights, estimators, **{"num_runs": 1, **options})


def by_name(result: FidelityResult) -> dict[str, FidelityRow]:
    return {row.name: row for row in result.rows}


def deviation(row: FidelityRow) -> Deviation:
    assert row.in_float64 is not None, row.failure
    return row.in_float64


def cost(row: FidelityRow) -> Cost:
    assert row.cost is not None, row.failure
    return row.cost


# --- errors


def test_what_is_exact_has_no_error():
    given = {
        "unrolled": Unrolled(),
        "recompute": Checkpointed(store="recompute"),
        "captured": Checkpointed(metaopt.Captured()),
        "whole": Truncated(3),
        "share": TruncatedShare(1.0),
    }
    rows = by_name(compare(distilled(num_steps=3), given))
    assert list(rows) == [*given, OWN]
    for row in rows.values():
        assert deviation(row).relative_error < 1e-10, row.name
        assert deviation(row).cosine == pytest.approx(1.0, abs=1e-12)
        assert row.is_exact == (row.name not in ("whole", "share"))
        assert (cost(row).tracing > 0) == bool(cost(row).cells[-1]) == (row.name == "captured")


def test_a_share_of_the_steps_is_rounded():
    given = {"two": Truncated(2), "share": TruncatedShare(0.6), "least": TruncatedShare(0.1), "one": Truncated(1)}
    rows = by_name(compare(one_stage(num_steps=3), given))
    found = {name: deviation(rows[name]) for name in given}
    assert found["share"] == found["two"] != found["one"] == found["least"]


def test_the_error_of_one_step_is_that_of_its_closed_form():
    """One ridge stage: its last step alone, from where the steps before it end, as matrix expressions."""
    stages, problem = linear_stages(1, momentum=0.0)
    phi, stage = problem.phi.values.detach(), stages["first"]
    before = closed_form({"first": replace(stage, num_steps=stage.num_steps - 1)}, phi)["first"][0]
    theta, jacobian = closed_form({"first": replace(stage, start=before, num_steps=1)}, phi)["first"]
    error = problem.batch["inputs"] @ theta - problem.batch["labels"]
    last = error @ problem.batch["inputs"] @ jacobian / len(error) + REGULARISATION * phi
    exact = closed_hypergradient(stages, problem)["values"]

    given = {"one_step": metaopt.OneStep(), "checkpointed": Checkpointed()}
    objective: Any = problem.objective
    result = metaopt.compare_estimators(
        library.as_chain(problem), objective, problem.batch, problem.phi, given, num_runs=1
    )
    found = deviation(by_name(result)["one_step"])
    assert found.relative_error == pytest.approx(float((last - exact).norm() / exact.norm()), rel=1e-9)
    assert found.cosine == pytest.approx(float(last @ exact / last.norm() / exact.norm()), rel=1e-9)
    assert 0.01 < found.relative_error < 1.0


def test_rounding_of_the_run_s_dtype_is_told_apart():
    chain, weights = network().twin(torch.float32), example_weights().float()
    result = compare(chain, {"differences": Checkpointed(FiniteDifference())}, weights)
    rows = by_name(result)
    assert result.dtype == "float32"
    assert deviation(rows[OWN]).relative_error < 1e-10
    assert 1e-9 < rows[OWN].error < 1e-4
    assert deviation(rows["differences"]).relative_error < 1e-6 < rows["differences"].error


def test_errors_are_means_over_points_of_the_training():
    def at(num_points: int, moved: int) -> Deviation:
        chain, weights = network(), example_weights()

        def advance() -> Any:
            chain.commit(chain.unroll(weights))
            return BATCH

        for _ in range(moved):
            advance()
        result = compare(chain, {"one": metaopt.OneStep()}, weights, num_points=num_points, advance=advance)
        return deviation(by_name(result)["one"])

    first, second, both = at(1, 0), at(1, 1), at(2, 0)
    assert first != second
    assert both == Deviation.mean([first, second])
    assert both.cosine == pytest.approx((first.cosine + second.cosine) / 2)


# --- what it leaves alone, and what it costs


def test_nothing_of_the_user_s_is_changed():
    chain, weights = distilled(), example_weights()
    chain.commit(chain.unroll(weights))
    before, own = chain_state(chain), weights.logits.detach().clone()
    estimators = {name: stage.estimator for name, stage in chain.stages.items()}
    calls: list[None] = []
    given = {"one": metaopt.OneStep(), "captured": Checkpointed(metaopt.Captured())}
    compare(chain, given, weights, num_runs=2, on_run=lambda: calls.append(None))
    assert len(calls) == num_calls(len(given), num_points=1, num_runs=2)
    assert_same(chain_state(chain), before)
    assert_same(weights.logits.detach(), own)
    assert weights.logits.grad is None
    assert all(stage.estimator is estimators[name] for name, stage in chain.stages.items())


def test_costs_are_those_of_the_estimators():
    given = {name: Checkpointed(store=name) for name in ("states", "recompute")} | {"one": metaopt.OneStep()}
    chain = one_stage(model=Network(), num_steps=12)
    result = compare(chain, given)
    rows = by_name(result)
    assert (result.plain.time, result.plain.flops) == (1.0, 1.0)
    states, recompute, one, unrolled = (cost(rows[name]) for name in ("states", "recompute", "one", OWN))
    assert one.peak_bytes < states.peak_bytes < unrolled.peak_bytes
    assert recompute.peak_bytes < states.peak_bytes
    assert 1 < (one.flops or 0) < (states.flops or 0) < (recompute.flops or 0) < 8
    again = cost(compare(chain, {}).rows[0])
    assert (again.peak_bytes, again.flops) == (unrolled.peak_bytes, unrolled.flops)


# --- failures and warnings


class Detached(Unrolled):
    """Gives trained weights without a graph."""

    def differentiate(self, loop: Any, meta_params: Any, upstream: Any) -> Any:
        result = super().differentiate(loop, meta_params, upstream)
        result.model = result.model.detach()
        return result


class Broken(Unrolled):
    """Raises what a bug raises."""

    def differentiate(self, loop: Any, meta_params: Any, upstream: Any) -> Any:
        raise KeyError("momentum")


class Doubled(Unrolled):
    """Says that it is exact, and gives twice the hypergradient."""

    def differentiate(self, loop: Any, meta_params: Any, upstream: Any) -> Any:
        result = super().differentiate(loop, meta_params, upstream)
        result.model = result.model.with_params({n: 2 * p - p.detach() for n, p in result.model.params.items()})
        return result


def test_one_that_fails_gets_a_row_that_says_why():
    given = {"detached": Detached(), "broken": Broken(), "doubled": Doubled()}
    result = compare(one_stage(), given)
    rows = by_name(result)
    assert rows["broken"].failure == "KeyError: 'momentum'"
    assert rows["detached"].failure == (
        "MissingPathError: meta-parameter 'logits': the meta-loss has no graph at all, so there is no hypergradient"
    )
    assert rows["broken"].cost is rows["broken"].in_float64 is None
    assert cost(rows[OWN]).time > 0
    assert deviation(rows["doubled"]).cosine == pytest.approx(1.0)
    assert deviation(rows["doubled"]).relative_error == pytest.approx(1.0)
    assert not rows["doubled"].is_exact
    assert [remark.split(":")[0] for remark in result.remarks] == [
        "detached fails",
        "broken fails",
        "doubled says that it is exact, and differs from it",
    ]
    assert "doubled" not in "".join(line for line in result.recommendation if "exact" in line)
    assert str(result).count("fails") == 4


def test_without_a_second_derivative_differences_stand_in_for_the_exact_one():
    def loss(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        margins = F.multi_margin_loss(model(batch["inputs"]), batch["labels"], p=2, reduction="none")
        return (meta_params(batch) * margins).mean()

    given = {"differences": Checkpointed(FiniteDifference()), "one_step": metaopt.OneStep(FiniteDifference())}
    result = compare(one_stage(loss), given)
    rows = by_name(result)
    assert "multi_margin_loss_backward is not implemented" in rows[OWN].failure.replace("'", "")
    assert deviation(rows["differences"]).relative_error < 1e-6 < deviation(rows["one_step"]).relative_error
    assert result.remarks[-1].startswith("errors are against Checkpointed(product=FiniteDifference(")


def test_of_a_single_number_the_cosine_is_a_sign():
    chain = one_stage(metaopt.CrossEntropy(), overrides=metaopt.FromMeta())
    learned = metaopt.LearnedHyperparameters(lr=0.1)
    result = compare(chain, {"implicit": metaopt.ConjugateGradient(3)}, learned.double())
    failure, remark = result.remarks
    assert failure.startswith("implicit fails: MissingPathError: meta-parameter 'lr': no path")
    assert remark == "a single number is learned, so a cosine is no more than a sign: go by the relative error"


def test_a_warning_is_a_remark_once():
    result = compare(network(), {"implicit": metaopt.ConjugateGradient(10)}, num_runs=2)
    stages = [remark.split("stage ")[1].split(":")[0] for remark in result.remarks if "has curvature" in remark]
    assert 0 < len(stages) == len(set(stages))


# --- what is recommended


def row(name: str, error: float, time: float, size: int, exact: bool = False, cosine: float = 1.0) -> FidelityRow:
    found = Deviation(cosine, error)
    return FidelityRow(name, f"{name}()", exact, found, found, Cost(time, time, size, time))


def test_the_recommendation_is_that_of_the_table():
    rows = (
        row("a", 1e-15, 2.0, 9_000_000, exact=True),
        row("b", 1e-15, 3.0, 4_000_000, exact=True),
        row("c", 1e-1, 1.0, 1_000_000, cosine=0.995),
        row("d", 1e-1, 0.5, 1_000_000, cosine=0.98),
        replace(row("e", 1e-15, 0.1, 1_000_000, exact=True), failure="KeyError: 'x'"),
        replace(row("f", 1e-15, 0.1, 1_000_000, exact=True), estimator="a()"),
    )
    result = FidelityResult(rows, Cost(1.0, 1.0, 10, None), "float64", "cpu, 1 thread", {"only": 5}, 1, 3)
    assert result.recommendation == [
        "fewest bytes, exact: b (4.00 MB, 3.00× plain training, rel. error 1.0e-15)",
        "least time, exact: a (9.00 MB, 2.00× plain training, rel. error 1.0e-15)",
        "least time, cosine ≥ 0.99: c (1.00 MB, 1.00× plain training, rel. error 1.0e-01)",
    ]
    assert str(result).splitlines()[3].split() == ["(plain", "training)", "1.00×", "0.00", "MB", "—"]
    assert math.isnan(FidelityRow("g", "g()").error)


# --- refusals


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(metaopt.ConfigError, match="num_points=2 needs advance"):
        compare(one_stage(), {}, num_points=2)
    with pytest.raises(metaopt.ConfigError, match="num_runs"):
        compare(one_stage(), {}, num_runs=0)
    with pytest.raises(metaopt.ConfigError, match="'half' is a float, not an Estimator"):
        compare(one_stage(), {"half": 0.5})
    with pytest.raises(metaopt.ConfigError, match="share=0 must be above 0"):
        TruncatedShare(0)
    with pytest.raises(metaopt.MissingPathError, match="logits"):
        compare(one_stage(metaopt.CrossEntropy()), {})
    with pytest.raises(metaopt.StageError, match="the exact hypergradient is 0 here"):
        compare(one_stage(optimizer=MOMENTUM), {}, objective=lambda trained, batch, phi: (phi.logits * 0).sum())
