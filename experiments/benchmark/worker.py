"""One contestant in a process of its own, which does what it is asked."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from by_hand import Run, by_formula
from contestants import BY_NAME, Contestant, UnavailableError
from torch import Tensor
from work import Spec, Work, build

from metaopt.diagnostics.meters import count_flops, peak_bytes, resident_peak

HERE = Path(__file__).resolve().parent
REFERENCE = "reference"


class Worker:
    """A contestant with its work; the first calls of torch's optimizers and kernels are behind it.

    Args:
        spec: of the work.
        name: of the contestant.
    """

    def __init__(self, spec: Spec, name: str) -> None:
        torch.set_num_threads(1)
        self.contestant = Contestant(REFERENCE, "hand unroll", by_formula) if name == REFERENCE else BY_NAME[name]
        self.device = spec.device
        self.contestant.make(build(replace(spec, num_steps=min(2, spec.num_steps))))()
        self.work: Work = build(spec)
        self.run: Run = self.contestant.make(self.work)

    def weight_bytes(self) -> int:
        """Return θ: the bytes of one model's weights."""
        return sum(p.numel() * p.element_size() for p in self.work.student.parameters())

    def resident(self) -> dict[str, Any]:
        """Return the growth of the process during the first call, and A's gradient by the way."""
        found: list[Tensor | None] = []
        grown = resident_peak(lambda: found.append(self.run()))
        return {"bytes": grown, "gradient": None if found[0] is None else found[0].tolist()}

    def gradient(self, **changes: Any) -> list[float] | None:
        """Return A's gradient of the same work in another dtype, or with another optimizer."""
        found = self.contestant.make(build(replace(self.work.spec, **changes)))()
        return None if found is None else found.tolist()

    def bytes_held(self) -> int:
        """Return the most bytes of tensors held at once."""
        return peak_bytes(self.run, self.device)

    def flops(self) -> int:
        """Return the flops of one call."""
        return count_flops(self.run)

    def seconds(self) -> float:
        """Return the wall time of one call."""
        self._synchronize()
        start = time.perf_counter()
        self.run()
        self._synchronize()
        return time.perf_counter() - start

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
            found = {"failed": str(error)}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            found = {"failed": f"{type(error).__name__}: {lines[0]}"[:300]}
    return {**found, "notes": list(dict.fromkeys(str(w.message) for w in heard if w.category is RuntimeWarning))}


def _serve(spec: Spec, name: str, connection: Connection) -> None:
    """Answer questions until there are no more."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (what libraries print would break the progress bar)
    made: list[Worker] = []
    connection.send(_guarded(lambda: made.append(Worker(spec, name))))
    while made:
        question, changes = connection.recv()
        connection.send(_guarded(lambda: getattr(made[0], question)(**changes)))  # noqa: B023


class Process:
    """A worker as the parent sees it."""

    def __init__(self, spec: Spec, name: str) -> None:
        self.name = name
        self.state: dict[str, Any] = {}
        self._connection, theirs = _context().Pipe()
        self._process = _context().Process(target=_serve, args=(spec, name, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def is_ready(self) -> bool:
        """Wait until it has built its work; return whether it could."""
        self.state = self.state or self._answer()
        return "failed" not in self.state

    def ask(self, question: str, **changes: Any) -> dict[str, Any]:
        """Call a method of the worker; return its `value`, or why it `failed`."""
        if not self.is_ready():
            return self.state
        self._connection.send((question, changes))
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            return {"failed": f"the process ended with code {self._process.exitcode}", "notes": []}

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


@contextmanager
def started(spec: Spec, names: Sequence[str]) -> Iterator[list[Process]]:
    """Workers, all started at once."""
    processes = [Process(spec, name) for name in names]
    try:
        yield processes
    finally:
        for process in processes:
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
