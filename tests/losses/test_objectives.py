"""Meta-objectives: the validation loss, and a user's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import bert2bert
from small import assert_same, example_weights, feature_batches, one_stage, text_batch, two_stages
from small_models import Network
from torch import Tensor

import metaopt
from metaopt.losses.objectives import expected_error


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
    with pytest.raises(KeyError, match=r"no stage 'studnet' \(did you mean 'student'\?\)"):
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


# --- sums, regularisers, surrogates


def smooth() -> metaopt.Chain:
    """Two stages without batch norm, whose running statistics no difference can judge."""
    return two_stages(teacher=Network(), student=Network())


def gradient_of(objective: Any, weights: Any) -> Tensor:
    meta_loss = objective(two_stages().unroll(weights), feature_batches(1, seed=8)[0], weights)
    return metaopt.hypergradient(meta_loss, weights)["logits"]


def test_a_sum_over_stages_and_regularisers_has_the_sum_of_the_hypergradients():
    weights = example_weights()
    terms = {"teacher": metaopt.ValidationLoss("teacher"), "student": metaopt.ValidationLoss("student")}
    terms |= {"entropy": metaopt.Entropy(), "sparsity": metaopt.Sparsity()}  # type: ignore[dict-item]
    objective = metaopt.SumOfObjectives(terms, {"teacher": 0.5, "entropy": -0.3})  # type: ignore[arg-type]
    assert objective.reads == ("teacher", "student")
    logits = weights.logits.detach().requires_grad_()
    share = logits.sigmoid() / logits.sigmoid().sum()
    penalty = 0.3 * (share * share.log()).sum() / math.log(15) + logits.sigmoid().mean()
    (by_hand,) = torch.autograd.grad(penalty, logits)
    expected = 0.5 * gradient_of(terms["teacher"], weights) + gradient_of(terms["student"], weights) + by_hand
    assert_same(gradient_of(objective, weights), expected, 1e-13)
    batch = feature_batches(1, seed=8)[0]
    check = metaopt.check_hypergradient(smooth(), objective, batch, weights)
    assert check.ok, str(check)


def test_entropy_and_sparsity_of_named_tables():
    named = {"a": metaopt.SourceWeights(4), "b": metaopt.ExampleWeights(3)}
    assert metaopt.Entropy("a")({}, None, named).item() == pytest.approx(1.0)
    assert metaopt.Sparsity("b")({}, None, named).item() == pytest.approx(0.5)
    with torch.no_grad():
        named["a"].logits[0] = 200.0
    assert metaopt.Entropy("a")({}, None, named).item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(metaopt.ConfigError, match="Entropy reads a table of weights, and WeightNetwork has no weights"):
        metaopt.Entropy()({}, None, metaopt.WeightNetwork())
    with pytest.raises(metaopt.ConfigError, match="a table of one weight"):
        metaopt.Entropy()({}, None, metaopt.SourceWeights(1))


def test_a_surrogate_is_a_function_of_logits_and_labels():
    def margin(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.logsumexp(-1) - 2 * logits.gather(-1, labels[:, None])[:, 0]).mean()

    weights, batch = example_weights(), feature_batches(1, seed=8)[0]
    outcome = two_stages().unroll(weights)
    objective = metaopt.SurrogateLoss("student", margin)
    assert_same(objective(outcome, batch, weights), margin(outcome["student"](batch["inputs"]), batch["labels"]))
    check = metaopt.check_hypergradient(smooth(), objective, batch, weights)
    assert check.ok, str(check)
    with pytest.raises(metaopt.ConfigError, match="surrogate is a float; give a function of"):
        metaopt.SurrogateLoss("student", 0.5)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"no stage 'studnet' \(did you mean 'student'"):
        metaopt.SurrogateLoss("studnet", margin)(outcome, batch, weights)


def test_expected_error_counts_the_positions_that_count():
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [5.0, 5.0]]])
    labels = torch.tensor([[0, 1], [1, -100]])
    right = [0.5, 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-1))]
    assert float(expected_error(logits, labels)) == pytest.approx(1 - sum(right) / 3)


def test_terms_that_cannot_be_summed_are_refused():
    with pytest.raises(metaopt.ConfigError, match="terms is empty"):
        metaopt.SumOfObjectives({})
    with pytest.raises(metaopt.ConfigError, match=r"names no term 'entrpy' \(did you mean 'entropy'"):
        metaopt.SumOfObjectives({"entropy": metaopt.Entropy()}, {"entrpy": 1.0})
