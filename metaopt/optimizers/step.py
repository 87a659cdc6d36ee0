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
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from metaopt.base.errors import StageError
from metaopt.optimizers.kinds import StepFunction


class TrackedFloat(float):
    """A number that remembers the 0-dim tensor it comes from: how a learned hyperparameter enters an optimizer.

    Torch's `alpha=` and `value=` take no tensor that requires grad, and its steps branch on tensors. A float passes,
    its arithmetic is done on the tensor too, and the mode below uses that. In a trace it is NaN: any use would show.
    """

    tensor: Tensor

    def __new__(cls, tensor: Tensor) -> TrackedFloat:
        if isinstance(tensor, TrackedFloat):
            return tensor
        number = super().__new__(cls, "nan" if isinstance(tensor, FakeTensor) else tensor.detach().item())
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
        return not super().__lt__(0) if other == 0 else super().__gt__(other)

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


def number(value: Any, keep_graph: bool = False) -> Any:
    """Return a hyperparameter (a pair of betas too) as plain numbers, or as tracked ones where it is in a graph."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return TrackedFloat(value) if keep_graph and value.requires_grad else value.item()
    return tuple([number(v, keep_graph) for v in value]) if isinstance(value, tuple) else value


class _Root(torch.autograd.Function):
    """√x or 1/√x with finite slopes.

    √x has slope 0 at 0, where Adam's first moment is 0 too: a dead unit must not yield NaN. The slope of 1/√x overflows
    in float32 at x = 1e-30, and 0 · ∞ is NaN: where the cotangent is 0, so is the result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: bool) -> Tensor:
        ctx.set_materialize_grads(False)  # a path that is cut later on must stay None, not become zeros
        root = x.rsqrt() if inverse else x.sqrt()
        ctx.save_for_backward(root)
        ctx.inverse = inverse
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        (root,), (above,) = ctx.saved_tensors, grads
        if above is None:
            return None, None
        if ctx.inverse:
            return torch.where(above == 0, 0.0, -0.5 * above * root * root * root), None
        return torch.where(root == 0, 0.0, above / (2 * root)), None


_FORMULAS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y, alpha=1.0: x + alpha * y,
    "sub": lambda x, y, alpha=1.0: x - alpha * y,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "rsub": lambda x, y, alpha=1.0: y - alpha * x,
    "rdiv": lambda x, y: y / x,
    "rpow": lambda x, y: y**x,
    "neg": operator.neg,
    "lerp": lambda x, end, weight: x + weight * (end - x),
    "addcmul": lambda x, a, b, value=1.0: x + value * a * b,
    "addcdiv": lambda x, a, b, value=1.0: x + value * a / b,
}
# What torch calls an operation → its formula
_IN_PLACE = {f"{name}_": name for name in ("add", "sub", "mul", "div", "pow", "lerp", "addcmul", "addcdiv")}
_IN_PLACE["true_divide_"] = "div"
_SWAPPED = {"__rsub__": "rsub", "__rdiv__": "rdiv", "__rtruediv__": "rdiv", "__rpow__": "rpow"}
_OPERATIONS = {**{name: name for name in _FORMULAS}, **_IN_PLACE, **_SWAPPED, "true_divide": "div"}
_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]


class _StayInGraph(torch.overrides.TorchFunctionMode):
    """Repairs of a torch optimizer's step that are the same for every optimizer.

    `sqrt` has slope 0 at 0, `rsqrt` does not overflow. `detach` (SGD's first momentum buffer) keeps the graph. 0-dim
    state (`step`, NAdam's `mu_product`) is kept in torch's dtype and read in float64, since torch's own
    non-differentiable step computes with `.item()`. A `TrackedFloat` is replaced by its tensor.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        learned = TrackedFloat in map(type, (*args, *kwargs.values()))
        if name in _OPERATIONS:
            if learned:
                return _operate(name, args, kwargs)
            target = args[:1] if name in _IN_PLACE else ()
            return func(*target, *map(_precise, args[len(target) :]), **kwargs)
        if learned:
            raise StageError(
                f"a learned hyperparameter reaches torch.{name}, through which it cannot be differentiated; pass a "
                "float for it"
            )
        if name.removesuffix("_") in ("sqrt", "rsqrt") and args[0].requires_grad:
            in_place, inverse = name.endswith("_"), name.startswith("r")
            root: Any = _Root.apply(args[0].clone() if in_place else args[0], inverse)
            return args[0].copy_(root) if in_place else root
        return args[0].view_as(args[0]) if name == "detach" else func(*args, **kwargs)


class _Forced(_StayInGraph):
    """The same for a step that knows nothing of `differentiable`: its `no_grad`, `.data` and `out=` are overruled."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        if func == _GET_DATA:
            return args[0]
        if func == _SET_DATA:
            return args[0].copy_(args[1])
        if isinstance((kwargs or {}).get("out"), Tensor):
            return kwargs["out"].copy_(func(*args, **{k: v for k, v in kwargs.items() if k != "out"}))
        found = super().__torch_function__(func, types, args, kwargs)
        by_number = any(isinstance(value, (int, float)) for value in args)
        if by_number and getattr(func, "__name__", "") == "mul" and found.dim() == 0 and found.requires_grad:
            return TrackedFloat(found)  # made of a norm, and handed to `alpha=`
        return found


