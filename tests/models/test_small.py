"""Model builders, and the check that a model fits the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, EncoderDecoderModel

from metaopt import ConfigError
from metaopt.core.view import FunctionalModel, ModelStructure
from metaopt.losses.decoding import evaluating, greedy_decode
from metaopt.models.small import MLP, check_fits, encoder_decoder, pretrained_encoder_decoder

TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TINY: dict[str, Any] = {**TOKENS, "vocab_size": 30, "max_length": 9, "hidden_size": 16, "intermediate_size": 24}
FACTS: dict[str, Any] = {**TOKENS, "vocab_size": 30, "max_length": 9, "max_target_length": 5}


def tiny(**changes: Any) -> EncoderDecoderModel:
    return encoder_decoder(**{**TINY, **changes})


def talkative() -> Any:
    """A random model whose answers differ from input to input and end at different lengths."""
    torch.manual_seed(0)
    model: Any = tiny(initializer_range=0.5, hidden_size=64).eval()
    nn.init.normal_(model.decoder.cls.predictions.bias, std=0.5)
    return model


def inputs(count: int = 4) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, 30, (count, 9), generator=torch.Generator().manual_seed(0))
    input_ids[0, 5:] = 0
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


# --- encoder-decoders -------------------------------------------------------------------------------------------


def test_the_encoder_decoder_is_two_berts_with_cross_attention_and_no_pooler() -> None:
    model: Any = tiny(num_layers=2)
    names = dict(model.named_parameters())
    assert not any("pooler" in name for name in names)
    assert any("crossattention" in name for name in names)
    assert (model.config.encoder.num_hidden_layers, model.config.decoder.num_hidden_layers) == (2, 2)
    logits = model(**inputs(), decoder_input_ids=torch.ones(4, 5, dtype=torch.int64)).logits
    assert logits.shape == (4, 5, 30)


def test_every_parameter_of_the_encoder_decoder_gets_a_gradient() -> None:
    model = tiny()
    model(**inputs(), decoder_input_ids=torch.ones(4, 5, dtype=torch.int64)).logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_initial_weights_have_the_asked_spread() -> None:
    for spread in (0.02, 0.3):
        weight = dict(tiny(initializer_range=spread).named_parameters())[
            "encoder.encoder.layer.0.intermediate.dense.weight"
        ]
        assert float(weight.detach().std()) == pytest.approx(spread, rel=0.15)


def test_generate_and_greedy_decoding_agree() -> None:
    model = talkative()
    given = inputs(32)
    answers = greedy_decode(model, **given, bos=1, eos=2, pad=0, max_length=6)
    generated = model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=1)[:, 1:]
    wanted = nn.functional.pad(generated, (0, 6 - generated.shape[1]), value=0)
    assert answers.tolist() == wanted.tolist()
    assert len(answers.unique(dim=0)) > 10
    assert (answers == 0).any()  # some answers end early


def test_a_module_and_a_plain_call_of_it_decode_the_same() -> None:
    model = talkative()
    options = {**inputs(8), "bos": 1, "eos": 2, "pad": 0, "max_length": 6}
    assert torch.equal(greedy_decode(model, **options), greedy_decode(lambda **batch: model(**batch), **options))


def test_a_trained_model_is_evaluated_with_its_own_weights_in_eval_mode() -> None:
    module = tiny(dropout=0.5).train()
    structure = ModelStructure(module)
    other = {name: torch.randn_like(p) for name, p in structure.params.items()}
    trained = FunctionalModel(structure, other, dict(structure.buffers), training=True)
    with evaluating(trained) as lent:
        assert isinstance(lent, nn.Module)
        assert not lent.training
        assert not torch.is_grad_enabled()
        assert all(p is other[name] for name, p in structure.params.items())
    assert module.training
    assert all(p is not other[name] for name, p in structure.params.items())


def test_evaluating_puts_the_mode_of_every_submodule_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[1].eval()

    def fail() -> None:
        with evaluating(model):
            assert not model[0].training
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_whole_numbers_serve_where_a_fraction_is_asked_for() -> None:
    model: Any = tiny(dropout=0, initializer_range=1)
    assert model.config.encoder.hidden_dropout_prob == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3, hidden_size=16: .* not a multiple"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": "much"}, "dropout='much'"),
        ({"initializer_range": 0.0}, "initializer_range=0.0 must be a positive number"),
        ({"bos_token_id": 30}, "bos_token_id=30 must be a token of the vocabulary, 0 to 29"),
        ({"eos_token_id": None}, "eos_token_id=None"),
    ],
)
def test_bad_sizes_of_an_encoder_decoder_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**options)


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_pretrained_halves_are_loaded_from_a_folder(bert_folder: Path) -> None:
    model: Any = pretrained_encoder_decoder(str(bert_folder), **TOKENS)
    saved, loaded = BertModel.from_pretrained(bert_folder), dict(model.named_parameters())
    embeddings = saved.embeddings.word_embeddings.weight
    assert torch.equal(loaded["encoder.embeddings.word_embeddings.weight"], embeddings)
    assert torch.equal(loaded["decoder.bert.embeddings.word_embeddings.weight"], embeddings)
    assert any("crossattention" in name for name in loaded)
    assert not any("pooler" in name for name in loaded)
    assert model.config.decoder_start_token_id == TOKENS["bos_token_id"]
    check_fits(model, FACTS, "teacher")
    assert model.generate(**inputs(), max_new_tokens=3).shape[0] == 4


def test_a_missing_folder_is_named(tmp_path: Path, bert_folder: Path) -> None:
    missing = str(tmp_path / "no_such_folder")
    with pytest.raises(ConfigError, match=r"encoder=.*no_such_folder.*save_pretrained"):
        pretrained_encoder_decoder(missing, **TOKENS)
    with pytest.raises(ConfigError, match=r"decoder=.*no_such_folder"):
        pretrained_encoder_decoder(str(bert_folder), **TOKENS, decoder=missing)


def test_tokens_outside_a_loaded_vocabulary_are_refused(bert_folder: Path) -> None:
    with pytest.raises(ConfigError, match="eos_token_id=99"):
        pretrained_encoder_decoder(str(bert_folder), **{**TOKENS, "eos_token_id": 99})


# --- multi-layer perceptrons ------------------------------------------------------------------------------------


def test_an_mlp_maps_features_to_logits() -> None:
    model = MLP(num_features=6, hidden_sizes=(5, 4), num_labels=3)
    assert model(torch.zeros(7, 6)).shape == (7, 3)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [(5, 6), (4, 5), (3, 4)]


def test_an_mlp_without_hidden_layers_is_linear() -> None:
    model = MLP(num_features=6, hidden_sizes=(), num_labels=3)
    a, b = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(a + b) + model(torch.zeros(2, 6)), model(a) + model(b))


def test_the_mlps_dropout_acts_in_train_mode_only() -> None:
    model = MLP(num_features=6, hidden_sizes=(50,), num_labels=3, dropout=0.5)
    x = torch.ones(2, 6)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features=0"),
        ({"num_features": 4, "hidden_sizes": (4, 0)}, r"hidden_sizes\[1\]=0"),
        ({"num_features": 4, "num_labels": -1}, "num_labels=-1"),
        ({"num_features": 4, "dropout": 1.5}, "dropout=1.5"),
    ],
)
def test_bad_sizes_of_an_mlp_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MLP(**options)


# --- does it fit ------------------------------------------------------------------------------------------------


def test_models_that_fit_pass_and_larger_ones_too() -> None:
    check_fits(tiny(), FACTS, "teacher")
    check_fits(tiny(vocab_size=40, max_length=20), FACTS, "teacher")
    check_fits(MLP(4, (3,), 2), {"num_features": 4, "num_labels": 2}, "student")
    check_fits(nn.Linear(3, 2), FACTS, "student")


@pytest.mark.parametrize(
    ("model", "facts", "message"),
    [
        (lambda: tiny(), {"vocab_size": 31}, "stage 'student': .*vocab_size is 30.*vocab_size=31"),
        (lambda: tiny(), {"max_length": 10}, "position.*9.*max_length=10"),
        (lambda: tiny(), {"max_target_length": 10}, "position.*9.*max_target_length=10"),
        (lambda: BertModel(BertConfig(vocab_size=20, hidden_size=12)), {"vocab_size": 21}, "vocab_size is 20"),
        (lambda: MLP(4, (3,), 2), {"num_features": 5}, "num_features is 4.*num_features=5"),
        (lambda: MLP(4, (3,), 2), {"num_labels": 10}, "num_labels is 2.*num_labels=10"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(model: Any, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_fits(model(), facts, "student")
