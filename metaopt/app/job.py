"""What the commands share: the built parts, folder, console, threads, and plain training with a bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig

from metaopt.app import report
from metaopt.app.build import build_data, build_trainer
from metaopt.app.config import as_yaml, with_facts, with_note
from metaopt.app.folder import CONFIG, RESULT, RunFolder
from metaopt.app.interrupts import interruptible
from metaopt.app.rehearsal import rehearse, tell_where
from metaopt.app.steady import steady_console
from metaopt.base.streams import seeded
from metaopt.core.chain import TrainedChain
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.data.bundle import DataBundle
from metaopt.diagnostics.non_finite import locating_in_training
from metaopt.progress import progress_bar
from metaopt.saving.checkpoints import Checkpoints
from metaopt.saving.files import write_text
from metaopt.trainer import MetaTrainer

J = TypeVar("J", bound="Job")
FEW = 4  # entries of a meta-parameter that are checked one by one


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
    """One call of a command: the prepared config, the folder where it writes, its console, and what is built.

    As a context it holds the folder, lets signals end it, and tells in `file` how it ended.
    """

    data: DataBundle
    trainer: MetaTrainer

    def __init__(self, config: DictConfig, folder: str | Path, file: str = RESULT) -> None:
        self.config, self.folder = config, RunFolder(folder, file)
        self.path = self.folder.path
        self.console = steady_console()
        self._contexts = ExitStack()

    def __enter__(self: J) -> J:
        with ExitStack() as contexts:
            contexts.enter_context(threads(self.config.trainer.num_threads))
            contexts.enter_context(seeded(self.config.trainer.seed))  # whatever ran in this process before
            contexts.enter_context(interruptible())
            self.claim()
            contexts.callback(self.folder.release)
            self._contexts = contexts.pop_all()
        return self

    def claim(self) -> None:
        """Take the folder; a run that is there is left alone."""
        self.folder.claim(may_hold=False)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._contexts:
            if hasattr(self, "data"):
                tell_where(error, self.data)
            if self.folder.is_open:
                self.finish(error)

    def finish(self, error: BaseException | None) -> None:
        """Tell how it ended."""
        requeued = isinstance(error, SystemExit) and "SUBMITIT_EXECUTOR" in os.environ  # so submitit leaves the process
        if isinstance(error, KeyboardInterrupt) or requeued:
            self.folder.tell(status="interrupted", error="queued again" if requeued else str(error) or "SIGINT")
        elif error is not None:
            self.folder.tell(status="failed", error=with_note(error))
        elif self.folder.written["status"] == "running":
            self.folder.tell(status="complete")

    def build(
        self, observers: Sequence[Callable[[dict[str, Any]], None]] = (), checkpoints: Checkpoints | None = None
    ) -> None:
        """Build the data, fill their facts into the config, and build the trainer, which holds everything else."""
        self.data = build_data(self.config)
        self.config = with_facts(self.config, self.data.facts)
        self.trainer = build_trainer(self.config, self.data, observers, checkpoints)
        rehearse(self.trainer, self.data)

    def begin(self) -> None:
        """Begin to write: `config.yaml`, and that it runs; say what is run."""
        if not self.folder.is_open:
            self.folder.open(self.facts())
        write_text(self.path / CONFIG, as_yaml(self.config))
        sizes = ", ".join(f"{name} {size}" for name, size in self.data.sizes.items())
        examples = f"; examples: {sizes}" if sizes else ""
        report.say(self.console, [f"{self.trainer.chain!r}{examples}; writing to {self.path}"])

    def facts(self) -> dict[str, Any]:
        """Return what decides a result's bits beside the config."""
        return {"seed": self.config.trainer.seed, "num_threads": torch.get_num_threads()}

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
