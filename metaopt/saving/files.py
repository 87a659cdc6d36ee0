"""Files that are whole or not there, and JSON that any reader takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

os.umask(_UMASK := os.umask(0o077))
_MODE = 0o666 & ~_UMASK


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a path in the folder of `path` to write to, which `settle` puts in its place; left there, it goes away."""
    written = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield written
    finally:
        with suppress(OSError):
            written.unlink(missing_ok=True)


def settle(written: Path, path: Path) -> None:
    """Flush a written file to the disk, and let it take the place of another: a kill leaves the old one or the new."""
    with written.open("rb+") as file:
        os.fsync(file.fileno())
    written.chmod(_MODE)  # some libraries write for the owner alone
    written.replace(path)
    with suppress(OSError):  # not every system opens a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what was written there replaces `path` as a whole when the block ends well."""
    with beside(path) as written:
        yield written
        settle(written, path)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8")


def as_json(value: Any, indent: int | None = None) -> str:
    """Return strict JSON, in which a number that is not finite is null."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def not_finite(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted paths of the numbers that are not finite."""
    parts = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for key, part in parts:
        yield from not_finite(part, f"{path}.{key}".lstrip("."))
    if isinstance(value, float) and not math.isfinite(value):
        yield path


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
