"""What is wrong with a batch is said before it is used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from metaopt import ConfigError
from metaopt.data.checks import checked, problem_with

GOOD: dict[str, Any] = {"inputs": torch.zeros(3, 2), "labels": torch.tensor([0, -100, 1]), "text": ["a", "b", "c"]}
SIZES = {"inputs": 2, "labels": 2, "index": 5}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({}, ""),
        ({"inputs": torch.tensor([[0.0, 1.0], [math.nan, 0.0]])}, "'inputs' holds nan, first in row 1"),
        ({"inputs": torch.tensor([[math.inf, 1.0]])}, "'inputs' holds inf, first in row 0"),
        ({"inputs": torch.zeros(3, 4)}, r"'inputs' is \[3, 4\], and the models take 2 features"),
        ({"labels": torch.tensor([0, 2])}, "'labels' runs from 0 to 2, and must lie in 0 to 1"),
        ({"index": torch.tensor([-1, 4])}, "'index' runs from -1 to 4, and must lie in 0 to 4"),
        ({"labels": torch.empty(0, dtype=torch.long)}, "'labels' has no example"),
    ],
)
def test_what_is_wrong_with_a_batch(entries, said) -> None:
    batch = {**GOOD, **entries}
    if not said:
        assert problem_with(batch, SIZES) == ""
        return
    with pytest.raises(ConfigError, match=f"data: test, batch 1: {said}"):
        list(checked("test", [GOOD, batch], SIZES))


def test_a_stream_without_a_batch() -> None:
    with pytest.raises(ConfigError, match="data: test has not a single batch"):
        list(checked("test", []))
