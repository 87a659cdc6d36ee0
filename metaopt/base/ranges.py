"""Checks of plain arguments, ranges and name patterns, each raising one message that names the argument."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from metaopt.base.errors import ConfigError


def check_counts(where: str, **counts: Any) -> None:
    """Raise for a count that is not a whole number of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{where}: {name}={value!r} must be a whole number of at least 1")


def check_fraction(where: str, **fractions: Any) -> None:
    """Raise for a fraction that does not lie between 0 and 1."""
    for name, value in fractions.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"{where}: {name}={value!r} must be a fraction between 0 and 1")


def matching(where: str, patterns: Sequence[str], names: Sequence[str], what: str = "parameter") -> set[str]:
    """Return the names that match any of the patterns; raise for a pattern that matches none."""
    if isinstance(patterns, str):
        raise ConfigError(f"{where}={patterns!r} must be a list of patterns: [{patterns!r}]")
    found: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            some = ", ".join(names[:: max(1, len(names) // 4)][:4])
            raise ConfigError(f"{where}: no {what} is called {pattern!r}; names are such as {some}")
        found.update(matched)
    return found
