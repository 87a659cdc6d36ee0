"""The benchmark's own arithmetic, on made-up figures: what it says of others, of bounds, and of the largest T."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "experiments" / "benchmark"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its modules, by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def row(seconds: float = 1.0, held: int = 100, flops: int = 300, error: float = 1e-15) -> dict[str, Any]:
    gradient = {"relative": error, "cosine": 1.0}
    return {"failed": None, "theta": 10, "bytes": held, "flops": flops, "float64, momentum": gradient,
            "time": {"seconds": [seconds], "over_plain": [seconds], "over_higher": [1.0]}}  # fmt: skip


def small(benchmark: Any, **rows: dict[str, Any]) -> Any:
    """Results of the quick form, in which everybody else of ours is the same."""
    figures, contestants = benchmark("figures"), benchmark("contestants")
    everybody = {c.name: row(flops=227) if c.name != "plain" else row(flops=100) for c in contestants.CONTESTANTS}
    return figures.WorkResults("mlp, momentum, small", {3: {**everybody, **rows}})


@pytest.mark.parametrize("there", [0, 1, 7, 100, 997, 3200, 5000])
def test_the_largest_t_is_found_within_a_tenth_and_never_above(benchmark, there):
    found = benchmark("largest").largest(lambda t: t <= there, 3200)
    assert found <= there
    assert found >= min(there, 3200) * 0.9


def test_who_is_better_in_any_figure_is_named_and_a_tie_is_not(benchmark):
    cells = benchmark("figures").better_elsewhere
    assert cells(small(benchmark)) == []
    (cell,) = cells(small(benchmark, torchopt=row(seconds=0.98, flops=227)))
    assert (cell.who.name, cell.what, cell.theirs, cell.best) == ("torchopt", "time over plain, T = 3", "0.98", "1.00")
    assert cell.all_beaten
    slow = {"gradients": row(seconds=3.0, flops=227), "higher": row(seconds=2.0, flops=227)}
    found = {cell.who.name: cell for cell in cells(small(benchmark, **slow))}
    assert (found["higher"].theirs, found["higher"].best, found["higher"].beaten) == ("2.00", "1.00", ("gradients",))
    assert not any(cell.all_beaten for cell in found.values())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"higher": {"failed": "RuntimeError: no"}}, "RuntimeError: no"),
        ({"higher": {}}, "was not run"),
        ({"unrolled": row(flops=227, error=1e-9)}, "relative error 1.0e-09"),
        ({"unrolled": row(flops=231)}, "2.310 plain trainings' flops"),
        ({"higher": {**row(flops=227), "bytes": None}}, "no bytes"),
    ],
)
def test_what_is_out_of_bounds_is_said(benchmark, changed, said):
    (line,) = benchmark("bounds").broken(small(benchmark, **changed))
    assert said in line


def test_nothing_is_said_of_who_keeps_the_bounds_or_is_not_installed(benchmark):
    missing = {"failed": "torchopt cannot be imported", "unavailable": True}
    assert benchmark("bounds").broken(small(benchmark, torchopt=missing, plain=row(seconds=99.0, flops=100))) == []
