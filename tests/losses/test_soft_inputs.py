"""Hand-overs in the graph: expected embeddings and Gumbel samples, against losses written out by hand."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import library
import pytest
import torch
import torch.nn.functional as F
from networks import VOCABULARY, bert2bert
from problems import ADAM, MOMENTUM, cross_entropy, distilled_features, distilled_text, inputs_of, logits_of
from reference import hypergradient, relative_error
from small import assert_same, example_weights, feature_batches, text_batch, trained_model
from small import inputs_of as model_inputs
from small_models import FEATURES, Linear
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import metaopt
from metaopt.losses.distillation import token_embeddings, with_soft_tokens

EXACT = 1e-12
TABLE = "decoder.bert.embeddings.word_embeddings.weight"


def shifted(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The decoder's tokens replaced by mixtures of its embeddings, one position later."""
    table = model.params[TABLE]
    first = table[inputs["decoder_input_ids"][:, :1]]
    mixed = torch.cat([first, (tokens @ table)[:, :-1]], 1)
    return {**{k: v for k, v in inputs.items() if k != "decoder_input_ids"}, "decoder_inputs_embeds": mixed}


def expected_by_hand(model: Any, batch: dict[str, Tensor], phi: Any, upstream: Any) -> Tensor:
    inputs = inputs_of(batch)
    taught = upstream["teacher"](**inputs).logits
    output = model(**shifted(model, inputs, (taught / 2).softmax(-1))).logits
    log_p, log_q = (taught / 2).log_softmax(-1), (output / 2).log_softmax(-1)
    return 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean(1).mean()


def sampled_by_hand(
    model: Any, batch: dict[str, Tensor], phi: Any, upstream: Any, *, hard: bool, feeds: bool
) -> Tensor:
    inputs = inputs_of(batch)
    log_p = logits_of(upstream["teacher"](**inputs)).log_softmax(-1)
    soft = ((log_p - torch.empty_like(log_p).exponential_().log()) / 0.7).softmax(-1)
    sample = (F.one_hot(soft.argmax(-1), soft.shape[-1]) - soft).detach() + soft if hard else soft
    log_q = logits_of(model(**(shifted(model, inputs, sample) if feeds else inputs))).log_softmax(-1)
    return -(sample * log_q).sum(-1).mean()


def validated_by_hand(trained: Any, batch: dict[str, Tensor], phi: Any) -> Tensor:
    inputs = inputs_of(batch)
    tokens = logits_of(trained["teacher"](**inputs)).softmax(-1)
    return cross_entropy(
        trained["student"](**shifted(trained["student"], inputs, tokens)).logits, batch["labels"]
    ).mean()


def fed_text() -> Any:
    return replace(distilled_text(MOMENTUM, ADAM), objective=validated_by_hand)


def assert_is(problem: Any, by_hand: Any, loss: Any, bound: float = EXACT) -> None:
    """The library's loss gives the hypergradient of the loss by hand."""
    problem = problem.with_stage("student", loss=by_hand)
    chain = library.as_chain(problem, {"student": loss})
    found = library.hypergradient(problem, chain)
    assert relative_error(found, hypergradient(library.replayed(problem, chain))) < bound


def test_expected_embeddings_are_what_they_say():
    assert_is(fed_text(), expected_by_hand, metaopt.ExpectedEmbeddings(temperature=2.0))


@pytest.mark.parametrize("hard", [True, False])
def test_gumbel_samples_are_what_they_say(hard):
    sequences = functools.partial(sampled_by_hand, hard=hard, feeds=True)
    classes = functools.partial(sampled_by_hand, hard=hard, feeds=False)
    loss = metaopt.GumbelSamples(temperature=0.7, straight_through=hard)
    assert_is(fed_text(), sequences, loss)
    assert_is(distilled_features(), classes, loss)


@pytest.mark.parametrize(
    "loss",
    [
        metaopt.ExpectedEmbeddings(),
        pytest.param(metaopt.GumbelSamples(temperature=0.7, straight_through=False), marks=pytest.mark.slow),
    ],
)
def test_central_differences_agree(loss):
    problem = distilled_text(MOMENTUM, ADAM)
    chain = library.as_chain(problem, {"student": loss})
    result = metaopt.check_hypergradient(chain, metaopt.PipelineLoss("student"), problem.batch, problem.phi)
    assert result.ok, str(result)


# --- soft tokens


def causal() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=8)).double()


def bart() -> nn.Module:
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 8}
    options: Any = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()}
    config = BartConfig(vocab_size=VOCABULARY, d_model=8, max_position_embeddings=16, scale_embedding=True, **options)
    return BartForConditionalGeneration(config).double()


def t5() -> nn.Module:
    config = T5Config(vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config).double()


@pytest.mark.parametrize("make", [bert2bert, causal, bart, t5])
def test_certain_tokens_are_the_tokens_themselves(make):
    torch.manual_seed(0)
    batch = text_batch(decoder=make is not causal)
    model = trained_model(make(), batch).eval()
    inputs = model_inputs(batch)
    ids = inputs["input_ids" if make is causal else "decoder_input_ids"]
    following = F.one_hot(torch.cat([ids[:, 1:], ids[:, :1]], 1), VOCABULARY).double()
    fed = with_soft_tokens(model, inputs, following)
    assert_same(model(**fed).logits, model(**inputs).logits, 1e-12)
    unshifted = with_soft_tokens(model, inputs, F.one_hot(ids, VOCABULARY).double(), shift=False)
    assert_same(model(**unshifted).logits, model(**inputs).logits, 1e-12)


