"""How the house is built: a thin layer, few files at the top, no late imports, and a short way through a meta-step."""

from __future__ import annotations

import ast
import functools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metaopt

PACKAGE = Path(metaopt.__file__).parent
LAYER = ("base", "optimizers", "core")

# Where the house stands; each may only fall. To reach: 3,000 lines, 15 files, 232 calls.
MOST_LINES, MOST_FILES, MOST_CALLS = 3_318, 15, 229


def lines_of(*rooms: str) -> int:
    return sum(len(path.read_text().splitlines()) for room in rooms for path in (PACKAGE / room).rglob("*.py"))


def test_the_layer_is_thin():
    assert lines_of(*LAYER) <= MOST_LINES


def test_few_files_stand_outside_the_rooms():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_no_function_imports_a_module_of_ours_but_in_the_commands_start_up():
    late = set()
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = ast.walk(function)
                names = [node.module or "" for node in inside if isinstance(node, ast.ImportFrom)]
                late |= {path.name for name in names if name.split(".")[0] == "metaopt"}
    assert late <= {"cli.py"}


# --- a meta-step, traced: two stages, their weights and objective as a user has them


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


def trainer(num_steps: int) -> metaopt.MetaTrainer:
    torch.manual_seed(0)
    batches: list[Any] = [
        {"inputs": torch.randn(4, 8), "labels": torch.randint(3, (4,)), "index": torch.arange(4)} for _ in range(3)
    ]
    weights = metaopt.ExampleWeights(4)
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    chain = metaopt.Chain(
        teacher=metaopt.Stage(Model(), sgd, metaopt.WeightedLoss(), batches, num_steps),
        student=metaopt.Stage(Model(), sgd, metaopt.Distillation("teacher"), batches, num_steps),
    )
    adam = torch.optim.Adam(weights.parameters(), lr=0.1)
    return metaopt.MetaTrainer(chain, metaopt.ValidationLoss("student"), weights, adam, batches)


def calls_of_a_meta_step(num_steps: int) -> Counter[str]:
    """File of the package → calls of its functions in a second meta-step, comprehensions and generators' turns too."""
    run, calls = trainer(num_steps), Counter[str]()
    run.meta_step()

    def note(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            calls[frame.f_code.co_filename.removeprefix(str(PACKAGE))] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run.meta_step()
    finally:
        sys.setprofile(before)
    return calls


def test_a_meta_step_passes_through_few_files_and_a_further_inner_step_through_few_calls():
    two, three = calls_of_a_meta_step(2), calls_of_a_meta_step(3)
    assert len(three) <= MOST_FILES, sorted(three)
    assert three.total() - two.total() <= MOST_CALLS, (three - two).most_common()
