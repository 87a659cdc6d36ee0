"""Meta-parameters beyond tables of weights: each hypergradient against a loss written out by hand."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import library
import pytest
import torch
import torch.nn.functional as F
from problems import MOMENTUM, cross_entropy, distilled_features, distilled_text, inputs_of, logits_of
from reference import Problem, hypergradient, relative_error
from small import ADAM, SGD, assert_same, drawing, feature_batches, one_stage, text_batch, trained_model
from small_models import Linear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metaopt
from metaopt.core.meta_params import named_tensors
from metaopt.estimators import Checkpointed
from metaopt.meta_params import tables
from metaopt.meta_params.tables import MANY, baseline, summary

EXACT = 1e-12


def randomised(module: nn.Module, seed: int = 6) -> nn.Module:
    """The same module in float64, its parameters moved at random, so that no two are alike."""
    draw = drawing(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.5 * draw(*parameter.shape))
    return module


def losses_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """−log p(label) of each label, [B] or [B, L]."""
    log_p = logits_of(model(**inputs_of(batch))).log_softmax(-1)
    return -log_p.gather(-1, batch["labels"][..., None])[..., 0]


def alone(problem: Problem) -> Problem:
    """The problem's first stage as a chain of its own."""
    return replace(problem, chain={"teacher": problem.chain["teacher"]})


def assert_checked(problem: Problem, loss: Any) -> None:
    """Central differences agree on the teacher's validation loss."""
    chain, objective = library.as_chain(problem, {"teacher": loss}), metaopt.ValidationLoss("teacher")
    check = metaopt.check_hypergradient(chain, objective, problem.batch, problem.phi, steps=(1e-4, 1e-5))
    assert check.ok, str(check)


# --- the losses by hand; phi is the library's module, of which only the raw tensors are read


