"""`metaopt-fidelity`: what it leaves behind, its options, and how it says no."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import files
from hydra import compose, initialize_config_module

from metaopt.app import cli, inspections
from metaopt.app.config import prepare
from metaopt.base.errors import ConfigError
from metaopt.diagnostics.fidelity import OWN
from metaopt.diagnostics.fidelity_result import FidelityResult

SMALL = ("experiment=digits", "debug=tiny", "data.batch_size=20", "data.num_train=60", "model.hidden_sizes=[8]")
QUICK = (*SMALL, "fidelity.num_runs=1", "output.plots=false")
WITHOUT = [f"~fidelity.estimators.{name}" for name in ("recompute", "captured", "finite_difference", "neumann")]


@pytest.fixture(autouse=True)
def _few_objects() -> Iterator[None]:
    """Peaks are read after a collection of garbage, which goes through all that the test run holds: seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


def compared(folder: Path, *overrides: str) -> FidelityResult:
    """One comparison in this process."""
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        return inspections.compare_estimators(
            prepare(compose("fidelity", overrides=list(overrides)), overrides), str(folder)
        )


def names(result: FidelityResult) -> list[str]:
    return [row.name for row in result.rows]


@pytest.mark.slow
def test_what_a_comparison_leaves_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A captured product takes seconds to trace; it is compared in diagnostics/test_fidelity.py.
    result = compared(tmp_path, *SMALL, "fidelity.num_runs=1", "limits.num_steps=2", "~fidelity.estimators.captured")
    assert files(tmp_path) == {"config.yaml", "fidelity.json", "fidelity.png"}
    assert (tmp_path / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "fidelity.json").read_text())
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == names(result)
    assert {"unrolled", "finite_difference", "truncated", "conjugate_gradient", OWN} <= set(rows)
    for name in ("unrolled", "checkpointed", "recompute", OWN):
        assert rows[name]["in_float64"]["relative_error"] < 1e-10, name
        assert 0 < rows[name]["in_run"]["relative_error"] < 1e-3, name
    assert rows["truncated"]["in_float64"] == rows["one_step"]["in_float64"]  # half of two steps
    assert rows["truncated"]["in_float64"]["relative_error"] > 1e-3
    one_step, checkpointed, recompute = (rows[n]["cost"]["flops"] for n in ("one_step", "checkpointed", "recompute"))
    assert one_step < checkpointed < recompute
    assert written["versions"]["python"]
    assert written["num_threads"] == 1
    shown = capsys.readouterr().out
    for part in ("2 teacher + 2 student steps", "in float32", "(plain training)", "→ fewest bytes, exact: "):
        assert part in shown


def test_estimators_come_and_go_by_override(tmp_path: Path) -> None:
    without = [override for override in WITHOUT if "neumann" not in override]
    mine = "+fidelity.estimators.mine={_target_: metaopt.Neumann, terms: 2}"
    beside = ("estimator=checkpointed", "product=finite_difference", "fidelity.estimators.neumann.terms=3")
    rows = {row.name: row.estimator for row in compared(tmp_path, *QUICK, *without, mine, *beside).rows}
    listed = ["unrolled", "checkpointed", "truncated", "one_step", "first_order", "neumann", "conjugate_gradient"]
    assert list(rows) == [*listed, "mine", OWN]
    assert rows["mine"] == "Neumann(2, product=DoubleBackward())"
    assert rows["one_step"] == "OneStep(product=FiniteDifference(epsilon=None))"
    assert rows["neumann"].startswith("Neumann(3,")
    assert rows[OWN].startswith("Checkpointed(product=FiniteDifference(")
    assert "DoubleBackward()" in rows["checkpointed"]


def test_points_lie_apart_by_meta_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metaopt.core.chain import Chain
    from metaopt.trainer import MetaTrainer

    taken: list[str] = []
    for owner, method in ((MetaTrainer, "meta_step"), (Chain, "train")):
        original = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda *a, o=original, m=method, **k: taken.append(m) or o(*a, **k))
    few = [f"~fidelity.estimators.{n}" for n in ("unrolled", "truncated", "first_order", "conjugate_gradient")]
    options = ("fidelity.warmup_steps=3", "fidelity.meta_steps=2", "fidelity.num_points=3", "fidelity.point_every=1")
    result = compared(tmp_path, *QUICK, *WITHOUT, *few, *options)
    assert taken == ["train", "train", *["meta_step"] * 4]  # the first for the rehearsal
    assert (result.num_points, result.num_runs) == (3, 1)
    assert "at 3 points of the training" in result.title


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fidelity.num_runs=0"], "fidelity.num_runs = 0: must be at least 1"),
        (["+fidelity.num_point=2"], r"there is no such option \(did you mean 'num_points'"),
        (["fidelity.estimators.neumann.terms=few"], "fidelity.estimators.neumann.terms = 'few': .*a whole number"),
        (["+fidelity.estimators.mine={_target_: metaopt.OneSteps}"], r"mine\._target_ = .*did you mean 'OneStep'"),
        (["fidelity.estimators.truncated.share=2"], "fidelity.estimators.truncated: TruncatedShare: share=2"),
        (["+fidelity.estimators.mine={_target_: metaopt.Captured}"], "mine: the target returned a Captured, not a"),
        (["fidelity.estimators.one_step=null"], "fidelity.estimators.one_step = None: must be a mapping"),
        (["meta_params=uniform"], "there is no hypergradient: "),
    ],
)
def test_what_cannot_be_compared_is_refused(overrides: Sequence[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compared(tmp_path, *QUICK, *overrides)
    assert not files(tmp_path)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> Any:
        quiet = ("hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "hydra.output_subdir=null")
        monkeypatch.setattr(sys, "argv", ["metaopt-fidelity", f"hydra.run.dir={tmp_path}", *quiet, *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")
        monkeypatch.delenv("HYDRA_FULL_ERROR")
        monkeypatch.setattr(sys, "path", list(sys.path))
        cli.fidelity_main()

    rest = [f"~fidelity.estimators.{n}" for n in ("unrolled", "truncated", "first_order", "conjugate_gradient")]
    command(*QUICK, *WITHOUT, *rest)
    assert "one_step" in (tmp_path / "fidelity.json").read_text()
    with pytest.raises(SystemExit, match="there is no such option") as left:
        command(*QUICK, "fidelity.num_run=3")
    assert "num_runs" in str(left.value)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command("--help")
    assert "point_every: 10" in capsys.readouterr().out
