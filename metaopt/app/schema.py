"""The fixed part of the config as a schema, and everything that can be wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metaopt.app.targets import Problems, by_place, problems_of_targets, wanted
from metaopt.base.errors import did_you_mean

SHARED_PARTS = ("model", "optimizer", "schedule", "transform", "estimator", "product", "loss", "handover")
Raw = dict[str, Any]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Target(BaseModel):
    """A node that says what to build; its arguments are checked against the signature of what it names."""

    target: Any = Field(alias="_target_")


class Section(BaseModel):
    """A part of the config whose options are fixed; a default stands for an option that may be left out.

    What each option does is said where its value stands, in `conf/`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StageSchema(Section):
    data: Literal["train", "unlabelled", "validation"]
    model: Target
    optimizer: Target
    loss: Target
    num_steps: Count
    estimator: Target | None = None
    generate: Target | None = None
    carry: Literal["always", "never"] | Count = "always"
    warmup_steps: CountOrZero = 0
    accumulate: Count = 1
    schedule: Target | None = None
    transform: Target | None = None
    overrides: Target | None = None
    initial: Target | None = None
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
    checkpoint_every: Count | None = None
    keep_checkpoints: Count = 2
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
    """The whole config but the shared parts, which are checked where a stage takes them."""

    data: Target
    chain: list[str]
    stages: dict[str, StageSchema]
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
    resume: str | None = None
    resume_force: bool = False
    overwrite: bool = False


def options_of(section: str) -> list[str]:
    """Return the options of a section, such as `trainer` or `stages.student`; those of the whole config for ``."""
    if not section:
        return [*RunSchema.model_fields, *SHARED_PARTS]
    schema = (
        StageSchema if section.startswith("stages.") else getattr(RunSchema.model_fields.get(section), "annotation", 0)
    )
    return list(getattr(schema, "model_fields", ()))


def value_at(raw: Any, path: str) -> Any:
    """Return the value at a dotted path of plain containers, or None."""
    for key in path.split("."):
        raw = raw.get(key) if isinstance(raw, Mapping) else None
    return raw


def problems_of(plain: Raw, taken: Mapping[str, str]) -> Iterator[str]:
    """Yield all that is wrong with a config whose interpolations are resolved, but for those of facts.

    `taken` says which node of a stage took which shared part: where the two are the same, the problem is told of the
    shared one.
    """
    own = {name: part for name, part in plain.items() if name not in SHARED_PARTS}
    for path, text in (*_problems_of_options(own), *problems_of_targets(own)):
        node = max((node for node in taken if f"{path}.".startswith(f"{node}.")), key=len, default="")
        shared = taken.get(node, "") + path.removeprefix(node)
        path = shared if value_at(plain, shared) == value_at(plain, path) else path
        yield path + text.replace("{path}", path)
    yield from _problems_of_names(plain, plain["stages"], [str(name) for name in plain["chain"]])


def _problems_of_options(plain: Raw) -> Problems:
    try:
        RunSchema.model_validate(plain)
    except ValidationError as error:
        for place, details in by_place(error, plain).items():
            path, value, kind = ".".join(map(str, place)), details[0]["input"], details[0]["type"]
            section, _, option = path.rpartition(".")
            if kind == "extra_forbidden":
                yield path, f": there is no such option{did_you_mean(option, options_of(section))}"
            elif value == "???" or kind == "missing":
                yield path, " is missing" if kind == "missing" else " is not set"
            elif "${" not in str(value):
                yield path, f" = {value!r}: must be {wanted(details)}"


def _problems_of_names(plain: Raw, stages: Raw, chain: list[str]) -> Iterator[str]:
    """Yield stage names that are asked for and not there, and options at odds with each other."""
    unknown = [name for name in chain if name not in stages]
    for name in unknown:
        yield f"chain names {name!r}, but stages has no such stage{did_you_mean(name, stages)}"
    if not chain or len(set(chain)) < len(chain):
        yield f"chain = {chain}: at least one stage is needed, and each name once"
    elif not unknown:
        for name in (name for name in stages if name not in chain):
            yield f"stages.{name} is not in chain = {chain}; add it there, or remove it with ~stage@stages.{name}"
    for name in stages:
        if value_at(stages, f"{name}.carry") == "never" and value_at(stages, f"{name}.warmup_steps"):
            yield f"stages.{name}.warmup_steps would be lost: with carry: never every meta-step starts afresh"
    if value_at(plain, "trainer.patience") is not None and value_at(plain, "trainer.select_every") is None:
        yield "trainer.patience needs trainer.select_every: it counts looks at the selection stream"
