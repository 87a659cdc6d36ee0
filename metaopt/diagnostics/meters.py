"""What a computation costs: flops, bytes of tensors held and resident size."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from metaopt.base.errors import MetaoptError

_PROCESS = Path("/proc/self")


def count_flops(fn: Callable[[], object]) -> int:
    """Return the floating-point operations of matrix products and convolutions while `fn` runs; two per multiply-add.

    Elementwise work (an optimizer's step, activations) counts as none. Deterministic.
    """
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def peak_bytes(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the most bytes of tensors held at once while `fn` runs, above what was held at its start.

    On a CPU every operation's output is followed until it is freed, what `fn` returns to its end, so two runs give the
    same number; what a kernel uses inside itself does not count. On CUDA it is the allocator's own count.
    """
    gc.collect()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with HeldBytes() as held:
        fn()
    return held.peak


class HeldBytes(TorchDispatchMode):
    """A context that follows the storages which operations make inside it, until they are freed.

    `now` and `peak` are in bytes. Views share their storage; a storage that is there before counts as nothing, and so
    does one that no operation has made (`copy.deepcopy`, a file mapped into memory).
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        unknown = {key: storage for key, storage in _storages(out).items() if key not in self._alive}
        given = _storages((args, kwargs)) if unknown else {}
        for key, storage in unknown.items():
            if key not in given:
                self._alive[key] = storage.nbytes(), weakref.ref(storage, functools.partial(self._freed, key))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, _: object) -> None:
        self.now -= self._alive.pop(key)[0]


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """Return the storages of the tensors that hold memory: not of those that only stand for others in a trace."""
    leaves = (tree,) if isinstance(tree, Tensor) else tree_leaves(tree)
    tensors = [x for x in leaves if type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided]
    return {(s := x.untyped_storage())._cdata: s for x in tensors if x.device.type != "meta"}


def resident_peak(fn: Callable[[], object]) -> int:
    """Return the largest resident size of this process while `fn` runs, above that at its start, in bytes; on Linux.

    It includes what torch itself allocates, and is only comparable between fresh processes: memory that the allocator
    kept from before is used again without being seen. MetaoptError where the kernel does not tell.
    """
    gc.collect()
    try:
        (_PROCESS / "clear_refs").write_text("5")  # sets the high-water mark back to the present size
        before = _status("VmRSS")
        fn()
        return _status("VmHWM") - before
    except OSError as error:
        raise MetaoptError(f"resident_peak reads {_PROCESS}, which this system does not offer ({error})") from error


def _status(field: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
