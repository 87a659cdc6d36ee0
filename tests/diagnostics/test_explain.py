"""Every kind of cut, in every part of a chain, is named at its own line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cut_lines import assert_cut, line_of, seen
from small import SGD, example_weights, feature_batches, one_stage, two_stages
from small_models import CLASSES, Network
from torch import Tensor, nn

import metaopt

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad", "ignore:To copy construct")
BATCH = feature_batches(1, seed=8)[0]
STUDENT = metaopt.ValidationLoss("student")


# --- ways to cut: numbers [B, C] → other numbers [B, C], the path lost in the marked line


def by_argmax(z: Tensor) -> Tensor:
    labels = z.argmax(-1)  # cut
    return F.one_hot(labels, CLASSES).to(z)


def by_detach(z: Tensor) -> Tensor:
    fixed = z.detach()  # cut
    return fixed.softmax(-1)


def by_no_grad(z: Tensor) -> Tensor:
    with torch.no_grad():  # cut
        soft = z.softmax(-1)
    return soft * 2


@torch.no_grad()
def decorated(z: Tensor) -> Tensor:
    return z.softmax(-1) * 2


def by_decorator(z: Tensor) -> Tensor:
    return decorated(z)  # cut


def by_item(z: Tensor) -> Tensor:
    highest = z.max().item()  # cut
    return torch.ones_like(z) * highest


def by_float(z: Tensor) -> Tensor:
    total = float(z.exp().sum())  # cut
    return torch.full_like(z, total)


def by_tolist(z: Tensor) -> Tensor:
    rows = z.tolist()  # cut
    return torch.tensor(rows, dtype=z.dtype)


def by_numpy(z: Tensor) -> Tensor:
    array = z.detach().numpy()  # cut
    return torch.from_numpy(array * 2)


def by_integers(z: Tensor) -> Tensor:
    counts = (10 * z).long()  # cut
    return counts.to(z)


def by_rounding(z: Tensor) -> Tensor:
    return (10 * z).round()  # cut


def by_comparison(z: Tensor) -> Tensor:
    mask = z > z.mean()  # cut
    return mask.to(z)


def by_rebuilding(z: Tensor) -> Tensor:
    return torch.tensor([list(row) for row in z], dtype=z.dtype)  # cut


def by_data(z: Tensor) -> Tensor:
    return z.data.exp()  # cut


OPERATIONS = {
    by_argmax: "argmax",
    by_detach: ".detach()",
    by_no_grad: "torch.no_grad()",
    by_decorator: "torch.no_grad()",
    by_item: ".item()",
    by_float: "float(...)",
    by_tolist: ".tolist()",
    by_numpy: ".numpy()",
    by_integers: "integer cast",
    by_rounding: "round",
    by_comparison: "comparison >",
    by_rebuilding: "torch.tensor(...)",
    by_data: ".data",
}
every_cut = pytest.mark.parametrize("cut", OPERATIONS, ids=lambda cut: cut.__name__)


# --- in every part of a chain


def squared(model, batch, target):
    return (model(batch["inputs"]) - target).square().mean()


@every_cut
def test_in_the_loss_of_a_later_stage(cut):
    def loss(model, batch, meta_params, upstream):
        return squared(model, batch, cut(upstream["teacher"](batch["inputs"])))

    chain = two_stages()
    chain.stages["student"].loss = loss
    path = metaopt.explain_hypergradient(chain, STUDENT, BATCH, example_weights())["logits"]
    assert_cut(path, cut, OPERATIONS[cut], "the loss of stage 'student'", ("stage", "teacher"))


@every_cut
def test_in_the_loss_that_reads_the_meta_parameter(cut):
    def loss(model, batch, meta_params, upstream):
        weights = cut(meta_params(batch)[:, None].exp() * batch["inputs"][:, :CLASSES])
        return (weights * model(batch["inputs"])).square().mean()

    path = metaopt.explain_hypergradient(one_stage(loss), metaopt.ValidationLoss("only"), BATCH, example_weights())
    assert_cut(path["logits"], cut, OPERATIONS[cut], "the loss of stage 'only'", ("meta-parameter", "logits"))


class Targets(metaopt.HandOver):
    """The teacher's scores, cut in some way."""

    def __init__(self, cut):
        super().__init__(feature_batches())
        self.cut = cut

    def write(self, upstream, batches):
        written = []
        for batch in batches:
            target = self.cut(upstream["teacher"](batch["inputs"]))  # written
            written.append({**batch, "target": target})
        return written


