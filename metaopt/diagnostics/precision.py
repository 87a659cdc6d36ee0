"""What a check must know of a user's operations: casts to a lower precision, which it can leave out, and updates in
place."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import metaopt
from metaopt.diagnostics.paths.marks import is_in_place

LOWER = (torch.float32, torch.float16, torch.bfloat16)
_TORCH, _METAOPT = (f"{Path(file).parent}{os.sep}" for file in (torch.__file__, metaopt.__file__))


class AllInFloat64(TorchFunctionMode):
    """A context that leaves out the casts of float64 tensors to a lower precision inside models and losses.

    Norms, attention scores and rotary positions of many models are computed in float32 whatever the model's dtype,
    and no difference in float64 could resolve what that rounds away.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
                return args[0]
            if func in (Tensor.to, Tensor.type_as):
                args = tuple(a.double() if isinstance(a, Tensor) and a.dtype in LOWER else a for a in args)
            args = tuple(torch.float64 if _is_lower(a) else a for a in args)
            kwargs = {name: torch.float64 if _is_lower(a) else a for name, a in kwargs.items()}
        return func(*args, **kwargs)


class Watch(TorchFunctionMode):
    """A context that notes places in a user's code which a check must know of, once each, in the order of the run.

    `casts`: where a float64 tensor of the graph is taken to a lower precision; `in_place`: where one is updated behind
    the graph's back. Such as `LlamaRMSNorm.forward (modeling_llama.py, line 63)`.
    """

    casts: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        behind = given and given[0].requires_grad and not torch.is_grad_enabled()
        if behind and is_in_place(getattr(func, "__name__", "")):
            file, place = _place()
            if not file.startswith(_METAOPT):  # torch's optimizers, called from there
                self.in_place = tuple(dict.fromkeys([*self.in_place, place]))
        result = func(*args, **kwargs)
        lower = isinstance(result, Tensor) and result.dtype in LOWER and result.requires_grad
        if lower and any(a.dtype == torch.float64 for a in given):
            self.casts = tuple(dict.fromkeys([*self.casts, _place()[1]]))
        return result


def _is_lower(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in LOWER


def _place() -> tuple[str, str]:
    """Return the file of the innermost call outside torch, and the call in words."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename.startswith(_TORCH) and frame.f_back is not None:
        frame = frame.f_back
    file, name, owner = frame.f_code.co_filename, frame.f_code.co_name, frame.f_locals.get("self")
    function = name if owner is None else f"{type(owner).__name__}.{name}"
    return file, f"{function} ({Path(file).name}, line {frame.f_lineno})"
