"""`torch.optim` made differentiable, and registered with `higher`.

`higher` ships its own formulas, and some are not torch's (its Adam adds epsilon elsewhere; `maximize` is ignored).
Here the torch optimizer's own `step()` runs on copies that stay in the graph, so that the update is torch's by
construction. The user's optimizer is read, never stepped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import higher
import torch
from torch import Tensor
from torch.optim import Optimizer

from metaopt.base.errors import ConfigError, StageError
from metaopt.optimizers.flattened import Block, Joined, JointStep, State, Tensors, but, named
from metaopt.optimizers.hyperparameters import Group, Overrides, check_overrides, in_graph, with_overrides
from metaopt.optimizers.kinds import kind_of, per_element
from metaopt.optimizers.step import GROUP, TorchStep, number, shallow


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
        names = {id(p): name for name, p in params.items()}
        for group in optimizer.param_groups:
            if any(id(p) not in names for p in group["params"]):
                raise ConfigError(
                    f"{type(optimizer).__name__} holds a parameter that the stage's model does not have; build it "
                    "over the same module: Stage(model, torch.optim.SGD(model.parameters(), lr=...), ...)"
                )
        self._params, self._blocks = dict(params), dict[tuple[str, ...], Block]()
        self._members = [
            tuple(names[id(p)] for p in group["params"] if p.requires_grad) for group in optimizer.param_groups
        ]
        self.names = [name for members in self._members for name in members]
        if not self.names:
            raise ConfigError(f"{type(optimizer).__name__} has no parameter that requires grad: nothing to train")
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
        self._unchanged = [in_graph(group, {}, self._kind.linear_in_rate) for group in self.groups]

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

    # --- in the graph -------------------------------------------------------------------------------------------

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
        linear, groups = self._kind.linear_in_rate, self._unchanged
        if overrides:
            self.check_overrides(overrides)
            groups = with_overrides(self.groups, overrides, together=("lr",) if linear else ())
            groups = [in_graph(group, overrides, linear) for group in groups]
        for group in groups:
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
        held = isinstance(params, Joined) and isinstance(state, Joined) and known in params.pieces
        if known and held and known in state.pieces:
            return [known]
        found = []
        for alike in map(tuple, self._alike(names, params, state)):
            if alike not in self._blocks:
                self._blocks[alike] = Block(alike, self._params, whole=not self._kind.elementwise)
            found.append(self._blocks[alike])
        return found

    def _alike(self, names: Sequence[str], params: Tensors, state: State) -> Iterable[list[str]]:
        if not self._kind.elementwise:
            return [[name] for name in names]
        found: dict[Any, list[str]] = {}
        for name in names:
            traits: list[Any] = [params[name].dtype, params[name].device]
            for key, value in state.get(name, {}).items():
                traits += (key, None if per_element(key, value) else repr(number(value)))
            found.setdefault(tuple(traits), []).append(name)
        return found.values()

    def check_overrides(self, overrides: Overrides) -> None:
        """Raise for hyperparameters that the optimizer does not have or writes itself, and for ones not learnable."""
        cls = type(self.optimizer).__name__
        for key in self.written:
            if key in overrides:
                raise ConfigError(f"overrides: {cls} itself writes {key!r} into its group; leave it to it")
        check_overrides(overrides, self.groups, self._kind, cls)

    # --- the user's own optimizer -------------------------------------------------------------------------------

    def write_back(self, state: Mapping[str, Mapping[str, Any]]) -> None:
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


class HigherOptimizer:
    """What `higher` is handed instead of the torch optimizer: one group of parameters, and the rule that steps them.

    A private type, so that registering it leaves the user's own use of `higher` as it is.
    """

    def __init__(self, rule: UpdateRule, reference: Sequence[Tensor], state: State) -> None:
        self.rule, self.initial = rule, state
        self.param_groups = [{"params": list(reference)}]
        self.state: dict[Tensor, Any] = {}


class DifferentiableTorchOptimizer(higher.optim.DifferentiableOptimizer):
    """`higher`'s interface over `UpdateRule.step`: the one registration that serves every torch optimizer."""

    def __init__(self, other: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(other, *args, **kwargs)
        self._rule: UpdateRule = other.rule
        self.named_state: State = other.initial
        self.named_params: Tensors = {}  # what the next step starts from
        self._overrides: Overrides = {}

    def release(self) -> None:
        """Let go of weights and state, which would keep the graph alive until the next garbage collection."""
        self.param_groups, self.named_params, self.named_state, self._fmodel = [], {}, {}, None

    def _apply_override(self, override: Any) -> None:
        self._overrides = override

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        (group,), (grads,) = self.param_groups, grouped_grads
        gradients = dict(zip(self._rule.names, grads, strict=True))
        self.named_params, self.named_state = self._rule.step(
            self.named_params, gradients, self.named_state, self._overrides
        )
        moved = named(self.named_params)
        group["params"] = [moved[name] for name in self._rule.names]


higher.register_optim(HigherOptimizer, DifferentiableTorchOptimizer)  # pyright: ignore[reportArgumentType]


def make_optimizer(optimizer: Any, model: torch.nn.Module) -> Optimizer:
    """Return the user's optimizer, or the one that a factory makes over the parameters that require grad."""
    factory: Any = optimizer
    if isinstance(optimizer, Optimizer):
        return optimizer
    if not callable(optimizer):
        raise ConfigError(
            f"Stage: optimizer is a {type(optimizer).__name__}; give functools.partial(torch.optim.Adam, lr=1e-3), or "
            "an optimizer over the model's parameters"
        )
    trained = NamedParameters((n, p) for n, p in model.named_parameters() if p.requires_grad)
    if not trained:
        raise ConfigError("Stage: every parameter of the model is frozen; set requires_grad_(True) on what to train")
    built: Optimizer = factory(trained)
    return built


class NamedParameters(list):
    """A plain list of parameters that knows their names: what a stage hands an optimizer's factory."""

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        pairs = list(named)
        super().__init__(param for _, param in pairs)
        self.names = [name for name, _ in pairs]
