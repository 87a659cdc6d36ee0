"""Trained models: whatever the user's module is, its trained copy behaves like it, and the module is left alone."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import bert2bert
from small import (
    ADAM,
    MOMENTUM,
    SGD,
    assert_same,
    cross_entropy,
    example_weights,
    feature_batches,
    inputs_of,
    logits_of,
    module_state,
    one_stage,
    plain_copy,
    text_batch,
    trained_model,
    two_stages,
)
from small_models import Linear, Network, Recurrent, Tied, TwoNames, llama
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

import metaopt


def text_without_decoder() -> dict[str, Tensor]:
    return text_batch(decoder=False)


MODELS: dict[str, tuple[Any, Any]] = {
    "bert2bert": (bert2bert, text_batch),
    "llama": (llama, text_without_decoder),
    "batch norm and dropout": (lambda: Network(0.5, batch_norm=True), lambda: feature_batches(1)[0]),
    "two names": (TwoNames, lambda: feature_batches(1)[0]),
    "tied": (Tied, lambda: feature_batches(1)[0]),
    "lstm": (Recurrent, lambda: feature_batches(1)[0]),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in eval mode with one submodule in train mode, and a batch for it."""
    torch.manual_seed(0)
    model, batch = (make() for make in MODELS[request.param])
    list(model.eval().modules())[-1].train()
    return model, batch


# --- the same results


def test_calls_give_the_plain_modules_bits(case):
    model, batch = case
    fast = trained_model(model, batch)
    plain = plain_copy(model, fast)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, fast.params[n])]
    assert len(moved) > len(fast.params) / 2
    with sdpa_kernel(SDPBackend.MATH):
        for view, reference in ((fast, plain.eval()), (fast.train(), copy.deepcopy(plain).train())):
            torch.manual_seed(3)
            expected = logits_of(reference(**inputs_of(batch)))
            torch.manual_seed(3)
            assert torch.equal(logits_of(view(**inputs_of(batch))), expected)


def test_training_follows_the_plain_module(case):
    """The same steps on an ordinary copy of the module, tied weights, shared submodules and buffers included.

    SGD: where the true gradient is 0 (a bias before batch norm), Adam would blow its rounding up to a whole step.
    """
    model, batch = case
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = copy.deepcopy(model).train()
    optimizer = MOMENTUM(plain.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        scores, labels = logits_of(plain(**inputs_of(batch))), batch["labels"]
        if isinstance(model, LlamaForCausalLM):
            scores, labels = scores[:, :-1], labels[:, 1:]
        F.cross_entropy(scores.flatten(0, -2), labels.flatten()).backward()
        optimizer.step()
    fast = trained_model(model, batch, MOMENTUM, num_steps=3)
    assert_same({n: p.detach() for n, p in fast.params.items()}, dict(plain.named_parameters()), 1e-12)
    assert_same(fast.buffers, dict(plain.named_buffers()), 1e-12)


def test_the_users_module_is_left_bitwise_alone(case):
    model, batch = case
    before = module_state(model)
    weights = example_weights()
    chain = one_stage(batches=[batch], model=model, optimizer=ADAM)
    fast = chain.unroll(weights)["only"]
    loss = (
        logits_of(fast(**inputs_of(batch))).square().mean()
        + logits_of(fast.train()(**inputs_of(batch))).square().mean()
    )
    metaopt.backward(loss, weights)
    assert_same(module_state(model), before)
    expected = copy.deepcopy(model).eval()(**inputs_of(batch))
    assert torch.equal(logits_of(model.eval()(**inputs_of(batch))), logits_of(expected))


def test_hidden_states_and_hooks_work():
    model: Any = bert2bert()
    batch = text_batch()
    seen: list[Tensor] = []
    hook = model.encoder.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    fast = trained_model(model, batch)
    num_calls = len(seen)
    output = fast(**inputs_of(batch), output_hidden_states=True)
    hook.remove()
    assert len(output.decoder_hidden_states) == len(output.encoder_hidden_states) == 2
    assert num_calls == 2
    assert seen[-1] is output.encoder_last_hidden_state
    assert output.decoder_hidden_states[-1].requires_grad


def test_a_tied_weight_has_one_name_and_the_gradient_of_both_uses():
    model, batch = Tied(), feature_batches(1)[0]
    chain = one_stage(cross_entropy, [batch], model=model, num_steps=1)
    fast = chain.unroll(example_weights())["only"]
    assert list(fast.params) == ["up.weight", "again.bias"]
    free = model.up.weight.detach().clone().requires_grad_()
    hidden = (batch["inputs"] @ free.T).tanh()
    one_use = F.cross_entropy(hidden @ model.up.weight @ free.T + model.again.bias, batch["labels"])
    other_use = F.cross_entropy(hidden.detach() @ free @ model.up.weight.T + model.again.bias, batch["labels"])
    gradient = sum(torch.autograd.grad(loss, free)[0] for loss in (one_use, other_use))
    assert torch.allclose(fast.params["up.weight"], model.up.weight - 0.1 * gradient, rtol=0, atol=1e-14)


def test_bert2bert_tied_embeddings_stay_tied():
    model: Any = bert2bert()
    batch = text_batch()
    output, embeddings = model.decoder.cls.predictions.decoder, model.decoder.bert.embeddings.word_embeddings
    assert output.weight is embeddings.weight
    chain = one_stage(metaopt.CrossEntropy(), [batch], model=model, optimizer=ADAM)
    outcome = chain.unroll(example_weights())
    assert len(outcome["only"].params) == len(list(model.parameters()))
    chain.commit(outcome)
    assert output.weight is embeddings.weight
    assert torch.equal(output.weight, outcome["only"].params["decoder.bert.embeddings.word_embeddings.weight"])


# --- buffers, modes, frozen parameters, dropout


def test_batch_statistics_move_in_training_only():
    model, batches = Network(batch_norm=True), feature_batches()
    before = {n: b.clone() for n, b in model.named_buffers()}
    chain = one_stage(metaopt.CrossEntropy(), batches, model=model, num_steps=3)
    outcome = chain.unroll(example_weights())
    kept = {n: b.clone() for n, b in outcome["only"].buffers.items()}
    assert int(kept["norm.num_batches_tracked"]) == 3
    assert not torch.equal(kept["norm.running_mean"], before["norm.running_mean"])
    outcome["only"].train()(batches[0]["inputs"])
    with outcome["only"].train().as_module() as module:
        module(batches[0]["inputs"])
    assert_same(outcome["only"].buffers, kept)
    assert_same(dict(model.named_buffers()), before)
    chain.commit(outcome)
    assert_same(dict(model.named_buffers()), kept)


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_forward_assigns_anew_is_carried(persistent):
    class Counting(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()), persistent=persistent)

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(inputs)

    model = Counting()
    chain = one_stage(cross_entropy, model=model, num_steps=3)
    outcome = chain.unroll(example_weights())
    assert float(outcome["only"].buffers["calls"]) == 3.0
    assert float(model.calls) == 0.0
    chain.commit(outcome)
    assert float(model.calls) == 3.0


