"""Any Hugging Face model: what a config gives it, what is loaded, what is trained, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import nn

from metaopt.app.config import prepare, with_facts
from metaopt.base.errors import ConfigError
from metaopt.losses.decoding import greedy_decode
from metaopt.models.hugging_face import adapt, from_config, from_pretrained

TOKENS: dict[str, Any] = {"vocab_size": 11, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
FACTS = {**TOKENS, "max_length": 9, "max_target_length": 12, "num_labels": 3, "num_examples": 8, "num_sources": 2}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def t5(**options: Any) -> Any:
    return from_config("seq2seq", "t5", T5, **{**TOKENS, **options})


def bert(**options: Any) -> Any:
    return from_config("classification", "bert", BERT, vocab_size=11, num_labels=3, **options)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- from a config ----------------------------------------------------------------------------------------------


def test_the_data_say_what_the_model_must_know() -> None:
    model = from_config("seq2seq", "bart", {"d_model": 16}, **TOKENS, max_length=9, max_target_length=12)
    config: Any = model.config
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (11, 3, 2)
    assert config.decoder_start_token_id == config.bos_token_id == 1
    assert config.max_position_embeddings == 12
    assert not config.use_cache
    explicit: Any = from_config("seq2seq", "bart", {"d_model": 16, "max_position_embeddings": 40}, **TOKENS)
    assert explicit.config.max_position_embeddings == 40


def test_roberta_counts_positions_from_behind_its_filler() -> None:
    model = from_config("masked", "roberta", BERT, **TOKENS, max_length=9)
    longest = torch.full((1, 9), 5)
    assert model(input_ids=longest).logits.shape == (1, 9, 11)
    with pytest.raises(RuntimeError, match="out of bounds"):
        model(input_ids=torch.full((1, 10), 5))


@pytest.mark.parametrize("max_new", [3, 6])
def test_generate_and_our_greedy_decoding_agree(max_new: int) -> None:
    torch.manual_seed(3)
    model: Any = from_config("seq2seq", "t5", {**T5, "tie_word_embeddings": False}, **TOKENS).eval()
    nn.init.normal_(model.lm_head.weight)
    ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
    found = greedy_decode(model, ids, torch.ones_like(ids), bos=1, eos=2, pad=3, max_length=max_new)
    theirs = model.generate(ids, max_new_tokens=max_new, do_sample=False, num_beams=1)[:, 1:]
    assert torch.equal(found[:, : theirs.shape[1]], theirs)
    assert len(set(found.flatten().tolist())) > 1


PRESETS = ("t5", "bart", "gpt2", "llama", "bert_classifier", "vit")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_from_the_facts(preset: str) -> None:
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        overrides = [f"model={preset}", "model.freeze=['*embed*']" if preset != "gpt2" else "model.freeze=['*wte*']"]
        if preset == "t5":
            overrides[1] = "model.freeze=[shared.weight]"
        config = with_facts(prepare(compose("config", overrides=overrides), overrides), FACTS)
    model = instantiate(config.stages.teacher.model, _convert_="all")()
    sizes = sum(parameter.numel() for parameter in model.parameters())
    assert 1e4 < sizes < 3e5
    assert 0 < len(trained_names(model)) < len(list(model.parameters()))


def test_any_family_takes_what_facts_there_are() -> None:
    overrides = ["model=from_config", "model.kind=causal", "model.model_type=qwen2"]
    overrides.append(
        "model.config={hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8}"
    )
    overrides.append("+model.config.num_key_value_heads=1")
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        facts = {name: value for name, value in FACTS.items() if name != "num_labels"}
        config = with_facts(prepare(compose("config", overrides=overrides), overrides), facts)
    node = config.stages.teacher.model
    assert node.num_labels is None
    assert instantiate(node, _convert_="all")().config.vocab_size == 11


# --- pretrained -------------------------------------------------------------------------------------------------


def test_a_model_from_a_folder(tmp_path: Path) -> None:
    saved = t5().to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    model: Any = from_pretrained("seq2seq", str(tmp_path), bos_token_id=1)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, saved.get_parameter(name).float())
    assert not model.config.use_cache
    with pytest.raises(ConfigError, match=r"begins its answers with token 1, and the data begin theirs with token 0"):
        from_pretrained("seq2seq", str(tmp_path), bos_token_id=0)


def test_a_new_head_on_a_pretrained_model(tmp_path: Path) -> None:
    saved: Any = from_config("masked", "bert", BERT, vocab_size=11)
    saved.save_pretrained(tmp_path)
    model: Any = from_pretrained("classification", str(tmp_path), num_labels=4)
    assert model.classifier.out_features == 4


def test_a_filler_is_given_to_a_model_without_one(tmp_path: Path) -> None:
    saved: Any = from_config("causal", "gpt2", {"n_embd": 8, "n_layer": 1, "n_head": 2}, vocab_size=11)
    saved.save_pretrained(tmp_path)
    model: Any = from_pretrained("classification", str(tmp_path), num_labels=2, pad_token_id=10)
    assert model(input_ids=torch.tensor([[1, 2, 10], [1, 2, 3]])).logits.shape == (2, 2)


# --- what is trained --------------------------------------------------------------------------------------------


def test_freezing_by_name() -> None:
    everything = trained_names(bert())
    frozen = trained_names(bert(freeze=["*embeddings*", "bert.encoder.layer.0.*"]))
    assert everything - frozen == {n for n in everything if "embeddings" in n or "layer.0" in n}
    assert trained_names(bert(freeze=["*"], unfreeze=["classifier.*"])) == {"classifier.weight", "classifier.bias"}


def test_lora_trains_adapters_alone() -> None:
    pytest.importorskip("peft")
    names = trained_names(t5(lora={"r": 2}))
    assert names
    assert all("lora_" in name for name in names)
    head = trained_names(bert(lora={"r": 2})) - {name for name in trained_names(bert(lora={"r": 2})) if "lora_" in name}
    assert head
    assert all("classifier" in name for name in head)


def test_lora_of_pictures_trains_the_head_too() -> None:
    pytest.importorskip("peft")
    sizes = {**BERT, "image_size": 8, "patch_size": 4, "num_channels": 1}
    lora = {"r": 2, "target_modules": ["q_proj", "query"]}
    names = trained_names(from_config("image_classification", "vit", sizes, num_labels=3, lora=lora))
    assert any("lora_" in name for name in names)
    assert any("classifier" in name for name in names)


# --- what is refused --------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown kind": ({"kind": "seq2sec"}, r"no kind of model 'seq2sec' \(did you mean 'seq2seq'\?\)"),
    "an unknown family": ({"model_type": "brat"}, r"no model_type 'brat' \(did you mean 'bert'\?\)"),
    "an unknown option": ({"config": {"hidden_sise": 8}}, r"no option 'hidden_sise' \(did you mean 'hidden_size'\?\)"),
    "sizes that do not fit": ({"config": {**BERT, "num_attention_heads": 3}}, "hidden size .8. is not a multiple"),
    "a family without that head": ({"kind": "seq2seq"}, "no seq2seq model of type 'bert'"),
    "a pattern of nothing": ({"freeze": ["encodr.*"]}, "freeze: no parameter is called 'encodr.*'; names are such as"),
    "a pattern that is no list": ({"freeze": "*"}, r"freeze='\*' must be a list of patterns"),
    "nothing left to train": ({"freeze": ["*"]}, "leaves no parameter to train"),
    "exceptions from nothing": ({"unfreeze": ["classifier.*"]}, "freeze, which is empty"),
    "lora and freezing": ({"lora": {"r": 2}, "freeze": ["*"]}, "lora trains the adapters alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_clear_message(case: str) -> None:
    options, message = REFUSED[case]
    given = {"kind": "classification", "model_type": "bert", "config": BERT, "vocab_size": 11, **options}
    with pytest.raises(ConfigError, match=message):
        from_config(**given)


@pytest.mark.parametrize(
    ("lora", "message"),
    [({"rank": 2}, "lora: .*'rank'"), ({"r": 2, "target_modules": ["nowhere"]}, "lora: No modules were targeted")],
)
def test_what_peft_does_not_take(lora: dict[str, Any], message: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=message):
        adapt(bert(), "classification", lora=lora)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"lora needs the package peft: pip install 'metaopt-chain\[lora\]'"):
        adapt(bert(), "classification", lora={"r": 2})


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load a causal model from '\./nowhere'"):
        from_pretrained("causal", "./nowhere")
    bert().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot load a seq2seq model"):
        from_pretrained("seq2seq", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot load a classification model"):
        from_pretrained("classification", str(tmp_path), num_labels=5)


def test_a_name_that_is_not_here_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    from huggingface_hub import constants

    asked: list[tuple[str, float]] = []

    def nobody(address: str, timeout: float) -> None:
        asked.append((address, timeout))
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", nobody)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match=r"'nowhere/at-all'.*neither a folder here nor downloaded.*does not answer"):
        from_pretrained("causal", "nowhere/at-all")
    assert [timeout for _, timeout in asked] == [10]
    assert constants.HF_HUB_OFFLINE is False
