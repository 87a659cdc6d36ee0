"""Trained models as a user holds them: their own methods, their graph, and what they leave behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from networks import bert2bert
from small import (
    assert_same,
    cross_entropy,
    example_weights,
    feature_batches,
    meta_loss,
    module_state,
    one_stage,
    plain_copy,
    tensors_of,
    text_batch,
    trained_model,
)
from small_models import Fails, Network, Recurrent

import metaopt

# --- what a failure leaves behind


def test_an_exception_inside_forward_restores_the_module():
    model = Fails()
    before, random = module_state(model), torch.get_rng_state()
    fast = one_stage(cross_entropy, model=model).unroll(example_weights())["only"]
    kept = {n: b.clone() for n, b in fast.buffers.items()}
    model.fail = True
    with pytest.raises(ArithmeticError, match="in the middle"):
        one_stage(cross_entropy, model=model).unroll(example_weights())
    with pytest.raises(ArithmeticError, match="in the middle"):
        fast.train()(feature_batches()[0]["inputs"])
    with pytest.raises(KeyError, match="user's"), fast.as_module():
        raise KeyError("user's")
    assert_same(module_state(model), before)
    assert_same(fast.buffers, kept)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_restored_lstm_uses_its_own_weights_again():
    model, batch = Recurrent(), feature_batches(1)[0]
    expected = model(batch["inputs"]).detach()
    fast = trained_model(model, batch)
    assert not torch.equal(fast(batch["inputs"]), expected)
    assert all(a is b for a, b in zip(model.lstm._flat_weights, model.lstm.parameters(), strict=True))
    assert torch.equal(model(batch["inputs"]), expected)


# --- the module's own methods


def test_generate_uses_the_trained_weights_and_restores():
    model: Any = bert2bert()
    batch = text_batch()
    model.generation_config.decoder_start_token_id = 1
    model.generation_config.pad_token_id = 0
    before = module_state(model)
    fast = trained_model(model, batch, num_steps=6)
    plain: Any = plain_copy(model, fast).eval()
    options = {"max_new_tokens": 4, "num_beams": 1, "do_sample": False}
    with fast.as_module() as module:
        assert module is model
        assert not module.training
        inside = dict(module.named_parameters())
        assert all(inside[name] is tensor for name, tensor in fast.params.items())
        found = model.generate(batch["input_ids"], **options)
    assert torch.equal(found, plain.generate(batch["input_ids"], **options))
    assert not torch.equal(found, model.eval().generate(batch["input_ids"], **options))
    model.train()
    assert_same(module_state(model), before)


def test_as_module_stays_in_the_graph():
    weights = example_weights()
    outcome = one_stage(model=Network()).unroll(weights)
    with outcome["only"].as_module() as module:
        first: Any = module.first
        hidden = first(feature_batches()[0]["inputs"])
    metaopt.backward(hidden.square().mean(), weights)
    assert weights.logits.grad is not None
    assert weights.logits.grad.abs().sum() > 0


def test_a_trained_model_says_how_to_reach_the_modules_attributes():
    fast = trained_model(Network(), feature_batches(1)[0])
    with pytest.raises(AttributeError, match=r"'device'.*as_module\(\) as module: module.device"):
        _ = fast.device
    assert fast.config is None
    assert trained_model(bert2bert(), text_batch()).config.is_encoder_decoder
    assert not hasattr(fast, "generate")
    assert "Network" in repr(fast)
    assert "eval" in repr(fast)
    assert "train" in repr(fast.train())


def test_detach_leaves_the_graph():
    fast = trained_model(Network(), feature_batches(1)[0])
    assert all(p.requires_grad for p in fast.params.values())
    alone = fast.detach()
    assert not any(p.requires_grad for p in alone.params.values())
    assert_same({n: p.detach() for n, p in fast.params.items()}, alone.params)
    assert all(p.requires_grad for p in fast.params.values())


def patched() -> set[int]:
    """Ids of the modules that higher has patched and that are alive; other tests may have left some."""
    gc.collect()
    return {id(o) for o in gc.get_objects() if type(o).__name__.startswith("Functional_")}


def test_nothing_of_an_unroll_outlives_it():
    chain, before = one_stage(model=Network()), patched()
    outcome = chain.unroll(example_weights())
    weight = weakref.ref(outcome["only"].params["first.weight"])
    gc.collect()
    gc.disable()  # the weights go with the outcome; only higher's classes wait for the collector
    try:
        del outcome
        assert weight() is None
    finally:
        gc.enable()
    assert not patched() - before
    assert_same(tensors_of(chain.unroll(example_weights())), tensors_of(chain.unroll(example_weights())))


def test_a_frozen_parameter_that_the_user_moves_later_changes_nothing_of_an_unroll():
    """What reads it again is an error: see test_frozen.py."""
    model, weights = Network(), example_weights()
    model.first.requires_grad_(False)
    chain = one_stage(model=model)
    loss, expected = meta_loss(chain, weights), metaopt.hypergradient(meta_loss(chain, weights), weights)
    with torch.no_grad():
        model.first.weight.add_(1.0)
    assert_same(metaopt.hypergradient(loss, weights), expected)
