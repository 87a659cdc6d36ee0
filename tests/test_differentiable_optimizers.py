"""Every supported inner optimizer and option is torch's own, and is differentiated: cold and from a used optimizer.

A table over optimizers × options in float64. Trajectory: at most 1e-12 from plain `torch.optim`. Hypergradient: at
most 1e-12 from the hand-written formulas and 1e-8 from central differences of the plain run.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import library
import pytest
import torch
from differences import difference_error, train_plainly
from networks import Gained
from problems import small_network
from reference import FORMULAS, hypergradient, relative_error
from torch import nn

import metaopt
from metaopt.estimators import Checkpointed
from metaopt.optimizers import SUPPORTED

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
CASES = {
    "sgd": (SGD, {"lr": 0.1}),
    "sgd-momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    "sgd-nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd-decay": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}),
    "sgd-maximize": (SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.2, "maximize": True}),
    "adam": (ADAM, {"lr": 0.03}),
    "adam-eps": (ADAM, {"lr": 0.03, "eps": 0.1}),
    "adam-betas": (ADAM, {"lr": 0.03, "betas": (0.5, 0.8), "eps": 1e-3}),
    "adam-decay": (ADAM, {"lr": 0.03, "weight_decay": 0.2}),
    "adam-amsgrad": (ADAM, {"lr": 0.03, "betas": (0.5, 0.5), "amsgrad": True}),
    "adam-maximize": (ADAM, {"lr": 0.03, "maximize": True, "eps": 1e-2}),
    "adam-decoupled": (ADAM, {"lr": 0.03, "decoupled_weight_decay": True, "weight_decay": 0.3}),
    "adamw": (ADAMW, {"lr": 0.03}),
    "adamw-decay": (ADAMW, {"lr": 0.03, "weight_decay": 0.5, "eps": 1e-2}),
    "adamw-amsgrad": (ADAMW, {"lr": 0.03, "betas": (0.5, 0.5), "amsgrad": True, "eps": 1e-2}),
    "adamw-maximize": (ADAMW, {"lr": 0.03, "maximize": True, "eps": 1e-2}),
}
table = pytest.mark.parametrize("case", CASES)
warmth = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])


def problem_of(case, warm=False):
    kind, options = CASES[case]
    return small_network(functools.partial(kind, **options), warm)


def weights(trained):
    return {name: value.detach() for name, value in trained["only"].params.items()}


def test_the_table_covers_every_supported_optimizer():
    assert {kind for kind, _ in CASES.values()} == set(SUPPORTED) == set(FORMULAS)


@table
@warmth
def test_trajectory_is_torch_s(case, warm):
    problem = problem_of(case, warm)
    plain = weights(train_plainly(problem.chain, problem.phi))
    chain = library.as_chain(problem)
    assert relative_error(weights(chain.unroll(problem.phi)), plain) < 1e-12
    assert relative_error(weights(chain.train(problem.phi)), plain) < 1e-15
    model = problem.chain["only"].model
    assert relative_error(plain, {n: p.detach() for n, p in model.named_parameters()}) > 1e-2


@table
@warmth
def test_hypergradient_is_exact(case, warm):
    problem = problem_of(case, warm)
    found, exact = library.hypergradient(problem), hypergradient(problem)
    assert relative_error(found, exact) < 1e-12
    assert difference_error(found, problem, coordinates=[("values", 1)]) < 1e-8
    swept = library.hypergradient(problem, library.as_chain(problem, estimator=Checkpointed()))
    assert relative_error(swept, exact) < 1e-12


def state_of(optimizer):
    entries = optimizer.state_dict()["state"].items()
    return {(slot, key): value for slot, entry in entries for key, value in entry.items() if value is not None}


@table
def test_optimizer_state_is_torch_s_after_a_commit(case):
    problem = problem_of(case)
    training = problem.chain["only"]
    model, optimizer = training.private_copy()
    for step in range(training.num_steps):
        batch = training.step_inputs(step)
        optimizer.zero_grad()
        training.loss(lambda inputs: model(inputs), batch, problem.phi, {}).backward()
        optimizer.step()
    chain = library.as_chain(problem)
    chain.commit(chain.unroll(problem.phi))
    found, expected = (state_of(o) for o in (chain.stages["only"].optimizer, optimizer))
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        torch.testing.assert_close(found[place], value, rtol=1e-12, atol=1e-15)


def test_parameter_groups_keep_their_own_options():
    problem = small_network(functools.partial(ADAM, lr=0.03))
    model = problem.chain["only"].model
    assert isinstance(model, Gained)
    groups = [
        {"params": [model.gain, *model.last.parameters()], "lr": 0.1, "eps": 1e-2},
        {"params": list(model.first.parameters()), "weight_decay": 0.3},
    ]
    problem = problem.with_stage("only", optimizer=ADAM(groups, lr=0.03))
    plain = weights(train_plainly(problem.chain, problem.phi))
    assert relative_error(weights(library.as_chain(problem).unroll(problem.phi)), plain) < 1e-12
    assert relative_error(library.hypergradient(problem), hypergradient(problem)) < 1e-12


def test_parameters_that_are_frozen_or_not_given_stay_as_they_are():
    problem = small_network(functools.partial(ADAM, lr=0.03))
    model = problem.chain["only"].model
    assert isinstance(model, Gained)
    model.first.bias.requires_grad_(False)
    given = [model.gain, *model.first.parameters()]
    problem = problem.with_stage("only", optimizer=ADAM(given, lr=0.03))
    trained = library.as_chain(problem).unroll(problem.phi)["only"]
    for name in ("first.bias", "last.weight", "last.bias"):
        assert torch.equal(trained.params[name], model.get_parameter(name))
    assert relative_error(library.hypergradient(problem), hypergradient(problem)) < 1e-12


class Scalars(nn.Module):
    """Three 0-dim parameters, of which two always have the same gradient (0 with the third input)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset, self.shift = (nn.Parameter(torch.tensor(v).double()) for v in (1.3, 0.7, 0.4))

    def forward(self, inputs):
        return (self.slope * inputs[:, :1] + (self.offset + self.shift) * inputs[:, 2:]).tanh()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factory", [functools.partial(SGD, lr=0.1, momentum=0.9), functools.partial(ADAM, lr=0.03)])
