"""Handwritten digits, some of them with a wrong label."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from metaopt.base.errors import ConfigError
from metaopt.base.ranges import check_counts, check_fraction
from metaopt.data.bundle import STREAMS, DataBundle
from metaopt.data.rows import streams
from metaopt.losses.decoding import accuracy_score

NUM_LABELS = 10
SIDE = 8  # pixels


def digits(
    noise: float = 0.4,
    num_train: int = 800,
    num_unlabelled: int = 400,
    num_validation: int = 200,
    num_selection: int = 197,
    num_test: int = 200,
    batch_size: int = 64,
    validation_batch_size: int = 100,
    seed: int = 0,
) -> DataBundle:
    """Return scikit-learn's 1797 real 8×8 images, split at random, a part of the training labels being wrong.

    A wrong label is one of the nine others, all equally likely. Batches carry `inputs` (float32 [B, 64], from 0 to 1),
    `labels` (int64 [B], not in `unlabelled`), and in `train` and `unlabelled` `index` (int64 [B]).

    Args:
        noise: fraction of the training images with a wrong label, from 0 to 1.
        num_train, …, num_test: images of each stream, 1797 at most in all.
        batch_size, validation_batch_size: of what models are trained on, and of what trains the meta-parameters.
        seed: of the split and of the wrong labels.

    Raises:
        ConfigError: an argument is out of range.
    """
    counts = num_train, num_unlabelled, num_validation, num_selection, num_test
    sizes = dict(zip(STREAMS, counts, strict=True))
    check_fraction("digits", noise=noise)
    check_counts("digits", batch_size=batch_size, validation_batch_size=validation_batch_size)
    check_counts("digits", **{f"num_{name}": size for name, size in sizes.items()})
    pixels, targets = load_digits(return_X_y=True)
    total = sum(counts)
    if total > len(targets):
        raise ConfigError(f"digits: the sizes sum to {total}, and there are {len(targets)} images; ask for fewer")
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.as_tensor(pixels, dtype=torch.float32) / 16, torch.as_tensor(targets, dtype=torch.int64)
    parts = torch.randperm(len(targets), generator=generator)[:total].split(counts)
    columns = {name: {"inputs": inputs[i], "labels": labels[i]} for name, i in zip(STREAMS, parts, strict=True)}
    train, is_clean = columns["train"], torch.ones(num_train, dtype=torch.bool)
    wrong = torch.randperm(num_train, generator=generator)[: round(noise * num_train)]
    shift = torch.randint(1, NUM_LABELS, (len(wrong),), generator=generator)
    train["labels"][wrong] = (train["labels"][wrong] + shift) % NUM_LABELS
    is_clean[wrong] = False
    del columns["unlabelled"]["labels"]
    return DataBundle(
        **streams(columns, batch_size, validation_batch_size, max(num_selection, num_test)),
        sizes=sizes,
        facts={"num_features": SIDE * SIDE, "num_labels": NUM_LABELS, "num_examples": num_train},
        is_clean=is_clean,
        score=accuracy_score,
        selection_metric="accuracy",
        picture=functools.partial(_mosaic, train["inputs"], train["labels"], is_clean),
    )


def _mosaic(inputs: Tensor, labels: Tensor, is_clean: Tensor, indices: Sequence[int], path: Path, title: str) -> None:
    """Draw training images with the label that each carries above it, in red where that label is wrong."""
    from matplotlib.figure import Figure

    num_rows = max(1, math.ceil(len(indices) / 10))
    figure = Figure(figsize=(10, 1.35 * num_rows + 0.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(num_rows, 10, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, index in zip(axes, indices, strict=False):
        colour = "black" if is_clean[index] else "firebrick"
        axis.imshow(inputs[index].view(SIDE, SIDE).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(f"“{int(labels[index])}”", color=colour, fontsize=11)
    figure.savefig(path, dpi=120)
