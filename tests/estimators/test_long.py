"""Long trainings: steps as the schedule's theory has them, flat memory, linear time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import long_training
import pytest
from torch import Tensor

from metaopt.core.plain import PlainSteps
from metaopt.estimators.revolve import num_runs

ROOT, SCRIPT = Path(__file__).parents[2], Path(long_training.__file__)


def measured(options: dict[str, Any], *lengths: int) -> list[dict[str, float]]:
    """What `long_training.py` prints."""
    code = "import sys; sys.path.insert(0, ''); import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    line = [sys.executable, "-c", code, str(SCRIPT), json.dumps(options), *map(str, lengths)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(row) for row in done.stdout.splitlines()]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("num_steps", "num_states"), [(300, 8), pytest.param(1000, 16, marks=pytest.mark.long)])
def test_few_states_give_the_hypergradient_of_all(num_steps, num_states, monkeypatch):
    """Each step is run up to four times: 300 steps are more than C(8 + 3, 3), and 1000 than C(16 + 3, 3)."""
    expected = long_training.hypergradient(num_steps, store="states")
    with monkeypatch.context() as patched:
        patched.setattr(PlainSteps, "gradient", PlainSteps.gradient)  # put back what `counted` replaces
        runs = long_training.counted()
        found = long_training.hypergradient(num_steps, store="recompute", num_states=num_states)
    assert runs == [2 * num_runs(num_steps, num_states)]
    assert float(expected.norm()) > 0
    assert relative(found, expected) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_states", "plain_trainings"), [pytest.param(16, 7.4, id="16 states"), pytest.param(32, 6.3, id="32 states")]
)
def test_ten_thousand_steps_are_run_as_often_as_in_theory(num_states, plain_trainings):
    (found,) = measured({"store": "recompute", "num_states": num_states}, 10_000)
    assert found["runs"] == num_runs(10_000, num_states) / 10_000
    assert round(3 + found["runs"], 1) == plain_trainings


@pytest.mark.long
@pytest.mark.parametrize("place", ["device", "disk"])
def test_memory_is_flat_and_time_linear(place, tmp_path):
    """Ten times the steps: at most 20 MB more, and a step takes at most 15 % longer."""
    num_states = 128 if place == "device" else 31
    options = {"store": "recompute", "place": place, "folder": str(tmp_path), "num_states": num_states}
    (few,) = measured(options, 1000)
    many, *again = measured(options, 10_000, 1000, 1000, 1000)  # time in one process, memory in fresh ones
    assert many["peak"] - few["peak"] <= 20e6
    assert many["seconds"] <= 1.15 * median(one["seconds"] for one in again)
    assert not list(tmp_path.iterdir())
