"""`metaopt -m`: what each job of a sweep leaves on disk, and the process that launches them: it stops them and counts.

The jobs may run in other processes or on other machines: all that this process knows of them is in the sweep's folder.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from metaopt.app.config import told
from metaopt.app.interrupts import interruptible
from metaopt.app.steady import steady_console
from metaopt.app.sweep_table import GOOD, print_table
from metaopt.base.errors import MetaoptError, first_line
from metaopt.saving.files import as_json, write_text

JOBS, STOP = ".jobs", "stop"  # in the sweep's folder: a file for each job of the launch; in there, once it is stopped
SLURM = "submitit_slurm"
# Seconds after which a job that is to stop gets a signal: Ctrl-C may have reached it already, and SIGTERM does nothing
# under submitit.
SIGNALS = {0.5: signal.SIGTERM, 3.0: signal.SIGINT, 15.0: signal.SIGKILL}


# --- a job ----------------------------------------------------------------------------------------------------------


def as_job(hydra: Any, overrides: Sequence[str], work: Callable[[], float], wants_traceback: bool) -> float | None:
    """Do the work of one job; return its score, or None if it has none or failed, which harms no other job."""
    folder = Path(hydra.sweep.dir).absolute() / JOBS
    if (folder / STOP).exists():
        return None
    facts = {"job": hydra.job.num, "overrides": list(overrides), "folder": hydra.runtime.output_dir}
    facts |= {"process": os.getpid(), "host": platform.node()}

    def tell(status: str, score: float | None = None, error: str = "") -> float | None:
        found = {**facts, "status": status, "score": score, "error": error}
        write_text(folder / f"{hydra.job.num}.json", as_json(found) + "\n")
        return score if score is not None and math.isfinite(score) else None

    folder.mkdir(parents=True, exist_ok=True)
    tell("running")
    try:
        return tell("complete", work())
    except KeyboardInterrupt:
        tell("interrupted")
        raise
    except SystemExit as left:
        # So submitit leaves when it has queued the job again, and Ray at SIGTERM.
        if "SUBMITIT_EXECUTOR" in os.environ or (folder / STOP).exists():
            tell("interrupted")
            raise
        return tell("failed", error=f"something called sys.exit({left.code!r})")
    except Exception as error:
        text = told(error)
        if wants_traceback:
            traceback.print_exc()
        print(f"job {hydra.job.num}: {text}", file=sys.stderr, flush=True)
        # A `LateError` has one: it has learned what it should, and what came after has failed.
        score = getattr(error, "score", None) if isinstance(error, MetaoptError) else None
        return tell("failed" if score is None else "complete_with_errors", score, text)


# --- the launching process --------------------------------------------------------------------------------------------


class Watch(Callback):
    """What Hydra calls when a sweep begins; it is sent to the jobs' processes, so it holds nothing."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        sweep = Sweep(config.hydra.sweep.dir, str(OmegaConf.select(config, "hydra.runtime.choices.hydra/launcher")))
        sweep.begin()
        _begun.append(sweep)


_begun: list[Sweep] = []


def launch(run: Callable[[], Any], wants_traceback: bool) -> None:
    """Call what may launch a sweep; at a sweep's end print its table, and exit with code 1 if a job has failed."""
    error: BaseException | None = None
    try:
        run()
    except (KeyboardInterrupt, SystemExit, Exception) as caught:  # Ray makes SIGTERM a SystemExit
        error = caught
    sweep = _begun.pop() if _begun else None
    if sweep is not None:
        sweep.end()
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        failed = sweep.report(sweep.jobs(stopped), error)
        if failed and not (stopped or (error is not None and wants_traceback)):
            sys.exit(1)
    if error is not None:
        raise error


