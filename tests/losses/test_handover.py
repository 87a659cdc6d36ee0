"""Hand-overs: what a trained teacher writes for its student, once per unroll and without a graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from networks import bert2bert
from small import (
    ADAM,
    SGD,
    assert_same,
    chain_state,
    example_weights,
    feature_batches,
    inputs_of,
    one_stage,
    plain_copy,
    tensors_of,
    text_batch,
    trained_model,
    two_stages,
)
from small_models import Network
from transformers import GPT2Config, GPT2LMHeadModel

import metaopt
from metaopt.losses.handover import Decoded, Generated


class Relabelled(metaopt.HandOver):
    """The teacher's scores become the student's inputs, with noise; remembers how it was called."""

    reads = ("teacher",)

    def __init__(self, batches: Any) -> None:
        super().__init__(batches)
        self.calls: list[tuple[bool, int]] = []
        self.written: list[torch.Tensor] = []

    def write(self, upstream: Any, batches: Sequence[Any]) -> Sequence[Any]:
        self.calls.append((torch.is_grad_enabled(), len(batches)))
        made = []
        for batch in batches:
            labels = upstream["teacher"](batch["inputs"]).argmax(-1)
            made.append({**batch, "inputs": batch["inputs"] + torch.randn(()), "labels": labels})
        self.written += [batch["inputs"] for batch in made]
        return made


def relabelling(batches: Any = None, num_steps: int = 2, accumulate: int = 1) -> tuple[metaopt.Chain, Relabelled]:
    torch.manual_seed(3)
    handover = Relabelled(batches or feature_batches(5))
    student = metaopt.Stage(Network(), SGD, metaopt.CrossEntropy(), handover, num_steps, accumulate=accumulate, seed=5)
    return metaopt.Chain(teacher=two_stages(SGD).stages["teacher"], student=student), handover


def test_the_student_trains_on_what_the_teacher_writes_once_per_unroll():
    chain, handover = relabelling(num_steps=2, accumulate=2)
    before = chain_state(chain)
    outcome = chain.unroll(example_weights())
    assert handover.calls == [(False, 4)]
    assert_same(chain_state(chain), before)
    assert_same(tensors_of(chain.unroll(example_weights())), tensors_of(outcome))
    assert_same(handover.written[:4], handover.written[4:])  # the same noise, as nothing was committed
    teacher, inputs = outcome["teacher"], feature_batches(5)[0]["inputs"]
    answered = [teacher(batch["inputs"]).argmax(-1) for batch in feature_batches(4)]
    batches = [{"inputs": x, "labels": y} for x, y in zip(handover.written[:4], answered, strict=True)]
    model = chain.stages["student"].model
    student = one_stage(metaopt.CrossEntropy(), batches, model=model, optimizer=SGD, num_steps=2, accumulate=2)
    expected = student.unroll(example_weights())["only"]
    assert_same(outcome["student"](inputs).detach(), expected(inputs).detach(), 1e-14)


def test_a_hand_over_goes_on_in_its_batches_and_noise_after_a_commit_and_a_resume():
    chain, handover = relabelling()
    chain.commit(chain.unroll(example_weights()))
    state = chain.state_dict()
    chain.unroll(example_weights())
    assert chain.state_dict()["student"]["stream"]["position"] == 2
    assert not torch.equal(handover.written[2] - feature_batches(5)[2]["inputs"], handover.written[0])
    resumed, again = relabelling()
    resumed.load_state_dict(state)
    resumed.unroll(example_weights())
    assert_same(again.written, handover.written[2:])


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_plain_training_writes_for_all_its_steps_at_once(num_steps):
    chain, handover = relabelling()
    chain.train(example_weights(), num_steps=num_steps)
    assert handover.calls == ([(False, num_steps)] if num_steps else [])


def test_the_stages_that_a_hand_over_reads_must_come_before():
    student = metaopt.Stage(Network(), SGD, metaopt.CrossEntropy(), Relabelled(feature_batches()), 2)
    with pytest.raises(metaopt.ConfigError, match="Relabelled reads stage 'teacher', which does not come before it"):
        metaopt.Chain(student=student)


def test_more_batches_than_are_answered_in_one_go_are_all_answered():
    batches = [text_batch(seed) for seed in range(18)]
    teacher = trained_model(bert2bert(), batches[0])
    handover = Decoded(batches, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_length=3)
    written = handover.write({"teacher": teacher}, batches)
    assert len(written) == 18
    for batch, answered in zip(batches[14:], written[14:], strict=True):
        (alone,) = handover.write({"teacher": teacher}, [batch])
        assert_same(answered, alone)


def test_a_hand_over_must_write_a_batch_for_each():
    class Short(metaopt.HandOver):
        def write(self, upstream: Any, batches: Sequence[Any]) -> Sequence[Any]:
            return batches[1:]

    with pytest.raises(metaopt.StageError, match=r"Short\.write returned 2 batches for 3; return one for each"):
        one_stage(metaopt.CrossEntropy(), Short(feature_batches())).unroll(example_weights())


def test_a_hand_over_refuses_a_one_shot_iterator():
    with pytest.raises(metaopt.ConfigError, match="can be read only once"):
        one_stage(metaopt.CrossEntropy(), Relabelled(iter(feature_batches())))


# --- decoding

TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 5}


def decoded_by_hand(model: Any, batch: dict[str, torch.Tensor], eos: int) -> list[list[int]]:
    """Greedy answers token by token, one example at a time, up to and with the end token."""
    answers = []
    for row in range(len(batch["input_ids"])):
        one = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        tokens = [1]
        while len(tokens) < 6 and (len(tokens) == 1 or tokens[-1] != eos):
            logits = model(**one, decoder_input_ids=torch.tensor([tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
        answers.append(tokens[1:])
    return answers


def test_decoded_writes_the_trained_teachers_greedy_answers():
    torch.manual_seed(1)
    batches = [text_batch(seed) for seed in range(3)]
    teacher = trained_model(bert2bert(), batches[0], num_steps=6)
    never_ending = Decoded(batches, **{**TOKENS, "eos_token_id": 99}).write({"teacher": teacher}, batches)
    eos = int(never_ending[0]["labels"][0, 2])  # a token that some answers hold
    written = Decoded(batches, **{**TOKENS, "eos_token_id": eos}).write({"teacher": teacher}, batches)
    plain = plain_copy(teacher.structure.module, teacher).eval()
    lengths = set()
    for batch, made in zip(batches, written, strict=True):
        for row, answer in enumerate(decoded_by_hand(plain, batch, eos)):
            lengths.add(len(answer))
            assert made["labels"][row].tolist() == answer + [-100] * (5 - len(answer))
            assert made["decoder_input_ids"][row, : len(answer)].tolist() == [1, *answer[:-1]]
        assert_same({k: made[k] for k in ("input_ids", "index")}, {k: batch[k] for k in ("input_ids", "index")})
        assert set(made) == set(batch)
    assert len(lengths) > 1


def test_batches_of_several_lengths_keep_their_order():
    long, short = text_batch(0), text_batch(1)
    short = {key: value[:, :3] if value.dim() == 2 else value for key, value in short.items()}
    teacher = trained_model(bert2bert(), long)
    together = Decoded([], **TOKENS).write({"teacher": teacher}, [long, short, long, long])
    alone = [Decoded([], **TOKENS).write({"teacher": teacher}, [batch])[0] for batch in (long, short, long, long)]
    assert_same(together, alone)


def test_a_student_on_decoded_data_carries_the_gradient_through_soft_labels():
    torch.manual_seed(0)
    batches, weights = [text_batch(0), text_batch(1)], example_weights(4)
    chain = metaopt.Chain(
        teacher=metaopt.Stage(bert2bert(), ADAM, metaopt.WeightedLoss(), batches, 2),
        student=metaopt.Stage(bert2bert(), ADAM, metaopt.Distillation(), Decoded(batches, **TOKENS), 2),
    )
    batch = text_batch(2)
    outcome = chain.unroll(weights)
    metaopt.backward(metaopt.ValidationLoss("student")(outcome, batch, weights), weights)
    assert weights.logits.grad is not None
    assert weights.logits.grad.abs().sum() > 0
    assert inputs_of(batch).keys() == inputs_of(batches[0]).keys()


def test_decoded_refuses_what_it_cannot_write():
    with pytest.raises(metaopt.ConfigError, match="max_length=0"):
        Decoded([], **{**TOKENS, "max_length": 0})
    assert Decoded([], **TOKENS, upstream="teacher").reads == ("teacher",)
    with pytest.raises(metaopt.ConfigError, match="no stage 'techer'"):
        Decoded([], **TOKENS, upstream="techer").write({"teacher": None}, [text_batch()])  # type: ignore[dict-item]


# --- generate


def ending(model: Any, batch: Any, **generation: Any) -> int:
    """A token that the teacher writes in the middle of an answer."""
    return int(Generated([batch], {"max_new_tokens": 5, **generation}).write({"t": model}, [batch])[0]["labels"][0, 2])


def with_tokens(model: Any) -> Any:
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.decoder_start_token_id = 1
        config.pad_token_id = 0
        config.eos_token_id = None
    return model


def causal() -> Any:
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16, initializer_range=0.5)
    return with_tokens(GPT2LMHeadModel(config).double())


def test_generate_uses_the_trained_weights_and_no_graph():
    torch.manual_seed(1)
    batch = text_batch()
    module = with_tokens(bert2bert())
    teacher = trained_model(module, batch, num_steps=6).eval()
    before, inputs = copy.deepcopy(module.state_dict()), {k: batch[k] for k in ("input_ids", "attention_mask")}
    with teacher.as_module() as lent:
        found = lent.generate(**inputs, max_new_tokens=5, num_beams=3)
    plain: Any = plain_copy(module, teacher).eval()
    assert_same(found, plain.generate(**inputs, max_new_tokens=5, num_beams=3))
    assert not torch.equal(found, module.eval().generate(**inputs, max_new_tokens=5, num_beams=3))
    assert_same(dict(module.state_dict()), dict(before))
    generation = {"max_new_tokens": 5, "num_beams": 3}
    written = Generated([batch], generation).write({"teacher": teacher}, [batch])[0]
    assert_same(written["decoder_input_ids"], found[:, :-1])
    assert_same(written["labels"], found[:, 1:])
    assert not written["decoder_input_ids"].requires_grad


def test_greedy_generation_is_decoding():
    torch.manual_seed(1)
    batches = [text_batch(seed) for seed in range(3)]
    teacher = trained_model(with_tokens(bert2bert()), batches[0], num_steps=6).eval()
    eos = ending(teacher, batches[0])
    greedy = {"max_new_tokens": 5, "eos_token_id": eos, "pad_token_id": 0}
    written = Generated(batches, greedy).write({"teacher": teacher}, batches)
    decoded = Decoded(batches, **{**TOKENS, "eos_token_id": eos}).write({"teacher": teacher}, batches)
    assert any((batch["labels"] == -100).any() for batch in decoded)
    for ours, theirs in zip(decoded, written, strict=True):
        length = theirs["labels"].shape[1]
        assert_same(theirs["labels"], ours["labels"][:, :length])
        assert_same(theirs["decoder_input_ids"], ours["decoder_input_ids"][:, :length])


def test_a_causal_teacher_continues_its_prompts():
    torch.manual_seed(1)
    prompts = text_batch(decoder=False)
    del prompts["labels"]
    prompts["input_ids"][0, :2], prompts["attention_mask"][0, :2] = 0, 0
    teacher = trained_model(causal(), text_batch(decoder=False)).eval()
    eos = ending(teacher, prompts)
    generation = {"max_new_tokens": 4, "eos_token_id": eos}
    written = Generated([prompts], generation).write({"t": teacher}, [prompts])[0]
    assert (written["input_ids"][:, :5] == prompts["input_ids"]).all()
    assert (written["labels"][:, :5] == -100).all()  # the prompt's own tokens are not learned
    guesses = teacher(**inputs_of(written)).logits.argmax(-1).roll(1, -1)
    for row in range(4):
        counted = written["labels"][row] != -100
        assert int(counted.sum()) >= 1
        assert written["labels"][row][counted].tolist() == guesses[row][counted].tolist()  # greedy: its own
        assert_same(written["labels"][row][counted], written["input_ids"][row][counted])
        tokens = written["labels"][row][counted].tolist()
        assert eos not in tokens[:-1]
    assert any(eos in row for row in written["labels"].tolist())
    right = {**prompts, "attention_mask": prompts["attention_mask"].flip(1)}
    with pytest.raises(metaopt.StageError, match="padded on the left"):
        Generated([right], generation).write({"t": teacher}, [right])


def test_samples_are_replayed_until_a_commit_and_carry_the_gradient_along_them():
    torch.manual_seed(2)
    batches = [{k: v for k, v in text_batch(s).items() if k not in ("labels", "decoder_input_ids")} for s in range(3)]
    written: list[Any] = []

    class Remembering(Generated):
        def write(self, upstream: Any, batches: Sequence[Any]) -> Sequence[Any]:
            written.append(super().write(upstream, batches))
            return written[-1]

    handover = Remembering(batches, {"max_new_tokens": 4, "do_sample": True}, upstream="teacher")
    chain = metaopt.Chain(
        teacher=metaopt.Stage(with_tokens(bert2bert()), ADAM, metaopt.WeightedLoss(), [text_batch()], 2, seed=1),
        student=metaopt.Stage(bert2bert(), ADAM, metaopt.Distillation("teacher"), handover, 2, seed=2),
    )
    weights = example_weights(4)
    first, again = chain.unroll(weights), chain.unroll(weights)
    assert_same(written[0], written[1])
    assert_same(tensors_of(first), tensors_of(again))
    meta_loss = metaopt.ValidationLoss("student")(first, text_batch(7), weights)
    assert metaopt.hypergradient(meta_loss, weights)["logits"].abs().max() > 0
    chain.commit(again)
    chain.unroll(weights)
    assert not torch.equal(written[2][0]["labels"], written[0][0]["labels"])


def test_generating_needs_a_generate():
    teacher = trained_model(Network(), feature_batches(1)[0])
    with pytest.raises(metaopt.StageError, match=r"Network has no generate\(\); use Decoded"):
        Generated(feature_batches()).write({"teacher": teacher}, feature_batches())