def test_soft_tokens_need_a_model_of_tokens():
    model = trained_model(Linear(), feature_batches(1)[0])
    with pytest.raises(metaopt.StageError, match=r"has no get_input_embeddings\(\)"):
        with_soft_tokens(model, {"input_ids": torch.ones(1, 1).long()}, torch.ones(1, 1, 3))
    assert token_embeddings(Linear()) is None


# --- temperature, noise, refusals


def test_the_temperature_is_a_function_of_the_stages_step():
    seen: list[int] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return 1.0

    problem = distilled_features()
    chain = library.as_chain(problem, {"student": metaopt.GumbelSamples(temperature=schedule)})
    trained = chain.unroll(problem.phi)
    chain.unroll(problem.phi)
    assert seen == [0, 1, 2, 0, 1, 2]
    chain.commit(trained)
    chain.unroll(problem.phi)
    chain.train(problem.phi, num_steps=2)
    assert seen[6:] == [3, 4, 5, 3, 4]
    chain.reset()
    chain.unroll(problem.phi)
    assert seen[11:] == [0, 1, 2]


def test_annealed_temperatures_fall_geometrically():
    annealed = metaopt.Annealed(2.0, 0.5, 4)
    assert [annealed(t) for t in (0, 2, 4, 9)] == pytest.approx([2.0, 1.0, 0.5, 0.5])
    for options in ((0.0, 1.0, 1), (1.0, -1.0, 1), (1.0, 1.0, 0)):
        with pytest.raises(metaopt.ConfigError, match="must be"):
            metaopt.Annealed(*options)


def test_samples_follow_the_teachers_probabilities_and_the_replayed_random_state():
    loss, logits = metaopt.GumbelSamples(temperature=0.3), torch.tensor([0.5, 0.3, 0.2]).log().expand(20000, 3)
    shares = loss.sample(logits, 0).mean(0)
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015)
    problem = distilled_features()
    chain = library.as_chain(problem, {"student": loss})
    losses = [chain.unroll(problem.phi).losses["student"] for _ in range(2)]
    assert_same(losses[0], losses[1])


@pytest.mark.parametrize("loss", [metaopt.ExpectedEmbeddings, metaopt.GumbelSamples])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_must_be_above_zero(loss, temperature):
    with pytest.raises(metaopt.ConfigError, match="must be above 0"):
        loss(temperature=temperature)


def test_a_schedule_that_reaches_zero_is_refused():
    with pytest.raises(metaopt.StageError, match=r"temperature\(3\) = 0"):
        metaopt.GumbelSamples(temperature=lambda step: 0).sample(torch.ones(2, 3), 3)


class Wide(nn.Module):
    """Tells more classes apart than the others."""

    num_labels = 5

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 5, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs)


def two_vocabularies(loss: Any, first: nn.Module, second: nn.Module, batches: Any) -> metaopt.Chain:
    return metaopt.Chain(
        teacher=metaopt.Stage(first, MOMENTUM, metaopt.CrossEntropy(), batches, 1),
        student=metaopt.Stage(second, MOMENTUM, loss, batches, 1),
    )


@pytest.mark.parametrize(
    "loss", [metaopt.Distillation(), metaopt.HiddenStates(), metaopt.ExpectedEmbeddings(), metaopt.GumbelSamples()]
)
def test_other_vocabularies_are_refused_before_any_training(loss):
    torch.manual_seed(0)
    student: Any = bert2bert()
    student.decoder.resize_token_embeddings(VOCABULARY + 2)
    with pytest.raises(
        metaopt.ConfigError, match=r"stage 'student': .* 11 classes .* the student 13: .*same tokenizer"
    ):
        two_vocabularies(loss, bert2bert(), student, [text_batch()])


def test_a_loss_of_ones_own_may_say_what_it_needs():
    class Picky(metaopt.InnerLoss):
        def __call__(self, model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
            return cross_entropy(model(batch["inputs"]), batch["labels"]).mean()

        def problem_with(self, model: nn.Module, upstream: Any) -> str | None:
            return "needs a Wide teacher" if not isinstance(upstream["teacher"], Wide) else None

    two_vocabularies(Picky(), Wide(), Linear(), feature_batches())
    with pytest.raises(metaopt.ConfigError, match="stage 'student': needs a Wide teacher"):
        two_vocabularies(Picky(), Linear(), Linear(), feature_batches())
    with pytest.raises(metaopt.ConfigError, match="first of the chain"):
        metaopt.Chain(only=metaopt.Stage(Linear(), MOMENTUM, metaopt.Distillation(), feature_batches(), 1))


def test_an_encoder_decoder_teacher_needs_decoder_inputs():
    labelled = {k: v for k, v in text_batch().items() if k != "decoder_input_ids"}
    batch = {k: v for k, v in labelled.items() if k != "labels"}
    teacher = trained_model(bert2bert(), text_batch())
    for loss in (metaopt.Distillation(), metaopt.HiddenStates(), metaopt.ExpectedEmbeddings()):
        with pytest.raises(metaopt.ConfigError, match=r"holds no decoder_input_ids .*handover=decoded or generated"):
            loss(teacher, batch, example_weights(), {"teacher": teacher})
        with pytest.raises(ValueError, match="decoder_start_token_id"):
            loss(teacher, labelled, example_weights(), {"teacher": teacher})
