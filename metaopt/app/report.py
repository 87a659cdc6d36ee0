"""What a run shows at its end: weights as bars, answers side by side, metrics, and the plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from metaopt.app.final import weights_of
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.data.bundle import DataBundle
from metaopt.diagnostics.check_result import CheckResult
from metaopt.diagnostics.fidelity import OWN
from metaopt.diagnostics.fidelity_result import FidelityResult
from metaopt.diagnostics.tables import cell
from metaopt.meta_params.tables import summary
from metaopt.saving.text import any_font, plot_label, printable

SMALL = 8  # entries of a meta-parameter that are shown one by one
NUM_PICTURED = 20
BAR = 30  # characters of the longest bar
GOOD, BAD, PLAIN = "#2a9d8f", "#e76f51", "#457b9d"
REMEDIES = (
    "What often helps: another inner learning rate (optimizer.lr=...), more inner steps (stages.<name>.num_steps=...), "
    "more meta-steps (trainer.meta_steps=...), another meta-rate (meta_optimizer.lr=...). With the same overrides, "
    "metaopt-check says whether the hypergradient is right, metaopt-fidelity what each estimator makes of it."
)


def say(console: Console, lines: Sequence[str], style: str = "") -> None:
    """Show lines as they are, without reading markup into them."""
    for line in lines:
        console.print(Text(printable(line, lines=True), style))


class _Table(Table):
    """A table whose first columns are flush left, and the others right; no markup is read in its strings."""

    def __init__(self, title: str | None, *columns: str, left: int = 1, **look: Any) -> None:
        super().__init__(title=title, title_justify="left", **look)
        for i, column in enumerate(columns):
            self.add_column(cell(column), justify="left" if i < left else "right")

    def add_row(self, *cells: str | Text) -> None:  # type: ignore[override]
        super().add_row(*(text if isinstance(text, Text) else cell(text) for text in cells))


def print_check(console: Console, check: CheckResult, sweep: bool = False) -> None:
    """Show the hypergradient beside its central differences, one block of rows per meta-parameter, and the remarks."""
    console.print(check.table("hypergradient of the first meta-step, in float64"))
    if sweep:
        console.print("relative error at each h: truncation falls with h², rounding grows with 1/h, a mistake stays")
        console.print(check.sweep_table())
    say(console, check.remarks)


def print_learned(console: Console, meta_params: AnyMetaParameters, data: DataBundle) -> None:
    """Show what was learned: its summary, the weights of sources or examples; where there is neither, the tensors."""
    learned, found = summary(meta_params), weights_of(meta_params)
    if learned:
        table = _Table("learned", "", "", box=None, show_header=False)
        for name, value in learned.items():
            table.add_row(name, f"{value:.4g}")
        console.print(table)
    if found is not None:
        key, weights = found
        console.print(_table_of_sources(weights, data) if key == "source" else _table_of_examples(weights, data))
    if not learned and found is None:
        console.print(_table_of_tensors(named_tensors(meta_params)))


def _table_of_sources(weights: Tensor, data: DataBundle) -> Table:
    """Return each source's weight as a bar, good and bad ones marked."""
    sources = _shares(weights, data)
    highest = max(share for _, share, _, _ in sources)
    table = _Table("learned weight of each source (share of all weight)", "source", "", "share", box=None, left=2)
    for name, share, colour, mark in sources:
        bar = "█" * max(1, round(BAR * share / highest))
        table.add_row(name, Text(bar, colour), f"{share:6.1%}", Text(mark, colour))
    return table


def _table_of_examples(weights: Tensor, data: DataBundle) -> Table:
    """Return the distribution of the example weights, of clean and corrupted examples apart."""
    table = _Table("learned example weights", "", "examples", "lowest", "median", "highest", box=None)
    for name, part, colour in _parts(weights, data.is_clean):
        if len(part):
            numbers = (part.min(), part.median(), part.max())
            table.add_row(Text(name, colour), str(len(part)), *(f"{float(n):.3f}" for n in numbers))
    return table


