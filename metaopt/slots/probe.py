"""Eight steps of a registered optimizer in float64, against its own `step()` and central differences of it."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metaopt.base.errors import ConfigError, MetaoptError
from metaopt.optimizers.kinds import Kind, per_element
from metaopt.optimizers.step import plain, shallow

_STEPS, _STEP, _SAME, _CLOSE = 8, 1e-6, 1e-9, 1e-5
_MOST = 4096  # elements of a parameter whose own shape is tried
_BOOKKEEPING = ("state", "param_groups", "defaults", "_opt_called", "_step_count")
Tensors = dict[str, Tensor]


def probe(optimizer: Optimizer, kind: Kind, rule: Callable[[Optimizer, dict[str, nn.Parameter]], Any]) -> tuple:
    """Raise unless the differentiable step of a registered optimizer is that of its class, and is differentiated.

    Args:
        optimizer: the user's, with its hyperparameters and state.
        kind: as it was registered.
        rule: makes the `UpdateRule` that is tried.

    Returns:
        What its step writes into its parameter groups.

    Raises:
        ConfigError: says which of its values or derivatives is off, and by how much, or what cannot be repeated.
    """
    return _Probe(optimizer, kind, rule).run()


class _Probe:
    """Steps of parameters of unlike shapes; inputs are the weights, every step's gradients and learnable numbers."""

    def __init__(self, optimizer: Optimizer, kind: Kind, rule: Callable[..., Any]) -> None:
        self._optimizer, self._kind, self._rule = optimizer, kind, rule
        self._name = type(optimizer).__name__
        self._refuse_references()
        self._draw = torch.Generator().manual_seed(0)
        self._groups: list[dict[str, Any]] = []
        self._params: Tensors = {}
        self._state: dict[str, dict[str, Any]] = {}
        for number, group in enumerate(optimizer.param_groups):
            options = {k: plain(v) for k, v in group.items() if k != "params"}
            if options.get("lr") == 0:  # before a warm-up
                options["lr"] = 1e-3
            names = [self._take(f"{number}.{i}", param) for i, param in enumerate(_unlike(group["params"]))]
            self._groups.append({**options, "params": names})
        learnable = [self._learnable(group) for group in self._groups]
        self._inputs = [*self._params.values(), *(self._drawn(p) for p in self._params.values() for _ in range(_STEPS))]
        self._inputs += [torch.tensor(value, dtype=torch.float64) for values in learnable for value in values]
        self._direction = [self._drawn(t) for t in self._inputs]
        self._weights = [self._drawn(p) for p in self._params.values()]

    def _take(self, name: str, param: Tensor) -> str:
        """Take a parameter with its state, or one of as many dimensions if it is large."""
        if param.numel() > _MOST:
            self._params[name] = self._drawn(torch.empty([min(size, 3 + i) for i, size in enumerate(param.shape)]))
        else:
            self._params[name] = param.detach().double().cpu()
            self._state[name] = {k: _double(k, v) for k, v in self._optimizer.state.get(param, {}).items()}
        return name

    def _drawn(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._draw, dtype=torch.float64)

    def _learnable(self, group: Mapping[str, Any]) -> list[float]:
        for key in self._kind.learnable:
            if not isinstance(group.get(key), float):
                raise ConfigError(
                    f"{self._name} was registered with learnable={key!r}, which is no float of its parameter groups"
                )
        return [group[key] for key in self._kind.learnable]

    def _refuse_references(self) -> None:
        own = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for key, value in vars(self._optimizer).items():
            if key not in _BOOKKEEPING and any(isinstance(x, Optimizer) or id(x) in own for x in _within(value)):
                raise ConfigError(
                    f"{self._name} cannot train a stage: its attribute {key!r} holds parameters or an optimizer of its "
                    "own, which would be stepped instead of the stage's copies; use an optimizer that reads its "
                    "param_groups only"
                )

    # --- the two runs

    def run(self) -> tuple[str, ...]:
        """Compare values after each step, then the derivative along one direction."""
        before = _attributes(self._optimizer)
        try:
            expected, stepper = self._plain(self._inputs)
        except Exception as error:
            message = f"{self._name} cannot train a stage: its own step() raises {type(error).__name__}: {error}"
            raise ConfigError(message) from error
        changed = [key for key, value in _attributes(stepper).items() if value != before.get(key)]
        if changed:
            raise ConfigError(
                f"{self._name} cannot train a stage: its step changes {changed[0]}, which is no state of a parameter "
                "and would not be the same when a step is repeated; keep it in self.state[param]"
            )
        moved = (_moved(old, new) for old, new in zip(self._groups, stepper.param_groups, strict=True))
        written = tuple(dict.fromkeys(itertools.chain.from_iterable(moved)))
        inputs = [t.clone().requires_grad_() for t in self._inputs]
        try:
            found = self._differentiable(inputs, written)
            slope = self._slope(found[-1], inputs)
        except MetaoptError:
            raise
        except Exception as error:
            raise ConfigError(self._told(f"its differentiable step raises {type(error).__name__}: {error}")) from error
        for t, (after, wanted) in enumerate(zip(found, expected, strict=True)):
            off = _distance(after, wanted)
            if not off < _SAME:
                raise ConfigError(self._why_off(off, t, expected))
        self._check_slope(slope)
        return written

    def _check_slope(self, found: tuple[float, bool]) -> None:
        slope, moves = found
        ahead, behind = (
            self._plain([t + sign * _STEP * d for t, d in zip(self._inputs, self._direction, strict=True)])[0][-1]
            for sign in (1, -1)
        )
        ends = zip(ahead, behind, self._weights, strict=True)
        difference = sum(float(((a - b) * w).sum()) for a, b, w in ends) / (2 * _STEP)
        off = abs(slope - difference) / (abs(difference) + 1e-12)
        if not off < _CLOSE and not abs(slope - difference) < 1e-8:
            raise ConfigError(
                self._told(
                    f"the derivative of its step is {slope:.6g}, and a central difference of it {difference:.6g}"
                )
            )
        if not moves:
            raise ConfigError(
                f"{self._name} cannot train a stage: the derivative of its step with respect to the gradient is zero "
                "(it follows signs only, or does not step), so every hypergradient through it would be 0; use one that "
                "does not, for example functools.partial(torch.optim.AdamW, lr=1e-3)"
            )

    def _slope(self, after: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[float, bool]:
        """Return the derivative along the direction, and whether anything but the weights moves the result."""
        total = sum((a * w).sum() for a, w in zip(after, self._weights, strict=True))
        if not isinstance(total, Tensor) or not total.requires_grad:
            return 0.0, False
        found = torch.autograd.grad(total, inputs, allow_unused=True)
        moves = any(g is not None and bool((g != 0).any()) for g in found[len(self._params) :])
        pairs = zip(found, self._direction, strict=True)
        return sum(float((g * d).sum()) for g, d in pairs if g is not None), moves

    def _split(self, inputs: Sequence[Tensor]) -> tuple[Tensors, list[Tensors], list[dict[str, Tensor]]]:
        """Return parameters, each step's gradients and each group's learnable numbers."""
        names, keys = list(self._params), self._kind.learnable
        count, end = len(names), len(names) * (1 + _STEPS)
        gradients = [dict(zip(names, inputs[count + t : end : _STEPS], strict=True)) for t in range(_STEPS)]
        numbers = inputs[end:]
        parts = [numbers[i * len(keys) : (i + 1) * len(keys)] for i in range(len(self._groups))]
        return dict(zip(names, inputs, strict=False)), gradients, [dict(zip(keys, p, strict=True)) for p in parts]

    def _over(self, params: Mapping[str, Tensor], numbers: Sequence[Mapping[str, Tensor]]) -> Optimizer:
        """Return an optimizer of the class over these parameters, with its state and the groups' learnable numbers."""
        members = [[params[name] for name in group["params"] if name in params] for group in self._groups]
        given = [{k: v.item() for k, v in n.items()} for n in numbers]
        groups = [{**_copied(g), **n, "params": ps} for g, n, ps in zip(self._groups, given, members, strict=True)]
        made = shallow(self._optimizer, groups)
        for name, param in params.items():
            if self._state.get(name):
                made.state[param] = _copied(self._state[name])
        return made

    def _plain(self, inputs: Sequence[Tensor], only: str | None = None) -> tuple[list[list[Tensor]], Optimizer]:
        """Return the parameters after each of the class's own steps, and it; of one parameter only, if named."""
        params, gradients, numbers = self._split(inputs)
        params = {name: p.detach().clone().requires_grad_() for name, p in params.items() if only in (None, name)}
        stepper = self._over(params, numbers)
        after = []
        for of_step in gradients:
            for name, param in params.items():
                param.grad = of_step[name].detach().clone()
            stepper.step()
            after.append([p.detach().clone() for p in params.values()])
        return after, stepper

    def _differentiable(self, inputs: Sequence[Tensor], written: tuple[str, ...]) -> list[list[Tensor]]:
        given, gradients, numbers = self._split(inputs)
        params = {name: nn.Parameter(p.detach().clone()) for name, p in given.items()}
        rule = self._rule(self._over(params, numbers), params)
        rule.written = written
        state, overrides = rule.initial_state(), {k: [n[k] for n in numbers] for k in self._kind.learnable}
        after = []
        for of_step in gradients:
            given, state = rule.step(given, of_step, state, overrides)
            self._check_state(state, given)
            after.append(list(given.values()))
        return after

    def _check_state(self, state: Mapping[str, Mapping[str, Any]], params: Tensors) -> None:
        for name, entry in state.items() if self._kind.elementwise else ():
            for key, value in entry.items():
                if per_element(key, value) and value.shape != params[name].shape:
                    raise ConfigError(
                        f"{self._name} keeps state {key!r} of shape {list(value.shape)} for a parameter of shape "
                        f"{list(params[name].shape)}; register it with counters=({key!r}, ...) if it is one number "
                        "that all parameters share, or with elementwise=False"
                    )

    # --- messages

    def _why_off(self, off: float, t: int, expected: Sequence[Sequence[Tensor]]) -> str:
        for i, name in enumerate(self._params):
            alone = self._plain(self._inputs, only=name)[0]
            if not max(_distance(a, [e[i]]) for a, e in zip(alone, expected, strict=True)) < _SAME:
                return (
                    f"{self._name} cannot train a stage: its step of one parameter depends on the others (a norm "
                    "over a group, a rate made of all), and a stage steps each by itself; clip by "
                    "Stage(..., transform=...)"
                )
        advice = "; its step does not treat every element alike: elementwise=False" if self._kind.elementwise else ""
        return self._told(f"its differentiable step {t} is {off:.1e} away from its own step(){advice}")

    def _told(self, problem: str) -> str:
        return (
            f"{self._name} was registered, but {problem}. What leaves the graph in its step() (.item(), float(), math, "
            "numpy) cannot be followed; give its update as a function: "
            f"metaopt.register_optimizer({self._name}, step=...)"
        )


def _unlike(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the trained parameters to try: of each number of dimensions the two smallest of unlike shapes."""
    shapes: dict[torch.Size, Tensor] = {}
    for param in sorted((p for p in params if p.requires_grad), key=lambda p: (p.numel() < 2, p.numel())):
        shapes.setdefault(param.shape, param)
    by_dim: dict[int, list[Tensor]] = {}
    for param in shapes.values():
        by_dim.setdefault(param.dim(), []).append(param)
    found = [param for same in by_dim.values() for param in same[:2]]
    # one shape only: two of it, so that a norm over the group shows
    return found if len(found) != 1 else [p for p in params if p.requires_grad and p.shape == found[0].shape][:2]


def _within(value: Any) -> Iterator[Any]:
    yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple, set)) else ()
    for part in parts:
        yield from _within(part)


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return what an optimizer and its classes keep beside state and groups, such that a change shows."""
    places = {f"self.{k}": v for k, v in vars(optimizer).items() if k not in _BOOKKEEPING}
    for cls in type(optimizer).__mro__:
        if issubclass(cls, Optimizer) and cls is not Optimizer:
            places |= {f"{cls.__name__}.{k}": v for k, v in vars(cls).items() if not k.startswith("__")}
    return {place: _fingerprint(value) for place, value in places.items()}


def _fingerprint(value: Any) -> Any:
    try:
        return pickle.dumps(value)
    except Exception:  # a local function, a handle
        return id(value)


def _moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = [k for k in new if k != "params"]
    return [k for k in keys if k not in old or _fingerprint(old[k]) != _fingerprint(new[k])]


def _copied(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in entry.items()}


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    size = max(float(e.abs().max()) for e in expected) + 1e-30
    return max(float((f.detach() - e).abs().max()) for f, e in zip(found, expected, strict=True)) / size


def _double(key: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone().cpu()
    return value.double() if per_element(key, value) else value
