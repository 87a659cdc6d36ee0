"""What follows from the measured numbers: ratios, slopes, and the figures to reach."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contestants import BASELINE, BY_NAME, OURS, UNIT, Contestant


@dataclass(frozen=True)
class WorkResults:
    """The measurements of one workload: T → contestant → values."""

    title: str
    rows: dict[int, dict[str, Any]]

    @property
    def steps(self) -> list[int]:
        """Every T that was measured."""
        return sorted(self.rows)

    @property
    def shown(self) -> int:
        """The T that summaries are about: 50 if there, or else the largest."""
        return 50 if 50 in self.rows else self.steps[-1]

    @property
    def short(self) -> int:
        """The largest T that flops and errors in float64 were measured at."""
        measured = [t for t in self.steps if any("flops" in row for row in self.rows[t].values())]
        return max(measured, default=self.steps[0])

    @property
    def contestants(self) -> list[Contestant]:
        """Those of which there is anything."""
        return [c for c in BY_NAME.values() if any(c.name in rows for rows in self.rows.values())]

    def get(self, steps: int, name: str, *keys: str) -> Any:
        """Return a value, or None if it was not measured."""
        found: Any = self.rows.get(steps, {}).get(name, {})
        for key in keys:
            found = None if found is None else found.get(key)
        return found

    def flops(self, name: str) -> float | None:
        """Return flops over those of plain training."""
        return _over(self.get(self.short, name, "flops"), self.get(self.short, UNIT, "flops"))

    def time(self, steps: int, name: str, over: str = UNIT) -> float | None:
        """Return median time over that of another contestant, each taken over plain training in the same turns."""
        return _over(self.get(steps, name, "over_plain"), self.get(steps, over, "over_plain"))

    def seconds(self, steps: int, name: str) -> float | None:
        """Return the median of the timed calls."""
        taken = self.get(steps, name, "seconds")
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
    works = [WorkResults(title, {int(t): rows for t, rows in found.items()}) for title, found in data["works"].items()]
    used = {row.get("session") for work in works for rows in work.rows.values() for row in rows.values()}
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
    """Return the figures to reach on the BERT2BERT chain."""
    t = work.shown
    exact = [c.name for c in work.contestants if c.ours and c.exact]
    by_hand = work.get(t, "checkpoint", "float32", "relative")

    def worst(steps: int, *keys: str) -> float | None:
        errors = (work.get(steps, name, key, "relative") for name in exact for key in keys)
        return max((e for e in errors if e is not None), default=None)

    found = [
        Goal(f"error in float64, T = {work.short}", 1e-10, worst(work.short, "float64, adam", "float64, sgd")),
        Goal(f"error in float32, SGD, T = {work.short}", 1e-4, worst(work.short, "float32, sgd")),
        Goal(f"error in float32, Adam, T = {t}", 1e-4, worst(t, "float32")),
        Goal("that over the hand unroll's own error in float32", 1.1, _over(worst(t, "float32"), by_hand)),
    ]
    floors = {"unrolled": 3.0, "states": 4.0, "gradients": 4.0, "recompute": 5.0, "captured": 11 / 3}
    found += [Goal(f"flops of {_label(n)} over plain", 1.03 * floor, work.flops(n)) for n, floor in floors.items()]
    found += [
        Goal(f"time of {_label(OURS)} over `higher`, T = {t}", 0.25, work.time(t, OURS, BASELINE)),
        Goal(f"time of {_label('gradients')} over {_label(OURS)}, T = {t}", 1.25, work.time(t, "gradients", OURS)),
        Goal(f"time of {_label('captured')} over {_label(OURS)}, T = {t}", 1.0, work.time(t, "captured", OURS)),
        Goal(f"peak of {_label('gradients')} over `higher`, T = {t}", 1 / 7, _peaks(work, t, "gradients")),
        Goal(f"peak of {_label('recompute')} over `higher`, T = {t}", 1 / 18, _peaks(work, t, "recompute")),
        Goal(f"peak of {_label('recompute')} over `higher`, T = 100", 1 / 40, _peaks(work, 100, "recompute")),
        Goal(f"peak of {_label('disk')} over `higher`, T = 100", 1 / 40, _peaks(work, 100, "disk")),
    ]
    return found


def _label(name: str) -> str:
    return BY_NAME[name].label


def _peaks(work: WorkResults, steps: int, name: str) -> float | None:
    return _over(work.get(steps, name, "bytes"), work.get(steps, BASELINE, "bytes"))


def better_elsewhere(work: WorkResults) -> list[str]:
    """Return a line for everybody else who at some T takes less time or holds less than every exact estimator here."""
    ours, found = [c.name for c in work.contestants if c.ours and c.exact], []
    units = {"time": "plain trainings' time", "peak": "times the weights held"}
    for other in (c for c in work.contestants if not c.ours and c.name != UNIT):
        cells = [(what, t) for what in units for t in work.steps]
        parts = []
        for what, t in cells:
            theirs = getattr(work, what)(t, other.name)
            best = min((x for n in ours if (x := getattr(work, what)(t, n)) is not None), default=None)
            if theirs is not None and best is not None and theirs < best:
                parts.append(f"T = {t}: {theirs:.1f} {units[what]} (here, exact: {best:.1f})")
        cosine = work.get(work.shown, other.name, "float32", "cosine")
        kind = "exact" if other.exact else "approximate" + ("" if cosine is None else f", cosine {cosine:.2f}")
        found += [f"{other.label} ({kind}): {'; '.join(parts)}."] if parts else []
    return found
