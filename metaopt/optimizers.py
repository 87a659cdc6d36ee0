"""`torch.optim` made differentiable, and registered with `higher`.

`higher` ships its own formulas, and some are not torch's (its Adam adds epsilon elsewhere; `maximize` is ignored).
Here the torch optimizer's own `step()` runs on copies that stay in the graph, so that the update is torch's by
construction. The user's optimizer is read, never stepped.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import higher
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from metaopt.errors import ConfigError, StageError, did_you_mean

Tensors = dict[str, Tensor]
State = dict[str, dict[str, Any]]  # parameter name → the optimizer's state of that parameter
Overrides = Mapping[str, Any]  # hyperparameter → a value for all groups, or a list of one per group

COUNTERS = ("step",)  # 0-dim state that all parameters of one age share; other state has the parameter's shape
SUPPORTED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class _Sqrt(torch.autograd.Function):
    """Square root with slope 0 at 0, where Adam's first moment is 0 too: a dead unit must not yield NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # a path that is cut later on must stay None, not become zeros
        root = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        (root,) = ctx.saved_tensors
        return None if grads[0] is None else torch.where(root == 0, 0.0, grads[0] / (2 * root))


class _StayInGraph(TorchFunctionMode):
    """Three repairs of a torch optimizer's step that are the same for every optimizer.

    `sqrt` has slope 0 at 0; `detach` (SGD's first momentum buffer) keeps the graph; new 0-dim state (`step`) is
    float64, since torch's own non-differentiable step computes `beta ** step` in Python floats.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.sqrt, torch.sqrt) and args[0].requires_grad:
            return _Sqrt.apply(args[0])
        if func in (torch.Tensor.detach, torch.detach):
            return args[0].view_as(args[0])
        out = func(*args, **(kwargs or {}))
        if func is torch.tensor and out.dim() == 0 and out.is_floating_point():
            return out.double()
        return out


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
        _refuse_unsupported(optimizer)
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
            known = [k for k in self.optimizer.param_groups[0] if k != "params"]
            if key not in known:
                raise ConfigError(
                    f"overrides: {type(self.optimizer).__name__} has no hyperparameter {key!r}"
                    f"{did_you_mean(key, known)}"
                )
            values = value if isinstance(value, list) else [value]
            if isinstance(value, list) and len(value) != len(self._members):
                raise ConfigError(
                    f"overrides: {key!r} has {len(value)} values for {len(self._members)} parameter groups; "
                    "give one value, or a list of one per group"
                )
            if key != "lr" and any(isinstance(v, Tensor) and v.requires_grad for v in values):
                raise ConfigError(
                    f"overrides: {key!r} is a tensor that requires grad; only 'lr' can be learned so far; pass a float"
                )

    def step(
        self,
        params: Tensors,
        gradients: Mapping[str, Tensor | None],
        state: State,
        overrides: Overrides | None = None,
    ) -> tuple[Tensors, State]:
        """Return the parameters and the state after one step, in the graph of all that goes in.

        A parameter without a gradient stays as it is, as in torch. A learned rate η enters as `θ + η (θ₁ − θ)`, where
        θ₁ is what a step of rate 1 gives: exact, since these optimizers' steps are linear in η.
        """
        self.check_overrides(overrides or {})
        new_params, new_state = dict(params), dict(state)
        for group in _with_overrides(self.groups, overrides):
            names = [name for name in group.names if gradients.get(name) is not None]
            rate, scale = _learned_rate(group.hyperparameters["lr"])
            hyperparameters = {**group.hyperparameters, "lr": rate}
            for bucket in _buckets(names, params, state):
                flat = _Flat(bucket, params)
                moved, moved_state = self._step_one(
                    hyperparameters, flat.join(params), flat.join(gradients), flat.join_state(state)
                )
                new_state.update(flat.split_state(moved_state))
                for name, after in flat.split(moved).items():
                    new_params[name] = after if scale is None else params[name] + scale * (after - params[name])
        return new_params, new_state

    def _step_one(
        self, hyperparameters: dict[str, Any], param: Tensor, gradient: Tensor | None, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run torch's own `step()` on one tensor that stays in the graph."""
        param = param.clone()
        param.grad = gradient
        group = {
            **hyperparameters,
            "differentiable": True,
            "foreach": False,
            "fused": None,
            "capturable": False,
        }
        group = {k: v for k, v in group.items() if k in hyperparameters}
        stepper = _shallow(self.optimizer, [{**group, "params": [param]}], differentiable=True)
        if state:
            stepper.state[param] = {k: _stepped_on(k, v) for k, v in state.items()}
        with _StayInGraph():
            stepper.step()
        return param, dict(stepper.state[param])

    def set_hyperparameters(self, bound: Optimizer, overrides: Overrides) -> None:
        """Give a bound optimizer the hyperparameters of one step, as plain values; the rest are the user's own."""
        self.check_overrides(overrides)
        for group, spec in zip(bound.param_groups, _with_overrides(self.groups, overrides), strict=True):
            values = spec.hyperparameters.items()
            group.update({k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in values})

    def bind(self, params: Tensors, state: State) -> Optimizer:
        """Return torch's own optimizer over other leaf tensors, warm with `state`: the step without a graph."""
        groups = [{**g.hyperparameters, "params": [params[n] for n in g.names]} for g in self.groups]
        bound = _shallow(self.optimizer, groups)
        for name, entry in state.items():
            bound.state[params[name]] = {k: _as_torch_keeps(k, v) for k, v in entry.items()}
        return bound

    def read(self, bound: Optimizer, params: Tensors) -> State:
        """Return the state of a bound optimizer, by parameter name."""
        return {n: dict(bound.state[params[n]]) for n in self.names if params[n] in bound.state}

    def write_back(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Put a trained state into the user's own optimizer."""
        for name, param in self._params.items():
            if name in state:
                self.optimizer.state[param] = {k: _as_torch_keeps(k, v) for k, v in state[name].items()}
            elif name in self.names:
                self.optimizer.state.pop(param, None)


class Schedule:
    """A learning-rate schedule as a function of the step: any `torch.optim.lr_scheduler` without a metric.

    Args:
        factory: optimizer → scheduler, for example `functools.partial(StepLR, step_size=10)`.
        optimizer: the user's optimizer, whose groups at this moment are the schedule's start.
    """

    def __init__(self, factory: Callable[[Optimizer], Any], optimizer: Optimizer) -> None:
        groups = [{**group, "params": [torch.zeros(1)]} for group in copy.copy(optimizer.param_groups)]
        self._shadow = _shallow(optimizer, groups)
        self._scheduler = factory(self._shadow)
        if isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError(
                "schedule: ReduceLROnPlateau needs a metric; use a schedule that depends on the step only"
            )
        self._values = [self._read()]

    def _read(self) -> dict[str, list[Any]]:
        groups = self._shadow.param_groups
        keys = [k for k in ("lr", "momentum", "betas") if k in groups[0]]
        return {key: [group[key] for group in groups] for key in keys}

    def at(self, step: int) -> dict[str, list[Any]]:
        """Return the hyperparameters of the given step as overrides, one value per group."""
        while len(self._values) <= step:
            self._shadow.step()  # torch warns when a schedule moves before its optimizer
            self._scheduler.step()
            self._values.append(self._read())
        return self._values[step]


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


def _buckets(names: Sequence[str], params: Tensors, state: State) -> Iterator[list[str]]:
    """Group parameters that one step on their concatenation treats alike: dtype, device, state keys, step count."""
    found: dict[Any, list[str]] = defaultdict(list)
    for name in names:
        entry = state.get(name, {})
        shared = tuple((k, None if per_element(k, v) or v is None else float(v)) for k, v in entry.items())
        found[params[name].dtype, params[name].device, shared].append(name)
    yield from found.values()


def per_element(key: str, value: Any) -> bool:
    """Whether a piece of optimizer state has the shape of its parameter, and so carries a cotangent."""
    return isinstance(value, Tensor) and key not in COUNTERS


def _private(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _stepped_on(key: str, value: Any) -> Any:
    """A copy that the step may change in place; counters in float64 (`.double()` of a float64 would alias)."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if per_element(key, value) else value.clone().to(torch.float64)


def _as_torch_keeps(key: str, value: Any) -> Any:
    """A detached copy; counters in the dtype in which torch itself keeps them, the default one."""
    if not isinstance(value, Tensor):
        return value
    copied = value.detach().clone()
    return copied if per_element(key, value) else copied.to(torch.get_default_dtype())


def _shallow(optimizer: Optimizer, groups: list[dict[str, Any]], differentiable: bool = False) -> Optimizer:
    """An optimizer of the same class over other groups, without running its constructor."""
    other = copy.copy(optimizer)
    other.state = defaultdict(dict)
    other.param_groups = groups
    other.defaults = {**optimizer.defaults, "differentiable": differentiable}
    return other


def _with_overrides(groups: list[Group], overrides: Overrides | None) -> list[Group]:
    out = []
    for i, group in enumerate(groups):
        values = {k: v[i] if isinstance(v, list) else v for k, v in (overrides or {}).items()}
        out.append(Group({**group.hyperparameters, **values}, group.names))
    return out


def _learned_rate(rate: Any) -> tuple[Any, Tensor | None]:
    """Return the rate that torch steps with, and the learned rate that scales that step, if there is one."""
    if not isinstance(rate, Tensor):
        return rate, None
    return (1.0, rate) if rate.requires_grad else (rate.item(), None)


def _refuse_unsupported(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"the optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer over the stage's model, or "
            "a callable that makes one from parameters: functools.partial(torch.optim.Adam, lr=1e-3)"
        )
    if type(optimizer) not in SUPPORTED:
        names = ", ".join(cls.__name__ for cls in SUPPORTED)
        raise ConfigError(
            f"{type(optimizer).__name__} is not among the inner optimizers whose hypergradient is proven ({names}); "
            "use one of these, for example functools.partial(torch.optim.AdamW, lr=1e-3)"
        )
    hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    if hooks:
        raise StageError(
            f"{type(optimizer).__name__} has {hooks} step hook(s), which the differentiable step would not run; remove "
            "them, and give what changes gradients as Stage(..., transform=...)"
        )
