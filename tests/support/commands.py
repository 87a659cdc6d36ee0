"""Runs of the commands, and what they leave behind."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from metaopt.app import cli
from metaopt.app.config import prepare
from metaopt.app.run import train

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = {"metaopt": cli.main, "metaopt-check": cli.check_main, "metaopt-fidelity": cli.fidelity_main}
DIGITS = ("experiment=digits", "debug=tiny")
QUICK = (*DIGITS, "trainer.check_first_step=false", "final.compare=[]", "output.plots=false")

FEW_DATES = ("data.num_train=256", "data.num_unlabelled=128", "data.num_validation=32", "data.num_selection=32")
FEW_DATES += ("data.num_test=32", "model.hidden_size=16")


def run(folder: Path, *overrides: str) -> float:
    """One run in this process."""
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        return train(prepare(compose("config", overrides=list(overrides)), overrides), str(folder))


def command(cwd: Path, *arguments: str, program: str = "metaopt") -> subprocess.CompletedProcess[str]:
    """A command as it is typed in the user's folder, in this process, which is left as it was."""
    out, err, root, code = io.StringIO(), io.StringIO(), logging.getLogger(), 0
    handlers, level = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [program, *arguments])
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("COLUMNS", "100")
        patch.setenv("HYDRA_FULL_ERROR", "")  # so that it is put back
        patch.delenv("HYDRA_FULL_ERROR")
        try:
            PROGRAMS[program]()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
            print(left.code if isinstance(left.code, str) else "", file=err)
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(f"{cwd}{os.sep}")]:
        del sys.modules[name]
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def process(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: it takes seconds to import torch."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    env.pop("HYDRA_FULL_ERROR", None)
    line = [sys.executable, "-m", "metaopt", *arguments]
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def files(folder: Path) -> set[str]:
    """What a command has left for its user, by path."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if path != ".lock" and not path.startswith("checkpoints/")}


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())
