"""A chain that uses every part of its state."""

from __future__ import annotations

from typing import Any

import torch
from small import ADAM, SIZE, drawing, two_stages
from small_models import FEATURES
from torch.utils.data import DataLoader

import metaopt
from metaopt.estimators import Checkpointed, Unrolled

ESTIMATORS = {"unrolled": Unrolled(), "checkpointed": Checkpointed()}


def shuffled(num_examples: int = 3 * SIZE) -> DataLoader:
    """A loader that shuffles; drops nothing, so that its epochs end within a step count that is no multiple."""
    draw = drawing(0)
    inputs, labels = draw(num_examples, FEATURES), (draw(num_examples) * 100).long() % 3
    examples = [
        {"inputs": x, "labels": y, "index": torch.tensor(i)}
        for i, (x, y) in enumerate(zip(inputs, labels, strict=True))
    ]
    return DataLoader(examples, batch_size=4, shuffle=True)  # type: ignore[arg-type]


def full_chain(optimizer: Any = ADAM, estimator: str = "unrolled", **options: Any) -> metaopt.Chain:
    """Dropout, batch norm and shuffled data: all four states move."""
    return two_stages(optimizer, batches=shuffled(), estimator=ESTIMATORS[estimator], **options)
