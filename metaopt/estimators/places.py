"""Where the stored steps of an inner loop lie: on the device, in host memory, or on disk."""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.base.errors import StageError

PlaceName = Literal["device", "host", "disk"]
PLACES: tuple[PlaceName, ...] = ("device", "host", "disk")
Fetch = Callable[[], list[Tensor]]  # gives tensors back on their device, as often as it is called
Place = Callable[[Sequence[Tensor]], Fetch]
_TENSOR = object()


def make_place(name: PlaceName, device: torch.device, folder: str | Path | None = None) -> Place:
    """Return the place of that name, for tensors of a device; on a CPU, `host` is where they are."""
    if name == "disk":
        return Disk(folder).put
    return Host(device).put if name == "host" and device.type == "cuda" else on_device


def on_device(tensors: Sequence[Tensor]) -> Fetch:
    """Leave the tensors where they are."""
    kept = list(tensors)
    return lambda: kept


class Host:
    """Pinned host memory; copies run on a stream of their own, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def put(self, tensors: Sequence[Tensor]) -> Fetch:
        """Copy to pinned memory while the device goes on."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            kept = [self._pinned(t) if t.is_cuda else t for t in tensors]
        return lambda: self._fetch(kept)

    def _pinned(self, tensor: Tensor) -> Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return copy

    def _fetch(self, kept: Sequence[Tensor]) -> list[Tensor]:
        present = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            back = [t.to(self._device, non_blocking=True) if t.is_pinned() else t for t in kept]
        present.wait_stream(self._stream)
        for tensor in back:
            if tensor.is_cuda:
                tensor.record_stream(present)
        return back


class Disk:
    """A file per record in a temporary folder in `parent`, which goes when the last record does."""

    def __init__(self, parent: str | Path | None = None) -> None:
        self._parent, self._names = parent, itertools.count()
        self._folder: Path | None = None

    def put(self, tensors: Sequence[Tensor]) -> Fetch:
        """Write the tensors to a file, which is deleted with the function that reads it."""
        path = self._present_folder() / f"{next(self._names)}.safetensors"
        devices = [tensor.device for tensor in tensors]

        def read() -> list[Tensor]:
            found = load_file(path)
            return [found[str(i)].to(device) for i, device in enumerate(devices)]

        weakref.finalize(read, _remove, path)
        try:
            save_file({str(i): t.detach().cpu().contiguous() for i, t in enumerate(tensors)}, path)
        except (OSError, SafetensorError) as error:
            raise _unwritable(f"{path.parent} cannot be written ({error})") from error
        return read

    def _present_folder(self) -> Path:
        if self._folder is None or not self._folder.exists():
            try:
                self._folder = Path(tempfile.mkdtemp(prefix="metaopt-", dir=self._parent))
            except OSError as error:
                raise _unwritable(f"no folder can be made in {str(self._parent)!r} ({error})") from error
        return self._folder


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    with suppress(OSError):  # there are other files yet
        path.parent.rmdir()


def _unwritable(what: str) -> StageError:
    return StageError(f"place='disk': {what}; name another folder: Checkpointed(place='disk', folder=...)")


def split_tensors(tree: Any) -> tuple[list[Tensor], Callable[[Iterable[Tensor]], Any]]:
    """Return the tensors of a nested structure, and what builds the structure again around others."""
    leaves, spec = pytree.tree_flatten(tree)
    rest = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]

    def around(tensors: Iterable[Tensor]) -> Any:
        given = iter(tensors)
        return pytree.tree_unflatten([next(given) if x is _TENSOR else x for x in rest], spec)

    return [x for x in leaves if isinstance(x, Tensor)], around


def put_tree(place: Place, tree: Any) -> Callable[[], Any]:
    """Give the tensors of a nested structure to a place; the returned function rebuilds the structure."""
    if place is on_device:
        return lambda: tree
    tensors, around = split_tensors(tree)
    fetch = place(tensors)
    return lambda: around(fetch())
