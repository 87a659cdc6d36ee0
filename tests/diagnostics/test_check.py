"""The check that users get: it agrees on right chains, catches wrong plug-ins, and says when it cannot tell."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    two_stages,
)
from small_models import Linear, Network
from torch import Tensor, nn

import metaopt
from metaopt.diagnostics.check import CheckResult, CheckRow
from metaopt.estimators import Checkpointed, FiniteDifference


def check(chain: metaopt.Chain, meta_params: Any = None, objective: Any = None, **options: Any) -> CheckResult:
    weights = meta_params or example_weights()
    objective = objective or metaopt.ValidationLoss(list(chain.stages)[-1])
    return metaopt.check_hypergradient(chain, objective, feature_batches(1, seed=8)[0], weights, **options)


def distilled(optimizer: Any) -> metaopt.Chain:
    """Two stages with dropout; without batch norm, whose running statistics carry no graph."""
    return two_stages(optimizer, Network(0.3), Network(0.3))


def verdicts(result: CheckResult) -> list[str]:
    return [row.verdict for row in result.rows]


# --- right chains


@pytest.mark.parametrize("optimizer", [MOMENTUM, functools.partial(ADAM, eps=1e-3)], ids=["momentum", "adam"])
def test_a_right_chain_agrees(optimizer):
    """With dropout, through a warm optimizer; nothing of the user's moves."""
    chain, weights = distilled(optimizer), example_weights()
    chain.commit(chain.unroll(weights))
    before, own = chain_state(chain), weights.logits.detach().clone()
    result = check(chain, weights, num_directions=2, coordinates={"logits": [0, 7]})
    assert result.ok, str(result)
    assert verdicts(result) == ["agrees"] * 4
    assert [row.direction for row in result.rows] == ["random 1", "random 2", "entry 0", "entry 7"]
    assert max(row.error for row in result.rows) < 1e-6
    assert_same(chain_state(chain), before)
    assert_same(weights.logits.detach(), own)
    assert weights.logits.grad is None
    expected = metaopt.hypergradient(
        metaopt.ValidationLoss("student")(chain.unroll(weights), feature_batches(1, seed=8)[0], weights), weights
    )
    assert_same(result.gradient, expected)
    assert result.rows[2].hypergradient == float(expected["logits"][0])


def test_a_float32_chain_is_checked_in_float64():
    chain, weights = distilled(MOMENTUM).twin(torch.float32), example_weights().float()
    result = check(chain, weights)
    assert result.ok, str(result)
    assert result.gradient["logits"].dtype == torch.float64
    assert weights.logits.dtype == next(chain.stages["student"].model.parameters()).dtype == torch.float32


