"""The fixed part of the config as a schema, and everything that can be wrong with it."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from metaopt.errors import did_you_mean
from metaopt.targets import describe, fits, names_class, problems_of_target

Raw = dict[str, Any]


class Target:
    """A node with a `_target_`; its arguments are checked against the signature of what it names."""


def at_least(minimum: int, default: Any = MISSING) -> Any:
    """Declare a number that has a lower bound."""
    return field(default=default, metadata={"minimum": minimum})


@dataclass
class StageSchema:
    """`stages.<name>`."""

    data: Literal["train", "unlabelled", "validation"]
    model: Target
    optimizer: Target
    loss: Target
    num_steps: int = at_least(1)
    estimator: Target | None = None
    generate: Target | None = None
    carry: Literal["always", "never"] | int = at_least(1, "always")
    warmup_steps: int = at_least(0, 0)
    accumulate: int = at_least(1, 1)
    schedule: Target | None = None
    transform: Target | None = None
    overrides: Target | None = None
    initial: Target | None = None
    autocast: Literal["bfloat16"] | None = None


@dataclass
class TrainerSchema:
    """`trainer`."""

    meta_steps: int = at_least(0)
    seed: int = at_least(0, 0)
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    num_threads: int | None = at_least(1, 1)
    check_first_step: bool = True
    select_every: int | None = at_least(1, None)
    patience: int | None = at_least(1, None)
    validation_batches: int = at_least(1, 1)
    start_from: str | None = None


@dataclass
class FinalSchema:
    """`final`: fresh models trained with A frozen."""

    compare: list[Literal["learned", "uniform"]]
    num_steps: int | None = at_least(1, None)
    save_models: bool = False


@dataclass
class OutputSchema:
    """`output`."""

    save_models: bool = True
    plots: bool = True


@dataclass
class CheckSchema:
    """`check`: what `metaopt-check` compares."""

    num_directions: int = at_least(0, 2)
    coordinates: Literal["few"] | dict[str, list[int]] | None = "few"
    steps: list[float] = field(default_factory=lambda: [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    tolerance: float = at_least(0, 1e-4)
    warmup_steps: int | None = at_least(0, None)
    all_in_float64: bool = False
    show_sweep: bool = True
    seed: int = at_least(0, 0)


@dataclass
class FidelitySchema:
    """`fidelity`: what `metaopt-fidelity` compares."""

    estimators: dict[str, Any]
    warmup_steps: int | None = at_least(0, None)
    meta_steps: int = at_least(0, 0)
    num_points: int = at_least(1, 1)
    point_every: int = at_least(1, 10)
    num_runs: int = at_least(1, 5)


@dataclass
class LimitsSchema:
    """`limits`."""

    num_steps: int | None = at_least(1, None)
    batches: int | None = at_least(1, None)


@dataclass
class RunSchema:
    """The top of the config; `reference` is gone by the time it is checked."""

    data: Target
    chain: list[str]
    stages: dict[str, Any]
    meta_params: dict[str, Any]
    objective: Target
    meta_optimizer: Target
    trainer: TrainerSchema
    final: FinalSchema
    output: OutputSchema
    check: CheckSchema
    fidelity: FidelitySchema
    limits: LimitsSchema
    logger: Target | None = None
    facts: dict[str, Any] | None = None
    model: Any = None
    optimizer: Any = None
    schedule: Any = None
    transform: Any = None
    estimator: Any = None
    product: Any = None
    loss: Any = None
    handover: Any = None


SECTIONS: dict[str, type] = {
    "": RunSchema,
    "stages.*": StageSchema,
    "trainer": TrainerSchema,
    "final": FinalSchema,
    "output": OutputSchema,
    "check": CheckSchema,
    "fidelity": FidelitySchema,
    "limits": LimitsSchema,
}


def value_at(raw: Any, path: str) -> Any:
    """Return the value at a dotted path of plain containers, or None."""
    for key in path.split("."):
        raw = raw.get(key) if isinstance(raw, Mapping) else None
    return raw


def problems_of(plain: Raw, untouched: Mapping[str, str]) -> Iterator[str]:
    """Yield all that is wrong with a config whose interpolations are resolved, but for those of facts.

    Args:
        plain: the config as plain containers, shared parts filled in.
        untouched: node path → shared path of what a stage takes as it is; its problems are told of the shared part.
    """
    yield from _problems_of_section("", plain, RunSchema, untouched)
    chain, stages = plain["chain"], plain["stages"]
    unknown = [name for name in chain if name not in stages]
    for name in unknown:
        yield f"chain names {name!r}, but stages has no such stage{did_you_mean(name, stages)}"
    if not chain or len(set(chain)) < len(chain):
        yield f"chain = {chain}: at least one stage is needed, and each name once"
    elif not unknown:
        yield from _problems_of_names(plain)
    for name, stage in stages.items():
        if chain and not unknown and name not in chain:
            yield f"stages.{name} is not in chain = {chain}; add it there, or remove it with ~stage@stages.{name}"
        if not isinstance(stage, Mapping):
            yield f"stages.{name} is empty; write stage@stages.{name}=supervised, say"
        else:
            yield from _problems_of_section(f"stages.{name}", stage, StageSchema, untouched)
    yield from _problems_of_meta_params(plain.get("meta_params"))
    yield from _problems_of_targets("fidelity.estimators", value_at(plain, "fidelity.estimators"))


def _problems_of_section(where: str, node: Any, schema: type, untouched: Mapping[str, str]) -> Iterator[str]:
    """Yield unknown, missing and mistyped options of one fixed part of the config."""
    if not isinstance(node, Mapping):
        yield f"{where} = {node!r}: a mapping is needed"
        return
    hints = typing.get_type_hints(schema)
    prefix = f"{where}." if where else ""
    for key in node:
        if key not in hints:
            yield f"{prefix}{key}: there is no such option{did_you_mean(key, hints)}"
    for option in fields(schema):
        path, hint = prefix + option.name, hints[option.name]
        if option.name not in node:
            if option.default is MISSING:
                yield f"{path} is missing"
        elif node[option.name] == "???":
            yield f"{path} is not set"
        elif hasattr(hint, "__dataclass_fields__"):
            yield from _problems_of_section(path, node[option.name], hint, untouched)
        elif Target in (hint, *typing.get_args(hint)):
            if node[option.name] is not None or hint is Target:
                supplied, given = _supplied(option.name, node[option.name])
                yield from problems_of_target(untouched.get(path, path), node[option.name], supplied, given)
        else:
            yield from _problems_of_value(path, node[option.name], hint, option.metadata.get("minimum"))


# What the program itself adds when it calls these targets: how many positional arguments, and which names.
_SUPPLIED: dict[str, tuple[int, tuple[str, ...]]] = {
    "optimizer": (1, ()),
    "meta_optimizer": (1, ()),
    "schedule": (1, ()),
    "generate": (0, ("batches",)),
    "logger": (1, ()),
}


# Slots of a stage: a class is built from its arguments, a function gets this many more at every step.
_SLOTS = {"transform": 1, "overrides": 2, "initial": 2}


def _supplied(option: str, node: Any) -> tuple[int, tuple[str, ...]]:
    if option in _SLOTS and isinstance(node, Mapping):
        return (0 if names_class(node.get("_target_")) else _SLOTS[option]), ()
    return _SUPPLIED.get(option, (0, ()))


def _problems_of_value(path: str, value: Any, hint: Any, minimum: float | None) -> Iterator[str]:
    if not fits(value, hint):
        words = [word for option in (hint, *typing.get_args(hint)) for word in typing.get_args(option)]
        near = did_you_mean(value, [w for w in words if isinstance(w, str)]) if isinstance(value, str) else ""
        yield f"{path} = {value!r}: must be {describe(hint)}" + (near if "did you mean" in near else "")
    elif minimum is not None and isinstance(value, (int, float)) and value < minimum:
        yield f"{path} = {value}: must be at least {minimum}"


def _problems_of_meta_params(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping) and node and "_target_" not in node:
        yield from _problems_of_targets("meta_params", node)
    else:
        yield from problems_of_target("meta_params", node)


def _problems_of_targets(where: str, nodes: Any) -> Iterator[str]:
    for name, node in (nodes if isinstance(nodes, Mapping) else {}).items():
        yield from problems_of_target(f"{where}.{name}", node)


def _problems_of_names(plain: Raw) -> Iterator[str]:
    """Yield stage names that metaopt's own parts ask for and the chain does not have, and options at odds."""
    chain = [str(name) for name in plain["chain"]]
    for place, name in enumerate(chain):
        for part in ("loss", "generate"):
            node = value_at(plain, f"stages.{name}.{part}")
            if _is_ours(node) and node.get("upstream") not in (None, "???", *chain[:place]):
                yield (
                    f"stages.{name}.{part}.upstream = {node['upstream']!r}: no stage of that name comes before "
                    f"{name!r} in chain = {chain}{did_you_mean(node['upstream'], chain[:place])}"
                )
    stage = value_at(plain, "objective.stage")
    if _is_ours(plain.get("objective")) and stage not in (None, "???", *chain):
        yield f"objective.stage = {stage!r}: no such stage{did_you_mean(stage, chain)}"
    for name in chain:
        if value_at(plain, f"stages.{name}.carry") == "never" and value_at(plain, f"stages.{name}.warmup_steps"):
            yield f"stages.{name}.warmup_steps would be lost: with carry: never every meta-step starts afresh"
    if value_at(plain, "trainer.patience") is not None and value_at(plain, "trainer.select_every") is None:
        yield "trainer.patience needs trainer.select_every: it counts looks at the selection stream"


def _is_ours(node: Any) -> bool:
    return isinstance(node, Mapping) and str(node.get("_target_")).startswith("metaopt.")
