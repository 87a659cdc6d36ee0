"""What `metaopt-check` does around the check: warm up, choose what to check, show, save."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from rich.text import Text

from metaopt.app import report
from metaopt.app.job import FEW, Inspection
from metaopt.base.errors import ConfigError, MissingPathError
from metaopt.core.chain import Chain
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.diagnostics.check import check_hypergradient, num_runs
from metaopt.diagnostics.check_result import CheckResult
from metaopt.diagnostics.paths.explain import explain_hypergradient, explained
from metaopt.diagnostics.tables import STYLES
from metaopt.progress import progress_bar


class CheckRun(Inspection):
    """One check; `check.json` goes to its folder."""

    section, verb = "check", "check"

    def compare(self) -> CheckResult:
        """Compare the hypergradient of the next meta-step with differences, with a progress bar."""
        options, coordinates, steps = self.config.check, self._coordinates(), list(self.config.check.steps)
        count = num_runs(self.trainer.meta_params, options.num_directions, coordinates, steps)
        with progress_bar(self.console, "runs of the chain", count) as advance:
            try:
                return check_hypergradient(
                    *self._parts,
                    num_directions=options.num_directions,
                    coordinates=coordinates,
                    steps=steps,
                    tolerance=options.tolerance,
                    seed=options.seed,
                    all_in_float64=options.all_in_float64,
                    on_run=advance,
                )
            except MissingPathError as error:
                raise explained(error, *self._parts) from error

    @property
    def _parts(self) -> tuple[Chain, Any, Any, AnyMetaParameters]:
        """The chain, the objective, the batch and the meta-parameters of the next meta-step."""
        return self.trainer.chain, self.trainer.objective, self.trainer.next_batch(), self.trainer.meta_params

    def _coordinates(self) -> dict[str, list[int]]:
        given = self.config.check.coordinates
        if given == "few":
            tensors = named_tensors(self.trainer.meta_params)
            return {name: list(range(t.numel())) for name, t in tensors.items() if t.numel() <= FEW}
        found: Any = {} if given is None else OmegaConf.to_container(given)
        for name, indices in found.items():
            if not isinstance(indices, list) or not all(isinstance(i, int) for i in indices):
                raise ConfigError(
                    f"check.coordinates.{name} = {indices!r}: must be a list of flat indices: {{{name}: [0, 17]}}"
                )
        return found

    def report(self, result: CheckResult) -> None:
        """Show rows, sweep, remarks, where paths are cut if something differs, and the verdict; write `check.json`."""
        report.print_check(self.console, result, sweep=self.config.check.show_sweep)
        cuts = str(explain_hypergradient(*self._parts)) if result.verdict == "differs" else ""
        if cuts:
            self.console.print(Text(cuts))
        self.console.print(Text(result.headline, style=STYLES[result.verdict]))
        self.write("check.json", {**result.as_dict(), "cuts": cuts})
