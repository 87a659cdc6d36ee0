"""The errors that metaopt raises; each says what, where, why, and the call that mends it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MetaoptError(Exception):
    """Base class: whatever metaopt refuses or stops at."""


class ConfigError(MetaoptError, ValueError):
    """An option, an argument or a file that cannot be used; raised before any training."""


class StageError(MetaoptError, RuntimeError):
    """A stage that cannot be run or differentiated as it was written."""


class MissingPathError(MetaoptError, RuntimeError):
    """A meta-parameter that no path of the graph connects to the meta-loss."""


class NonFiniteError(MetaoptError, FloatingPointError):
    """A loss, gradient or hypergradient that is NaN or infinite."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)`, or the names there are: the tail of an unknown-name message."""
    known = [str(item) for item in known]
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (there are: {', '.join(known) or 'none'})"
