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
from metaopt.optimizers.step import GROUP, TorchStep, honours_differentiable, number, shallow


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
                _load(self.optimizer, group, self._params[name], state.get(name, {}))


class InPlace:
    """Torch's own optimizer over copies of the weights, joined where its step allows: the update without a graph.

    `params` has them by name: leaves that require grad, which a step moves.
    """

    params: dict[str, Tensor]

    def __init__(self, rule: UpdateRule, params: Tensors, state: State) -> None:
        self._rule, self._overridden = rule, False
        self._bind(params, state)

    def _bind(self, params: Tensors, state: State, apart: bool = False) -> None:
        """Copy weights and state into an optimizer of their own, each parameter `apart` if asked to."""
        rule = self._rule
        self._joint: dict[Block, Tensor] = {}
        for group in rule.groups:
            for names in [(name,) for name in group.names] if apart else [group.names]:
                for block in rule.blocks(names, params, state):
                    self._joint[block] = block.join(params).detach().clone()
        views = {name: view for block, joint in self._joint.items() for name, view in block.split(joint).items()}
        self.params = {name: views[name].detach().requires_grad_() for name in rule.names}
        self._optimizer = shallow(rule.optimizer, [])
        self._group({})
        for group in self._optimizer.param_groups:
            for joint in group["params"]:
                block = next(block for block, tensor in self._joint.items() if tensor is joint)
                _load(self._optimizer, group, joint, block.join(state))

    def _group(self, overrides: Overrides) -> None:
        """Give the optimizer its groups with the hyperparameters of one step, as plain values."""
        rule, written = self._rule, self._written()
        self._optimizer.param_groups = []
        for group in with_overrides(rule.groups, overrides):
            params = [joint for block, joint in self._joint.items() if block.names[0] in group.names]
            given = {key: number(group.hyperparameters[key]) for key in overrides}
            own = written.get(params[0], {}) if params else {}
            self._optimizer.param_groups.append({**group.hyperparameters, **given, **own, "params": params})

    def _written(self) -> dict[Tensor, dict[str, Any]]:
        """Return what a step has written into the group of each tensor."""
        groups, keys = self._optimizer.param_groups, self._rule.written
        return {p: {k: group[k] for k in keys if k in group} for group in groups for p in group["params"]}

    def join(self, gradients: Mapping[str, Tensor | None]) -> Mapping[str, Tensor | None]:
        """Return gradients as the weights are held, if there are all."""
        if any(gradient is None for gradient in gradients.values()):
            return gradients
        return Joined({block: block.join(gradients) for block in self._joint}, {})

    def step(self, gradients: Mapping[str, Tensor | None], overrides: Overrides) -> None:
        """Let the optimizer step; a parameter without a gradient stays as it is."""
        if overrides:
            self._rule.check_overrides(overrides)
        by_name = any(isinstance(value, Mapping) for value in overrides.values())
        complete = isinstance(gradients, Joined) or not any(gradient is None for gradient in gradients.values())
        if (by_name or not complete) and any(len(block.names) > 1 for block in self._joint):
            self._bind(self.params, self.state(), apart=True)
        if overrides or self._overridden:
            self._group(overrides)
            self._overridden = bool(overrides)
        to_change = not honours_differentiable(self._rule.optimizer)  # a step may write into it (torch's never do)
        for block, joint in self._joint.items():
            given = block.join(gradients) if complete or gradients[block.names[0]] is not None else None
            joint.grad = given.clone() if to_change and given is not None else given
        self._optimizer.step()

    def weights(self) -> Tensors:
        """Return copies of the present weights."""
        return Joined({block: joint.detach().clone() for block, joint in self._joint.items()}, {})

    def state(self) -> State:
        """Return a copy of the present state, with what was written into the groups."""
        written = self._written()
        pieces = {}
        for block, joint in self._joint.items():
            of_group = {GROUP + key: value for key, value in written[joint].items()}
            pieces[block] = copied({**self._optimizer.state.get(joint, {}), **of_group})
        return Joined(pieces, {})


def _load(optimizer: Optimizer, group: dict[str, Any], param: Tensor, entry: Mapping[str, Any]) -> None:
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
