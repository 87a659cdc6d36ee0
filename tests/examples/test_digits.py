"""The digits task: real images, some training labels wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaopt import ConfigError, DataBundle
from metaopt.examples.digits import digits

STREAMS = ("train", "unlabelled", "validation", "selection", "test")


def rows(data: DataBundle, stream: str) -> dict[str, Tensor]:
    return dict(data.stream(stream).dataset.columns)  # type: ignore[attr-defined]


def test_no_image_is_in_two_streams() -> None:
    data = digits()
    images = [row.tobytes() for name in STREAMS for row in rows(data, name)["inputs"].numpy()]
    assert len(images) == sum(data.sizes.values()) == 1797
    assert len(set(images)) == 1797


def test_streams_carry_what_they_promise() -> None:
    data = digits(batch_size=32)
    expected = {"train": {"inputs", "labels", "index"}, "unlabelled": {"inputs", "index"}}
    for name in STREAMS:
        batch = next(iter(data.stream(name)))
        assert set(batch) == expected.get(name, {"inputs", "labels"})
        assert batch["inputs"].dtype == torch.float32
        assert batch["inputs"].shape[1] == data.facts["num_features"] == 64
        assert float(batch["inputs"].min()) >= 0
        assert float(batch["inputs"].max()) <= 1
    batch, columns = next(iter(data.train)), rows(data, "train")
    assert len(batch["index"]) == 32
    assert torch.equal(columns["labels"][batch["index"]], batch["labels"])


@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0])
def test_the_asked_fraction_of_training_labels_is_wrong_and_nothing_else(noise: float) -> None:
    noisy, clean = digits(noise=noise), digits(noise=0.0)
    assert noisy.is_clean is not None
    for name in STREAMS:
        assert torch.equal(rows(noisy, name)["inputs"], rows(clean, name)["inputs"])
    right = rows(noisy, "train")["labels"] == rows(clean, "train")["labels"]
    assert torch.equal(right, noisy.is_clean)
    assert int((~right).sum()) == round(noise * 800)
    assert torch.equal(rows(noisy, "test")["labels"], rows(clean, "test")["labels"])


def test_wrong_labels_are_any_of_the_nine_others() -> None:
    shift = (rows(digits(noise=1.0), "train")["labels"] - rows(digits(noise=0.0), "train")["labels"]) % 10
    assert sorted(shift.unique().tolist()) == list(range(1, 10))


def test_the_seed_decides_the_split() -> None:
    one, same, other = (rows(digits(seed=seed), "train") for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["inputs"], other["inputs"])


def test_score_is_the_accuracy_and_leaves_the_mode_as_it_was() -> None:
    data = digits()
    test = rows(data, "test")

    class Lookup(nn.Module):
        """Right on all but the first 50 images; useless in train mode."""

        def forward(self, inputs: Tensor) -> Tensor:
            wrong = torch.arange(len(inputs)) < 50
            labels = (test["labels"] + wrong) % 10 if not self.training else torch.zeros(len(inputs)).long()
            return nn.functional.one_hot(labels, 10).float()

    model = Lookup().train()
    assert data.score is not None
    assert data.score(model, data.test) == {"accuracy": pytest.approx(0.75)}
    assert model.training


def test_the_picture_is_drawn_whatever_the_number_of_images(tmp_path: Path) -> None:
    from matplotlib.image import imread

    data = digits(noise=0.5)
    assert data.picture is not None
    heights = []
    for count in (1, 20, 23):
        path = tmp_path / f"{count}.png"
        data.picture(list(range(count)), path, "Lowest learned weights")
        image = imread(path)
        heights.append(image.shape[0])
        assert image.min() < 0.2  # something dark is drawn
    assert heights[0] < heights[1] < heights[2]


def test_the_picture_marks_wrong_labels_in_red(tmp_path: Path) -> None:
    from matplotlib.image import imread

    data = digits(noise=0.5)
    assert data.picture is not None
    assert data.is_clean is not None
    reds = {}
    for clean in (True, False):
        path = tmp_path / f"{clean}.png"
        data.picture((data.is_clean == clean).nonzero().flatten()[:5].tolist(), path, "digits")
        image = imread(path)
        reds[clean] = int((image[..., 0] > image[..., 1] + 0.3).sum())
    assert reds[True] == 0
    assert reds[False] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 1.5}, r"noise=1\.5 must be a fraction between 0 and 1"),
        ({"noise": -0.1}, "noise=-0.1"),
        ({"num_train": 0}, "num_train=0"),
        ({"num_train": 2000}, "sum to 2997, and there are 1797"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        digits(**options)
