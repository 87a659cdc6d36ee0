"""The commands: `metaopt`, one run; `metaopt-check`, its hypergradient beside differences; `metaopt-fidelity`, beside
those of other estimators.

Torch takes seconds to import, and shell completion runs this module at every TAB: whatever needs it is imported late.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from metaopt.app.config import prepare, told
from metaopt.app.exits import no_exit
from metaopt.app.sweep import as_job, launch
from metaopt.app.yaml_files import refuse_bombs
from metaopt.saving.text import printable

EXIT_CODES = {"agrees": 0, "undecided": 3, "differs": 2}  # of metaopt-check, better ones first; 1: it could not be run


def main() -> None:
    """Run `metaopt`; with `resume=FOLDER`, go on with the run there."""
    folder = next((a.removeprefix("resume=") for a in sys.argv[1:] if a.startswith("resume=")), "auto")
    if folder in ("auto", "null", ""):
        _run("config", "run", "train")
    else:
        _guarded(lambda: _go_on(folder, [a for a in sys.argv[1:] if not a.startswith("resume=")]))


@no_exit
def _go_on(folder: str, options: list[str]) -> None:
    from metaopt.app.resume import go_on

    go_on(folder, options)


def check_main() -> None:
    """Run `metaopt-check`; exit with the code of its verdict, of a sweep the worst."""
    verdicts = _run("check", "inspections", "check")
    sys.exit(EXIT_CODES[max(verdicts, key=list(EXIT_CODES).index, default="agrees")])


def fidelity_main() -> None:
    """Run `metaopt-fidelity`."""
    _run("fidelity", "inspections", "compare_estimators")


def _run(name: str, module: str, function: str) -> list[Any]:
    """Call a function of the app on the config that Hydra composes from `conf/<name>.yaml`; return what it returns."""
    found: list[Any] = []  # of each job; Hydra drops what it returns
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ

    @hydra.main(version_base="1.3", config_path="pkg://metaopt.conf", config_name=name)
    @no_exit
    def run(composed: DictConfig) -> Any:
        job = HydraConfig.get()
        overrides = cast(list[str], OmegaConf.to_container(job.overrides.task, resolve=False))  # one may interpolate
        is_run = function == "train"
        in_sweep = is_run and job.mode == RunMode.MULTIRUN
        if in_sweep and not any(override.startswith("resume=") for override in overrides):
            composed.resume = "auto"

        def work() -> Any:
            _see_the_current_folder()
            config = prepare(composed, overrides, job.runtime.choices)
            command = getattr(importlib.import_module(f"metaopt.app.{module}"), function)
            return command(config, job.runtime.output_dir, *((overrides,) if is_run else ()))

        found.append(as_job(job, overrides, work, wants_traceback) if in_sweep else work())
        return found[-1]

    _guarded(lambda: launch(run, wants_traceback))
    return found


def _see_the_current_folder() -> None:
    """Let a class in the current folder be named as a `_target_`, in the processes of a sweep too."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _guarded(run: Callable[[], Any]) -> None:
    """Run a command, with errors and interrupts told as a user reads them, and an exit code."""
    _see_the_current_folder()
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands every exception on instead of printing it
    try:
        refuse_bombs(sys.argv[1:])
        run()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as stop:  # Ctrl-C, or what metaopt.app.interrupts has made of a signal
        print(printable(getattr(stop, "said", "") or "interrupted"), file=sys.stderr)
        sys.exit(getattr(stop, "code", 130))
    except Exception as error:
        if wants_traceback:
            raise
        sys.exit(told(error))
