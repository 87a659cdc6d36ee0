"""Strings of the user's made fit to be shown."""

from __future__ import annotations

import re
import warnings
from io import BytesIO

import pytest
from hostile import HOSTILE
from matplotlib.figure import Figure

from metaopt.saving.text import any_font, plot_label, printable

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_that_controls_a_terminal_is_left(text: str) -> None:
    shown = printable(text)
    assert not CONTROL.search(shown)
    shown.encode()
    assert len(printable(text, 50)) <= 50 or CONTROL.search(text)
    assert printable(shown) == shown


def test_what_is_harmless_stays_as_it_is() -> None:
    for text in ("שלום مرحبا", "👩\u200d🚀 漢字 é", "[/INST] $x$ <b>", "a b"):
        assert printable(text) == text
    assert printable("a\nb\x1b[0m", lines=True) == "a\nb\\x1b[0m"


def test_a_plot_s_labels_are_drawn_as_they_are_written() -> None:
    figure = Figure()
    axes = figure.subplots()
    for i, text in enumerate(HOSTILE):
        axes.plot([i], label=plot_label(text))
    axes.set_xlabel(plot_label("$x$ and \\$"))
    legend = axes.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with any_font():
            figure.savefig(BytesIO())
    assert len(axes.get_legend_handles_labels()[1]) == len(HOSTILE)
    texts = [label for label in legend.get_texts() if "$" in label.get_text()]
    assert texts
    for label in texts:
        assert not label._preprocess_math(label.get_text())[1]  # type: ignore[attr-defined]