class Sweep:
    """A sweep as the process that launches it sees it."""

    def __init__(self, folder: str, launcher: str) -> None:
        self.folder, self.launcher = folder, launcher
        self.path = Path(folder).absolute() / JOBS
        self._held = ExitStack()

    def begin(self) -> None:
        """Hold the sweep's folder, forget the launch before, and pass signals on to the jobs.

        Raises:
            SystemExit: it cannot be written to, or is being swept; Hydra turns any other exception into a warning.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(FileLock(self.path / ".lock", timeout=0))
            for path in [*self.path.glob("*.json"), self.path / STOP]:
                path.unlink(missing_ok=True)
        except Timeout:
            sys.exit(f"{self.folder} is in use by another sweep; choose another hydra.sweep.dir=...")
        except OSError as error:
            sys.exit(f"{self.folder} cannot be written to ({first_line(error)}); choose another hydra.sweep.dir=...")
        self._held.enter_context(interruptible(self.stop))

    def end(self) -> None:
        """Let the folder go, and put the signal handlers back."""
        self._held.close()

    def stop(self) -> None:
        """Let the jobs on this machine end as they would alone; their launcher would kill them or leave them behind."""
        if self.launcher == SLURM:  # they outlive a closed terminal; the report says how to stop them
            return
        with suppress(OSError):
            (self.path / STOP).touch()
        since: dict[int, float] = {}
        sent: set[tuple[int, int]] = set()
        while running := {job["process"] for job in self._records() if _runs_here(job)}:
            now = time.monotonic()
            ages = {process: now - since.setdefault(process, now) for process in running}
            if min(ages.values()) > max(SIGNALS) + 1:
                return
            due = {(process, n) for process, age in ages.items() for after, n in SIGNALS.items() if age >= after}
            for process, number in due - sent:
                with suppress(OSError):
                    os.kill(process, number)
            sent |= due
            time.sleep(0.05)

    def jobs(self, interrupted: bool) -> list[dict[str, Any]]:
        """Return what the jobs that began have told of themselves, by number."""
        found = self._records()
        for job in found:
            goes_on = interrupted and (self.launcher == SLURM or _runs_here(job))
            if job["status"] == "running" and not goes_on:
                lost = "its process ended without a word (killed, or out of memory?)"
                job["status"], job["error"] = ("interrupted", "") if interrupted else ("failed", lost)
        return found

    def report(self, jobs: Sequence[dict[str, Any]], error: BaseException | None) -> bool:
        """Print the table and what can be done now; return whether a job has failed."""
        again = f"the same command with {shlex.quote(f'hydra.sweep.dir={self.folder}')} runs what is missing or failed"
        lines = []
        bad = sum(job["status"] not in GOOD for job in jobs)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            if self.launcher == SLURM:
                ids = {path.name.split("_")[0] for path in self.path.parent.glob(".submitit/*_*")}
                lines.append(f"the jobs in Slurm go on; stop them: scancel {' '.join(sorted(ids)) or '--name=metaopt'}")
            if isinstance(error, SystemExit):
                lines.append(f"SIGTERM: the sweep was interrupted; {again}")
            elif jobs or lines:
                error.said = f"{str(error) or 'SIGINT'}: the sweep was interrupted; {again}"  # type: ignore[attr-defined]
        elif bad:
            lines += [f"the launcher: {type(error).__name__}: {first_line(error)}"] if error is not None else []
            lines.append(again)
        print_table(steady_console(), self.folder, jobs, lines)
        return bad > 0

    def _records(self) -> list[dict[str, Any]]:
        found = []
        for path in self.path.glob("*.json"):
            with suppress(OSError, ValueError):
                found.append(json.loads(path.read_text(encoding="utf-8")))
        return sorted(found, key=lambda job: job["job"])


def _runs_here(job: dict[str, Any]) -> bool:
    """Whether a job runs in another process of this machine."""
    if job["status"] != "running" or job["host"] != platform.node() or job["process"] == os.getpid():
        return False
    try:
        os.kill(job["process"], 0)
    except OSError:
        return False
    return True
