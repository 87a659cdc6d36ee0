"""Inner losses against their formulas, written out in plain loops, and what they refuse."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import bert2bert
from small import (
    ADAM,
    assert_same,
    drawing,
    example_weights,
    feature_batches,
    inputs_of,
    meta_loss,
    one_stage,
    text_batch,
    trained_model,
    two_stages,
)
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)

import metaopt
from metaopt import estimators
from metaopt.core.contracts import require_scalar
from metaopt.losses.distillation import find_upstream, soft_label_loss
from metaopt.losses.logits import cross_entropy_per_example, logits_of, mean_over_positions, model_inputs


class Given(nn.Module):
    """A model whose logits are given, whatever it is called with."""

    config = None

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.seen: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> Any:
        self.seen = inputs
        return SimpleNamespace(logits=self.logits)


def by_hand(logits: Tensor, labels: Tensor) -> list[float]:
    """−log softmax(logits)[label] per example, mean over the positions that count."""
    losses = []
    for row, wanted in zip(logits.tolist(), labels.tolist(), strict=True):
        steps = [(row, wanted)] if isinstance(wanted, int) else list(zip(row, wanted, strict=True))
        counted = [(scores, label) for scores, label in steps if label != -100]
        found = [math.log(sum(math.exp(z) for z in scores)) - scores[label] for scores, label in counted]
        losses.append(sum(found) / max(len(found), 1))
    return losses


def sequences() -> tuple[Tensor, Tensor]:
    """Logits [3, 4, 5] and labels [3, 4]; the second example has two positions, the third none that counts."""
    logits = drawing(0)(3, 4, 5)
    labels = torch.tensor([[0, 1, 2, 3], [4, -100, 0, -100], [-100, -100, -100, -100]])
    return logits, labels


# --- cross-entropy


def test_cross_entropy_of_classes():
    logits, labels = drawing(1)(4, 3), torch.tensor([0, 2, 1, 1])
    assert cross_entropy_per_example(logits, labels).tolist() == pytest.approx(by_hand(logits, labels), abs=1e-14)


def test_cross_entropy_of_sequences_is_a_mean_over_the_positions_that_count():
    logits, labels = sequences()
    found = cross_entropy_per_example(logits, labels)
    assert found.tolist() == pytest.approx(by_hand(logits, labels), abs=1e-14)
    assert found[2] == 0.0


def test_labels_that_do_not_fit_the_logits_are_refused():
    with pytest.raises(metaopt.StageError, match=r"\[3, 4, 5\] do not fit labels \[3\]: .* shape \[3, 4\]"):
        cross_entropy_per_example(drawing(0)(3, 4, 5), torch.zeros(3, dtype=torch.long))


def test_weighted_loss_is_the_weighted_mean():
    logits, labels = drawing(2)(4, 3), torch.tensor([0, 2, 1, 1])
    weights = example_weights(6)
    batch = {"inputs": logits, "labels": labels, "index": torch.tensor([5, 0, 3, 3])}
    found = metaopt.WeightedLoss()(Given(logits), batch, weights, {}).detach()  # type: ignore[arg-type]
    sigmoids = [1 / (1 + math.exp(-weights.logits[i].item())) for i in (5, 0, 3, 3)]
    expected = sum(w * loss for w, loss in zip(sigmoids, by_hand(logits, labels), strict=True)) / 4
    assert float(found) == pytest.approx(expected, abs=1e-14)
    plain = metaopt.CrossEntropy()(Given(logits), batch, weights, {})  # type: ignore[arg-type]
    assert float(plain) == pytest.approx(sum(by_hand(logits, labels)) / 4, abs=1e-14)


def test_models_never_receive_index_source_or_labels():
    model, batch = Given(drawing(0)(5, 3)), {**feature_batches(1)[0], "more": torch.ones(1)}
    metaopt.WeightedLoss()(model, batch, example_weights(), {})  # type: ignore[arg-type]
    assert set(model.seen) == {"inputs", "more"}
    assert set(model_inputs(text_batch())) == {"input_ids", "attention_mask", "decoder_input_ids"}


def test_a_loss_says_which_of_several_meta_parameters_it_reads():
    several = {"first": example_weights(seed=1), "second": example_weights(seed=2)}
    losses = {name: one_stage(metaopt.WeightedLoss(name)).unroll(several).losses["only"] for name in several}
    for name, module in several.items():
        assert_same(losses[name], one_stage().unroll(module).losses["only"])
    assert not torch.equal(losses["first"], losses["second"])
    with pytest.raises(metaopt.ConfigError, match=r"WeightedLoss must say which .*first, second"):
        one_stage().unroll(several)
    with pytest.raises(metaopt.ConfigError, match=r"did you mean 'first'"):
        one_stage(metaopt.WeightedLoss("frist")).unroll(several)
    with pytest.raises(metaopt.ConfigError, match=r"'first', but they are one module without a name"):
        one_stage(metaopt.WeightedLoss("first")).unroll(example_weights())
    assert_same(one_stage().unroll({"alone": several["first"]}).losses["only"], losses["first"])


# --- what labels mean


def gpt2(kind: Any = GPT2LMHeadModel, **options: Any) -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return kind(GPT2Config(vocab_size=11, n_positions=16, **sizes, **drop, **options)).double()


class Wrapped(nn.Module):
    """A user's own module around a model, of whose forward nothing shows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        return self.model(**inputs).logits


