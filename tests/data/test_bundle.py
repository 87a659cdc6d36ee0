"""A DataBundle says what does not fit before any training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metaopt import ConfigError, DataBundle

BATCHES = [{"inputs": torch.zeros(2, 3), "labels": torch.zeros(2, dtype=torch.int64)}]


def bundle(**changes: Any) -> DataBundle:
    streams: dict[str, Any] = dict.fromkeys(("train", "validation", "selection", "test"), BATCHES)
    return DataBundle(**streams | changes)


def test_streams_are_found_by_name() -> None:
    data = bundle(unlabelled=[{"inputs": torch.ones(1, 3)}])
    assert data.stream_names == ("train", "unlabelled", "validation", "selection", "test")
    assert data.stream("train") is BATCHES
    assert data.stream("unlabelled") is data.unlabelled


def test_an_unknown_stream_is_named_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"'valdation'.*did you mean 'validation'"):
        bundle().stream("valdation")


def test_a_stream_that_is_not_there_is_told_from_an_unknown_one() -> None:
    data = bundle()
    assert "unlabelled" not in data.stream_names
    with pytest.raises(ConfigError, match=r"no 'unlabelled' stream \(it has: train, validation, selection, test\)"):
        data.stream("unlabelled")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": iter(BATCHES)}, "'train' is a list_iterator"),
        ({"test": None}, "'test' is a NoneType"),
        ({"validation": 3}, "'validation' is a int"),
        ({"sizes": {"trian": 3}}, "'trian'.*did you mean 'train'"),
        ({"sizes": {"train": 0}}, r"sizes\['train'\]=0"),
        ({"is_clean": torch.ones(3)}, "is_clean must be a bool tensor.*float32"),
        ({"is_clean": [True]}, "is_clean must be a bool tensor.*list"),
        ({"is_clean": torch.ones(3, dtype=torch.bool), "sizes": {"train": 4}}, "is_clean has 3 entries for 4"),
        ({"is_clean": torch.ones(3, dtype=torch.bool), "facts": {"num_examples": 2}}, "3 entries for 2"),
        ({"good_sources": torch.ones(2, dtype=torch.bool), "facts": {"num_sources": 8}}, "good_sources has 2"),
        ({"source_names": ("a",), "facts": {"num_sources": 2}}, "source_names has 1 entries for 2"),
        ({"selection_metric": "accuracy"}, "selection_metric='accuracy'.*missing"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bundle(**changes)
