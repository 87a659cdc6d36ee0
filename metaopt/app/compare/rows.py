"""Rows to compare: runs that differ by their seed alone gathered, and what each row differs by from another."""

from __future__ import annotations

import importlib
import math
import operator
import re
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt.app.compare.reading import SEED, Run, read_runs, same, shown
from metaopt.base.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import pandas

MOST_NAMED = 20  # rows of a message
TOLD = ("run", "status", "seed", SEED)  # what a run is known by, beside its options
SIGNS = {"<=": operator.le, ">=": operator.ge, "!=": operator.ne, "=": operator.eq, "<": operator.lt, ">": operator.gt}
FIRST = ("score", "seconds", "test/", "meta_loss", "", "best_step", "meta_step", "selection/")  # order of the numbers


@dataclass
class Number:
    """Mean, standard error and count of what the seeds give; no standard error of one alone."""

    by_seed: Mapping[Hashable, float]

    @cached_property
    def finite(self) -> list[float]:
        return [value for value in self.by_seed.values() if math.isfinite(value)]

    @cached_property
    def mean(self) -> float:
        return statistics.fmean(self.finite) if self.finite else math.nan

    @cached_property
    def error(self) -> float | None:
        n = len(self.finite)
        return math.sqrt(math.fsum((x - self.mean) ** 2 for x in self.finite) / (n - 1) / n) if n > 1 else None

    def told(self) -> dict[str, float | None]:
        return {"mean": self.mean, "se": self.error, "n": len(self.finite)}


@dataclass
class Row:
    """A variant with all its seeds, or a single run."""

    runs: list[Run]
    options: dict[str, Any]  # that tell the rows apart; what a run lacks is left out
    name: str = ""

    def __post_init__(self) -> None:
        self.counted = [run for run in self.runs if run.finished] or self.runs  # whose numbers count
        names = in_order(name for run in self.counted for name in run.numbers)
        self.numbers = {name: Number(self._by_seed(name)) for name in names}

    def _by_seed(self, name: str) -> dict[Hashable, float]:
        """Return a number by seed; of a seed that was run more than once, the mean."""
        found: dict[Hashable, list[float]] = {}
        for run in self.counted:
            if name in run.numbers:
                key = run.name if run.seed is None else same(run.seed)
                found.setdefault(key, []).append(run.numbers[name])
        return {seed: statistics.fmean(values) for seed, values in found.items()}

    @property
    def status(self) -> str:
        """How its runs stand, those of each status counted where there is more than one."""
        counts = Counter(run.status for run in self.runs)
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {status}" for status, n in counts.items())

    def minus(self, base: Row) -> dict[str, Number]:
        """Return the paired differences of the numbers, over the seeds that both have."""
        found = {}
        for name in (name for name in self.numbers if name in base.numbers):
            mine, other = self.numbers[name].by_seed, base.numbers[name].by_seed
            found[name] = Number({seed: mine[seed] - other[seed] for seed in mine if seed in other})
        return {name: number for name, number in found.items() if number.by_seed}


def load_runs(folders: str | Path | Iterable[str | Path], all_options: bool = False) -> pandas.DataFrame:
    """Return a data frame with a row per run in and under the folders: options, status, numbers and error.

    Of the options those that differ between the runs, or all; what a run lacks is missing.

    Raises:
        ConfigError: pandas is not installed, one of the folders is not there, or there is no run.
    """
    try:
        frame: Any = importlib.import_module("pandas").DataFrame
    except ImportError as error:
        raise ConfigError(
            "the package pandas is missing: pip install 'metaopt-chain[compare]' (or '.[compare]' in a checkout)"
        ) from error
    runs = read_runs([folders] if isinstance(folders, (str, Path)) else folders)
    keys = list(dict.fromkeys(k for run in runs for k in (*run.given, *run.options))) if all_options else None
    return frame([as_record(row) | {"folder": str(row.runs[0].folder)} for row in rows_of(runs, each=True, keys=keys)])


def as_record(row: Row) -> dict[str, Any]:
    """Return a single run's row as a flat record."""
    (run,) = row.runs
    numbers = {name: number.mean for name, number in row.numbers.items()}
    return {"run": run.name, "status": run.status, "seed": run.seed, **row.options, **numbers, "error": run.error}


def rows_of(runs: Sequence[Run], each: bool = False, keys: Sequence[str] | None = None) -> list[Row]:
    """Return a row per variant, or per run; `keys` are the options to tell, by default those that differ."""
    keys, groups = differing(runs) if keys is None else keys, {}
    for run in runs:
        groups.setdefault(run.name if each else run.variant, []).append(run)
    rows = [
        Row(group, {key: found for key in keys if (found := _option(group, key)) is not ...})
        for group in groups.values()
    ]
    for row in rows:
        row.name = row.runs[0].name if each else ", ".join(f"{k}={shown(v)}" for k, v in row.options.items())
    names = Counter(row.name for row in rows)
    for row in rows:  # some are told apart by nothing that was read
        row.name = row.name if row.name and names[row.name] == 1 else row.runs[0].name if len(rows) > 1 else "all runs"
    return rows


