"""Meta-parameters: the weights they give, and how they are named and found."""

from __future__ import annotations

import math

import pytest
import torch
from small import assert_same, example_weights, feature_batches, meta_loss, one_stage, two_stages
from torch import nn

import metaopt
from metaopt.core.meta_params import Lending, as_named, named_tensors
from metaopt.meta_params.tables import select

# --- tables of weights


@pytest.mark.parametrize(
    ("table", "start"),
    [
        (metaopt.SourceWeights(4), 1.0),
        (metaopt.SourceWeights(4, "sigmoid"), 0.5),
        (metaopt.ExampleWeights(4), 0.5),
        (metaopt.ExampleWeights(4, "softmax"), 1.0),
    ],
)
def test_tables_start_alike_for_all_and_follow_their_formula(table, start):
    assert table.weights().tolist() == [start] * 4
    with torch.no_grad():
        table.logits.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    powers = [math.exp(value) for value in table.logits.tolist()]
    expected = [p / (1 + p) if table.parametrisation == "sigmoid" else 4 * p / sum(powers) for p in powers]
    assert table.weights().tolist() == pytest.approx(expected, rel=1e-6)
    batch = {table.key: torch.tensor([2, 0, 0])}
    assert table(batch).tolist() == pytest.approx([expected[2], expected[0], expected[0]], rel=1e-6)
    assert table(batch).requires_grad
    assert [name for name, _ in table.named_parameters()] == ["logits"]


def test_each_table_reads_its_own_key():
    batch = feature_batches(1)[0]
    assert metaopt.SourceWeights(2)(batch).shape == metaopt.ExampleWeights(5)(batch).shape == (5,)
    for table, key in ((metaopt.SourceWeights(2), "source"), (metaopt.ExampleWeights(5), "index")):
        with pytest.raises(metaopt.ConfigError, match=rf"reads batch\['{key}'\], .*it has: inputs, labels"):
            table({name: batch[name] for name in ("inputs", "labels")})


@pytest.mark.parametrize("index", [[0, 5], [-1, 0], [-100]])
@pytest.mark.parametrize("table", [metaopt.ExampleWeights(5), metaopt.FixedWeights(torch.ones(5))])
def test_an_index_outside_the_table_is_refused(table, index):
    with pytest.raises(metaopt.ConfigError, match=rf"has 5 weights, and batch\['index'\] runs from {min(index)} to"):
        table({"index": torch.tensor(index)})


def test_an_empty_batch_has_no_weights():
    assert metaopt.ExampleWeights(5)({"index": torch.empty(0, dtype=torch.long)}).shape == (0,)


def test_arguments_that_cannot_be_used_are_refused():
    with pytest.raises(metaopt.ConfigError, match="ExampleWeights: weights=0"):
        metaopt.ExampleWeights(0)
    with pytest.raises(metaopt.ConfigError, match=r"no parametrisation 'softmx' \(did you mean 'softmax'"):
        metaopt.SourceWeights(3, "softmx")


def test_uniform_weights_are_ones_and_nothing_to_learn():
    uniform = metaopt.Uniform()
    assert uniform(feature_batches(1)[0]).tolist() == [1.0] * 5
    assert named_tensors(uniform) == {}
    plain, weighted = (one_stage(loss).unroll(uniform).losses["only"] for loss in (metaopt.CrossEntropy(), None))
    assert_same(weighted, plain)


def test_fixed_weights_hold_a_copy_and_are_not_learned():
    mask = torch.tensor([True, False, True])
    fixed = metaopt.FixedWeights(mask, key="source")
    mask[0] = False
    assert fixed.weights().tolist() == [1.0, 0.0, 1.0]
    assert fixed({"source": torch.tensor([2, 1])}).tolist() == [1.0, 0.0]
    assert named_tensors(fixed) == {}
    learned = example_weights()
    frozen = metaopt.FixedWeights(learned.weights())
    assert not frozen.weights().requires_grad
    assert_same(
        one_stage().unroll(frozen.double()).losses["only"], one_stage().unroll(learned).losses["only"], tolerance=1e-7
    )


# --- names


class Network(metaopt.MetaParameters):
    """A weight network, with one parameter that is not learned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)


def test_names_are_dotted_and_leave_out_what_is_not_learned():
    network, table = Network(), metaopt.ExampleWeights(3)
    layers = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
    assert list(named_tensors(network)) == layers
    assert list(named_tensors({"net": network, "a": table})) == [*(f"net.{name}" for name in layers), "a.logits"]
    assert named_tensors({"a": table})["a.logits"] is table.logits
    assert list(as_named(table)) == [""]
    assert list(named_tensors(nn.ModuleDict({"a": table}))) == ["a.logits"]


def test_a_tensor_under_two_names_is_one():
    """`{"teacher": w, "student": w}`: each loss reads its own name, and the gradient counts once."""
    weights = example_weights()
    shared = {"teacher": weights, "student": weights}
    assert list(named_tensors(shared)) == ["teacher.logits"]
    chain = two_stages()
    chain.stages["teacher"].loss = metaopt.WeightedLoss("teacher")
    metaopt.backward(meta_loss(chain, shared), shared)
    assert weights.logits.grad is not None
    found = weights.logits.grad.clone()
    assert_same(found, metaopt.hypergradient(meta_loss(two_stages(), weights), weights)["logits"])


def test_selection_by_name():
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    assert select(first, None, "Reader") is first
    assert select({"only": first}, None, "Reader") is first
    assert select({"first": first, "second": second}, "second", "Reader") is second
    assert select(nn.ModuleDict({"first": first, "second": second}), "second", "Reader") is second


def test_rebinding_lends_other_tensors_and_gives_them_back():
    weights = example_weights(3)
    own = weights.logits
    other = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    with Lending({"a": weights})({"a.logits": other}):
        assert weights.logits is other
        assert torch.autograd.grad(weights.weights().sum(), other)[0].abs().sum() > 0
    assert weights.logits is own
    with pytest.raises(KeyError, match="inside"), Lending(weights)({"logits": other}):
        raise KeyError("inside")
    assert weights.logits is own
    assert isinstance(weights.logits, nn.Parameter)
