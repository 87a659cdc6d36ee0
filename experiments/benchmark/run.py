"""All contestants on the same work, each in a process of its own: error, flops, bytes held, resident size, wall time.

    python experiments/benchmark/run.py --small                         # does it run? a minute
    python experiments/benchmark/run.py                                 # everything; hours on one core
    python experiments/benchmark/run.py --workload bert2bert --steps 50 --measure time --only higher,unrolled
    python experiments/benchmark/report.py                              # tables and plots of what there is

What was measured is merged into results.json, and not measured again unless `--again` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from contestants import BY_NAME, CONTESTANTS, UNIT
from machine import describe
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from work import OPTIMIZER_OF, STEPS, Spec
from worker import REFERENCE, Process, started

HERE = Path(__file__).resolve().parent
MEASURES = ("error", "flops", "memory", "time")
SHORT = 10  # flops, which are linear in T, and errors in float64 are measured up to this T
SLOW, FEW = 60.0, 3  # from so many seconds a call on, so many repeats


class Results:
    """What was measured, by workload, T and contestant: a file, which several runs may write into."""

    def __init__(self, path: Path) -> None:
        self._path, self._session = path, describe()
        self._number: int | None = None
        path.parent.mkdir(parents=True, exist_ok=True)

    def row(self, spec: Spec, name: str) -> dict[str, Any]:
        """Return what there is of a contestant."""
        with self._opened() as (_, data):
            return data["works"].get(title(spec), {}).get(str(spec.num_steps), {}).get(name, {})

    def put(self, spec: Spec, name: str, **values: Any) -> None:
        """Write values into a contestant's entry, and which session they are from."""
        with self._opened() as (file, data):
            if self._number is None:
                self._number = len(data["sessions"])
                data["sessions"].append(self._session)
            rows = data["works"].setdefault(title(spec), {}).setdefault(str(spec.num_steps), {})
            rows.setdefault(name, {}).update(values, session=self._number)
            file.truncate(0)
            file.write(json.dumps(data, indent=1) + "\n")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[IO[str], dict[str, Any]]]:
        """The file, which no other run can open meanwhile, and what it holds."""
        with self._path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            yield file, json.loads(text) if text else {"sessions": [], "works": {}}


def title(spec: Spec) -> str:
    """Return a name that tells workloads of different sizes apart."""
    size = ", small" if spec.small else "" if spec.hidden == 64 else f", hidden {spec.hidden}"
    device = "" if spec.device == "cpu" else f", {spec.device}"
    return f"{spec.workload}, {spec.optimizer}{size}{device}"


