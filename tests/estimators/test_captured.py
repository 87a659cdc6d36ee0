"""The captured product: the same numbers as eager code, fewer flops, and captured anew when something has changed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from inner_loops import ADAM, of_small
from reference import relative_error
from small import MOMENTUM, SGD, assert_same, example_weights, feature_batches, meta_loss, one_stage, two_stages
from small_models import FEATURES, Network
from torch import Tensor, nn

import metaopt
from metaopt.diagnostics.meters import count_flops
from metaopt.estimators import Captured, Checkpointed, DoubleBackward, FirstOrder, Neumann, OneStep, Unrolled
from metaopt.estimators.products import captured, whole_step

EXACT = 1e-12


def counted(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each capture of a module."""
    made: list[int] = []
    make_fx = module.make_fx

    def counting(*args: Any, **kwargs: Any) -> Any:
        made.append(len(made))
        return make_fx(*args, **kwargs)

    monkeypatch.setattr(module, "make_fx", counting)
    return made


@pytest.fixture
def _products_alone(monkeypatch):
    monkeypatch.setattr(whole_step, "MOST_WEIGHTS", 0)


@pytest.fixture
def captures(monkeypatch, _products_alone):
    return counted(captured, monkeypatch)


def found(chain: metaopt.Chain, phi: Any) -> dict[str, Tensor]:
    return metaopt.hypergradient(meta_loss(chain, phi), phi)


# --- the same numbers, at less cost


@pytest.mark.parametrize("kind", [Checkpointed, OneStep, FirstOrder, lambda product: Neumann(3, product)])
def test_replays_are_the_eager_product(kind):
    """The second unroll is replayed from its first step on."""
    estimator = kind(Captured())
    make = of_small(two_stages, optimizer=ADAM, num_steps=4)
    expected = make(kind(DoubleBackward())).hypergradient()
    work = make(estimator)
    assert relative_error(work.hypergradient(), expected) < 1e-14
    assert relative_error(work.hypergradient(), expected) < 1e-14


def wide(product: Any, num_steps: int, store: str = "gradients") -> metaopt.Chain:
    """A network whose flops are those of three square layers."""
    torch.manual_seed(0)
    linear = [nn.Linear(n, m, dtype=torch.float64) for n, m in ((FEATURES, 64), (64, 64), (64, 64), (64, 3))]
    model: Any = nn.Sequential(linear[0], nn.Tanh(), linear[1], nn.Tanh(), linear[2], nn.Tanh(), linear[3])
    model.forward = lambda inputs: nn.Sequential.forward(model, inputs)
    return one_stage(
        model=model, num_steps=num_steps, estimator=Checkpointed(product, store), batches=feature_batches(1)
    )


def flops_of_a_step(product: Any, store: str) -> float:
    """Of one more inner step, forward and backward, in forwards of the model."""
    phi, batch = example_weights(), feature_batches(1)[0]["inputs"]
    totals = []
    for num_steps in (10, 8):
        chain = wide(product, num_steps, store)
        found(chain, phi)  # captures
        totals.append(count_flops(lambda chain=chain: found(chain, phi)))
    model = chain.stages["only"].model
    return (totals[0] - totals[1]) / 2 / count_flops(lambda: model(batch))


def test_a_captured_step_costs_fewer_flops():
    """In forwards: a plain step is 3; an eager product is 9 more, and a captured one, whose gradient is known, 8."""
    eager, replayed = (flops_of_a_step(product, "gradients") for product in (DoubleBackward(), Captured()))
    assert eager == pytest.approx(12, abs=0.4)
    assert replayed == pytest.approx(11, abs=0.4)
    assert replayed < eager


# --- the whole step of a small model


@pytest.mark.parametrize("store", ["states", "gradients", "recompute"])
@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
def test_a_whole_step_is_captured_once_for_all_steps(optimizer, store, monkeypatch):
    made = counted(whole_step, monkeypatch)
    torch.manual_seed(1)
    model, phi = Network(0.4, batch_norm=True), example_weights()
    estimators = Unrolled(), Checkpointed(Captured(), store)
    chains = [one_stage(model=model, optimizer=optimizer, num_steps=6, estimator=e) for e in estimators]
    expected, first = found(chains[0], phi), found(chains[1], phi)
    begun = len(made)  # the first step has no state, the last no cotangents of it; recompute may know the gradient
    assert begun <= 4
    assert relative_error(first, expected) < EXACT
    assert relative_error(found(chains[1], phi), expected) < EXACT
    assert len(made) == begun