class Overridden(GPT2LMHeadModel):
    def forward(self, input_ids: Any = None, **options: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids, **options)


class Bigram(nn.Module):
    """A plain module, which says that its labels are to be shifted."""

    loss_type = "ForCausalLM"

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11, dtype=torch.float64)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def test_a_causal_model_learns_the_next_token_and_not_to_copy():
    start = torch.arange(6)[:, None]
    tokens = (start + 2 * torch.arange(7)) % 11  # the next token is the last one plus 2
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens, "index": start[:, 0]}
    chain = one_stage(metaopt.CrossEntropy(), [batch], model=gpt2(), optimizer=ADAM, num_steps=25)
    guesses = chain.unroll(example_weights(6))["only"](input_ids=tokens).logits.argmax(-1)
    assert float((guesses[:, :-1] == tokens[:, 1:]).double().mean()) > 0.95
    assert float((guesses == tokens).double().mean()) < 0.1


@pytest.mark.parametrize("model", [gpt2(), Wrapped(gpt2()), gpt2(Overridden), Bigram()], ids=lambda m: type(m).__name__)
def test_the_weight_of_a_token_is_that_of_its_own_loss(model: Any) -> None:
    batch = {**text_batch(decoder=False), "note": ["a", "b", "c", "d"]}
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == 4, -100)
    weights = metaopt.TokenWeights(11).double()
    nn.init.normal_(weights.logits)
    table, logits = weights.weights(), logits_of(model(input_ids=batch["input_ids"]))
    rows = []
    for log_p, labels in zip(logits.log_softmax(-1), batch["labels"].tolist(), strict=True):
        terms = [-table[y] * log_p[t - 1, y] for t, y in enumerate(labels) if t > 0 and y != -100]
        rows.append(torch.stack(terms).mean())
    found = metaopt.WeightedLoss()(model, batch, weights, {})
    assert_same(found.detach(), torch.stack(rows).mean().detach(), 1e-14)
    smoothed = metaopt.LabelSmoothing()(model, batch, weights, {})
    counts = batch["labels"][:, 1:] != -100
    assert_same(smoothed, mean_over_positions(-logits.log_softmax(-1).mean(-1)[:, :-1], counts).mean(), 1e-14)


BART_SIZES: dict[str, Any] = {"d_model": 8, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
BERT_SIZES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 11}
UNSHIFTED = {
    "a decoder that leaves the shift to the data": lambda: BartForCausalLM(BartConfig(vocab_size=11, **BART_SIZES)),
    "a tagger": lambda: BertForTokenClassification(BertConfig(vocab_size=11, **BERT_SIZES)),
    "a causal tagger": lambda: gpt2(GPT2ForTokenClassification, num_labels=11),
}


@pytest.mark.parametrize("case", UNSHIFTED)
def test_a_loss_that_does_not_shift_is_not_shifted(case: str) -> None:
    model = UNSHIFTED[case]().double().eval()
    batch = text_batch(decoder=False)
    own = model(**inputs_of(batch), labels=batch["labels"]).loss
    found = metaopt.CrossEntropy()(model, batch, example_weights(), {})
    assert float(found.detach()) == pytest.approx(float(own.detach()), abs=1e-6)


# --- what models receive


