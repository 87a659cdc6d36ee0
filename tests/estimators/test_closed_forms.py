"""The update pulled back by formula: against the derivative of torch's own step, and through whole trainings."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import inner_loops
import pytest
import torch
from problems import normal, small_network
from reference import relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metaopt
from metaopt.estimators import Checkpointed, Unrolled, closed_forms, update_vjp
from metaopt.estimators.closed_forms import FORMULAS, GRADIENT, PARAM, closed_form
from metaopt.estimators.update_vjp import by_graph
from metaopt.optimizers.rule import UpdateRule
from metaopt.optimizers.step import carries_gradient

EXACT = 1e-12
SGD, ADAM, ADAMW = (functools.partial(getattr(torch.optim, name), lr=0.03) for name in ("SGD", "Adam", "AdamW"))
BETAS = {"betas": (0.5, 0.8), "eps": 1e-3}
MADE: dict[str, functools.partial[torch.optim.Optimizer]] = {
    "SGD": SGD,
    "SGD, decay": functools.partial(SGD, weight_decay=0.2),
    "SGD, maximize": functools.partial(SGD, weight_decay=0.2, maximize=True),
    "momentum": functools.partial(SGD, momentum=0.9),
    "dampening": functools.partial(SGD, momentum=0.9, dampening=0.4, weight_decay=0.2),
    "Nesterov": functools.partial(SGD, momentum=0.9, nesterov=True, weight_decay=0.2, maximize=True),
    "Adam": functools.partial(ADAM, **BETAS),
    "Adam, defaults": ADAM,
    "Adam, decay": functools.partial(ADAM, weight_decay=0.2, **BETAS),
    "Adam, maximize": functools.partial(ADAM, weight_decay=0.2, maximize=True, **BETAS),
    "Adam, decoupled": functools.partial(ADAM, weight_decay=0.2, decoupled_weight_decay=True, **BETAS),
    "AdamW": functools.partial(ADAMW, weight_decay=0.2, **BETAS),
    "AdamW, no decay": functools.partial(ADAMW, weight_decay=0.0),
    "AdamW, maximize": functools.partial(ADAMW, maximize=True),
}


class Case:
    """A step of two parameters as one, some of whose gradients are always 0, after so many others."""

    def __init__(self, make: Any, age: int, dtype: Any = torch.float64, size: int = 6, **overrides: Any) -> None:
        draw = normal(1)
        params = {"a": nn.Parameter(draw(size, 2).to(dtype)), "b": nn.Parameter(draw(size).to(dtype))}
        optimizer = make(list(params.values()))
        rule = UpdateRule(optimizer, params)
        gradients = [{name: draw(*p.shape).to(dtype) for name, p in params.items()} for _ in range(age + 1)]
        for gradient in gradients:
            gradient["b"][:2] = 0.0
        weights, state = dict(params), {}
        for gradient in gradients[:age]:
            weights, state = rule.step(weights, gradient, state)
        (self.step,) = rule.parts(weights, gradients[-1], state, overrides)
        join = self.step.block.join
        self.param, self.gradient, self.state = (join(weights).detach(), join(gradients[-1]), join(state))
        self.state = {key: value.detach() for key, value in self.state.items()}
        _, after = self.step(self.param, self.gradient, self.state)
        kept = [key for key, value in after.items() if carries_gradient(key, value)]
        self.above = {key: draw(self.param.numel()).to(dtype) for key in ("", *kept)}
        self.cls = type(optimizer)

    def formula(self, above: Mapping[str, Tensor] | None = None) -> Callable[..., Any] | None:
        return closed_form(self.cls, self.step, self.param, self.state, above or self.above, by_graph)

    def both(self, above: Mapping[str, Tensor] | None = None) -> tuple[dict[Any, Tensor], dict[Any, Tensor]]:
        above, formula = above or self.above, self.formula(above)
        assert formula is not None
        at = (self.step, self.param, self.gradient, self.state, above, None)
        found, expected = ({k: v for k, v in pull(*at).items() if v is not None} for pull in (formula, by_graph))
        assert found.keys() == expected.keys() >= {PARAM, GRADIENT}
        return found, expected


@pytest.mark.parametrize("age", [0, 1, 3])
@pytest.mark.parametrize("name", MADE)
def test_a_formula_is_the_derivative_of_the_step(name, age):
    case = Case(MADE[name], age)
    entries = list(case.above)[1:]
    for count in range(len(entries) + 1):  # whichever entries of the state have a cotangent
        for some in itertools.combinations(entries, count):
            found, expected = case.both({key: case.above[key] for key in ("", *some)})
            assert relative_error(found, expected) < EXACT
            assert all(torch.allclose(found[key], x, rtol=1e-10, atol=1e-12) for key, x in expected.items())


RATES: dict[str, Any] = {
    "scheduled": 0.01,
    "a tensor": torch.tensor(0.02),
    "zero": 0.0,
    "by name": {"a": 0.1, "b": 0.0},
    "of some": {"a": torch.tensor(0.1)},
}


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("name", ["Nesterov", "Adam, decay", "AdamW"])
def test_rates_that_a_step_is_given(name, rate):
    case = Case(MADE[name], 2, lr=rate)
    found, expected = case.both()
    assert relative_error(found, expected) < EXACT
    halves = [slice(0, 9), slice(9, 18)]  # across the parameters' boundary
    for part in halves:
        above = {key: value[part] for key, value in case.above.items()}
        state = {key: value[part] if value.dim() else value for key, value in case.state.items()}
        formula = case.formula()
        assert formula is not None
        at = (case.step, case.param[part], case.gradient[part], state, above, part)
        for pull in (formula, by_graph):
            pulled: dict[Any, Any] = dict(pull(*at))
            assert relative_error(pulled, {key: x[part] for key, x in expected.items()}) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Nesterov", "Adam", "AdamW"])
def test_lower_precision_differs_by_rounding(name, dtype):
    found, expected = Case(MADE[name], 2, dtype).both()
    for key, x in expected.items():
        assert found[key].dtype == x.dtype == dtype
        assert float((found[key] - x).norm() / x.norm()) < 16 * torch.finfo(dtype).eps


# --- what is not trusted


def scaled(formula: Any, key: Any, factor: float) -> Any:
    def wrong(*args: Any) -> Any:
        found = dict(formula(*args))
        return {**found, key: found[key] * factor} if key in found else found

    return wrong


def kicking_the_dead(*args: Any) -> Any:
    """Adam's, without the slope 0 at a second moment of 0."""
    found: dict[Any, Any] = dict(closed_forms.adam(*args))
    return {**found, GRADIENT: torch.where(args[1] == 0, found[GRADIENT] + 1e-3, found[GRADIENT])}