def _table_of_tensors(tensors: Mapping[str, Tensor]) -> Table:
    """Return small meta-parameters entry by entry, with the last hypergradient; of large ones, their range."""
    table = _Table("meta-parameters", "name", "value", "last hypergradient", box=None)
    for name, tensor in tensors.items():
        values, gradient = tensor.detach().flatten(), None if tensor.grad is None else tensor.grad.flatten()
        if len(values) > SMALL:
            spread = f"{float(values.min()):.4g} … {float(values.max()):.4g}"
            table.add_row(f"{name} ({len(values)})", spread, "—" if gradient is None else f"norm {gradient.norm():.3e}")
            continue
        for i, value in enumerate(values.tolist()):
            table.add_row(f"{name}[{i}]", f"{value:.6g}", "—" if gradient is None else f"{gradient[i].item():+.6e}")
    return table


def print_quality(console: Console, quality: Mapping[str, float]) -> None:
    """Say in one line how well the weights tell good from bad data."""
    if "good_source_weight" in quality:
        console.print(f"The good sources hold {quality['good_source_weight']:.1%} of all weight.")
    if "noise_auc" in quality:
        console.print(f"A clean example outweighs a corrupted one with probability {quality['noise_auc']:.3f} (AUC).")


def _shares(weights: Tensor, data: DataBundle) -> list[tuple[str, float, str, str]]:
    """Return name, share of all weight, colour and mark of each source."""
    marks = {None: (PLAIN, ""), True: (GOOD, "✓ good"), False: (BAD, "✗ bad")}
    good = [None] * len(weights) if data.good_sources is None else data.good_sources.tolist()
    labels = [*data.source_names, *map(str, range(len(data.source_names), len(weights)))]
    shares = (weights / weights.sum()).tolist()
    return [(label, share, *marks[is_good]) for label, share, is_good in zip(labels, shares, good, strict=True)]


def _parts(weights: Tensor, is_clean: Tensor | None) -> list[tuple[str, Tensor, str]]:
    """Return name, weights and colour of the examples that are told apart."""
    if is_clean is None:
        return [("all", weights, PLAIN)]
    return [("clean", weights[is_clean], GOOD), ("corrupted", weights[~is_clean], BAD)]


def print_answers(console: Console, answers: Mapping[str, Sequence[tuple[str, str, str]]]) -> None:
    """Show a few inputs as written, the right answer, and what each training answers.

    `answers`: training → rows of (input, right answer, the model's answer), the same inputs in each.
    """
    table = _Table("test examples", "as written", "right", *answers, left=2 + len(answers))
    for rows in zip(*answers.values(), strict=True):
        written, right, _ = rows[0]
        table.add_row(written, right, *(cell(row[2], "green" if row[2] == right else "red") for row in rows))
    if table.row_count:
        console.print(table)


