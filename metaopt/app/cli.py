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
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from metaopt.app.config import explained, prepare, with_note
from metaopt.base.errors import MetaoptError, was_told

EXIT_CODES = {"agrees": 0, "undecided": 3, "differs": 2}  # of metaopt-check, better ones first; 1: it could not be run


def main() -> None:
    """Run `metaopt`; with `resume=FOLDER`, go on with the run there."""
    folder = next((a.removeprefix("resume=") for a in sys.argv[1:] if a.startswith("resume=")), "auto")
    if folder in ("auto", "null", ""):
        _run("config", "run", "train")
    else:
        _guarded(lambda: _go_on(folder, [a for a in sys.argv[1:] if not a.startswith("resume=")]))


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

    @hydra.main(version_base="1.3", config_path="pkg://metaopt.conf", config_name=name)
    def run(composed: DictConfig) -> Any:
        job = HydraConfig.get()
        overrides = OmegaConf.to_container(job.overrides.task, resolve=False)  # one may hold an interpolation
        config = prepare(composed, cast(list[str], overrides), job.runtime.choices)
        command = getattr(importlib.import_module(f"metaopt.app.{module}"), function)
        told = (overrides,) if function == "train" else ()
        found.append(command(config, job.runtime.output_dir, *told))
        return found[-1]

    _guarded(run)
    return found


def _guarded(run: Callable[[], Any]) -> None:
    """Run a command, with errors and interrupts told as a user reads them, and an exit code."""
    sys.path.append(os.getcwd())  # so that a class in the current folder can be named as a _target_
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands every exception on instead of printing it
    try:
        run()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as stop:  # Ctrl-C, or what metaopt.app.interrupts has made of a signal
        print(getattr(stop, "said", "") or "interrupted", file=sys.stderr)
        sys.exit(getattr(stop, "code", 130))
    except Exception as error:
        if wants_traceback or not (isinstance(error, (MetaoptError, HydraException)) or was_told(error)):
            raise
        sys.exit(with_note(error) if was_told(error) else explained(error))
