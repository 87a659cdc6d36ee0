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

import metaopt
from metaopt.losses import (
    cross_entropy_per_example,
    find_upstream,
    logits_of,
    mean_over_positions,
    model_inputs,
    require_scalar,
    soft_label_loss,
)


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
    with pytest.raises(metaopt.StageError, match=r"\[3, 4, 5\] do not fit labels of shape \[3\]: .* shape \[3, 4\]"):
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
    with pytest.raises(metaopt.ConfigError, match=r"WeightedLoss\(weights=\.\.\.\).*first, second"):
        one_stage().unroll(several)
    with pytest.raises(metaopt.ConfigError, match=r"did you mean 'first'"):
        one_stage(metaopt.WeightedLoss("frist")).unroll(several)
    with pytest.raises(metaopt.ConfigError, match=r"'first', but they are one module without a name"):
        one_stage(metaopt.WeightedLoss("first")).unroll(example_weights())
    assert_same(one_stage().unroll({"alone": several["first"]}).losses["only"], losses["first"])


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
    with pytest.raises(metaopt.ConfigError, match=r"Reader: no earlier stage 'frist' \(did you mean 'first'\?\)"):
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
