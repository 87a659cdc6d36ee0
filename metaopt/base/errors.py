"""The errors that metaopt raises; each says what, where, why, and the call that mends it."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from types import FrameType, TracebackType
from typing import Any

BENEATH = {"torch", "numpy", "yaml", "packaging", *sys.stdlib_module_names}
LIBRARIES = {"metaopt", "higher", "transformers", "peft", "accelerate", "hydra", "omegaconf", *BENEATH}


class MetaoptError(Exception):
    """Base class: whatever metaopt refuses or stops at."""


class ConfigError(MetaoptError, ValueError):
    """An option, an argument or a file that cannot be used; raised before any training."""


class StageError(MetaoptError, RuntimeError):
    """A stage that cannot be run or differentiated as it was written."""


class MissingPathError(MetaoptError, RuntimeError):
    """A meta-parameter that no path of the graph connects to the meta-loss; `names` says which."""

    def __init__(self, text: str, names: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.names = tuple(names)


class NonFiniteError(MetaoptError, FloatingPointError):
    """A loss, gradient or hypergradient that is NaN or infinite; `training` is what to run again to see where."""

    def __init__(self, text: str, training: Any = None) -> None:
        super().__init__(text)
        self.training = training


def did_you_mean(name: str, known: Iterable[str], others: bool = True) -> str:
    """Return ` (did you mean 'x'?)`, or the names there are (`others`): the tail of an unknown-name message."""
    known = [str(item) for item in known]
    if close := difflib.get_close_matches(str(name), known, n=1):
        return f" (did you mean {close[0]!r}?)"
    return f" (there are: {', '.join(known) or 'none'})" if others else ""


def first_line(error: BaseException) -> str:
    """Return what an error of another package says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def tell(error: Exception, text: str) -> None:
    """Add a note to an exception; to its message, before Python 3.11."""
    error.__dict__["told"] = text
    if sys.version_info >= (3, 11):
        error.add_note(text)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{text}", *error.args[1:])


def was_told(error: BaseException) -> str | None:
    """Return the note of an exception that came through `telling`, or None."""
    return getattr(error, "told", None)


def own_lines(trace: TracebackType | None) -> list[str]:
    """Return the lines of a traceback that are no library's, outermost first; of very many the first and the last."""
    frames = [(frame, number) for frame, number in traceback.walk_tb(trace) if not is_library(frame)]
    kept = frames if len(frames) <= 10 else [*frames[:5], *frames[-5:]]
    lines = [traceback.FrameSummary(f.f_code.co_filename, number, f.f_code.co_name) for f, number in kept]
    near = [x.filename if (path := os.path.relpath(x.filename)).startswith("..") else path for x in lines]
    return [f"  {path}:{x.lineno}, in {x.name}: {x.line}" for path, x in zip(near, lines, strict=True)]


def is_library(frame: FrameType) -> bool:
    """Return whether a call is of a library, or of this one."""
    return (frame.f_globals.get("__name__") or "").partition(".")[0] in LIBRARIES
