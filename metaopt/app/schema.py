"""The fixed part of the config as a schema, and everything that can be wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from metaopt.app.targets import SAID, by_place, problems_of_target, wanted
from metaopt.base.errors import did_you_mean

Raw = dict[str, Any]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


def _check(node: Any, **added: Any) -> Any:
    """Hand the problems of a `_target_` node to pydantic."""
    details = [
        InitErrorDetails(type=PydanticCustomError(SAID, "{text}", {"text": text}), loc=place, input=None)
        for place, text in problems_of_target(node, **added)
    ]
    if details:
        raise ValidationError.from_exception_data("target", details)
    return node


def _check_one_or_named(node: Any) -> Any:
    several = isinstance(node, Mapping) and node and "_target_" not in node
    return TypeAdapter(dict[str, Target]).validate_python(node) if several else _check(node)


# Nodes with a `_target_`, by what the program itself adds when it calls what they name.
Target = Annotated[Any, PlainValidator(_check)]
Called = Annotated[Any, PlainValidator(partial(_check, supplied=1))]
Generator = Annotated[Any, PlainValidator(partial(_check, given=("batches",)))]
Transform = Annotated[Any, PlainValidator(partial(_check, per_step=1))]
FromMetaParams = Annotated[Any, PlainValidator(partial(_check, per_step=2))]
Targets = Annotated[Any, PlainValidator(_check_one_or_named)]


class Section(BaseModel):
    """A part of the config whose options are fixed; a default stands for an option that may be left out.

    What each option does is said where its value stands, in `conf/`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StageSchema(Section):
    data: Literal["train", "unlabelled", "validation"]
    model: Target
    optimizer: Called
    loss: Target
    num_steps: Count
    estimator: Target | None = None
    generate: Generator | None = None
    carry: Literal["always", "never"] | Count = "always"
    warmup_steps: CountOrZero = 0
    accumulate: Count = 1
    schedule: Called | None = None
    transform: Transform | None = None
    overrides: FromMetaParams | None = None
    initial: FromMetaParams | None = None
    autocast: Literal["bfloat16"] | None = None


class TrainerSchema(Section):
    meta_steps: CountOrZero
    seed: CountOrZero = 0
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    num_threads: Count | None = 1
    check_first_step: bool = True
    select_every: Count | None = None
    patience: Count | None = None
    validation_batches: Count = 1
    start_from: str | None = None


class FinalSchema(Section):
    compare: list[Literal["learned", "uniform"]]
    num_steps: Count | None = None
    save_models: bool = False


class OutputSchema(Section):
    save_models: bool = True
    plots: bool = True


class CheckSchema(Section):
    num_directions: CountOrZero = 2
    coordinates: Literal["few"] | dict[str, list[int]] | None = "few"
    steps: list[float] = []
    tolerance: Annotated[float, Field(ge=0)] = 1e-4
    warmup_steps: CountOrZero | None = None
    all_in_float64: bool = False
    show_sweep: bool = True
    seed: CountOrZero = 0


class FidelitySchema(Section):
    estimators: dict[str, Target]
    warmup_steps: CountOrZero | None = None
    meta_steps: CountOrZero = 0
    num_points: Count = 1
    point_every: Count = 10
    num_runs: Count = 5


class LimitsSchema(Section):
    num_steps: Count | None = None
    batches: Count | None = None


class RunSchema(Section):
    """The whole config; what `shared` stands for, the parts below, is checked where a stage takes it."""

    data: Target
    chain: list[str]
    stages: dict[str, StageSchema]
    meta_params: Targets
    objective: Target
    meta_optimizer: Called
    trainer: TrainerSchema
    final: FinalSchema
    output: OutputSchema
    check: CheckSchema
    fidelity: FidelitySchema
    limits: LimitsSchema
    logger: Called | None = None
    facts: dict[str, Any] | None = None
    model: Any = None
    optimizer: Any = None
    schedule: Any = None
    transform: Any = None
    estimator: Any = None
    product: Any = None
    loss: Any = None
    handover: Any = None


def options_of(section: str) -> list[str]:
    """Return the options of a section, such as `trainer` or `stages.student`; those of the whole config for ``."""
    schema: Any = RunSchema
    if section:
        is_stage = section.startswith("stages.")
        schema = StageSchema if is_stage else getattr(RunSchema.model_fields.get(section), "annotation", None)
    return list(getattr(schema, "model_fields", ()))


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
    try:
        RunSchema.model_validate(plain)
    except ValidationError as error:
        for place, details in by_place(error, plain).items():
            path, value, kind = ".".join(map(str, place)), details[0]["input"], details[0]["type"]
            if kind == SAID:
                taken = max((node for node in untouched if f"{path}.".startswith(f"{node}.")), key=len, default="")
                path = untouched.get(taken, taken) + path[len(taken) :]
                yield from (path + detail["msg"].replace("{path}", path) for detail in details)
            elif kind == "extra_forbidden":
                section, _, option = path.rpartition(".")
                yield f"{path}: there is no such option{did_you_mean(option, options_of(section))}"
            elif value == "???" or kind == "missing":
                yield f"{path} is {'missing' if kind == 'missing' else 'not set'}"
            elif not (isinstance(value, str) and "${" in value):
                yield f"{path} = {value!r}: must be {wanted(details)}"
    yield from _problems_of_names(plain, plain["stages"], [str(name) for name in plain["chain"]])


def _problems_of_names(plain: Raw, stages: Raw, chain: list[str]) -> Iterator[str]:
    """Yield stage names that are asked for and not there, and options at odds with each other."""
    unknown = [name for name in chain if name not in stages]
    for name in unknown:
        yield f"chain names {name!r}, but stages has no such stage{did_you_mean(name, stages)}"
    if not chain or len(set(chain)) < len(chain):
        yield f"chain = {chain}: at least one stage is needed, and each name once"
    elif not unknown:
        yield from _problems_of_upstreams(plain, chain)
        for name in (name for name in stages if name not in chain):
            yield f"stages.{name} is not in chain = {chain}; add it there, or remove it with ~stage@stages.{name}"
    for name in stages:
        if value_at(stages, f"{name}.carry") == "never" and value_at(stages, f"{name}.warmup_steps"):
            yield f"stages.{name}.warmup_steps would be lost: with carry: never every meta-step starts afresh"
    if value_at(plain, "trainer.patience") is not None and value_at(plain, "trainer.select_every") is None:
        yield "trainer.patience needs trainer.select_every: it counts looks at the selection stream"


def _problems_of_upstreams(plain: Raw, chain: list[str]) -> Iterator[str]:
    """Yield names of stages that metaopt's own parts ask for and that are not there, or not before them."""
    parts = [(f"stages.{name}.{part}", i) for i, name in enumerate(chain) for part in ("loss", "generate")]
    asking = [*((path, "upstream", chain[:i]) for path, i in parts), ("objective", "stage", chain)]
    for path, option, known in asking:
        asked = value_at(plain, f"{path}.{option}")
        if str(value_at(plain, f"{path}._target_")).startswith("metaopt.") and asked not in (None, "???", *known):
            which = (
                "no such stage" if option == "stage" else f"no stage of that name comes before it in chain = {chain}"
            )
            yield f"{path}.{option} = {asked!r}: {which}{did_you_mean(asked, known)}"
