"""What a run saves of its weights, and how the learned ones are read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from metaopt.base.errors import ConfigError, first_line
from metaopt.core.chain import Chain
from metaopt.core.meta_params import AnyMetaParameters, as_named
from metaopt.saving.files import replacing

META_PARAMS, LAST_META_PARAMS = "meta_params.safetensors", "meta_params_last.safetensors"


def save_meta_params(
    best: Mapping[str, Mapping[str, Tensor]], last: Mapping[str, Mapping[str, Tensor]] | None, folder: Path
) -> None:
    """Write state dicts by module name, as they are on disk whole or not at all, to `meta_params.safetensors`.

    Where the last ones are others than the best, they go to `meta_params_last.safetensors`.
    """
    for file, states in ((META_PARAMS, best), (LAST_META_PARAMS, last)):
        if states is not None:
            named = ((".".join(filter(None, (prefix, n))), t) for prefix, s in states.items() for n, t in s.items())
            _save(dict(named), folder / file)


def load_meta_params(meta_params: AnyMetaParameters, folder: str | Path, last: bool = False) -> None:
    """Load what the run in `folder` has learned into meta-parameters of the same shapes, in place.

    `last=True` takes the last ones instead of the best on the selection stream, where they differ.

    Raises:
        ConfigError: there are none, or they do not fit.
    """
    path = Path(folder) / LAST_META_PARAMS
    if not (last and path.is_file()):
        path = Path(folder) / META_PARAMS
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; name the folder of a run that has written its results")
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {first_line(error)}; name the folder of another run") from error
    floating = {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}
    broken = [name for name, tensor in floating.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ConfigError(f"{path}: {broken[0]!r} holds numbers that are not finite; start from another run")
    for prefix, module in as_named(meta_params).items():
        ours = [key for key in found if not prefix or f"{key}.".startswith(f"{prefix}.")]
        try:
            module.load_state_dict({key.removeprefix(prefix).removeprefix("."): found[key] for key in ours})
        except RuntimeError as error:
            which, reason = prefix or type(module).__name__, str(error).splitlines()[-1].strip()
            raise ConfigError(f"{path} does not fit the meta-parameters {which}: {reason}") from error


def save_models(chain: Chain, folder: Path) -> None:
    """Write each stage's model to a folder of its name, by its own `save_pretrained` if it has one."""
    for name, stage in chain.stages.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_pretrained: Any = getattr(stage.model, "save_pretrained", None)
        if save_pretrained is not None:
            save_pretrained(folder / name)
        else:  # the names of tied parameters once
            tensors = dict(stage.model.named_parameters()) | dict(stage.model.named_buffers())
            _save(tensors, folder / name / "model.safetensors")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    with replacing(path) as written:
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, written)
