"""Runs of the commands, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from metaopt.app.cli import train
from metaopt.app.config import prepare

ROOT = Path(__file__).parent.parent.parent


DIGITS = ("experiment=digits", "debug=tiny")


QUICK = (*DIGITS, "trainer.check_first_step=false", "final.compare=[]", "output.plots=false")


def run(folder: Path, *overrides: str) -> float:
    """One run in this process."""
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        return train(prepare(compose("config", overrides=list(overrides)), overrides), str(folder))


def command(cwd: Path, *arguments: str, num_threads: int = 1) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in the user's folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(num_threads), "COLUMNS": "100"}
    env.pop("HYDRA_FULL_ERROR", None)
    line = [sys.executable, "-m", "metaopt", *arguments]
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())
