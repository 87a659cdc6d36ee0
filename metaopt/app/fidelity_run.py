"""What `metaopt-fidelity` does around the comparison: go to the first point, build the estimators, show, plot, save."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from metaopt.app import build, report
from metaopt.app.inspection import Inspection
from metaopt.app.tracking import circumstances
from metaopt.base.errors import ConfigError, MissingPathError
from metaopt.core.contracts import Estimator
from metaopt.diagnostics.explain import explained
from metaopt.diagnostics.fidelity import OWN, compare_estimators, num_calls
from metaopt.diagnostics.fidelity_result import FidelityResult, FidelityRow
from metaopt.progress import progress_bar
from metaopt.trainer import MetaTrainer


class FidelityRun(Inspection):
    """One comparison; `fidelity.json` and `fidelity.png` go to its folder."""

    section, verb = "fidelity", "compare"

    def __init__(self, config: DictConfig, folder: str | Path, trainer: MetaTrainer) -> None:
        self.estimators = {str(name): _estimator(config, str(name)) for name in config.fidelity.estimators}
        super().__init__(config, folder, trainer)

    def warm_up(self) -> None:
        """Go to the first point: plain steps, then the meta-steps."""
        super().warm_up()
        options = self.config.fidelity
        if options.meta_steps:
            with progress_bar(self.console, "meta-steps", options.meta_steps) as advance:
                for _ in range(options.meta_steps):
                    advance(f"meta-loss {self.trainer.meta_step()[1]['meta_loss']:.4f}")

    def compare(self) -> FidelityResult:
        """Measure every estimator, with a progress bar."""
        trainer, options = self.trainer, self.config.fidelity
        count = num_calls(len(self.estimators), options.num_points, options.num_runs)
        with progress_bar(self.console, "runs of the chain", count) as advance:
            objective: Any = trainer.objective
            parts = trainer.chain, objective, trainer.next_batch(), trainer.meta_params
            try:
                return compare_estimators(
                    *parts,
                    self.estimators,
                    num_runs=options.num_runs,
                    num_points=options.num_points,
                    advance=self._next_point,
                    seed=self.config.trainer.seed,
                    on_run=advance,
                )
            except MissingPathError as error:
                raise explained(error, *parts) from error

    def _next_point(self) -> Any:
        for _ in range(self.config.fidelity.point_every):
            self.trainer.meta_step()
        return self.trainer.next_batch()

    def report(self, result: FidelityResult) -> None:
        """Show the table, the remarks and what to use; write `fidelity.json` and the plot."""
        print_fidelity(self.console, result)
        seconds = time.perf_counter() - self._start
        found = {**result.as_dict(), **circumstances(seconds, self.config.trainer.seed)}
        (self.path / "fidelity.json").write_text(json.dumps(found, indent=2) + "\n")
        if self.config.output.plots:
            plot_fidelity(result, self.path / "fidelity.png")


def _estimator(config: DictConfig, name: str) -> Estimator:
    where = f"fidelity.estimators.{name}"
    built = build._call(where, build._factory(where, config.fidelity.estimators[name]))
    if not isinstance(built, Estimator):
        raise ConfigError(f"{where}: the target returned a {type(built).__name__}, not an Estimator")
    return built


def print_fidelity(console: Console, result: FidelityResult) -> None:
    """Show the rows beside plain training, the remarks, and which to use."""
    head, *rows = result.cells
    table = Table(title=result.title, title_justify="left")
    for column in head:
        table.add_column(column, justify="left" if column == head[0] else "right")
    for row in rows:
        table.add_row(*(Text(cell, style="red" if cell == "fails" else "") for cell in row), end_section=row is rows[0])
    console.print(table)
    for remark in result.remarks:
        console.print(Text(remark))
    for line in result.recommendation:
        console.print(Text(f"→ {line}", style="bold"))


# --- the plot ---------------------------------------------------------------------------------------------------


def plot_fidelity(result: FidelityResult, path: Path) -> None:
    """Draw each estimator's error in the run's dtype against its peak bytes and its time; nothing if all fail."""
    rows = [row for row in result.rows if row.cost and row.in_run and row.name != OWN]
    if not rows:
        return
    figure, _ = report._figure(10.4, 4.6)
    figure.clear()
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle("Error of the hypergradient, and what it costs", fontsize=12)
    least = 2.0**-53
    errors = [max(row.error, least) for row in rows]
    panels = (
        (left, "peak of tensors held (MB)", [row.cost.peak_bytes / 1e6 for row in rows if row.cost]),
        (right, "time (plain training = 1)", [row.cost.time for row in rows if row.cost]),
    )
    for axes, label, costs in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel=label, yscale="log")
        axes.scatter(costs, errors, s=30, color=[_colour(row) for row in rows], zorder=3)
        axes.margins(0.14, 0.12)
        axes.set_xlim(left=0)
        axes.grid(color="0.92", zorder=0)
    left.set_ylabel(f"relative error, in {result.dtype}")
    for colour, meaning in ((report.GOOD, "exact but for rounding"), (report.BAD, "approximate")):
        right.scatter([], [], s=30, color=colour, label=meaning)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.draw_without_rendering()  # the layout is settled once, before there are labels
    figure.set_layout_engine("none")
    for axes, _, costs in panels:
        _label(axes, [row.name for row in rows], list(zip(costs, errors, strict=True)))
    report._save(figure, path)


def _colour(row: FidelityRow) -> str:
    return report.GOOD if row.is_exact else report.BAD


def _label(axes: Any, names: list[str], points: list[tuple[float, float]]) -> None:
    """Write names beside points, each at the nearest place where it covers neither a point nor another name."""
    from matplotlib.transforms import Bbox

    inside = axes.get_window_extent()
    centres = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_bounds(x - 12, y - 8, 24, 16) for x, y in centres]
    for name, point in zip(names, points, strict=True):
        text = axes.annotate(name, point, xytext=(0, 0), textcoords="offset points", fontsize=8)
        for x, y, side in _places():
            text.set(position=(x, y), ha=side, va="center")
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) and _within(box, inside):
                break
        taken.append(text.get_window_extent())
        x, y = text.get_position()
        if abs(y) > 8:
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6}
            axes.annotate("", point, (x, y), textcoords="offset points", arrowprops=line)


def _places() -> Iterator[tuple[float, float, str]]:
    """Yield offsets in points and the alignment that goes with them, the nearest first."""
    for distance, sign in itertools.product((0, 9, 18, 27, 36, 45, 60, 75, 90, 110, 130), (1, -1)):
        yield 7, sign * distance, "left"
        yield -7, sign * distance, "right"


def _within(box: Any, area: Any) -> bool:
    return box.x0 >= area.x0 and box.x1 <= area.x1 and box.y0 >= area.y0 and box.y1 <= area.y1
