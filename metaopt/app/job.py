"""What the commands share: folder, console, clock, threads, and plain training with a bar."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from rich.console import Console

from metaopt.app.config import as_yaml
from metaopt.base.errors import ConfigError
from metaopt.core.chain import TrainedChain
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.progress import progress_bar
from metaopt.trainer import MetaTrainer

FEW = 4  # entries of a meta-parameter that are checked one by one
WIDTH = 110  # of a log file, which has none of its own
PACKAGES = ("metaopt-chain", "torch", "higher", "transformers", "hydra-core")


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads on the CPU inside the block; None for as many as it does already."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Job:
    """One call of a command: the prepared config, the folder where it writes, its console, and the trainer."""

    section: ClassVar[str] = "trainer"  # of the config, whose `warmup_steps`, if any, count before each stage's own
    trainer: MetaTrainer

    def __init__(self, config: DictConfig, folder: str | Path) -> None:
        self.config, self.path = config, Path(folder)
        self.console = Console(width=None if sys.stdout.isatty() else WIDTH)
        self._start = time.perf_counter()
        self.path.mkdir(parents=True, exist_ok=True)

    def take(self, trainer: MetaTrainer, more: str = "") -> None:
        """Keep the built trainer, write `config.yaml`, and say what is run."""
        self.trainer = trainer
        (self.path / "config.yaml").write_text(as_yaml(self.config))
        self.console.print(f"{trainer.chain!r}{more}; writing to {self.path}")

    def warm_up(self) -> None:
        """Train each stage for its warm-up steps, by plain optimizers."""
        stages, given = self.config.stages, self.config[self.section].get("warmup_steps")
        steps = {str(n): stages[n].warmup_steps if given is None else given for n in self.config.chain}
        if any(steps.values()):
            self.train(self.trainer.meta_params, steps, "warm-up")

    def train(self, meta_params: AnyMetaParameters, steps: Mapping[str, int], label: str) -> TrainedChain:
        """Train the chain's stages in plain steps with frozen meta-parameters, behind a progress bar."""
        with progress_bar(self.console, label, sum(steps.values())) as advance:
            chain = self.trainer.chain
            return chain.train(meta_params, num_steps=steps, on_step=lambda name, step, loss: advance(name))

    def write(self, name: str, found: Mapping[str, Any]) -> None:
        """Write what was found as JSON, with what decides its bits beside the config, and how long it took."""
        seconds, seed = time.perf_counter() - self._start, self.config.trainer.seed
        beside = {"seconds": seconds, "seed": seed, "num_threads": torch.get_num_threads(), "versions": versions()}
        (self.path / name).write_text(json.dumps({**found, **beside}, indent=2) + "\n")


class Inspection(Job):
    """One look at the hypergradient of a config, by the trainer of the run that would be started."""

    verb: ClassVar[str]  # what the command does to the hypergradient

    def __init__(self, config: DictConfig, folder: str | Path, trainer: MetaTrainer) -> None:
        if not trainer.learns:
            raise ConfigError(
                f"there is no hypergradient to {self.verb}: these meta-parameters hold nothing to be learned; choose "
                "others, such as meta_params=example_weights"
            )
        super().__init__(config, folder)
        self.take(trainer)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