def test_a_whole_step_is_captured_anew_when_what_steers_it_changes(monkeypatch):
    made, phi = counted(whole_step, monkeypatch), example_weights()
    chains = [one_stage(optimizer=MOMENTUM, estimator=e) for e in (Unrolled(), Checkpointed(Captured()))]
    for rate in (0.1, 0.3):
        for chain in chains:
            chain.stages["only"].optimizer.param_groups[0]["lr"] = rate
        before = len(made)
        assert relative_error(found(chains[1], phi), found(chains[0], phi)) < EXACT
        assert len(made) > before


@pytest.mark.parametrize("limit", ["MOST_WEIGHTS", "MOST_TENSORS"])
def test_a_step_of_a_model_that_is_not_small_is_not_captured_whole(limit, monkeypatch):
    made, phi = counted(whole_step, monkeypatch), example_weights()
    chains = [one_stage(model=Network(), estimator=e) for e in (Unrolled(), Checkpointed(Captured()))]
    chains[1].stages["only"].model.load_state_dict(chains[0].stages["only"].model.state_dict())
    monkeypatch.setattr(whole_step, limit, 3)  # there are four tensors
    assert relative_error(found(chains[1], phi), found(chains[0], phi)) < EXACT
    assert not made


def test_a_whole_step_whose_first_result_is_wrong_is_dropped(monkeypatch):
    make_fx = whole_step.make_fx

    def spoilt(function: Any, **options: Any) -> Any:
        def wrong(*inputs: Tensor) -> list[Tensor]:
            value, *rest = function(*inputs)
            return [value, *(2.0 * x for x in rest)]

        return make_fx(wrong, **options)

    monkeypatch.setattr(whole_step, "make_fx", spoilt)
    chains, phi = [one_stage(estimator=e) for e in (Unrolled(), Checkpointed(Captured()))], example_weights()
    for _ in range(2):
        assert relative_error(found(chains[1], phi), found(chains[0], phi)) < EXACT


# --- captured anew


def test_one_program_for_each_shape(captures):
    torch.manual_seed(1)
    long, short = feature_batches(2)
    short = {key: value[:3] for key, value in short.items()}
    chains = [
        one_stage(metaopt.WeightedLoss(), [long, short], model=Network(), num_steps=5, seed=1, estimator=estimator)
        for estimator in (Unrolled(), Checkpointed(Captured(), "states"))
    ]
    chains[1].stages["only"].model.load_state_dict(chains[0].stages["only"].model.state_dict())
    phi = example_weights()
    expected = found(chains[0], phi)
    for _ in range(2):
        assert relative_error(found(chains[1], phi), expected) < EXACT
    assert len(captures) == 2


def test_the_program_used_longest_ago_is_dropped(captures, monkeypatch):
    monkeypatch.setattr(captured, "MOST_PROGRAMS", 1)
    chain, phi = (
        two_stages(SGD, Network(), Network(), num_steps=2, estimator=Checkpointed(Captured())),
        example_weights(),
    )
    assert_same(found(chain, phi), found(chain, phi))
    assert len(captures) == 4


