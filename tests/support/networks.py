"""The small models of the problems."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

VOCABULARY, LENGTH = 11, 5


class Gained(nn.Module):
    """tanh network times a scalar (0-dim) parameter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.gain = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.first, self.last = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 1, dtype=torch.float64)
        for parameter in (*self.first.parameters(), *self.last.parameters()):
            parameter.data.normal_(std=0.5, generator=generator)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.gain * self.last(self.first(inputs).tanh())


class Convolution(nn.Module):
    """Features [B, 16] as a 4 × 4 picture → one convolution → class scores; optionally batch norm and dropout."""

    def __init__(self, num_labels: int, batch_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3)
        self.normalise = nn.BatchNorm2d(3) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(12, num_labels)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.normalise(self.convolution(inputs.view(-1, 1, 4, 4)))
        return self.last(self.dropout(F.gelu(hidden).flatten(1)))


class Perceptron(nn.Module):
    """One hidden layer of 6 GELU units."""

    def __init__(self, num_features: int, num_labels: int, dropout: float = 0.0) -> None:
        super().__init__()
        layers = [nn.Linear(num_features, 6), nn.GELU(), nn.Dropout(dropout), nn.Linear(6, num_labels)]
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def bert2bert(dropout: float = 0.0) -> EncoderDecoderModel:
    """An encoder-decoder of hidden size 8 with one layer each, its output embeddings tied to its input ones."""
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.3,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**options), BertConfig(**options))
    return EncoderDecoderModel(config).double()
