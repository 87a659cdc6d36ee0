"""Sweeps: the table at the end, exit codes, the same sweep again, interrupts, and jobs that leave one another alone."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import QUICK, command, records, result, run
from filelock import FileLock
from rich.console import Console

from metaopt.app.sweep import JOBS, STOP, Sweep, as_job
from metaopt.app.sweep_table import print_table
from metaopt.base.errors import ConfigError, MetaoptError

SWEEP = ("-m", *QUICK, "output.save_models=false", "hydra.sweep.dir=sweep")

PLUG_INS = """
import os, pathlib, signal
import metaopt

class Ends(metaopt.ValidationLoss):
    def __call__(self, trained, batch, meta_params):
        if os.path.exists("end"):
            exec(pathlib.Path("end").read_text())
        return super().__call__(trained, batch, meta_params)

class Fails(metaopt.Logger):
    def __init__(self, folder): pass
    def __call__(self, record): pass
    def close(self): pass
    def finish(self, *_): raise ValueError("no space [/]")
"""


def rows(said: str) -> dict[str, list[str]]:
    """Job → the other cells of its row."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│ ")]
    return {row[0]: row[1:] for row in cells if row[0].isdigit()}


def bits(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    lines = [{key: value for key, value in record.items() if key != "seconds"} for record in records(folder)]
    return lines, (folder / "meta_params.safetensors").read_bytes()


def test_the_same_sweep_again_runs_only_what_is_missing_or_failed(tmp_path: Path) -> None:
    done = command(tmp_path, *SWEEP, "optimizer.lr=-1,0.1")
    assert done.returncode == 1
    score = result(tmp_path / "sweep" / "1")["score"]
    assert rows(done.stdout) == {"0": ["-1", "failed", ""], "1": ["0.1", "complete", f"{score:.6g}"]}
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("job 0"))
    assert line.startswith("job 0 (optimizer.lr=-1): stages.teacher.optimizer: ")
    assert line.endswith("Invalid learning rate: -1")
    assert "hydra.sweep.dir=sweep runs what is missing or failed" in done.stdout
    before = bits(tmp_path / "sweep" / "1"), result(tmp_path / "sweep" / "1")

    done = command(tmp_path, *SWEEP, "optimizer.lr=0.2,0.1")
    assert done.returncode == 0, done.stderr
    assert [row[1] for row in rows(done.stdout).values()] == ["complete", "complete"]
    assert "sweep/1: complete already" in done.stdout.replace("\n", "")
    assert (bits(tmp_path / "sweep" / "1"), result(tmp_path / "sweep" / "1")) == before

    done = command(tmp_path, *SWEEP, "optimizer.lr=0.2,0.3")
    assert done.returncode == 1
    assert [row[1] for row in rows(done.stdout).values()] == ["complete", "failed"]
    assert "is of another training; " in done.stdout
    assert "optimizer.lr: 0.1 there, 0.3 here" in done.stdout
    assert (bits(tmp_path / "sweep" / "1"), result(tmp_path / "sweep" / "1")) == before


