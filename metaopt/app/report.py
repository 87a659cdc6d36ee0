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

from metaopt.diagnostics.check_result import CheckResult

SMALL = 8  # entries of a meta-parameter that are shown one by one
BAR = 30  # characters of the longest bar
GOOD, BAD, PLAIN = "#2a9d8f", "#e76f51", "#457b9d"
REMEDIES = (
    "What often helps: another inner learning rate (optimizer.lr=...), more inner steps (stages.<name>.num_steps=...), "
    "more meta-steps (trainer.meta_steps=...), another meta-rate (meta_optimizer.lr=...). With the same overrides, "
    "metaopt-check says whether the hypergradient is right, metaopt-fidelity what each estimator makes of it."
)


def print_check(console: Console, check: CheckResult, sweep: bool = False) -> None:
    """Show the hypergradient beside its central differences, one block of rows per meta-parameter, and the remarks."""
    console.print(check.table("hypergradient of the first meta-step, in float64"))
    if sweep:
        console.print(
            "relative error at each step h: truncation falls with h², rounding grows with 1/h, a mistake stays"
        )
        console.print(check.sweep_table())
    for remark in check.remarks:
        console.print(Text(remark))


def _table(title: str | None, *columns: str, left: int = 1, **options: Any) -> Table:
    """Return an empty table whose first columns are flush left, and the others right."""
    table = Table(title=title, title_justify="left", **options)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right")
    return table


def print_summary(console: Console, learned: Mapping[str, float]) -> None:
    """Show the few numbers that tell what was learned."""
    table = _table("learned", box=None, show_header=False)
    for name, value in learned.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)


def _shares(weights: Tensor, names: Sequence[str], good: Tensor | None) -> list[tuple[str, float, str, str]]:
    """Return name, share of all weight, colour and mark of each source."""
    known = {None: (PLAIN, ""), True: (GOOD, "✓ good"), False: (BAD, "✗ bad")}
    labels = [*names, *map(str, range(len(names), len(weights)))]
    marks = [known[None if good is None else bool(good[i])] for i in range(len(weights))]
    shares = (weights / weights.sum()).tolist()
    return [(label, share, *mark) for label, share, mark in zip(labels, shares, marks, strict=True)]


def print_source_weights(console: Console, weights: Tensor, names: Sequence[str], good: Tensor | None) -> None:
    """Show the learned weight of each source as a bar, good and bad ones marked."""
    sources = _shares(weights, names, good)
    highest = max(share for _, share, _, _ in sources)
    table = _table("learned weight of each source (share of all weight)", "source", "", "share", box=None, left=2)
    for name, share, colour, mark in sources:
        bar = "█" * max(1, round(BAR * share / highest))
        table.add_row(name, Text(bar, style=colour), f"{share:6.1%}", Text(mark, style=colour))
    console.print(table)


def _parts(weights: Tensor, is_clean: Tensor | None) -> list[tuple[str, Tensor, str]]:
    """Return name, weights and colour of the examples that are told apart."""
    if is_clean is None:
        return [("all", weights, PLAIN)]
    return [("clean", weights[is_clean], GOOD), ("corrupted", weights[~is_clean], BAD)]


def print_example_weights(console: Console, weights: Tensor, is_clean: Tensor | None) -> None:
    """Show the distribution of the learned example weights, of clean and corrupted examples apart."""
    table = _table("learned example weights", "", "examples", "lowest", "median", "highest", box=None)
    for name, part, colour in _parts(weights, is_clean):
        if len(part):
            numbers = (part.min(), part.median(), part.max())
            table.add_row(Text(name, style=colour), str(len(part)), *(f"{float(n):.3f}" for n in numbers))
    console.print(table)


def print_quality(console: Console, quality: Mapping[str, float]) -> None:
    """Say in one line how well the weights tell good from bad data."""
    if "good_source_weight" in quality:
        console.print(f"The good sources hold {quality['good_source_weight']:.1%} of all weight.")
    if "noise_auc" in quality:
        console.print(f"A clean example outweighs a corrupted one with probability {quality['noise_auc']:.3f} (AUC).")


def print_meta_params(console: Console, tensors: Mapping[str, Tensor]) -> None:
    """Show small meta-parameters entry by entry, with the last hypergradient; of large ones, their range."""
    table = _table("meta-parameters", "name", "value", "last hypergradient", box=None)
    for name, tensor in tensors.items():
        values, gradient = tensor.detach().flatten(), None if tensor.grad is None else tensor.grad.flatten()
        if len(values) > SMALL:
            spread = f"{float(values.min()):.4g} … {float(values.max()):.4g}"
            table.add_row(f"{name} ({len(values)})", spread, "—" if gradient is None else f"norm {gradient.norm():.3e}")
            continue
        slopes = ["—"] * len(values) if gradient is None else [f"{slope:+.6e}" for slope in gradient.tolist()]
        for i, (value, slope) in enumerate(zip(values.tolist(), slopes, strict=True)):
            table.add_row(f"{name}[{i}]", f"{value:.6g}", slope)
    console.print(table)


