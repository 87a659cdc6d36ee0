"""Random state: seeds of positions, and a seeded block that leaves no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from metaopt.base.streams import derived_seed, draw_seed, seeded


def drawn() -> tuple[float, float, float]:
    """One number from each global generator."""
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_a_seeded_block_repeats_and_leaves_every_global_generator_as_it_was():
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    with seeded(7):
        first = drawn()
        with seeded(8):
            other = drawn()
        rest = drawn()
    with seeded(7):
        assert drawn() == first
        assert drawn() == rest
    assert len({*first, *other, *rest}) == 9
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_an_exception_leaves_no_trace_either():
    def fail() -> None:
        raise KeyError(f"inside {drawn()}")

    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    with pytest.raises(KeyError, match="inside"), seeded(7):
        fail()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_derived_seeds_are_fixed_and_all_different():
    """Fixed: a saved run would not resume otherwise."""
    positions = [(seed, *rest) for seed in (0, 1, 2**61) for rest in ((0,), (1,), (2,), (1, 1), (0, 2), (5, 2), (2, 5))]
    seeds = [derived_seed(*position) for position in positions]
    assert len(set(seeds)) == len(positions)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1, 2, 3) == 6498626229777268288


def test_torchs_generator_decides_a_drawn_seed():
    torch.manual_seed(4)
    first, second = draw_seed(), draw_seed()
    torch.manual_seed(4)
    assert draw_seed() == first != second
    assert 0 <= first < 2**62
