"""The checkpoints of a training in a folder: the last ones and the best, each whole, each known by its checksum."""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from metaopt.base.errors import ConfigError, first_line
from metaopt.base.ranges import check_counts
from metaopt.saving.files import beside, settle
from metaopt.saving.states import load_state, save_state

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})(-best)?\.safetensors")
_SHARE = 0.01  # of the time, where no period is given; with the first and the last, 2 % of a short training


@dataclass(frozen=True)
class Checkpoint:
    """A state that was read from a file."""

    path: Path
    step: int
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder: `step-00000040-9f86d081884c7d65.safetensors`, after its step and its SHA-256.

    Args:
        folder: made with the first of them.
        every: steps between two; None for as often as takes at most 2 % of the time.
        keep: how many of the last ones stay, beside the one of the best step.
    """

    def __init__(self, folder: str | Path, every: int | None = None, keep: int = 2) -> None:
        check_counts("Checkpoints", keep=keep, **({} if every is None else {"every": every}))
        self.folder, self.every, self.keep = Path(folder), every, keep
        self._took, self._end = 0.0, time.monotonic()
        self.error = ""  # of the last one that could not be written

    def due(self, step: int) -> bool:
        """Whether one should be written after this step."""
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self._end >= self._took * (1 / _SHARE - 1)

    def write(self, step: int, gather: Callable[[], Mapping[str, Any]], best: bool = False) -> None:
        """Write the state that is gathered, and remove what need not be kept; on a full disk warn, and go on."""
        start = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with beside(self.folder / "step") as written:
                save_state(gather(), written)
                name = f"step-{step:08d}-{_checksum(written)}{'-best' * best}.safetensors"
                settle(written, self.folder / name)
        except (OSError, SafetensorError) as error:
            self.error = f"the one of step {step} could not be written: {first_line(error)}"
            warnings.warn(f"checkpoint {self.folder}: {self.error}", RuntimeWarning, stacklevel=2)
            self._end = time.monotonic()
            return
        files = self._files()
        kept = {name, *[path.name for path in files[: self.keep]], *[p.name for p in files if "-best" in p.name][:1]}
        for path in files:
            if path.name not in kept:
                path.unlink(missing_ok=True)
        self._end = time.monotonic()
        self._took = self._end - start

    def newest(self) -> Checkpoint | None:
        """Return the last one that is whole, or None; one that is not is told by a warning, and passed over."""
        for path in self._files():
            matched = _NAME.fullmatch(path.name)
            assert matched is not None
            try:
                if _checksum(path) != matched[2]:
                    raise ValueError("its bytes are not those that were written")
                return Checkpoint(path, int(matched[1]), load_state(path))
            except Exception as error:  # whatever a parser raises at somebody's bytes
                said = f"checkpoint {path} cannot be used ({first_line(error)}); the one before it is taken"
                warnings.warn(said, RuntimeWarning, stacklevel=2)
        return None

    def clear(self) -> None:
        """Remove all checkpoints."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Return the checkpoints there are, the last one first."""
        found = [(path, _NAME.fullmatch(path.name)) for path in self.folder.glob("step-*")]
        ages = {path: (int(matched[1]), path.stat().st_mtime_ns) for path, matched in found if matched}
        return sorted(ages, key=ages.__getitem__, reverse=True)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def refuse_other(saved: Mapping[str, Any], ours: Mapping[str, Any], where: Path | str, how: str) -> None:
    """Raise if a saved training differs from ours, naming what does; both are flat.

    Raises:
        ConfigError: with each differing key, its value there and here.
    """
    differing = [key for key in dict.fromkeys([*saved, *ours]) if saved.get(key, _ABSENT) != ours.get(key, _ABSENT)]
    if not differing:
        return
    lines = [
        f"  {key}: {saved.get(key, _ABSENT)!s:.60} there, {ours.get(key, _ABSENT)!s:.60} here" for key in differing
    ]
    rest = [f"  and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    raise ConfigError("\n".join([f"{where} is of another training; {how}", *lines[:_MOST], *rest]))


_ABSENT, _MOST = "(absent)", 12
