"""Random state that can be replayed: every step and every batch draws from a seed of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(seed: int, *position: int) -> int:
    """Return the seed of one position (a step, an epoch) in the random state that starts at `seed`."""
    return int(np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw_seed() -> int:
    """Draw a seed from torch's global generator, so that `torch.manual_seed` decides it."""
    return int(torch.randint(2**62, ()).item())


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of torch (CPU, and the device's), numpy and random; put them back after."""
    on_cuda = device is not None and device.type == "cuda"
    of_random, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(of_random)
            np.random.set_state(of_numpy)
