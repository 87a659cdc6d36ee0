"""Casts to a lower precision: found with their place, and left out. In-place updates: found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metaopt.diagnostics.precision import AllInFloat64, Watch

X = torch.linspace(-1, 1, 5, dtype=torch.float64)
SINGLE = torch.zeros(1)

CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "to a dtype": lambda x: x.to(torch.float32),
    "to a dtype by name": lambda x: x.to(dtype=torch.bfloat16),
    "to another's dtype": lambda x: x.to(SINGLE),
    "type_as": lambda x: x.type_as(SINGLE),
    "type": lambda x: x.type(torch.float32),
    "half": lambda x: x.half(),
    "softmax": lambda x: x.softmax(-1, dtype=torch.float32),
    "nn.functional.softmax": lambda x: torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32),
    "sum": lambda x: x.sum(dtype=torch.float32),
}


@pytest.mark.parametrize("case", CASTS)
def test_casts_are_found_and_left_out(case: str) -> None:
    x = X.clone().requires_grad_()
    with Watch() as watch:
        assert CASTS[case](x).dtype != torch.float64
    assert len(watch.casts) == 1
    assert "test_precision.py, line" in watch.casts[0]
    with AllInFloat64(), Watch() as watch:
        assert CASTS[case](x).dtype == torch.float64
    assert watch.casts == ()


def test_what_is_no_cast_of_the_graph_is_left_alone() -> None:
    with Watch() as watch:
        X.float()  # nothing to learn in it
        torch.arange(3).float()
        (X.clone().requires_grad_() * SINGLE).sum()
    assert watch.casts == ()
    with AllInFloat64():
        assert torch.arange(3).float().dtype == torch.float32
        assert SINGLE.to(torch.bfloat16).dtype == torch.bfloat16
        assert X.to(torch.int64).dtype == torch.int64


def test_a_place_names_module_file_and_line_once() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float().double()

    with Watch() as watch:
        for _ in range(2):
            Norm()(X.clone().requires_grad_())
    (place,) = watch.casts
    assert place.startswith("Norm.forward (test_precision.py, line ")


UPDATES: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda x: x.mul_(2),
    "operator": lambda x: x.__iadd__(1),
    "setitem": lambda x: x.__setitem__(0, 1.0),
    "copy_": lambda x: x.copy_(X),
}


@pytest.mark.parametrize("case", UPDATES)
def test_updates_behind_the_graph_s_back_are_found(case: str) -> None:
    with Watch() as watch, torch.no_grad():
        UPDATES[case](X.clone().requires_grad_())
    assert len(watch.in_place) == 1
    assert "test_precision.py, line" in watch.in_place[0]


def test_updates_that_the_graph_sees_and_torch_s_own_are_not() -> None:
    weight = X.clone().requires_grad_()
    with Watch() as watch:
        (weight * 2).mul_(3)
        with torch.no_grad():
            X.clone().mul_(2)
            weight.requires_grad_()
            assert weight * 2 is not None
    assert watch.in_place == ()
