"""One step of a torch optimizer that stays in the graph: of weights, gradient, state and learned hyperparameters.

The optimizer's own `step()` runs with `differentiable=True` on copies, under a mode that repairs what would cut the
graph or lose precision. No formula of any optimizer is written down here.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from metaopt.base.errors import StageError


class TrackedFloat(float):
    """A number that remembers the 0-dim tensor it comes from: how a learned hyperparameter enters an optimizer.

    Torch's arguments `alpha=` and `value=` take no tensor that requires grad, and its optimizers branch on tensors. A
    float passes through all of that; its arithmetic is done on the tensor too, and the mode below uses the tensor.
    """

    tensor: Tensor

    def __new__(cls, tensor: Tensor) -> TrackedFloat:
        if isinstance(tensor, TrackedFloat):
            return tensor
        number = super().__new__(cls, tensor.detach().item())
        number.tensor = tensor.reshape(()).double()
        return number

    def __neg__(self) -> TrackedFloat:
        return TrackedFloat(-self.tensor)

    # A term with a factor of 0 has a slope: `if weight_decay != 0` must not skip it.
    def __eq__(self, other: object) -> bool:
        return False if other == 0 else super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __gt__(self, other: Any) -> bool:
        return super().__ge__(0) if other == 0 else super().__gt__(other)

    def __bool__(self) -> bool:
        return True

    __hash__ = float.__hash__


def _arithmetic(function: Callable[[Any, Any], Any], swapped: bool) -> Callable[[TrackedFloat, Any], Any]:
    def method(self: TrackedFloat, other: Any) -> Any:
        if not isinstance(other, (int, float, Tensor)):
            return NotImplemented
        operand = _kept(other)
        found = function(operand, self.tensor) if swapped else function(self.tensor, operand)
        return found if isinstance(other, Tensor) else TrackedFloat(found)

    return method


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(TrackedFloat, f"__{_name}__", _arithmetic(getattr(operator, _name), swapped=False))
    setattr(TrackedFloat, f"__r{_name}__", _arithmetic(getattr(operator, _name), swapped=True))


def tracked(value: Any) -> Any:
    """Return a hyperparameter as numbers; one that is in a graph (alone, or in a pair of betas) stays in it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return TrackedFloat(value) if value.requires_grad else value.item()
    return tuple(map(tracked, value)) if isinstance(value, tuple) else value


def plain(value: Any) -> Any:
    """Return a hyperparameter as plain numbers."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


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


class _Rsqrt(torch.autograd.Function):
    """1/√x whose backward does not overflow: at x = 1e-30 in float32 the slope is infinite, and 0 · ∞ is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        root = x.rsqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        (root,) = ctx.saved_tensors
        return None if grads[0] is None else torch.where(grads[0] == 0, 0.0, -0.5 * grads[0] * root * root * root)


_ROOTS = {"sqrt": _Sqrt, "rsqrt": _Rsqrt}

# What torch calls an operation → which formula; a trailing underscore is in place.
_OPERATIONS = {
    **{name: name.strip("_") for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "pow", "pow_")},
    **{name: name.strip("_") for name in ("lerp", "lerp_", "addcmul", "addcmul_", "addcdiv", "addcdiv_", "neg")},
    "__rsub__": "rsub",
    "rsub": "rsub",
    "__rdiv__": "rdiv",
    "__rtruediv__": "rdiv",
    "__rpow__": "rpow",
    "true_divide": "div",
    "true_divide_": "div",
}
_FORMULAS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y, alpha=1.0: x + alpha * y,
    "sub": lambda x, y, alpha=1.0: x - alpha * y,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "rsub": lambda x, y: y - x,
    "rdiv": lambda x, y: y / x,
    "rpow": lambda x, y: y**x,
    "neg": operator.neg,
    "lerp": lambda x, end, weight: x + weight * (end - x),
    "addcmul": lambda x, a, b, value=1.0: x + value * a * b,
    "addcdiv": lambda x, a, b, value=1.0: x + value * a / b,
}


