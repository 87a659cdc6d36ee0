"""What upstream models answer: asked once for each batch, their cotangents summed, and when they are asked anew."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from networks import bert2bert
from problems import soft_labels
from reference import relative_error
from small import ADAM, SGD, assert_same, example_weights, feature_batches, meta_loss, text_batch, two_stages
from small_models import FEATURES, Linear, Network
from torch import Tensor, nn

import metaopt
from metaopt.estimators import Captured, Checkpointed, Neumann, Truncated, Unrolled
from metaopt.meters import count_flops

EXACT = 1e-12
BATCHES, STEPS = 2, 5


class Counted(nn.Module):
    """Counts its forwards in eval mode, and may draw random numbers there."""

    def __init__(self, draws: Any = None) -> None:
        super().__init__()
        self.network = Network(0.3)
        self.draws, self.calls = draws, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += not self.training
        scale = 1.0 if self.draws is None or self.training else self.draws()
        return self.network(inputs) * scale


def chain_of(loss: Any, estimator: Any, draws: Any = None) -> tuple[metaopt.Chain, Counted]:
    """A chain whose student has this loss, five steps over two batches; and its teacher."""
    torch.manual_seed(2)
    teacher, student, batches = Counted(draws), Network(0.2), feature_batches(BATCHES)
    chain = two_stages(ADAM, teacher, student, batches=batches, num_steps=STEPS, estimator=estimator)
    chain.stages["student"].loss = loss
    return chain, teacher


def distilled(loss: Any, estimator: Any, draws: Any = None) -> dict[str, Tensor]:
    """Its hypergradient."""
    phi = example_weights()
    return metaopt.hypergradient(meta_loss(chain_of(loss, estimator, draws)[0], phi), phi)


def calls_of(loss: Any, estimator: Any, draws: Any = None) -> tuple[int, int]:
    """How often the student's steps ask the teacher, in the forward and in the backward."""
    (chain, teacher), phi = chain_of(loss, estimator, draws), example_weights()
    trained = chain.unroll(phi)
    forward, teacher.calls = teacher.calls, 0
    metaopt.hypergradient(trained["student"](feature_batches(1)[0]["inputs"]).square().sum(), phi)
    return forward, teacher.calls