def leaving_out(*args: Any) -> Any:
    return {key: value for key, value in closed_forms.adam(*args).items() if key[0] != "state"}


WRONG = {
    "by a millionth": scaled(closed_forms.adam, GRADIENT, 1 + 1e-6),
    "the weights": scaled(closed_forms.adam, PARAM, 1 - 1e-7),
    "a moment": scaled(closed_forms.adam, ("state", "exp_avg_sq"), -1.0),
    "at zero": kicking_the_dead,
    "a piece missing": leaving_out,
}


def small(estimator: Any, make: Any = MADE["Adam, decay"], age: int = 2) -> Any:
    return inner_loops.of_problem(lambda: small_network(make, warm=bool(age)))(estimator).hypergradient()


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_formula_is_found_out_and_not_used(wrong, monkeypatch):
    expected = small(Unrolled())
    monkeypatch.setitem(FORMULAS, torch.optim.Adam, wrong)
    assert Case(MADE["Adam"], 2).formula() is None
    assert relative_error(small(Checkpointed()), expected) < EXACT


def test_a_step_that_is_not_torchs_any_more_is_found_out(monkeypatch):
    def half(optimizer: Any) -> None:
        with torch.no_grad():
            own(optimizer)
        optimizer.param_groups[0]["params"][0].mul_(0.5)

    own = torch.optim.SGD.step
    assert Case(SGD, 0).formula() is not None
    monkeypatch.setattr(torch.optim.SGD, "step", half)
    assert Case(SGD, 0).formula() is None


class OwnAdam(torch.optim.Adam):
    """A user's own, of the same step."""


REFUSED = {"amsgrad": functools.partial(ADAM, amsgrad=True), "NAdam": functools.partial(torch.optim.NAdam, lr=0.03)}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("age", [0, 2])
def test_no_formula_for_what_has_none(name, age):
    assert Case(REFUSED[name], age).formula() is None


