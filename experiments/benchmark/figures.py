"""What follows from the measured numbers: ratios, slopes, and the figures to reach."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contestants import BASELINE, BY_NAME, CONTESTANTS, OURS, UNIT, Contestant
from work import STEPS

ROUNDING = 1e-12  # relative errors in float64 below it are none


@dataclass(frozen=True)
class WorkResults:
    """The measurements of one workload: T → contestant → values; and contestant → its largest T."""

    title: str
    rows: dict[int, dict[str, Any]]
    largest: dict[str, Any] = field(default_factory=dict)

    @property
    def workload(self) -> str:
        return self.title.split(", ")[0]

    @property
    def optimizer(self) -> str:
        return self.title.split(", ")[1]

    @property
    def own(self) -> str:
        """The kind of gradient that is measured at every T: its dtype and optimizer."""
        return f"{'float64' if self.small else 'float32'}, {self.optimizer}"

    @property
    def small(self) -> bool:
        """Whether it is of `run.py --small`, whose figures are of no interest."""
        return ", small" in self.title

    @property
    def steps(self) -> list[int]:
        """Every T of the workload, and any other that was measured."""
        return sorted({*self.rows, *(() if self.small else STEPS[self.workload])})

    @property
    def shown(self) -> int:
        """The T that summaries are about: 50 if there, or else the largest."""
        return 50 if 50 in self.steps else self.steps[-1]

    @property
    def short(self) -> int:
        """The largest T that flops and errors in float64 were measured at."""
        measured = [t for t in self.rows if any("flops" in row for row in self.rows[t].values())]
        return max(measured, default=self.steps[0])

    @property
    def contestants(self) -> list[Contestant]:
        """Everybody who takes part, whether measured or not."""
        more = [c for c in BY_NAME.values() if any(c.name in rows for rows in self.rows.values())]
        return list(dict.fromkeys((*CONTESTANTS, *more)))

    def get(self, steps: int, name: str, *keys: str) -> Any:
        """Return a value, or None if it was not measured."""
        found: Any = self.rows.get(steps, {}).get(name, {})
        for key in keys:
            found = None if found is None else found.get(key)
        return found

    def error(self, key: str, steps: int, name: str) -> float | None:
        """Return the relative error; 0 where it is rounding in float64."""
        found = self.get(steps, name, key, "relative")
        return 0.0 if found is not None and key.startswith("float64") and found < ROUNDING else found

    def flops(self, name: str) -> float | None:
        """Return flops over those of plain training."""
        return _over(self.get(self.short, name, "flops"), self.get(self.short, UNIT, "flops"))

    def time(self, steps: int, name: str, over: str = UNIT) -> float | None:
        """Return the median, over the rounds, of the time over that of plain training, or of `higher`, in the round."""
        ratios = self.get(steps, name, "time", f"over_{over}")
        return statistics.median(ratios) if ratios else None

    def seconds(self, steps: int, name: str) -> float | None:
        """Return the median of the timed calls."""
        taken = self.get(steps, name, "time", "seconds")
        return statistics.median(taken) if taken else None

    def peak(self, steps: int, name: str) -> float | None:
        """Return the most bytes held at once, in bytes of one model's weights."""
        return _over(self.get(steps, name, "bytes"), self.get(steps, name, "theta"))

    def slope(self, name: str) -> float | None:
        """Return the growth of the peak per step and stage between the two largest T, in bytes of weights."""
        points = [(t, peak) for t in self.steps if (peak := self.peak(t, name)) is not None][-2:]
        if len(points) < 2:
            return None
        (t, low), (u, high) = points
        return (high - low) / (u - t) / 2


def read(path: Path) -> tuple[list[dict[str, Any]], list[WorkResults]]:
    """Return the sessions and the works of a results file."""
    data = json.loads(path.read_text())
    works = [
        WorkResults(title, {int(t): rows for t, rows in found.items()}, data["largest"].get(title, {}))
        for title, found in data["works"].items()
    ]
    used = {row.get("session") for work in works for rows in work.rows.values() for row in rows.values()}
    used |= {row["session"] for work in works for row in work.largest.values()}
    return [s for i, s in enumerate(data["sessions"]) if i in used], works


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


@dataclass(frozen=True)
class Goal:
    """A figure to reach, and what was measured."""

    what: str
    must: float
    found: float | None

    @property
    def reached(self) -> str:
        """In one word."""
        return "not measured" if self.found is None else "yes" if self.found <= self.must else "no"


