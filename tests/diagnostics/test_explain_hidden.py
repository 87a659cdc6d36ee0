"""Cuts that are harder to see: inside models, by way of lists, text and memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cut_lines import assert_cut, line_of, seen
from small import SGD, example_weights, feature_batches, two_stages
from small_models import CLASSES, Network

import metaopt

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
BATCH = feature_batches(1, seed=8)[0]
STUDENT = metaopt.ValidationLoss("student")


def squared(model, batch, target):
    return (model(batch["inputs"]) - target).square().mean()


def plain_loss(model, batch, meta_params, upstream):
    return metaopt.CrossEntropy()(model, batch, meta_params, upstream)


def by_a_detached_model(model, batch, meta_params, upstream):
    taught = upstream["teacher"].detach()(batch["inputs"])  # cut
    return squared(model, batch, taught)


def by_a_model_without_grad(model, batch, meta_params, upstream):
    with torch.no_grad():  # cut
        taught = upstream["teacher"](batch["inputs"])
    return squared(model, batch, taught)


def by_inference_mode(model, batch, meta_params, upstream):
    with torch.inference_mode():
        taught = upstream["teacher"](batch["inputs"])  # cut
    return squared(model, batch, taught.clone())


def by_numbers_in_a_list(model, batch, meta_params, upstream):
    labels = [int(row.argmax()) for row in upstream["teacher"](batch["inputs"])]  # cut
    return F.cross_entropy(model(batch["inputs"]), torch.tensor(labels))


def by_a_python_function(model, batch, meta_params, upstream):
    scale = math.exp(-upstream["teacher"](batch["inputs"]).square().mean())  # cut
    return scale * plain_loss(model, batch, meta_params, upstream)


def by_a_copy_in_place(model, batch, meta_params, upstream):
    taught = upstream["teacher"](batch["inputs"])
    target = torch.zeros_like(taught)
    with torch.no_grad():  # cut
        target.copy_(taught)
    return squared(model, batch, target)


def by_rows_of_data(model, batch, meta_params, upstream):
    taught = upstream["teacher"](batch["inputs"])
    target = torch.zeros_like(taught)
    for row, entries in enumerate(taught):
        target.data[row] = entries  # cut
    return squared(model, batch, target)


def by_a_plain_gradient(model, batch, meta_params, upstream):
    energy = upstream["teacher"](batch["inputs"]).logsumexp(-1).mean()
    (gradient,) = torch.autograd.grad(energy, [upstream["teacher"].params["last.bias"]])  # cut
    return gradient.square().sum() * plain_loss(model, batch, meta_params, upstream)


HIDDEN = {
    by_a_detached_model: ".detach()",
    by_a_model_without_grad: "torch.no_grad()",
    by_inference_mode: "torch.inference_mode()",
    by_numbers_in_a_list: "argmax",
    by_a_python_function: "float(...)",
    by_a_copy_in_place: "torch.no_grad()",
    by_rows_of_data: ".data",
    by_a_plain_gradient: "torch.autograd.grad(...)",
}


@pytest.mark.parametrize("loss", HIDDEN, ids=lambda loss: loss.__name__)
def test_cuts_that_are_harder_to_see(loss):
    chain = two_stages()
    chain.stages["student"].loss = loss
    path = metaopt.explain_hypergradient(chain, STUDENT, BATCH, example_weights())["logits"]
    assert_cut(path, loss, HIDDEN[loss], "the loss of stage 'student'", ("stage", "teacher"))


class Written(metaopt.HandOver):
    """The teacher's labels by way of text."""

    def write(self, upstream, batches):
        return [{**batch, "labels": self.read(self.say(upstream["teacher"](batch["inputs"])))} for batch in batches]

    def say(self, logits):
        return "".join("abc"[label] for label in logits.argmax(-1).tolist())  # cut

    def read(self, text):
        return torch.tensor(["abc".index(letter) for letter in text])


def test_a_hand_over_by_way_of_text():
    student = metaopt.Stage(Network(), SGD, metaopt.CrossEntropy(), Written(feature_batches()), 2, seed=5)
    chain = metaopt.Chain(teacher=two_stages().stages["teacher"], student=student)
    path = metaopt.explain_hypergradient(chain, STUDENT, BATCH, example_weights())["logits"]
    assert_cut(path, Written.say, "argmax", "the hand-over of stage 'student'", ("stage", "teacher"))


class Quantised(Network):
    """A model that rounds inside."""

    def forward(self, inputs):
        return super().forward(inputs) + inputs.mul(10).round().sum() + self.coarse(self.first(inputs))

    def coarse(self, hidden):
        return hidden[:, :CLASSES].detach()  # cut


def test_inside_a_users_model():
    path = metaopt.explain_hypergradient(two_stages(teacher=Quantised()), STUDENT, BATCH, example_weights())["logits"]
    assert path.status == "partly cut"
    assert {seen(cut) for cut in path.cuts} == {(".detach()", line_of(Quantised.coarse))}
    assert {cut.where for cut in path.cuts} == {"the loss of stage 'teacher'", "the loss of stage 'student'"}
