"""`metaopt-compare`: the runs under some folders side by side, in the terminal and as CSV, JSON and HTML."""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from metaopt.app.compare.reading import SEED, read_runs, shown
from metaopt.app.compare.rows import Number, Row, chosen, in_order, kept, ordered, rows_of
from metaopt.app.steady import error_of, steady_console
from metaopt.base.errors import ConfigError, MetaoptError, first_line
from metaopt.saving.files import as_json, write_text
from metaopt.saving.text import printable

WIDEST = 10_000  # where no terminal bounds it
MOST_TOLD = 20  # runs whose errors are printed
STYLES = {"complete": "green", "running": "cyan"}
AGAINST = "also show every other row minus this one, paired by seed: a row's name, or 'column=value' (may be repeated)"
FILTER = "keep what meets 'column=value'; also <, >, <=, >=, != (may be repeated)"
ABOUT = "Set the runs and sweeps under some folders side by side: what they differ by, how they stand, what came out."
EPILOG = """\
Runs that differ by trainer.seed alone share a row, with mean ± standard error (and how many seeds, where some lack the
number). The means are of the runs that are complete; of a row without one, of those there are. Conditions on options,
seed and status choose runs, those on numbers choose rows. The terminal's width decides how many columns are shown.
score: the best look at the selection stream. killed: says that it is running, and its process is gone.

  metaopt-compare multirun/2026-11-22/01-07-02
  metaopt-compare runs --filter optimizer=adam --filter 'score>0.9' --sort score --reverse
  metaopt-compare runs --against meta_optimizer.lr=0.1 --html compared.html
"""


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    how = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser("metaopt-compare", description=ABOUT, epilog=EPILOG, formatter_class=how)
    made.add_argument("folders", nargs="+", metavar="DIR", help="of a run, of a sweep, or above any of them")
    made.add_argument("--each", action="store_true", help="a row per run, where seeds would share one")
    made.add_argument("--against", action="append", metavar="ROW", help=AGAINST)
    made.add_argument("--filter", action="append", default=[], metavar="CONDITION", help=FILTER)
    made.add_argument("--sort", metavar="COLUMN", help="lowest first")
    made.add_argument("--reverse", action="store_true", help="highest first")
    made.add_argument("--csv", type=Path, metavar="FILE", help="write the rows")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows and their runs")
    made.add_argument("--html", type=Path, metavar="FILE", help="write one page: tables, curves, what was learned")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `metaopt-compare`."""
    options = parser().parse_args(arguments)
    try:
        sys.exit(compare(options))
    except MetaoptError as error:
        sys.exit(printable(error, lines=True))
    except KeyboardInterrupt:
        sys.exit(130)


def compare(options: argparse.Namespace) -> int:
    """Read, show and write; return the exit code, 1 where there is nothing to show or it could not be shown."""
    runs = read_runs(options.folders)
    rows = kept(runs, options.filter, options.each)
    if not rows:
        print(f"none of {len(runs)} runs meets {' and '.join(map(printable, options.filter))}", file=sys.stderr)
        return 1
    if options.sort:
        rows = ordered(rows, options.sort, options.reverse)
    base = chosen((rows_of(runs), rows_of(runs, each=True)), options.against) if options.against else None
    was_shown = show(rows, base)
    if options.csv is not None:
        _write(options.csv, as_csv(rows, base))
    if options.json is not None:
        _write(options.json, as_json([told(row, base) for row in rows], indent=2) + "\n")
    if options.html is not None:  # matplotlib takes a while to import
        _write(options.html, importlib.import_module("metaopt.app.compare.page").page(rows, base))
    return 0 if was_shown else 1


# --- the terminal ------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row], base: Row | None) -> Iterator[tuple[str, Sequence[Row], list[str], list[list[Any]]]]:
    """Yield title, rows, columns and cells of the table, and of that of the differences from `base`."""
    yield "", rows, *grid(rows)
    if base is not None and (others := [row for row in rows if row.name != base.name]):
        yield f"minus {base.name}, paired by seed", others, *grid(others, base)


def grid(rows: Sequence[Row], base: Row | None = None) -> tuple[list[str], list[list[Any]]]:
    """Return columns and cells: a Number, an option or a text each, and `...` for none."""
    numbers = [row.numbers if base is None else row.minus(base) for row in rows]
    single = all(len(row.runs) == 1 and row.name == row.runs[0].name for row in rows)
    options = list(dict.fromkeys(key for row in rows for key in row.options))
    names = in_order(name for found in numbers for name in found)
    cells = []
    for row, found in zip(rows, numbers, strict=True):
        known = [row.name, shown(row.runs[0].seed)] if single else [str(len(row.runs))]
        chosen_options = (row.options.get(key, ...) for key in options)
        cells.append([*chosen_options, *known, row.status, *(found.get(name, ...) for name in names)])
    return [*options, *(["run", SEED] if single else ["n"]), "status", *names], cells


def written(value: Any, whole: int = 1) -> str:
    """Return a cell as text; of a number the count, too, where it is not that of all `whole` runs."""
    if value is ...:
        return "—"
    if not isinstance(value, Number):
        return printable(shown(value), 60)
    count = "" if len(value.finite) == whole or not value.finite else f" ({len(value.finite)})"
    if not value.error:
        return f"{value.mean:.4g}{'' if value.error is None else ' ± 0'}{count}"
    digits = 1 - math.floor(math.log10(value.error))
    form = f".{max(0, digits)}f" if digits < 7 and abs(value.mean) < 1e7 else ".3g"
    return f"{value.mean:{form}} ± {value.error:{form}}{count}"


def show(rows: Sequence[Row], base: Row | None) -> bool:
    """Print the tables, and a line for each run with an error; return whether they could be written."""
    console = steady_console()
    widest = console.width if sys.stdout.isatty() else WIDEST
    for title, of, columns, cells in tables(rows, base):
        fits, table = len(columns), _table(columns, of, cells, title)
        while _width(console, table) > widest and columns[fits - 1] != "status":
            fits -= 1
            table = _table(columns[:fits], of, cells, title)
        console.width = min(widest, _width(console, table))
        console.print(table)
        if left_out := columns[fits:]:
            console.print(Text(f"not shown, for want of width: {', '.join(map(printable, left_out))}", "italic"))
    console.width = widest
    broken = [run for row in rows for run in row.runs if run.error]
    for run in broken[:MOST_TOLD]:
        console.print(Text(f"{printable(run.name)}: {run.status}: {printable(run.error, 200)}"))
    if len(broken) > MOST_TOLD:
        console.print(f"... and {len(broken) - MOST_TOLD} more")
    console.file.flush()
    if error_of(console):  # a full disk, or the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return not error_of(console)


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum


def _table(columns: Sequence[str], rows: Sequence[Row], cells: Sequence[Sequence[Any]], title: str) -> Table:
    """Return the table of as many columns; their names break after dots and slashes."""
    table = Table(title=Text(printable(title)) if title else None, title_justify="left")
    for column, is_right in zip(columns, numeric(cells), strict=False):
        name = printable(column, 60).replace("/", "/\n").replace(".", ".\n")
        table.add_column(Text(name), justify="right" if is_right else "left", no_wrap=True)
    for row, found in zip(rows, cells, strict=True):
        texts = [written(value, len(row.runs)) for value in found[: len(columns)]]
        styles = [STYLES.get(t, "red") if column == "status" else "" for t, column in zip(texts, columns, strict=True)]
        table.add_row(*map(Text, texts, styles))
    return table


def numeric(cells: Sequence[Sequence[Any]]) -> list[bool]:
    """Return which columns hold numbers."""
    return [any(isinstance(value, (Number, int, float)) for value in column) for column in zip(*cells, strict=True)]


# --- files -------------------------------------------------------------------------------------------------------


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({first_line(error)})") from error


def as_csv(rows: Sequence[Row], base: Row | None) -> str:
    """Return a line per row; a number is three columns, its mean, `_se` and `_n`."""
    records = []
    for row in rows:
        known = {"row": row.name, "runs": "; ".join(run.name for run in row.runs)}
        known |= {key: shown(value) for key, value in row.options.items()}
        record = {printable(key): printable(value) for key, value in known.items()}
        record |= {"status": row.status, "n": len(row.runs)}
        differences = {f"{name}_difference": number for name, number in row.minus(base).items()} if base else {}
        for name, number in (row.numbers | differences).items():
            three = {"": number.mean, "_se": number.error, "_n": len(number.finite)}
            record |= {printable(name) + tail: value for tail, value in three.items()}
        records.append(record)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def told(row: Row, base: Row | None) -> dict[str, Any]:
    """Return a row as plain containers, with its runs."""
    runs = [
        {key: getattr(run, key) for key in ("name", "status", "seed", "numbers", "error")} | {"folder": str(run.folder)}
        for run in row.runs
    ]
    found = {"row": row.name, "status": row.status, "n": len(row.runs), "options": row.options}
    found["numbers"] = {name: number.told() for name, number in row.numbers.items()}
    if base is not None:
        found |= {"against": base.name, "differences": {n: x.told() for n, x in row.minus(base).items()}}
    return {**found, "runs": runs}
