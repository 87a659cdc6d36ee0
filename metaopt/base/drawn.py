"""The batches of an unroll's inner steps, without holding those of all steps at once."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.base.errors import StageError
from metaopt.base.streams import BatchStream

MOST_HELD = 1000  # batches of an unroll that are drawn once and held; of a longer one, an epoch is
Fit = Callable[[list[Any]], list[Any]]


def batches_ahead(stream: BatchStream, num_steps: int, per_step: int, fit: Fit) -> Sequence[list[Any]]:
    """Return the batches of a stream's next steps, made to `fit`; the stream stays where it is.

    Those of a list are looked up when a step asks for its own. Those of a DataLoader are drawn and held; where there
    are many, and no worker processes would have to be started again, they are drawn once more when a step goes back.
    """
    stream.peek(min(num_steps, 1))  # raises where there is none
    if stream.is_list:
        return Listed(stream, num_steps, per_step, fit)
    if num_steps * per_step > MOST_HELD and not getattr(stream.source, "num_workers", 0):
        return Redrawn(stream, num_steps, per_step, fit)
    drawn = fit(stream.peek(num_steps * per_step))
    return [drawn[i * per_step : (i + 1) * per_step] for i in range(num_steps)]


class _Drawn(Sequence[list[Any]]):
    def __init__(self, num_steps: int, per_step: int, fit: Fit) -> None:
        self._num_steps, self._per_step, self._fit = num_steps, per_step, fit

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, t: Any) -> Any:
        if not 0 <= t < self._num_steps:
            raise IndexError(t)
        return self._fit([self._batch(i) for i in range(t * self._per_step, (t + 1) * self._per_step)])

    def _batch(self, i: int) -> Any:
        raise NotImplementedError


class Listed(_Drawn):
    """Batches that lie in a list; `source` are all of them."""

    def __init__(self, stream: BatchStream, num_steps: int, per_step: int, fit: Fit) -> None:
        super().__init__(num_steps, per_step, fit)
        self.source, self._start = list(stream.source), stream.state_dict()["position"]

    def _batch(self, i: int) -> Any:
        return self.source[(self._start + i) % len(self.source)]


class Redrawn(_Drawn):
    """Batches that can be drawn in order only: those of one epoch are held, from the first that was asked for.

    Raises:
        StageError: a batch that is held has been written to.
    """

    def __init__(self, stream: BatchStream, num_steps: int, per_step: int, fit: Fit) -> None:
        super().__init__(num_steps, per_step, fit)
        self._reader = stream.copy()
        self._starts, self._places = [0], [self._reader.state_dict()]  # of each epoch that was begun: its first batch
        self._epoch, self._held = 0, list[tuple[Any, list[int]]]()

    def _batch(self, i: int) -> Any:
        epoch = bisect.bisect(self._starts, i) - 1
        if epoch != self._epoch:
            self._epoch, self._held = epoch, []
            self._reader.load_state_dict(self._places[epoch])
        while self._starts[self._epoch] + len(self._held) <= i:
            self._draw()
        batch, written = self._held[i - self._starts[self._epoch]]
        if versions(batch) != written:
            raise StageError(CHANGED)
        return batch

    def _draw(self) -> None:
        batch = self._reader.next()
        place = self._reader.state_dict()
        if place["epoch"] != self._places[self._epoch]["epoch"]:
            if self._epoch + 1 == len(self._starts):
                self._starts.append(self._starts[self._epoch] + len(self._held))
                self._places.append({**place, "position": 0})
            self._epoch, self._held = self._epoch + 1, []
        self._held.append((batch, versions(batch)))


CHANGED = (
    "a batch was changed in place, by the loss or before the backward, and the steps are run again on their batches; "
    "change a copy: tensor.clone()"
)


def versions(tree: Any) -> list[int]:
    """Return how often each tensor in a nested structure has been written to, or in what a list's batches lie in."""
    tree = tree.source if isinstance(tree, Listed) else () if isinstance(tree, Redrawn) else tree
    return [x._version for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and not x.is_inference()]
