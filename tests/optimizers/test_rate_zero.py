"""A learning rate of 0 at some inner step, as warm-up schedules have it: the step is torch's, and is differentiated.

Every supported optimizer in float64, with its rate 0 at the first, a middle, the last or every step: weights and state
within 1e-12 of `torch.optim`'s, hypergradients within 1e-8 of central differences of the plain run, and exact
estimators alike to 1e-12. `FirstOrder` drops `∂²L/∂θ²`, which a loss that is linear in θ does not have: there it is
exact too, and is compared with central differences like the others.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import library
import pytest
import torch
from differences import difference_error, train_plainly
from networks import bert2bert
from plain_runs import Recipe, assert_proven, batches, example_weights
from problems import regularised_error, small_network
from reference import relative_error
from small import text_batch
from torch import Tensor, nn

import metaopt
from metaopt.estimators import Captured, Checkpointed, FirstOrder, Unrolled
from metaopt.optimizers.kinds import SUPPORTED

OPTIONS: dict[type, dict[str, Any]] = {
    torch.optim.SGD: {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1},
    torch.optim.Adam: {"amsgrad": True, "weight_decay": 0.1},
    torch.optim.AdamW: {"weight_decay": 0.3},
    torch.optim.NAdam: {"weight_decay": 0.1, "decoupled_weight_decay": True},
    torch.optim.Adagrad: {"lr_decay": 0.1},
    torch.optim.Adadelta: {"lr": 1.0},
    torch.optim.RMSprop: {"centered": True, "momentum": 0.8},
    torch.optim.ASGD: {"lambd": 0.1, "t0": 1.0},
    metaopt.Adafactor: {"relative_step": False},
}
WHERE = {"first": {0}, "middle": {1}, "last": {3}, "every": {0, 1, 2, 3}}  # of four steps
ESTIMATORS = (Unrolled(), Checkpointed(), Checkpointed(Captured()))


def pull(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Linear in the weights of a linear model."""
    return (phi.values * model(batch["inputs"])[:, 0]).mean()


def problem_of(kind: type, zero_at: set[int], linear: bool) -> Any:
    """A small problem whose meta-loss reads φ itself too, so that its hypergradient is never 0."""
    options = {"lr": 0.05, **OPTIONS.get(kind, {})}
    problem = small_network(functools.partial(kind, **options))
    stage = replace(
        problem.chain["only"], overrides=lambda phi, t: {"lr": 0.0 if t in zero_at else options["lr"] / (1 + t)}
    )
    if linear:
        torch.manual_seed(0)
        stage = replace(stage, model=nn.Linear(3, 1, dtype=torch.float64), loss=pull)
    return replace(problem, chain={"only": stage}, objective=regularised_error("only", 0.02))


def found_by(problem: Any, estimator: Any) -> dict[str, Tensor]:
    return library.hypergradient(problem, library.as_chain(problem, estimator=estimator))


def weights(trained: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in trained["only"].params.items()}


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "where", ["first", "every", *(pytest.param(w, marks=pytest.mark.slow) for w in ("middle", "last"))]
)
@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.__name__)
def test_rate_zero(kind, where):
    problem = problem_of(kind, WHERE[where], linear=False)
    plain = library.as_chain(problem).train(problem.phi)
    unrolled = library.as_chain(problem).unroll(problem.phi)
    assert relative_error(weights(plain), weights(train_plainly(problem.chain, problem.phi))) < 1e-15
    assert relative_error(weights(unrolled), weights(plain)) < 1e-12
    for name, state in plain["only"].optimizer_state.items():
        for key, value in state.items():
            torch.testing.assert_close(unrolled["only"].optimizer_state[name][key], value, rtol=1e-12, atol=1e-15)
    found = [found_by(problem, estimator) for estimator in ESTIMATORS]
    assert difference_error(found[0], problem, num_random=1) < 1e-8
    assert all(relative_error(other, found[0]) < 1e-12 for other in found)

    flat = problem_of(kind, WHERE[where], linear=True)
    first_order = found_by(flat, FirstOrder())
    assert difference_error(first_order, flat, num_random=1) < 1e-8
    assert relative_error(first_order, found_by(flat, Unrolled())) < 1e-12


