"""The progress bar, in a terminal or a notebook."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from metaopt.saving.text import printable


@contextmanager
def progress_bar(shown: Console | bool, label: str, total: int, done: int = 0) -> Iterator[Any]:
    """Show a bar with time left; yields `advance(text)`, to be called once per step with what to show beside it.

    Args:
        shown: a console, which gets one line at the end where it is no terminal; or True: in a terminal or a notebook,
            nowhere else.
        label: of what is counted.
        total: steps in all.
        done: steps before this call.
    """
    console = shown if isinstance(shown, Console) else Console()
    is_live = console.is_terminal or console.is_jupyter
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    began = time.perf_counter()
    with Progress(*columns, console=console, disable=not (shown and is_live)) as progress:
        task = progress.add_task(printable(label), total=total, completed=done, text="")
        try:
            yield lambda text="": progress.update(task, advance=1, text=printable(text))
        finally:
            if isinstance(shown, Console) and not is_live:
                state, seconds = progress.tasks[task], f"{time.perf_counter() - began:.1f} s"
                said = [f"{state.description}: {state.completed:.0f} of {total}", state.fields["text"], seconds]
                console.print(Text(", ".join(filter(None, said))))
