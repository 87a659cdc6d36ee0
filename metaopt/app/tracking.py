"""A run's folder: what a person and a program find of a run."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from metaopt.base.errors import ConfigError
from metaopt.core.chain import Chain
from metaopt.core.meta_params import AnyMetaParameters, as_named

META_PARAMS, LAST_META_PARAMS = "meta_params.safetensors", "meta_params_last.safetensors"
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
        """Write `result.json`: status (`complete` or `failed`), the circumstances, metrics."""
        result = {"status": status, **circumstances(seconds, seed), "metrics": dict(metrics)}
        (self.path / "result.json").write_text(json.dumps({**result, **more}, indent=2) + "\n")

    def save_meta_params(self, meta_params: AnyMetaParameters, last: Mapping[str, Any] | None = None) -> None:
        """Write the meta-parameters (and their buffers) to `meta_params.safetensors`.

        Args:
            meta_params: one module or a named mapping.
            last: state dicts by module name, where the last meta-parameters are others than the best, which
                `meta_params` holds; they go to `meta_params_last.safetensors`.
        """
        best = {name: module.state_dict() for name, module in as_named(meta_params).items()}
        save_file(_joined(best), self.path / META_PARAMS)
        if last is not None:
            save_file(_joined(last), self.path / LAST_META_PARAMS)

    def save_models(self, chain: Chain, into: str = "models") -> None:
        """Write each stage's model to `<into>/<stage>`, by its own `save_pretrained` if it has one."""
        for name, stage in chain.stages.items():
            folder = self.path / into / name
            folder.mkdir(parents=True, exist_ok=True)
            save_pretrained = getattr(stage.model, "save_pretrained", None)
            if save_pretrained is not None:
                save_pretrained(folder)
            else:
                save_file(_untied(stage.model), folder / "model.safetensors")


def load_meta_params(meta_params: AnyMetaParameters, folder: str | Path, last: bool = False) -> None:
    """Load what a run has learned into meta-parameters of the same shapes.

    Args:
        meta_params: moved in place.
        folder: the run's.
        last: the last ones instead of the best on the selection stream, where they differ.

    Raises:
        ConfigError: there are none, or they do not fit.
    """
    path = Path(folder) / META_PARAMS
    if last and (Path(folder) / LAST_META_PARAMS).is_file():
        path = Path(folder) / LAST_META_PARAMS
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; name the folder of a run that has written its results")
    found = load_file(path)
    for prefix, module in as_named(meta_params).items():
        start = f"{prefix}." if prefix else ""
        own = {name.removeprefix(start): tensor for name, tensor in found.items() if name.startswith(start)}
        own |= {"": found[prefix]} if prefix in found else {}  # a tensor of its own
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            which = prefix or type(module).__name__
            raise ConfigError(f"{path} does not fit the meta-parameters {which}: {reason}") from error


def _joined(states: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        ".".join(part for part in (prefix, name) if part): tensor.detach().clone().contiguous()
        for prefix, state in states.items()
        for name, tensor in state.items()
    }


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def circumstances(seconds: float, seed: int) -> dict[str, Any]:
    """Return what decides a run's bits beside its config: seed, number of threads, versions; and how long it took."""
    return {"seconds": seconds, "seed": seed, "num_threads": torch.get_num_threads(), "versions": versions()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
