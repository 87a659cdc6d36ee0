"""The runs under some folders, as they stand: complete, failed, cut short, or damaged. Nothing here imports torch."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from metaopt.app.folder import CONFIG, FOLDERS, FREE, METRICS, RESULT, flat
from metaopt.base.errors import ConfigError, first_line

SEED = "trainer.seed"
FINISHED = ("complete", "complete_with_errors")
STATUSES = (*FINISHED, "failed", "interrupted", "running")  # in a `result.json`; `killed` and `damaged` are found here
# What decides nothing of a run's numbers, or is told apart.
NO_OPTIONS = (*FREE, SEED, "check", "fidelity", "resume", "resume_force", "overwrite", "hydra")
FREED = re.compile(rf"({'|'.join(map(re.escape, NO_OPTIONS))})(\.|$)")
TAIL = 2**14  # bytes at the end of `metrics.jsonl` in which the last look is searched
MOST, DEEPEST = 20_000, 100  # parts of a config: aliases make billions of a few lines, and deep ones crash the reader


@dataclass
class Run:
    """What one folder says: `options` of its config by dotted path, `given` on the command line, and its numbers."""

    folder: Path
    name: str = ""
    status: str = "damaged"
    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    seed: Any = None
    numbers: dict[str, float] = field(default_factory=dict)
    error: str = ""
    variant: Hashable = None  # the same for runs that differ by their seed alone

    @property
    def finished(self) -> bool:
        """Whether its numbers are those of the end."""
        return self.status in FINISHED


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Return every run in and under the folders, by the order of their names; a damaged one is among them.

    Raises:
        ConfigError: one of the folders is not there, or there is no run.
    """
    given = [Path(folder) for folder in folders]
    for folder in given:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder; name those of runs or sweeps")
    found = {path.resolve(): path for folder in given for path in _found(folder)}
    if not found:
        raise ConfigError(f"{', '.join(map(str, given))}: no run there or below ({RESULT}, or {CONFIG} with {METRICS})")
    above = os.path.commonpath(found) if len(found) > 1 else next(iter(found)).parent
    runs = [_read(path, os.path.relpath(real, above)) for real, path in found.items()]
    _tell_variants(runs)
    return sorted(runs, key=lambda run: [(not part.isdigit(), part.zfill(9)) for part in re.split(r"(\d+)", run.name)])


def same(value: Any) -> Any:
    """Return what two equal values have in common, 1 and 1.0 among them."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return value if is_number else shown(value)


def shown(value: Any) -> str:
    """Return an option as it would be written on the command line, but for quotes."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def read_records(folder: Path) -> Iterator[dict[str, float]]:
    """Yield the finite numbers of each meta-step; lines that are damaged are passed over."""
    try:
        with (folder / METRICS).open(encoding="utf-8", errors="replace") as file:
            yield from (record for line in file if (record := _record(line)))
    except OSError:
        return


# --- one folder --------------------------------------------------------------------------------------------------


def _found(folder: Path) -> Iterator[Path]:
    """Yield the folders with a run in them."""
    for path, below, files in os.walk(folder):
        is_run = RESULT in files or {CONFIG, METRICS} <= {*files}
        below[:] = [name for name in below if not name.startswith(".") and not (is_run and name in FOLDERS)]
        if is_run:
            yield Path(path)


def _read(folder: Path, name: str) -> Run:
    run, problems = Run(folder, name), []
    result = _result(folder, problems)
    if (folder / CONFIG).exists():
        try:
            config = _config(folder)
            run.seed = _mapping(config.get("trainer")).get("seed")
            run.options = {key: _plain(value) for key, value in flat(config).items() if not FREED.match(key)}
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            problems.append(f"{CONFIG} cannot be read ({first_line(error)})")
    elif result.get("status") in FINISHED:
        problems.append(f"{CONFIG} is missing")
    overrides = result.get("overrides")
    given = dict(_option(text) for text in overrides if isinstance(text, str)) if isinstance(overrides, list) else {}
    run.seed = _plain(next((s for s in (run.seed, result.get("seed"), given.get(SEED)) if s is not None), None))
    run.given = {key: value for key, value in given.items() if not FREED.match(key)}
    run.status = result.get("status", run.status)
    if run.status == "running":
        run.status = _standing(result, problems)
    run.numbers = _numbers(result, _last(folder))
    if not run.finished and (seconds := _seconds(folder, result)) is not None:
        run.numbers["seconds"] = seconds
    errors = result.get("errors")
    told = [result.get("error"), *(errors if isinstance(errors, list) else ())]
    run.error = "; ".join([*problems, *(text for text in told if isinstance(text, str))])
    return run


def _result(folder: Path, problems: list[str]) -> dict[str, Any]:
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if isinstance(result, dict) and result.get("status") in STATUSES:
            return result
        problems.append(f"{RESULT} has no status")
    except FileNotFoundError:
        problems.append(f"{RESULT} is missing")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{RESULT} cannot be read ({first_line(error)})")
    return {}