def _operate(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Compute an operation that has a learned number among its arguments, by the formula that torch documents."""
    options = {k: _kept(v) for k, v in kwargs.items()}
    result = _FORMULAS[_OPERATIONS[name]](*map(_kept, args), **options)
    return args[0].copy_(result) if name in _IN_PLACE else result


def _kept(value: Any) -> Any:
    """Return an operand as autograd may keep it: the step goes on to change its own tensors in place."""
    if isinstance(value, TrackedFloat):
        return value.tensor
    return _precise(value).clone() if isinstance(value, Tensor) else value


def _precise(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point() else value


def attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return all that an optimizer keeps on itself; `step` is there if a scheduler has wrapped the user's own."""
    return {k: v for k, v in vars(optimizer).items() if k != "step"}


def with_attributes(cls: type[Optimizer], kept: Mapping[str, Any]) -> Optimizer:
    """Return an optimizer without running its constructor; `copy` would lose all but state, groups and defaults."""
    made = cls.__new__(cls)
    made.__dict__.update(kept)
    return made


def shallow(optimizer: Optimizer, groups: list[dict[str, Any]], differentiable: bool = False) -> Optimizer:
    """Return an optimizer of the same class over other groups, without state."""
    asked = {"differentiable": differentiable} if honours_differentiable(optimizer) else {}
    other = {"state": defaultdict(dict), "param_groups": groups, "defaults": {**optimizer.defaults, **asked}}
    return with_attributes(type(optimizer), {**attributes(optimizer), **other})


def honours_differentiable(optimizer: Optimizer) -> bool:
    """Whether the class has the option `differentiable`, as torch's do; if not, its `no_grad` is overruled."""
    return "differentiable" in optimizer.defaults


# State that all parameters of one age share: 0-dim. Other state has its parameter's shape.
COUNTERS = {"step", "mu_product", "eta", "mu"}


def per_element(key: str, value: Any) -> bool:
    """Whether a piece of optimizer state has the shape of its parameter."""
    return isinstance(value, Tensor) and not (key in COUNTERS and value.dim() == 0)


def carries_gradient(key: str, value: Any) -> bool:
    """Whether a piece of optimizer state depends on what went in: all floating tensors but the count of steps."""
    return isinstance(value, Tensor) and value.is_floating_point() and (key != "step" or value.dim() > 0)


GROUP = "group."  # state of this prefix is what a step has written into its group
_PERFORMANCE = {"differentiable": True, "foreach": False, "fused": None, "capturable": False}


class TorchStep:
    """`(param, gradient, state, hyperparameters) → (param, state)`: the optimizer's own `step()` of one tensor.

    The result is in the graph of all that goes in, and nothing of that is changed; nothing is kept of a step.

    Args:
        optimizer: whose class steps, with the attributes that it has now.
        function: steps instead of the class, if given.
    """

    def __init__(self, optimizer: Optimizer, function: StepFunction | None = None) -> None:
        step: Any = type(optimizer).step
        self._step = step.__wrapped__ if getattr(step, "hooked", False) else step  # without torch's profiling around it
        self._template, self._function = shallow(optimizer, [], differentiable=True), function
        self._honours = honours_differentiable(optimizer)
        self._mode = _StayInGraph() if self._honours or function is not None else _Forced()

    def __call__(
        self, param: Tensor, gradient: Tensor, state: Mapping[str, Any], hyperparameters: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the tensor and its state after the step; learned hyperparameters come as `TrackedFloat`."""
        if self._function is not None:
            with self._mode:
                return self._function(param, gradient, state, hyperparameters)
        param = param.clone()
        param.grad = gradient if self._honours else gradient.clone()
        group = {k: _PERFORMANCE.get(k, v) for k, v in hyperparameters.items()}
        copies = {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}
        for key in state:
            if key.startswith(GROUP):
                group[key.removeprefix(GROUP)] = copies.pop(key)
        group["params"] = [param]
        stepper = with_attributes(type(self._template), {**vars(self._template), "param_groups": [group]})
        stepper.state = defaultdict(dict, {param: copies} if copies else {})
        # what autograd has saved may be changed in place too
        saving = nullcontext() if self._honours else saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x)
        with self._mode, saving:
            self._step(stepper)
        param.grad = None  # which the graph would keep alive with the weights
        after = {GROUP + k: v for k, v in group.items() if k != "params"}
        written = {k: v for k, v in after.items() if k in state or k.removeprefix(GROUP) not in hyperparameters}
        return param, {**stepper.state[param], **written}
