"""Meta-objectives: the validation loss, and a user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import bert2bert
from small import assert_same, example_weights, feature_batches, one_stage, text_batch, two_stages
from torch import Tensor

import metaopt


def test_validation_loss_is_the_mean_cross_entropy_of_its_stage_in_eval_mode():
    outcome, batch = two_stages().unroll(example_weights()), feature_batches(1, seed=8)[0]
    for stage in ("teacher", "student"):
        found = metaopt.ValidationLoss(stage)(outcome, batch, example_weights())
        assert_same(found, F.cross_entropy(outcome[stage](batch["inputs"]), batch["labels"]), 1e-14)
        assert found.requires_grad
    # Dropout is off: twice the same.
    again = metaopt.ValidationLoss("teacher")(outcome, batch, example_weights())
    assert_same(again, metaopt.ValidationLoss("teacher")(outcome, batch, example_weights()))


def test_validation_loss_of_sequences_ignores_padding():
    batch = text_batch()
    batch["labels"][:, 3:] = -100
    outcome = one_stage(metaopt.CrossEntropy(), [batch], model=bert2bert()).unroll(example_weights())
    logits = outcome["only"](**{k: batch[k] for k in ("input_ids", "attention_mask", "decoder_input_ids")}).logits
    expected = F.cross_entropy(logits[:, :3].flatten(0, 1), batch["labels"][:, :3].flatten())
    assert_same(metaopt.ValidationLoss("only")(outcome, batch, example_weights()), expected, 1e-14)


def test_an_unknown_stage_is_said_with_the_stages_there_are():
    objective = metaopt.ValidationLoss("studnet")
    assert objective.reads == ("studnet",)
    with pytest.raises(metaopt.ConfigError, match=r"no stage 'studnet' \(did you mean 'student'\?\)"):
        objective(two_stages().unroll(example_weights()), feature_batches(1)[0], example_weights())


def test_a_users_own_objective_may_read_every_stage_and_the_meta_parameters():
    class Mine(metaopt.MetaObjective):
        reads = ("teacher", "student")

        def __call__(self, trained: Any, batch: Any, meta_params: Any) -> Tensor:
            losses = [F.cross_entropy(trained[name](batch["inputs"]), batch["labels"]) for name in self.reads]
            return losses[0] + 2 * losses[1] + 0.1 * meta_params.logits.square().sum()

    weights, batch = example_weights(), feature_batches(1, seed=8)[0]
    outcome = two_stages().unroll(weights)
    found = metaopt.hypergradient(Mine()(outcome, batch, weights), weights)["logits"]
    parts = []
    for name in ("teacher", "student"):
        loss = metaopt.ValidationLoss(name)(two_stages().unroll(weights), batch, weights)
        parts.append(metaopt.hypergradient(loss, weights)["logits"])
    assert torch.allclose(found, parts[0] + 2 * parts[1] + 0.2 * weights.logits, rtol=0, atol=1e-14)
    with pytest.raises(TypeError, match="abstract"):
        metaopt.MetaObjective()  # type: ignore[abstract]
