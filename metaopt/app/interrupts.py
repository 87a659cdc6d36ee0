"""Signals that end a run: each becomes an exception, so that files are closed and the terminal is put back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2")  # Ctrl-C, preemption, a closed terminal, a scheduler's warning


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end; `code` is its exit code, 128 + n, and `said` how to go on."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.name, self.code, self.said = signal.Signals(number).name, 128 + number, ""

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        """A job's process hands it on to the one that launched it."""
        return type(self), (self.code - 128,)


@contextmanager
def interruptible(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Raise `Interrupted` in the block when a signal comes whose handler is the default one; further ones wait.

    What is to be done `first` is done before the block hears of it.

    A scheduler's own handler, such as the one by which submitit has a job queued again, is left in its place.
    """
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    taken = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) in defaults}
    if threading.current_thread() is not threading.main_thread():
        taken = {}
    owner = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker process that was forked inside the block
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for other in taken:
            signal.signal(other, signal.SIG_IGN)  # the folder is put in order, undisturbed
        first()
        raise Interrupted(number)

    try:
        for number in taken:
            signal.signal(number, handler)
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)
