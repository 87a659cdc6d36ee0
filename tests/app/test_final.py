"""What a run says against itself, and its pictures."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from trainers import trainer

import metaopt
from metaopt.app import report
from metaopt.app.final import doubts, num_classes

GUESS = math.log(4)
FALLING = [2.0 - 0.1 * step for step in range(10)]


def told(losses: list[float], metrics: dict[str, float] | None = None, **options: Any) -> list[str]:
    """The doubts of a run among four classes, tested on 400 examples."""
    data: Any = SimpleNamespace(facts={"num_labels": 4}, sizes={"test": 400})
    return doubts(trainer(**options), [{"meta_loss": loss} for loss in losses], data, metrics or {})


@pytest.mark.parametrize(
    ("losses", "metrics", "expected"),
    [
        (FALLING, {"accuracy": 0.3}, []),
        (FALLING[:5], {}, ["ends at 1.600, no better than chance: guessing among 4 classes gives 1.386"]),
        ([2.0, 0.995 * GUESS], {}, ["no better than chance"]),
        ([2.0, 0.98 * GUESS], {}, []),
        (FALLING[::-1], {}, ["no better than chance", "has not fallen: 1.1 at the start, 2 at the end"]),
        ([1.0, 0.5] + 8 * [1.0], {}, ["has not fallen"]),
        ([1.0] * 9, {}, []),
        (FALLING, {"accuracy": 0.29}, ["The accuracy on test, 0.290, is no better than chance (0.25)"]),
        (FALLING, {"exact_match": 0.0, "token_accuracy": 0.5}, ["The exact match on test, 0.000"]),
        ([], {}, []),
    ],
)
def test_a_run_that_is_no_better_than_chance_says_so(losses, metrics, expected):
    found = told(losses, metrics)
    assert len(found) == len(expected)
    assert all(part in doubt for part, doubt in zip(expected, found, strict=True))


def test_of_an_objective_that_is_no_mean_loss_only_the_trend_is_told():
    assert told([9.0, 8.0], objective=lambda trained, batch, meta_params: None) == []
    assert told([1.0] * 10, meta_params=metaopt.Uniform(), meta_optimizer=None) == []


def test_the_number_of_classes_is_that_of_the_data_or_of_the_output_layer():
    run: Any = SimpleNamespace(chain=SimpleNamespace(stages={"a": SimpleNamespace(model=None)}), objective=None)
    for facts, classes in (({"num_labels": 2, "vocab_size": 9}, 2), ({"vocab_size": 9}, 9), ({}, None)):
        assert num_classes(run, SimpleNamespace(facts=facts)) == classes  # type: ignore[arg-type]
    run.chain.stages["a"].model = SimpleNamespace(get_output_embeddings=lambda: torch.nn.Linear(3, 7))
    assert num_classes(run, SimpleNamespace(facts={})) == 7  # type: ignore[arg-type]


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    return figures


@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-4, 0.2])
def test_the_weights_are_seen_however_close_they_are(spread, monkeypatch, tmp_path):
    weights = 0.5 + spread * torch.linspace(-1, 1, 100)
    figures = drawn(monkeypatch)
    data: Any = SimpleNamespace(is_clean=torch.arange(100) % 2 == 0, picture=None)
    report.plot_weights("index", weights, data, tmp_path)
    (axes,) = figures[0].axes
    bars = [bar for bar in axes.patches if bar.get_height()]
    assert sum(bar.get_height() for bar in bars) == 100
    assert min(bar.get_width() for bar in bars) > 0.01 * np.diff(axes.get_xlim())[0]


def test_the_best_look_and_the_comparison_are_drawn(monkeypatch, tmp_path):
    figures = drawn(monkeypatch)
    records = [{"meta_step": step, "meta_loss": 1 / step} for step in (1, 2, 4)]
    report.plot_meta_loss(records, tmp_path / "loss.png", best_step=2)
    (axes,) = figures[0].axes
    best = next(line for line in axes.lines if "best look" in line.get_label())
    assert ([float(x) for x in best.get_xdata()], [float(y) for y in best.get_ydata()]) == ([2.0], [0.5])
    report.plot_scores({"learned": {"a": 0.9, "b": 0.0}, "uniform": {"a": 0.4, "b": 0.0}}, tmp_path / "c.png")
    bars = [[bar.get_width() for bar in axes.patches] for axes in figures[1].axes]
    assert bars == [[0.9, 0.4], [0.0, 0.0]]
