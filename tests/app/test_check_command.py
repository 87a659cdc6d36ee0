"""`metaopt-check`: verdicts and exit codes on right and wrong plug-ins, its options, and what it leaves behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import files
from hydra import compose, initialize_config_module

from metaopt.app import cli, inspections
from metaopt.app.config import prepare
from metaopt.base.errors import ConfigError, MissingPathError, StageError

ROOT = Path(__file__).parent.parent.parent
WRONG = ROOT / "experiments" / "wrong_plugins"
DIGITS = ("experiment=digits", "data.batch_size=20", "data.num_train=60", "model.hidden_sizes=[8]")
QUICK = (*DIGITS, "limits.num_steps=2", "check.num_directions=1", "check.steps=[1e-3,1e-4]")

LOSS, HANDOVER = ("loss=custom", "loss._target_=plugins."), ("handover=custom", "handover.loss._target_=plugins.")
TRANSFORM = ("transform@stages.teacher.transform=custom", "stages.teacher.transform._target_=plugins.")


def target(slot: tuple[str, str], name: str) -> list[str]:
    return [slot[0], slot[1] + name]


def check(folder: Path, *overrides: str) -> str:
    """One check in this process."""
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        return inspections.check(prepare(compose("check", overrides=list(overrides)), overrides), str(folder))


@pytest.fixture
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(WRONG))


def table(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "check.json").read_text())


def test_a_right_config_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, *QUICK, "check.coordinates={logits: [0, 5]}", "trainer.num_threads=2") == "agrees"
    assert files(tmp_path) == {"config.yaml", "check.json"}
    written = table(tmp_path)
    assert written["verdict"] == "agrees"
    assert written["num_threads"] == 2
    assert [row["direction"] for row in written["rows"]] == ["random 1", "entry 0", "entry 5"]
    assert [point["step"] for point in written["rows"][0]["sweep"]] == [1e-3, 1e-4]
    assert max(row["relative_error"] for row in written["rows"]) < 1e-4
    shown = capsys.readouterr().out
    for part in ("uncertain by", "h = 1e-03", "entry 5", "the hypergradient is right: 3 of 3 directions agree"):
        assert part in shown


@pytest.mark.usefixtures("_plugins")
@pytest.mark.parametrize(
    ("overrides", "remark"),
    [
        (target(LOSS, "DetachedNormaliser"), "plugins.py:24, in __call__"),
        (target(HANDOVER, "StaleTeacher"), "student.loss (StaleTeacher) keeps something"),
        ([*target(HANDOVER, "StaleTeacher"), "estimator=checkpointed"], "student.loss (StaleTeacher) keeps something"),
        (target(TRANSFORM, "clip_in_place"), "clip_in_place (plugins.py, line"),
    ],
    ids=["a detach", "a stale teacher", "a stale teacher, checkpointed", "a gradient in place"],
)
def test_a_wrong_plug_in_differs(overrides: Sequence[str], remark: str, tmp_path: Path) -> None:
    assert check(tmp_path, *QUICK, *overrides) == "differs"
    written = table(tmp_path)
    assert any(remark in text for text in ["differs", *written["remarks"], written["cuts"]])


@pytest.mark.usefixtures("_plugins")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (target(LOSS, "DecayInPlace"), r"DecayInPlace\.__call__ \(plugins\.py, line \d+\) updates in place what"),
        ([*target(LOSS, "DecayInPlace"), "estimator=checkpointed"], r"plugins\.py, line \d+\) updates in place what"),
        ([*target(HANDOVER, "StaleTeacher"), "check.warmup_steps=1"], r"plugins\.py, line \d+: .*kept from an earlier"),
    ],
)
def test_a_wrong_plug_in_that_cannot_be_run_is_named(overrides: Sequence[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=message):
        check(tmp_path, *QUICK, *overrides)


def test_a_straight_through_hand_over_is_undecided(tmp_path: Path) -> None:
    gumbel = ("handover=gumbel_samples", "handover.generate=null")
    assert check(tmp_path, *QUICK, *gumbel) == "undecided"
    assert "estimate by design" in table(tmp_path)["remarks"][0]
    assert check(tmp_path, *QUICK, *gumbel, "handover.loss.straight_through=false") == "agrees"


def test_the_options_reach_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from metaopt.core.chain import Chain
    from metaopt.diagnostics import check as checking

    steps: list[Any] = []
    given: dict[str, Any] = {}
    train, compare = Chain.train, checking.check_hypergradient
    monkeypatch.setattr(Chain, "train", lambda *a, **more: steps.append(more["num_steps"]) or train(*a, **more))
    monkeypatch.setattr(checking, "check_hypergradient", lambda *a, **more: given.update(more) or compare(*a, **more))
    options = ("check.num_directions=2", "check.coordinates=null", "check.show_sweep=false", "check.tolerance=1e-12")
    check(tmp_path, *QUICK, *options, "check.all_in_float64=true", "check.warmup_steps=1")
    assert steps[1:] == [{"teacher": 1, "student": 1}]  # after no step at all, for the rehearsal
    assert given["all_in_float64"] is True
    assert [row["direction"] for row in table(tmp_path)["rows"]] == ["random 1", "random 2"]
    assert table(tmp_path)["verdict"] != "agrees"
    assert "h = 1e-03" not in capsys.readouterr().out
    first = table(tmp_path)["rows"][0]["hypergradient"]
    check(tmp_path, *QUICK, "stages.teacher.warmup_steps=1", "check.seed=1")
    assert steps[3:] == [{"teacher": 1, "student": 0}]
    assert given["all_in_float64"] is False
    assert table(tmp_path)["rows"][0]["hypergradient"] != first


def test_few_entries_are_all_checked(tmp_path: Path) -> None:
    learned = ("meta_params=learning_rate", "loss=cross_entropy")
    check(tmp_path, *QUICK, *learned, "+stages.teacher.overrides._target_=metaopt.FromMeta")
    assert [row["direction"] for row in table(tmp_path)["rows"]] == ["entry 0"]  # a random one would be the same


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["check.num_directions=-1"], "check.num_directions = -1: must be at least 0"),
        (["check.steps=[1e-4]"], "a sweep needs two steps"),
        (["check.coordinates=all"], "check.coordinates = 'all': must be"),
        (["check.coordinates={logits: 3}"], "check.coordinates.logits = 3: must be a list"),
        (["check.coordinates={logit: [3]}"], "did you mean 'logits'"),
        (["+check.direction=3"], "there is no such option"),
        (["meta_params=uniform"], "there is no hypergradient: "),
    ],
)
def test_what_cannot_be_checked_is_refused(overrides: Sequence[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, *QUICK, *overrides)
    assert not (tmp_path / "check.json").exists() or table(tmp_path)["status"] == "failed"


def test_a_cut_path_is_the_same_error_as_in_a_run(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="logits"):
        check(tmp_path, *QUICK, "stages.teacher.loss._target_=metaopt.CrossEntropy")


# --- the command ------------------------------------------------------------------------------------------------


def exit_code(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> Any:
    """What the command exits with, in this process."""
    quiet = ("hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "hydra.output_subdir=null")
    monkeypatch.setattr(sys, "argv", ["metaopt-check", f"hydra.run.dir={folder}", *quiet, *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as left:
        cli.check_main()
    return left.value.code


@pytest.mark.slow
def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(WRONG)  # where a _target_ is looked for, too
    assert exit_code(monkeypatch, tmp_path, *QUICK) == 0
    assert exit_code(monkeypatch, tmp_path, *QUICK, *target(LOSS, "DetachedNormaliser")) == 2
    assert exit_code(monkeypatch, tmp_path, *QUICK, "handover=gumbel_samples", "handover.generate=null") == 3
    assert "meta_params=example_weights" in exit_code(monkeypatch, tmp_path, *QUICK, "meta_params=uniform")
    sweep = (
        *QUICK,
        "-m",
        f"hydra.sweep.dir={tmp_path}",
        "loss=weighted,custom",
        "loss._target_=plugins.DetachedNormaliser",
    )
    assert exit_code(monkeypatch, tmp_path, *sweep) == 2
    capsys.readouterr()
    assert exit_code(monkeypatch, tmp_path, "--help") == 0
    shown = capsys.readouterr().out
    assert "num_directions: 2  " in shown
    assert all(f"\n  {code}  {verdict}" in shown for verdict, code in cli.EXIT_CODES.items())
    assert torch.is_grad_enabled()


def test_it_is_a_console_script() -> None:
    assert 'metaopt-check = "metaopt.app.cli:check_main"' in (ROOT / "pyproject.toml").read_text()
