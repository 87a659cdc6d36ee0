"""Checks of plain arguments, each raising one message that names the argument."""

from __future__ import annotations

from typing import Any

from metaopt.errors import ConfigError


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