def test_random_numbers_that_no_output_needs_are_drawn_all_the_same():
    def loss(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        torch.randn(7)
        value = metaopt.WeightedLoss()(model, batch, phi, upstream)
        torch.rand(3)
        return value + 0 * model(batch["inputs"]).mean()

    torch.manual_seed(1)
    model = Network(0.4)
    chains = [one_stage(loss, model=model, estimator=e) for e in (Unrolled(), Checkpointed(Captured()))]
    phi = example_weights()
    for _ in range(2):
        assert relative_error(found(chains[1], phi), found(chains[0], phi)) < EXACT


# --- what cannot be captured


def branching(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    loss = metaopt.WeightedLoss()(model, batch, phi, upstream)
    return loss if bool(batch["inputs"].sum() > 0) else 2 * loss


def drawing_in_python(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    return metaopt.WeightedLoss()(model, batch, phi, upstream) * random.random()


def drawing_in_numpy(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    return metaopt.WeightedLoss()(model, batch, phi, upstream) * float(np.random.rand())


def counting_steps(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    return metaopt.WeightedLoss()(model, batch, phi, upstream) * 0.5**model.step


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (branching, "data-dependent"),
        (drawing_in_python, "more than its tensors"),
        (drawing_in_numpy, "more than its tensors"),
        (counting_steps, "model.step"),
    ],
)
def test_what_cannot_be_captured_falls_back_with_one_warning(loss, reason):
    phi = example_weights()
    chains = [one_stage(loss, num_steps=5, estimator=e) for e in (Unrolled(), Checkpointed(Captured(), "recompute"))]
    expected = found(chains[0], phi)
    with pytest.warns(RuntimeWarning, match=rf"Captured: an inner step cannot be captured .*{reason}") as told:
        several = [found(chains[1], phi) for _ in range(2)]
    assert max(relative_error(one, expected) for one in several) < EXACT
    assert len(told) == 1


def test_an_object_in_the_batch_is_not_frozen():
    """Its effect shows in the loss."""

    class Note:
        factor = 1.0

    batches = feature_batches(2)
    for i, batch in enumerate(batches):
        batch["note"] = Note()  # type: ignore[assignment]
        batch["note"].factor = i + 1.0  # type: ignore[attr-defined]

    def loss(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        rest = {key: value for key, value in batch.items() if key != "note"}
        return metaopt.WeightedLoss()(model, rest, phi, upstream) * batch["note"].factor

    chains = [one_stage(loss, batches, estimator=e) for e in (Unrolled(), Checkpointed(Captured()))]
    phi = example_weights()
    assert relative_error(found(chains[1], phi), found(chains[0], phi)) < EXACT


def test_a_column_of_texts_costs_no_capture(captures):
    batches = [{**batch, "text": [f"{i}"] * 6} for i, batch in enumerate(feature_batches(3))]

    def loss(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        return metaopt.WeightedLoss()(model, {k: v for k, v in batch.items() if k != "text"}, phi, upstream)

    found(one_stage(loss, batches, estimator=Checkpointed(Captured())), example_weights())
    assert len(captures) == 1


@pytest.mark.usefixtures("_products_alone")
@pytest.mark.parametrize("which", [0, 1], ids=["gradient", "product"])
def test_a_wrong_first_result_is_found_out(which, monkeypatch):
    """Of either of the two graphs: the one before u is known, and the one after."""

    def wrong(*args: Any) -> Any:
        parts: list[Any] = list(split(*args))
        right = parts[which]
        parts[which] = lambda *inputs: spoilt(right(*inputs))
        return tuple(parts)

    def spoilt(outputs: Any) -> Any:
        if which == 1:
            return [2.0 * x for x in outputs]
        return outputs[0], [2.0 * x for x in outputs[1]], outputs[2]

    split = captured._split
    monkeypatch.setattr(captured, "_split", wrong)
    chains = [one_stage(optimizer=MOMENTUM, estimator=e) for e in (Unrolled(), Checkpointed(Captured(), "states"))]
    phi = example_weights()
    with pytest.warns(RuntimeWarning, match="first result is not that of eager code") as told:
        assert relative_error(found(chains[1], phi), found(chains[0], phi)) < EXACT
    assert len(told) == 1


@pytest.mark.usefixtures("_products_alone")
def test_an_error_of_the_loss_itself_is_not_swallowed():
    """The step has run before it is captured, so only what is rare can fail; eager code then says so."""
    calls: list[int] = []

    def failing(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise ArithmeticError("on the fourth call")
        return metaopt.WeightedLoss()(model, batch, phi, upstream)

    chain = one_stage(failing, estimator=Checkpointed(Captured()))
    with pytest.warns(RuntimeWarning, match="on the fourth call"), pytest.raises(ArithmeticError):
        found(chain, example_weights())