def test_a_buffer_that_forward_creates_is_refused_and_stays_out_of_the_users_module():
    class Lazy(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", None)

        def forward(self, inputs: Tensor) -> Tensor:
            if self.mean is None:
                self.mean = inputs.mean(0)
            return super().forward(inputs - self.mean)

    model = Lazy()
    with pytest.raises(metaopt.StageError, match=r"None before \(mean\).*register_buffer"):
        one_stage(cross_entropy, model=model).unroll(example_weights())
    assert model.mean is None


def test_the_inner_loop_runs_in_train_mode_and_everything_else_in_eval_mode():
    modes: dict[str, list[bool]] = {"teacher": [], "student": []}
    teacher, student = Network(), Network()
    for name, model in (("teacher", teacher), ("student", student)):
        model.eval().register_forward_hook(lambda m, args, out, name=name: modes[name].append(m.training))
    outcome = two_stages(SGD, teacher, student, num_steps=2).unroll(example_weights())
    assert modes == {"teacher": [True, True, False, False], "student": [True, True]}
    outcome["student"](feature_batches()[0]["inputs"])
    outcome["student"].train()(feature_batches()[0]["inputs"])
    assert modes["student"][2:] == [False, True]
    assert not teacher.training


def test_frozen_parameters_stay_frozen():
    model, batches = Network(), feature_batches()
    model.first.requires_grad_(False)
    chain = one_stage(metaopt.CrossEntropy(), batches, model=model, optimizer=ADAM)
    outcome = chain.unroll(example_weights())
    params = outcome["only"].params
    for name in ("first.weight", "first.bias"):
        assert torch.equal(params[name], dict(model.named_parameters())[name])
        assert params[name].data_ptr() == dict(model.named_parameters())[name].data_ptr()  # never copied
        assert not params[name].requires_grad
    assert params["last.weight"].requires_grad
    assert set(outcome["only"].optimizer_state) == {"last.weight", "last.bias"}
    frozen = model.first.weight.detach().clone()
    chain.commit(outcome)
    assert torch.equal(model.first.weight, frozen)
    assert torch.equal(model.last.weight, params["last.weight"])


@pytest.mark.parametrize("run", ["unroll", "train"])
def test_a_parameter_frozen_after_the_stage_was_built_is_refused(run):
    model = Network()
    chain = one_stage(metaopt.CrossEntropy(), model=model)
    model.last.bias.requires_grad_(False)
    with pytest.raises(metaopt.StageError, match=r"last\.bias"):
        getattr(chain, run)(example_weights())


def test_dropout_draws_another_mask_at_each_step():
    batch = feature_batches(1)[0]
    still = functools.partial(torch.optim.SGD, lr=0.0)
    chain = one_stage(metaopt.CrossEntropy(), [batch], model=Network(0.5), optimizer=still)
    losses = chain.unroll(example_weights()).losses["only"]
    assert len(set(losses.tolist())) == 3
