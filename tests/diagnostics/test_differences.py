"""How a sweep of differences is read, on functions of one number whose slope is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from metaopt.diagnostics.differences import Sweep, noise_of, sweep

STEPS = (1e-3, 1e-4, 1e-5, 1e-6)


def swept(f: Callable[[float], float], noise: float = 1e-16) -> Sweep:
    return sweep([f(sign * h) for h in STEPS for sign in (1, -1)], f(0.0), STEPS, noise)


def test_truncation_falls_with_the_square_of_the_step() -> None:
    found = swept(lambda x: math.sin(0.3 + x))
    errors = [abs(slope - math.cos(0.3)) for _, slope in found.sweep]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.01)
    assert found.difference == pytest.approx(math.cos(0.3), abs=max(found.uncertainty, 1e-12))
    assert found.uncertainty < 1e-7
    assert found.jump == 0.0


@pytest.mark.parametrize("curvature", [0.0, 50.0])
def test_a_kink_right_here_is_seen_by_its_two_sides(curvature: float) -> None:
    found = swept(lambda x: 1 + 0.7 * x + abs(x) / 4 + curvature * x * x)
    assert found.difference == pytest.approx(0.7)
    assert found.jump == pytest.approx(0.5)
    assert found.uncertainty < 1e-9


def test_curvature_alone_is_no_kink() -> None:
    for scale in (1.0, 30.0, 300.0):
        assert swept(lambda x, s=scale: math.exp(s * x) + math.sin(s * x)).jump == 0.0


def test_a_kink_within_the_noise_is_not_claimed() -> None:
    assert swept(lambda x: 1 + x + abs(x) * 1e-12, noise=1e-15).jump == 0.0


def test_a_kink_nearby_moves_the_wide_steps_only() -> None:
    found = swept(lambda x: x + max(0.0, x - 5e-5))
    assert found.sweep[0][1] == pytest.approx(1.475)
    assert found.difference == pytest.approx(1.0)
    assert found.jump == 0.0


def test_noise_is_measured_where_there_is_some() -> None:
    smooth = [1e-6 * k + 1 for k in range(9)]
    assert noise_of(smooth) < 2e-15
    rough = [value + 1e-9 * (-1) ** (k * (k + 1) // 2) for k, value in enumerate(smooth)]
    assert 3e-10 < noise_of(rough) < 1e-8
