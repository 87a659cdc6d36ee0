"""The composed config made ready: shared parts given to the stages, facts of the data filled in, all errors at once."""

from __future__ import annotations

import re
import traceback
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metaopt.app.schema import SHARED_PARTS, Raw, options_of, problems_of, value_at
from metaopt.base.errors import ConfigError, MetaoptError, did_you_mean, first_line, own_lines, was_told
from metaopt.saving.text import printable

LONGEST, MOST = 1000, 8  # characters of a line of a message; lines of one that nothing has foreseen
SHARED = "_shared_"
ASKS = " asks for "  # a fact of the data
# What another package brings: option → the extra, and the package.
EXTRAS = {
    "hydra/launcher/joblib": ("joblib", "hydra-joblib-launcher"),
    "hydra/launcher/submitit_local": ("submitit", "hydra-submitit-launcher"),
    "hydra/launcher/submitit_slurm": ("submitit", "hydra-submitit-launcher"),
    "hydra/launcher/ray": ("ray", "hydra-ray-launcher"),
    "hydra/sweeper/optuna": ("optuna", "hydra-optuna-sweeper"),
}


def prepare(
    config: DictConfig, overrides: Sequence[str] = (), choices: Mapping[str, str | None] | None = None
) -> DictConfig:
    """Return the config as Hydra composed it with every stage's parts filled in and the limits applied.

    `overrides` were written on the command line, such as `optimizer.lr=0.1`; by `choices`, the option of each group
    (`hydra.runtime.choices`), an experiment's values that reach no stage are found.

    Raises:
        ConfigError: lists everything that is wrong with it.
    """
    raw = _unresolved(config)
    if not isinstance(raw.get("stages"), Mapping) or not isinstance(raw.get("chain"), list):
        raise ConfigError("the config needs `chain`, a list of names, and `stages`, a mapping from name to stage")
    taken = _fill_in_shared_parts(raw)
    problems = list(_unreached(raw, taken.values(), overrides, choices or {}))
    _apply_limits(raw)
    filled = OmegaConf.create(raw)
    plain, unresolved = _resolved(raw, filled)
    problems += [problem for problem in unresolved if ASKS not in problem]
    _raise_if_any([*problems, *problems_of(plain, taken)])
    return filled


def with_facts(config: DictConfig, facts: Mapping[str, Any]) -> DictConfig:
    """Return the config with what the data say about themselves, so that `${facts.vocab_size}` resolves.

    Raises:
        ConfigError: lists every fact that the config asks for and the data do not give.
    """
    raw = _unresolved(config)
    raw["facts"] = {name: value for name, value in facts.items() if value is not None}
    filled = OmegaConf.create(raw, flags={"allow_objects": True})
    plain, unresolved = _resolved(raw, filled)
    problems = [problem for problem in unresolved if problem.split(".")[0] not in (*SHARED_PARTS, "facts")]
    if any(ASKS in problem for problem in problems):
        gives = f"the data set gives only: {', '.join(raw['facts']) or 'none'}"
        problems += [f"{gives}; choose options that fit it (model, handover, meta_params), or let it give more"]
    _raise_if_any(problems or list(problems_of(plain, {})))
    return filled


def with_note(error: BaseException) -> str:
    """Return what a command shows of an exception: its message, of a user's own with its kind, and its note."""
    text, told = str(error), was_told(error) or ""
    text = text if isinstance(error, MetaoptError) else f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if not told or told in text else f"{text}\n{told}"


def told(error: Exception) -> str:
    """Return what a command says of an exception, as text that can be shown."""
    if was_told(error):
        said = with_note(error)
    else:
        said = explained(error) if isinstance(error, (MetaoptError, HydraException)) else _unforeseen(error)
    return "\n".join(printable(line.expandtabs(4), LONGEST) for line in said.splitlines())


def _unforeseen(error: Exception) -> str:
    """Return what an error says that nothing has foreseen, the file that was read, and the user's own lines."""
    frames = list(traceback.walk_tb(error.__traceback__))
    read = [frame.f_locals.get("file_") for frame, _ in frames if frame.f_globals["__name__"] == "omegaconf.omegaconf"]
    files = [f"{name}: " for file in read if (name := getattr(file, "name", "")) and name not in str(error)]
    last = Path(frames[-1][0].f_code.co_filename).name
    place = f"  at {last}, line {frames[-1][1]}; the whole traceback: HYDRA_FULL_ERROR=1 metaopt ..."
    said = "\n".join(with_note(error).splitlines()[: 1 if isinstance(error, RecursionError) else MOST])
    return "\n".join(["".join(files[:1]) + said, *own_lines(error.__traceback__), place])


def explained(error: Exception) -> str:
    """Return the message of an error, and what an option that Hydra does not know may have meant."""
    text = str(error)
    if absent := re.search(rf"({'|'.join(EXTRAS)})\b", text):
        extra, package = EXTRAS[absent[0]]
        return f"{first_line(error)}\n{absent[0]} comes with the extra `{extra}`: pip install {package}"
    if missing := re.search(r"Could not find '(.*/)?(.*)'\s+Available options in '.*':\n((?:\t.*\n?)+)", text):
        near = did_you_mean(missing[2], missing[3].split(), others=False)
        return f"{text}\n{missing[1] or ''}{missing[2]}: there is no such option{near}" if near else text
    unknown = re.match(r"(?:In '.*': )?Could not override '([\w.@/]+)'", text)
    if unknown is None:
        return text
    section, _, option = unknown[1].rpartition(".")
    near = did_you_mean(option, options_of(section), others=False)
    return f"{text}\n{unknown[1]}: there is no such option{near}" if near else text


