"""Several parameters as one tensor, for an optimizer that treats every element alike, from step to step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.optimizers.hyperparameters import Group
from metaopt.optimizers.kinds import per_element
from metaopt.optimizers.step import TorchStep

Tensors = Mapping[str, Tensor]
State = Mapping[str, Mapping[str, Any]]  # parameter name → the optimizer's state of that parameter


class Block:
    """Parameters that are stepped as one: `join` and `split` their tensors, or their state.

    Args:
        names, params: of the parameters, and tensors of their shapes.
        whole: it is one parameter, whose shape the optimizer sees (but [1] for [], which would be taken for a counter).
    """

    def __init__(self, names: Sequence[str], params: Tensors, whole: bool = False) -> None:
        self.names = tuple(names)
        self.flat = not whole or params[names[0]].dim() == 0
        self._shapes = [params[name].shape for name in names]
        self.sizes = [shape.numel() for shape in self._shapes]

    def join(self, values: Mapping[str, Any]) -> Any:
        """Return the tensors of the parameters' names as one; of state, what is not per element is the same for all."""
        if isinstance(values, Joined) and self in values.pieces:
            return values.pieces[self]
        first = values.get(self.names[0], {})
        if isinstance(first, Mapping):
            each = {key: {name: values[name][key] for name in self.names} for key in first}
            return {key: self.join(each[key]) if per_element(key, value) else value for key, value in first.items()}
        if not self.flat:
            return first
        parts = [v if v.dim() == 1 else v.reshape(-1) for v in map(values.__getitem__, self.names)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, joint: Any) -> dict[str, Any]:
        """Return what `join` has joined, by name."""
        if isinstance(joint, Mapping):
            each = {k: self.split(v) if per_element(k, v) else dict.fromkeys(self.names, v) for k, v in joint.items()}
            return {name: {key: each[key][name] for key in joint} for name in self.names}
        if not self.flat:
            return {self.names[0]: joint}
        parts = zip(self.names, joint.split(self.sizes), self._shapes, strict=True)
        return {name: part if len(shape) == 1 else part.view(shape) for name, part, shape in parts}


class Joined(Mapping[str, Any]):
    """Values by parameter name, some of them held as one of their block, and split when one is first asked for.

    Args:
        pieces: block → the value of its names.
        alone: the other values, by name.
    """

    def __init__(self, pieces: Mapping[Block, Any], alone: Mapping[str, Any]) -> None:
        self.pieces, self.alone = pieces, alone

    @functools.cached_property
    def named(self) -> dict[str, Any]:
        """All values by name."""
        found: dict[str, Any] = {}
        for block, value in self.pieces.items():
            found.update(block.split(value))
        return {**found, **self.alone}

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(*(block.names for block in self.pieces), self.alone)

    def __len__(self) -> int:
        return len(list(iter(self)))


def named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by name, split where they are joined."""
    return values.named if isinstance(values, Joined) else dict(values)


def but(values: Mapping[str, Any], blocks: Collection[Block]) -> dict[str, Any]:
    """Return the values of the names that these blocks do not have."""
    if isinstance(values, Joined) and values.pieces.keys() <= set(blocks):
        values = values.alone
    if not values:
        return {}
    taken = {name for block in blocks for name in block.names}
    return {name: value for name, value in values.items() if name not in taken}


def _children(joined: Joined) -> tuple[list[Any], tuple[Any, ...]]:
    return [*joined.pieces.values(), *joined.alone.values()], (tuple(joined.pieces), tuple(joined.alone))


def _rebuilt(values: Any, context: tuple[Any, ...]) -> Joined:
    blocks, names = context
    values = list(values)
    pieces = dict(zip(blocks, values, strict=False))
    return Joined(pieces, dict(zip(names, values[len(blocks) :], strict=True)))


pytree.register_pytree_node(Joined, _children, _rebuilt)


class JointStep:
    """One optimizer step of a block: the same step as of each of its parameters, in fewer calls.

    Args:
        block: the parameters.
        torch_step: the step of one tensor.
        group: its hyperparameters. With rates η the step is `θ + η (θ₁ − θ)`, θ₁ being what one of rate 1 gives.
    """

    def __init__(self, block: Block, torch_step: TorchStep, group: Group) -> None:
        self.block, self._torch_step, self.group = block, torch_step, group

    def __call__(
        self, param: Tensor, gradient: Tensor, state: Mapping[str, Any], elements: slice | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the joint parameters (or these elements of them) and their state after the step, in its graph."""
        after, state_after = self._torch_step(param, gradient, state, self.group.hyperparameters)
        if self.group.rates is None:
            return after, state_after
        return param + self.rate(param, elements) * (after - param), state_after

    def rate(self, param: Tensor, elements: slice | None = None) -> Any:
        """Return the rate of the joint parameters (or of these elements of them): one, or a tensor of each one's."""
        if self.group.rates is None:
            return self.group.hyperparameters["lr"]
        rates = [self.group.rates[name] for name in self.block.names]
        if all(rate is rates[0] for rate in rates):
            return rates[0]
        end, each = 0, []
        for rate, size in zip(rates, self.block.sizes, strict=True):
            start, end = end, end + size
            if elements is not None:
                size = min(end, elements.stop) - max(start, elements.start)
            if size > 0:
                rate = torch.as_tensor(rate, dtype=param.dtype, device=param.device)
                each.append(rate.reshape(1).expand(size))
        return torch.cat(each)