# --- wherever the rate comes from


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = model.parameters()
    return torch.optim.Adam([{"params": [first], "lr": 0.0}, {"params": rest}], lr=0.03, eps=1e-3)


def of_parameters(params: Any) -> torch.optim.Optimizer:
    return two_groups(nn.ParameterList(params))


def set_rates(*rates: float) -> Any:
    def learned(optimizer: torch.optim.Optimizer, model: nn.Module, phi: Any, step: int) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    return learned


ADAM = functools.partial(torch.optim.Adam, lr=0.03, eps=1e-3)
FIRST, *REST = (name for name, _ in Recipe(ADAM).model().named_parameters())
MIXED = {
    "a group's own": Recipe(of_parameters, plain_optimizer=two_groups),
    "a list of one per group": Recipe(
        of_parameters,
        plain_optimizer=two_groups,
        learned=set_rates(0.03, 0.0),
        slots={"overrides": lambda phi, t: {"lr": [0.03, 0.0]}},
    ),
    "a mapping from names": Recipe(
        of_parameters,
        plain_optimizer=two_groups,
        learned=set_rates(0.0, 0.03),
        slots={"overrides": lambda phi, t: {"lr": {**dict.fromkeys(REST, 0.03), FIRST: 0.0}}},
    ),
    "accumulated": Recipe(
        ADAM, accumulate=2, schedule=functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda t: t % 2)
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_rate_of_zero_from_anywhere(name):
    assert_proven(MIXED[name], example_weights())


def learned_rate(rate: float, estimator: Any) -> dict[str, Tensor]:
    """The hypergradient of a table of rates, one per step, of which some are 0."""
    rates = nn.ParameterDict({"rates": nn.Parameter(torch.tensor([rate, 0.03, 0.02], dtype=torch.float64))})

    def rate_at(phi: Any, t: int) -> dict[str, Tensor]:
        return {"lr": phi["rates"][t]}

    def loss(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        return error(model, batch)

    model = Recipe(ADAM).model().double()
    stage = metaopt.Stage(model, ADAM, loss, batches(), 3, estimator, overrides=rate_at, seed=0)
    return metaopt.hypergradient(error(metaopt.Chain(only=stage).unroll(rates)["only"], batches(5)[-1]), rates)


def error(model: Any, batch: Any) -> Tensor:
    return (model(batch["inputs"])[:, 0] - batch["labels"]).square().mean()


def test_a_learned_rate_is_continuous_at_zero():
    at, near = learned_rate(0.0, Unrolled()), learned_rate(1e-9, Unrolled())
    assert float(at["rates"].abs().min()) > 0
    assert relative_error(near, at) < 1e-6
    assert relative_error(learned_rate(0.0, Checkpointed()), at) < 1e-12


def test_a_bert2bert_starts_at_rate_zero():
    transformers = pytest.importorskip("transformers")
    warmup = functools.partial(transformers.get_linear_schedule_with_warmup, num_warmup_steps=1, num_training_steps=3)
    found = []
    for estimator in (Unrolled(), Checkpointed()):
        torch.manual_seed(0)
        adamw, phi = functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-5), metaopt.ExampleWeights(4).double()
        stage = metaopt.Stage(
            bert2bert(), adamw, metaopt.WeightedLoss(), [text_batch()], 3, estimator, schedule=warmup, seed=0
        )
        trained = metaopt.Chain(only=stage).unroll(phi)
        objective = metaopt.ValidationLoss("only")
        found.append(metaopt.hypergradient(objective(trained, text_batch(1), phi), phi))
    assert float(found[0]["logits"].norm()) > 0
    assert relative_error(found[1], found[0]) < 1e-12
