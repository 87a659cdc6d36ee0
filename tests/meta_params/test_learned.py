"""Learned inner hyperparameters and initial weights: every one that is allowed, and the refusal of the others.

The hypergradient is that of plain training whose optimizer is given the same numbers: within 1e-8 of central
differences along the learned ones alone, and the same by both estimators.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from networks import Gained
from plain_runs import Recipe, assert_proven, example_weights, hypergradient, weights_of, without
from reference import relative_error
from torch import nn

import metaopt
from metaopt.optimizers.kinds import SUPPORTED

# Options with which each optimizer's hyperparameters all matter, and what is learned of them.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    ],
    "Adam": [
        {"lr": 0.03, "eps": 1e-2, "weight_decay": 0.1},
        {"lr": 0.03, "eps": 1e-2, "weight_decay": 0.1, "betas": (0.5, 0.6), "amsgrad": True},
        {"lr": 0.03, "eps": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    "AdamW": [{"lr": 0.03, "eps": 1e-2}],
    "NAdam": [{"lr": 0.03, "eps": 1e-2, "weight_decay": 0.1, "momentum_decay": 0.2}],
    "RAdam": [{"lr": 0.03, "eps": 1e-2, "weight_decay": 0.1, "betas": (0.5, 0.8)}],
    "Adamax": [{"lr": 0.03, "eps": 1e-2, "weight_decay": 0.1}],
    "Adagrad": [{"lr": 0.1, "eps": 1e-2, "weight_decay": 0.1, "lr_decay": 0.2}],
    "Adadelta": [{"lr": 0.1, "eps": 1e-2, "weight_decay": 0.1}],
    "RMSprop": [
        {"lr": 0.01, "eps": 1e-2, "weight_decay": 0.1, "momentum": 0.8},
        {"lr": 0.01, "eps": 1e-2, "weight_decay": 0.1, "momentum": 0.8, "centered": True},
    ],
    "ASGD": [{"lr": 0.1, "weight_decay": 0.1}],
    "Muon": [{"lr": 0.03, "adamw_eps": 1e-2}],
    "Adafactor": [{"lr": 0.03, "relative_step": False, "weight_decay": 0.1, "eps": (1e-4, 1e-3)}],
}
KINDS = {kind.__name__: kind for kind in SUPPORTED}
CASES = {
    f"{name}{i}.{key}": (name, options, key)
    for name, variants in OPTIONS.items()
    for i, options in enumerate(variants)
    for key in SUPPORTED[KINDS[name]].learnable
    if not (key == "dampening" and "dampening" not in options)
}


@pytest.fixture
def float64_counters():
    """NAdam's product of momenta is kept in the default dtype; as a float32 it hides differences below 1e-7."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def put(optimizer: torch.optim.Optimizer, model: Any, meta_params: Any, step: int) -> None:
    """Give a plain optimizer the learned numbers; a list goes by groups."""
    for key, value in meta_params["rates"].numbers().items():
        for i, group in enumerate(optimizer.param_groups):
            pair = key == "betas" and not isinstance(value[0], list)
            of_group = value[i] if isinstance(value, list) and not pair else value
            group[key] = tuple(of_group) if isinstance(of_group, list) else of_group


def learning(rates: nn.Module) -> dict[str, nn.Module]:
    return {"weights": example_weights(), "rates": rates.double()}


def initial_value(optimizer: Any, key: str) -> Any:
    return optimizer([nn.Parameter(torch.zeros(1))]).defaults[key]


def test_the_table_covers_every_supported_optimizer():
    assert set(OPTIONS) == set(KINDS)


@pytest.mark.sampled(4)
@pytest.mark.usefixtures("float64_counters")
@pytest.mark.parametrize("case", CASES)
def test_every_hyperparameter_that_can_be_learned(case):
    name, options, key = CASES[case]
    optimizer = functools.partial(KINDS[name], **options)
    meta_params = learning(metaopt.LearnedHyperparameters(**{key: initial_value(optimizer, key)}))
    recipe = Recipe(
        optimizer, num_steps=8 if name == "RAdam" else 5, learned=put, slots={"overrides": metaopt.FromMeta("rates")}
    )
    found = assert_proven(recipe, meta_params, only=[f"rates.{key}"])
    assert all(part.abs().min() > 0 for part in found.values())


@pytest.mark.parametrize("parametrisation", ["log", "softplus", "identity"])
def test_several_at_once_with_other_maps(parametrisation):
    rates = metaopt.LearnedHyperparameters(
        {"lr": parametrisation, "weight_decay": parametrisation}, lr=0.03, betas=(0.8, 0.95), weight_decay=0.1
    )
    numbers = rates.numbers()
    assert numbers["lr"] == pytest.approx(0.03)
    assert numbers["betas"] == pytest.approx([0.8, 0.95])
    recipe = Recipe(
        functools.partial(torch.optim.AdamW, eps=1e-2), learned=put, slots={"overrides": metaopt.FromMeta("rates")}
    )
    assert_proven(recipe, learning(rates), only=["rates.lr", "rates.betas", "rates.weight_decay"])


