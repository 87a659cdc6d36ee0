"""Loggers beside `metrics.jsonl`: where else a run writes its numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from metaopt.errors import ConfigError


class Logger(ABC):
    """Base of loggers: built with the run's folder, told of each meta-step, and of the end.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    @abstractmethod
    def log(self, record: Mapping[str, Any]) -> None:
        """Take one meta-step's record: `meta_step`, `meta_loss`, `inner_loss/<stage>`, `selection/<metric>`, ..."""

    @abstractmethod
    def finish(self, metrics: Mapping[str, float], weights: Tensor | None, plots: Path) -> None:
        """Take what the run ends with.

        Args:
            metrics: by name.
            weights: learned weights of sources or examples, if there are any.
            plots: the folder that holds the run's PNG plots.
        """


class TensorBoard(Logger):
    """Event files for TensorBoard: scalars per meta-step; the weights' histogram and the plots at the end.

    Raises:
        ConfigError: the package `tensorboard` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "TensorBoard: the package tensorboard is not installed: pip install 'metaopt-chain[tensorboard]' "
                "(or '.[tensorboard]' in a checkout)"
            ) from error
        self._writer = SummaryWriter(str(self.folder / "tensorboard"))
        self._step = 0

    def log(self, record: Mapping[str, Any]) -> None:
        """Write every number of the record."""
        self._step = int(record["meta_step"])
        for name, value in record.items():
            if name != "meta_step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, self._step)
        self._writer.flush()

    def finish(self, metrics: Mapping[str, float], weights: Tensor | None, plots: Path) -> None:
        """Write the final metrics, the weights' histogram and the plots, and close the file."""
        from matplotlib.image import imread

        for name, value in metrics.items():
            self._writer.add_scalar(f"final/{name}", value, self._step)
        if weights is not None:
            self._writer.add_histogram("weights", weights.float(), self._step)
        for path in sorted(plots.glob("*.png")):
            self._writer.add_image(path.stem, imread(path)[..., :3], self._step, dataformats="HWC")
        self._writer.close()
