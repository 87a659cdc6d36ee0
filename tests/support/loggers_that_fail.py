"""Loggers of a user's own module, whose network is down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metaopt import Logger


class Failing(Logger):
    def __call__(self, record: Mapping[str, Any]) -> None:
        raise RuntimeError("the network is gone")

    def finish(self, metrics: Mapping[str, float], weights: Any, plots: Path) -> None:
        raise RuntimeError("the network is gone")

    def close(self) -> None:
        raise RuntimeError("the network is gone")