def test_a_rate_and_betas_per_group():
    def by_groups(params: Any) -> torch.optim.Optimizer:
        groups = [{"params": [p for p in params if p.dim() == dim]} for dim in (0, 1, 2)]
        return torch.optim.Adam(groups, lr=0.1, eps=1e-2)

    rates = metaopt.LearnedHyperparameters(lr=[0.1, 0.03, 0.01], betas=[(0.9, 0.99), (0.8, 0.9), (0.7, 0.8)])
    recipe = Recipe(by_groups, learned=put, slots={"overrides": metaopt.FromMeta("rates")})
    assert_proven(recipe, learning(rates), only=["rates.lr", "rates.betas"])


def by_tensor(model: nn.Module) -> torch.optim.Optimizer:
    """One plain group per parameter."""
    groups = [{"params": [p], "name": n} for n, p in model.named_parameters()]
    return torch.optim.AdamW(groups, lr=0.02, eps=1e-2, weight_decay=0.1)


def put_by_name(optimizer: Any, model: Any, meta_params: Any, step: int) -> None:
    for key, by_name in meta_params["rates"].numbers().items():
        for group in optimizer.param_groups:
            group[key] = by_name.get(group["name"], group[key])


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_one_per_parameter_tensor_and_the_others_keep_the_optimizer_s_own(key):
    rates = metaopt.LearnedHyperparameters(None, **{key: {"gain": 0.2, "first.weight": 0.01, "last.bias": 0.05}})
    recipe = Recipe(
        functools.partial(torch.optim.AdamW, lr=0.02, eps=1e-2, weight_decay=0.1),
        learned=put_by_name,
        plain_optimizer=by_tensor,
        slots={"overrides": metaopt.FromMeta("rates")},
    )
    assert_proven(recipe, learning(rates), only=[f"rates.{key}"])


def test_learned_rates_with_clipping_and_accumulation():
    rates = metaopt.LearnedHyperparameters(lr=0.05, momentum=0.9)
    recipe = Recipe(
        functools.partial(torch.optim.SGD, momentum=0.5),
        learned=put,
        accumulate=2,
        clip=lambda params: nn.utils.clip_grad_norm_(params, 0.5),
        slots={"overrides": metaopt.FromMeta("rates"), "transform": metaopt.ClipNorm(0.5)},
    )
    assert_proven(recipe, learning(rates), only=["rates.lr", "rates.momentum"])


# --- initial weights


def put_weights(optimizer: Any, model: nn.Module, meta_params: Any, step: int) -> None:
    if step == 0:
        for name, value in meta_params["start"].values().items():
            model.get_parameter(name).copy_(value)


@pytest.mark.parametrize("names", [("*",), ("first.*", "gain")], ids=["all", "some"])
def test_initial_weights(names):
    start = metaopt.InitialWeights(Gained(), names)
    with torch.no_grad():
        for p in start.parameters():
            p += 0.1
    meta_params = {"weights": example_weights(), "start": start}
    learned = [f"start.params.{n}" for n in start.values()]
    assert len(learned) == (5 if names == ("*",) else 3)
    recipe = Recipe(
        functools.partial(torch.optim.Adam, lr=0.03, eps=1e-2),
        learned=put_weights,
        slots={"initial": metaopt.FromMeta("start")},
    )
    found = assert_proven(recipe, meta_params, only=learned)
    assert set(found) == {"weights.logits", *learned}
    plain = weights_of(without(recipe, learned=None).run_plainly(meta_params))
    assert relative_error(weights_of(recipe.run_plainly(meta_params)), plain) > 1e-3


# --- one example: learn the rate alone