def goals(work: WorkResults) -> list[Goal]:
    """Return the figures to reach on a workload: BERT2BERT's over plain training, the MLP pair's over `higher`."""
    short, t = work.short, work.shown
    exact = [c.name for c in work.contestants if c.ours and c.exact]

    def worst(steps: int, *keys: str) -> float | None:
        errors = (work.get(steps, name, key, "relative") for name in exact for key in keys)
        return max((e for e in errors if e is not None), default=None)

    by_hand = work.get(t, "checkpoint", work.own, "relative")
    floats = (f"float64, {work.optimizer}", "float64, sgd")
    found = [
        Goal(f"largest error in float64, T = {short}", 1e-10, worst(short, *floats)),
        Goal(f"largest error in float32 over the hand unroll's, T = {t}", 1.1, _over(worst(t, work.own), by_hand)),
    ]
    found += [Goal(f"flops of {_label(n)} over plain", 1.03 * floor, work.flops(n)) for n, floor in FLOORS.items()]
    over, most = (UNIT, TIMES) if work.workload == "bert2bert" else (BASELINE, {OURS: 1.05, "gradients": 1.6})
    than = "plain" if over == UNIT else "`higher`"
    for steps in (10, 50):
        found += [Goal(f"time of {_label(n)} over {than}, T = {steps}", m, work.time(steps, n, over))
                  for n, m in most.items()]  # fmt: skip
    slopes = _over(work.slope(OURS), work.slope(BASELINE))
    return [*found, Goal(f"memory slope of {_label(OURS)} over `higher`'s", 1.0, slopes)]


FLOORS = {"unrolled": 3.0, "states": 4.0, "gradients": 4.0, "recompute": 5.0, "captured": 11 / 3}
TIMES = {"unrolled": 3.1, "gradients": 4.2, "recompute": 5.0, "captured": 3.9}


def _label(name: str) -> str:
    return BY_NAME[name].label


@dataclass(frozen=True)
class Cell:
    """One figure of somebody else that is better than one of an exact estimator here.

    Args:
        who: the contestant.
        what: the quantity, and its T.
        theirs, best: their figure, and the best of the exact estimators here.
        beaten: the exact estimators here whose figure is worse.
        all_beaten: that they all are.
    """

    who: Contestant
    what: str
    theirs: str
    best: str
    beaten: tuple[str, ...]
    all_beaten: bool


def quantities(work: WorkResults) -> dict[str, tuple[str, Callable[[str], float | None]]]:
    """Return every column of every table: what → (format, contestant → figure, the less the better)."""
    short, t = work.short, work.shown
    found: dict[str, tuple[str, Callable[[str], float | None]]] = {
        f"error in {key}, T = {steps}": (".0e", functools.partial(work.error, key, steps))
        for key, steps in ((f"float64, {work.optimizer}", short), ("float64, sgd", short), (work.own, t))
    }
    found["flops over plain"] = (".2f", work.flops)
    found |= {f"time over plain, T = {s}": (".2f", functools.partial(work.time, s)) for s in work.steps}
    found |= {f"most bytes held over θ, T = {s}": (".1f", functools.partial(work.peak, s)) for s in work.steps}
    found[f"resident MB, T = {t}"] = (".0f", lambda n: _over(work.get(t, n, "resident"), 1e6))
    found["slope of memory"] = (".2f", work.slope)
    found["largest T"] = (".0f", lambda n: -work.largest[n]["steps"] if n in work.largest else None)
    return found


def better_elsewhere(work: WorkResults) -> list[Cell]:
    """Return every figure of everybody else that is better than that of some exact estimator here, as it is shown."""
    found = []
    ours = [c.name for c in work.contestants if c.ours and c.exact]
    for other in (c for c in work.contestants if not c.ours and c.name != UNIT):
        for what, (shape, figure) in quantities(work).items():
            theirs = _shown(figure(other.name), shape)
            here = {n: x for n in ours if (x := _shown(figure(n), shape)) is not None}
            beaten = tuple(n for n, x in here.items() if theirs is not None and theirs < x)
            if beaten and theirs is not None:
                best = format(abs(min(here.values())), shape)
                found.append(Cell(other, what, format(abs(theirs), shape), best, beaten, len(beaten) == len(here)))
    return found


def _shown(value: float | None, shape: str) -> float | None:
    """Return a figure as precisely as tables show it: what nobody sees is no difference."""
    return None if value is None else float(format(value, shape))


def not_run(work: WorkResults) -> list[str]:
    """Return a line for everything that tables call "not run", with why."""
    who: dict[tuple[str, str], list[str]] = {}  # by quantity and reason
    for what, (_, figure) in quantities(work).items():
        for contestant in (c for c in work.contestants if c.name != UNIT and figure(c.name) is None):
            who.setdefault((what, _why(work, contestant, what)), []).append(contestant.label)
    everybody = len(work.contestants) - 1
    return [
        f"{what}: {why}: {'everybody' if len(labels) == everybody else '; '.join(labels)}"
        for (what, why), labels in who.items()
    ]


def _why(work: WorkResults, contestant: Contestant, what: str) -> str:
    failed = [failure for t in work.steps if (failure := work.get(t, contestant.name, "failed"))]
    if failed:
        return failed[0]
    if what == "largest T" and not contestant.exact:
        return "it is sought of exact ones only"
    return "left out, to save time"