def _option(runs: Sequence[Run], key: str) -> Any:
    """Return an option as the config of the first that has it says, or else as it was given; `...` for none."""
    return next((of[key] for of in (*(r.options for r in runs), *(r.given for r in runs)) if key in of), ...)


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the options that tell runs apart: those given, then those of the configs that these leave unexplained.

    `optimizer=sgd` explains what the configs of the runs with it share: their `optimizer.lr` needs no column.
    """
    firsts = list({run.variant: run for run in reversed(runs)}.values())  # one of each variant

    def column(key: str) -> list[Any]:
        return [same(_option([run], key)) for run in firsts]

    found = [key for key in dict.fromkeys(key for run in firsts for key in run.given) if len({*column(key)}) > 1]
    kinds: list[Any] = list(zip(*map(column, found), strict=True)) or [()] * len(firsts)
    for key in dict.fromkeys(key for run in firsts for key in run.options):
        values = column(key)
        pairs = {pair for run, pair in zip(firsts, zip(kinds, values, strict=True), strict=True) if run.options}
        if len(pairs) > len({kind for kind, _ in pairs}):
            found.append(key)
            kinds = [(*kind, value) for kind, value in zip(kinds, values, strict=True)]
    return found


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of numbers, each once, what is asked for first in front."""
    known = [prefix for prefix in FIRST if prefix]

    def place(name: str) -> int:
        return FIRST.index(next((prefix for prefix in known if name.startswith(prefix)), ""))

    return sorted(dict.fromkeys(names), key=place)


# --- choosing and ordering ---------------------------------------------------------------------------------------


def condition(text: str) -> tuple[str, Callable[[Any], bool]]:
    """Return column and test of a condition such as `optimizer=adam` or `score>0.9`; numbers compare as numbers.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"\s*(.+?)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*", text, re.DOTALL)
    if match is None:
        raise ConfigError(f"{text!r} is no condition; write 'column=value', or <, >, <=, >=, != in the place of =")
    column, sign, wanted = match.groups()

    def holds(value: Any) -> bool:
        if value is ...:
            return sign == "!="
        pair = _as_number(value), _as_number(wanted)
        if None not in pair:
            return SIGNS[sign](*pair)
        return sign in ("=", "!=") and SIGNS[sign](shown(value), wanted)

    return column, holds


def _as_number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def kept(runs: Sequence[Run], conditions: Sequence[str], each: bool) -> list[Row]:
    """Return the rows that meet all conditions: on options, seed and status for runs, on numbers for rows."""
    told = [condition(text) for text in conditions]
    names = ["n", *(name for run in runs for name in run.numbers)]
    for column, holds in told:
        if column not in names:
            _check(column, [*TOLD, *names, *(key for run in runs for key in (*run.options, *run.given))])
            runs = [run for run in runs if holds(_told(run, column))]
    rows = rows_of(runs, each)
    for column, holds in told:
        rows = [row for row in rows if column not in names or holds(cell(row, column))]
    return rows if len(rows) == 0 else rows_of([run for row in rows for run in row.runs], each)


def _told(run: Run, column: str) -> Any:
    """Return what a run has in a column that is no number."""
    known = {"run": run.name, "status": run.status, "seed": run.seed, SEED: run.seed}
    return known[column] if column in known else _option([run], column)


def cell(row: Row, column: str) -> Any:
    """Return what a row has in a column: a number's mean, an option, what its first run is known by; else `...`."""
    if column == "n":
        return len(row.runs)
    if column == "status":
        return row.status
    if column in row.numbers:
        return row.numbers[column].mean
    return _told(row.runs[0], column)


def chosen(choices: Iterable[Sequence[Row]], wanted: Sequence[str]) -> Row:
    """Return the one row of this name, or that meets these conditions, of the first choice that has one.

    Raises:
        ConfigError: there is none, or more than one.
    """
    for rows in (choices := list(choices)):
        found = [row for row in rows if [row.name] == [*wanted]]
        if not found:
            told = [condition(text) for text in wanted]
            found = [row for row in rows if all(holds(cell(row, column)) for column, holds in told)]
        if len(found) == 1:
            return found[0]
    names = "".join(f"\n  {row.name}" for row in choices[0][:MOST_NAMED])
    raise ConfigError(f"--against {' '.join(wanted)}: there is no such row, or more than one; choose one of{names}")


def ordered(rows: Sequence[Row], column: str, reverse: bool) -> list[Row]:
    """Return the rows by what they have in a column, numbers before text, and what is missing last.

    Raises:
        ConfigError: there is no such column.
    """
    _check(column, ["n", *TOLD, *(key for row in rows for key in (*row.numbers, *row.options))])
    values = {id(row): cell(row, column) for row in rows}
    there = [row for row in rows if values[id(row)] not in (..., None) and values[id(row)] == values[id(row)]]
    numbers = {id(row): _as_number(values[id(row)]) for row in there}

    def key(row: Row) -> tuple[bool, float, str]:
        number = numbers[id(row)]
        return number is None, number or 0.0, "" if number is not None else shown(values[id(row)])

    return sorted(there, key=key, reverse=reverse) + [row for row in rows if id(row) not in numbers]


def _check(column: str, known: Iterable[str]) -> None:
    if column not in (names := list(dict.fromkeys(known))):
        raise ConfigError(f"there is no column {column!r}{did_you_mean(column, names)}")
