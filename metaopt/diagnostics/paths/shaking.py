"""Does anything come of a value? Give another in its place, and see whether the result is still the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_SAME = 1e-6  # relative distance up to which two runs count as the same


def shaken(value: Any) -> Any:
    """Return another value of the same kind: moved, or in another order where only some values are allowed."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return (value * 1.1 + 0.1) if value.requires_grad else value.detach() * 1.1 + 0.1
        if value.dtype == torch.bool:
            return ~value
        moved = value.flatten().roll(1).reshape(value.shape)
        return torch.where(value > 0, value - 1, value + 1) if torch.equal(moved, value) else moved
    if isinstance(value, np.ndarray):
        return value * 1.1 + 0.1 if value.dtype.kind == "f" else np.roll(value, 1)
    if isinstance(value, list):
        floats = all(isinstance(part, (float, list)) for part in value)
        return [shaken(part) for part in value] if floats else value[-1:] + value[:-1]
    if isinstance(value, float):
        return value * 1.1 + 0.1
    return value - 1 if value > 0 else value + 1


def alike(a: Any, b: Any) -> bool:
    """Return whether two values are the same but for rounding."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a == b)
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    gap, size = (a.detach() - b.detach()).abs(), a.detach().abs()
    return a.numel() == 0 or bool(gap.max() <= _SAME * size.max())
