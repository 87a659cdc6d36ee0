"""The README's code runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

README = Path(__file__).parent.parent / "README.md"
VOCABULARY, BATCH, LENGTH = 20, 4, 6


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def bert2bert() -> EncoderDecoderModel:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    halves = [BertConfig(**sizes) for _ in range(2)]
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*halves))


def batch(start: int) -> dict[str, torch.Tensor]:
    tokens = {key: torch.randint(VOCABULARY, (BATCH, LENGTH)) for key in ("input_ids", "decoder_input_ids", "labels")}
    return {**tokens, "index": torch.arange(start, start + BATCH)}


def test_the_code_example_runs_on_an_encoder_decoder_and_moves_every_weight() -> None:
    torch.manual_seed(0)
    train_batches = [batch(0), batch(BATCH)]
    student = bert2bert()
    namespace: dict[str, Any] = {
        "train": range(2 * BATCH),
        "model1": bert2bert(),
        "model2": student,
        "train_batches": train_batches,
        "unlabelled_batches": [batch(0)],
        "validation_batches": [batch(0), batch(0)],
    }
    before = {key: value.clone() for key, value in student.state_dict().items()}
    example, trainer = code_blocks()[:2]
    exec(example, namespace)
    assert bool((namespace["weights"].logits != 0).all())
    after = student.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before), "commit carries on from the trained weights"
    exec(trainer, namespace)
    assert namespace["result"].meta_steps == 2
    namespace["weights"].zero_grad()
    exec(next(block for block in code_blocks() if "Checkpointed" in block), namespace)
    assert bool((namespace["weights"].logits.grad != 0).all())