@every_cut
def test_in_a_hand_over(cut):
    def loss(model, batch, meta_params, upstream):
        return squared(model, batch, batch["target"])

    chain = two_stages()
    student = metaopt.Stage(Network(), SGD, loss, Targets(cut), 2, seed=5)
    chain = metaopt.Chain(teacher=chain.stages["teacher"], student=student)
    path = metaopt.explain_hypergradient(chain, STUDENT, BATCH, example_weights())["logits"]
    where = "the hand-over of stage 'student'"
    if OPERATIONS[cut] == "torch.no_grad()":  # all that a hand-over writes is written under it
        (found,) = path.cuts
        assert found.where == where
        assert seen(found) == ("torch.no_grad()", line_of(Targets.write, "# written"))
    else:
        assert_cut(path, cut, OPERATIONS[cut], where, ("stage", "teacher"))
    assert "in the stage's loss, from upstream[...]" in str(path)


@every_cut
def test_in_a_meta_objective(cut):
    def objective(trained, batch, meta_params):
        return squared(lambda inputs: cut(trained["student"](inputs)), batch, batch["inputs"][:, :CLASSES])

    path = metaopt.explain_hypergradient(two_stages(), objective, BATCH, example_weights())["logits"]
    assert_cut(path, cut, OPERATIONS[cut], "the meta-objective", ("stage", "student"))


def detached_gradient(gradients):
    return {name: g.detach() for name, g in gradients.items()}  # cut


def clipped_by_a_number(gradients):
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()  # cut
    return {name: g / norm for name, g in gradients.items()}


def test_in_a_transform():
    chain = one_stage(transform=detached_gradient)
    path = metaopt.explain_hypergradient(chain, metaopt.ValidationLoss("only"), BATCH, example_weights())["logits"]
    assert path.status == "cut"
    (cut,) = path.cuts
    assert cut.where == "the transform of stage 'only'"
    assert seen(cut) == (".detach()", line_of(detached_gradient))
    assert ("meta-parameter", "logits") in cut.of

    chain = one_stage(transform=clipped_by_a_number)
    path = metaopt.explain_hypergradient(chain, metaopt.ValidationLoss("only"), BATCH, example_weights())["logits"]
    assert path.status == "partly cut"
    (cut,) = path.cuts
    assert seen(cut) == (".item()", line_of(clipped_by_a_number))


class Rate(nn.Module):
    """A learning rate and initial weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64))


def item_rate(meta_params, t):
    return {"lr": meta_params.rate.item()}  # cut


def data_bias(meta_params, upstream):
    return {"linear.bias": meta_params.bias.data}  # cut


def plain_loss(model, batch, meta_params, upstream):
    return metaopt.CrossEntropy()(model, batch, meta_params, upstream)


def test_in_overrides_and_initial_weights():
    chain = one_stage(plain_loss, overrides=item_rate, initial=data_bias)
    found = metaopt.explain_hypergradient(chain, metaopt.ValidationLoss("only"), BATCH, Rate())
    assert found.missing == ("rate", "bias")
    (rate,), (bias,) = found["rate"].cuts, found["bias"].cuts
    assert (rate.where, bias.where) == ("the overrides of stage 'only'", "the initial weights of stage 'only'")
    assert (seen(rate), seen(bias)) == ((".item()", line_of(item_rate)), (".data", line_of(data_bias)))
