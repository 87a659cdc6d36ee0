"""A pipeline from a forum: M1 trained with losses scaled by A, M2 on what M1 makes, A by M2's validation loss.

Its author asked how to multiply `dL3/dW · d²L2/dW dWo · d²L1/dWo dA`, met shapes that do not fit, a `no_grad` update
that cut the graph and an `argmax`, and ended with a finite difference. Here the same tensors and losses are a chain of
two stages, and one backward gives the gradient. Changed: the attention masks are ones (all zeros mask every position),
dropout is off (the author's models were in eval mode), and the models are small and not downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.core.contracts import InnerLoss, MetaObjective, Trained, Upstream
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.view import FunctionalModel
from metaopt.data.bundle import STREAMS, DataBundle
from metaopt.losses.distillation import FromUpstream
from metaopt.meta_params.tables import MetaParameters

VOCABULARY = 32


def data() -> DataBundle:
    """Return the author's toy tensors: one batch of two examples, the same in every stream."""
    ones = torch.ones(2, 2, dtype=torch.long)
    batch = {
        "input_ids": torch.tensor([[1, 2], [3, 4]]),
        "attention_mask": ones,
        "decoder_input_ids": torch.tensor([[3, 1], [4, 2]]),
        "decoder_attention_mask": ones,
        "index": torch.arange(2),
    }
    facts = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    facts |= {"max_length": 8, "max_target_length": 8, "num_examples": 2}
    streams: dict[str, Any] = {name: [batch] for name in STREAMS}
    return DataBundle(**streams, facts=facts)


def score(logits: Tensor, target: Tensor) -> Tensor:
    """Return the author's loss of each example [B]: `Σ log_softmax(z) − Σ y`; the second term moves no gradient."""
    return torch.log_softmax(logits, dim=2).sum((1, 2)) - target.sum(1)


def inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the models receive."""
    return {name: value for name, value in batch.items() if name != "index"}


class GlobalScale(MetaParameters):
    """A as the author has it, `rand(2)`: every entry scales the whole loss, so that all its hypergradients agree."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.rand(2))

    def forward(self, losses: Tensor) -> Tensor:
        """Return `Σ_k A_k · Σ_i ℓ_i`, a scalar."""
        return (losses.sum() * self.A).sum()


class ExampleScale(GlobalScale):
    """One entry of A per example: `Σ_i A_i ℓ_i`; the entries of its hypergradient differ."""

    def forward(self, losses: Tensor) -> Tensor:
        """Return `Σ_i A_i ℓ_i`, a scalar."""
        return (losses * self.A).sum()


class Step1(InnerLoss):
    """M1's loss: the author's expression, scaled by A."""

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        scale: Any = meta_params  # one module: GlobalScale or ExampleScale
        return scale(score(model(**inputs(batch)).logits, batch["decoder_input_ids"]))


class Step2(FromUpstream):
    """M2's loss: it is fed M1's last decoder hidden states, the path to A; its target is M1's argmax, which carries no
    gradient and only shifts the loss by a constant."""

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        tokens = batch["input_ids"]
        made = self.teacher(upstream)(input_ids=tokens, decoder_input_ids=tokens, output_hidden_states=True)
        labels = made.logits.argmax(dim=2)
        output = model(input_ids=tokens, decoder_inputs_embeds=made.decoder_hidden_states[-1])
        return score(output.logits, labels).sum()


class Step3(MetaObjective):
    """A's loss: the author's expression on validation data, by the trained M2, which is called `stage`."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.reads = (stage,)

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        return score(trained[self.stage](**inputs(batch)).logits, batch["decoder_input_ids"]).sum()
