"""What a comparison of estimators has found: a row for each, remarks, and which to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from metaopt.diagnostics.tables import plain, table

EXACT_WITHIN = 1e-4  # casts to float32 inside a model may make so much, in an estimator that is exact
NEAR = 0.99  # cosine from which an approximation is near


@dataclass(frozen=True)
class Deviation:
    """How far a hypergradient g is from the exact g*: `g·g* / ‖g‖‖g*‖` and `‖g − g*‖ / ‖g*‖`, over all its entries."""

    cosine: float
    relative_error: float

    @classmethod
    def mean(cls, found: Sequence[Deviation]) -> Deviation | None:
        """Return the mean over several points of a training; None over none."""
        return cls(fmean(d.cosine for d in found), fmean(d.relative_error for d in found)) if found else None

    @property
    def shown(self) -> str:
        """The relative error as shown."""
        return f"{self.relative_error:.1e}" if self.relative_error else "0"


@dataclass(frozen=True)
class Cost:
    """What one hypergradient costs, in the dtype of the run.

    `time` and `flops` are ratios to plain training of the same steps (`flops` None where that has none), `peak_bytes`
    the most bytes of tensors held at once above what was there before, `tracing` the seconds that a captured product
    took once, which are in none of the others.
    """

    seconds: float
    time: float
    peak_bytes: int
    flops: float | None
    tracing: float = 0.0

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Time, peak, flops and tracing as shown."""
        flops = "—" if self.flops is None else f"{self.flops:.2f}×"
        return (
            f"{self.time:.2f}×",
            f"{self.peak_bytes / 1e6:.2f} MB",
            flops,
            f"{self.tracing:.2f} s" if self.tracing else "",
        )


@dataclass(frozen=True)
class FidelityRow:
    """One estimator.

    `estimator` is its repr, and `exact` what it says of itself; `in_float64` is its own deviation, `in_run` that with
    the rounding of the run's dtype. `failure` says why the others are missing.
    """

    name: str
    estimator: str
    exact: bool = False
    in_float64: Deviation | None = None
    in_run: Deviation | None = None
    cost: Cost | None = None
    failure: str = ""

    @property
    def error(self) -> float:
        """Relative error in the run's dtype."""
        return float("nan") if self.in_run is None else self.in_run.relative_error

    @property
    def is_exact(self) -> bool:
        """Whether it is what it says."""
        return self.exact and self.in_float64 is not None and self.in_float64.relative_error <= EXACT_WITHIN

    @property
    def is_near(self) -> bool:
        """Whether it points the way of the exact hypergradient, in float64 and in the run's dtype."""
        return all(found is not None and found.cosine >= NEAR for found in (self.in_float64, self.in_run))

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as shown."""
        if self.in_float64 is None:
            return self.name, "fails", *[""] * 6
        in_run = "fails" if self.in_run is None else self.in_run.shown
        costs = [""] * 4 if self.cost is None else self.cost.cells
        return self.name, f"{self.in_float64.cosine:.4f}", self.in_float64.shown, in_run, *costs


@dataclass(frozen=True)
class FidelityResult:
    """Estimators side by side; prints as a table, remarks, and which to use."""

    rows: tuple[FidelityRow, ...]  # one per estimator; the chain's own comes last
    plain: Cost  # of plain training of the same steps
    dtype: str  # of the run, such as `float32`
    place: str  # its device and threads
    num_steps: Mapping[str, int]  # stage name → inner steps
    num_points: int  # of the training, at which errors were measured
    num_runs: int  # that were timed
    warnings: tuple[str, ...] = ()  # what estimators warned of
    notes: tuple[str, ...] = ()  # on what the errors are measured against

    @property
    def title(self) -> str:
        """What was measured, and on what."""
        steps = " + ".join(f"{n} {name}" for name, n in self.num_steps.items())
        points = "one point" if self.num_points == 1 else f"{self.num_points} points"
        costs = f"costs: {self.dtype}, {self.place}, median of {self.num_runs} runs"
        return f"hypergradient through {steps} steps, at {points} of the training; {costs}"

    def table(self) -> Table:
        """Return plain training and the rows."""
        head = ("estimator", "cosine", "rel. error", f"in {self.dtype}", "time", "peak", "flops", "capture")
        plain_training = ("(plain training)", "", "", "", *self.plain.cells)
        return table([[plain_training], [row.cells for row in self.rows]], head, head[:1], self.title)

    @property
    def remarks(self) -> list[str]:
        """What the table alone does not say."""
        found = [f"{row.name} fails: {row.failure}" for row in self.rows if row.failure]
        wrong = [row for row in self.rows if row.exact and row.in_float64 is not None and not row.is_exact]
        said = [f"{row.name} says that it is exact, and differs from it: look in {row.estimator}" for row in wrong]
        return [*found, *self.warnings, *said, *self.notes]

    @property
    def recommendation(self) -> list[str]:
        """The cheapest of the exact estimators and of those that are near, one line each."""
        different: dict[str, tuple[FidelityRow, Cost]] = {}  # the chain's own, the last, may be one of those before it
        for row in self.rows:
            if row.cost and not row.failure:
                different.setdefault(row.estimator, (row, row.cost))
        exact = [pair for pair in different.values() if pair[0].is_exact]
        near = [pair for pair in different.values() if pair[0].is_near]
        least = {
            "fewest bytes, exact": min(exact, key=lambda pair: pair[1].peak_bytes, default=None),
            "least time, exact": min(exact, key=lambda pair: pair[1].time, default=None),
            f"least time, cosine ≥ {NEAR}": min(near, key=lambda pair: pair[1].time, default=None),
        }
        lines = []
        for label, (row, cost) in ((label, found) for label, found in least.items() if found):
            error = row.in_run.shown if row.in_run else ""
            lines.append(f"{label}: {row.name} ({cost.cells[1]}, {cost.cells[0]} plain training, rel. error {error})")
        return lines

    def __str__(self) -> str:
        return "\n".join([self.title, plain(self.table()), *self.remarks, *self.recommendation])

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a file."""
        return {**dataclasses.asdict(self), "remarks": self.remarks, "recommendation": self.recommendation}
