"""A console that outlives its reader: a full disk, a closed pipe or a letter it cannot show never ends a run."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from rich.console import Console

WIDTH = 110  # of a log file, which has none of its own


class _Steady:
    """A text stream whose writing never fails; `error` is the first that there was."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.error = stream, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            return self._stream.write(text.encode("ascii", "replace").decode())
        except (OSError, ValueError) as error:
            self.error = self.error or f"{type(error).__name__}: {error}"
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or f"{type(error).__name__}: {error}"


def steady_console() -> Console:
    """Return a console over today's standard output."""
    steady: Any = _Steady(sys.stdout)
    return Console(file=steady, width=None if sys.stdout.isatty() else WIDTH)


def error_of(console: Console) -> str:
    """Return what went wrong first when it was written to, or nothing."""
    return getattr(console.file, "error", "")
