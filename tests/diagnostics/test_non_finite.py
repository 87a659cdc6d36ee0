"""What stops being finite is named: in a training, with its step; on the way back, with its stage, step and line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import SGD, example_weights, feature_batches, meta_loss, one_stage, two_stages
from small_models import Network
from torch import Tensor

import metaopt
from metaopt.core.chain import TrainedChain
from metaopt.core.inner_loop import InnerLoop
from metaopt.diagnostics.non_finite import locate_non_finite, located, locating_in_training
from metaopt.estimators import Checkpointed, Estimator, Unrolled

STEPS, BAD = 6, 3
VALIDATION = feature_batches(1, seed=8)[0]
Term = Callable[[Tensor], Tensor]
RUNS: dict[str, Callable[[], Estimator]] = {"unrolled": Unrolled, "checkpointed": Checkpointed, "train": Unrolled}
RUNS["no graph"] = Unrolled


def zero(bias: Tensor) -> Tensor:
    """0, as a function of the weights."""
    return bias - bias.detach()


def with_term(term: Term, at: int = BAD, loss: Any = None) -> Any:
    """A weighted loss that has one more term of a bias at one inner step."""
    plain = loss or metaopt.WeightedLoss()

    def evaluate(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        found = plain(model, batch, meta_params, upstream)
        bias = next(p for name, p in reversed(model.params.items()) if name.endswith("bias"))
        return found + term(bias).sum() * meta_params(batch).sum() if model.step == at else found

    return evaluate


def run(chain: metaopt.Chain, how: str) -> None:
    with torch.set_grad_enabled(how != "no graph"), locating_in_training():
        (chain.train if how == "train" else chain.unroll)(example_weights())


TERMS: dict[str, tuple[Term, int, str]] = {
    "a loss": (
        lambda bias: bias * float("nan"),
        BAD,
        r"the inner loss is nan at inner step 3 of 6, with finite weights",
    ),
    "a gradient": (
        lambda bias: zero(bias).sqrt(),
        BAD,
        r"the inner gradient of 'linear\.bias' is not finite at inner step 3 of 6, though the loss is 0\.",
    ),
    "the last gradient": (
        lambda bias: zero(bias).sqrt(),
        STEPS - 1,
        r"the inner gradient of 'linear\.bias' is not finite at inner step 5 of 6",
    ),
    "a masked root": (
        lambda bias: torch.where(zero(bias) > 0, zero(bias).sqrt(), 0.0),
        BAD,
        r"the inner gradient of 'linear\.bias' is not finite at inner step 3 of 6.*root or norm at 0",
    ),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("how", RUNS)
def test_what_is_not_finite_in_a_training_is_named_with_its_step(name: str, how: str) -> None:
    term, at, message = TERMS[name]
    chain = one_stage(with_term(term, at), num_steps=STEPS, estimator=RUNS[how]())
    with pytest.raises(metaopt.NonFiniteError, match=f"stage 'only': {message}"):
        run(chain, how)


def test_an_update_that_overflows_is_named_with_its_step() -> None:
    huge = functools.partial(torch.optim.SGD, lr=1e308)
    chain = one_stage(with_term(lambda bias: 1e3 * bias, at=1), optimizer=huge, num_steps=1)
    chain.stages["only"].loss = lambda model, batch, meta, up: 100 * model.params["linear.weight"].sum()
    with pytest.raises(metaopt.NonFiniteError, match=r"is not finite after 1 inner steps; lower the inner"):
        chain.unroll(example_weights())


def test_meta_parameters_that_are_not_finite_are_named() -> None:
    weights = example_weights()
    with torch.no_grad():
        weights.logits[0] = float("nan")
    with pytest.raises(metaopt.NonFiniteError, match=r"meta-parameter 'logits' is not finite.*meta-learning rate"):
        locate_non_finite(one_stage(), lambda trained: torch.zeros(()), weights)


def counted(calls: list[int], at: int) -> Any:
    def evaluate(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        calls.append(model.step)
        found = metaopt.WeightedLoss()(model, batch, meta_params, upstream)
        return found * float("nan") if model.step == at else found

    return evaluate


def test_a_training_stops_at_the_step_and_is_looked_at_once_more_where_asked() -> None:
    calls: list[int] = []
    chain = one_stage(counted(calls, 2), num_steps=50)
    before = chain.state_dict()["only"]["stream"]
    with pytest.raises(metaopt.NonFiniteError, match=r"inner step 2 of 50.*locate_non_finite"):
        chain.train(example_weights())
    assert calls == [0, 1, 2]
    with pytest.raises(metaopt.NonFiniteError, match="inner step 2 of 50, with finite weights"), locating_in_training():
        chain.train(example_weights())
    assert calls == [0, 1, 2] * 3
    assert chain.state_dict()["only"]["stream"]["position"] == before["position"]


def test_on_an_accelerator_losses_are_looked_at_every_few_steps() -> None:
    stage = one_stage(num_steps=1).stages["only"]
    loop: InnerLoop = stage.begin("only", {}, {})
    loop.device = torch.device("cuda")
    losses = [torch.tensor(float("nan"))] * 999
    loop.watch(losses)
    with pytest.raises(metaopt.NonFiniteError, match="stage 'only': the inner loss is nan at inner step 0"):
        loop.watch([*losses, torch.zeros(())])


# --- the way back


def corner(bias: Tensor) -> Tensor:
    """`|x|^1.5` at 0: its value and its first derivative are 0, its second is infinite."""
    return torch.where(zero(bias) > 0, zero(bias), zero(bias).pow(1.5))  # the line to name


def found_in(chain: metaopt.Chain, meta_loss_of: Callable[[TrainedChain], Tensor] | None = None) -> str:
    weights = example_weights()
    objective = metaopt.ValidationLoss(list(chain.stages)[-1])
    found = locate_non_finite(chain, meta_loss_of or (lambda t: objective(t, VALIDATION, weights)), weights)
    return found or "nothing"


def networks(**losses: Any) -> metaopt.Chain:
    chain = two_stages(SGD, Network(), Network())
    for name, loss in losses.items():
        chain.stages[name].loss = loss
    return chain


@pytest.mark.parametrize("estimator", [Unrolled(), Checkpointed()], ids=["unrolled", "checkpointed"])
def test_a_second_derivative_that_is_not_finite_is_named_with_stage_step_and_line(estimator: Estimator) -> None:
    chain = one_stage(with_term(corner), num_steps=STEPS, estimator=estimator)
    with pytest.raises(metaopt.NonFiniteError, match="the hypergradient of 'logits' is not finite"):
        metaopt.hypergradient(meta_loss(chain, weights := example_weights()), weights)
    found = found_in(chain)
    assert found.startswith("in stage 'only', at inner step 3 of 6: the second derivative of the inner loss")
    assert "test_non_finite.py:" in found
    assert "# the line to name" in found
    momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    chain = one_stage(with_term(corner), num_steps=STEPS, estimator=estimator, optimizer=momentum)
    assert found_in(chain).startswith("in stage 'only', at inner step 3 of 6")


def test_a_second_derivative_is_traced_to_its_stage() -> None:
    assert found_in(networks()) == "nothing"
    first = networks(teacher=with_term(corner, at=1))
    assert found_in(first).startswith("in stage 'teacher', at inner step 1 of 3: the second")

    def of_upstream(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        slope = corner(upstream["teacher"].params["last.bias"]).sum() * model.params["last.bias"].sum()
        found = metaopt.Distillation("teacher")(model, batch, meta_params, upstream)
        return (
            found
            + zero(upstream["teacher"].params["last.bias"]).abs().sqrt().sum() * slope.detach()
            + (
                zero(upstream["teacher"].params["last.bias"]).abs().sqrt().sum() * model.params["last.bias"].sum()
                if model.step == 2
                else 0.0
            )
        )

    assert found_in(networks(student=of_upstream)).startswith("in stage 'student', at inner step 2 of 3")


def test_a_meta_objective_without_a_finite_slope_is_named() -> None:
    root = found_in(one_stage(), lambda trained: zero(trained["only"].params["linear.bias"]).sqrt().sum())
    assert root.startswith("in the meta-objective: its derivative by 'only.linear.bias' is not finite")
    assert found_in(one_stage(), lambda trained: torch.tensor(float("inf"))).startswith(
        "in the meta-objective: it is inf"
    )


def test_an_optimizer_without_a_finite_slope_is_named() -> None:
    def rescaled(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: g * (1 + zero(g).square().sum().sqrt()) for name, g in gradients.items()}

    found = found_in(one_stage(transform=rescaled))
    assert found.startswith(
        "in stage 'only', at inner step 2 of 3: the optimizer's own step, or the gradient transform"
    )


def test_an_error_says_where_it_arose_and_stays_as_it_was_where_that_is_not_found() -> None:
    objective, weights = metaopt.ValidationLoss("only"), example_weights()
    plain = metaopt.NonFiniteError("the hypergradient is not finite")
    for chain, tail in ((one_stage(), "finite"), (one_stage(with_term(corner), num_steps=STEPS), "in the loss")):
        error = located(plain, chain, lambda trained: objective(trained, VALIDATION, weights), weights)
        assert str(error).startswith(str(plain))
        assert str(error).endswith(tail)


def test_locating_leaves_the_chain_alone() -> None:
    chain = one_stage(with_term(corner), num_steps=STEPS)
    trained = chain.unroll(example_weights())
    found_in(chain)
    chain.commit(trained)
