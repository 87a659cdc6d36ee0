"""What is refused: modules that cannot be differentiated twice, and losses that train something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import bert2bert
from small import (
    assert_same,
    example_weights,
    module_state,
    one_stage,
    two_stages,
)
from small_models import Linear, Network, Recomputing
from torch import Tensor, nn

import metaopt
from metaopt.estimators import Checkpointed, Unrolled

# --- refused: modules whose second derivative would be wrong


def test_checkpointing_inside_a_forward_is_refused():
    with pytest.raises(metaopt.StageError, match="checkpoint"):
        one_stage(model=Recomputing()).unroll(example_weights())


def compiled_in_place() -> nn.Module:
    model = Linear()
    model.compile(backend="eager")
    return model


def checkpointing() -> nn.Module:
    model: Any = bert2bert()
    encoder = model.encoder
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(encoder, new if hasattr(encoder, new) else old)()
    return model


def old_weight_norm() -> nn.Module:
    model = Linear()
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(model.linear)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gradient checkpointing": (checkpointing, r"'encoder.*_checkpointing_disable\(\)"),
    "DataParallel": (lambda: nn.DataParallel(Linear()), r"'\(top\)' \(DataParallel\).*`\.module`"),
    "torch.compile": (lambda: torch.compile(Linear()), r"torch\.compile.*`\._orig_mod`"),  # type: ignore[dict-item, return-value]
    "compiled in place": (compiled_in_place, "compiled in place"),
    "old weight norm": (old_weight_norm, r"parametrizations\.weight_norm"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("run", ["unroll", "train"])
def test_modules_that_cannot_be_differentiated_twice_are_refused(name, run):
    make, message = REFUSED[name]
    chain = one_stage(model=make())
    with pytest.raises(metaopt.StageError, match=message) as error:
        getattr(chain, run)(example_weights())
    assert "stage 'only'" in str(error.value)


# --- refused: losses that train something else


@pytest.mark.parametrize("run", ["unroll", "train"])
def test_a_loss_that_calls_the_users_own_module_is_refused(run):
    model = Network()

    def closes_over(fast: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return F.cross_entropy(model(batch["inputs"]), batch["labels"])

    chain = one_stage(closes_over, model=model)
    with pytest.raises(metaopt.StageError, match=r"stage 'only' reaches .* \(only\.first\.bias, .*, …\)"):
        getattr(chain, run)(example_weights())


def test_a_loss_that_calls_the_upstream_stages_own_module_is_refused():
    teacher = Network()

    def stale(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return (model(batch["inputs"]) - teacher(batch["inputs"])).square().mean()

    chain = two_stages(teacher=teacher)
    chain.stages["student"].loss = stale
    with pytest.raises(metaopt.StageError, match=r"'student' reaches .*teacher\.first\.bias"):
        chain.unroll(example_weights())


@pytest.mark.parametrize(
    ("estimator", "message"),
    [(Unrolled(), "depends on none of the 2 parameters"), (Checkpointed(), "returned a tensor without a graph")],
    ids=["unrolled", "checkpointed"],
)
def test_a_loss_that_depends_on_nothing_it_trains_is_refused(estimator, message):
    chain = one_stage(lambda model, batch, meta, upstream: meta(batch).mean(), estimator=estimator)
    with pytest.raises(metaopt.StageError, match=message):
        chain.unroll(example_weights())


def test_a_checkpointed_loss_that_closes_over_a_tensor_in_training_is_refused():
    temperature = torch.ones((), dtype=torch.float64, requires_grad=True)

    def closes_over(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return F.cross_entropy(model(batch["inputs"]) * temperature, batch["labels"])

    with pytest.raises(metaopt.StageError, match=r"closes over 1 tensor\(s\) that require grad.*Unrolled\(\)"):
        one_stage(closes_over, estimator=Checkpointed()).unroll(example_weights())
    outcome = one_stage(closes_over).unroll(example_weights())
    (slope,) = torch.autograd.grad(outcome["only"].params["linear.weight"].sum(), temperature)
    assert slope != 0


def test_the_users_module_is_restored_when_a_loss_is_refused():
    model = Network()
    before = module_state(model)
    with pytest.raises(metaopt.StageError, match="depends on none"):
        one_stage(lambda m, batch, meta, up: meta(batch).mean(), model=model).unroll(example_weights())
    assert_same(module_state(model), before)
