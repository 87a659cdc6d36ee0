"""Optimizers of a user's own: registered, and tried out when a stage is built."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from metaopt.base.errors import ConfigError
from metaopt.optimizers import kinds
from metaopt.optimizers.kinds import SUPPORTED, Kind, StepFunction
from metaopt.optimizers.rule import UpdateRule, copied
from metaopt.optimizers.step import COUNTERS, number, per_element, shallow

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
    name, trial = type(optimizer).__name__, _Trial(optimizer, kind)
    expected, written = _plain_steps(optimizer, trial)
    alike = "; or it does not treat every element alike: elementwise=False" if kind.elementwise else ""
    try:
        found, (of_weights, of_gradients) = trial.in_graph(written)
    except Exception as error:
        raise ConfigError(
            f"{name} was registered, but its differentiable step raises {type(error).__name__}: {error}; give its "
            f"update as a function: metaopt.register_optimizer({name}, step=...){alike}, or counters=(...)"
        ) from error
    for t, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        off = float((ours.detach() - theirs).abs().max() / (theirs.abs().max() + 1e-30))
        if not off < _SAME:
            raise ConfigError(
                f"{name} was registered, but its differentiable step {t} is {off:.1e} away from its own step(): "
                "its step of one parameter depends on the others (a norm, a rate made of all), and a stage steps each "
                f"by itself (clip by Stage(..., transform=...)); or step=... is not its update{alike}"
            )
    slope, difference = of_weights + of_gradients, trial.central_difference()
    if not abs(slope - difference) < max(1e-8, _CLOSE * abs(difference)):
        raise ConfigError(
            f"{name} was registered, but the derivative of its step is {slope:.6g}, and a central difference of it "
            f"{difference:.6g}. What leaves the graph in its step() (.item(), numpy) cannot be followed; give its "
            f"update as a function: metaopt.register_optimizer({name}, step=...)"
        )
    if of_gradients == 0:
        raise ConfigError(
            f"{name} cannot train a stage: the derivative of its step with respect to the gradient is zero (it follows "
            "signs only, or does not step), and so would every hypergradient be; use torch.optim.AdamW"
        )
    return written


def _plain_steps(optimizer: Optimizer, trial: _Trial) -> tuple[list[Tensor], tuple[str, ...]]:
    """Return the parameters after each of the class's own steps, and what these write into the groups."""
    refused, own = f"{type(optimizer).__name__} cannot train a stage", set(map(id, _params(optimizer)))
    for key, value in _kept(optimizer).items():
        leaves = tree_leaves(list(value) if isinstance(value, set) else value)
        if any(isinstance(leaf, Optimizer) or id(leaf) in own for leaf in leaves):
            raise ConfigError(
                f"{refused}: its attribute {key!r} holds parameters or an optimizer of its own, which would be stepped "
                "instead of the stage's copies; use an optimizer that reads its param_groups only"
            )
    before = _attributes(optimizer)
    try:
        after, stepper = trial.by_class()
    except Exception as error:
        raise ConfigError(f"{refused}: its own step() raises {type(error).__name__}: {error}") from error
    changed = [key for key, value in _attributes(stepper).items() if value != before.get(key)]
    if changed:
        raise ConfigError(
            f"{refused}: its step changes {changed[0]}, which is no state of a parameter and would not be the same "
            "when a step is repeated; keep it in self.state[param]"
        )
    return after, trial.written(stepper)


