"""The check that users get: it agrees on right chains, and catches wrong plug-ins."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check, distilled, verdicts
from small import (
    ADAM,
    MOMENTUM,
    SGD,
    SIZE,
    assert_same,
    chain_state,
    example_weights,
    feature_batches,
    one_stage,
    text_batch,
)
from small_models import EXPERTS, Linear, Network, mixture_of_experts
from torch import Tensor, nn

import metaopt
from metaopt.diagnostics.check import num_runs
from metaopt.estimators import Checkpointed, FiniteDifference

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


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_of_experts_is_checked_with_the_kernel_that_takes_float64(family):
    torch.manual_seed(0)
    model: Any = mixture_of_experts(family)
    chosen, batch, weights = model.config._experts_implementation, text_batch(decoder=False), example_weights(4)
    chain = one_stage(model=model, batches=[batch], num_steps=2)
    objective = metaopt.ValidationLoss("only")
    result = metaopt.check_hypergradient(chain, objective, batch, weights, all_in_float64=True, tolerance=1e-6)
    assert result.ok, str(result)
    assert chosen == model.config._experts_implementation == "grouped_mm"
    own = metaopt.hypergradient(objective(chain.unroll(weights), batch, weights), weights)["logits"]
    assert torch.allclose(own, result.gradient["logits"], rtol=1e-4, atol=0)


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


def test_every_run_is_counted_beforehand():
    several = {"a": example_weights(), "b": example_weights(seed=1)}

    def both(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        losses = F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")
        return (meta_params["a"](batch) * meta_params["b"](batch) * losses).mean()

    calls: list[int] = []
    options: dict[str, Any] = {"num_directions": 2, "coordinates": {"a.logits": [0]}, "steps": (1e-3, 1e-4)}
    check(one_stage(both), several, on_run=lambda: calls.append(1), **options)
    assert len(calls) == num_runs(several, **options)


def test_an_objective_with_tensors_of_its_own_is_cast_too():
    class Weighted(nn.Module):
        of_class: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("of_class", torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, trained: Any, batch: Any, meta_params: Any) -> Tensor:
            return F.cross_entropy(trained["only"](batch["inputs"]), batch["labels"], self.of_class)

    objective = Weighted()
    assert check(one_stage(), objective=objective).ok
    assert objective.of_class.dtype == torch.float32

    def closure(trained: Any, batch: Any, meta_params: Any) -> Tensor:
        return objective(trained, batch, meta_params)

    with pytest.raises(
        metaopt.StageError, match=r"test_check\.py, line \d+: .*float64 copies.*nn\.Module with buffers"
    ):
        check(one_stage(), objective=closure)


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


class KeptTeacher(metaopt.Distillation):
    """Learns from the teacher of the first call, for good."""

    kept: Any = None

    def __call__(self, model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        self.kept = self.kept or upstream["teacher"]
        return super().__call__(model, batch, meta_params, {"teacher": self.kept})


@pytest.mark.parametrize(
    ("estimator", "found"),
    [(metaopt.Unrolled(), "differs"), (Checkpointed(), "agrees")],
    ids=["Unrolled", "Checkpointed"],
)
def test_what_a_plug_in_keeps_from_an_earlier_call_is_noticed(estimator, found):
    """Checkpointed's backward takes the kept teacher for a constant, as the differences do: no row can tell."""
    chain = distilled(MOMENTUM)
    chain.stages["student"].loss, chain.stages["student"].estimator = KeptTeacher("teacher"), estimator

    def of_both(trained: Any, batch: Any, meta_params: Any) -> Tensor:  # a path of A that is not cut
        return sum(F.cross_entropy(model(batch["inputs"]), batch["labels"]) for model in trained.values())  # type: ignore[return-value]

    result = check(chain, objective=of_both)
    assert verdicts(result) == [found], str(result)
    assert result.verdict == "differs"
    assert result.keepers == ("student.loss (KeptTeacher)",)
    assert "student.loss (KeptTeacher) keeps something from an earlier call" in str(result)


def test_a_plug_in_that_keeps_what_does_not_change_is_no_suspect():
    class Counting(metaopt.WeightedLoss):
        calls = 0

        def __call__(self, *given: Any) -> Tensor:
            self.calls += 1
            return super().__call__(*given)

    loss = Counting()
    result = check(one_stage(loss))
    assert result.ok
    assert result.keepers == ()
    assert loss.calls == 0  # the user's own is left alone


def test_random_numbers_from_a_generator_of_its_own_are_noticed():
    generator = torch.Generator().manual_seed(0)

    def noisy(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        noise = torch.rand((), generator=generator, dtype=torch.float64)
        return metaopt.WeightedLoss()(model, batch, meta_params, upstream) * noise

    result = check(one_stage(noisy))
    assert not result.ok
    assert "more than rounding in float64" in str(result)


@pytest.mark.parametrize("estimator", [metaopt.Unrolled(), Checkpointed()], ids=repr)
def test_an_update_in_place_is_an_error(estimator: Any):
    class Decay(metaopt.WeightedLoss):
        def __call__(self, model: Any, *given: Any) -> Tensor:
            with torch.no_grad():
                for param in model.params.values():
                    param.mul_(0.9)
            return super().__call__(model, *given)

    with pytest.raises(metaopt.StageError, match=r"Decay.__call__ \(test_check\.py, line \d+\) updates in place what"):
        check(one_stage(Decay(), estimator=estimator))


def test_an_update_in_place_that_nothing_refuses_is_named():
    def clip(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            for gradient in gradients.values():
                gradient *= 0.1 / gradient.norm()
        return gradients

    result = check(one_stage(transform=clip))
    assert verdicts(result) == ["differs"]
    assert "clip (test_check.py, line" in str(result)
    assert "updates in place" in str(result)
    assert check(one_stage(transform=metaopt.ClipNorm(0.1))).ok


def test_a_cut_path_is_an_error():
    def cut(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        losses = F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")
        return (meta_params(batch).detach() * losses).mean()

    with pytest.raises(metaopt.MissingPathError, match="'logits'"):
        check(one_stage(cut))
