"""A student validated and scored as it was trained: behind the teacher that feeds it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import library
import pytest
import torch
from problems import ADAM, MOMENTUM, distilled_text, inputs_of
from reference import relative_error
from small import assert_same, example_weights, feature_batches, two_stages
from torch import Tensor

import metaopt
from metaopt.core.guards import warn_of_other_inputs
from metaopt.core.view import Training, names_read
from metaopt.losses.decoding import greedy_decode, sequence_score
from metaopt.losses.objectives import Pipeline, as_trained
from metaopt.trainer import Selection

STUDENT = metaopt.PipelineLoss("student")
NEVER_SAW = (
    r"stage 'student' read decoder_inputs_embeds, input_ids in training and reads decoder_input_ids, input_ids now"
)


def fed_chain(loss: Any = None, **options: Any) -> metaopt.Chain:
    return library.as_chain(distilled_text(MOMENTUM, ADAM), {"student": loss or metaopt.HiddenStates()}, **options)


class OfTheEncoder(metaopt.FromUpstream):
    """A hand-over of a user's own: the student's encoder reads the teacher's encoder states, and learns hard labels."""

    def student_inputs(self, model: Any, batch: Any, upstream: Any) -> tuple[dict[str, Tensor], Any]:
        inputs = inputs_of(batch)
        taught = self.teacher(upstream)(**inputs)
        del inputs["input_ids"]
        return {**inputs, "inputs_embeds": taught.encoder_last_hidden_state}, taught

    def __call__(self, model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        inputs, _ = self.student_inputs(model, batch, upstream)
        return metaopt.cross_entropy_per_example(model(**inputs).logits, batch["labels"]).mean()


LOSSES = {"hidden states": metaopt.HiddenStates, "expected": metaopt.ExpectedEmbeddings, "own": OfTheEncoder}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(metaopt.Unrolled(), id="unrolled"),
        pytest.param(metaopt.Checkpointed(), id="checkpointed", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_its_hypergradient_is_that_of_the_whole_pipeline(loss, estimator):
    problem = replace(distilled_text(MOMENTUM, ADAM), objective=STUDENT)
    found = library.hypergradient(problem, fed_chain(loss(), estimator=estimator))
    result = metaopt.check_hypergradient(fed_chain(loss()), STUDENT, problem.batch, problem.phi, num_directions=1)
    assert result.ok, str(result)
    unrolled = library.hypergradient(problem, fed_chain(loss()))
    assert relative_error(found, unrolled) < 1e-12


def test_without_such_a_hand_over_it_is_the_validation_loss():
    chain, weights, batch = two_stages(), example_weights(), feature_batches(1, seed=8)[0]
    trained = chain.unroll(weights)
    assert as_trained(trained, "student") is trained["student"]
    assert_same(STUDENT(trained, batch, weights), metaopt.ValidationLoss("student")(trained, batch, weights))
    with pytest.raises(KeyError, match=r"no stage 'studnet' \(did you mean 'student'"):
        metaopt.PipelineLoss("studnet")(trained, batch, weights)


@pytest.mark.parametrize("wrap", ["terms", "augmented"])
def test_a_hand_over_inside_another_loss_is_found(wrap):
    inner = metaopt.HiddenStates()
    loss = metaopt.SumOfLosses({"fed": inner}) if wrap == "terms" else metaopt.AugmentedLoss(inner)
    problem, uniform = distilled_text(MOMENTUM, ADAM), metaopt.Uniform()
    chain = library.as_chain(problem, {"teacher": metaopt.CrossEntropy(), "student": loss})
    assert isinstance(as_trained(chain.unroll(uniform), "student"), Pipeline)


def test_it_is_scored_as_it_was_trained():
    problem, chain = distilled_text(MOMENTUM, ADAM), fed_chain()
    trained = chain.unroll(problem.phi)
    model, batch = as_trained(trained, "student"), problem.batch
    inputs = inputs_of(batch)
    states = trained["teacher"](**inputs, output_hidden_states=True).decoder_hidden_states[-1]
    fed = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    expected = trained["student"](**fed, decoder_inputs_embeds=states).logits
    assert_same(model(**inputs).logits, expected)
    score = sequence_score(model, [batch], bos=1, eos=2, pad=0, max_length=3)
    assert score["token_accuracy"] == pytest.approx(float((expected.argmax(-1) == batch["labels"]).double().mean()))
    assert as_trained(chain.train(problem.phi, num_steps=1), "student")(**inputs).logits.requires_grad is False
    # Each answer of the pipeline is what it says to its own answers before.
    answers = greedy_decode(model, inputs["input_ids"], inputs["attention_mask"], bos=1, eos=99, pad=0, max_length=3)
    begun = torch.cat([torch.ones_like(answers[:, :1]), answers[:, :-1]], 1)
    again = model(**{**inputs, "decoder_input_ids": begun}).logits.argmax(-1)
    assert torch.equal(answers, again)


def test_the_trainer_looks_through_the_pipeline():
    problem, seen = distilled_text(MOMENTUM, ADAM), []

    def score(model: Any, batches: Any) -> dict[str, float]:
        seen.append(model)
        return {"good": 1.0}

    selection = Selection([problem.batch], "student", score, "good", every=1)
    trainer = metaopt.MetaTrainer(
        fed_chain(), STUDENT, problem.phi, torch.optim.SGD(problem.phi.parameters(), 0.1), [problem.batch],
        selection=selection,
    )  # fmt: skip
    trainer.fit(1)
    assert isinstance(seen[0], Pipeline)


# --- inputs that were never seen


@pytest.mark.parametrize("estimator", [metaopt.Unrolled(), metaopt.Checkpointed()], ids=["unrolled", "checkpointed"])
def test_other_inputs_than_in_training_are_warned_of(estimator):
    problem = distilled_text(MOMENTUM, ADAM)
    chain = fed_chain(estimator=estimator)
    trained = chain.unroll(problem.phi)
    with pytest.warns(UserWarning, match=NEVER_SAW + r": .*metaopt\.PipelineLoss\('student'\), objective=pipeline"):
        metaopt.ValidationLoss("student")(trained, problem.batch, problem.phi)
    metaopt.ValidationLoss("teacher")(trained, problem.batch, problem.phi)
    metaopt.ValidationLoss("student")(chain.unroll(problem.phi), problem.batch, problem.phi)  # said once


ONE = torch.ones(1)
READ = [
    ([{"input_ids"}], {"input_ids": ONE, "attention_mask": ONE, "labels": ONE}, False),
    ([{"input_ids", "decoder_input_ids"}], {"input_ids": ONE, "labels": ONE}, False),  # made of the labels
    ([{"input_ids", "decoder_input_ids"}], {"input_ids": ONE}, True),
    ([{"input_ids"}, {"inputs_embeds"}], {"inputs_embeds": ONE, "output_hidden_states": True}, False),
    ([{"inputs_embeds"}], {"input_ids": ONE}, True),
    ([], {"input_ids": ONE}, False),
]


@pytest.mark.parametrize(("read", "now", "other"), READ)
def test_which_inputs_are_other_ones(read, now, other):
    training = Training("only", None, 1, {frozenset(names) for names in read})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_other_inputs(training, names_read(now), "labels" in now)
    assert bool(caught) == other


def test_a_trained_model_knows_its_steps():
    """A temperature that falls with the steps is at its end where the pipeline is validated."""
    seen: list[int] = []
    loss = metaopt.GumbelSamples(temperature=lambda step: seen.append(step) or 1.0, straight_through=False)
    problem, chain = distilled_text(MOMENTUM, ADAM), fed_chain(loss)
    trained = chain.unroll(problem.phi)
    STUDENT(trained, problem.batch, problem.phi)
    chain.commit(trained)
    STUDENT(chain.unroll(problem.phi), problem.batch, problem.phi)
    assert seen == [0, 1, 2, 2, 3, 4]