def test_scalar_parameters_are_parameters(factory, dtype):
    problem = small_network(factory).with_stage("only", model=Scalars().to(dtype))
    problem.phi.to(dtype)
    batches = [{k: v.to(dtype) for k, v in batch.items()} for batch in problem.chain["only"].batches]
    batch = {k: v.to(dtype) for k, v in problem.batch.items()}
    problem = replace(problem.with_stage("only", batches=batches), batch=batch)
    bound = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    chain = library.as_chain(problem)
    plain = weights(train_plainly(problem.chain, problem.phi))
    assert relative_error(weights(chain.unroll(problem.phi)), plain) < bound
    assert relative_error(library.hypergradient(problem, chain), hypergradient(problem)) < bound
    chain.commit(chain.unroll(problem.phi))
    twin = chain.twin(torch.float64)  # its used optimizer follows the dtype
    phi = copy.deepcopy(problem.phi).double()
    assert relative_error(weights(twin.unroll(phi)), weights(chain.unroll(problem.phi))) < bound
    assert relative_error(weights(twin.train(phi)), weights(chain.train(problem.phi))) < bound


class Branching(nn.Module):
    """Two layers, the second of which is used only on batches whose first entry is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = (nn.Linear(3, 1, dtype=torch.float64) for _ in range(2))

    def forward(self, inputs):
        return self.always(inputs).tanh() + (self.sometimes(inputs) if inputs[0, 0] > 0 else 0)


@pytest.mark.parametrize("case", ["sgd-decay", "adam-decay", "adamw-amsgrad"])
@pytest.mark.parametrize("entries", [(-1.0, 1.0), (1.0, -1.0)], ids=["late", "early"])
def test_a_parameter_without_gradient_waits_as_in_torch(case, entries):
    torch.manual_seed(0)
    problem = problem_of(case).with_stage("only", model=Branching(), num_steps=5)
    for batch, first in zip(problem.chain["only"].batches, entries, strict=True):
        batch["inputs"][0, 0] = first
    plain = weights(train_plainly(problem.chain, problem.phi))
    assert relative_error(weights(library.as_chain(problem).unroll(problem.phi)), plain) < 1e-12
    found = library.hypergradient(problem)
    assert relative_error(found, hypergradient(problem)) < 1e-12
    assert difference_error(found, problem, num_random=1) < 1e-8


REFUSED = [
    functools.partial(kind, lr=0.1)
    for kind in (
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.ASGD,
        torch.optim.Rprop,
        torch.optim.LBFGS,
        torch.optim.Adafactor,
    )
]


@pytest.mark.parametrize("factory", REFUSED, ids=lambda f: f.func.__name__)
def test_an_optimizer_that_is_not_proven_is_refused_by_name(factory):
    with pytest.raises(metaopt.ConfigError, match=rf"{factory.func.__name__}.*\(SGD, Adam, AdamW\).*partial\("):
        library.as_chain(small_network(factory))


def test_a_subclass_is_not_taken_for_its_base():
    class Louder(SGD):
        def step(self, closure=None):
            super().step(closure)
            super().step(closure)

    with pytest.raises(metaopt.ConfigError, match="Louder"):
        library.as_chain(small_network(functools.partial(Louder, lr=0.1)))


def test_step_hooks_are_refused():
    problem = small_network(functools.partial(SGD, lr=0.1))
    model, optimizer = problem.chain["only"].private_copy()
    optimizer.register_step_post_hook(lambda *args: None)
    with pytest.raises(metaopt.StageError, match=r"hook.*transform="):
        metaopt.Stage(model, optimizer, problem.chain["only"].loss, problem.chain["only"].batches, 2)


def test_an_optimizer_over_another_module_is_refused():
    problem = small_network(functools.partial(SGD, lr=0.1))
    stage = problem.chain["only"]
    with pytest.raises(metaopt.ConfigError, match="build it over the same module"):
        metaopt.Stage(stage.model, SGD(Gained().parameters(), lr=0.1), stage.loss, stage.batches, 2)