def error_of(found: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    """Return the relative error and the cosine of a gradient against the reference."""
    a, b = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    return {"relative": float((a - b).norm() / b.norm()), "cosine": float(torch.cosine_similarity(a, b, dim=0))}


class References:
    """A's gradient by the hand unroll in float64, by optimizer; computed when it is first asked for."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, optimizer: str) -> Sequence[float]:
        """Return the gradient."""
        if optimizer not in self._known:
            self._known[optimizer] = self._process.ask("gradient", dtype="float64", optimizer=optimizer)
        if "value" not in self._known[optimizer]:
            raise SystemExit(f"the reference failed: {self._known[optimizer]['failed']}")
        return self._known[optimizer]["value"]


def measure_costs(results: Results, spec: Spec, name: str, wanted: Sequence[str], references: References) -> None:
    """Measure memory, flops and errors of one contestant, in this order: the first call shows the resident size."""
    with started(spec, [name]) as (process,):
        first = process.ask("resident")
        if "failed" in first:
            results.put(spec, name, failed=first["failed"])
            return
        values: dict[str, Any] = {
            "failed": None,
            "notes": first["notes"],
            "theta": process.ask("weight_bytes")["value"],
        }
        if "memory" in wanted:
            values.update(resident=first["value"]["bytes"], bytes=process.ask("bytes_held").get("value"))
        if "flops" in wanted and spec.num_steps <= SHORT:
            values["flops"] = process.ask("flops").get("value")
        if "error" in wanted and first["value"]["gradient"] is not None:
            values["float32"] = error_of(first["value"]["gradient"], references.of(spec.optimizer))
            others = [("float64", spec.optimizer), ("float64", "sgd"), ("float32", "sgd")]
            for dtype, optimizer in dict.fromkeys(others) if spec.num_steps <= SHORT else ():
                found = process.ask("gradient", dtype=dtype, optimizer=optimizer)
                if "value" in found:
                    values[f"{dtype}, {optimizer}"] = error_of(found["value"], references.of(optimizer))
        results.put(spec, name, **values)


def measure_times(results: Results, spec: Spec, names: Sequence[str], repeats: int, progress: Progress) -> None:
    """Time all contestants by turns: each waits in its own process while another one runs."""
    with started(spec, names) as processes:
        ready = [process for process in processes if process.is_ready()]
        times: dict[str, list[float]] = {process.name: [] for process in ready}
        task = progress.add_task(f"time, {title(spec)}, T = {spec.num_steps}", total=repeats * len(ready))
        for process in ready:
            if BY_NAME[process.name].captures:
                results.put(spec, process.name, first_call=process.ask("seconds").get("value"))
        for turn in range(repeats):
            for process in ready:
                taken = times[process.name]
                if turn < FEW or (taken and statistics.median(taken) < SLOW):
                    found = process.ask("seconds")
                    taken += [found["value"]] if "value" in found else []
                progress.advance(task)
        unit = statistics.median(times[UNIT])
        for name, taken in times.items():
            if taken:
                results.put(spec, name, seconds=taken, over_plain=statistics.median(taken) / unit)
        progress.remove_task(task)


def measure(results: Results, spec: Spec, options: argparse.Namespace, progress: Progress) -> None:
    """Measure one workload at one T."""
    names, wanted = options.only, options.measure
    task = progress.add_task(f"{title(spec)}, T = {spec.num_steps}", total=len(names))
    with started(spec, [REFERENCE]) as (hand,):
        references = References(hand)
        for name in names:
            if {"error", "flops", "memory"} & set(missing(results, spec, name, wanted, options.again)):
                measure_costs(results, spec, name, wanted, references)
            progress.advance(task)
    timed = [n for n in names if "time" in missing(results, spec, n, wanted, options.again)]
    if timed:
        measure_times(results, spec, list(dict.fromkeys((UNIT, *timed))), options.repeats, progress)
    progress.remove_task(task)


def missing(results: Results, spec: Spec, name: str, wanted: Sequence[str], again: bool) -> list[str]:
    """Return which of the wanted measures there are not yet."""
    row = results.row(spec, name)
    has = {"error": "float32" in row or name == UNIT, "memory": "bytes" in row, "time": "seconds" in row}
    has["flops"] = "flops" in row or spec.num_steps > SHORT
    return [measure for measure in wanted if again or not has[measure]]


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def words(text: str) -> list[str]:
        return text.split(",")

    def known(text: str) -> list[str]:
        for name in words(text):
            if name not in BY_NAME:
                raise argparse.ArgumentTypeError(f"no contestant {name!r}; there are: {', '.join(BY_NAME)}")
        return words(text)

    parser.add_argument("--workload", type=words, default=list(STEPS), help=", ".join(STEPS))
    parser.add_argument("--steps", type=lambda text: [int(t) for t in words(text)], help="values of T")
    parser.add_argument("--only", type=known, default=[c.name for c in CONTESTANTS], help=", ".join(BY_NAME))
    parser.add_argument("--measure", type=words, default=list(MEASURES), help=", ".join(MEASURES))
    parser.add_argument("--repeats", type=int, default=5, help=f"timed calls; {FEW} of those above {SLOW:.0f} s")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--optimizer", help="adam, sgd, momentum; each workload's own if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="tiny models, T = 2 and 4")
    parser.add_argument("--again", action="store_true", help="measure what there is already")
    parser.add_argument("--out", type=Path, help="results.json; results-small.json beside it if small")
    return parser.parse_args()


def main() -> None:
    """Run what the command line asks for."""
    options = parsed()
    path = options.out or HERE / ("results-small.json" if options.small else "results.json")
    results = Results(path)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        specs = [
            Spec(
                workload,
                steps,
                options.optimizer or OPTIMIZER_OF[workload],
                device=options.device,
                hidden=options.hidden,
                small=options.small,
            )
            for workload in options.workload
            for steps in options.steps or ((2, 4) if options.small else STEPS[workload])
        ]
        task = progress.add_task("all", total=len(specs))
        for spec in specs:
            measure(results, spec, options, progress)
            progress.advance(task)
    print(f"written to {path}; python {Path(__file__).with_name('report.py')} {path} makes tables and plots")


if __name__ == "__main__":
    main()
