"""Contestants in a process beside this one, which does what it is asked: one alone, or several by turns."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from by_hand import Run, by_formula
from contestants import BY_NAME, Contestant, UnavailableError
from work import Spec, Work, build

from metaopt.diagnostics.meters import count_flops, peak_bytes, resident_peak

HERE = Path(__file__).resolve().parent
REFERENCE = "reference"


class Worker:
    """A contestant with its work; the first calls of torch's optimizers and kernels are behind it, but if small.

    Args:
        spec: of the work.
        name: of the contestant.
    """

    def __init__(self, spec: Spec, name: str) -> None:
        torch.set_num_threads(1)
        self.contestant = Contestant(REFERENCE, "hand unroll", by_formula) if name == REFERENCE else BY_NAME[name]
        self.device = spec.device
        if not spec.small:
            self.contestant.make(build(replace(spec, num_steps=min(2, spec.num_steps))))()
        self.work: Work = build(spec)
        self.run: Run = self.contestant.make(self.work)

    def weight_bytes(self) -> int:
        """Return θ: the bytes of one model's weights."""
        return sum(p.numel() * p.element_size() for p in self.work.student.parameters())

    def resident(self) -> int:
        """Return the growth of the process during the first call."""
        return resident_peak(self.run)

    def gradient(self, **changes: Any) -> list[float] | None:
        """Return A's gradient: of this work, or of the same in another dtype or with another optimizer."""
        run = self.contestant.make(build(replace(self.work.spec, **changes))) if changes else self.run
        found = run()
        return None if found is None else found.tolist()

    def bytes_held(self) -> int:
        """Return the most bytes of tensors held at once."""
        return peak_bytes(self.run, self.device)

    def flops(self) -> int:
        """Return the flops of one call."""
        return count_flops(self.run)

    def seconds(self) -> float:
        """Return the processor time of one call; on a GPU, which the processor's clock does not see, the wall time."""
        gc.collect()  # what another contestant left behind is not cleared away on this one's time
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        self._synchronize()
        start = clock()
        self.run()
        self._synchronize()
        return clock() - start

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _guarded(ask: Callable[[], Any]) -> dict[str, Any]:
    """Return `value`, or in `failed` the first line of what went wrong; and the warnings about numbers."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            found = {"value": ask()}
        except UnavailableError as error:
            found = {"failed": str(error), "unavailable": True}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            found = {"failed": f"{type(error).__name__}: {lines[0]}"[:300]}
    return {**found, "notes": list(dict.fromkeys(str(w.message) for w in heard if w.category is RuntimeWarning))}


def _serve(spec: Spec, connection: Connection) -> None:
    """Answer questions until there are no more; a contestant is built when it is first asked for."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (what libraries print would break the progress bar)
    gc.freeze()  # what the imports made is not gone through at every collection
    workers: dict[str, Worker] = {}

    def answer(name: str, question: str, changes: dict[str, Any]) -> Any:
        if name not in workers:
            workers[name] = Worker(spec, name)
        return getattr(workers[name], question)(**changes)

    while True:
        asked = connection.recv()
        connection.send(_guarded(lambda: answer(*asked)))  # noqa: B023


class Process:
    """The contestants of a work in one process, as the parent sees it."""

    def __init__(self, spec: Spec) -> None:
        self._connection, theirs = _context().Pipe()
        self._process = _context().Process(target=_serve, args=(spec, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, name: str, question: str, cap: float | None = None, **changes: Any) -> dict[str, Any]:
        """Call a method of a worker; return its `value`, or why it `failed`.

        The process is ended, and that is the failure, once it holds `cap` bytes more than it did when it was asked.
        """
        before = self._resident()
        try:
            self._connection.send((name, question, changes))
            while cap is not None and not self._connection.poll(0.02):
                if self._resident() > before + cap:
                    self.close()
                    return {"failed": f"more than {cap / 1e6:.0f} MB resident", "notes": []}
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            return {"failed": f"the process ended with code {self._process.exitcode}", "notes": []}

    def _resident(self) -> int:
        with contextlib.suppress(OSError, IndexError):
            return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def started(spec: Spec) -> Iterator[Process]:
    """A process for the contestants of this work."""
    process = Process(spec)
    try:
        yield process
    finally:
        process.close()


def _context() -> Any:
    """Return the way to start processes: as copies of one that has imported everything and computed nothing."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        context.set_forkserver_preload(["worker"])
    return context