def test_a_loss_with_tensors_of_its_own_is_cast_too():
    class Weighted(nn.Module):
        of_class: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("of_class", torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
            losses = F.cross_entropy(model(batch["inputs"]), batch["labels"], self.of_class, reduction="none")
            return (meta_params(batch) * losses).mean()

    loss = Weighted()
    chain = metaopt.Chain(only=metaopt.Stage(Linear().float(), SGD, loss, feature_batches(), 2))
    assert check(chain, example_weights().float()).ok
    assert loss.of_class.dtype == torch.float32


def test_an_objective_that_draws_random_numbers_is_held_still():
    def in_train_mode(trained: Any, batch: Any, meta_params: Any) -> Tensor:
        return F.cross_entropy(trained["only"].train()(batch["inputs"]), batch["labels"])

    chain, random = one_stage(model=Network(0.5)), torch.get_rng_state()
    result = check(chain, objective=in_train_mode)
    assert result.ok, str(result)
    assert torch.equal(torch.get_rng_state(), random)


def test_several_meta_parameters_have_a_row_each():
    several = {"a": example_weights(), "b": example_weights(seed=1)}

    def both(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        losses = F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")
        return (meta_params["a"](batch) * meta_params["b"](batch) * losses).mean()

    result = check(one_stage(both), several)
    assert result.ok
    assert [row.meta_param for row in result.rows] == ["a.logits", "b.logits"]


def test_an_entry_that_no_batch_holds_agrees_on_zero():
    result = check(one_stage(), example_weights(3 * SIZE + 1), coordinates={"logits": [3 * SIZE]})
    assert result.rows[1].hypergradient == result.rows[1].difference == 0.0
    assert verdicts(result) == ["agrees", "agrees"]


# --- wrong plug-ins


def detached_in_part(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
    """The second factor's weight is cut out of the graph: half of the slope is missing."""
    weights = meta_params(batch)
    losses = F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")
    return (weights * weights.detach() * losses).mean()


def detached_curvature(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
    """A regulariser on a detached copy of the weights, as an in-place update by hand would give."""
    pull = sum(((p - 1.5 * p.detach()) ** 2).sum() for p in model.params.values())
    return metaopt.WeightedLoss()(model, batch, meta_params, upstream) + pull


class StaleTeacher(metaopt.Distillation):
    """Half of what it learns comes from a detached teacher."""

    def __call__(self, model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        stale = {"teacher": upstream["teacher"].detach()}
        return sum(super(StaleTeacher, self).__call__(model, batch, meta_params, up) for up in (upstream, stale)) / 2  # type: ignore[return-value]


class WrongScale(torch.autograd.Function):
    """The identity, whose author forgot a factor in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 1.01 * grads[0]


def wrongly_scaled(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
    losses = F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")
    return (WrongScale.apply(meta_params(batch)) * losses).mean()


def with_stale_teacher() -> metaopt.Chain:
    chain = distilled(MOMENTUM)
    chain.stages["student"].loss = StaleTeacher("teacher")
    return chain


WRONG: dict[str, Callable[[], metaopt.Chain]] = {
    "a detach in the loss": lambda: one_stage(detached_in_part),
    "weights detached in a regulariser": lambda: one_stage(
        detached_curvature, optimizer=functools.partial(SGD, lr=0.05)
    ),
    "a stale teacher": with_stale_teacher,
    "a slope one per cent too large": lambda: one_stage(wrongly_scaled),
    "a coarse finite difference": lambda: one_stage(
        model=Network,
        estimator=Checkpointed(product=FiniteDifference(epsilon=0.3)),
        optimizer=functools.partial(SGD, lr=1.0),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_plug_ins_are_caught(case):
    result = check(WRONG[case]())
    assert verdicts(result) == ["differs"], str(result)
    assert not result.ok
    assert "differs" in str(result)


def test_a_cut_path_is_an_error():
    def cut(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        losses = F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")
        return (meta_params(batch).detach() * losses).mean()

    with pytest.raises(metaopt.MissingPathError, match="'logits'"):
        check(one_stage(cut))


# --- what it cannot tell


def test_a_float32_operation_inside_leaves_it_undecided():
    """The slope is right; the differences drown in the rounding of that one operation."""

    def rounded(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        losses = F.cross_entropy(model(batch["inputs"]).float(), batch["labels"], reduction="none")
        return (meta_params(batch).float() * losses).mean().double()

    def objective(trained: Any, batch: Any, meta_params: Any) -> Tensor:
        return F.cross_entropy(trained["only"](batch["inputs"]).float(), batch["labels"]).double()

    result = check(one_stage(rounded), objective=objective, tolerance=1e-9)
    assert verdicts(result) == ["undecided"], str(result)
    assert not result.ok
    assert "undecided: the difference is uncertain by" in str(result)
    assert "float32 operation" in result.remarks[0]


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


def test_the_table_lines_up():
    lines = str(check(one_stage(), coordinates={"logits": [0]})).splitlines()
    assert lines[0].split("  ")[0] == "meta-parameter"
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == {"-", " "}


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown name": ({"coordinates": {"logit": [0]}}, r"no meta-parameter 'logit' \(did you mean 'logits'"),
    "an index too large": ({"coordinates": {"logits": [15]}}, r"'logits' has 15 entries, there is no 15"),
    "a negative index": ({"coordinates": {"logits": [-1]}}, r"there is no -1"),
    "a sweep of one step": ({"steps": [1e-4]}, r"a sweep needs two steps or more"),
    "a step of zero": ({"steps": [1e-4, 0.0]}, r"all above 0"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_options_that_cannot_be_used_are_refused(case):
    options, message = WRONG_OPTIONS[case]
    with pytest.raises(metaopt.ConfigError, match=message):
        check(one_stage(), **options)
