"""Random state that can be replayed, and endless batch streams whose position moves only when told to."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.base.errors import ConfigError


def derived_seed(seed: int, *position: int) -> int:
    """Return the seed of one position (a step, an epoch) in the random state that starts at `seed`."""
    return int(np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw_seed() -> int:
    """Draw a seed from torch's global generator, so that `torch.manual_seed` decides it."""
    return int(torch.randint(2**62, ()).item())


_NO_GENERATOR = ("cpu", "meta")  # of its own: the CPU's is torch's global one


def set_seed(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators of torch (CPU, and the device's own), numpy and random."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if device is not None and device.type not in _NO_GENERATOR:
        module = torch.get_device_module(device)
        with module.device(device) if hasattr(module, "device") else nullcontext():
            module.manual_seed(seed)


@contextmanager
def kept_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Put the global generators that `set_seed` seeds back after the block, as they were before."""
    of_random, of_numpy = random.getstate(), np.random.get_state()
    own = device if device is not None and device.type not in _NO_GENERATOR else None
    with torch.random.fork_rng([] if own is None else [own], device_type=None if own is None else own.type):
        try:
            yield
        finally:
            random.setstate(of_random)
            np.random.set_state(of_numpy)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators inside the block, and put them back after."""
    with kept_random_state(device):
        set_seed(seed, device)
        yield


class BatchStream:
    """Cycle through a sequence or a DataLoader: `peek` looks ahead, `advance` moves on.

    What was looked at and not passed is kept, so that an unroll without commit sees the same batches again.
    Shuffling and augmentation draw from torch's global generator, seeded per batch and put back after.

    Raises:
        ConfigError: `batches` is not re-iterable, can be read only once, or is empty.
    """

    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        kind = type(batches).__name__
        if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
            raise ConfigError(f"batches: a {kind} is no series of batches; give a list of batches or a DataLoader")
        if getattr(batches, "persistent_workers", False):
            raise ConfigError(f"batches: looking ahead would lose batches of this {kind}; set persistent_workers=False")
        if isinstance(batches, Iterator):
            raise ConfigError(
                f"batches: a {kind} can be read only once, so give list(batches), or the loader instead of iter(loader)"
            )
        self.source = batches
        self.is_list = type(batches) in (list, tuple)
        self._seed = seed
        self._generators = _generators_of(batches)
        self._generator_states = [generator.get_state() for generator in self._generators]
        self._ahead: deque[tuple[dict[str, Any], Any]] = deque()
        self._open_epoch(0)

    def peek(self, count: int) -> list[Any]:
        """Return the next `count` batches; the stream stays where it is."""
        while len(self._ahead) < count:
            self._ahead.append((self._frontier, self._fetch()))
        return [batch for _, batch in list(self._ahead)[:count]]

    def next(self) -> Any:
        """Return the next batch, and pass it."""
        return self._ahead.popleft()[1] if self._ahead else self._fetch()

    def advance(self, count: int) -> None:
        """Pass the next `count` batches."""
        for _ in range(count):
            self.next()

    def copy(self) -> BatchStream:
        """Return another stream at the same place, which moves by itself."""
        other = BatchStream(self.source, self._seed)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch lies: epoch, position, seed, and the states of the loader's generators."""
        place = self._ahead[0][0] if self._ahead else self._frontier
        return {**place, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place: the epoch is begun again and the passed batches are skipped."""
        self._seed = state["seed"]
        self._ahead.clear()
        self._generator_states = list(state["generator_states"])
        self._open_epoch(state["epoch"])
        for _ in range(state["position"]):
            self._fetch()

    def _open_epoch(self, epoch: int) -> None:
        states = list(self._generator_states)  # that the loader's own generators have when the epoch begins
        self._frontier: dict[str, Any] = {"epoch": epoch, "position": 0, "generator_states": states}
        self._iterator: Iterator[Any] | None = None

    def _fetch(self) -> Any:
        epoch, position = self._frontier["epoch"], self._frontier["position"]
        try:
            with nullcontext() if self.is_list else self._drawing(derived_seed(self._seed, epoch, position)):
                if self._iterator is None:
                    self._iterator = iter(self.source)
                batch = next(self._iterator)
        except StopIteration:
            if position == 0:
                raise ConfigError("batches: there is not a single batch; check the data set and drop_last") from None
            self._open_epoch(epoch + 1)
            return self._fetch()
        self._frontier = {**self._frontier, "position": position + 1}
        return batch

    @contextmanager
    def _drawing(self, seed: int) -> Iterator[None]:
        """Seed the global generators, and let a loader's own go on from where this stream left them; put all back."""
        before = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, self._generator_states, strict=True):
            generator.set_state(state)
        try:
            with seeded(seed):
                yield
        finally:
            self._generator_states = [generator.get_state() for generator in self._generators]
            for generator, state in zip(self._generators, before, strict=True):
                generator.set_state(state)


class Ahead(Sequence[list[Any]]):
    """The batches of the next steps, looked up (i → the i-th to come) and made fit for `like` when a step asks.

    `source` is where they lie, if they are the same tensors at each look.
    """

    def __init__(
        self, look_up: Callable[[int], Any], num_steps: int, per_step: int, like: Tensor, source: Sequence[Any] = ()
    ) -> None:
        self._look_up, self._num_steps, self._per_step, self._like = look_up, num_steps, per_step, like
        self.source = source

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, t: Any) -> Any:
        if not 0 <= t < self._num_steps:
            raise IndexError(t)
        return move([self._look_up(i) for i in range(t * self._per_step, (t + 1) * self._per_step)], self._like)


CHANGED = (
    "a batch was changed in place, by the loss or before the backward, and the steps are run again on their batches; "
    "change a copy: tensor.clone()"
)


def versions(tree: Any) -> list[int]:
    """Return how often each tensor in a nested structure, or each that batches ahead lie in, has been written to."""
    leaves = pytree.tree_leaves(tree.source if isinstance(tree, Ahead) else tree)
    return [x._version for x in leaves if isinstance(x, Tensor) and not x.is_inference()]


class Passing(Sequence[list[Any]]):
    """The batches of a stream's next steps, each drawn when its step comes, fit for `like`: the stream moves along."""

    def __init__(self, stream: BatchStream, num_steps: int, per_step: int, like: Tensor) -> None:
        self._stream, self._num_steps, self._per_step, self._like = stream, num_steps, per_step, like
        self._start = stream.state_dict()

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, t: Any) -> Any:
        if t >= self._num_steps:
            raise IndexError(t)
        batches = self._stream.peek(self._per_step)
        self._stream.advance(self._per_step)
        return move(batches, self._like)

    def rewind(self) -> None:
        """Put the stream back to where the first step began."""
        self._stream.load_state_dict(self._start)


def _generators_of(batches: Any) -> list[torch.Generator]:
    """Return the generators of a DataLoader and its samplers, each once."""
    sampler, batch_sampler = (getattr(batches, name, None) for name in ("sampler", "batch_sampler"))
    holders = (batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def move(batch: Any, like: Tensor) -> Any:
    """Return the batch on the device of `like`, its floating tensors in the dtype of `like`, fit for a graph."""
    if isinstance(batch, Mapping):
        return {key: move(value, like) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        values: Any = [move(value, like) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    if not isinstance(batch, Tensor):
        return batch
    floating = batch.is_floating_point() and like.is_floating_point()
    if like.is_cuda and not batch.is_cuda:
        batch = batch.pin_memory()  # so that the copy waits for nothing
    moved = batch.to(like.device, like.dtype if floating else batch.dtype, non_blocking=True)
    return moved.clone() if moved.is_inference() else moved
