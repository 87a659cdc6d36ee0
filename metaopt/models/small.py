"""Small models, an encoder-decoder of two halves, and whether a model fits the data."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderConfig, EncoderDecoderModel

from metaopt.base.errors import ConfigError
from metaopt.base.ranges import check_counts
from metaopt.models.hugging_face import FOLDER_OR_NAME, local_first, refusing


def encoder_decoder(
    vocab_size: int,
    pad_token_id: int,
    bos_token_id: int,
    eos_token_id: int,
    max_length: int,
    hidden_size: int = 64,
    num_layers: int = 1,
    num_heads: int = 4,
    intermediate_size: int = 128,
    dropout: float = 0.0,
    initializer_range: float = 0.1,
    max_target_length: int | None = None,
) -> EncoderDecoderModel:
    """Return a BERT encoder and a BERT decoder with cross-attention, freshly initialised, each of these sizes.

    Args:
        max_length, max_target_length: tokens of the longest input and of the longest answer, if it is longer.
        initializer_range: standard deviation of the initial weights. BERT's own 0.02 is meant for width 768; a width of
            64 learns faster from 0.1.

    Raises:
        ConfigError: an argument is out of range.
    """
    where = "encoder_decoder"
    check_counts(where, vocab_size=vocab_size, max_length=max_length, hidden_size=hidden_size)
    check_counts(where, num_layers=num_layers, num_heads=num_heads, intermediate_size=intermediate_size)
    if not (isinstance(initializer_range, int | float) and initializer_range > 0):
        raise ConfigError(f"{where}: initializer_range={initializer_range!r} must be a positive number")
    _check_dropout(where, dropout)
    tokens: dict[str, Any] = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    with refusing(f"{where}: num_heads={num_heads}, hidden_size={hidden_size}"):
        half = BertConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=intermediate_size,
            max_position_embeddings=max(max_length, max_target_length or 0),
            hidden_dropout_prob=float(dropout),
            attention_probs_dropout_prob=float(dropout),
            initializer_range=float(initializer_range),
            type_vocab_size=1,
            **tokens,
        )
        # No cache in a training step; generate() asks for one by itself.
        decoder = {**half.to_dict(), "is_decoder": True, "add_cross_attention": True, "use_cache": False}
        config: Any = EncoderDecoderConfig(encoder=half.to_dict(), decoder=decoder)
        halves = BertModel(config.encoder, add_pooling_layer=False), BertLMHeadModel(config.decoder)
    return _with_tokens(where, EncoderDecoderModel(config, *halves), tokens)


def pretrained_encoder_decoder(
    encoder: str, pad_token_id: int, bos_token_id: int, eos_token_id: int, decoder: str | None = None
) -> EncoderDecoderModel:
    """Return an encoder-decoder whose two halves are loaded from folders or the hub, with new cross-attention."""
    decoder = encoder if decoder is None else decoder
    with refusing(f"pretrained_encoder_decoder: cannot load {encoder=}, {decoder=}: {FOLDER_OR_NAME}"):
        model: Any = local_first(EncoderDecoderModel.from_encoder_decoder_pretrained, encoder, decoder)
    if "add_pooling_layer" in inspect.signature(type(model.encoder).__init__).parameters:
        model.encoder.pooler = None  # its output is never read
    tokens = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    return _with_tokens("pretrained_encoder_decoder", model, tokens)


def _with_tokens(where: str, model: Any, tokens: Mapping[str, Any]) -> EncoderDecoderModel:
    """Tell the model, and its `generate`, the tokens that begin, end and fill an answer."""
    vocab_size = model.config.decoder.vocab_size
    for name, token in tokens.items():
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ConfigError(f"{where}: {name}={token!r} must be a token of the vocabulary, 0 to {vocab_size - 1}")
    for config in (model.config, model.generation_config):
        for name, token in tokens.items():
            setattr(config, name, token)
        config.decoder_start_token_id = tokens["bos_token_id"]
    return model


def _check_dropout(where: str, dropout: float) -> None:
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise ConfigError(f"{where}: dropout={dropout!r} must lie between 0 and 1 (1 excluded)")


class MLP(nn.Module):
    """A multi-layer perceptron; without `hidden_sizes` a linear model, with `dropout` after each hidden layer.

    It has GELUs, since their second derivative is not zero almost everywhere as that of ReLU is.
    """

    def __init__(
        self, num_features: int, hidden_sizes: Sequence[int] = (64,), num_labels: int = 10, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_counts("MLP", num_features=num_features, num_labels=num_labels)
        check_counts("MLP", **{f"hidden_sizes[{i}]": size for i, size in enumerate(hidden_sizes)})
        _check_dropout("MLP", dropout)
        self.num_features, self.num_labels = num_features, num_labels
        widths = [num_features, *hidden_sizes]
        self.layers = nn.Sequential()
        for before, after in pairwise(widths):
            self.layers.extend([nn.Linear(before, after), nn.GELU(), nn.Dropout(dropout)])
        self.layers.append(nn.Linear(widths[-1], num_labels))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits [B, C] of inputs [B, F]."""
        return self.layers(inputs)


def check_fits(model: nn.Module, facts: Mapping[str, Any], stage_name: str) -> None:
    """Raise a ConfigError where a stage's model cannot take the data: vocabulary, length, features or labels."""
    config = getattr(model, "config", None)
    encoder, decoder = getattr(config, "encoder", config), getattr(config, "decoder", config)
    for part, name, fact, fits in (
        (encoder, "vocab_size", "vocab_size", operator.ge),
        (encoder, "max_position_embeddings", "max_length", operator.ge),
        (decoder, "vocab_size", "vocab_size", operator.ge),
        (decoder, "max_position_embeddings", "max_target_length", operator.ge),
        (model, "num_features", "num_features", operator.eq),
        (model, "num_labels", "num_labels", operator.eq),
    ):
        has, needs = getattr(part, name, None), facts.get(fact)
        if isinstance(has, int) and needs is not None and not fits(has, needs):
            raise ConfigError(
                f"stage {stage_name!r}: the model's {name} is {has}, and the data need {fact}={needs}; build it "
                f"with {name}={needs} (in a config: ${{facts.{fact}}}), or give the data this model's tokenizer"
            )
