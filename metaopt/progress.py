"""The progress bar, in a terminal or a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(shown: Console | bool, label: str, total: int, done: int = 0) -> Iterator[Any]:
    """Show a bar with time left; yields `advance(text)`, to be called once per step with what to show beside it.

    Args:
        shown: a console, whose log file gets the last state; or True: in a terminal or a notebook, nowhere else.
        label: of what is counted.
        total: steps in all.
        done: steps before this call.
    """
    console = shown if isinstance(shown, Console) else Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    nowhere = isinstance(shown, bool) and not (shown and (console.is_terminal or console.is_jupyter))
    with Progress(*columns, console=console, disable=nowhere) as progress:
        task = progress.add_task(label, total=total, completed=done, text="")
        yield lambda text="": progress.update(task, advance=1, text=text)
