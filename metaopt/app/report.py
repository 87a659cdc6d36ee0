"""What a run shows at its end: weights as bars, answers side by side, metrics, and the plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
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


def print_summary(console: Console, learned: Mapping[str, float]) -> None:
    """Show the few numbers that tell what was learned."""
    table = Table(title="learned", title_justify="left", box=None, show_header=False)
    for name, value in learned.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)


def print_source_weights(console: Console, weights: Tensor, names: Sequence[str], good: Tensor | None) -> None:
    """Show the learned weight of each source as a bar, good and bad ones marked."""
    share = weights / weights.sum()
    table = Table(title="learned weight of each source (share of all weight)", title_justify="left", box=None)
    table.add_column("source")
    table.add_column("")
    table.add_column("share", justify="right")
    table.add_column("")
    for i, value in enumerate(share.tolist()):
        known = None if good is None else bool(good[i])
        style = PLAIN if known is None else GOOD if known else BAD
        mark = "" if known is None else "✓ good" if known else "✗ bad"
        bar = "█" * max(1, round(BAR * value / float(share.max())))
        name = names[i] if i < len(names) else str(i)
        table.add_row(name, Text(bar, style=style), f"{value:6.1%}", Text(mark, style=style))
    console.print(table)


def print_quality(console: Console, quality: Mapping[str, float]) -> None:
    """Say in one line how well the weights tell good from bad data."""
    if "good_source_weight" in quality:
        console.print(f"The good sources hold {quality['good_source_weight']:.1%} of all weight.")
    if "noise_auc" in quality:
        console.print(f"A clean example outweighs a corrupted one with probability {quality['noise_auc']:.3f} (AUC).")


def print_example_weights(console: Console, weights: Tensor, is_clean: Tensor | None) -> None:
    """Show the distribution of the learned example weights, of clean and corrupted examples apart."""
    table = Table(title="learned example weights", title_justify="left", box=None)
    for column in ("", "examples", "lowest", "median", "highest"):
        table.add_column(column, justify="left" if column == "" else "right")
    parts = (
        [("all", weights)] if is_clean is None else [("clean", weights[is_clean]), ("corrupted", weights[~is_clean])]
    )
    for name, part in parts:
        if len(part):
            numbers = (part.min(), part.median(), part.max())
            style = {"clean": GOOD, "corrupted": BAD}.get(name, PLAIN)
            table.add_row(Text(name, style=style), str(len(part)), *(f"{float(n):.3f}" for n in numbers))
    console.print(table)


def print_meta_params(console: Console, tensors: Mapping[str, Tensor]) -> None:
    """Show small meta-parameters entry by entry, with the last hypergradient; of large ones, their range."""
    table = Table(title="meta-parameters", title_justify="left", box=None)
    table.add_column("name")
    table.add_column("value", justify="right")
    table.add_column("last hypergradient", justify="right")
    for name, tensor in tensors.items():
        values, gradient = tensor.detach().flatten(), None if tensor.grad is None else tensor.grad.flatten()
        if len(values) <= SMALL:
            for i, value in enumerate(values.tolist()):
                table.add_row(f"{name}[{i}]", f"{value:.6g}", "—" if gradient is None else f"{float(gradient[i]):+.6e}")
        else:
            spread = f"{float(values.min()):.4g} … {float(values.max()):.4g}"
            table.add_row(f"{name} ({len(values)})", spread, "—" if gradient is None else f"norm {gradient.norm():.3e}")
    console.print(table)


def print_answers(console: Console, answers: Mapping[str, Sequence[tuple[str, str, str]]]) -> None:
    """Show a few inputs as written, the right answer, and what each training answers.

    Args:
        answers: training → rows of (input, right answer, the model's answer), the same inputs in each.
    """
    trainings = list(answers)
    if not trainings or not answers[trainings[0]]:
        return
    table = Table(title="test examples", title_justify="left")
    for column in ("as written", "right", *trainings):
        table.add_column(column)
    for rows in zip(*answers.values(), strict=True):
        written, right, _ = rows[0]
        cells = [Text(row[2], style="green" if row[2] == right else "red") for row in rows]
        table.add_row(written, right, *cells)
    console.print(table)


def print_scores(console: Console, scores: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Show the test metrics of each training."""
    if not scores:
        return
    metrics = list(next(iter(scores.values())))
    console.print(Text(title, style="italic"))
    table = Table()
    table.add_column("weights")
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for name, values in scores.items():
        table.add_row(name, *(f"{values[metric]:.3f}" for metric in metrics))
    console.print(table)


def print_doubts(console: Console, doubts: Sequence[str]) -> None:
    """Show what speaks against a run, and what usually helps."""
    for doubt in [*doubts, REMEDIES] if doubts else []:
        console.print(Text(doubt, style="yellow"))


def plot_meta_loss(records: Sequence[Mapping[str, Any]], path: Path, best_step: int | None = None) -> None:
    """Draw meta-loss and inner losses over the meta-steps; the best look at the selection stream is marked."""
    figure, axes = _figure(6.4, 3.6)
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
    _save(figure, path)


def plot_source_weights(weights: Tensor, names: Sequence[str], good: Tensor | None, path: Path) -> None:
    """Draw each source's share of the weight."""
    figure, axes = _figure(6.4, 3.6)
    share = (weights / weights.sum()).tolist()
    labels = [names[i] if i < len(names) else str(i) for i in range(len(share))]
    colours = [PLAIN if good is None else GOOD if bool(good[i]) else BAD for i in range(len(share))]
    axes.barh(labels, share, color=colours)
    axes.axvline(1 / len(share), color="grey", linewidth=1, linestyle=":", label="uniform")
    figure.legend(frameon=False, loc="outside lower center")
    axes.invert_yaxis()
    axes.set(xlabel="share of all weight", title="Learned weight of each source")
    if good is not None:
        for label, mark in zip(axes.get_yticklabels(), good.tolist(), strict=True):
            label.set_color(GOOD if mark else BAD)
    _save(figure, path)


def plot_example_weights(weights: Tensor, is_clean: Tensor | None, path: Path) -> None:
    """Draw histograms of the example weights, clean and corrupted apart."""
    figure, axes = _figure(6.4, 3.6)
    low, high = float(weights.min()), float(weights.max())
    margin = max(0.0, 0.01 * abs(high) + 1e-6 - (high - low)) / 2  # nearly equal weights still get bins of some width
    bins = torch.linspace(low - margin, high + margin, 42, dtype=torch.float64).tolist()
    if is_clean is None:
        axes.hist(weights.numpy(), bins=bins, color=PLAIN)
    else:
        axes.hist(weights[is_clean].numpy(), bins=bins, color=GOOD, alpha=0.7, label="clean")
        axes.hist(weights[~is_clean].numpy(), bins=bins, color=BAD, alpha=0.7, label="corrupted")
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
    axes.set(xlabel="learned weight", ylabel="training examples", title="Learned example weights")
    _save(figure, path)


def plot_scores(scores: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw the test metrics of each training as bars, one panel per metric."""
    metrics = list(next(iter(scores.values())))
    figure, _ = _figure(3.2 * max(2, len(metrics)), 0.6 * len(scores) + 1.4)
    figure.clear()
    figure.suptitle("Test, by the weights trained with", fontsize=12)
    for i, (axes, metric) in enumerate(zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True)):
        values = [values[metric] for values in scores.values()]
        bars = axes.barh(list(scores), values, color=[GOOD if name == "learned" else PLAIN for name in scores])
        axes.bar_label(bars, fmt="%.3f", padding=3)
        axes.margins(x=0.2)
        if not any(values):
            axes.set_xlim(0, 1)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel=metric.replace("_", " "), yticks=range(len(scores)), yticklabels=list(scores) if not i else [])
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
