"""The commands: `metaopt`, one run in the order data flows; `metaopt-check`, its hypergradient beside differences;
`metaopt-fidelity`, estimators beside the exact hypergradient.

Torch takes seconds to import, and shell completion runs this module at every TAB: whatever needs it is imported late.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from metaopt.app.config import explained, prepare
from metaopt.base.errors import MetaoptError, was_told, with_note

EXIT_CODES = {"agrees": 0, "differs": 2, "undecided": 3}  # of metaopt-check; 1: it could not be run


def train(config: DictConfig, folder: str) -> float:
    """Build the parts, learn the meta-parameters, compare, report; return the selection metric.

    `config` is as `metaopt.app.config.prepare` returns it; the run writes to `folder`.
    """
    from metaopt.app.job import threads
    from metaopt.app.run import Run

    with threads(config.trainer.num_threads), Run(config, folder) as run:
        run.build([run.observe])
        run.begin()
        run.warm_up()
        run.check_first_step()
        result = run.learn()
        run.compare()
        run.save()
    return result.meta_loss if result.score is None else result.score


def check(config: DictConfig, folder: str) -> str:
    """Compare the hypergradient with differences, report; return the verdict."""
    from metaopt.app import inspections

    return inspections.check(config, folder)


def compare_estimators(config: DictConfig, folder: str) -> Any:
    """Compare the estimators, report; return the `FidelityResult`."""
    from metaopt.app import inspections

    return inspections.compare_estimators(config, folder)


_verdicts: list[str] = []  # of the jobs of this process; Hydra drops what they return


def main() -> None:
    """Run `metaopt`."""
    _run("config", train)


def check_main() -> None:
    """Run `metaopt-check`; exit with the code of its verdict, of a sweep the worst."""
    _run("check", lambda config, folder: _verdicts.append(check(config, folder)))
    sys.exit(next((EXIT_CODES[verdict] for verdict in ("differs", "undecided") if verdict in _verdicts), 0))


def fidelity_main() -> None:
    """Run `metaopt-fidelity`."""
    _run("fidelity", compare_estimators)


def _run(name: str, command: Callable[[DictConfig, str], Any]) -> None:
    """Run a command on the config that Hydra composes from `conf/<name>.yaml`.

    What metaopt or Hydra refuses, or a user's part raises, is one message and exit code 1; a bug keeps its traceback.
    """

    @hydra.main(version_base="1.3", config_path="pkg://metaopt.conf", config_name=name)
    def run(composed: DictConfig) -> None:
        job = HydraConfig.get()
        overrides = OmegaConf.to_container(job.overrides.task, resolve=False)  # one may hold an interpolation
        command(prepare(composed, cast(list[str], overrides), job.runtime.choices), job.runtime.output_dir)

    sys.path.append(os.getcwd())  # so that a class in the current folder can be named as a _target_
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands every exception on instead of printing it
    try:
        run()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if wants_traceback or not (isinstance(error, (MetaoptError, HydraException)) or was_told(error)):
            raise
        sys.exit(with_note(error) if was_told(error) else explained(error))