def test_no_formula_for_a_subclass_nor_without_a_cotangent_of_the_weights():
    case = Case(MADE["Adam"], 2)
    assert case.formula() is not None
    assert case.formula({"exp_avg": case.above["exp_avg"]}) is None
    case.cls = OwnAdam
    assert case.formula() is None


def test_a_learned_hyperparameter_goes_by_the_graph(monkeypatch):
    def never(*args: Any) -> Any:
        raise AssertionError("by formula")

    make = inner_loops.OPTIONS["rate and betas, clipped"]
    expected = make(Unrolled()).hypergradient()
    monkeypatch.setitem(FORMULAS, torch.optim.Adam, never)
    assert relative_error(make(Checkpointed()).hypergradient(), expected) < EXACT


# --- whole trainings


@pytest.mark.parametrize("age", [0, 2])
@pytest.mark.parametrize("name", MADE)
def test_whole_trainings_agree_with_the_unrolled_one(name, age):
    found, expected = (small(estimator, MADE[name], age) for estimator in (Checkpointed(), Unrolled()))
    assert relative_error(found, expected) < EXACT


def test_the_comparison_is_made_once_for_each_situation_of_a_stage(monkeypatch):
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args[1].numel())
        return by_graph(*args, **options)

    monkeypatch.setattr(update_vjp, "by_graph", counted)
    model = nn.Linear(3, 2)
    batches = [{"inputs": torch.randn(4, 3), "index": torch.arange(4)} for _ in range(5)]
    weights = metaopt.ExampleWeights(4)
    stage = metaopt.Stage(model, MADE["momentum"], squared, batches, 5, estimator=Checkpointed())
    chain = metaopt.Chain(only=stage)
    for _ in range(2):
        trained = chain.unroll(weights)["only"].params
        metaopt.backward(torch.stack([p.sum() for p in trained.values()]).sum(), weights)
        assert calls == [8, 8, 8]  # the last step, those before it, and the first: of so many elements each


def squared(model: Any, batch: Any, weights: Any, upstream: Any) -> Tensor:
    return (weights(batch) * model(batch["inputs"]).square().mean(1)).mean()


# --- what it costs


class Written(TorchDispatchMode):
    """Counts the elements that operations write."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):  # no view
            self.elements += sum(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


def passes(make: Any, parts: int, clip: float | None, monkeypatch: Any) -> float:
    """Elements that a backward writes per step and weight, the update in so many parts."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4)))
    count = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(update_vjp, "MOST_ELEMENTS", -(-count // parts))
    batches = [{"inputs": torch.randn(2, 48), "index": torch.arange(2)} for _ in range(3)]
    weights = metaopt.ExampleWeights(2)
    transform: Any = None if clip is None else metaopt.ClipNorm(clip)
    stage = metaopt.Stage(model, make, squared, batches, 3, estimator=Checkpointed(), transform=transform)
    chain = metaopt.Chain(only=stage)
    written = Written()
    for counting in (nullcontext(), written):  # a formula is compared in the first
        trained = chain.unroll(weights)
        loss = torch.stack([p.sum() for p in trained["only"].params.values()]).sum()
        with counting:
            metaopt.backward(loss, weights)
    return written.elements / count / 3


FEW = {"SGD": (SGD, 3), "momentum": (MADE["momentum"], 5), "Adam": (ADAM, 18), "AdamW": (ADAMW, 19)}


@pytest.mark.parametrize("name", FEW)
def test_a_formula_takes_few_passes(name):
    make, most = FEW[name]
    case = Case(make, 2, size=300)
    pull = case.formula()
    assert pull is not None
    with Written() as written:
        pull(case.step, case.param, case.gradient, case.state, case.above, None)
    assert written.elements <= most * case.param.numel()


@pytest.mark.parametrize("make", [SGD, ADAM, REFUSED["amsgrad"]], ids=["SGD", "Adam", "amsgrad"])
def test_more_parts_write_no_more(make, monkeypatch):
    few, *many = (passes(make, parts, None, monkeypatch) for parts in (4, 16, 64))
    assert max(many) <= 1.05 * few


@pytest.mark.parametrize("parts", [4, 16, 64])
def test_clipping_costs_a_few_passes_in_however_many_parts(parts, monkeypatch):
    """A backward's: the gradients clipped again, joined, and the adjoint, which writes them twice."""
    clipped, plain = (passes(ADAM, parts, clip, monkeypatch) for clip in (1e-3, None))
    assert clipped <= 1.15 * plain
