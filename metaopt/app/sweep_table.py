"""The table at the end of a sweep: its jobs, the options in which they differ, how they ended and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from metaopt.saving.text import printable

GOOD = ("complete", "running")  # running: in Slurm, after the launching process was stopped
STYLES = {"failed": "red", "complete_with_errors": "red", "interrupted": "yellow"}
LONGEST = 400  # characters of a failure's line


def print_table(console: Console, folder: str, jobs: Sequence[Mapping[str, Any]], more: Sequence[str] = ()) -> None:
    """Print a row per job, a line per failure, and more lines; all of it text, without markup."""
    options = [as_options(job["overrides"]) for job in jobs]
    keys = differing(options)
    columns = [Column(Text(printable(key)), overflow="fold") for key in keys]
    table = Table("job", *columns, "status", Column("score", justify="right"))
    for job, given in zip(jobs, options, strict=True):
        score = "" if job["score"] is None else f"{job['score']:.6g}"
        status = Text(job["status"], STYLES.get(job["status"], ""))
        table.add_row(str(job["job"]), *(Text(printable(given.get(key, ""))) for key in keys), status, score)
    if jobs:
        console.print(Text(printable(f"sweep {folder}")))
        console.print(table)
    for job, given in zip(jobs, options, strict=True):
        if job["error"]:
            what = ", ".join(f"{key}={given[key]}" for key in keys if key in given)
            line = f"job {job['job']}{f' ({what})' if what else ''}: {' '.join(str(job['error']).split())}"
            cut = line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
            console.print(Text(printable(cut), STYLES["failed"]), soft_wrap=True)
    for line in more:
        console.print(Text(printable(line)), soft_wrap=True)


def as_options(overrides: Sequence[str]) -> dict[str, str]:
    """Return overrides by key."""
    return {key: value for key, _, value in (override.partition("=") for override in overrides)}


def differing(options: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys that are not the same everywhere, in the order in which they were given."""
    keys = dict.fromkeys(key for given in options for key in given)
    return [key for key in keys if len({given.get(key) for given in options}) > 1]