def print_answers(console: Console, answers: Mapping[str, Sequence[tuple[str, str, str]]]) -> None:
    """Show a few inputs as written, the right answer, and what each training answers.

    `answers`: training → rows of (input, right answer, the model's answer), the same inputs in each.
    """
    if not any(answers.values()):
        return
    table = _table("test examples", "as written", "right", *answers, left=2 + len(answers))
    for rows in zip(*answers.values(), strict=True):
        written, right, _ = rows[0]
        table.add_row(written, right, *(Text(row[2], style="green" if row[2] == right else "red") for row in rows))
    console.print(table)


def print_scores(console: Console, scores: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Show the test metrics of each training."""
    if not scores:
        return
    metrics = list(next(iter(scores.values())))
    console.print(Text(title, style="italic"))
    table = _table(None, "weights", *(metric.replace("_", " ") for metric in metrics))
    for name, values in scores.items():
        table.add_row(name, *(f"{values[metric]:.3f}" for metric in metrics))
    console.print(table)


def print_doubts(console: Console, doubts: Sequence[str]) -> None:
    """Show what speaks against a run, and what usually helps."""
    for doubt in [*doubts, REMEDIES] if doubts else []:
        console.print(Text(doubt, style="yellow"))


def plot_meta_loss(records: Sequence[Mapping[str, Any]], path: Path, best_step: int | None = None) -> None:
    """Draw meta-loss and inner losses over the meta-steps; the best look at the selection stream is marked."""
    figure, (axes,) = new_figure(6.4, 3.6)
    steps = [record["meta_step"] for record in records]
    for key in (k for k in records[0] if k.startswith("inner_loss/")):
        label = f"inner loss, {key.removeprefix('inner_loss/')}"
        axes.plot(steps, [record[key] for record in records], linewidth=0.8, alpha=0.6, label=label)
    axes.plot(steps, [record["meta_loss"] for record in records], color="black", linewidth=1.4, label="meta-loss")
    if best_step in steps:
        best = records[steps.index(best_step)]["meta_loss"]
        axes.plot(best_step, best, "o", color=GOOD, markersize=7, label=f"best look, meta-step {best_step}", zorder=3)
    axes.set(xlabel="meta-step", ylabel="loss (nats)", title="Meta-loss")
    if axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_source_weights(weights: Tensor, names: Sequence[str], good: Tensor | None, path: Path) -> None:
    """Draw each source's share of the weight."""
    figure, (axes,) = new_figure(6.4, 3.6)
    labels, shares, colours, _ = zip(*_shares(weights, names, good), strict=True)
    axes.barh(labels, shares, color=colours)
    axes.axvline(1 / len(shares), color="grey", linewidth=1, linestyle=":", label="uniform")
    figure.legend(frameon=False, loc="outside lower center")
    axes.invert_yaxis()
    axes.set(xlabel="share of all weight", title="Learned weight of each source")
    for label, colour in zip(axes.get_yticklabels(), colours, strict=True):
        label.set_color("black" if colour == PLAIN else colour)
    save_figure(figure, path)


def plot_example_weights(weights: Tensor, is_clean: Tensor | None, path: Path) -> None:
    """Draw histograms of the example weights, clean and corrupted apart."""
    figure, (axes,) = new_figure(6.4, 3.6)
    low, high = float(weights.min()), float(weights.max())
    margin = max(0.0, 0.01 * abs(high) + 1e-6 - (high - low)) / 2  # nearly equal weights still get bins of some width
    bins = torch.linspace(low - margin, high + margin, 42, dtype=torch.float64).tolist()
    parts = _parts(weights, is_clean)
    for name, part, colour in parts:
        axes.hist(part.numpy(), bins=bins, color=colour, alpha=1 if len(parts) == 1 else 0.7, label=name)
    if len(parts) > 1:
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
    axes.set(xlabel="learned weight", ylabel="training examples", title="Learned example weights")
    save_figure(figure, path)


def plot_scores(scores: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw the test metrics of each training as bars, one panel per metric."""
    metrics = list(next(iter(scores.values())))
    figure, panels = new_figure(3.2 * max(2, len(metrics)), 0.6 * len(scores) + 1.4, len(metrics))
    figure.suptitle("Test, by the weights trained with", fontsize=12)
    for i, (axes, metric) in enumerate(zip(panels, metrics, strict=True)):
        values = [values[metric] for values in scores.values()]
        bars = axes.barh(list(scores), values, color=[GOOD if name == "learned" else PLAIN for name in scores])
        axes.bar_label(bars, fmt="%.3f", padding=3)
        axes.margins(x=0.2)
        if not any(values):
            axes.set_xlim(0, 1)
        axes.invert_yaxis()
        axes.set(xlabel=metric.replace("_", " "), yticks=range(len(scores)), yticklabels=list(scores) if not i else [])
    save_figure(figure, path)


def new_figure(width: float, height: float, num_panels: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a figure and its panels, side by side."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")  # not pyplot: no global state, no window
    panels = figure.subplots(1, num_panels, squeeze=False, **options)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to a PNG, its folder made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
