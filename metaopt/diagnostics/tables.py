"""One table of a result, for the console and as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.box import Box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from metaopt.saving.text import printable

STYLES = {"agrees": "green", "undecided": "yellow", "differs": "bold red", "fails": "red"}
LONGEST = 200  # characters of a cell
_PLAIN = Box("    \n    \n -  \n    \n    \n    \n    \n    \n", ascii=True)  # dashes under the headings, no other line


def cell(text: object, style: str = "") -> Text:
    """Return a string as a cell, in which no markup is read."""
    return Text(printable(text, LONGEST), style)


def table(
    blocks: Iterable[Iterable[Sequence[str]]], head: Sequence[str], left: Sequence[str], title: str = ""
) -> Table:
    """Return blocks of rows as a table; verdicts are coloured, and the columns of `left` stand left."""
    columns = (Column(cell(name), justify="left" if name in left else "right") for name in head)
    made = Table(*columns, title=Text(printable(title), "table.title") if title else None, title_justify="left")
    for block in blocks:
        for row in block:
            made.add_row(*(cell(text, STYLES.get(text, "")) for text in row))
        made.add_section()
    return made


def plain(made: Table) -> str:
    """Return a table as text, without its title."""
    made.title, made.box, made.show_edge, made.pad_edge = None, _PLAIN, False, False
    console = Console(file=(text := io.StringIO()), width=1000, color_system=None)
    console.print(made)
    return text.getvalue().rstrip("\n")
