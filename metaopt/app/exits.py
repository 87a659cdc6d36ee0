"""`sys.exit(0)` in what a config names: it would end a run as if all were well."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any

from metaopt.base.errors import StageError


def exit_place(left: SystemExit) -> str:
    """Say where a program was ended as if all were well; nothing where it was ended with another code."""
    if left.code not in (0, None):
        return ""
    frame = traceback.extract_tb(left.__traceback__)[-1]
    return f"sys.exit({'' if left.code is None else left.code}) was called at {frame.filename}, line {frame.lineno}"


def no_exit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, within which `sys.exit(0)` is an error: what it was to do is not done."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SystemExit as left:
            if place := exit_place(left):
                raise StageError(f"{place}, before the run was over; raise an exception there, or return") from left
            raise

    return called