def _config(folder: Path) -> dict[str, Any]:
    """Return the config, interpolations as they are; one that would take without end to go through is refused."""
    text, loader = (folder / CONFIG).read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if sum(map(text.count, ("[", "{", "- "))) > MOST // 20:  # otherwise it cannot be deep
        depth = 0
        for event in yaml.parse(text, loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"deeper than {DEEPEST}")
    config = yaml.load(text, loader)
    waiting, count = [config], 0
    while waiting:
        part: Any = waiting.pop()
        count += 1
        if count > MOST:
            raise ValueError(f"more than {MOST} entries")
        waiting += part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ()
    if not isinstance(config, dict):
        raise ValueError("no mapping")
    return config


def _option(text: str) -> tuple[str, Any]:
    """Return name and value of an override such as `optimizer.lr=0.1`."""
    key, _, value = text.partition("=")
    for kind in (int, float):
        with suppress(ValueError):
            return key.lstrip("+~"), kind(value)
    return key.lstrip("+~"), {"null": None, "true": True, "false": False}.get(value.lower(), value)


def _tell_variants(runs: list[Run]) -> None:
    """Say which runs differ by their seed alone; let those of one variant share what any of them was given.

    One that has not come to write its config is of the variant of those that were given the same.
    """
    told = {frozenset((k, same(v)) for k, v in run.given.items()): _options_of(run) for run in runs if run.options}
    given: dict[Hashable, dict[str, Any]] = {}
    for run in runs:
        mine = frozenset((key, same(value)) for key, value in run.given.items())
        run.variant = _options_of(run) if run.options else told.get(mine, mine or run.name)
        given.setdefault(run.variant, {}).update(run.given)
    for run in runs:
        run.given = given[run.variant]


def _options_of(run: Run) -> Hashable:
    return frozenset((key, same(value)) for key, value in run.options.items())


def _standing(result: dict[str, Any], problems: list[str]) -> str:
    """Return how a run stands that says it is running: `killed`, if its process on this machine is gone."""
    host, process = result.get("host"), result.get("process")
    if host != platform.node():
        problems.append(f"on {host}: whether it still runs cannot be seen from here")
    elif os.name == "posix" and isinstance(process, int) and not (process > 0 and _is_alive(process, _time(result))):
        return "killed"
    return "running"


def _is_alive(process: int, since: float | None) -> bool:
    """Return whether the process is there, and, where /proc tells, no later one under its number."""
    try:
        os.kill(process, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    try:
        ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return True
    began = datetime.now().timestamp() - up + ticks / os.sysconf("SC_CLK_TCK")
    return since is None or began < since + 5


def _time(result: dict[str, Any]) -> float | None:
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        return datetime.fromisoformat(result["started"]).timestamp()
    return None


def _seconds(folder: Path, result: dict[str, Any]) -> float | None:
    """Return the time from the start of a run that has not finished to the last that it wrote."""
    start = _time(result)
    with suppress(OSError):
        return None if start is None else max(0.0, max((folder / f).stat().st_mtime for f in (RESULT, METRICS)) - start)
    return None


def _numbers(result: dict[str, Any], last: dict[str, float]) -> dict[str, float]:
    """Return a run's numbers by name; those that were not finite are NaN."""
    found: dict[str, Any] = {"score": result.get("score")}
    tests = {name: _mapping(scores) for name, scores in _mapping(result.get("test")).items()}
    for name, scores in tests.items():
        found |= {f"test/{name}/{metric}": value for metric, value in scores.items()}
    again = next(iter(tests.values()), {})  # `metrics` repeats the first
    found |= {name: value for name, value in _mapping(result.get("metrics")).items() if name not in again}
    found |= {name: value for name, value in last.items() if name not in found}
    found |= {"best_step": _mapping(result.get("best")).get("meta_step"), "seconds": result.get("seconds")}
    broken = result.get("not_finite")
    paths = [path for path in broken if isinstance(path, str)] if isinstance(broken, list) else []
    nan = {re.sub(r"^metrics\.", "", path).replace(".", "/", 2 if path.startswith("test.") else 0) for path in paths}
    return {name: math.nan if name in nan else _float(v) for name, v in found.items() if name in nan or _is_number(v)}


def _last(folder: Path) -> dict[str, float]:
    """Return the numbers of the last meta-step, and of the last look at the selection stream."""
    try:
        with (folder / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    found: dict[str, float] = {}
    for record in filter(None, map(_record, reversed(lines))):
        names = ("meta_step", "meta_loss") if not found else ()
        looks = {n: v for n, v in record.items() if n in names or n.startswith("selection/")}
        found |= {name: value for name, value in looks.items() if name not in found}
        if any(name.startswith("selection/") for name in looks):
            break
    return found


def _record(line: str) -> dict[str, float]:
    with suppress(ValueError, RecursionError):
        return {
            str(k): _float(v)
            for k, v in _mapping(json.loads(line)).items()
            if _is_number(v) and math.isfinite(_float(v))
        }
    return {}


def _plain(value: Any) -> Any:
    """Return a number or a text; of anything else its text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _float(value: Any) -> float:
    """Return a number; one whose square would be none is infinite."""
    return value if abs(value) < 1e100 or value != value else math.copysign(math.inf, value > 0 or -1)