def test_a_signal_ends_a_sweep_and_the_same_command_finishes_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUG_INS)
    (tmp_path / "end").write_text("os.kill(os.getpid(), signal.SIGTERM)")
    before = signal.getsignal(signal.SIGTERM)
    mine = ("objective=custom", "objective._target_=mine.Ends", "+objective.stage=student")
    done = command(tmp_path, *SWEEP, *mine, "trainer.seed=0,1")
    assert done.returncode == 143, done.stderr
    assert rows(done.stdout) == {"0": ["interrupted", ""]}
    assert done.stderr.strip().splitlines() == [
        "SIGTERM: the sweep was interrupted; the same command with hydra.sweep.dir=sweep runs what is missing or failed"
    ]
    assert result(tmp_path / "sweep" / "0")["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == before
    (tmp_path / "end").write_text("import sys; sys.exit(0)")
    done = command(tmp_path, *SWEEP, *mine, "trainer.seed=0,1")
    assert done.returncode == 1
    assert [row[1] for row in rows(done.stdout).values()] == ["failed", "failed"]
    assert "something called sys.exit(0)" in done.stdout
    (tmp_path / "end").unlink()
    done = command(tmp_path, *SWEEP, *mine, "trainer.seed=0,1")
    assert done.returncode == 0, done.stderr
    assert [row[1] for row in rows(done.stdout).values()] == ["complete", "complete"]


def test_a_job_that_fails_after_learning_gives_its_score(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUG_INS)
    done = command(tmp_path, *SWEEP, "logger=custom", "logger._target_=mine.Fails", "trainer.seed=0")
    assert done.returncode == 1
    score = result(tmp_path / "sweep" / "0")["score"]
    assert rows(done.stdout) == {"0": ["complete_with_errors", f"{score:.6g}"]}
    assert "no space [/]" in next(line for line in done.stdout.splitlines() if line.startswith("job 0: "))


def test_jobs_of_one_process_give_the_bits_of_runs_alone(tmp_path: Path) -> None:
    done = command(tmp_path, *SWEEP, "hparams_search=seeds", "trainer.seed=0,1")
    assert done.returncode == 0, done.stderr
    options = (*QUICK, "output.save_models=false", "trainer.seed=1")
    for seed in (3, 4):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        run(tmp_path / str(seed), *options)
        assert bits(tmp_path / str(seed)) == bits(tmp_path / "sweep" / "1")
    assert bits(tmp_path / "sweep" / "0") != bits(tmp_path / "sweep" / "1")


# --- a job


class LearnedError(MetaoptError):
    score = 0.5


def raises(error: BaseException) -> Callable[[], float]:
    def work() -> float:
        raise error

    return work


def job(folder: Path, work: Callable[[], float]) -> tuple[float | None, dict[str, Any]]:
    hydra = SimpleNamespace(
        sweep=SimpleNamespace(dir=str(folder)),
        job=SimpleNamespace(num=7),
        runtime=SimpleNamespace(output_dir=str(folder / "7")),
    )
    score = as_job(hydra, ["a=1"], work, False)
    return score, json.loads((folder / JOBS / "7.json").read_text())


@pytest.mark.parametrize(
    ("work", "score", "status", "error"),
    [
        (lambda: 0.25, 0.25, "complete", ""),
        (raises(LearnedError("plots")), 0.5, "complete_with_errors", "plots"),
        (raises(ConfigError("no\nway")), None, "failed", "no\nway"),
        (raises(KeyError("mine")), None, "failed", "KeyError: 'mine'"),
        (lambda: float("nan"), None, "complete", ""),
        (raises(SystemExit(0)), None, "failed", "something called sys.exit(0)"),
    ],
)
def test_what_a_job_returns_and_leaves_behind(work, score, status, error, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    found, left = job(tmp_path, work)
    assert (found, left["score"], left["status"]) == (score, score, status)
    assert left["error"].startswith(error)
    assert "Traceback" not in capsys.readouterr().err


def test_what_ends_a_process_goes_through_a_job(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, raises(KeyboardInterrupt()))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    with pytest.raises(SystemExit):
        job(tmp_path, raises(SystemExit(-1)))
    (tmp_path / JOBS / STOP).touch()
    found, left = job(tmp_path, raises(AssertionError()))
    assert found is None
    assert left["status"] == "interrupted"  # as it was: nothing was begun


# --- the launching process


def test_jobs_that_run_are_told_to_end_and_lost_ones_are_failures(tmp_path: Path) -> None:
    sweep = Sweep(str(tmp_path), "joblib")
    sweep.begin()
    path = tmp_path / JOBS / "0.json"
    ends = f"trap \"sed -i s/running/interrupted/ '{path}'; exit\" TERM; echo ready; while :; do sleep 0.01; done"
    with subprocess.Popen(["sh", "-c", ends], stdout=subprocess.PIPE) as running:
        facts = {"overrides": [], "score": None, "error": "", "host": os.uname().nodename}
        path.write_text(json.dumps({"job": 0, "status": "running", "process": running.pid, **facts}))
        (tmp_path / JOBS / "1.json").write_text(json.dumps({"job": 1, "status": "running", "process": 2**22, **facts}))
        assert running.stdout is not None
        running.stdout.readline()
        start = time.monotonic()
        sweep.stop()
        assert time.monotonic() - start < 10  # and was not killed for want of an answer
    assert [found["status"] for found in sweep.jobs(interrupted=True)] == ["interrupted", "interrupted"]
    lost = sweep.jobs(interrupted=False)[1]
    assert (lost["status"], "ended without a word" in lost["error"]) == ("failed", True)
    sweep.end()


def test_a_sweep_s_folder_is_held_by_one(tmp_path: Path) -> None:
    (tmp_path / "sweep" / JOBS).mkdir(parents=True)
    with FileLock(tmp_path / "sweep" / JOBS / ".lock"):
        done = command(tmp_path, *SWEEP, "trainer.seed=0,1")
    assert done.returncode == 1
    assert "sweep is in use by another sweep; choose another hydra.sweep.dir=" in done.stderr


def test_jobs_in_slurm_go_on_and_the_report_says_how_to_stop_them(tmp_path, capsys):
    sweep = Sweep(str(tmp_path), "submitit_slurm")
    sweep.begin()
    facts = {"overrides": ["a=1"], "score": None, "error": "", "host": "node7", "process": 1}
    (tmp_path / JOBS / "0.json").write_text(json.dumps({"job": 0, "status": "running", **facts}))
    (tmp_path / ".submitit" / "17_0").mkdir(parents=True)
    sweep.stop()
    sweep.end()
    assert not (tmp_path / JOBS / STOP).exists()
    assert sweep.report(sweep.jobs(True), KeyboardInterrupt()) is False
    assert "the jobs in Slurm go on; stop them: scancel 17" in capsys.readouterr().out


def test_a_table_has_the_options_that_differ_and_shows_strings_as_they_are():
    file = io.StringIO()
    first = {"job": 0, "overrides": ["same=1", "a=[/x]"], "status": "complete", "score": 0.12345678, "error": ""}
    second = {"job": 1, "overrides": ["same=1", "+b=\x1b[31m"], "status": "failed", "score": None, "error": "x\n  [/y]"}
    print_table(Console(file=file, width=80), "[/z]", [first, second], ["$more [/]"])
    said = file.getvalue()
    assert rows(said) == {"0": ["[/x]", "", "complete", "0.123457"], "1": ["", r"\x1b[31m", "failed", ""]}
    assert "same" not in said
    assert said.splitlines()[-2:] == [r"job 1 (+b=\x1b[31m): x [/y]", "$more [/]"]
