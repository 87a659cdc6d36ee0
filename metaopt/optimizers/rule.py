"""`torch.optim` made differentiable, and registered with `higher`.

`higher` ships its own formulas, and some are not torch's (its Adam adds epsilon elsewhere; `maximize` is ignored).
Here the torch optimizer's own `step()` runs on copies that stay in the graph, so that the update is torch's by
construction. The user's optimizer is read, never stepped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import higher
import torch
from torch import Tensor
from torch.optim import Optimizer

from metaopt.base.errors import ConfigError, StageError
from metaopt.optimizers.flattened import JointStep, State, Tensors, in_parts
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
        self,
        optimizer: Optimizer,
        params: Mapping[str, torch.nn.Parameter],
        written: Sequence[str] | None = None,
    ) -> None:
        self._kind = kind_of(optimizer)
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
        if written is None:
            written = self._kind.proof(optimizer, self._kind) if self._kind.proof is not None else ()
        self.written = tuple(written)
        self._read(optimizer)

    def _read(self, optimizer: Optimizer) -> None:
        """Take an optimizer as it is now, for all steps to come."""
        self.optimizer, self._torch_step = optimizer, TorchStep(optimizer, self._kind.step)
        self._groups = [
            Group({k: number(v) for k, v in group.items() if k != "params"}, members)
            for group, members in zip(optimizer.param_groups, self._members, strict=True)
        ]
        self._unchanged = [in_graph(group, {}, self._kind.linear_in_rate) for group in self._groups]

    def snapshot(self) -> UpdateRule:
        """Return the same rule with today's hyperparameters, whatever the user's optimizer is set to later."""
        rule = copy.copy(self)
        today = shallow(self.optimizer, [dict(group) for group in self.optimizer.param_groups])
        today.state = self.optimizer.state
        rule._read(today)
        return rule

    def initial_state(self) -> State:
        """Copy the user's optimizer's present state (empty for a fresh one), detached."""
        return self.read(self.optimizer, self._params)

    # --- in the graph -------------------------------------------------------------------------------------------

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
        most: float = math.inf,
    ) -> Iterator[JointStep]:
        """Yield the step of each set of parameters that are treated alike, joined up to `most` elements."""
        linear, groups = self._kind.linear_in_rate, self._unchanged
        if overrides:
            self.check_overrides(overrides)
            groups = with_overrides(self._groups, overrides, together=("lr",) if linear else ())
            groups = [in_graph(group, overrides, linear) for group in groups]
        for group in groups:
            names = [name for name in group.names if gradients.get(name) is not None]
            if self.written and len(names) < len(group.names):
                raise StageError(
                    f"{type(self.optimizer).__name__} counts steps in its group ({', '.join(self.written)}), and this "
                    "step's loss gives some of the group's parameters no gradient; freeze those that are not used"
                )
            for alike in self._alike(names, params, state):
                for part in in_parts(alike, params, most):
                    yield JointStep(part, params, self._torch_step, group, whole=not self._kind.elementwise)

    def _alike(self, names: Sequence[str], params: Tensors, state: State) -> Iterable[list[str]]:
        """Group parameters that one step on their concatenation treats alike: dtype, device, state keys, step count."""
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
        check_overrides(overrides, self._groups, self._kind, cls)

    # --- without a graph, by torch's own optimizer --------------------------------------------------------------

    def bind(self, params: Tensors, state: State) -> Optimizer:
        """Return torch's own optimizer over other leaf tensors, warm with `state`: the step without a graph."""
        groups = [{**g.hyperparameters, "params": [params[n] for n in g.names]} for g in self._groups]
        bound = shallow(self.optimizer, groups)
        _load(bound, params, state)
        return bound

    def to_change(self, gradient: Tensor | None) -> Tensor | None:
        """Return a gradient for the plain step: a copy where the step may change it in place (torch's never do)."""
        return gradient if gradient is None or honours_differentiable(self.optimizer) else gradient.clone()

    def set_hyperparameters(self, bound: Optimizer, overrides: Overrides) -> None:
        """Give a bound optimizer the hyperparameters of one step, as plain values; the rest are the user's own."""
        self.check_overrides(overrides)
        by_name = dict(zip(self.names, (p for group in bound.param_groups for p in group["params"]), strict=True))
        written = self._written(bound)
        bound.param_groups = []
        for group in with_overrides(self._groups, overrides):
            params = [by_name[name] for name in group.names]
            given = {key: number(group.hyperparameters[key]) for key in overrides}
            own = written[params[0]] if params else {}
            bound.param_groups.append({**group.hyperparameters, **given, **own, "params": params})

    def read(self, bound: Optimizer, params: Mapping[str, Tensor]) -> State:
        """Return a copy of the state of a bound optimizer, by parameter name, and of what it wrote into its groups."""
        written = self._written(bound)
        state: State = {}
        for name in self.names:
            of_group = {GROUP + k: v for k, v in written[params[name]].items()}
            state[name] = copied({**bound.state.get(params[name], {}), **of_group})
        return {name: entry for name, entry in state.items() if entry}

    def write_back(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Put a trained state into the user's own optimizer."""
        for name in self.names:
            self.optimizer.state.pop(self._params[name], None)
        _load(self.optimizer, self._params, state)

    def _written(self, bound: Optimizer) -> dict[Tensor, dict[str, Any]]:
        groups = [({k: group[k] for k in self.written if k in group}, group["params"]) for group in bound.param_groups]
        return {param: written for written, params in groups for param in params}


def _load(optimizer: Optimizer, params: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Any]]) -> None:
    names = {param: name for name, param in params.items()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            own = copied(state.get(names[param], {}))
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
        self._overrides: Overrides = {}

    def release(self) -> None:
        """Let go of weights and state, which would keep the graph alive until the next garbage collection."""
        self.param_groups, self.named_state, self._fmodel = [], {}, None

    def _apply_override(self, override: Any) -> None:
        self._overrides = override

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        (group,), (grads,), names = self.param_groups, grouped_grads, self._rule.names
        params, gradients = dict(zip(names, group["params"], strict=True)), dict(zip(names, grads, strict=True))
        params, self.named_state = self._rule.step(params, gradients, self.named_state, self._overrides)
        group["params"] = list(params.values())


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