def by_class(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    powers = phi.logits.exp()
    weights = len(powers) * powers / powers.sum()
    return (weights[batch["labels"]] * losses_of(model, batch)).mean()


def by_terms(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    log_p = logits_of(model(**inputs_of(batch))).log_softmax(-1)
    terms = [losses_of(model, batch).mean(), -log_p.mean()]
    return sum(a.exp() * term for a, term in zip(phi.log_weights, terms, strict=True))  # type: ignore[return-value]


def by_targets(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    log_p = logits_of(model(**inputs_of(batch))).log_softmax(-1)
    scores = phi.offsets[batch["index"]] + 4 * F.one_hot(batch["labels"], log_p.shape[-1])
    return -(scores.exp() / scores.exp().sum(-1, keepdim=True) * log_p).sum(-1).mean()


def by_noise(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    noise = torch.randn_like(batch["inputs"])
    return losses_of(model, {**batch, "inputs": batch["inputs"] + phi.log_strength.exp() * noise}).mean()


def by_product(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    powers = phi["classes"].logits.exp()
    weights = len(powers) * powers / powers.sum()
    of_example = 1 / (1 + (-phi["examples"].logits).exp())
    return (weights[batch["labels"]] * of_example[batch["index"]] * losses_of(model, batch)).mean()


def by_product_of_positions(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    powers = phi["classes"].logits.exp()
    weights = len(powers) * powers / powers.sum()
    of_example = 1 / (1 + (-phi["examples"].logits).exp())
    return (of_example[batch["index"]] * (weights[batch["labels"]] * losses_of(model, batch)).mean(1)).mean()


def composed(size: int) -> dict[str, nn.Module]:
    return {"classes": randomised(metaopt.ClassWeights(size)), "examples": randomised(metaopt.ExampleWeights(4), 7)}


TERMS = {"labels": metaopt.CrossEntropy(), "smoothing": metaopt.LabelSmoothing()}
WEIGHTED, BOTH = metaopt.WeightedLoss(), metaopt.WeightedLoss(["classes", "examples"])


class Case(NamedTuple):
    problem: Callable[[], Problem]
    phi: Callable[[], Any]
    loss: Any
    by_hand: Any


CASES = {
    "class weights": Case(distilled_features, lambda: metaopt.ClassWeights(3), WEIGHTED, by_class),
    "token weights": Case(distilled_text, lambda: metaopt.TokenWeights(11), WEIGHTED, by_class),
    "terms": Case(distilled_features, lambda: metaopt.TermWeights(list(TERMS)), metaopt.SumOfLosses(TERMS), by_terms),
    "terms of sequences": Case(
        distilled_text, lambda: metaopt.TermWeights(list(TERMS)), metaopt.SumOfLosses(TERMS), by_terms
    ),
    "soft targets": Case(distilled_features, lambda: metaopt.SoftTargets(4, 3), metaopt.SoftTargetLoss(), by_targets),
    "one strength of noise": Case(
        distilled_features, metaopt.GaussianNoise, metaopt.AugmentedLoss(metaopt.CrossEntropy()), by_noise
    ),
    "a strength for each feature": Case(
        distilled_features,
        lambda: metaopt.GaussianNoise(size=16),
        metaopt.AugmentedLoss(metaopt.CrossEntropy()),
        by_noise,
    ),
    "classes and examples": Case(distilled_features, lambda: composed(3), BOTH, by_product),
    "tokens and examples": Case(distilled_text, lambda: composed(11), BOTH, by_product_of_positions),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_hypergradients_are_those_of_the_loss_by_hand(name):
    case = CASES[name]
    phi = case.phi()
    problem = replace(case.problem(), phi=phi if isinstance(phi, dict) else randomised(phi))
    problem = problem.with_stage("teacher", loss=case.by_hand)
    chain = library.as_chain(problem, {"teacher": case.loss})
    found = library.hypergradient(problem, chain)
    assert relative_error(found, hypergradient(library.replayed(problem, chain))) < EXACT
    if case.problem is distilled_features:  # the small one: central differences cost many trainings
        check = metaopt.check_hypergradient(chain, metaopt.ValidationLoss("student"), problem.batch, problem.phi)
        assert check.ok, str(check)


# --- the weight network


def weight_network(problem: Problem, detached: bool, steps: int) -> dict[str, Tensor]:
    """Hypergradient of Meta-Weight-Net in plain torch, by SGD: the weights of the losses are given to each gradient."""
    phi, lr = problem.phi, 0.1
    stage = problem.chain["teacher"]
    model, _ = stage.private_copy()
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    for step in range(steps):
        batch = stage.batches[step % len(stage.batches)]
        call = lambda given, batch=batch: torch.func.functional_call(model, given, batch["inputs"])  # noqa: E731
        losses = cross_entropy(call(params), batch["labels"])
        read = losses.detach() if detached else losses
        columns = torch.cat([read[:, None], batch["inputs"].flatten(1)], 1)
        weights = phi.layers(columns)[:, 0].sigmoid()
        weights = weights / weights.mean()
        slopes = [torch.autograd.grad(one, list(params.values()), create_graph=True) for one in losses]
        params = {
            name: p - lr * sum(w * slope[i] for w, slope in zip(weights, slopes, strict=True)) / len(losses)
            for i, (name, p) in enumerate(params.items())
        }
    meta_loss = cross_entropy(
        torch.func.functional_call(model, params, problem.batch["inputs"]), problem.batch["labels"]
    )
    tensors = dict(phi.named_parameters())
    return dict(zip(tensors, torch.autograd.grad(meta_loss.mean(), list(tensors.values())), strict=True))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_weight_network_is_meta_weight_net(steps):
    problem = distilled_features(SGD, SGD)
    phi = randomised(metaopt.WeightNetwork(5, features="inputs", num_features=16, normalise=True))
    problem = replace(problem, phi=phi, chain={"teacher": replace(problem.chain["teacher"], num_steps=steps)})
    chain = library.as_chain(problem, {"teacher": metaopt.WeightedLoss()})
    objective = metaopt.ValidationLoss("teacher")
    found = library.hypergradient(problem, chain, objective)
    assert relative_error(found, weight_network(problem, detached=False, steps=steps)) < EXACT
    # From the second step on the weights move with the model, and a plain .detach() would miss it.
    error = relative_error(found, weight_network(problem, detached=True, steps=steps))
    assert error < EXACT if steps == 1 else error > 1e-3
    check = metaopt.check_hypergradient(chain, objective, problem.batch, phi)
    assert check.ok, str(check)


def test_the_weight_network_on_sequences():
    problem = replace(alone(distilled_text(MOMENTUM)), phi=randomised(metaopt.WeightNetwork(4)))
    assert_checked(problem, metaopt.WeightedLoss())


def test_what_the_weight_network_reads_must_be_there():
    wrong: tuple[dict[str, Any], ...] = (
        {"features": "inputs"},
        {"num_features": 3},
        {"features": "inputs", "num_features": -1},
    )
    for options in wrong:
        with pytest.raises(metaopt.ConfigError, match="do not fit: name an entry of the batch"):
            metaopt.WeightNetwork(**options)
    losses, batch = torch.ones(5), feature_batches(1)[0]
    for key, num in (("inputs", 3), ("labels", 1), ("absent", 1)):
        with pytest.raises(metaopt.ConfigError, match=rf"reads batch\['{key}'\], .*{num} floating"):
            metaopt.WeightNetwork(features=key, num_features=num)(batch, losses)


# --- tables with sparse gradients


@pytest.mark.parametrize("estimator", ["unrolled", "checkpointed"])
def test_sparse_tables_have_the_same_hypergradient_in_the_rows_they_read(estimator):
    from metaopt.estimators import Checkpointed, Unrolled

    kind = {"unrolled": Unrolled, "checkpointed": Checkpointed}[estimator]
    found = {}
    for sparse in (False, True):
        for make in (metaopt.ExampleWeights, metaopt.SoftTargets):
            sizes: Any = (9,) if make is metaopt.ExampleWeights else (9, 3)
            phi = randomised(make(*sizes, sparse=sparse))
            loss = metaopt.WeightedLoss() if make is metaopt.ExampleWeights else metaopt.SoftTargetLoss()
            chain = library.as_chain(replace(distilled_features(), phi=phi), {"teacher": loss}, kind())
            found[make, sparse] = library.hypergradient(replace(distilled_features(), phi=phi), chain)
    for make, name in ((metaopt.ExampleWeights, "logits"), (metaopt.SoftTargets, "offsets")):
        dense, sparse = found[make, False][name], found[make, True][name]
        assert sparse.is_sparse
        assert set(sparse.coalesce().indices()[0].tolist()) == {0, 1, 2, 3}
        assert_same(sparse.to_dense(), dense, 1e-15)


class LargeResults(TorchDispatchMode):
    """Counts the tensors of at least so many elements that operations make."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in self.storages((args, kwargs))}
        self.count += sum(made.data_ptr() not in given for made in self.storages(found))
        return found

    def storages(self, tree: Any) -> list[torch.UntypedStorage]:
        dense = [x for x in tree_leaves(tree) if isinstance(x, Tensor) and not x.is_sparse]
        return [x.untyped_storage() for x in dense if x.untyped_storage().nbytes() >= self.size * x.element_size()]


@pytest.mark.parametrize("estimator", [metaopt.Unrolled(), Checkpointed()], ids=repr)
@pytest.mark.parametrize("kind", [metaopt.ExampleWeights, functools.partial(metaopt.SoftTargets, num_labels=3)])
def test_no_inner_step_makes_anything_of_the_size_of_a_large_table(kind: Any, estimator: Any):
    def count(num_steps: int) -> int:
        weights = copy.deepcopy(kind(num_examples=MANY))
        loss = metaopt.WeightedLoss() if kind is metaopt.ExampleWeights else metaopt.SoftTargetLoss()
        chain = one_stage(loss, num_steps=num_steps, estimator=estimator)
        batch = feature_batches(1, seed=8)[0]
        with LargeResults(MANY) as large:
            metaopt.backward(metaopt.ValidationLoss("only")(chain.unroll(weights), batch, weights), weights)
        (table,) = weights.parameters()
        assert table.grad is not None
        assert not table.grad.is_sparse
        return large.count

    assert count(2) == count(6) <= 10


@pytest.mark.parametrize("estimator", [metaopt.Unrolled(), Checkpointed()], ids=repr)
def test_a_plain_backward_of_a_large_table_is_dense_and_the_same(estimator: Any, monkeypatch: pytest.MonkeyPatch):
    found = []
    for many in (MANY, 1):
        monkeypatch.setattr(tables, "MANY", many)
        weights = copy.deepcopy(randomised(metaopt.ExampleWeights(15)))
        trained = one_stage(num_steps=3, estimator=estimator).unroll(weights)
        metaopt.ValidationLoss("only")(trained, feature_batches(1, seed=8)[0], weights).backward()
        found.append(weights.logits.grad)
    assert_same(found[1], found[0], 1e-15)


def test_sparse_adam_moves_only_the_rows_that_were_read():
    weights = metaopt.ExampleWeights(1000, sparse=True).double()
    optimizer = torch.optim.SparseAdam(weights.parameters(), lr=0.1)
    objective, chain = metaopt.ValidationLoss("only"), one_stage(num_steps=2)
    trainer = metaopt.MetaTrainer(chain, objective, weights, optimizer, feature_batches())
    records: list[Any] = []
    trainer.observers = (records.append,)
    trainer.fit(2)
    moved = weights.logits.detach().nonzero().flatten().tolist()
    assert moved == list(range(15))
    assert records[0]["hypergradient_norm"] > 0
    check = metaopt.check_hypergradient(one_stage(), metaopt.ValidationLoss("only"), feature_batches()[0], weights)
    assert check.ok, str(check)
    with pytest.raises(metaopt.ConfigError, match="sparse=True needs parametrisation='sigmoid'"):
        metaopt.ExampleWeights(3, "softmax", sparse=True)


# --- what they start from, what they tell, what stands in their place


def test_starts_and_summaries():
    assert metaopt.ClassWeights(3).summary() == {"class 0": 1.0, "class 1": 1.0, "class 2": 1.0}
    assert metaopt.TokenWeights(1000).summary() == {}
    assert metaopt.TermWeights(["a", "b"], initial=0.5).summary() == pytest.approx({"a": 0.5, "b": 0.5})
    assert metaopt.GaussianNoise(0.3).summary() == {"noise strength": pytest.approx(0.3)}
    assert list(metaopt.WeightNetwork().summary()) == [f"weight at loss {x:g}" for x in (0, 0.5, 1, 2, 4)]
    batch = {"labels": torch.tensor([1, 0]), "index": torch.tensor([4, 0])}
    powers = [math.exp(2.0), 1.0, 1.0]
    found = metaopt.SoftTargets(5, 3, confidence=2.0)(batch)[1].tolist()
    assert found == pytest.approx([p / sum(powers) for p in powers])
    named = {"noise": metaopt.GaussianNoise(0.3), "table": metaopt.ExampleWeights(3), "own": nn.Linear(1, 1)}
    assert summary(named) == {"noise: noise strength": pytest.approx(0.3)}


def test_positions_that_do_not_count_have_no_weight():
    weights = metaopt.TokenWeights(4)
    assert weights({"labels": torch.tensor([[1, -100], [3, 0]])}).tolist() == [[1.0, 0.0], [1.0, 1.0]]
    with pytest.raises(metaopt.ConfigError, match=r"has 4 weights, and batch\['labels'\] runs from 0 to 4"):
        weights({"labels": torch.tensor([[4, -100]])})
    with pytest.raises(metaopt.ConfigError, match="which this batch lacks"):
        weights({"inputs": torch.ones(1)})


@pytest.mark.parametrize("name", CASES)
def test_a_baseline_learns_nothing_and_forgets_what_was_learned(name):
    case = CASES[name]
    phi, fresh = (case.phi() for _ in range(2))
    if not isinstance(phi, dict):
        randomised(phi)
    plain = baseline(phi)
    assert named_tensors(plain) == {}
    problem = case.problem()
    chains = [library.as_chain(problem, {"teacher": case.loss}) for _ in range(2)]
    steps = {"teacher": 2, "student": 0}
    found = chains[0].train(plain, num_steps=steps).losses["teacher"]
    if name.startswith(("terms", "soft")):  # their baseline is where they start
        assert_same(
            found, chains[1].train(fresh.double(), num_steps={"teacher": 2, "student": 0}).losses["teacher"], 1e-7
        )
    else:
        plainly = library.as_chain(problem, {"teacher": metaopt.CrossEntropy()})
        assert_same(found, plainly.train(plain, num_steps=steps).losses["teacher"], 1e-12)


# --- noise on embeddings, and refusals


def test_noise_on_the_embeddings_of_tokens():
    phi = randomised(metaopt.GaussianNoise(key="inputs_embeds"))
    problem, loss = replace(alone(distilled_text(MOMENTUM)), phi=phi), metaopt.AugmentedLoss(metaopt.CrossEntropy())
    assert_checked(problem, loss)
    silent = metaopt.GaussianNoise(1e-12, key="inputs_embeds").double()
    noisy, plain = (library.as_chain(problem, {"teacher": given}) for given in (loss, metaopt.CrossEntropy()))
    assert_same(noisy.unroll(silent).losses["teacher"], plain.unroll(phi).losses["teacher"], 1e-9)


def test_arguments_that_cannot_be_used_are_refused():
    with pytest.raises(metaopt.ConfigError, match="each once"):
        metaopt.TermWeights(["a", "a"])
    with pytest.raises(metaopt.ConfigError, match=r"initial=0.* must be above 0"):
        metaopt.TermWeights(["a"], initial=0)
    with pytest.raises(metaopt.ConfigError, match="terms is empty"):
        metaopt.SumOfLosses({})
    with pytest.raises(metaopt.ConfigError, match="initial=-1"):
        metaopt.GaussianNoise(-1)
    with pytest.raises(metaopt.ConfigError, match="confidence=0"):
        metaopt.SoftTargets(2, 2, confidence=0)


def test_what_does_not_fit_the_batch_is_said():
    batch, model = feature_batches(1)[0], trained_model(Linear(), feature_batches(1)[0], ADAM)
    with pytest.raises(metaopt.ConfigError, match=r"has no weight 'smoothing' \(did you mean 'smothing'"):
        metaopt.SumOfLosses(TERMS)(model, batch, metaopt.TermWeights(["labels", "smothing"]), {})
    with pytest.raises(metaopt.ConfigError, match=r"GaussianNoise reads batch\['input_ids'\]"):
        metaopt.GaussianNoise(key="input_ids")(text_batch())
    with pytest.raises(metaopt.ConfigError, match="do not fit 2 classes"):
        metaopt.SoftTargets(15, 2)({**batch, "labels": batch["labels"] * 0 + 2})

    class Narrow(nn.Module):
        def forward(self, batch: Any) -> Tensor:
            return torch.ones(2)

    with pytest.raises(metaopt.StageError, match=r"Narrow gives weights of shape \[2\] for losses of shape \[5\]"):
        metaopt.WeightedLoss()(model, batch, Narrow(), {})


def test_a_meta_parameter_that_nothing_reads_has_no_path():
    phi = composed(3)
    chain = library.as_chain(distilled_features(), {"teacher": metaopt.WeightedLoss("examples")})
    meta_loss = metaopt.ValidationLoss("student")(chain.unroll(phi), distilled_features().batch, phi)
    with pytest.raises(metaopt.MissingPathError, match=r"'classes\.logits'"):
        metaopt.hypergradient(meta_loss, phi)
