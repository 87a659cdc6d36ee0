"""What every test starts from."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test looks for anything on a hub

import pytest
import torch

import metaopt

assert metaopt.Muon
assert metaopt.Adafactor  # each enters the table of supported optimizers when it is imported, as a plug-in would

torch.set_num_threads(1)


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
