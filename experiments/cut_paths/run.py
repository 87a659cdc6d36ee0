"""Three ways in which the pipeline of the forum thread loses its gradient, and the line that each explanation names.

    python experiments/cut_paths/run.py

A scales M1's loss, M2 learns from M1, and A is to lower M2's validation loss (`metaopt/examples/forum_thread.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call

import metaopt
from metaopt.examples.forum_thread import VOCABULARY, GlobalScale, Step1, Step2, Step3, data, inputs, score
from metaopt.models.small import encoder_decoder

RATE = 1e-3


def small_model() -> Any:
    """A BERT2BERT of two small layers."""
    return encoder_decoder(
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_length=8,
        max_target_length=8,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=32,
        dropout=0.0,
        initializer_range=0.1,
    ).double()


# --- 1: M2 learns M1's argmax


def on_hard_labels(model: Any, batch: Any, meta_params: Any, upstream: Any) -> torch.Tensor:
    """M2 reads tokens, and its labels are M1's most likely ones."""
    labels = upstream["M1"](**inputs(batch)).logits.argmax(dim=2)
    log_p = model(**inputs(batch)).logits.log_softmax(-1)
    return -log_p.gather(-1, labels[..., None]).sum()


# --- 2: M1 is updated by hand, under no_grad


M1 = small_model()


def after_a_step_by_hand(model: Any, batch: Any, meta_params: Any, upstream: Any) -> torch.Tensor:
    """M1 takes its step here, before M2 learns from it."""
    weights = {name: weight.detach().requires_grad_() for name, weight in M1.named_parameters()}
    losses = score(functional_call(M1, weights, (), inputs(batch)).logits, batch["decoder_input_ids"])
    gradients = torch.autograd.grad(meta_params(losses), list(weights.values()), create_graph=True, allow_unused=True)
    with torch.no_grad():
        weights = {n: w if g is None else w - RATE * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
    soft = functional_call(M1, weights, (), inputs(batch)).logits.softmax(-1)
    return -(soft * model(**inputs(batch)).logits.log_softmax(-1)).sum()


# --- 3: A as a number


def scaled_by_a_number(model: Any, batch: Any, meta_params: Any, upstream: Any) -> torch.Tensor:
    """M1's loss, scaled by the value of A."""
    losses = score(model(**inputs(batch)).logits, batch["decoder_input_ids"])
    return losses.sum() * meta_params.A.sum().item()


def stage(loss: Any) -> metaopt.Stage:
    """Two inner steps of SGD on the author's batch."""
    return metaopt.Stage(small_model(), lambda params: torch.optim.SGD(params, lr=RATE), loss, data().train, 2)


CHAINS = {
    "M2 on M1's argmax": lambda: metaopt.Chain(M1=stage(Step1()), M2=stage(on_hard_labels)),
    "M1 updated by hand under no_grad": lambda: metaopt.Chain(M2=stage(after_a_step_by_hand)),
    "M1's loss times A.item()": lambda: metaopt.Chain(M1=stage(scaled_by_a_number), M2=stage(Step2())),
    "as it should be": lambda: metaopt.Chain(M1=stage(Step1()), M2=stage(Step2())),
}


def main() -> None:
    """Print what each chain's explanation says."""
    torch.manual_seed(0)
    batch = next(iter(data().validation))
    for title, chain in CHAINS.items():
        print(f"--- {title}\n")
        print(metaopt.explain_hypergradient(chain(), Step3("M2"), batch, GlobalScale().double()), end="\n\n")


if __name__ == "__main__":
    main()