def print_scores(console: Console, scores: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Show the test metrics of each training; nothing where every test has failed."""
    if not scores:
        return
    metrics = list(next(iter(scores.values())))
    say(console, [title], "italic")
    table = _Table(None, "weights", *(metric.replace("_", " ") for metric in metrics))
    for name, values in scores.items():
        table.add_row(name, *(f"{values[metric]:.3f}" for metric in metrics))
    console.print(table)


def plot_meta_loss(records: Sequence[Mapping[str, Any]], path: Path, best_step: int | None = None) -> None:
    """Draw meta-loss and inner losses over the meta-steps; the best look at the selection stream is marked."""
    figure, (axes,) = _figure()
    steps = [record["meta_step"] for record in records]
    for key in (k for k in records[0] if k.startswith("inner_loss/")):
        label = plot_label(f"inner loss, {key.removeprefix('inner_loss/')}")
        axes.plot(steps, [record[key] for record in records], linewidth=0.8, alpha=0.6, label=label)
    axes.plot(steps, [record["meta_loss"] for record in records], color="black", linewidth=1.4, label="meta-loss")
    if best_step in steps:
        best = records[steps.index(best_step)]["meta_loss"]
        axes.plot(best_step, best, "o", color=GOOD, markersize=7, label=f"best look, meta-step {best_step}", zorder=3)
    axes.set(xlabel="meta-step", ylabel="loss (nats)", title="Meta-loss")
    if axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_weights(key: str, weights: Tensor, data: DataBundle, folder: Path) -> None:
    """Draw the learned weights to `weights.png`; of examples with a picture, those that weigh least, too."""
    figure, (axes,) = _figure()
    if key == "source":
        _draw_shares(axes, weights, data)
    else:
        _draw_histogram(axes, weights, data.is_clean)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
    _save(figure, folder / "weights.png")
    if key == "index" and data.picture is not None:
        lowest = torch.argsort(weights)[:NUM_PICTURED].tolist()
        data.picture(lowest, folder / "lowest_weights.png", "Lowest learned weights")


def _draw_shares(axes: Any, weights: Tensor, data: DataBundle) -> None:
    labels, shares, colours, _ = zip(*_shares(weights, data), strict=True)
    axes.barh(range(len(shares)), shares, color=colours, tick_label=list(map(plot_label, labels)))
    axes.axvline(1 / len(shares), color="grey", linewidth=1, linestyle=":", label="uniform")
    axes.invert_yaxis()
    axes.set(xlabel="share of all weight", title="Learned weight of each source")
    for label, colour in zip(axes.get_yticklabels(), colours, strict=True):
        label.set_color("black" if colour == PLAIN else colour)


def _draw_histogram(axes: Any, weights: Tensor, is_clean: Tensor | None) -> None:
    low, high = float(weights.min()), float(weights.max())
    margin = max(0.0, 0.01 * abs(high) + 1e-6 - (high - low)) / 2  # nearly equal weights still get bins of some width
    bins = torch.linspace(low - margin, high + margin, 42, dtype=torch.float64).tolist()
    for name, part, colour in _parts(weights, is_clean):
        alone = is_clean is None
        axes.hist(part.numpy(), bins=bins, color=colour, alpha=1 if alone else 0.7, label=None if alone else name)
    axes.set(xlabel="learned weight", ylabel="training examples", title="Learned example weights")


def plot_scores(scores: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw the test metrics of each training as bars, one panel per metric."""
    metrics = list(next(iter(scores.values())))
    figure, panels = _figure(3.2 * max(2, len(metrics)), 0.6 * len(scores) + 1.4, len(metrics), sharey=True)
    figure.suptitle("Test, by the weights trained with", fontsize=12)
    for axes, metric in zip(panels, metrics, strict=True):
        values = [values[metric] for values in scores.values()]
        colours, names = [GOOD if name == "learned" else PLAIN for name in scores], list(map(plot_label, scores))
        bars = axes.barh(range(len(names)), values, color=colours, tick_label=names)
        axes.bar_label(bars, fmt="%.3f", padding=3)
        axes.margins(x=0.2)
        if not any(values):
            axes.set_xlim(0, 1)
        axes.set(xlabel=plot_label(metric.replace("_", " ")))
    panels[0].invert_yaxis()
    _save(figure, path)


def plot_fidelity(result: FidelityResult, path: Path) -> None:
    """Draw each estimator's error in the run's dtype against its peak bytes and its time; nothing if all fail."""
    found = [(row, row.cost) for row in result.rows if row.cost and row.in_run and row.name != OWN]
    if not found:
        return
    figure, (left, right) = _figure(10.4, 4.6, 2, sharey=True)
    figure.suptitle("Error of the hypergradient, and what it costs (filled: exact but for rounding)", fontsize=12)
    left.set(xlabel="peak of tensors held (MB)", ylabel=f"relative error, in {result.dtype}", yscale="log")
    right.set(xlabel="time (plain training = 1)")
    for i, (row, cost) in enumerate(found):
        colour, error = f"C{i % 10}", max(row.error, 2.0**-53)
        face = colour if row.is_exact else "white"
        style = {"marker": "osD^vP*X<>"[i % 10], "facecolor": face, "edgecolor": colour, "s": 45, "zorder": 3}
        left.scatter(cost.peak_bytes / 1e6, error, label=plot_label(row.name), **style)
        right.scatter(cost.time, error, **style)
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(color="0.92", zorder=0)
    figure.legend(loc="outside right center", frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with any_font():
        figure.savefig(path)


def _figure(width: float = 6.4, height: float = 3.6, num_panels: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a figure and its panels, side by side."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")  # not pyplot: no global state, no window
    panels = figure.subplots(1, num_panels, squeeze=False, **options)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
