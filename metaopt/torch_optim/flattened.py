"""Several parameters as one tensor, for an optimizer that treats every element alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.torch_optim.kinds import per_element

Tensors = dict[str, Tensor]
State = dict[str, dict[str, Any]]  # parameter name → the optimizer's state of that parameter


class Flattened:
    """Several tensors as one: elementwise optimizers take the same step on the concatenation, in fewer calls."""

    def __init__(self, names: Sequence[str], params: Tensors) -> None:
        self._names = names
        self._shapes = [params[name].shape for name in names]
        self._sizes = [shape.numel() for shape in self._shapes]

    def join(self, tensors: Mapping[str, Any]) -> Tensor:
        parts = [tensors[name].reshape(-1) for name in self._names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, flat: Tensor) -> Tensors:
        parts = zip(self._names, flat.split(self._sizes), self._shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}

    def join_state(self, state: State) -> dict[str, Any]:
        first = state.get(self._names[0], {})
        return {
            k: self.join({n: state[n][k] for n in self._names}) if per_element(k, v) else v for k, v in first.items()
        }

    def split_state(self, state: dict[str, Any]) -> State:
        parts = {k: self.split(v) if per_element(k, v) else dict.fromkeys(self._names, v) for k, v in state.items()}
        return {name: {k: part[name] for k, part in parts.items()} for name in self._names}
