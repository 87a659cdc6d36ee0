"""What user code raises: its own type, with the stage, the inner step, the batch and the user's own lines beside it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from small import SGD, cross_entropy, example_weights, feature_batches, one_stage
from small_models import Linear
from torch import Tensor, nn

import metaopt
from metaopt.base.errors import was_told

BATCH = feature_batches(1)[0]
ON = r"on {inputs: float64 \[5, 4\], labels: int64 \[5\] 0…2, index: int64 \[5\]"


class MineError(ValueError):
    """What a user's part raises."""


def broken(*_: Any, **__: Any) -> Any:
    raise MineError("a bug of mine")


def broken_at_step_1(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
    return broken() if model.step == 1 else cross_entropy(model, batch, meta_params, upstream)


class BrokenModel(Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return broken()


class BrokenWeights(metaopt.ExampleWeights):
    def forward(self, batch: Any) -> Tensor:
        return broken()


class BrokenHandOver(metaopt.HandOver):
    def write(self, upstream: Any, batches: Any) -> Any:
        return broken()


class BrokenObjective(metaopt.MetaObjective):
    def __call__(self, trained: Any, batch: Any, meta_params: Any) -> Tensor:
        return broken()


PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"loss": broken_at_step_1}, rf"loss of stage 'only', inner step 1 of 3, {ON}.*Linear takes \(inputs\)"),
    "model": ({"model": BrokenModel}, r"the loss of stage 'only', inner step 0 of 3.*BrokenModel takes \(inputs\)"),
    "meta-parameters": ({"meta_params": BrokenWeights(15)}, rf"loss of stage 'only', inner step 0 of 3, {ON}"),
    "transform": ({"transform": broken}, r"the transform of stage 'only', on {linear\.weight: float64 \[3, 4\]"),
    "overrides": ({"overrides": broken}, "the overrides of stage 'only', inner step 0"),
    "initial weights": ({"initial": broken}, "the initial weights of stage 'only'"),
    "data": ({"batches": broken}, r"the batches of stage 'only' \(function\)"),
    "hand-over": ({"batches": BrokenHandOver([BATCH])}, r"the batches of stage 'only' \(BrokenHandOver\)"),
    "objective": ({"objective": BrokenObjective()}, rf"BrokenObjective, {ON}.*stage 'only': Linear"),
}  # fmt: skip
ESTIMATORS = {"Unrolled": metaopt.Unrolled(), "Checkpointed": metaopt.Checkpointed()}


def trainer(
    meta_params: Any = None, objective: Any = None, validation: Any = BATCH, **options: Any
) -> metaopt.MetaTrainer:
    meta_params = example_weights() if meta_params is None else meta_params
    optimizer = torch.optim.SGD(meta_params.parameters(), lr=0.1)
    objective = objective or metaopt.ValidationLoss("only")
    return metaopt.MetaTrainer(one_stage(**options), objective, meta_params, optimizer, [validation])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("part", PARTS)
def test_what_a_part_raises_keeps_its_type_and_is_told_where(part: str, estimator: str) -> None:
    options, said = PARTS[part]
    with pytest.raises(MineError, match="a bug of mine") as caught:
        trainer(**{"estimator": ESTIMATORS[estimator], **options}).fit(1)
    caught.match(said)
    told = was_told(caught.value) or ""
    assert 'in broken: raise MineError("a bug of mine")' in told.splitlines()[-1]
    assert all(" test_telling.py:" in f" {line.strip().rsplit('/')[-1]}" for line in told.splitlines()[1:])


def test_an_error_of_the_replay_in_the_backward_is_told_too() -> None:
    calls = []

    def third(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        calls.append(0)
        return broken() if len(calls) > 3 else metaopt.WeightedLoss()(model, batch, meta_params, upstream)

    with pytest.raises(MineError, match="stage 'only', inner step 2 of 3"):
        trainer(loss=third, estimator=metaopt.Checkpointed()).fit(1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.cuda.OutOfMemoryError("out of memory")])
def test_an_interrupt_and_full_memory_pass(error: BaseException) -> None:
    def stopped(*_: Any) -> Tensor:
        raise error

    def loss(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return stopped()

    with pytest.raises(type(error)) as caught:
        one_stage(loss).unroll(example_weights())
    assert caught.value is error


def test_labels_of_any_integers_count() -> None:
    losses = [
        one_stage(batches=[{**BATCH, "labels": BATCH["labels"].to(dtype)}]).unroll(example_weights()).losses["only"]
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert all(torch.equal(found, losses[0]) for found in losses)


def test_functions_of_other_spellings_are_taken() -> None:
    class AsModule(nn.Module):
        def forward(self, model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
            return cross_entropy(model, batch, meta_params, upstream)

    for loss in (AsModule(), lambda *args: cross_entropy(*args), functools.partial(cross_entropy)):
        one_stage(loss, optimizer=SGD, transform=dict).unroll(example_weights())