class _StayInGraph(TorchFunctionMode):
    """Repairs of a torch optimizer's step that are the same for every optimizer.

    `sqrt` has slope 0 at 0, `rsqrt` does not overflow. `detach` (SGD's first momentum buffer) keeps the graph. 0-dim
    state (`step`, NAdam's
    `mu_product`) is kept in torch's dtype and read in float64, since torch's own non-differentiable step computes with
    `.item()`. A `TrackedFloat` is replaced by its tensor.

    Args:
        forced: for a step that knows nothing of `differentiable`: its `no_grad` and `.data` are overruled.
    """

    def __init__(self, forced: bool = False) -> None:
        super().__init__()
        self._forced = forced

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._forced and func is torch._C._set_grad_enabled:
            return None
        if self._forced and func == _GET_DATA:
            return args[0]
        if self._forced and func == _SET_DATA:
            return args[0].copy_(args[1])
        if self._forced and isinstance(kwargs.get("out"), Tensor):
            return kwargs["out"].copy_(func(*args, **{k: v for k, v in kwargs.items() if k != "out"}))
        if name.strip("_") in _ROOTS and args[0].requires_grad:
            root = _ROOTS[name.strip("_")].apply(args[0].clone() if name.endswith("_") else args[0])
            return args[0].copy_(root) if name.endswith("_") else root
        if name == "detach":
            return args[0].view_as(args[0])
        learned = any(isinstance(value, TrackedFloat) for value in (*args, *kwargs.values()))
        if name not in _OPERATIONS:
            if learned:
                raise StageError(
                    f"a learned hyperparameter reaches torch.{name}, through which it cannot be differentiated; pass a "
                    "float for it"
                )
            return func(*args, **kwargs)
        if learned:
            return _operate(name, args, kwargs)
        if name.endswith("_") and not name.endswith("__"):
            return func(args[0], *map(_read, args[1:]), **kwargs)
        found = func(*map(_read, args), **kwargs)
        is_rate = _OPERATIONS[name] == "mul" and any(isinstance(value, (int, float)) for value in args)
        if self._forced and is_rate and found.dim() == 0 and found.requires_grad:
            return TrackedFloat(found)  # made of a norm, and handed to `alpha=`
        return found


_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]


def _operate(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Compute an operation that has a learned number among its arguments, by the formula that torch documents."""
    options = {k: _kept(v) for k, v in kwargs.items()}
    result = _FORMULAS[_OPERATIONS[name]](*map(_kept, args), **options)
    return args[0].copy_(result) if name.endswith("_") and not name.endswith("__") else result


def _read(value: Any) -> Any:
    is_counter = isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()
    return value.double() if is_counter else value


def _kept(value: Any) -> Any:
    """Return an operand as autograd may keep it: the step goes on to change its own tensors in place."""
    if isinstance(value, TrackedFloat):
        return value.tensor
    return _read(value).clone() if isinstance(value, Tensor) else value


def attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return all that an optimizer keeps on itself; `step` is there if a scheduler has wrapped the user's own."""
    return {k: v for k, v in vars(optimizer).items() if k != "step"}


def with_attributes(cls: type[Optimizer], kept: Mapping[str, Any]) -> Optimizer:
    """Return an optimizer without running its constructor; `copy` would lose all but state, groups and defaults."""
    made = cls.__new__(cls)
    made.__dict__.update(kept)
    return made


def shallow(optimizer: Optimizer, groups: list[dict[str, Any]], differentiable: bool = False) -> Optimizer:
    """Return an optimizer of the same class over other groups, without running its constructor."""
    other = with_attributes(type(optimizer), attributes(optimizer))
    other.state = defaultdict(dict)
    other.param_groups = groups
    asked = {"differentiable": differentiable} if honours_differentiable(optimizer) else {}
    other.defaults = {**optimizer.defaults, **asked}
    return other


def honours_differentiable(optimizer: Optimizer) -> bool:
    """Whether the class has the option `differentiable`, as torch's do; if not, its `no_grad` is overruled."""
    return "differentiable" in optimizer.defaults


GROUP = "group."  # state of this prefix is what a step has written into its group
_PERFORMANCE = {"differentiable": True, "foreach": False, "fused": None, "capturable": False}


def torch_step(
    optimizer: Optimizer,
    function: Callable[..., tuple[Tensor, dict[str, Any]]] | None,
    hyperparameters: Mapping[str, Any],
    param: Tensor,
    gradient: Tensor,
    state: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Any]]:
    """Return one tensor and its state after the optimizer's own `step()`, in the graph of all that goes in.

    Args:
        optimizer: whose class steps.
        function: steps instead of the class, if not None.
        hyperparameters: of the group; learned ones as `TrackedFloat`.
        param, gradient, state: of one tensor; not changed.
    """
    if function is not None:
        with _StayInGraph():
            return function(param, gradient, state, hyperparameters)
    honours = honours_differentiable(optimizer)
    param = param.clone()
    param.grad = gradient if honours else gradient.clone()
    group = {k: _PERFORMANCE.get(k, v) for k, v in hyperparameters.items()}
    copies = {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}
    group |= {k.removeprefix(GROUP): copies.pop(k) for k in state if k.startswith(GROUP)}
    stepper = shallow(optimizer, [{**group, "params": [param]}], differentiable=True)
    if copies:  # which the step may change in place
        stepper.state[param] = copies
    # what autograd has saved may be changed in place too
    saving = nullcontext() if honours else saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x)
    with _StayInGraph(forced=not honours), saving:
        stepper.step()
    after = {GROUP + k: v for k, v in stepper.param_groups[0].items() if k != "params"}
    written = {k: v for k, v in after.items() if k in state or k.removeprefix(GROUP) not in group}
    return param, {**stepper.state[param], **written}