def as_yaml(config: DictConfig) -> str:
    """Return the config as text; facts that YAML cannot hold are left out."""
    raw = _unresolved(config)
    plain = (bool, int, float, str, list)
    raw["facts"] = {name: fact for name, fact in (raw["facts"] or {}).items() if isinstance(fact, plain)}
    return OmegaConf.to_yaml(OmegaConf.create(raw))


def _unresolved(config: DictConfig) -> Raw:
    return typing.cast(Raw, OmegaConf.to_container(config, resolve=False))


def _raise_if_any(problems: Sequence[str]) -> None:
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        raise ConfigError(f"the config cannot be used: {problems[0]}")
    if problems:
        raise ConfigError(f"the config has {len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems))


def _fill_in_shared_parts(raw: Raw) -> dict[str, str]:
    """Put the shared parts under the stages' own values; return which node took which part: path → path."""
    taken: dict[str, str] = {}

    def filled(node: Any, path: str) -> Any:
        if isinstance(node, Mapping) and SHARED in node:
            source, own = node[SHARED], {key: value for key, value in node.items() if key != SHARED}
            if "_target_" in own:  # it takes no argument from another one's
                return filled(own, path)
            taken[path] = source
            node = _merged(value_at(raw, source), own) if own else value_at(raw, source)
        return {k: filled(v, f"{path}.{k}") for k, v in node.items()} if isinstance(node, Mapping) else node

    raw["stages"] = {name: filled(stage, f"stages.{name}") for name, stage in raw["stages"].items()}
    return taken


def _merged(under: Any, over: Any) -> Any:
    if not (isinstance(under, Mapping) and isinstance(over, Mapping)):
        return over
    return {**under, **{key: _merged(under.get(key), value) for key, value in over.items()}}


def _unreached(
    raw: Raw, taken: Collection[str], overrides: Sequence[str], choices: Mapping[str, str | None]
) -> Iterator[str]:
    """Yield each change of a shared part that no stage takes."""
    keys = [override.split("=")[0].lstrip("+~") for override in overrides]
    for part in (part for part in SHARED_PARTS if not any(f"{source}.".startswith(f"{part}.") for source in taken)):
        written = [key for key in keys if f"{key}.".startswith(f"{part}.")]
        changed = dict.fromkeys([*written, *_changes(_as_chosen(part, raw, choices), raw.get(part), part)])
        if part == "product" and changed:
            yield f"{', '.join(changed)}: no stage's estimator has one; write estimator=checkpointed beside it, say"
            continue
        for key in changed:
            group = f"{part}@stages.{{stage}}" + ("" if part == "handover" else f".{part}")
            spelling = group if key == part else f"stages.{{stage}}.{key.removeprefix('handover.')}"
            right = " or ".join(spelling.format(stage=stage) + "=..." for stage in raw["chain"])
            yield f"{key} reaches no stage, since none of them takes the shared {part}; write {right}"


def _as_chosen(part: str, raw: Raw, choices: Mapping[str, str | None]) -> Any:
    """Return a shared part as the chosen option's own file has it; as it is now, where that cannot be told."""
    try:
        return _unresolved(compose(f"{part}/{choices[part]}")).get(part)
    except (KeyError, HydraException):  # no such choice, or an option of a user's folder that only this config knows
        return raw.get(part)


def _changes(before: Any, after: Any, path: str) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            yield from _changes(before.get(key), after.get(key), f"{path}.{key}")
    elif before != after:
        yield path


def _apply_limits(raw: Raw) -> None:
    limit = value_at(raw, "limits.num_steps")
    if not isinstance(limit, int) or limit < 1:
        return
    for part in (*raw["stages"].values(), raw.get("final")):
        for key in ("num_steps", "warmup_steps"):
            if isinstance(part, dict) and isinstance(part.get(key), int):
                part[key] = min(part[key], limit)


def _resolved(raw: Raw, config: DictConfig) -> tuple[Raw, list[str]]:
    """Return the config as plain containers, interpolations resolved, and those that cannot be, left as they are."""
    problems: list[str] = []

    def resolve(node: Any, parent: Any, key: Any, path: str) -> Any:
        if isinstance(node, Mapping):
            return {k: resolve(v, parent[key], k, f"{path}.{k}") for k, v in node.items()}
        if isinstance(node, list):
            return [resolve(v, parent[key], i, f"{path}.{i}") for i, v in enumerate(node)]
        if not isinstance(node, str) or "${" not in node:
            return node
        try:
            value = parent[key]
        except OmegaConfBaseException as error:
            facts = ", ".join(re.findall(r"\$\{(facts\.[^}]*)\}", node))
            problems.append(f"{path}{ASKS}{facts}" if facts else f"{path} = {node}: {first_line(error)}")
            return node
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value

    return {key: resolve(value, config, key, key) for key, value in raw.items()}, problems
