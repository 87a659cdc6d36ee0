"""What the commands share: the built parts, folder, console, clock, threads, and plain training with a bar."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

import metaopt
from metaopt.app.build import build_data, build_trainer
from metaopt.app.config import as_yaml, with_facts
from metaopt.core.chain import TrainedChain
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.data.bundle import DataBundle
from metaopt.diagnostics.non_finite import locating_in_training
from metaopt.progress import progress_bar
from metaopt.trainer import MetaTrainer

FEW = 4  # entries of a meta-parameter that are checked one by one
WIDTH = 110  # of a log file, which has none of its own
PACKAGES = ("torch", "higher", "transformers", "hydra-core")


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
    """One call of a command: the prepared config, the folder where it writes, its console, and what is built."""

    data: DataBundle
    trainer: MetaTrainer

    def __init__(self, config: DictConfig, folder: str | Path) -> None:
        self.config, self.path = config, Path(folder)
        self.console = Console(width=None if sys.stdout.isatty() else WIDTH)
        self._start = time.perf_counter()
        self.path.mkdir(parents=True, exist_ok=True)

    def build(self, observers: Sequence[Callable[[dict[str, Any]], None]] = ()) -> None:
        """Build the data, fill their facts into the config, and build the trainer, which holds everything else."""
        self.data = build_data(self.config)
        self.config = with_facts(self.config, self.data.facts)
        self.trainer = build_trainer(self.config, self.data, observers)

    def begin(self) -> None:
        """Write `config.yaml`, and say what is run."""
        (self.path / "config.yaml").write_text(as_yaml(self.config))
        sizes = ", ".join(f"{name} {size}" for name, size in self.data.sizes.items())
        examples = f"; examples: {sizes}" if sizes else ""
        self.console.print(f"{self.trainer.chain!r}{examples}; writing to {self.path}")

    def warm_up(self, num_steps: int | None = None) -> None:
        """Train the stages by plain optimizers, for so many steps each; None for each stage's own warm-up."""
        stages = self.config.stages
        steps = {str(n): stages[n].warmup_steps if num_steps is None else num_steps for n in self.config.chain}
        if any(steps.values()):
            self.train(self.trainer.meta_params, steps, "warm-up")

    def train(self, meta_params: AnyMetaParameters, steps: Mapping[str, int], label: str) -> TrainedChain:
        """Train the chain's stages in plain steps with frozen meta-parameters, behind a progress bar."""
        with progress_bar(self.console, label, sum(steps.values())) as advance, locating_in_training():
            chain = self.trainer.chain
            return chain.train(meta_params, num_steps=steps, on_step=lambda name, step, loss: advance(name))

    def small_entries(self) -> dict[str, range]:
        """Return the flat indices of each meta-parameter that has few."""
        tensors = named_tensors(self.trainer.meta_params)
        return {name: range(t.numel()) for name, t in tensors.items() if t.numel() <= FEW}

    def write(self, name: str, found: Mapping[str, Any]) -> None:
        """Write what was found as JSON, with what decides its bits beside the config, and how long it took."""
        versions = {"metaopt-chain": metaopt.__version__, **{package: version(package) for package in PACKAGES}}
        beside = {
            "seconds": time.perf_counter() - self._start,
            "seed": self.config.trainer.seed,
            "num_threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), **versions},
        }
        (self.path / name).write_text(json.dumps({**found, **beside}, indent=2) + "\n")
