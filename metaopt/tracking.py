"""A run's folder, and the progress bar: what a person and a program find of a run."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import nn

from metaopt.chain import Chain
from metaopt.meta_params import AnyMetaParameters, as_named

PACKAGES = ("metaopt-chain", "torch", "higher", "transformers", "hydra-core")


class RunFolder:
    """Where a run writes: `config.yaml`, `metrics.jsonl`, `result.json`, weights and plots.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        (self.path / "metrics.jsonl").write_text("")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one meta-step's record to `metrics.jsonl`, at once."""
        self.records.append(dict(record))
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def write_result(self, status: str, seconds: float, seed: int, metrics: Mapping[str, Any], **more: Any) -> None:
        """Write `result.json`: status (`complete` or `failed`), seconds, versions, seed, metrics."""
        result = {"status": status, "seconds": seconds, "seed": seed, "versions": versions(), "metrics": dict(metrics)}
        (self.path / "result.json").write_text(json.dumps({**result, **more}, indent=2) + "\n")

    def save_meta_params(self, meta_params: AnyMetaParameters) -> None:
        """Write the meta-parameters (and their buffers) to `meta_params.safetensors`."""
        tensors = {
            ".".join(part for part in (prefix, name) if part): tensor.detach().clone().contiguous()
            for prefix, module in as_named(meta_params).items()
            for name, tensor in module.state_dict().items()
        }
        save_file(tensors, self.path / "meta_params.safetensors")

    def save_models(self, chain: Chain) -> None:
        """Write each stage's model to `models/<stage>`, by its own `save_pretrained` if it has one."""
        for name, stage in chain.stages.items():
            folder = self.path / "models" / name
            folder.mkdir(parents=True, exist_ok=True)
            save_pretrained = getattr(stage.model, "save_pretrained", None)
            if save_pretrained is not None:
                save_pretrained(folder)
            else:
                save_file(_untied(stage.model), folder / "model.safetensors")


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@contextmanager
def progress_bar(console: Console, label: str, total: int) -> Iterator[Any]:
    """Show a bar with time left; yields `advance(text)`, to be called once per step with what to show beside it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, text="")
        yield lambda text="": progress.update(task, advance=1, text=text)