class _Trial:
    """The steps of parameters of unlike shapes, from inputs that move along one drawn direction.

    Inputs are the weights, and every step's gradients and the learnable hyperparameters; `along` says how far either
    of the two is moved.
    """

    def __init__(self, optimizer: Optimizer, kind: Kind) -> None:
        self._draw, self._learnable = torch.Generator().manual_seed(0), kind.learnable
        self._optimizer = shallow(optimizer, [])
        for group in optimizer.param_groups:
            options = {k: number(v) for k, v in group.items() if k != "params"}
            if options.get("lr") == 0:  # before a warm-up
                options["lr"] = 1e-3
            for key in kind.learnable:
                if not isinstance(options.get(key), float):
                    cls = type(optimizer).__name__
                    raise ConfigError(f"{cls} was registered with learnable={key!r}, which is no float of its groups")
            params = [self._stand_in(param, optimizer) for param in _unlike(group["params"])]
            self._optimizer.param_groups.append({**options, "params": params})
        params = [p.detach() for p in _params(self._optimizer)]
        gradients = [[self._drawn(p) for p in params] for _ in range(_STEPS)]
        groups = self._optimizer.param_groups
        numbers = [{k: torch.tensor(g[k], dtype=torch.float64) for k in kind.learnable} for g in groups]
        self._inputs = [params, [gradients, numbers]]
        self._moves = tree_map(self._drawn, self._inputs)
        self._weights = self._drawn(_joined(params))

    def _drawn(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._draw, dtype=torch.float64)

    def _stand_in(self, param: Tensor, optimizer: Optimizer) -> Tensor:
        """Return a parameter in float64, with its state; of a large one another of as many dimensions, without."""
        if param.numel() > _MOST:
            return nn.Parameter(self._drawn(torch.empty([min(n, 3 + i) for i, n in enumerate(param.shape)])))
        own, state = nn.Parameter(param.detach().double().cpu()), copied(optimizer.state.get(param, {}))
        if state:
            self._optimizer.state[own] = {k: v.double().cpu() if per_element(k, v) else v for k, v in state.items()}
        return own

    def _at(self, along: Tensor) -> tuple[list[Tensor], list[list[Tensor]], list[dict[str, Tensor]], Optimizer]:
        """Return the inputs moved, and a copy of the optimizer that begins there."""
        pairs = zip(along, self._inputs, self._moves, strict=True)
        params, (gradients, numbers) = (tree_map(lambda x, m, a=a: x + a * m, start, move) for a, start, move in pairs)
        groups, state = copy.deepcopy((self._optimizer.param_groups, dict(self._optimizer.state)))
        twin = shallow(self._optimizer, groups)
        twin.state.update(state)
        for group, own in zip(groups, numbers, strict=True):
            group.update({k: v.item() for k, v in own.items()})
        with torch.no_grad():
            for param, value in zip(_params(twin), params, strict=True):
                param.copy_(value)
        return params, gradients, numbers, twin

    def by_class(self, along: float = 0.0) -> tuple[list[Tensor], Optimizer]:
        """Return the joined parameters after each of the class's own steps, and the optimizer that took them."""
        _, gradients, _, stepper = self._at(torch.full((2,), along, dtype=torch.float64))
        after = []
        for of_step in gradients:
            for param, gradient in zip(_params(stepper), of_step, strict=True):
                param.grad = gradient.clone()
            stepper.step()
            after.append(_joined(_params(stepper)).detach())
        return after, stepper

    def written(self, stepper: Optimizer) -> tuple[str, ...]:
        """Return the keys of its groups that an optimizer has changed."""
        groups = zip(self._optimizer.param_groups, stepper.param_groups, strict=True)
        items = [(old, k, v) for old, new in groups for k, v in new.items() if k != "params"]
        return tuple({k: None for old, k, v in items if k not in old or _dumped(old[k]) != _dumped(v)})

    def in_graph(self, written: Sequence[str]) -> tuple[list[Tensor], list[float]]:
        """Return the joined parameters after each differentiable step, and the derivatives of the last along each."""
        along = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        start, gradients, numbers, twin = self._at(along)
        names = [str(i) for i in range(len(start))]
        rule = UpdateRule(twin, dict(zip(names, _params(twin), strict=True)), written)
        overrides = {key: [of_group[key] for of_group in numbers] for key in self._learnable}
        params, state, after = dict(zip(names, start, strict=True)), rule.initial_state(), []
        for of_step in gradients:
            params, state = rule.step(params, dict(zip(names, of_step, strict=True)), state, overrides)
            after.append(_joined(params.values()))
        return after, torch.autograd.grad(after[-1] @ self._weights + 0 * along.sum(), along)[0].tolist()

    def central_difference(self) -> float:
        """Return the derivative of the last of the class's own steps along both."""
        ahead, behind = (self.by_class(sign * _STEP)[0][-1] @ self._weights for sign in (1, -1))
        return float(ahead - behind) / (2 * _STEP)


def _unlike(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the trained parameters to try: of each number of dimensions the two smallest of unlike shapes."""
    trained = sorted((p for p in params if p.requires_grad), key=lambda p: (p.numel() < 2, p.numel()))
    found: dict[torch.Size, Tensor] = {}
    for param in trained:
        if sum(len(shape) == param.dim() for shape in found) < 2:
            found.setdefault(param.shape, param)
    # one shape only: two of it, so that a norm over the group shows
    return list(found.values()) if len(found) != 1 else trained[:2]


def _kept(optimizer: Optimizer) -> dict[str, Any]:
    """Return what an optimizer keeps beside state and groups."""
    return {k: v for k, v in vars(optimizer).items() if k not in _BOOKKEEPING}


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return what an optimizer and its classes keep beside state and groups, such that a change shows."""
    places = {f"self.{k}": v for k, v in _kept(optimizer).items()}
    for cls in type(optimizer).__mro__:
        if issubclass(cls, Optimizer) and cls is not Optimizer:
            places |= {f"{cls.__name__}.{k}": v for k, v in vars(cls).items() if not k.startswith("__")}
    return {place: _dumped(value) for place, value in places.items()}


def _dumped(value: Any) -> Any:
    try:
        return pickle.dumps(value)
    except Exception:  # a local function, a handle
        return id(value)


def _params(optimizer: Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _joined(params: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params])
