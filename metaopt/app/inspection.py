"""What the commands that look at a hypergradient share: folder, console, warm-up."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import ClassVar

from omegaconf import DictConfig
from rich.console import Console

from metaopt.app.config import as_yaml
from metaopt.app.run import WIDTH
from metaopt.base.errors import ConfigError
from metaopt.progress import progress_bar
from metaopt.trainer import MetaTrainer


class Inspection:
    """One look at the hypergradient of a config: its folder, its console, and the built parts.

    Args:
        config: the prepared config, with the facts of the data.
        folder: where `config.yaml` and what is found go; made if it is not there.
        trainer: of the run that would be started.
    """

    section: ClassVar[str]  # of the config, with the command's options
    verb: ClassVar[str]  # what the command does to the hypergradient

    def __init__(self, config: DictConfig, folder: str | Path, trainer: MetaTrainer) -> None:
        if not trainer.learns:
            raise ConfigError(
                f"there is no hypergradient to {self.verb}: these meta-parameters hold nothing to be learned; choose "
                "others, such as meta_params=example_weights"
            )
        self.config, self.trainer, self.path = config, trainer, Path(folder)
        self.console = Console(width=None if sys.stdout.isatty() else WIDTH)  # a log file has no width of its own
        self._start = time.perf_counter()
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(as_yaml(config))
        self.console.print(f"{trainer.chain!r}; writing to {self.path}")

    def warm_up(self) -> None:
        """Train each stage for the section's `warmup_steps`, or its own, by plain optimizers."""
        stages, given = self.config.stages, self.config[self.section].warmup_steps
        steps = {str(n): stages[n].warmup_steps if given is None else given for n in self.config.chain}
        if any(steps.values()):
            with progress_bar(self.console, "warm-up", sum(steps.values())) as advance:
                chain, meta_params = self.trainer.chain, self.trainer.meta_params
                chain.train(meta_params, num_steps=steps, on_step=lambda name, step, loss: advance(name))
