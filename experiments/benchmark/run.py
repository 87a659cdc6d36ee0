"""All contestants on the same work: error, flops, bytes held, processor time, resident size, the largest T under a cap.

    python experiments/benchmark/run.py --small                         # does it run, within its bounds? what CI runs
    python experiments/benchmark/run.py                                 # everything; an hour on one core
    python experiments/benchmark/run.py --workload bert2bert --steps 50 --measure time --only unrolled,captured
    python experiments/benchmark/report.py                              # tables and plots of what there is

What was measured is merged into results.json, and not measured again unless `--again` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from bounds import broken
from contestants import BASELINE, BY_NAME, CONTESTANTS, UNIT
from figures import read
from largest import CAPS, MOST, largest_resident
from machine import describe
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from work import OPTIMIZERS_OF, STEPS, Spec
from worker import REFERENCE, Process, started

HERE = Path(__file__).resolve().parent
TOGETHER, ALONE = ("error", "flops", "memory", "time"), ("resident", "largest")
SHORT = 10  # flops, which are linear in T, and errors in float64 are measured up to this T
SHOWN = 50  # resident sizes are measured at this T
ROUNDS = 7


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
            rows = data["works"].setdefault(title(spec), {}).setdefault(str(spec.num_steps), {})
            rows.setdefault(name, {}).update(values, session=self._session_in(data))
            self._write(file, data)

    def largest(self, spec: Spec, name: str, **values: Any) -> dict[str, Any]:
        """Return what is known of the largest T of a contestant, once `values` are written into it."""
        with self._opened() as (file, data):
            found = data["largest"].setdefault(title(spec), {}).setdefault(name, {})
            if values:
                found.update(values, session=self._session_in(data))
                self._write(file, data)
            return found

    def _session_in(self, data: dict[str, Any]) -> int:
        if self._number is None:
            self._number = len(data["sessions"])
            data["sessions"].append(self._session)
        return self._number

    @staticmethod
    def _write(file: IO[str], data: dict[str, Any]) -> None:
        file.truncate(0)
        file.write(json.dumps(data, indent=1) + "\n")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[IO[str], dict[str, Any]]]:
        """The file, which no other run can open meanwhile, and what it holds."""
        with self._path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            yield file, json.loads(text) if text else {"sessions": [], "works": {}, "largest": {}}


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
            self._known[optimizer] = self._process.ask(REFERENCE, "gradient", dtype="float64", optimizer=optimizer)
        if "value" not in self._known[optimizer]:
            raise SystemExit(f"the reference failed: {self._known[optimizer]['failed']}")
        return self._known[optimizer]["value"]


def measure_costs(
    results: Results, spec: Spec, name: str, wanted: Sequence[str], process: Process, references: References
) -> bool:
    """Measure errors, flops and memory of one contestant; return whether it could be run at all."""
    first = process.ask(name, "gradient")
    if "failed" in first:
        results.put(spec, name, failed=first["failed"], unavailable=first.get("unavailable", False))
        return False
    values: dict[str, Any] = {
        "failed": None,
        "notes": first["notes"],
        "theta": process.ask(name, "weight_bytes")["value"],
    }
    if "memory" in wanted:
        values["bytes"] = process.ask(name, "bytes_held").get("value")
    if "flops" in wanted:
        values["flops"] = process.ask(name, "flops").get("value")
    if "error" in wanted and name != UNIT:
        values[f"{spec.dtype}, {spec.optimizer}"] = error_of(first["value"], references.of(spec.optimizer))
        others = [("float64", spec.optimizer), ("float64", "sgd"), ("float32", "sgd")]
        for dtype, optimizer in others if spec.num_steps <= SHORT and not spec.small else ():
            found = process.ask(name, "gradient", dtype=dtype, optimizer=optimizer)
            if "value" in found:
                values[f"{dtype}, {optimizer}"] = error_of(found["value"], references.of(optimizer))
    results.put(spec, name, **values)
    return True


def measure_times(
    results: Results, spec: Spec, names: Sequence[str], rounds: int, process: Process, progress: Progress
) -> None:
    """Time all contestants in one process, by turns: every ratio is between neighbours in the same round."""
    task = progress.add_task(f"time, {title(spec)}, T = {spec.num_steps}", total=rounds * len(names))
    for name in names:
        if BY_NAME[name].captures:  # its first call is not one of the rounds
            process.ask(name, "gradient")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(process.ask(name, "seconds").get("value", float("nan")))
            progress.advance(task)
    for name, taken in times.items():
        bases = [base for base in (UNIT, BASELINE) if base in times]
        over = {f"over_{base}": [a / b for a, b in zip(taken, times[base], strict=True)] for base in bases}
        results.put(spec, name, time={"seconds": taken, **over})
    progress.remove_task(task)


def measure(results: Results, spec: Spec, options: argparse.Namespace, progress: Progress) -> None:
    """Measure one workload at one T."""
    task = progress.add_task(f"{title(spec)}, T = {spec.num_steps}", total=len(options.only))
    wanted = {name: missing(results, spec, name, options.measure, options.again) for name in options.only}
    with started(spec) as process:
        references = References(process)
        timed = [name for name, measures in wanted.items() if "time" in measures]
        if timed:
            timed = [name for name in BY_NAME if name in {*timed, UNIT}]
        for name, measures in wanted.items():
            runs = not set(TOGETHER) & set(measures) or measure_costs(
                results, spec, name, measures, process, references
            )
            if not runs and name in timed:
                timed.remove(name)
            progress.advance(task)
        if timed:
            measure_times(results, spec, timed, options.rounds, process, progress)
    for name in (n for n, measures in wanted.items() if "resident" in measures):
        with started(spec) as process:
            if "failed" not in process.ask(name, "weight_bytes"):
                results.put(spec, name, resident=process.ask(name, "resident").get("value"))
    progress.remove_task(task)


def measure_largest(results: Results, spec: Spec, options: argparse.Namespace, progress: Progress) -> None:
    """Find the largest T of each exact contestant, in processes of their own."""
    names = [n for n in options.only if (BY_NAME[n].exact or n == UNIT) and not results.row(spec, n).get("failed")]
    task = progress.add_task(f"{title(spec)}, largest T", total=len(names))
    cap, most = CAPS[spec.workload], MOST[spec.workload]
    for name in names:
        if options.again or not results.largest(spec, name):
            with started(spec) as process:
                missing = "failed" in process.ask(name, "weight_bytes")  # it cannot run here: that is no T of 0
            if not missing:
                results.largest(spec, name, steps=largest_resident(spec, name, cap, most), cap=cap, most=most)
        progress.advance(task)
    progress.remove_task(task)


def missing(results: Results, spec: Spec, name: str, wanted: Sequence[str], again: bool) -> list[str]:
    """Return which of the wanted measures there are not yet."""
    row = results.row(spec, name)
    keys = {
        "error": f"{spec.dtype}, {spec.optimizer}",
        "flops": "flops",
        "memory": "bytes",
        "time": "time",
        "resident": "resident",
    }
    missed = {measure for measure, key in keys.items() if again or key not in row}
    missed -= {"error"} if name == UNIT else set()
    missed -= {"flops"} if spec.num_steps > SHORT else set()
    missed -= {"resident"} if spec.num_steps != SHOWN else set()
    return [measure for measure in wanted if measure in missed]


def in_bounds(path: Path) -> None:
    """End with a line for every contestant that did not run, and every flop count and error that is out of bounds."""
    _, works = read(path)
    lines = [line for work in works for line in broken(work)]
    if lines:
        raise SystemExit("\n".join(["out of bounds:", *lines]))
    print("every contestant that is installed ran; flops and errors are within their bounds")


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
    parser.add_argument("--measure", type=words, help=", ".join((*TOGETHER, *ALONE)))
    parser.add_argument("--rounds", type=int, help=f"of timed calls; {ROUNDS} if not given, 1 if small")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--optimizer", help="adam, sgd, momentum; each workload's own if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="tiny models, T = 3, float64; then the bounds are checked")
    parser.add_argument("--again", action="store_true", help="measure what there is already")
    parser.add_argument("--out", type=Path, help="results.json; results-small.json beside it if small")
    options = parser.parse_args()
    options.measure = options.measure or (list(TOGETHER) if options.small else [*TOGETHER, *ALONE])
    options.rounds = options.rounds or (1 if options.small else ROUNDS)
    return options


def specs(options: argparse.Namespace) -> list[Spec]:
    """Return the works that are asked for."""
    return [
        Spec(
            workload,
            steps,
            optimizer,
            dtype="float64" if options.small else "float32",  # small: one gradient tells whether it is exact
            device=options.device,
            hidden=options.hidden,
            small=options.small,
        )
        for workload in options.workload
        for optimizer in ([options.optimizer] if options.optimizer else OPTIMIZERS_OF[workload])
        for steps in options.steps or ((3,) if options.small else STEPS[workload])
    ]


def main() -> None:
    """Run what the command line asks for."""
    options = parsed()
    path = options.out or HERE / ("results-small.json" if options.small else "results.json")
    if options.small:
        path.unlink(missing_ok=True)  # what is checked is what is there now
    results = Results(path)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    asked = specs(options)
    with Progress(*columns) as progress:
        task = progress.add_task("all", total=len(asked))
        for spec in asked:
            measure(results, spec, options, progress)
            progress.advance(task)
        if "largest" in options.measure:
            for spec in dict.fromkeys(replace(spec, num_steps=1) for spec in asked):
                measure_largest(results, spec, options, progress)
    print(f"written to {path}; python {Path(__file__).with_name('report.py')} {path} makes tables and plots")
    if options.small:
        in_bounds(path)


if __name__ == "__main__":
    main()
