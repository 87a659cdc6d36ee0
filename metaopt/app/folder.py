"""A run's folder: held by one process, with one run in it, whose `result.json` says how it stands."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

import metaopt
from metaopt.app.yaml_files import refuse_bomb
from metaopt.base.errors import ConfigError, first_line
from metaopt.saving.files import as_json, not_finite, write_text

RESULT, CONFIG, METRICS, CHECKPOINTS = "result.json", "config.yaml", "metrics.jsonl", "checkpoints"
PLOTS = tuple(f"{name}.png" for name in ("meta_loss", "comparison", "weights", "lowest_weights"))
FOLDERS = (CHECKPOINTS, "models", "final_models", "tensorboard", "wandb")
LEFT = (CONFIG, METRICS, "metrics.csv", "meta_params.safetensors", "meta_params_last.safetensors", *PLOTS, *FOLDERS)
PACKAGES = ("torch", "higher", "transformers", "hydra-core")
# What a run may be gone on with in another way: it changes none of its numbers.
FREE = ("facts", "output", "logger", "trainer.checkpoint_every", "trainer.keep_checkpoints")


class RunFolder:
    """A folder that this process holds, from `claim` to `release`.

    Nothing in it is changed before `open`, so that a run that is refused leaves the one there as it is.
    """

    def __init__(self, path: str | Path, file: str = RESULT) -> None:
        self.path, self.file = Path(path), file
        self.found: dict[str, Any] = {}  # the `result.json` of the run that was there
        self.written: dict[str, Any] = {}
        self.is_open = self._began = False
        self.error = ""  # of the last time that `result.json` could not be written
        self._lock = FileLock(self.path / ".lock", timeout=0)
        self._start = time.perf_counter()

    @property
    def holds_run(self) -> bool:
        """Whether a run that had begun was here when the folder was claimed."""
        return self._began

    def claim(self, may_hold: bool) -> None:
        """Keep every other process out, and look at what is there.

        Raises:
            ConfigError: another process has it; it cannot be written to; it holds a run, and `may_hold` is false.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            who = _read(self.path / RESULT)
            by = f" (process {who['process']} on {who['host']})" if "process" in who else ""
            raise ConfigError(f"{self.path} is in use by another run{by}; choose another hydra.run.dir=...") from None
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written to ({first_line(error)}); choose hydra.run.dir=..."
            ) from error
        self.found = _read(self.path / RESULT)
        foreign = (self.path / RESULT).exists() and not self.found  # a result that no run of ours has written
        self._began = foreign or (self.path / (CONFIG if self.file == RESULT else RESULT)).exists()
        if self._began and not may_hold:
            self.release()
            raise ConfigError(
                f"{self.path} holds a run ({self.found.get('status', 'of unknown end')}); go on with it: "
                f"metaopt resume={shlex.quote(str(self.path))}, or choose another hydra.run.dir=..., or replace it: "
                "overwrite=true"
            )

    def open(self, facts: Mapping[str, Any], anew: bool = True) -> None:
        """Begin to write: `result.json` says `running`. If `anew`, what another run has left is removed first."""
        if anew and self.found:
            for path in (self.path / name for name in LEFT):  # the config before all: without it there is no run
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in self.path.glob(".*.part"):  # a write that was cut
            path.unlink(missing_ok=True)
        self.is_open = True
        versions = {"metaopt-chain": metaopt.__version__, **{package: version(package) for package in PACKAGES}}
        self.written = {
            "status": "running",
            "process": os.getpid(),
            "host": platform.node(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "directory": os.getcwd(),
            "versions": {"python": platform.python_version(), **versions},
            **facts,
        }
        self._write()

    def tell(self, **found: Any) -> None:
        """Add to `result.json`; where that cannot be written (a full disk), go on, and keep why as `error`."""
        self.written = {**self.written, **found}
        try:
            self._write()
        except OSError as error:
            self.error = f"could not be written: {first_line(error)}"

    def _write(self) -> None:
        """Replace `result.json` as a whole; what is not finite is null, and named."""
        self.written["seconds"] = time.perf_counter() - self._start
        broken = list(not_finite({k: v for k, v in self.written.items() if k != "not_finite"}))
        self.written.pop("not_finite", None)
        if broken:
            self.written["not_finite"] = broken
        write_text(self.path / self.file, as_json(self.written, indent=2) + "\n")

    def release(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, or nothing where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """Return a run's `config.yaml` as plain containers, interpolations as they are.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = folder / CONFIG
    try:
        refuse_bomb(text := path.read_text(encoding="utf-8"), path)
        found = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)}); resume= takes the folder of a run") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no config; resume= takes the folder of a run")
    return found


def flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return what decides a run's numbers, by dotted path."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        place = f"{path}.{key}".lstrip(".")
        if place in FREE:
            continue
        found |= flat(value, place) if isinstance(value, Mapping) and value else {place: value}
    return found


def digest(config: Mapping[str, Any]) -> str:
    """Return a checksum of what decides a run's numbers."""
    return hashlib.sha256(as_json(dict(sorted(flat(config).items()))).encode()).hexdigest()[:16]
