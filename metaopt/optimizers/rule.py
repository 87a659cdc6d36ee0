"""`torch.optim` made differentiable, and registered with `higher`.

`higher` ships its own formulas, and some are not torch's (its Adam adds epsilon elsewhere; `maximize` is ignored).
Here the torch optimizer's own `step()` runs on copies that stay in the graph, so that the update is torch's by
construction. The user's optimizer is read, never stepped.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import higher
import torch
from torch import Tensor
from torch.optim import Optimizer

from metaopt.base.errors import ConfigError, StageError
from metaopt.optimizers.flattened import JointStep as JointStep
from metaopt.optimizers.flattened import State, in_parts
from metaopt.optimizers.hyperparameters import Group, Overrides, check_overrides, rate_scales, with_overrides
from metaopt.optimizers.kinds import SUPPORTED as SUPPORTED
from metaopt.optimizers.kinds import carries_gradient as carries_gradient
from metaopt.optimizers.kinds import kind_of
from metaopt.optimizers.kinds import per_element as per_element
from metaopt.optimizers.schedules import Schedule as Schedule
from metaopt.optimizers.step import GROUP, honours_differentiable, plain, shallow, tracked
from metaopt.optimizers.step import attributes as attributes
from metaopt.optimizers.step import with_attributes as with_attributes

Tensors = dict[str, Tensor]


class UpdateRule:
    """The update half of an inner step: `(params, gradients, state) → (params, state)` by torch's own optimizer.

    Args:
        optimizer: the user's optimizer over the stage's module.
        params: deduplicated name → the module's own parameter.
        probed: try out a class that is not proven.

    Raises:
        ConfigError: the optimizer is of a type that is not proven, has step hooks, or holds foreign parameters.
    """

    written: tuple[str, ...] = ()  # what a step writes into its group: carried on as state, under `GROUP`

    def __init__(self, optimizer: Optimizer, params: Mapping[str, torch.nn.Parameter], probed: bool = True) -> None:
        self._kind = kind_of(optimizer)
        self.optimizer = optimizer
        names = {id(p): name for name, p in params.items()}
        for group in optimizer.param_groups:
            if any(id(p) not in names for p in group["params"]):
                raise ConfigError(
                    f"{type(optimizer).__name__} holds a parameter that the stage's model does not have; build it "
                    "over the same module: Stage(model, torch.optim.SGD(model.parameters(), lr=...), ...)"
                )
        self._params = dict(params)
        self._members = [
            tuple(names[id(p)] for p in group["params"] if p.requires_grad) for group in optimizer.param_groups
        ]
        self.names = [name for members in self._members for name in members]
        if not self.names:
            raise ConfigError(f"{type(optimizer).__name__} has no parameter that requires grad: nothing to train")
        if probed and self._kind.proof is not None:
            self.written = self._kind.proof(optimizer, self._kind, functools.partial(UpdateRule, probed=False))

    @property
    def groups(self) -> list[Group]:
        """The parameter groups with the hyperparameters that the user's optimizer has now."""
        return [
            Group({k: v for k, v in group.items() if k != "params"}, members)
            for group, members in zip(self.optimizer.param_groups, self._members, strict=True)
        ]

    def snapshot(self) -> UpdateRule:
        """Return the same rule with today's hyperparameters, whatever the user's optimizer is set to later."""
        rule = copy.copy(self)
        rule.optimizer = shallow(self.optimizer, [dict(group) for group in self.optimizer.param_groups])
        rule.optimizer.state = self.optimizer.state
        return rule

    def initial_state(self) -> State:
        """Copy the user's optimizer's present state (empty for a fresh one), detached."""
        return self.read(self.optimizer, self._params)

    def check_overrides(self, overrides: Overrides) -> None:
        """Raise for hyperparameters that the optimizer does not have, and for ones that cannot be learned."""
        for key in overrides:
            if key in self.written:
                cls = type(self.optimizer).__name__
                raise ConfigError(f"overrides: {cls} itself writes {key!r} into its group; leave it to it")
        check_overrides(overrides, self.optimizer, self._kind, self._members)

    def step(
        self,
        params: Tensors,
        gradients: Mapping[str, Tensor | None],
        state: State,
        overrides: Overrides | None = None,
    ) -> tuple[Tensors, State]:
        """Return the parameters and the state after one step, in the graph of all that goes in.

        A parameter without a gradient stays as it is, as in torch. A rate η that is learned or 0 enters as
        `θ + η (θ₁ − θ)`, where θ₁ is what a step of rate 1 gives: exact for optimizers whose step is linear in η.
        """
        new_params, new_state = dict(params), dict(state)
        for part in self.parts(params, gradients, state, overrides):
            moved, moved_state = part.step(part.join(params), part.join(gradients), part.join_state(state))
            new_params.update(part.split(moved))
            new_state.update(part.split_state(moved_state))
        return new_params, new_state

    def parts(
        self,
        params: Tensors,
        gradients: Mapping[str, Tensor | None],
        state: State,
        overrides: Overrides | None = None,
        most: int | None = None,
    ) -> Iterator[JointStep]:
        """Yield the step of each group of parameters that are treated alike, as one step on their concatenation.

        Of at most `most` elements, where it is given and several parameters are joined.
        """
        overrides = overrides or {}
        self.check_overrides(overrides)
        linear = self._kind.linear_in_rate
        for group in with_overrides(self.groups, overrides, together=("lr",) if linear else ()):
            names = [name for name in group.names if gradients.get(name) is not None]
            if self.written and len(names) < len(group.names):
                raise StageError(
                    f"{type(self.optimizer).__name__} counts steps in its group ({', '.join(self.written)}), and this "
                    "step's loss gives some of the group's parameters no gradient; freeze those that are not used"
                )
            scales = rate_scales(group) if linear else None
            hyperparameters = {k: tracked(v) for k, v in group.hyperparameters.items()}
            hyperparameters |= {} if scales is None else {"lr": 1.0}
            for bucket in self._buckets(names, params, state, most):
                whole = not self._kind.elementwise
                yield JointStep(bucket, params, self.optimizer, self._kind.step, hyperparameters, scales, whole)

    def _buckets(self, names: Sequence[str], params: Tensors, state: State, most: int | None) -> Iterator[list[str]]:
        """Group parameters that one step on their concatenation treats alike: dtype, device, state keys, step count."""
        found: dict[Any, list[str]] = defaultdict(list)
        for name in names:
            shared = tuple(
                (k, None if per_element(k, v) else v.item() if isinstance(v, Tensor) else repr(v))
                for k, v in state.get(name, {}).items()
            )
            alone = None if self._kind.elementwise else name
            found[alone, params[name].dtype, params[name].device, shared].append(name)
        for bucket in found.values():
            yield from [bucket] if most is None else in_parts(bucket, params, most)

    def to_change(self, gradient: Tensor | None) -> Tensor | None:
        """Return a gradient for the plain step: a copy where the step may change it in place (torch's never do)."""
        return gradient if gradient is None or honours_differentiable(self.optimizer) else gradient.clone()

    def set_hyperparameters(self, bound: Optimizer, overrides: Overrides) -> None:
        """Give a bound optimizer the hyperparameters of one step, as plain values; the rest are the user's own."""
        self.check_overrides(overrides)
        groups = with_overrides(self.groups, overrides)
        values = [{k: plain(v) for k, v in group.hyperparameters.items()} for group in groups]
        if bound is self.optimizer:
            for group, given in zip(bound.param_groups, values, strict=True):
                group.update(given)
            return
        by_name = dict(zip(self.names, (p for group in bound.param_groups for p in group["params"]), strict=True))
        written = self._written(bound)
        bound.param_groups = [
            {**given, **(written[members[0]] if members else {}), "params": members}
            for members, given in zip(([by_name[n] for n in group.names] for group in groups), values, strict=True)
        ]

    def bind(self, params: Tensors, state: State) -> Optimizer:
        """Return torch's own optimizer over other leaf tensors, warm with `state`: the step without a graph."""
        groups = [{**g.hyperparameters, "params": [params[n] for n in g.names]} for g in self.groups]
        bound = shallow(self.optimizer, groups)
        self._load(bound, params, state)
        return bound

    def read(self, bound: Optimizer, params: Mapping[str, Tensor]) -> State:
        """Return a copy of the state of a bound optimizer, by parameter name, and of what it wrote into its groups."""
        written = self._written(bound)
        state = {
            n: {**bound.state.get(p, {}), **{GROUP + k: v for k, v in written[p].items()}}
            for n, p in ((n, params[n]) for n in self.names)
        }
        return {name: {k: _private(v) for k, v in entry.items()} for name, entry in state.items() if entry}

    def _written(self, bound: Optimizer) -> dict[Tensor, dict[str, Any]]:
        groups = [({k: group[k] for k in self.written if k in group}, group["params"]) for group in bound.param_groups]
        return {param: written for written, params in groups for param in params}

    def _load(self, optimizer: Optimizer, params: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Any]]) -> None:
        written = {}
        for name, entry in state.items():
            own = {k: _private(v) for k, v in entry.items()}
            written[params[name]] = {k.removeprefix(GROUP): own.pop(k) for k in entry if k.startswith(GROUP)}
            if own:
                optimizer.state[params[name]] = own
        for group in optimizer.param_groups if self.written else ():
            for param in group["params"]:
                group.update(written.get(param, {}))

    def write_back(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Put a trained state into the user's own optimizer."""
        for name in self.names:
            self.optimizer.state.pop(self._params[name], None)
        self._load(self.optimizer, self._params, state)


class HigherOptimizer:
    """What `higher` is handed instead of the torch optimizer: groups, state, and the rule that steps them.

    A private type, so that registering it leaves the user's own use of `higher` as it is.
    """

    def __init__(self, rule: UpdateRule, reference: Sequence[Tensor], state: State) -> None:
        by_name = dict(zip(rule.names, reference, strict=True))
        self.rule = rule
        self.initial = state
        self.param_groups = [{**g.hyperparameters, "params": [by_name[n] for n in g.names]} for g in rule.groups]
        self.state: dict[Tensor, Any] = {}


class DifferentiableTorchOptimizer(higher.optim.DifferentiableOptimizer):
    """`higher`'s interface over `UpdateRule.step`: the one registration that serves every torch optimizer."""

    def __init__(self, other: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(other, *args, **kwargs)
        self._rule: UpdateRule = other.rule
        self.named_state: State = other.initial
        self._overrides: Overrides = {}

    def release(self) -> None:
        """Let go of weights and state, which would keep the graph alive until the next garbage collection."""
        self.param_groups, self.named_state, self._fmodel = [], {}, None

    def _apply_override(self, override: Any) -> None:
        self._overrides = override

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        params: Tensors = {}
        gradients: dict[str, Tensor | None] = {}
        for group, spec, grads in zip(self.param_groups, self._rule.groups, grouped_grads, strict=True):
            params |= dict(zip(spec.names, group["params"], strict=True))
            gradients |= dict(zip(spec.names, grads, strict=True))
        params, self.named_state = self._rule.step(params, gradients, self.named_state, self._overrides)
        for group, spec in zip(self.param_groups, self._rule.groups, strict=True):
            group["params"] = [params[name] for name in spec.names]


higher.register_optim(HigherOptimizer, DifferentiableTorchOptimizer)  # pyright: ignore[reportArgumentType]


def _private(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


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
