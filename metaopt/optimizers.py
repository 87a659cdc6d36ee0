"""`torch.optim` made differentiable, and registered with `higher`.

`higher` ships its own formulas, and some are not torch's (its Adam adds epsilon elsewhere; `maximize` is ignored).
Here the torch optimizer's own `step()` runs on copies that stay in the graph, so that the update is torch's by
construction. The user's optimizer is read, never stepped.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import higher
import torch
from torch import Tensor
from torch.optim import Optimizer

from metaopt.errors import ConfigError, did_you_mean
from metaopt.optimizer_kinds import SUPPORTED as SUPPORTED
from metaopt.optimizer_kinds import carries_gradient as carries_gradient
from metaopt.optimizer_kinds import kind_of
from metaopt.optimizer_kinds import per_element as per_element
from metaopt.optimizer_probe import probe
from metaopt.schedules import Schedule as Schedule
from metaopt.torch_step import plain, shallow, torch_step, tracked

Tensors = dict[str, Tensor]
State = dict[str, dict[str, Any]]  # parameter name → the optimizer's state of that parameter
# Hyperparameter → a value for all groups, a list of one per group, or a mapping from parameter names
Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """One parameter group: its hyperparameters and the names of its trained parameters."""

    hyperparameters: dict[str, Any]
    names: tuple[str, ...]


class UpdateRule:
    """The update half of an inner step: `(params, gradients, state) → (params, state)` by torch's own optimizer.

    Args:
        optimizer: the user's optimizer over the stage's module.
        params: deduplicated name → the module's own parameter.

    Raises:
        ConfigError: the optimizer is of a type that is not proven, has step hooks, or holds foreign parameters.
    """

    def __init__(self, optimizer: Optimizer, params: Mapping[str, torch.nn.Parameter]) -> None:
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
        if not self._kind.is_torch_s:
            probe(optimizer, self._kind)

    @property
    def groups(self) -> list[Group]:
        """The parameter groups with the hyperparameters that the user's optimizer has now."""
        return [
            Group({k: v for k, v in group.items() if k != "params"}, members)
            for group, members in zip(self.optimizer.param_groups, self._members, strict=True)
        ]

    def initial_state(self) -> State:
        """Copy the user's optimizer's present state (empty for a fresh one), detached."""
        state = {name: self.optimizer.state.get(self._params[name], {}) for name in self.names}
        return {name: {k: _private(v) for k, v in entry.items()} for name, entry in state.items() if entry}

    def check_overrides(self, overrides: Overrides) -> None:
        """Raise for hyperparameters that the optimizer does not have, and for ones that cannot be learned."""
        for key, value in overrides.items():
            self._check_known(key)
            if isinstance(value, list) and len(value) != len(self._members):
                raise ConfigError(
                    f"overrides: {key!r} has {len(value)} values for {len(self._members)} parameter groups; "
                    "give one value, or a list of one per group"
                )
            unknown = [name for name in value if name not in self.names] if isinstance(value, Mapping) else []
            if unknown:
                raise ConfigError(
                    f"overrides: {key!r} names {unknown[0]!r}, which is no trained parameter"
                    f"{did_you_mean(unknown[0], self.names)}"
                )
            for learned in _learned(value):
                self._check_learnable(key, learned)

    def _check_known(self, key: str) -> None:
        known = [k for k in self.optimizer.param_groups[0] if k != "params"]
        if key not in known:
            raise ConfigError(
                f"overrides: {type(self.optimizer).__name__} has no hyperparameter {key!r}{did_you_mean(key, known)}"
            )

    def _check_learnable(self, key: str, value: Tensor) -> None:
        name = type(self.optimizer).__name__
        if key not in self._kind.learnable:
            reason = (self._kind.reasons or {}).get(key)
            can = f"{name} can learn {', '.join(self._kind.learnable) or 'none'}"
            raise ConfigError(
                f"overrides: {key!r} is a tensor that requires grad, and cannot be learned"
                f"{f' ({reason})' if reason else ''}; {can}; pass a float"
            )
        if value.numel() != 1:
            raise ConfigError(
                f"overrides: {key!r} has shape {list(value.shape)}; give one number, a list of one per parameter "
                "group, or a mapping from parameter names to numbers"
            )
        if key == "momentum" and not value.item() > 0:
            raise ConfigError(
                f"overrides: a learned momentum is {value.item()}, and at 0 torch keeps no momentum buffer; keep it "
                "above 0 (a sigmoid does)"
            )

    def check_learnable(self, key: str) -> None:
        """Raise if a hyperparameter of this optimizer cannot be learned; before any training."""
        self._check_known(key)
        self._check_learnable(key, torch.tensor(1.0))

    def step(
        self,
        params: Tensors,
        gradients: Mapping[str, Tensor | None],
        state: State,
        overrides: Overrides | None = None,
    ) -> tuple[Tensors, State]:
        """Return the parameters and the state after one step, in the graph of all that goes in.

        A parameter without a gradient stays as it is, as in torch. A learned rate η enters as `θ + η (θ₁ − θ)`, where
        θ₁ is what a step of rate 1 gives: exact for optimizers whose step is linear in η, and right at η = 0.
        """
        overrides = overrides or {}
        self.check_overrides(overrides)
        linear = self._kind.linear_in_rate
        new_params, new_state = dict(params), dict(state)
        for group in _with_overrides(self.groups, overrides, together=("lr",) if linear else ()):
            names = [name for name in group.names if gradients.get(name) is not None]
            scales = _learned_rates(group) if linear else None
            hyperparameters = {k: tracked(v) for k, v in group.hyperparameters.items()}
            hyperparameters |= {} if scales is None else {"lr": 1.0}
            for bucket in self._buckets(names, params, state):
                flat = _Flat(bucket, params)
                moved, moved_state = torch_step(
                    self.optimizer,
                    self._kind.step,
                    hyperparameters,
                    flat.join(params),
                    flat.join(gradients),
                    flat.join_state(state),
                )
                new_state.update(flat.split_state(moved_state))
                for name, after in flat.split(moved).items():
                    before = params[name]
                    new_params[name] = after if scales is None else before + scales[name] * (after - before)
        return new_params, new_state

    def _buckets(self, names: Sequence[str], params: Tensors, state: State) -> Iterator[list[str]]:
        """Group parameters that one step on their concatenation treats alike: dtype, device, state keys, step count."""
        found: dict[Any, list[str]] = defaultdict(list)
        for name in names:
            shared = tuple(
                (k, v.item() if isinstance(v, Tensor) and not per_element(k, v) else None)
                for k, v in state.get(name, {}).items()
            )
            alone = None if self._kind.elementwise else name
            found[alone, params[name].dtype, params[name].device, shared].append(name)
        yield from found.values()

    def set_hyperparameters(self, bound: Optimizer, overrides: Overrides) -> None:
        """Give a bound optimizer the hyperparameters of one step, as plain values; the rest are the user's own."""
        self.check_overrides(overrides)
        groups = _with_overrides(self.groups, overrides)
        values = [{k: plain(v) for k, v in group.hyperparameters.items()} for group in groups]
        if bound is self.optimizer:
            for group, given in zip(bound.param_groups, values, strict=True):
                group.update(given)
            return
        by_name = dict(zip(self.names, (p for group in bound.param_groups for p in group["params"]), strict=True))
        bound.param_groups = [
            {**given, "params": [by_name[name] for name in group.names]}
            for group, given in zip(groups, values, strict=True)
        ]

    def bind(self, params: Tensors, state: State) -> Optimizer:
        """Return torch's own optimizer over other leaf tensors, warm with `state`: the step without a graph."""
        groups = [{**g.hyperparameters, "params": [params[n] for n in g.names]} for g in self.groups]
        bound = shallow(self.optimizer, groups)
        for name, entry in state.items():
            bound.state[params[name]] = {k: _private(v) for k, v in entry.items()}
        return bound

    def read(self, bound: Optimizer, params: Tensors) -> State:
        """Return the state of a bound optimizer, by parameter name."""
        return {n: dict(bound.state[params[n]]) for n in self.names if params[n] in bound.state}

    def write_back(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Put a trained state into the user's own optimizer."""
        for name, param in self._params.items():
            if name in state:
                self.optimizer.state[param] = {k: _private(v) for k, v in state[name].items()}
            elif name in self.names:
                self.optimizer.state.pop(param, None)


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


class _Flat:
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


def _private(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _learned(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a graph that an override holds."""
    if isinstance(value, Tensor) and value.requires_grad:
        yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for part in parts:
        yield from _learned(part)


def _with_overrides(groups: list[Group], overrides: Overrides, together: Sequence[str] = ()) -> list[Group]:
    """Return the groups of one step; one that gets values by parameter name is split, but for keys in `together`."""
    out = []
    for i, group in enumerate(groups):
        values = {k: v[i] if isinstance(v, list) else v for k, v in overrides.items()}
        mapped = {k: v for k, v in values.items() if isinstance(v, Mapping)}
        split = any(k not in together for k in mapped)
        for names in [(name,) for name in group.names] if split else [group.names]:
            own = {
                k: {n: v.get(n, group.hyperparameters[k]) for n in names} if not split else v[names[0]]
                for k, v in mapped.items()
                if not split or names[0] in v
            }
            given = {k: v for k, v in values.items() if k not in mapped}
            out.append(Group({**group.hyperparameters, **given, **own}, names))
    return out


def _learned_rates(group: Group) -> dict[str, Any] | None:
    """Return by name the learned rates that scale a step of rate 1, or None where nothing is learned."""
    rate = group.hyperparameters["lr"]
    if isinstance(rate, Mapping):
        return dict(rate)
    return dict.fromkeys(group.names, rate) if isinstance(rate, Tensor) and rate.requires_grad else None
