"""What user code raises, told with where it was called: a note on the exception, whose type stays its own."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor, nn

from metaopt.base.errors import ConfigError, tell, was_told

BENEATH = {"torch", "numpy", *sys.stdlib_module_names}
LIBRARIES = {"metaopt", "higher", "transformers", "peft", "accelerate", "hydra", "omegaconf", *BENEATH}


class telling:  # noqa: N801  # reads as a statement: `with telling(...)`
    """Note on an exception that passes where it was raised, and the user's own lines on its way; once.

    What is not an `Exception` (KeyboardInterrupt) passes untouched. `where` returns the line that says which part of
    what was called, and with what; it is called only if something is raised.
    """

    __slots__ = ("_where",)

    def __init__(self, where: Callable[[], str]) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception) or was_told(error):
            return
        hint = ""  # of an error that torch words for its own developers
        if "device-side assert" in str(error):
            hint = "; most often a label or token is beyond the model's classes or vocabulary: the CPU says which"
        frames = [(frame, line) for frame, line in traceback.walk_tb(trace) if not is_library(frame)]
        lines = [traceback.FrameSummary(f.f_code.co_filename, line, f.f_code.co_name) for f, line in frames]
        shown = [f"  {_relative(f.filename)}:{f.lineno}, in {f.name}: {f.line}" for f in lines]
        tell(error, "\n".join([f"raised in {self._where()}{hint}", *shown]))


def is_library(frame: FrameType) -> bool:
    """Return whether a call is of a library, or of this one."""
    return (frame.f_globals.get("__name__") or "").partition(".")[0] in LIBRARIES


def _relative(file: str) -> str:
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative


# --- what was handed in -----------------------------------------------------------------------------------------


def described(batch: Any) -> str:
    """Return a batch in a few words: names, dtypes and shapes; of integers on the CPU, their range."""
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name}: {described(value)}" for name, value in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return f"{type(batch).__name__}({', '.join(map(described, batch[:8]))}{', …' if len(batch) > 8 else ''})"
    if not isinstance(batch, Tensor):
        return type(batch).__name__
    integers = not (batch.is_floating_point() or batch.is_complex()) and batch.numel() and batch.device.type == "cpu"
    values = f" {int(batch.min())}…{int(batch.max())}" if integers and type(batch) is Tensor else ""
    return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}{values}"


def taken_by(module: nn.Module) -> str:
    """Return what a model's forward takes, in words."""
    try:
        taken = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        taken = ()
    names = [str(p).split(":")[0].split("=")[0].strip() for p in taken]
    return f"{type(module).__name__} takes ({', '.join(names[:12])}{', …' if len(names) > 12 else ''})"


def require_arguments(function: Any, names: tuple[str, ...], where: str) -> None:
    """Raise if a function cannot be called with arguments of these names, by position.

    Raises:
        ConfigError: says what it is called with, and what it takes.
    """
    if not callable(function):
        raise ConfigError(f"{where} is a {type(function).__name__}; give a function of ({', '.join(names)})")
    called: Any = function
    if isinstance(function, nn.Module) and type(function).__call__ is nn.Module.__call__:
        called = function.forward
    try:
        signature = inspect.signature(called)
    except ValueError:  # a builtin has none
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        name, taken = getattr(function, "__name__", type(function).__name__), ", ".join(signature.parameters)
        instance = f"; give an instance: {name}(...)" if isinstance(function, type) else ""
        raise ConfigError(
            f"{where} is called with ({', '.join(names)}), and {name} takes ({taken}): {error}{instance}"
        ) from None
