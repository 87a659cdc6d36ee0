"""Several parameters as one tensor, for an optimizer that treats every element alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metaopt.optimizers.kinds import per_element
from metaopt.optimizers.step import torch_step

Tensors = dict[str, Tensor]
State = dict[str, dict[str, Any]]  # parameter name → the optimizer's state of that parameter


class Flattened:
    """Several tensors as one: elementwise optimizers take the same step on the concatenation, in fewer calls.

    Args:
        names, params: of the tensors, and what gives their shapes.
        whole: it is one tensor, whose shape the optimizer sees (but [1] for [], which would be taken for a counter).
    """

    def __init__(self, names: Sequence[str], params: Tensors, whole: bool = False) -> None:
        self.names, self._whole = names, whole
        self._shapes = [params[name].shape for name in names]
        self._is_scalar = whole and not self._shapes[0]
        self._sizes = [shape.numel() for shape in self._shapes]

    def join(self, tensors: Mapping[str, Any]) -> Tensor:
        if self._whole:
            return tensors[self.names[0]].reshape(1) if self._is_scalar else tensors[self.names[0]]
        parts = [tensors[name].reshape(-1) for name in self.names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, flat: Tensor) -> Tensors:
        if self._whole:
            return {self.names[0]: flat.reshape(()) if self._is_scalar else flat}
        parts = zip(self.names, flat.split(self._sizes), self._shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}

    def join_state(self, state: State) -> dict[str, Any]:
        first = state.get(self.names[0], {})
        return {
            k: self.join({n: state[n][k] for n in self.names}) if per_element(k, v) else v for k, v in first.items()
        }

    def split_state(self, state: dict[str, Any]) -> State:
        parts = {k: self.split(v) if per_element(k, v) else dict.fromkeys(self.names, v) for k, v in state.items()}
        return {name: {k: part[name] for k, part in parts.items()} for name in self.names}


class JointStep(Flattened):
    """One optimizer step of several parameters, taken on their concatenation.

    Args:
        names, params: of the parameters, and tensors of their shapes.
        optimizer, function, hyperparameters: as of `torch_step`.
        whole: as of `Flattened`.
        scales: rates η by name; the step is then `θ + η (θ₁ − θ)` with θ₁ what a step of rate 1 gives.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Tensors,
        optimizer: Optimizer,
        function: Any,
        hyperparameters: Mapping[str, Any],
        scales: Mapping[str, Any] | None,
        whole: bool = False,
    ) -> None:
        super().__init__(names, params, whole)
        self._optimizer, self._function, self._hyperparameters = optimizer, function, hyperparameters
        self._scales = None if scales is None else [scales[name] for name in names]

    def step(self, param: Tensor, gradient: Tensor, state: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the concatenated parameters and their state after the step, in the graph of all that goes in."""
        args = (self._optimizer, self._function, self._hyperparameters, param, gradient, state)
        after, state_after = torch_step(*args)
        return (after if self._scales is None else param + self._scale(param) * (after - param)), state_after

    def _scale(self, param: Tensor) -> Any:
        assert self._scales is not None
        first = self._scales[0]
        if all(scale is first for scale in self._scales):
            return first
        each = (torch.as_tensor(s, dtype=param.dtype, device=param.device) for s in self._scales)
        return torch.cat([s.reshape(1).expand(size) for s, size in zip(each, self._sizes, strict=True)])


def in_parts(names: Sequence[str], params: Tensors, most: int) -> Iterator[list[str]]:
    """Yield the names in order, in lists whose parameters have at most `most` elements together, or are one."""
    part: list[str] = []
    size = 0
    for name in names:
        if part and size + params[name].numel() > most:
            yield part
            part, size = [], 0
        part.append(name)
        size += params[name].numel()
    if part:
        yield part
