"""Loggers: observers of the outer loop that a run, too, can write its numbers to, beside `metrics.jsonl`."""

from __future__ import annotations

import csv
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from matplotlib.image import imread
from omegaconf import OmegaConf
from torch import Tensor

from metaopt.base.errors import ConfigError
from metaopt.base.ranges import check_counts
from metaopt.saving.text import printable


class Logger(AbstractContextManager[Any], ABC):
    """An observer of the outer loop: `MetaTrainer(..., observers=[logger])`, or `logger=custom` of the command.

    As a context it closes itself. The command gives it the run's folder and what the run ends with, and closes it.
    """

    def __init__(self, folder: str | Path = ".") -> None:
        self.folder = Path(folder)

    @abstractmethod
    def __call__(self, record: Mapping[str, Any]) -> None:
        """Take one meta-step's record: `meta_step`, `meta_loss`, `inner_loss/<stage>`, `selection/<metric>`, ..."""

    def finish(self, metrics: Mapping[str, float], weights: Tensor | None, plots: Path) -> None:
        """Take what a run ends with: metrics, learned weights of sources or examples if any, a folder of PNG plots."""

    def close(self) -> None:
        """Write what is left, and let go of files and connections."""

    def __exit__(self, *_: object) -> None:
        self.close()


class PrintLogger(Logger):
    """One printed line for every `every` meta-steps; looks at the selection stream are always printed."""

    def __init__(self, folder: str | Path = ".", *, every: int = 1) -> None:
        super().__init__(folder)
        check_counts("PrintLogger", every=every)
        self.every = every

    def __call__(self, record: Mapping[str, Any]) -> None:
        if record["meta_step"] % self.every == 0 or any(name.startswith("selection/") for name in record):
            numbers = [f"{n} {value:.4g}" for n, value in _numbers(record).items()]
            print(f"meta-step {record['meta_step']}:", ", ".join(numbers))


class CSVLogger(Logger):
    """`metrics.csv`, a row per meta-step; a column that comes later is empty in the rows before."""

    def __init__(self, folder: str | Path = ".") -> None:
        super().__init__(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = []

    def __call__(self, record: Mapping[str, Any]) -> None:
        record = {printable(name): value for name, value in record.items()}
        self._rows.append(record)
        new = [name for name in record if name not in self._columns]
        self._columns += new
        mode = "w" if new else "a"
        with (self.folder / "metrics.csv").open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            if new:
                writer.writeheader()
            writer.writerows(self._rows if new else self._rows[-1:])


class TensorBoardLogger(Logger):
    """Event files for TensorBoard: scalars per meta-step; the weights' histogram and the plots at the end."""

    def __init__(self, folder: str | Path = ".") -> None:
        super().__init__(folder)
        writer = _package("torch.utils.tensorboard.writer", "tensorboard")
        self._writer = writer.SummaryWriter(str(self.folder / "tensorboard"))
        self._step = 0

    def __call__(self, record: Mapping[str, Any]) -> None:
        self._step = int(record["meta_step"])
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, self._step)
        self._writer.flush()

    def finish(self, metrics: Mapping[str, float], weights: Tensor | None, plots: Path) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"final/{name}", value, self._step)
        if weights is not None:
            self._writer.add_histogram("weights", weights.float(), self._step)
        for path in sorted(plots.glob("*.png")):
            self._writer.add_image(path.stem, imread(path)[..., :3], self._step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbLogger(Logger):
    """A run of Weights & Biases: what `TensorBoardLogger` writes, and a `config.yaml` in the folder as its config.

    `mode="offline"` needs no account and no network (`wandb sync FOLDER` uploads later). `name` is by default the
    folder's.
    """

    def __init__(
        self,
        folder: str | Path = ".",
        *,
        project: str = "metaopt",
        name: str | None = None,
        mode: Literal["offline", "online", "disabled"] = "offline",
    ) -> None:
        super().__init__(folder)
        self._wandb = _package("wandb", "wandb")
        file = self.folder / "config.yaml"
        config: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else None
        self.folder.mkdir(parents=True, exist_ok=True)
        name = name or self.folder.resolve().name
        self._run: Any = self._wandb.init(project=project, name=name, mode=mode, dir=str(self.folder), config=config)

    def __call__(self, record: Mapping[str, Any]) -> None:
        self._run.log(_numbers(record), step=record["meta_step"])

    def finish(self, metrics: Mapping[str, float], weights: Tensor | None, plots: Path) -> None:
        self._run.summary.update(dict(metrics))
        shown = {path.stem: self._wandb.Image(str(path)) for path in sorted(plots.glob("*.png"))}
        if weights is not None:
            shown["weights_histogram"] = self._wandb.Histogram(weights.float().numpy())
        self._run.log(shown)

    def close(self) -> None:
        self._run.finish()


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
    return {printable(name): value for name, value in numbers.items() if name != "meta_step"}


def _package(module: str, extra: str) -> Any:
    """Return a module of an optional package, or say which extra installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the package {extra} is missing: pip install 'metaopt-chain[{extra}]' (or '.[{extra}]' in a checkout)"
        ) from error
