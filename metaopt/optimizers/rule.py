"""`torch.optim` made differentiable: the update half of an inner step, of several parameters as one where it may be.

`higher` ships its own formulas, and some are not torch's (its Adam adds epsilon elsewhere; `maximize` is ignored).
Here the torch optimizer's own `step()` runs on copies that stay in the graph, so that the update is torch's by
construction. The user's optimizer is read, never stepped.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from metaopt.base.errors import ConfigError, StageError
from metaopt.optimizers.hyperparameters import Group, Overrides, check_overrides, in_graph, with_overrides
from metaopt.optimizers.kinds import kind_of
from metaopt.optimizers.step import GROUP, TorchStep, number, per_element, shallow

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
    """Values by parameter name: block → the joint value of its names, split when one is asked for; others `alone`."""

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


def _rebuilt(values: Iterable[Any], keys: Any) -> Joined:
    blocks, names = keys
    values = list(values)
    return Joined(dict(zip(blocks, values, strict=False)), dict(zip(names, values[len(blocks) :], strict=True)))


pytree.register_pytree_node(
    Joined, lambda x: ([*x.pieces.values(), *x.alone.values()], (tuple(x.pieces), tuple(x.alone))), _rebuilt
)


class JointStep:
    """One optimizer step of a block: the same step as of each of its parameters, in fewer calls.

    With rates η of the group the step is `θ + η (θ₁ − θ)`, where θ₁ is what a step of rate 1 gives.
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