def test_a_model_receives_what_its_forward_takes():
    batch: Any = {**text_batch(), "note": ["a"] * 4, "group": torch.ones(4)}
    more = {"attention_mask", "input_ids"}
    assert set(model_inputs(batch, gpt2())) == set(model_inputs(batch, Wrapped(gpt2()))) == more
    assert set(model_inputs(batch, bert2bert())) == {*more, "decoder_input_ids"}
    assert set(model_inputs(batch, Bigram())) == {"input_ids"}
    assert set(model_inputs(batch, Given(torch.ones(1)))) == {*more, "decoder_input_ids", "note", "group"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'features'"):
        metaopt.CrossEntropy()(Bigram(), {"features": torch.ones(2), "labels": torch.ones(2)}, example_weights(), {})  # type: ignore[arg-type]


UNROLLED = estimators.Unrolled(), estimators.Unrolled()
SWEPT = estimators.Checkpointed(), estimators.Checkpointed(product=estimators.Captured())


@pytest.mark.parametrize(
    "used",
    [pytest.param(UNROLLED, id="unrolled"), pytest.param(SWEPT, id="checkpointed, captured", marks=pytest.mark.slow)],
)
def test_further_columns_and_labels_alone_are_enough_for_encoder_decoders(used: Any) -> None:
    """The same hypergradient as with decoder inputs made by hand, nothing else in the batch, and `Unrolled`."""

    def hypergradient(batches: list[Any], used: Any) -> Tensor:
        torch.manual_seed(1)
        models = [bert2bert(), bert2bert()]
        for model in models:
            model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
        chain = metaopt.Chain(
            teacher=metaopt.Stage(models[0], ADAM, metaopt.WeightedLoss(), batches, 2, used[0], seed=1),
            student=metaopt.Stage(models[1], ADAM, metaopt.Distillation("teacher"), batches, 2, used[1], seed=2),
        )
        weights = example_weights(4)
        meta_loss = metaopt.ValidationLoss("student")(chain.unroll(weights), batches[0], weights)
        return metaopt.hypergradient(meta_loss, weights)["logits"]

    plain = [text_batch(seed, decoder=False) for seed in range(2)]
    for batch in plain:
        del batch["source"]
        batch["labels"][1, 3:] = -100
    by_hand = [
        {**b, "decoder_input_ids": torch.cat([torch.ones(4, 1).long(), b["labels"][:, :-1].clamp(min=0)], dim=1)}
        for b in plain
    ]
    rich = [{**b, "group": torch.ones(4), "note": ["a", "b", "c", "d"]} for b in plain]
    found, expected = hypergradient(rich, used), hypergradient(by_hand, UNROLLED)
    assert expected.abs().max() > 1e-6
    assert_same(found, expected, 1e-12 * float(expected.abs().max()))


# --- distillation


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_labels_are_a_divergence_at_a_temperature(temperature):
    student, (teacher, labels) = drawing(3)(3, 4, 5), sequences()
    expected = []
    for q, p, counted in zip(student, teacher, labels != -100, strict=True):
        log_q, log_p = ((z / temperature).log_softmax(-1) for z in (q, p))
        positions = [(log_p.exp() * (log_p - log_q)).sum(-1)[i] for i in range(4) if counted[i]]
        expected.append(float(sum(positions)) / max(len(positions), 1))
    found = soft_label_loss(student, teacher, labels, temperature)
    assert float(found) == pytest.approx(temperature**2 * sum(expected) / 3, abs=1e-14)
    assert float(soft_label_loss(teacher, teacher, None, temperature)) == pytest.approx(0.0, abs=1e-15)


def test_distillation_reads_the_named_teacher_and_all_positions_without_labels():
    upstream: Any = {"first": Given(drawing(1)(2, 3)), "second": Given(drawing(2)(2, 3))}
    student: Any = Given(drawing(3)(2, 3))
    for name, teacher in (("first", "first"), (None, "second")):
        loss = metaopt.Distillation(name, temperature=2.0)
        found = loss(student, {"inputs": torch.ones(2)}, example_weights(), upstream)
        assert_same(found, soft_label_loss(student.logits, upstream[teacher].logits, None, 2.0))
    assert metaopt.Distillation("first").reads == ("first",)
    assert metaopt.Distillation().reads == ()


def test_distillation_carries_the_gradient_of_the_teachers_logits():
    chain, weights = two_stages(), example_weights()
    found = metaopt.hypergradient(meta_loss(chain, weights), weights)["logits"]
    assert found.abs().max() > 1e-6


def test_models_of_unlike_classes_are_refused():
    with pytest.raises(metaopt.StageError, match=r"logits have shape \[2, 3\], the teacher's \[2, 4\]: .*same classes"):
        soft_label_loss(torch.ones(2, 3), torch.ones(2, 4), None, 1.0)


@pytest.mark.parametrize("loss", [metaopt.Distillation, metaopt.HiddenStates])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_must_be_above_zero(loss, temperature):
    with pytest.raises(metaopt.ConfigError, match="must be above 0"):
        loss(temperature=temperature)


def test_hidden_states_feed_the_student_in_place_of_tokens():
    batch, weights = text_batch(), example_weights(4)
    torch.manual_seed(0)
    teacher, student = trained_model(bert2bert(), batch), trained_model(bert2bert(), batch)
    taught = teacher(**inputs_of(batch), output_hidden_states=True)
    fed = {key: value for key, value in inputs_of(batch).items() if key != "decoder_input_ids"}
    logits = student(**fed, decoder_inputs_embeds=taught.decoder_hidden_states[-1]).logits
    found = metaopt.HiddenStates("teacher", temperature=2.0)(student, batch, weights, {"teacher": teacher})
    assert_same(found, soft_label_loss(logits, taught.logits, batch["labels"], 2.0))
    names = ["encoder.embeddings.word_embeddings.weight"]
    for model in (teacher, student):
        (gradient,) = torch.autograd.grad(found, [model.params[names[0]]], retain_graph=True)
        assert gradient.abs().sum() > 0


def test_hidden_states_need_a_teacher_that_has_some():
    upstream: Any = {"teacher": Given(torch.ones(2, 3))}
    student: Any = Given(torch.ones(2, 3))
    with pytest.raises(metaopt.StageError, match="returns no decoder_hidden_states; use Distillation"):
        metaopt.HiddenStates()(student, {"inputs": torch.ones(2)}, example_weights(), upstream)


def test_hard_labels_are_refused_with_what_to_write_instead():
    with pytest.raises(metaopt.ConfigError, match=r"argmax is piecewise constant.*Distillation.*HiddenStates"):
        metaopt.HardLabels("teacher")


# --- what the losses need


def test_outputs_without_logits_are_refused():
    scores = torch.ones(2, 3)
    assert logits_of(scores) is scores
    assert logits_of(SimpleNamespace(logits=scores)) is scores
    for output in ((scores,), SimpleNamespace(logits=None), {"logits": scores}):
        with pytest.raises(metaopt.StageError, match=r"without \.logits; return a tensor of logits"):
            logits_of(output)


def test_batches_that_are_no_mappings_are_refused():
    with pytest.raises(metaopt.ConfigError, match=r"a batch is a tuple; .*write an InnerLoss of your own"):
        one_stage(batches=[(torch.ones(2), torch.ones(2))]).unroll(example_weights())


def test_upstream_models_are_found_or_the_names_there_are_said():
    first, second = object(), object()
    upstream: Any = {"first": first, "second": second}
    assert find_upstream(upstream, None, "Reader") is second
    assert find_upstream(upstream, "first", "Reader") is first
    with pytest.raises(metaopt.ConfigError, match=r"no stage 'frist' .*\(did you mean 'first'\?\)"):
        find_upstream(upstream, "frist", "Reader")
    with pytest.raises(metaopt.ConfigError, match="Reader learns from an earlier stage, but its stage is the first"):
        find_upstream({}, "first", "Reader")


def test_a_mean_over_positions_counts_what_is_marked():
    values = torch.tensor([[1.0, 2.0, 6.0], [3.0, 4.0, 5.0]])
    counts = torch.tensor([[True, True, False], [False, False, False]])
    assert mean_over_positions(values, None).tolist() == [3.0, 4.0]
    assert mean_over_positions(values, counts).tolist() == [1.5, 0.0]
    assert mean_over_positions(values[:, 0], counts[:, 0]).tolist() == [1.0, 3.0]


def test_a_scalar_may_have_one_axis():
    one = torch.ones(1, requires_grad=True)
    assert require_scalar(one * 2, "here").shape == ()
    with torch.no_grad():
        assert float(require_scalar(torch.ones(()), "here")) == 1.0
    assert float(require_scalar(torch.ones(()), "here", needs_graph=False)) == 1.0
    with pytest.raises(metaopt.StageError, match=r"here must return a scalar tensor, got shape \[2\]"):
        require_scalar(torch.ones(2), "here")


def test_an_inner_loss_is_a_subclass_or_a_function():
    class Mine(metaopt.InnerLoss):
        def __call__(self, model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
            return metaopt.CrossEntropy()(model, batch, meta_params, upstream)

    as_class, as_function, built_in = (
        one_stage(loss, optimizer=ADAM).unroll(example_weights()).losses["only"]
        for loss in (Mine(), Mine().__call__, metaopt.CrossEntropy())
    )
    assert_same(as_class, built_in)
    assert_same(as_function, built_in)
    with pytest.raises(TypeError, match="abstract"):
        metaopt.InnerLoss()  # type: ignore[abstract]
