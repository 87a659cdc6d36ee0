"""Strings of a user's data, configs and folders, made fit to be shown."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# What moves a terminal's cursor, colours it, turns the direction of writing or cannot be encoded; line ends apart.
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, most: int | None = None, lines: bool = False) -> str:
    r"""Return text that can be shown anywhere: control characters as `\x1b`, and no more than `most` characters.

    Line ends are kept with `lines`, and are `\n` otherwise.
    """
    found = str(text) if lines else str(text).replace("\n", r"\n")
    if most is not None and len(found) > most:
        found = found[: most - 1] + "…"
    return _CONTROLS.sub(lambda sign: sign[0].encode("unicode_escape").decode(), found)


def plot_label(text: object, most: int = 40) -> str:
    """Return a label for matplotlib that is no formula; one with a leading underscore would be left out of a legend."""
    found = printable(text, most).replace("$", r"\$")
    return f" {found}" if found.startswith("_") else found


@contextmanager
def any_font() -> Iterator[None]:
    """Draw what a font lacks as an empty box, without a warning for each sign."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Glyph|Matplotlib currently does not support)", category=UserWarning)
        yield
