"""Optimizers of a user's own: registered, and tried out when a stage is built."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from metaopt.base.errors import ConfigError, MetaoptError
from metaopt.optimizers import kinds
from metaopt.optimizers.flattened import Tensors
from metaopt.optimizers.kinds import COUNTERS, SUPPORTED, Kind, StepFunction, per_element
from metaopt.optimizers.rule import UpdateRule, copied
from metaopt.optimizers.step import number, shallow

_STEPS, _STEP, _SAME, _CLOSE = 8, 1e-6, 1e-9, 1e-5
_MOST = 4096  # elements of a parameter whose own shape is tried
_BOOKKEEPING = ("state", "param_groups", "defaults", "_opt_called", "_step_count")


def register_optimizer(
    cls: type[Optimizer],
    step: StepFunction | None = None,
    *,
    learnable: tuple[str, ...] = (),
    elementwise: bool = False,
    counters: tuple[str, ...] = ("step",),
) -> None:
    """Let stages train with an optimizer of your own.

    Without `step`, the class's own `step()` runs on copies in the graph, its `no_grad` and `.data` overruled unless it
    has an option `differentiable`, as torch's have. With `step`, that function is the update: `step(param, gradient,
    state, group) -> (param, state)`, all in the graph, nothing in place. Building a stage takes eight steps in float64
    and compares them with the class's own `step()`, and their derivatives with central differences.

    Args:
        cls: your class.
        step: the update as a function.
        learnable: hyperparameters that may be learned.
        elementwise: the step treats every element alike, so that it may be taken on concatenated parameters: quicker.
        counters: state that is 0-dim and the same for all parameters of one age.

    Raises:
        ConfigError: not a class of optimizers, or one of torch's own.
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ConfigError(f"register_optimizer: {cls!r} is not a subclass of torch.optim.Optimizer")
    if cls in SUPPORTED or getattr(torch.optim, cls.__name__, None) is cls:
        raise ConfigError(f"register_optimizer: {cls.__name__} is torch's or metaopt's own; to change it, subclass it")
    COUNTERS.update(counters)
    kinds.registered[cls] = Kind(
        tuple(learnable), linear_in_rate=False, elementwise=elementwise, step=step, proof=probe
    )


def probe(optimizer: Optimizer, kind: Kind) -> tuple[str, ...]:
    """Return what a registered optimizer's step writes into its parameter groups, if it can be differentiated.

    Raises:
        ConfigError: says which of its values or derivatives is off, and by how much, or what cannot be repeated.
    """
    name, refused = type(optimizer).__name__, f"{type(optimizer).__name__} cannot train a stage"
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key, value in vars(optimizer).items():
        leaves = [] if key in _BOOKKEEPING else tree_leaves(list(value) if isinstance(value, set) else value)
        if any(isinstance(leaf, Optimizer) or id(leaf) in own for leaf in leaves):
            raise ConfigError(
                f"{refused}: its attribute {key!r} holds parameters or an optimizer of its own, which would be stepped "
                "instead of the stage's copies; use an optimizer that reads its param_groups only"
            )
    trial, before = _Trial(optimizer, kind), _attributes(optimizer)
    try:
        expected, stepper = trial.by_class()
    except Exception as error:
        raise ConfigError(f"{refused}: its own step() raises {type(error).__name__}: {error}") from error
    changed = [key for key, value in _attributes(stepper).items() if value != before.get(key)]
    if changed:
        raise ConfigError(
            f"{refused}: its step changes {changed[0]}, which is no state of a parameter and would not be the same "
            "when a step is repeated; keep it in self.state[param]"
        )
    along = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    written, slopes = trial.written(stepper), [0.0, 0.0]
    try:
        found = trial.in_graph(along, written)
        slopes = torch.autograd.grad(found[-1] @ trial.weights + 0 * along.sum(), along)[0].tolist()
        problem = trial.off_by(found, expected) or trial.slope_off_by(sum(slopes))
    except MetaoptError:
        raise
    except Exception as error:
        shapes = " (if by its state's shape: elementwise=False, or counters=(...))" if kind.elementwise else ""
        problem = f"its differentiable step raises {type(error).__name__}: {error}{shapes}"
    if problem:
        raise ConfigError(
            f"{name} was registered, but {problem}. What leaves the graph in its step() (.item(), numpy) cannot be "
            f"followed; give its update as a function: metaopt.register_optimizer({name}, step=...)"
        )
    if slopes[1] == 0:
        raise ConfigError(
            f"{refused}: the derivative of its step with respect to the gradient is zero (it follows signs only, or "
            "does not step), and so would every hypergradient be; use functools.partial(torch.optim.AdamW, lr=1e-3)"
        )
    return written


class _Trial:
    """The steps of parameters of unlike shapes, from inputs that move along one drawn direction.

    Inputs are the weights, and every step's gradients and the learnable hyperparameters; `along` says how far either
    of the two is moved.
    """

    def __init__(self, optimizer: Optimizer, kind: Kind) -> None:
        self._optimizer, self._kind, self._draw = optimizer, kind, torch.Generator().manual_seed(0)
        self._groups: list[dict[str, Any]] = []  # with names for parameters
        self._params: Tensors = {}
        self._state: dict[str, dict[str, Any]] = {}
        for i, group in enumerate(optimizer.param_groups):
            options = {k: number(v) for k, v in group.items() if k != "params"}
            if options.get("lr") == 0:  # before a warm-up
                options["lr"] = 1e-3
            names = [self._take(f"{i}.{j}", param) for j, param in enumerate(_unlike(group["params"]))]
            self._groups.append({**options, "params": names})
        gradients = [tree_map(self._drawn, self._params) for _ in range(_STEPS)]
        self._inputs = [self._params, [gradients, [self._learnable(group) for group in self._groups]]]
        self._moves = tree_map(self._drawn, self._inputs)
        self.weights = self._drawn(_joined(self._params))

    def _take(self, name: str, param: Tensor) -> str:
        """Take a parameter with its state, or one of as many dimensions if it is large."""
        if param.numel() > _MOST:
            self._params[name] = self._drawn(torch.empty([min(size, 3 + i) for i, size in enumerate(param.shape)]))
        else:
            self._params[name] = param.detach().double().cpu()
            state = copied(self._optimizer.state.get(param, {}))
            self._state[name] = {k: v.double().cpu() if per_element(k, v) else v for k, v in state.items()}
        return name

    def _learnable(self, group: Mapping[str, Any]) -> Tensors:
        for key in self._kind.learnable:
            if not isinstance(group.get(key), float):
                cls = type(self._optimizer).__name__
                raise ConfigError(f"{cls} was registered with learnable={key!r}, which is no float of its groups")
        return {key: torch.tensor(group[key], dtype=torch.float64) for key in self._kind.learnable}

    def _drawn(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._draw, dtype=torch.float64)

    def _at(self, along: Tensor) -> tuple[Tensors, list[Tensors], list[Tensors]]:
        pairs = zip(along, self._inputs, self._moves, strict=True)
        params, (gradients, numbers) = (tree_map(lambda x, m, a=a: x + a * m, start, move) for a, start, move in pairs)
        return params, gradients, numbers

    def _over(self, params: Mapping[str, Tensor], numbers: Sequence[Tensors]) -> Optimizer:
        """Return an optimizer of the class over these parameters, with its state and the groups' learnable numbers."""
        groups = []
        for group, own in zip(self._groups, numbers, strict=True):
            members = [params[name] for name in group["params"] if name in params]
            groups.append({**copied(group), **{k: v.item() for k, v in own.items()}, "params": members})
        made = shallow(self._optimizer, groups)
        made.state.update({param: copied(self._state[n]) for n, param in params.items() if self._state.get(n)})
        return made

    def by_class(self, along: float = 0.0, only: str | None = None) -> tuple[list[Tensor], Optimizer]:
        """Return the joined parameters after each of the class's own steps, and it; of one only, if named."""
        start, gradients, numbers = self._at(torch.full((2,), along, dtype=torch.float64))
        params = {n: p.clone().requires_grad_() for n, p in start.items() if only in (None, n)}
        stepper, after = self._over(params, numbers), []
        for of_step in gradients:
            for name, param in params.items():
                param.grad = of_step[name].clone()
            stepper.step()
            after.append(_joined(params).detach())
        return after, stepper

    def in_graph(self, along: Tensor, written: Sequence[str]) -> list[Tensor]:
        """Return the joined parameters after each differentiable step."""
        params, gradients, numbers = self._at(along)
        own = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
        rule = UpdateRule(self._over(own, numbers), own, written)
        overrides = {key: [of_group[key] for of_group in numbers] for key in self._kind.learnable}
        state, after = rule.initial_state(), []
        for of_step in gradients:
            params, state = rule.step(params, of_step, state, overrides)
            after.append(_joined(params))
        return after

    def written(self, stepper: Optimizer) -> tuple[str, ...]:
        """Return the keys of its groups that an optimizer has changed."""
        groups = zip(self._groups, stepper.param_groups, strict=True)
        items = [(old, k, v) for old, new in groups for k, v in new.items() if k != "params"]
        return tuple({k: None for old, k, v in items if k not in old or _dumped(old[k]) != _dumped(v)})

    def off_by(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
        """Say at which step the parameters are not those of the class's own; None if they are."""
        offs = [_distance(*pair) for pair in zip(found, expected, strict=True)]
        t = next((t for t, off in enumerate(offs) if not off < _SAME), None)
        if t is None:
            return None
        sizes = [p.numel() for p in self._params.values()]
        for name, *of_param in zip(self._params, *(e.split(sizes) for e in expected), strict=True):
            if not all(_distance(*pair) < _SAME for pair in zip(self.by_class(only=name)[0], of_param, strict=True)):
                raise ConfigError(
                    f"{type(self._optimizer).__name__} cannot train a stage: its step of one parameter depends on the "
                    "others (a norm over a group, a rate made of all), and a stage steps each by itself; clip by "
                    "Stage(..., transform=...)"
                )
        advice = "; its step does not treat every element alike: elementwise=False" if self._kind.elementwise else ""
        return f"its differentiable step {t} is {offs[t]:.1e} away from its own step(){advice}"

    def slope_off_by(self, slope: float) -> str | None:
        """Say how far a derivative of the last step is off a central difference; None if they agree."""
        ahead, behind = (self.by_class(sign * _STEP)[0][-1] @ self.weights for sign in (1, -1))
        difference = float(ahead - behind) / (2 * _STEP)
        if abs(slope - difference) < max(1e-8, _CLOSE * (abs(difference) + 1e-12)):
            return None
        return f"the derivative of its step is {slope:.6g}, and a central difference of it {difference:.6g}"


def _unlike(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the trained parameters to try: of each number of dimensions the two smallest of unlike shapes."""
    trained = sorted((p for p in params if p.requires_grad), key=lambda p: (p.numel() < 2, p.numel()))
    found: dict[torch.Size, Tensor] = {}
    for param in trained:
        if sum(len(shape) == param.dim() for shape in found) < 2:
            found.setdefault(param.shape, param)
    # one shape only: two of it, so that a norm over the group shows
    return list(found.values()) if len(found) != 1 else trained[:2]


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return what an optimizer and its classes keep beside state and groups, such that a change shows."""
    places = {f"self.{k}": v for k, v in vars(optimizer).items() if k not in _BOOKKEEPING}
    for cls in type(optimizer).__mro__:
        if issubclass(cls, Optimizer) and cls is not Optimizer:
            places |= {f"{cls.__name__}.{k}": v for k, v in vars(cls).items() if not k.startswith("__")}
    return {place: _dumped(value) for place, value in places.items()}


def _dumped(value: Any) -> Any:
    try:
        return pickle.dumps(value)
    except Exception:  # a local function, a handle
        return id(value)


def _joined(params: Tensors) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params.values()])


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected).abs().max() / (expected.abs().max() + 1e-30))
