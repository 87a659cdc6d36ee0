"""Looks at a config's hypergradient: `metaopt-check` sets it beside differences, `metaopt-fidelity` beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from metaopt.app import report
from metaopt.app.build import build
from metaopt.app.job import Job
from metaopt.base.errors import ConfigError, MissingPathError
from metaopt.core.contracts import Estimator
from metaopt.diagnostics import check as checking
from metaopt.diagnostics import fidelity
from metaopt.diagnostics.fidelity_result import FidelityResult
from metaopt.diagnostics.paths.explain import explain_hypergradient, explained
from metaopt.diagnostics.tables import STYLES
from metaopt.progress import progress_bar

T = TypeVar("T")


@contextmanager
def _built(config: DictConfig, folder: str, file: str) -> Iterator[Job]:
    """Build the trainer of the run that would be started, on the run's threads; `file` is what will be written."""
    with Job(config, folder, file) as job:
        job.build()
        if not job.trainer.learns:
            raise ConfigError(
                "there is no hypergradient: these meta-parameters hold nothing to be learned; choose others, such as "
                "meta_params=example_weights"
            )
        yield job


def _measured(job: Job, count: int, measure: Callable[..., T]) -> T:
    """Measure at the next meta-step, with a bar over so many runs; a missing path is explained."""
    parts = job.trainer.parts()
    with progress_bar(job.console, "runs of the chain", count) as advance:
        try:
            return measure(*parts, on_run=advance)
        except MissingPathError as error:
            raise explained(error, *parts) from error


def check(config: DictConfig, folder: str) -> str:
    """Set the hypergradient after the warm-up beside differences; write `check.json`, and return the verdict."""
    with _built(config, folder, "check.json") as job:
        job.begin()
        job.warm_up(job.config.check.warmup_steps)
        options: Any = OmegaConf.to_container(job.config.check, resolve=True)
        del options["warmup_steps"]
        show_sweep = options.pop("show_sweep")
        given = options["coordinates"]
        options["coordinates"] = job.small_entries() if given == "few" else given or {}
        drawn = (options[name] for name in ("num_directions", "coordinates", "steps"))
        count = checking.num_runs(job.trainer.meta_params, *drawn)
        result = _measured(job, count, partial(checking.check_hypergradient, **options))
        report.print_check(job.console, result, show_sweep)
        cuts = str(explain_hypergradient(*job.trainer.parts())) if result.verdict == "differs" else ""
        report.say(job.console, [cuts] if cuts else [])
        report.say(job.console, [result.headline], STYLES[result.verdict])
        job.folder.tell(**result.as_dict(), cuts=cuts)
    return result.verdict


def compare_estimators(config: DictConfig, folder: str) -> FidelityResult:
    """Set each estimator beside the exact hypergradient after the warm-up; write `fidelity.json` and `fidelity.png`."""
    with _built(config, folder, "fidelity.json") as job:
        options, trainer = job.config.fidelity, job.trainer
        nodes = {str(name): node for name, node in options.estimators.items()}
        estimators = {name: build(f"fidelity.estimators.{name}", nodes[name], kind=Estimator) for name in nodes}
        job.begin()
        job.warm_up(options.warmup_steps)
        if options.meta_steps:
            with progress_bar(job.console, "meta-steps", options.meta_steps) as advance:
                for _ in range(options.meta_steps):
                    advance(f"meta-loss {trainer.meta_step()[1]['meta_loss']:.4f}")

        def next_point() -> Any:
            for _ in range(options.point_every):
                trainer.meta_step()
            return trainer.next_batch()

        more = {"estimators": estimators, "num_runs": options.num_runs, "num_points": options.num_points}
        more |= {"advance": next_point, "seed": job.config.trainer.seed}
        count = fidelity.num_calls(len(estimators), options.num_points, options.num_runs)
        result = _measured(job, count, partial(fidelity.compare_estimators, **more))
        job.console.print(result.table())
        report.say(job.console, result.remarks)
        report.say(job.console, [f"→ {line}" for line in result.recommendation], "bold")
        job.folder.tell(**result.as_dict())
        if job.config.output.plots:
            report.plot_fidelity(result, job.path / "fidelity.png")
    return result
