"""Every supported inner optimizer and option is torch's own, and is differentiated: cold and from a used optimizer.

The table of `experiments/optimizers/run.py`, over optimizers × options in float64. Trajectory: at most 1e-12 from plain
`torch.optim`. Hypergradient, by `Unrolled` and `Checkpointed`: at most 1e-12 from the hand-written formulas where there
is one, and 1e-8 from central differences of the plain run.
"""

from __future__ import annotations

import copy
import functools
import runpy
from dataclasses import replace
from pathlib import Path

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
from metaopt.optimizers.kinds import REFUSED, SUPPORTED

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
EXPERIMENT = runpy.run_path(str(Path(__file__).parent.parent.parent / "experiments" / "optimizers" / "run.py"))
CASES = {
    f"{kind.__name__}({', '.join(f'{k}={v}' for k, v in options.items())})": (kind, options)
    for kind, variants in EXPERIMENT["OPTIONS"].items()
    for options in variants
}
# torch's own foreach ASGD rounds its rate, a float32, otherwise than its loop: they differ by 3e-9.
LOOSE = {"ASGD(lr=0.1, foreach=True)": (1e-8, 1e-7)}
table = pytest.mark.parametrize("case", CASES)
warmth = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])


def problem_of(case, warm=False):
    kind, options = CASES[case]
    problem = small_network(functools.partial(kind, **options), warm)
    return problem.with_stage("only", num_steps=EXPERIMENT["steps_of"](kind))


def weights(trained):
    return {name: value.detach() for name, value in trained["only"].params.items()}


def test_the_table_covers_every_supported_optimizer_and_documented_option():
    assert set(EXPERIMENT["OPTIONS"]) == set(SUPPORTED) >= set(FORMULAS)
    for kind, variants in EXPERIMENT["OPTIONS"].items():
        documented = set(kind([nn.Parameter(torch.zeros(1))]).defaults)
        untried = documented - {"lr", "differentiable", "capturable"} - {key for options in variants for key in options}
        # fused: where torch has it, in the table for SGD, Adam, AdamW, Adagrad
        assert not untried - {"fused", "decoupled_weight_decay", "foreach"}, (kind, untried)


@pytest.mark.sampled(3)
@table
@warmth
def test_the_table(case, warm):
    """Trajectory and hypergradient of one optimizer with one set of options, from one start."""
    near, close = LOOSE.get(case, (1e-12, 1e-8))
    problem = problem_of(case, warm)
    plain = weights(train_plainly(problem.chain, problem.phi))
    chain, swept = library.as_chain(problem), library.as_chain(problem, estimator=Checkpointed())
    assert relative_error(weights(chain.unroll(problem.phi)), plain) < near
    assert relative_error(weights(swept.unroll(problem.phi)), plain) < 1e-15
    assert relative_error(weights(chain.train(problem.phi)), plain) < 1e-15
    start = {n: p.detach() for n, p in problem.chain["only"].model.named_parameters()}
    assert relative_error(plain, start) > 1e-3
    found = library.hypergradient(problem)
    assert difference_error(found, problem, num_random=1) < close
    if problem.chain["only"].private_copy()[1].__class__ in FORMULAS:
        assert relative_error(found, hypergradient(problem)) < 1e-12
    assert relative_error(library.hypergradient(problem, swept), found) < max(close, 1e-12) if case in LOOSE else 1e-12


def test_the_command_prints_that_table():
    row = EXPERIMENT["measure"](torch.optim.NAdam, {"lr": 0.03}, True)
    assert str(row).startswith("| NAdam | lr=0.03 | warm | ")
    assert row.trajectory < 1e-12
    assert max(row.unrolled, row.checkpointed) < 1e-8
    readme = (Path(__file__).parent.parent.parent / "experiments" / "optimizers" / "README.md").read_text()
    for case in EXPERIMENT["cases"]():
        kind, options, warm = case
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        assert f"| {kind.__name__} | {shown} | {'warm' if warm else 'cold'} |" in readme


