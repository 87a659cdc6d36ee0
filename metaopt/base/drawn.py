"""Batches that are drawn again where a step goes back to them, epoch by epoch."""

from __future__ import annotations

import bisect
from typing import Any

from metaopt.base.errors import StageError
from metaopt.base.streams import CHANGED, BatchStream, versions


class Epochs:
    """The batches ahead of a stream, which stays where it is; those of one epoch are held, and drawn again if need be.

    Raises:
        StageError: a batch that is held has been written to.
    """

    def __init__(self, stream: BatchStream) -> None:
        self._reader = stream.copy()
        self._starts, self._places = [0], [self._reader.state_dict()]  # of each epoch that was begun: its first batch
        self._epoch, self._held = 0, list[tuple[Any, list[int]]]()

    def __call__(self, i: int) -> Any:
        """Return the i-th batch from where the stream is."""
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
