"""What the library works around, each beside the thing itself, so that the day it is no longer needed shows."""

from __future__ import annotations

from typing import Any, cast

import higher
import pytest
import torch
import torch.nn.functional as F
from networks import bert2bert
from small import (
    ADAM,
    SGD,
    example_weights,
    feature_batches,
    inputs_of,
    module_state,
    one_stage,
    text_batch,
    trained_model,
)
from small_models import FEATURES, Linear, Network, Recomputing, TwoNames, llama
from torch import Tensor

import metaopt
from metaopt.estimators import Checkpointed, Unrolled

# --- `higher` alone


def test_higher_alone_still_fails_on_module_list_slices():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'root'"):
        higher.monkeypatch(llama())(**inputs_of(text_batch(decoder=False)))
    assert (
        trained_model(llama(), text_batch(decoder=False))(**inputs_of(text_batch(decoder=False)))
        .logits.isfinite()
        .all()
    )


def test_higher_alone_still_drops_hooks_and_with_them_hidden_states():
    model, inputs = bert2bert(), inputs_of(text_batch())
    output = higher.monkeypatch(model)(**inputs, output_hidden_states=True)
    assert output.decoder_hidden_states is None
    assert trained_model(model, text_batch())(**inputs, output_hidden_states=True).decoder_hidden_states is not None


def test_higher_alone_still_has_another_adam():
    """Epsilon is added before the bias correction."""
    model: Any = Linear()
    batch = feature_batches(1)[0]
    adam = torch.optim.Adam(model.parameters(), lr=0.1, eps=0.1)
    with higher.innerloop_ctx(model, adam) as opened:
        fast, diffopt = cast(Any, opened)
        diffopt.step(F.cross_entropy(fast(batch["inputs"]), batch["labels"]))
        theirs = fast.linear.weight.detach().clone()
    chain = one_stage(metaopt.CrossEntropy(), [batch], model=model, optimizer=adam, num_steps=1)
    ours = chain.unroll(example_weights())["only"].params["linear.weight"]
    F.cross_entropy(model(batch["inputs"]), batch["labels"]).backward()
    adam.step()
    assert torch.allclose(ours, model.linear.weight, rtol=0, atol=1e-14)
    assert float((theirs - model.linear.weight).detach().abs().max()) > 1e-2


def test_higher_alone_still_copies_buffers_in_but_not_back():
    model = Network(batch_norm=True)
    with higher.innerloop_ctx(model, SGD(model.parameters())) as (fast, diffopt):
        diffopt.step(fast(feature_batches(1)[0]["inputs"]).sum())
    assert int(model.norm.num_batches_tracked) == 0
    chain = one_stage(model=model, num_steps=1)
    chain.commit(chain.unroll(example_weights()))
    assert int(model.norm.num_batches_tracked) == 1


# --- torch alone


def test_functional_call_alone_still_corrupts_a_submodule_of_two_names():
    model = TwoNames()
    before = module_state(model)
    fast = {name: p + 1 for name, p in model.named_parameters()}
    torch.func.functional_call(model, fast, (torch.ones(2, FEATURES, dtype=torch.float64),))
    assert not torch.equal(model.encoder.weight, before["params"]["encoder.weight"])


def test_fused_attention_alone_still_has_no_second_derivative():
    model = bert2bert().eval()
    used = [p for n, p in model.named_parameters() if "embeddings.weight" in n]
    scores = model(**inputs_of(text_batch())).logits
    squares = [g.square().sum() for g in torch.autograd.grad(scores.square().sum(), used[:1], create_graph=True)]
    with pytest.raises(RuntimeError, match=r"derivative for .*scaled_dot_product.* is not implemented"):
        torch.autograd.grad(squares, used[:1])


@pytest.mark.parametrize("estimator", [Unrolled(), Checkpointed()], ids=["unrolled", "checkpointed"])
def test_attention_in_eval_mode_is_differentiated_twice(estimator):
    """The same hypergradient as with the model's own eager attention, which is elementwise and needs no kernel."""

    def in_eval_mode(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return metaopt.WeightedLoss()(model.eval(), batch, meta_params, upstream)

    found = []
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        model: Any = bert2bert()
        weights = example_weights(4)
        for part in (model.encoder, model.decoder):
            part.set_attn_implementation(attention)
        chain = one_stage(in_eval_mode, [text_batch()], model=model, optimizer=ADAM, estimator=estimator)
        meta_loss = metaopt.ValidationLoss("only")(chain.unroll(weights), text_batch(1), weights)
        found.append(metaopt.hypergradient(meta_loss, weights)["logits"])
    assert found[0].norm() > 1e-6
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-12)


def test_checkpointing_alone_is_still_wrong_inside_functional_call():
    """It recomputes after the swap is undone: a gradient at the wrong weights."""
    model = Recomputing()
    fast = {name: (p + 1).detach().requires_grad_() for name, p in model.named_parameters()}
    inputs = feature_batches(1)[0]["inputs"]
    wrong, right = (
        torch.autograd.grad(torch.func.functional_call(m, fast, (inputs,)).square().sum(), list(fast.values()))
        for m in (model, model.without())
    )
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(wrong, right, strict=True))
