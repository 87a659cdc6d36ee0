"""Nested state dicts as one safetensors file: tensors as they are, the rest as JSON in its header; no pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metaopt.base.errors import ConfigError

_HEADER = "state"


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a nested state dict.

    Raises:
        ConfigError: it holds what is no tensor, array, number, string, list, tuple, set or dict, said where.
    """
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_encoded(state, "", tensors), allow_nan=False)
    save_file(tensors, path, {_HEADER: header})


def load_state(path: Path) -> dict[str, Any]:
    """Return the nested state dict in a file that `save_state` has written, its tensors on the CPU.

    Raises:
        ValueError, KeyError, SafetensorError: it has written another one, or none.
    """
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {})[_HEADER]
        return _decoded(json.loads(header), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def _encoded(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return JSON in which every object has one key, the kind of what it stands for."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()  # two names of one tensor are two in the file
        return {"tensor": path}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        tensors[path] = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
        return {"array": [path, value.dtype.str, list(value.shape)]}
    if isinstance(value, Mapping):
        pairs = [(_encoded(key, f"{path} key", tensors), part, f"{path}.{key}") for key, part in value.items()]
        return {"dict": [[key, _encoded(part, where.lstrip("."), tensors)] for key, part, where in pairs]}
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_encoded(part, f"{path}.{i}", tensors) for i, part in enumerate(value)]
        kind = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k)).__name__
        return parts if kind == "list" else {kind: parts}
    raise ConfigError(
        f"a checkpoint cannot hold {path}, a {type(value).__name__}: its state_dict must be made of tensors, arrays, "
        "numbers, strings, lists, tuples and dicts"
    )


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, of),) = value.items()
    if kind == "tensor":
        return tensors[of]
    if kind == "array":
        path, dtype, shape = of
        return np.frombuffer(tensors[path].numpy().tobytes(), dtype).reshape(shape).copy()
    if kind == "float":
        return float(of)
    if kind == "dict":
        return {_decoded(key, tensors): _decoded(part, tensors) for key, part in of}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](_decoded(part, tensors) for part in of)
