"""Verdicts: when a difference cannot decide and why, what is remarked on, and how a result prints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check, distilled, verdicts
from small import MOMENTUM, cross_entropy, example_weights, one_stage, two_stages
from small_models import Network
from torch import Tensor, nn

import metaopt
from metaopt.diagnostics.check_result import CheckResult, CheckRow


def rounded(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
    losses = F.cross_entropy(model(batch["inputs"]).float(), batch["labels"], reduction="none")
    return (meta_params(batch).float() * losses).mean().double()


def rounded_objective(trained: Any, batch: Any, meta_params: Any) -> Tensor:
    return F.cross_entropy(trained["only"](batch["inputs"]).float(), batch["labels"]).double()


def test_a_float32_operation_inside_leaves_it_undecided():
    """The slope is right; the differences drown in the rounding of that one operation, unless it is left out."""
    result = check(one_stage(rounded), objective=rounded_objective, tolerance=1e-9)
    assert verdicts(result) == ["undecided"], str(result)
    assert not result.ok
    assert "undecided: the difference is uncertain by" in str(result)
    assert "float32 operation" in result.remarks[0]
    assert "rounded (test_check_result.py, line" in result.remarks[0]
    assert "rounded_objective (test_check_result.py, line" in result.remarks[0]
    right = check(one_stage(rounded), objective=rounded_objective, tolerance=1e-6, all_in_float64=True)
    assert right.ok, str(right)
    assert right.casts == ()


def test_a_kink_leaves_it_undecided():
    """A ReLU exactly at its corner: autograd takes the slope of one side, the central difference the mean of both."""
    meta_params = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(meta_params.weight)

    def cornered(trained: Any, batch: Any, meta_params: Any) -> Tensor:
        value = F.cross_entropy(trained["only"](batch["inputs"]), batch["labels"])
        return value * (1 + 3 * meta_params.weight.sum().relu() + meta_params.weight.sum())

    result = check(one_stage(cross_entropy), meta_params, cornered)
    assert verdicts(result) == ["undecided"], str(result)
    assert result.rows[0].cause == "kink"
    assert result.rows[0].jump == pytest.approx(3 * result.meta_loss)
    assert "the meta-loss has a kink here" in result.remarks[0]


def test_a_slope_lost_in_rounding_leaves_it_undecided():
    def high(trained: Any, batch: Any, meta_params: Any) -> Tensor:
        return 1e8 + F.cross_entropy(trained["only"](batch["inputs"]), batch["labels"])

    result = check(one_stage(), objective=high)
    assert verdicts(result) == ["undecided"], str(result)
    assert "rounded at" in result.remarks[0]
    assert "Take larger steps" in result.remarks[0]


def test_a_straight_through_estimate_is_remarked_on():
    def sampled(straight_through: bool) -> CheckResult:
        chain = distilled(MOMENTUM)
        loss = metaopt.GumbelSamples("teacher", straight_through=straight_through)
        chain.stages["student"].loss = metaopt.SumOfLosses({"samples": loss}, weights="terms")
        chain.stages["teacher"].loss = metaopt.WeightedLoss("examples")
        meta_params = {"examples": example_weights(), "terms": metaopt.TermWeights(["samples"])}
        return check(chain, meta_params)

    result = sampled(True)
    assert result.verdict == "undecided", str(result)
    assert result.rows[0].cause == "biased"
    assert "estimate by design" in result.remarks[0]
    assert "GumbelSamples" in result.remarks[0]
    assert sampled(False).ok


@pytest.mark.parametrize(
    ("offset", "slope", "steps", "found"),
    [(0.29e-6, 5.2e-3, [1e-3, 1e-4], 5e-3), (0.0, 1.2e-3, [1e-3, 1e-4, 1e-5], 0.0)],
    ids=["equal", "zero"],
)
def test_two_differences_that_are_equal_by_a_fluke_leave_it_undecided(offset, slope, steps, found):
    """A meta-loss in grains of 1e-6: the last two differences of the sweep agree, and are wrong."""
    meta_params = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(meta_params.weight)

    def in_grains(trained: Any, batch: Any, meta_params: Any) -> Tensor:
        value = offset + slope * meta_params.weight.sum()
        return value + ((value / 1e-6).round() * 1e-6 - value).detach()

    result = check(one_stage(cross_entropy), meta_params, in_grains, steps=steps)
    assert abs(result.rows[0].difference) == pytest.approx(found)
    assert abs(result.rows[0].hypergradient) == pytest.approx(slope)
    assert verdicts(result) == ["undecided"]


def test_running_statistics_are_named_when_rows_differ():
    """They carry no graph, so eval mode makes the pipeline depend on A in a way that no backward sees."""
    result = check(two_stages(MOMENTUM, Network(batch_norm=True)))
    assert not result.ok
    assert "running statistics" in str(result)
    assert "teacher.norm.running_mean" in str(result)


def row(hypergradient: float, difference: float, uncertainty: float, tolerance: float = 1e-4) -> CheckRow:
    return CheckRow("a", "random 1", hypergradient, difference, uncertainty, 1e-4, tolerance)


def test_verdicts_and_errors():
    assert row(1.0, 1.00005, 1e-9).verdict == "agrees"
    assert row(1.0, 1.001, 1e-9).verdict == "differs"
    assert row(1.0, 1.001, 1e-3).verdict == "undecided"
    assert row(1.0, 1.5, 1e-3).verdict == "differs"  # uncertain, but not by that much
    assert row(0.0, 0.0, 0.0).verdict == "agrees"
    assert row(0.0, 1e-3, 1e-9).verdict == "differs"
    assert row(2.0, 1.0, 0.0).error == 0.5
    assert row(0.0, 0.0, 0.0).error == 0.0
    some = CheckResult((row(1.0, 1.0, 1e-9), row(1.0, 1.001, 1e-3)), 1.0, {})
    assert some.ok  # one agrees, none differs
    assert not CheckResult((row(1.0, 1.001, 1e-3),), 1.0, {}).ok
    assert not CheckResult((row(1.0, 1.0, 1e-9), row(1.0, 2.0, 1e-9)), 1.0, {}).ok


def test_each_meta_parameter_needs_a_row_that_agrees():
    other = CheckRow("b", "random 1", 1.0, 1.001, 1e-3, 1e-4, 1e-4)
    assert CheckResult((row(1.0, 1.0, 1e-9), other), 1.0, {}).verdict == "undecided"
    assert CheckResult((row(1.0, 1.0, 1e-9),), 1.0, {}, keepers=("only.loss (Mine)",)).verdict == "differs"


def test_the_verdict_in_one_line():
    rows = (row(1.0, 1.0001, 1e-9), row(1.0, 2.0, 1e-9), row(1.0, 1.001, 1e-3))
    line = CheckResult(rows, 1.0, {}).headline
    assert line.startswith("the hypergradient of a is not the derivative of this training: ")
    assert "1 of 3 directions agrees, 1 of 3 directions differs, 1 of 3 directions undecided" in line
    assert CheckResult(rows[:1], 1.0, {}).headline.startswith("the hypergradient is right: ")
    unsure = CheckRow("b", "random 1", 1.0, 1.001, 1e-3, 1e-4, 1e-4)
    line = CheckResult((rows[0], unsure), 1.0, {}).headline
    assert line.startswith("the hypergradient of b is neither shown right nor wrong: ")


def test_the_table_lines_up():
    lines = str(check(one_stage(), coordinates={"logits": [0]})).splitlines()
    assert lines[0].split("  ")[0] == "meta-parameter"
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == {"-", " "}


def test_an_estimator_that_approximates_is_named():
    result = check(one_stage(model=Network, estimator=metaopt.Truncated(1), num_steps=3))
    assert verdicts(result) == ["differs"]
    assert len(result.remarks) == 1
    assert "an approximation by design (Truncated(1" in result.remarks[0]
    assert "of stage 'only'" in result.remarks[0]


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown name": ({"coordinates": {"logit": [0]}}, r"no meta-parameter 'logit' \(did you mean 'logits'"),
    "an index too large": ({"coordinates": {"logits": [15]}}, r"'logits' has 15 entries, there is no 15"),
    "a negative index": ({"coordinates": {"logits": [-1]}}, r"there is no -1"),
    "a sweep of one step": ({"steps": [1e-4]}, r"a sweep needs two steps or more"),
    "the same step twice": ({"steps": [1e-4, 1e-4]}, r"each once"),
    "no direction": ({"num_directions": 0}, r"there is no direction to check"),
    "a step of zero": ({"steps": [1e-4, 0.0]}, r"all above 0"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_options_that_cannot_be_used_are_refused(case):
    options, message = WRONG_OPTIONS[case]
    with pytest.raises(metaopt.ConfigError, match=message):
        check(one_stage(), **options)
