"""Commands as a user types them, each in a child forked from this process, in which everything is imported already."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (-9: it was out of time), what it wrote, and its seconds of processor time."""

    code: int
    out: str
    err: str
    seconds: float


@contextlib.contextmanager
def warm_up(folder: Path) -> Iterator[None]:
    """Import what a run imports, and run once in `folder`: parsers and schemas are made at their first use."""
    import datasets  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import transformers
    from commands import QUICK, command
    from hydra._internal.hydra import Hydra

    import metaopt.app.inspections
    import metaopt.app.loggers
    import metaopt.app.resume
    import metaopt.examples.dates  # noqa: F401

    command(folder, *QUICK, "optimizer.lr=0.01")
    for name in ("EncoderDecoderModel", "BertModel", "BertLMHeadModel", "GPT2LMHeadModel"):
        getattr(transformers, name)
    mode = Hydra.get_mode
    with pytest.MonkeyPatch.context() as patch:  # Hydra composes the config once more to learn whether it is a sweep
        patch.setattr(Hydra, "get_mode", lambda self, **asked: mode(self, **asked) if "-m" in sys.argv else None)
        yield


def forked(folder: Path, arguments: list[str], limit: float, program: str = "metaopt") -> Ended:
    """Run a command in `folder`; after `limit` seconds of processor time, or five times as many of waiting, it ends."""
    out, err = folder / ".out", folder / ".err"
    gc.freeze()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = _as_typed(folder, [program, *arguments], out, err, limit)
        finally:
            os._exit(code)
    end = time.monotonic() + 5 * limit
    while not (found := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    texts = [path.read_text("utf-8", "backslashreplace") if path.exists() else "" for path in (out, err)]
    used = found[2].ru_utime + found[2].ru_stime
    return Ended(os.waitstatus_to_exitcode(found[1]), texts[0], texts[1], used)


def _as_typed(folder: Path, argv: list[str], out: Path, err: Path, limit: float) -> int:
    """The rest of a child's life: its exit code is that which Python would give."""
    gc.disable()
    import resource
    import traceback

    from commands import PROGRAMS

    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_CPU, (used := int(time.process_time() + limit) + 1, used + 1))
    sys.argv, code = argv, 0
    os.environ.update(COLUMNS="200", HF_HUB_OFFLINE="1")
    os.environ.pop("HYDRA_FULL_ERROR", None)
    try:
        PROGRAMS[argv[0]]()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.stderr.flush()
    return code & 255