class UpdateRule:
    """The update half of an inner step: `(params, gradients, state) → (params, state)` by torch's own optimizer.

    Args:
        optimizer: the user's optimizer over the stage's module.
        params: deduplicated name → the module's own parameter.
        written: what a step writes into its group, which is carried on as state under `GROUP`; found out by a trial of
            a class that is not proven, if None.

    Raises:
        ConfigError: the optimizer is of a type that is not proven, has step hooks, or holds foreign parameters.
    """

    def __init__(
        self, optimizer: Optimizer, params: Mapping[str, torch.nn.Parameter], written: Sequence[str] | None = None
    ) -> None:
        self._kind = kind_of(optimizer)
        names, cls = {id(p): name for name, p in params.items()}, type(optimizer).__name__
        if any(id(p) not in names for group in optimizer.param_groups for p in group["params"]):
            raise ConfigError(
                f"{cls} holds a parameter that the stage's model does not have; build it over the same module: "
                "Stage(model, torch.optim.SGD(model.parameters(), lr=...), ...)"
            )
        self._params, self._blocks = dict(params), dict[tuple[str, ...], Block]()
        self._members = [
            tuple(names[id(p)] for p in group["params"] if p.requires_grad) for group in optimizer.param_groups
        ]
        self.names = [name for members in self._members for name in members]
        if not self.names:
            raise ConfigError(f"{cls} has no parameter that requires grad: nothing to train")
        if written is None:
            written = self._kind.proof(optimizer, self._kind) if self._kind.proof is not None else ()
        self.written = tuple(written)
        self._read(optimizer)

    def _read(self, optimizer: Optimizer) -> None:
        """Take an optimizer as it is now, for all steps to come."""
        self.optimizer, self._torch_step = optimizer, TorchStep(optimizer, self._kind.step)
        self.groups = [
            Group({k: number(v) for k, v in group.items() if k != "params"}, members)
            for group, members in zip(optimizer.param_groups, self._members, strict=True)
        ]

    def snapshot(self) -> UpdateRule:
        """Return the same rule with today's hyperparameters, whatever the user's optimizer is set to later."""
        rule = copy.copy(self)
        today = shallow(self.optimizer, [dict(group) for group in self.optimizer.param_groups])
        today.state = self.optimizer.state
        rule._read(today)
        return rule

    def initial_state(self) -> State:
        """Copy the user's optimizer's present state (empty for a fresh one), detached."""
        state: dict[str, dict[str, Any]] = {}
        for group, members in zip(self.optimizer.param_groups, self._members, strict=True):
            of_group = {GROUP + key: group[key] for key in self.written if key in group}
            for name in members:
                state[name] = copied({**self.optimizer.state.get(self._params[name], {}), **of_group})
        return {name: entry for name, entry in state.items() if entry}

    def step(
        self, params: Tensors, gradients: Mapping[str, Tensor | None], state: State, overrides: Overrides | None = None
    ) -> tuple[Tensors, State]:
        """Return the parameters and the state after one step, in the graph of all that goes in.

        A parameter without a gradient stays as it is, as in torch. A rate η that is learned or 0 enters as
        `θ + η (θ₁ − θ)`, where θ₁ is what a step of rate 1 gives: exact for optimizers whose step is linear in η.
        """
        moved: dict[Block, Tensor] = {}
        moved_state: dict[Block, Any] = {}
        for part in self.parts(params, gradients, state, overrides):
            block = part.block
            moved[block], moved_state[block] = part(block.join(params), block.join(gradients), block.join(state))
        return Joined(moved, but(params, moved)), Joined(moved_state, but(state, moved))

    def parts(
        self, params: Tensors, gradients: Mapping[str, Tensor | None], state: State, overrides: Overrides | None = None
    ) -> Iterator[JointStep]:
        """Yield the step of each set of parameters that are treated alike."""
        linear, groups = self._kind.linear_in_rate, self.groups
        if overrides:
            self.check_overrides(overrides)
            groups = with_overrides(self.groups, overrides, together=("lr",) if linear else ())
        for group in groups:
            if overrides or group.hyperparameters.get("lr") == 0:
                group = in_graph(group, overrides or {}, linear)
            names = tuple([name for name in group.names if gradients.get(name) is not None])
            if self.written and len(names) < len(group.names):
                raise StageError(
                    f"{type(self.optimizer).__name__} counts steps in its group ({', '.join(self.written)}), and this "
                    "step's loss gives some of the group's parameters no gradient; freeze those that are not used"
                )
            for block in self.blocks(names, params, state):
                yield JointStep(block, self._torch_step, group)

    def blocks(self, names: tuple[str, ...], params: Tensors, state: State) -> list[Block]:
        """Return the parameters of these names as blocks of such as one step on their concatenation treats alike."""
        known = self._blocks.get(names)
        held = known and isinstance(params, Joined) and known in params.pieces
        if known and held and isinstance(state, Joined) and known in state.pieces:
            return [known]
        alike: dict[Any, list[str]] = {}
        for name in names:
            traits = self._traits(params[name], state.get(name, {})) if self._kind.elementwise else name
            alike.setdefault(traits, []).append(name)
        found = []
        for members in map(tuple, alike.values()):
            if members not in self._blocks:
                self._blocks[members] = Block(members, self._params, whole=not self._kind.elementwise)
            found.append(self._blocks[members])
        return found

    def _traits(self, param: Tensor, entry: Mapping[str, Any]) -> tuple[Any, ...]:
        shared = ((key, None if per_element(key, value) else repr(number(value))) for key, value in entry.items())
        return param.dtype, param.device, *shared

    def check_overrides(self, overrides: Overrides) -> None:
        """Raise for hyperparameters that the optimizer does not have or writes itself, and for ones not learnable."""
        cls = type(self.optimizer).__name__
        if own := [key for key in self.written if key in overrides]:
            raise ConfigError(f"overrides: {cls} itself writes {own[0]!r} into its group; leave it to it")
        check_overrides(overrides, self.groups, self._kind, cls)

    def write_back(self, state: State) -> None:
        """Put a trained state into the user's own optimizer."""
        for group, members in zip(self.optimizer.param_groups, self._members, strict=True):
            for name in members:
                self.optimizer.state.pop(self._params[name], None)
                load_state(self.optimizer, group, self._params[name], state.get(name, {}))


def load_state(optimizer: Optimizer, group: dict[str, Any], param: Tensor, entry: Mapping[str, Any]) -> None:
    """Put one parameter's state into an optimizer, and what belongs there into its group."""
    own = copied(entry)
    for key in [key for key in own if key.startswith(GROUP)]:
        group[key.removeprefix(GROUP)] = own.pop(key)
    if own:
        optimizer.state[param] = own


def copied(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return state or hyperparameters as copies, detached."""
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in entry.items()}
