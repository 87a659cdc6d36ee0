"""Small models in float64, each hard to train on a copy in a way of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, Qwen3MoeConfig

FEATURES, CLASSES = 4, 3


class Network(nn.Module):
    """One hidden layer, with dropout and batch norm if asked."""

    norm: Any

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        # Before batch norm a bias has the gradient 0, but for rounding, which Adam would blow up.
        self.first = nn.Linear(FEATURES, 6, bias=not batch_norm)
        self.norm = nn.BatchNorm1d(6) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(6, CLASSES)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(self.first(inputs)).tanh()))


class Linear(nn.Module):
    """The smallest model: class scores of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs)


class TwoNames(nn.Module):
    """One submodule reached by two names, as after `decoder.set_input_embeddings(encoder's)`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, FEATURES)
        self.decoder = self.encoder
        self.last = nn.Linear(FEATURES, CLASSES)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.decoder(self.encoder(inputs).tanh()))


class Tied(nn.Module):
    """One weight used by two layers, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, CLASSES, bias=False)
        self.again = nn.Linear(FEATURES, CLASSES)
        self.again.weight = self.up.weight
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.again(self.up(inputs).tanh() @ self.up.weight)


class Recurrent(nn.Module):
    """An LSTM over the features as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.last = nn.Linear(3, CLASSES)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.lstm(inputs.view(-1, 2, 2))[0][:, -1])


class Fails(Linear):
    """Raises in the middle of its forward, after it has moved a buffer, once `fail` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES, dtype=torch.float64)
        self.fail = False

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(inputs)
        if self.fail:
            raise ArithmeticError("in the middle")
        return super().forward(hidden)


class Recomputing(Network):
    """Recomputes its first layer during the backward."""

    recompute = True

    def forward(self, inputs: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return self.first(x).tanh()

        hidden = checkpoint(body, inputs, use_reentrant=False) if self.recompute else body(inputs)
        return self.last(hidden)

    def without(self) -> Recomputing:
        """The same model, recomputing nothing."""
        other = copy.deepcopy(self)
        other.recompute = False
        return other


def llama() -> LlamaForCausalLM:
    """One layer of Llama: slices a `ModuleList`, holds buffers that no checkpoint has."""
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).double()


class SinglePrecision(nn.Module):
    """A linear layer whose kernel takes float32 alone."""

    def __init__(self, num_features: int, num_labels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_labels)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dtype != torch.float32:
            raise RuntimeError("expected a Float32 matrix")
        return self.linear(inputs)


EXPERTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Mixtral": (MixtralConfig, {"num_local_experts": 3}),
    "Qwen3-MoE": (Qwen3MoeConfig, {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
}


def mixture_of_experts(family: str) -> nn.Module:
    """One layer, float32, its experts run by the kernel that transformers chooses."""
    kind, more = EXPERTS[family]
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return AutoModelForCausalLM.from_config(kind(**sizes, **heads, **more))