def test_a_learned_rate_finds_a_better_one():
    rate = metaopt.LearnedHyperparameters(lr=0.001)

    def loss(model: Any, batch: Any, meta_params: Any, upstream: Any) -> torch.Tensor:
        return (model(batch["inputs"])[:, 0] - batch["labels"]).square().mean()

    torch.manual_seed(0)
    data = [{"inputs": torch.randn(8, 3), "labels": torch.randn(8)}]
    stage = metaopt.Stage(
        Gained().float(), torch.optim.SGD, loss, data, num_steps=5, overrides=metaopt.FromMeta(), seed=0
    )
    chain, meta_optimizer, losses = metaopt.Chain(only=stage), torch.optim.Adam(rate.parameters(), lr=0.3), []
    for _ in range(12):
        meta_loss = loss(chain.unroll(rate)["only"], data[0], rate, {})
        meta_optimizer.zero_grad()
        metaopt.backward(meta_loss, rate)
        meta_optimizer.step()
        losses.append(meta_loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert rate.numbers()["lr"] > 0.01


# --- refused, before any training

NOT_LEARNED: dict[str, tuple[Any, Any, str]] = {
    "a rate of ASGD": (
        torch.optim.ASGD,
        lambda: metaopt.LearnedHyperparameters(lr=0.1),
        r"'lr' .* cannot be learned \(it enters ASGD's own decaying rate.*ASGD can learn weight_decay",
    ),
    "no such option": (
        torch.optim.Adam,
        lambda: metaopt.LearnedHyperparameters(momentum=0.9),
        r"Adam has no hyperparameter 'momentum'",
    ),
    "a switch": (
        functools.partial(torch.optim.SGD, lr=0.1),
        lambda: metaopt.LearnedHyperparameters({"maximize": "identity"}, maximize=0.5),
        r"'maximize' .* cannot be learned; SGD can learn lr, momentum",
    ),
    "a parameter that is not there": (
        functools.partial(torch.optim.SGD, lr=0.1),
        lambda: metaopt.LearnedHyperparameters(lr={"first.wieght": 0.1}),
        r"did you mean 'first.weight'",
    ),
    "too few groups": (
        functools.partial(torch.optim.SGD, lr=0.1),
        lambda: metaopt.LearnedHyperparameters(lr=[0.1, 0.1]),
        r"'lr' has 2 values for 1 parameter groups",
    ),
    "what holds none": (
        functools.partial(torch.optim.SGD, lr=0.1),
        lambda: metaopt.SourceWeights(3),
        r"FromMeta reads a SourceWeights; give metaopt.LearnedHyperparameters",
    ),
}


@pytest.mark.parametrize("run", ["unroll", "train"])
@pytest.mark.parametrize("case", NOT_LEARNED)
def test_what_cannot_be_learned_is_refused_before_any_training(case, run):
    optimizer, make, message = NOT_LEARNED[case]
    called: list[int] = []

    def loss(model: Any, batch: Any, meta_params: Any, upstream: Any) -> torch.Tensor:
        called.append(1)
        return model(batch["inputs"]).mean()

    stage = metaopt.Stage(Gained(), optimizer, loss, [{"inputs": torch.zeros(1, 3)}], 2, overrides=metaopt.FromMeta())
    chain = metaopt.Chain(only=stage)
    with pytest.raises(metaopt.ConfigError, match=message):
        getattr(chain, run)(make())
    assert not called


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: metaopt.LearnedHyperparameters(), r"nothing to learn; name at least one"),
        (
            lambda: metaopt.LearnedHyperparameters(lr=0.0),
            r"lr=0.0 must be above 0.*parametrisations=\{'lr': 'identity'\}",
        ),
        (lambda: metaopt.LearnedHyperparameters(momentum=1.0), r"momentum=1.0 must be between 0 and 1"),
        (lambda: metaopt.LearnedHyperparameters(betas=(0.9,)), r"a pair is needed"),
        (lambda: metaopt.LearnedHyperparameters(lr="fast"), r"lr='fast'"),
        (lambda: metaopt.LearnedHyperparameters({"lr": "logg"}, lr=0.1), r"no parametrisation 'logg'.*'log'"),
        (lambda: metaopt.LearnedHyperparameters({"rl": "log"}, lr=0.1), r"name 'rl', which is not learned"),
        (lambda: metaopt.InitialWeights(Gained(), ["frist.*"]), r"no trained parameter is called 'frist\.\*'"),
    ],
)
def test_values_that_cannot_be_are_refused(make, message):
    with pytest.raises(metaopt.ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "message"), [(None, "must say which .*rates"), ("rate", "'rate'.*did you mean 'rates'")]
)
def test_several_meta_parameters_need_the_right_name(name, message):
    recipe = Recipe(torch.optim.SGD, slots={"overrides": metaopt.FromMeta(name)})
    with pytest.raises(metaopt.ConfigError, match=message):
        recipe.chain().unroll(learning(metaopt.LearnedHyperparameters(lr=0.1)))


def test_the_uniform_baseline_keeps_the_optimizer_s_own():
    recipe = Recipe(functools.partial(torch.optim.SGD, lr=0.05), slots={"overrides": metaopt.FromMeta("rates")})
    meta_params = {"weights": example_weights(), "rates": metaopt.Uniform()}
    plain = weights_of(recipe.run_plainly(meta_params))
    assert relative_error(weights_of(recipe.chain().train(meta_params)["only"]), plain) == 0.0


def test_initial_weights_from_a_factory():
    assert set(metaopt.InitialWeights(Gained).values()) == {n for n, _ in Gained().named_parameters()}


def test_initial_weights_of_another_model_are_refused():
    recipe = Recipe(torch.optim.SGD, slots={"initial": metaopt.FromMeta("start")})
    meta_params = {"weights": example_weights(), "start": metaopt.InitialWeights(nn.Linear(2, 2))}
    with pytest.raises(metaopt.ConfigError, match="is no trained parameter of the stage's model"):
        hypergradient(recipe, meta_params)
