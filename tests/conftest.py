"""What every test starts from."""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test looks for anything on a hub

import pytest
import torch

import metaopt

assert metaopt.Muon
assert metaopt.Adafactor  # each enters the table of supported optimizers when it is imported, as a plug-in would

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a table marked `sampled(n)` the quick run takes the first of every n cases; `make test-all` takes all."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is not None:
            table = item.nodeid.split("[")[0]
            if seen[table] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[table] += 1


def pytest_collection_finish() -> None:
    """What the imports made stays to the end: no garbage collection need go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Hydra's `job_logging=disabled` switches every logger of this process off."""
    yield
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False
