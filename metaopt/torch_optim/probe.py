"""Two steps of a registered optimizer in float64, against its own `step()` and central differences of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metaopt.errors import ConfigError, MetaoptError
from metaopt.torch_optim.kinds import Kind, per_element
from metaopt.torch_optim.step import plain, shallow, torch_step, tracked

_STEP, _SAME, _CLOSE = 1e-6, 1e-9, 1e-5


def probe(optimizer: Optimizer, kind: Kind) -> None:
    """Raise unless the differentiable step of a registered optimizer is that of its class, and is differentiated.

    Args:
        optimizer: the user's, with its hyperparameters and state.
        kind: as it was registered.

    Raises:
        ConfigError: says which of its values or derivatives is off, and by how much.
    """
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        trained = [p for p in group["params"] if p.requires_grad]
        if trained:
            param = min(trained, key=lambda p: (p.numel() < 2, p.numel()))
            _Probe(name, optimizer, kind, group, param).run()


class _Probe:
    """The steps of one parameter of one group; its inputs are weights, two gradients and learnable hyperparameters."""

    def __init__(self, name: str, optimizer: Optimizer, kind: Kind, group: Mapping[str, Any], param: Tensor) -> None:
        self._name, self._optimizer, self._kind = name, optimizer, kind
        self._group = {k: plain(v) for k, v in group.items() if k != "params"}
        self._state = {k: _double(k, v) for k, v in optimizer.state.get(param, {}).items()}
        draw = torch.Generator().manual_seed(0)
        shape = param.shape
        tensors = [param.detach().double().cpu(), *(_drawn(shape, draw) for _ in range(2))]
        numbers = [torch.tensor(value).double() for value in self._learnable().values()]
        self._inputs = [*tensors, *numbers]
        self._direction = [_drawn(t.shape, draw) for t in self._inputs]
        self._weights = _drawn(shape, draw)

    def _learnable(self) -> dict[str, float]:
        found = {}
        for key in self._kind.learnable:
            if not isinstance(self._group.get(key), float):
                raise ConfigError(
                    f"{self._name} was registered with learnable={key!r}, which is no float of its parameter groups"
                )
            found[key] = self._group[key]
        return found

    def run(self) -> None:
        """Compare values, then the derivative along one direction."""
        inputs = [t.clone().requires_grad_() for t in self._inputs]
        try:
            after = self._differentiable(inputs)
        except MetaoptError:
            raise
        except Exception as error:
            raise ConfigError(self._told(f"its differentiable step raises {type(error).__name__}: {error}")) from error
        expected = self._plain(self._inputs)
        size = float(expected.abs().max()) + 1e-30
        off = float((after.detach() - expected).abs().max()) / size
        if not off < _SAME:
            raise ConfigError(self._told(f"its differentiable step is {off:.1e} away from its own step()"))
        found = self._slope(after, inputs)
        ahead, behind = (
            self._plain([t + sign * _STEP * d for t, d in zip(self._inputs, self._direction, strict=True)])
            for sign in (1, -1)
        )
        slope = float(((ahead - behind) * self._weights).sum()) / (2 * _STEP)
        off = abs(found - slope) / (abs(slope) + 1e-12)
        if not off < _CLOSE and abs(found - slope) > 1e-8:
            raise ConfigError(
                self._told(f"the derivative of its step is {found:.6g}, and a central difference of it {slope:.6g}")
            )

    def _slope(self, after: Tensor, inputs: Sequence[Tensor]) -> float:
        if not after.requires_grad:
            return 0.0
        found = torch.autograd.grad((after * self._weights).sum(), inputs, allow_unused=True)
        return sum(float((g.detach() * d).sum()) for g, d in zip(found, self._direction, strict=True) if g is not None)

    def _told(self, problem: str) -> str:
        return (
            f"{self._name} was registered, but {problem}. Let its step() run under "
            'torch.set_grad_enabled(self.defaults["differentiable"]), without no_grad, .data or .item(); or '
            f"give its update as a function: metaopt.register_optimizer({self._name}, step=...)"
        )

    def _with(self, numbers: Sequence[Any]) -> dict[str, Any]:
        return {**self._group, **dict(zip(self._kind.learnable, numbers, strict=True))}

    def _differentiable(self, inputs: Sequence[Tensor]) -> Tensor:
        param, state = inputs[0], dict(self._state)
        group = self._with([tracked(number) for number in inputs[3:]])
        shape = param.shape
        if self._kind.elementwise:  # as the stage will step it: flat, with other parameters
            param = param.reshape(-1)
            state = {k: v.reshape(-1) if per_element(k, v) else v for k, v in state.items()}
        for gradient in inputs[1:3]:
            gradient = gradient.reshape(param.shape)
            param, state = torch_step(self._optimizer, self._kind.step, group, param, gradient, state)
            self._check_state(state, param)
        return param.reshape(shape)

    def _check_state(self, state: Mapping[str, Any], param: Tensor) -> None:
        for key, value in state.items():
            if (
                isinstance(value, Tensor)
                and self._kind.elementwise
                and per_element(key, value)
                and value.shape != param.shape
            ):
                raise ConfigError(
                    f"{self._name} keeps state {key!r} of shape {list(value.shape)} for a parameter of shape "
                    f"{list(param.shape)}; register it with counters=({key!r}, ...) if it is one number that all "
                    "parameters share, or with elementwise=False"
                )

    def _plain(self, inputs: Sequence[Tensor]) -> Tensor:
        param = inputs[0].detach().clone().requires_grad_()
        group = self._with([number.item() for number in inputs[3:]])
        stepper = shallow(self._optimizer, [{**group, "params": [param]}])
        if self._state:
            stepper.state[param] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self._state.items()}
        for gradient in inputs[1:3]:
            param.grad = gradient.clone()
            stepper.step()
        return param.detach()


def _drawn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _double(key: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone().cpu()
    return value.double() if per_element(key, value) else value
