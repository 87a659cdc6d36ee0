"""Plots of the measured numbers: time and memory against T, error against cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from contestants import UNIT, Contestant
from figures import WorkResults
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator


def plot(work: WorkResults, folder: Path) -> list[str]:
    """Write the plots of one workload; return the names of their files."""
    stem = work.title.replace(", ", "-").replace(" ", "-")
    shown = [c for c in work.contestants if c.name != UNIT]

    def lines(measure: Callable[[int, str], float | None], label: str) -> Callable[[Axes], None]:
        return lambda axes: _against_steps(axes, work, shown, measure, label)

    made = {
        "time": lines(work.time, "processor time of a hypergradient over plain training"),
        "memory": lines(
            lambda t, n: None if work.get(t, n, "bytes") is None else work.get(t, n, "bytes") / 1e6,
            "most MB of tensors held at once",
        ),
        "error": lambda axes: _error_and_cost(axes, work, shown),
    }
    written = []
    for name, draw in made.items():
        figure, axes = plt.subplots(figsize=(9.5, 5))
        draw(axes)
        if not axes.lines:  # nothing of it was measured
            plt.close(figure)
            continue
        axes.set_title(work.title, loc="left")
        axes.grid(alpha=0.3)
        _plain_numbers(axes, work if name != "error" else None)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        figure.tight_layout()
        written.append(f"{stem}-{name}.png")
        figure.savefig(folder / written[-1], dpi=110)
        plt.close(figure)
    return written


def _plain_numbers(axes: Axes, work: WorkResults | None) -> None:
    """Write 2, 5, 10 instead of powers; on the axis of T, its values."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if high < 1e4 * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
    if work is not None:
        axes.set_xticks(work.steps, [str(t) for t in work.steps])


def _style(contestant: Contestant, position: int) -> dict[str, object]:
    return {
        "color": plt.get_cmap("tab20")(position % 20),
        "linestyle": "-" if contestant.ours else "--",
        "marker": "o" if contestant.exact else "x",
        "markersize": 4,
        "label": contestant.label.replace("`", "") + ("" if contestant.exact else " (approximate)"),
    }


def _against_steps(
    axes: Axes, work: WorkResults, shown: list[Contestant], measure: Callable[[int, str], float | None], label: str
) -> None:
    for position, contestant in enumerate(shown):
        points = [(t, y) for t in work.steps if (y := measure(t, contestant.name)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **_style(contestant, position))  # pyright: ignore[reportArgumentType]
    axes.set(xscale="log", yscale="log", xlabel="inner steps per stage, T", ylabel=label)


def _error_and_cost(axes: Axes, work: WorkResults, shown: list[Contestant]) -> None:
    t = work.shown
    for position, contestant in enumerate(shown):
        cost, error = work.time(t, contestant.name), work.get(t, contestant.name, work.own, "relative")
        if cost is not None and error is not None:
            style = {**_style(contestant, position), "linestyle": "none", "markersize": 8}
            axes.plot(cost, max(error, 1e-8), **style)  # pyright: ignore[reportArgumentType]
    axes.set(xlabel=f"time of a hypergradient over plain training, T = {t}", ylabel="relative error, float32")
    axes.set(xscale="log", yscale="log")
    low, high = axes.get_ylim()
    if axes.lines and high < 10 * low:  # errors that are alike look alike
        axes.set_ylim(low / 10, high * 10)