def once(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    return soft_labels(model, batch, phi, upstream, teacher="teacher", temperature=2.0)


def twice(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Asks with the batch, with a tensor of its own, and with the batch again."""
    log_q = model(batch["inputs"]).log_softmax(-1)
    asked = [batch["inputs"], batch["inputs"].tanh(), batch["inputs"]]
    answers = [upstream["teacher"](x).softmax(-1) for x in asked]
    return -sum((p * log_q).sum(-1).mean() * (i + 1) for i, p in enumerate(answers))  # type: ignore[return-value]


def sometimes(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Asks at the steps of the first batch only."""
    if int(batch["index"][0]) == 0:
        return once(model, batch, phi, upstream)
    return metaopt.WeightedLoss()(model, batch, phi, upstream)


def in_train_mode(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    return once(model, batch, phi, {"teacher": upstream["teacher"].train()})


def writing_into_the_answer(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Divides the teacher's logits in place, from the second batch on."""
    logits = upstream["teacher"](batch["inputs"])
    if int(batch["index"][0]) > 0:
        logits /= 3.0
    return -(logits.softmax(-1) * model(batch["inputs"]).log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("loss", [once, twice, sometimes, in_train_mode, writing_into_the_answer])
def test_whatever_a_loss_asks_the_hypergradient_is_exact(loss):
    expected = distilled(loss, Unrolled())
    for store in ("states", "recompute"):
        assert relative_error(distilled(loss, Checkpointed(store=store)), expected) < EXACT


@pytest.mark.parametrize("loss", [once, twice, in_train_mode])
def test_answers_enter_captured_programs(loss):
    assert relative_error(distilled(loss, Checkpointed(Captured())), distilled(loss, Unrolled())) < EXACT


def drawn_by_numpy() -> float:
    import numpy as np

    return float(np.random.rand())


@pytest.mark.parametrize("draws", [lambda: torch.rand(()), random.random, drawn_by_numpy], ids=["torch", "py", "numpy"])
def test_a_teacher_that_draws_random_numbers_draws_them_at_every_step(draws):
    expected = distilled(once, Unrolled(), draws)
    for store in ("states", "recompute"):
        assert relative_error(distilled(once, Checkpointed(store=store), draws), expected) < EXACT
    forward, backward = calls_of(once, Checkpointed(), draws=draws)
    assert forward == STEPS + BATCHES  # the first time on each batch shows that it draws
    assert backward == STEPS


@pytest.mark.parametrize(
    ("loss", "forward", "backward"),
    [
        (once, BATCHES, BATCHES),
        (twice, BATCHES + STEPS, BATCHES + STEPS),
        (sometimes, 1, 1),
        (in_train_mode, 0, 0),
        (writing_into_the_answer, 3, 3),  # kept for the first batch; for the second, anew at both of its steps
    ],
)
def test_a_teacher_is_asked_once_for_each_batch(loss, forward, backward):
    assert calls_of(loss, Checkpointed()) == (forward, backward)
    assert calls_of(loss, Unrolled())[1] == 0


def test_a_batch_of_one_step_alone_is_not_kept():
    teacher = Counted()
    chain = two_stages(ADAM, teacher, Linear(), batches=feature_batches(3), num_steps=3, estimator=Checkpointed())
    phi = example_weights()
    loss = meta_loss(chain, phi)
    assert teacher.calls == 3
    metaopt.hypergradient(loss, phi)
    assert teacher.calls == 6


def test_cotangents_are_summed_before_they_are_carried_on():
    """One backward through the teacher for each batch, whatever the number of steps: constant cost."""

    def flops(num_steps: int) -> int:
        torch.manual_seed(2)
        teacher = Network()
        teacher.first, teacher.last = (nn.Linear(*sizes, dtype=torch.float64) for sizes in ((FEATURES, 512), (512, 3)))
        options = {"batches": feature_batches(1), "estimator": Checkpointed()}
        chain = two_stages(SGD, teacher, Linear(), num_steps=num_steps, **options)
        chain.stages["teacher"].num_steps = 1
        phi = example_weights()
        return count_flops(lambda: metaopt.hypergradient(meta_loss(chain, phi), phi))

    of_the_student = flops(3) - flops(2)
    of_the_teacher = 2 * 5 * 512 * (FEATURES + 3)  # one forward of five examples
    assert of_the_student == flops(12) - flops(11)
    assert of_the_student < of_the_teacher


def test_a_second_backward_sums_anew():
    chain, phi = two_stages(ADAM, batches=feature_batches(1), estimator=Checkpointed()), example_weights()
    loss = meta_loss(chain, phi)
    first = metaopt.hypergradient(loss, phi, retain_graph=True)
    assert_same(metaopt.hypergradient(loss, phi), first)


@pytest.mark.parametrize("estimator", [Truncated(2), Neumann(3)], ids=repr)
def test_an_approximation_carries_on_what_its_own_steps_have_asked(estimator):
    """As with a teacher that is asked anew, since the student's first steps are constants."""

    def anew(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        return once(model, {**batch, "inputs": batch["inputs"].clone()}, phi, upstream)

    assert relative_error(distilled(once, estimator), distilled(anew, estimator)) < EXACT


# --- what is not kept


def of_text(loss: Any, estimator: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    batches, phi = [text_batch(0)], example_weights(4)
    options: dict[str, Any] = {"estimator": estimator, "seed": 3}
    chain = metaopt.Chain(
        teacher=metaopt.Stage(bert2bert(), SGD, metaopt.WeightedLoss(), batches, 1, **options),
        student=metaopt.Stage(Linear(), SGD, loss, batches, 2, **options),
    )
    return metaopt.hypergradient(chain.unroll(phi)["student"].params["linear.weight"].square().sum(), phi)


def reading(part: str) -> Any:
    def loss(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "decoder_input_ids")}
        answer = upstream["teacher"](**inputs, use_cache=True)
        read = answer.past_key_values.get_seq_length() if part == "cache" else 1
        return (model(answer.logits[..., :FEATURES]) * read).square().mean()

    return loss


def test_a_part_of_an_answer_that_is_no_tensor_says_so_when_it_is_read():
    assert relative_error(of_text(reading("logits"), Checkpointed()), of_text(reading("logits"), Unrolled())) < EXACT
    with pytest.raises(metaopt.StageError, match=r"reads \.get_seq_length of the EncoderDecoderCache.*Unrolled\(\)"):
        of_text(reading("cache"), Checkpointed())


def changing_the_batch(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    batch["index"].add_(5).remainder_(15)
    return metaopt.WeightedLoss()(model, batch, phi, upstream)


def test_a_batch_that_the_loss_changes_in_place_is_refused():
    """Its steps cannot be run again as they were."""
    with pytest.raises(metaopt.StageError, match=r"'student': a batch was changed in place.*clone\(\)"):
        distilled(changing_the_batch, Checkpointed())


def test_a_batch_that_is_changed_before_the_backward_is_refused():
    batches, phi = feature_batches(2), example_weights()
    chain = two_stages(ADAM, batches=batches, estimator=Checkpointed())
    loss = meta_loss(chain, phi)
    batches[0]["inputs"] += 1.0
    with pytest.raises(metaopt.StageError, match="a batch was changed in place"):
        metaopt.hypergradient(loss, phi)
