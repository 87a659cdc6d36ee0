"""Where the stored steps of an inner loop lie: on the device, in host memory, or on disk."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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


class Place(ABC):
    """Takes tensors, and gives them back on the device that they came from."""

    @abstractmethod
    def put(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Take the tensors; the returned function gives them back, as often as it is called."""


class Device(Place):
    """The tensors stay where they are."""

    def put(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Hold on to the tensors."""
        kept = list(tensors)
        return lambda: kept


class Host(Place):
    """Pinned host memory; copies run on a stream of their own, beside the computation. On a CPU: where they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Copy to pinned memory while the device goes on."""
        if self._stream is None:
            return Device().put(tensors)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            kept = [self._pinned(t) for t in tensors]
        return lambda: self._fetch(kept)

    def _pinned(self, tensor: Tensor) -> Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) if tensor.is_cuda else tensor
        if copy is not tensor:
            copy.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)  # pyright: ignore[reportArgumentType]
        return copy

    def _fetch(self, kept: Sequence[Tensor]) -> list[Tensor]:
        present = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            back = [t.to(self._device, non_blocking=True) if t.is_pinned() else t for t in kept]
        present.wait_stream(self._stream)  # pyright: ignore[reportArgumentType]
        for tensor in back:
            if tensor.is_cuda:
                tensor.record_stream(present)
        return back


class Disk(Place):
    """A file per record in a temporary folder, which goes when the last record does.

    Args:
        folder: where to make the temporary folder; the system's own if None.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._parent = folder
        self._present: Callable[[], _Folder | None] = lambda: None

    def put(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Write the tensors to a file."""
        folder = self._present() or _Folder(self._parent)
        self._present = weakref.ref(folder)  # the files keep it
        return _File(folder, tensors).read


class _Folder:
    """A temporary folder, deleted when nothing refers to it any more."""

    def __init__(self, parent: str | Path | None) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix="metaopt-", dir=parent))
        except OSError as error:
            raise StageError(
                f"place='disk': no folder can be made in {str(parent)!r} ({error}); name another: "
                "Checkpointed(place='disk', folder=...)"
            ) from error
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self.names = itertools.count()


class _File:
    """One written record; the file is deleted with it."""

    def __init__(self, folder: _Folder, tensors: Sequence[Tensor]) -> None:
        self._folder = folder  # keeps it
        self._path = folder.path / f"{next(folder.names)}.safetensors"
        self._devices = [tensor.device for tensor in tensors]
        try:
            save_file({str(i): t.detach().cpu().contiguous() for i, t in enumerate(tensors)}, self._path)
        except (OSError, SafetensorError) as error:
            raise StageError(
                f"place='disk': {folder.path} cannot be written ({error}); name another folder: "
                "Checkpointed(place='disk', folder=...)"
            ) from error
        weakref.finalize(self, self._path.unlink, missing_ok=True)

    def read(self) -> list[Tensor]:
        found = load_file(self._path)
        return [found[str(i)].to(device) for i, device in enumerate(self._devices)]


def make_place(name: PlaceName, device: torch.device, folder: str | Path | None = None) -> Place:
    """Return the place of that name, for tensors of a device."""
    return Device() if name == "device" else Host(device) if name == "host" else Disk(folder)


def put_tree(place: Place, tree: Any) -> Callable[[], Any]:
    """Give the tensors of a nested structure to a place; the returned function rebuilds the structure."""
    leaves, spec = pytree.tree_flatten(tree)
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    fetch = place.put([leaves[i] for i in where])
    rest = [None if isinstance(x, Tensor) else x for x in leaves]

    def back() -> Any:
        found = list(rest)
        for i, tensor in zip(where, fetch(), strict=True):
            found[i] = tensor
        return pytree.tree_unflatten(found, spec)

    return back
