"""Several parameters as one tensor, for an optimizer that treats every element alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.optimizers.hyperparameters import Group
from metaopt.optimizers.kinds import per_element
from metaopt.optimizers.step import TorchStep

Tensors = dict[str, Tensor]
State = dict[str, dict[str, Any]]  # parameter name → the optimizer's state of that parameter


class JointStep:
    """One optimizer step of several parameters, taken on their concatenation: the same step, in fewer calls.

    Args:
        names, params: of the parameters, and tensors of their shapes.
        torch_step: the step of one tensor.
        group: its hyperparameters. With rates η the step is `θ + η (θ₁ − θ)`, θ₁ being what one of rate 1 gives.
        whole: it is one parameter, whose shape the optimizer sees (but [1] for [], which would be taken for a counter).
    """

    def __init__(
        self, names: Sequence[str], params: Tensors, torch_step: TorchStep, group: Group, whole: bool = False
    ) -> None:
        self.names, self._torch_step, self._group = names, torch_step, group
        self._whole = whole and params[names[0]].dim() > 0
        self._shapes = [params[name].shape for name in names]
        self._sizes = [shape.numel() for shape in self._shapes]

    def join(self, tensors: Mapping[str, Any]) -> Tensor:
        """Return the tensors of the parameters' names as one."""
        if self._whole:
            return tensors[self.names[0]]
        parts = [tensors[name].reshape(-1) for name in self.names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, joint: Tensor) -> Tensors:
        """Return what `join` has joined, by name."""
        if self._whole:
            return {self.names[0]: joint}
        parts = zip(self.names, joint.split(self._sizes), self._shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}

    def join_state(self, state: State) -> dict[str, Any]:
        """Return the parameters' state as that of one; what is not per element is the same for all."""
        joint = dict(state.get(self.names[0], {}))
        for key, value in joint.items():
            if per_element(key, value):
                joint[key] = self.join({name: state[name][key] for name in self.names})
        return joint

    def split_state(self, joint: Mapping[str, Any]) -> State:
        """Return the state by parameter name."""
        state: State = {name: {} for name in self.names}
        for key, value in joint.items():
            each = self.split(value) if per_element(key, value) else dict.fromkeys(self.names, value)
            for name in self.names:
                state[name][key] = each[name]
        return state

    def step(self, param: Tensor, gradient: Tensor, state: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the joint parameters and their state after the step, in the graph of all that goes in."""
        after, state_after = self._torch_step(param, gradient, state, self._group.hyperparameters)
        rates = self._group.rates
        return (after if rates is None else param + self._rate(rates, param) * (after - param)), state_after

    def _rate(self, by_name: Mapping[str, Any], param: Tensor) -> Any:
        rates = [by_name[name] for name in self.names]
        if all(rate is rates[0] for rate in rates):
            return rates[0]
        each = (torch.as_tensor(rate, dtype=param.dtype, device=param.device) for rate in rates)
        return torch.cat([rate.reshape(1).expand(size) for rate, size in zip(each, self._sizes, strict=True)])


def in_parts(names: Sequence[str], params: Tensors, most: float) -> Iterator[list[str]]:
    """Yield the names in order, in lists whose parameters have at most `most` elements together, or are one."""
    part: list[str] = []
    size = 0
    for name in names:
        if part and size + params[name].numel() > most:
            yield part
            part, size = [], 0
        part.append(name)
        size += params[name].numel()
    yield part
