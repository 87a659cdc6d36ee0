"""What `metaopt-fidelity` does around the comparison: go to the first point, build the estimators, show, plot, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.text import Text

from metaopt.app import build, report
from metaopt.app.job import Inspection
from metaopt.base.errors import ConfigError, MissingPathError
from metaopt.core.contracts import Estimator
from metaopt.diagnostics.fidelity import OWN, compare_estimators, num_calls
from metaopt.diagnostics.fidelity_result import FidelityResult
from metaopt.diagnostics.paths.explain import explained
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
        self.console.print(result.table())
        for remark in result.remarks:
            self.console.print(Text(remark))
        for line in result.recommendation:
            self.console.print(Text(f"→ {line}", style="bold"))
        self.write("fidelity.json", result.as_dict())
        if self.config.output.plots:
            plot_fidelity(result, self.path / "fidelity.png")


def _estimator(config: DictConfig, name: str) -> Estimator:
    where = f"fidelity.estimators.{name}"
    built = build.call(where, build.factory(where, config.fidelity.estimators[name]))
    if not isinstance(built, Estimator):
        raise ConfigError(f"{where}: the target returned a {type(built).__name__}, not an Estimator")
    return built


def plot_fidelity(result: FidelityResult, path: Path) -> None:
    """Draw each estimator's error in the run's dtype against its peak bytes and its time; nothing if all fail."""
    found = [(row, row.cost) for row in result.rows if row.cost and row.in_run and row.name != OWN]
    if not found:
        return
    figure, (left, right) = report.new_figure(10.4, 4.6, 2, sharey=True)
    figure.suptitle("Error of the hypergradient, and what it costs (filled: exact but for rounding)", fontsize=12)
    left.set(xlabel="peak of tensors held (MB)", ylabel=f"relative error, in {result.dtype}", yscale="log")
    right.set(xlabel="time (plain training = 1)")
    for i, (row, cost) in enumerate(found):
        colour, error = f"C{i % 10}", max(row.error, 2.0**-53)
        style = {
            "marker": "osD^vP*X<>"[i % 10],
            "facecolor": colour if row.is_exact else "white",
            "edgecolor": colour,
            "s": 45,
            "zorder": 3,
        }
        left.scatter(cost.peak_bytes / 1e6, error, label=row.name, **style)
        right.scatter(cost.time, error, **style)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
        axes.grid(color="0.92", zorder=0)
    figure.legend(loc="outside right center", frameon=False)
    report.save_figure(figure, path)