def state_of(optimizer):
    entries = optimizer.state_dict()["state"].items()
    return {(slot, key): value for slot, entry in entries for key, value in entry.items() if value is not None}


@pytest.mark.parametrize("case", [case for case in CASES if case not in LOOSE])
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


WAITING = [
    "SGD(lr=0.1, momentum=0.9, weight_decay=0.2)",
    "Adam(lr=0.03, weight_decay=0.2)",
    "AdamW(lr=0.03, betas=(0.5, 0.5), amsgrad=True, eps=0.01)",
    "NAdam(lr=0.03, weight_decay=0.2)",
    "Adagrad(lr=0.1, weight_decay=0.2)",
    "ASGD(lr=0.1, weight_decay=0.2)",
]


@pytest.mark.parametrize("case", WAITING)
@pytest.mark.parametrize("entries", [(-1.0, 1.0), (1.0, -1.0)], ids=["late", "early"])
def test_a_parameter_without_gradient_waits_as_in_torch(case, entries):
    torch.manual_seed(0)
    problem = problem_of(case).with_stage("only", model=Branching(), num_steps=5)
    for batch, first in zip(problem.chain["only"].batches, entries, strict=True):
        batch["inputs"][0, 0] = first
    plain = weights(train_plainly(problem.chain, problem.phi))
    assert relative_error(weights(library.as_chain(problem).unroll(problem.phi)), plain) < 1e-12
    found = library.hypergradient(problem)
    if CASES[case][0] in FORMULAS:
        assert relative_error(found, hypergradient(problem)) < 1e-12
    assert difference_error(found, problem, num_random=1) < 1e-8
    swept = library.hypergradient(problem, library.as_chain(problem, estimator=Checkpointed()))
    assert relative_error(swept, found) < 1e-12


@pytest.mark.parametrize("name", [name for name in REFUSED if hasattr(torch.optim, name)])
def test_what_torch_cannot_differentiate_is_refused_with_its_own_reason(name):
    kind = getattr(torch.optim, name)

    def factory(params):
        return kind([p for p in params if p.dim() == 2] if name == "Muon" else params)

    with pytest.raises(
        metaopt.ConfigError, match=rf"{name} cannot train a stage: .*use one of SGD, .*partial\("
    ) as told:
        library.as_chain(small_network(factory))
    assert REFUSED[name] in str(told.value)


def test_every_torch_optimizer_is_either_supported_or_refused():
    classes = {c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    unknown = {c.__name__ for c in classes - set(SUPPORTED) - {torch.optim.Optimizer}} - set(REFUSED)
    assert not unknown


def test_a_rate_that_requires_grad_inside_the_optimizer_is_refused():
    factory = functools.partial(ADAM, lr=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(metaopt.ConfigError, match=r"'lr' that requires grad.*overrides="):
        library.as_chain(small_network(factory))


def test_hyperparameters_given_as_tensors_are_their_numbers():
    options = {"lr": torch.tensor(0.03), "betas": (torch.tensor(0.5), torch.tensor(0.75))}
    problem = small_network(functools.partial(ADAM, foreach=False, **options))
    same = small_network(functools.partial(ADAM, lr=options["lr"].item(), betas=(0.5, 0.75)))
    found = library.hypergradient(problem)
    assert relative_error(found, library.hypergradient(same)) < 1e-12


def test_a_subclass_is_not_taken_for_its_base_and_the_error_says_how_to_register_it():
    class Louder(SGD):
        def step(self, closure=None):
            super().step(closure)
            super().step(closure)

    with pytest.raises(metaopt.ConfigError, match=r"metaopt\.register_optimizer\(Louder\)"):
        library.as_chain(small_network(functools.partial(Louder, lr=0.1)))


@pytest.mark.parametrize("cls", [ADAM, nn.Linear, "Adam"])
def test_what_is_no_optimizer_of_one_s_own_is_not_registered(cls):
    with pytest.raises(metaopt.ConfigError, match="register_optimizer: "):
        metaopt.register_optimizer(cls)


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
