"""The routes of `reference.py` and `closed_forms.py` agree with each other: they may judge the library."""

from __future__ import annotations

import ast
import functools
import pathlib

import pytest
import torch
from closed_forms import LinearTraining, closed_form
from differences import central_difference, difference_error, train_plainly
from problems import closed_hypergradient, linear_stages, small_network
from reference import hypergradient, relative_error, unroll


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_closed_form_hand_unroll_and_central_differences_agree(num_stages, momentum):
    stages, problem = linear_stages(num_stages, momentum)
    exact = closed_hypergradient(stages, problem)
    assert relative_error(hypergradient(problem), exact) < 1e-13
    assert difference_error(exact, problem, coordinates=[("values", 0), ("values", 4)]) < 1e-9
    closed = closed_form(stages, problem.phi.values.detach())
    by_hand, plain = unroll(problem.chain, problem.phi), train_plainly(problem.chain, problem.phi)
    for name in problem.chain:
        for trained in (by_hand[name], plain[name]):
            torch.testing.assert_close(trained.params["weight"][0], closed[name][0], rtol=1e-12, atol=1e-13)


def test_closed_form_converges_to_the_ridge_solution_and_its_implicit_derivative():
    stages, problem = linear_stages(1, momentum=0.5)
    phi = problem.phi.values.detach()
    stage = LinearTraining(**{**vars(stages["first"]), "num_steps": 600})
    theta, jacobian = closed_form({"first": stage}, phi)["first"]
    hessian = stage.features.T * phi @ stage.features / 6 + stage.ridge * torch.eye(3, dtype=torch.float64)
    solution = torch.linalg.solve(hessian, stage.features.T @ (phi * stage.labels) / 6)
    residuals = stage.features @ solution - stage.labels
    implicit = -torch.linalg.solve(hessian, stage.features.T * residuals / 6)
    torch.testing.assert_close(theta, solution, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jacobian, implicit, rtol=1e-7, atol=1e-9)


OPTIONS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.03, "weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.Adam, {"lr": 0.03, "eps": 0.1, "betas": (0.6, 0.7), "maximize": True}),
    (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.3}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_hand_written_formulas_are_those_of_torch(kind, options, warm):
    problem = small_network(functools.partial(kind, **options), warm)
    by_hand, plain = unroll(problem.chain, problem.phi)["only"], train_plainly(problem.chain, problem.phi)["only"]
    for name, value in plain.params.items():
        torch.testing.assert_close(by_hand.params[name], value, rtol=1e-13, atol=1e-14)
    assert difference_error(hypergradient(problem), problem, coordinates=[("values", 1)]) < 1e-8


def test_central_difference_says_how_good_it_is():
    smooth = central_difference(lambda x: (1 + x) ** 5, first=0.1)
    assert abs(smooth.value - 5) <= smooth.error < 1e-9
    kink = central_difference(lambda x: abs(x - 1e-3), first=0.1)
    assert kink.error > 1e-3


@pytest.mark.parametrize("file", ["reference.py", "differences.py", "closed_forms.py", "problems.py", "networks.py"])
def test_the_routes_use_neither_the_library_nor_higher(file):
    tree = ast.parse((pathlib.Path(__file__).parent.parent / "support" / file).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in imported}
    assert "torch" in roots
    assert not roots & {"higher", "metaopt"}
