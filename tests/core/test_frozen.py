"""Frozen weights: never copied, and never changed unnoticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import ADAM, assert_same, feature_batches, one_stage
from small_models import CLASSES, FEATURES
from torch import Tensor, nn

import metaopt
from metaopt.diagnostics.meters import peak_bytes
from metaopt.estimators import Captured, Checkpointed

WIDTH = 200
SWEPT = [Checkpointed(), Checkpointed(store="recompute"), Checkpointed(Captured(), "states")]


class Adapted(nn.Module):
    """A large frozen part with a small trained one beside it, as a low-rank adapter has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.first, self.last = nn.Linear(FEATURES, WIDTH, bias=False), nn.Linear(WIDTH, CLASSES)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.frozen(self.first(inputs).tanh()).tanh())


def gradient_of(chain: metaopt.Chain) -> Tensor:
    weights = metaopt.ExampleWeights(15).double()
    batch = feature_batches(1, seed=8)[0]
    return metaopt.hypergradient(metaopt.ValidationLoss("only")(chain.unroll(weights), batch, weights), weights)[
        "logits"
    ]


@pytest.mark.parametrize("estimator", [metaopt.Unrolled(), *SWEPT], ids=repr)
def test_a_stage_its_unroll_and_its_backward_copy_no_frozen_weight(estimator: Any):
    def bytes_held(width: int) -> int:
        model = Adapted()
        model.frozen = nn.Linear(width, width).requires_grad_(False).double()
        model.first, model.last = nn.Linear(FEATURES, width).double(), nn.Linear(width, CLASSES).double()

        def run() -> None:
            chain = one_stage(model=model, optimizer=ADAM, num_steps=4, estimator=estimator)
            gradient_of(chain)
            state = chain.state_dict()
            chain.train(metaopt.Uniform())
            chain.load_state_dict(state)
            chain.reset()

        run()
        return peak_bytes(run)

    # Beside the frozen width² there is what grows with the width alone: activations, and all that is trained.
    small, large = bytes_held(WIDTH), bytes_held(4 * WIDTH)
    frozen = 8 * (16 - 1) * WIDTH**2
    assert large - 4 * small < 0.05 * frozen


@pytest.mark.parametrize("estimator", SWEPT, ids=repr)
def test_a_frozen_weight_that_is_changed_before_the_backward_is_an_error(estimator: Any):
    model, weights = Adapted(), metaopt.ExampleWeights(15).double()
    trained = one_stage(model=model, estimator=estimator).unroll(weights)
    with torch.no_grad():
        model.frozen.weight.mul_(2.0)
    meta_loss = metaopt.ValidationLoss("only")(trained, feature_batches(1, seed=8)[0], weights)
    with pytest.raises(metaopt.StageError, match=r"'frozen.weight' was changed"):
        metaopt.backward(meta_loss, weights)


def test_frozen_weights_come_back_with_a_saved_state():
    chain, other = (one_stage(model=Adapted()) for _ in range(2))
    weights = other.stages["only"].model.get_parameter("frozen.weight")
    with torch.no_grad():
        weights.zero_()
    other.load_state_dict(chain.state_dict())
    assert_same(gradient_of(other), gradient_of(chain), 0.0)
    assert bool(weights.any())
