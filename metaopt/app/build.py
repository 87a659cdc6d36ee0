"""Library objects from the config: one function per part of a run, in the order data flows."""

from __future__ import annotations

import functools
import itertools
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from metaopt.app.exits import exit_place
from metaopt.app.tracking import load_meta_params
from metaopt.base.errors import ConfigError, MetaoptError, first_line
from metaopt.base.streams import derived_seed, seeded
from metaopt.core.chain import Chain
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.core.stage import Stage
from metaopt.data.bundle import DataBundle
from metaopt.losses.distillation import FromUpstream
from metaopt.models.small import check_fits
from metaopt.saving.checkpoints import Checkpoints
from metaopt.trainer import MetaTrainer, Selection

SLOTS = ("schedule", "transform", "overrides", "initial")
_META_PARAMS, _VALIDATION = 1, 2  # what a seed is derived for, beside the stages


def build_data(config: DictConfig) -> DataBundle:
    """Return the data set's streams, each cut to `limits.batches`."""
    limit = config.limits.batches
    with seeded(config.trainer.seed):
        bundle = build("data", config.data, kind=DataBundle)
        if limit is None:
            return bundle
        return replace(bundle, **{n: list(itertools.islice(bundle.stream(n), limit)) for n in bundle.stream_names})


def build_chain(config: DictConfig, bundle: DataBundle) -> Chain:
    """Return the chain of stages that `chain` names, on the configured device and in the configured dtype."""
    stages: dict[str, Stage] = {}
    for name in config.chain:
        stages[name] = _stage(f"stages.{name}", config, config.stages[name], bundle, is_first=not stages)
        check_fits(stages[name].model, bundle.facts, name)
    return Chain(**stages)


def _stage(where: str, config: DictConfig, node: DictConfig, bundle: DataBundle, is_first: bool) -> Stage:
    loss = build(f"{where}.loss", node.loss)
    if is_first and isinstance(loss, FromUpstream):
        raise ConfigError(
            f"{where}.loss: {type(loss).__name__} learns from an earlier stage, and this is the first of chain = "
            f"{list(config.chain)}; put a supervised stage before it, or write stage@{where}=supervised"
        )
    batches = call(f"{where}.data", bundle.stream, node.data)
    if node.get("generate") is not None:
        batches = build(f"{where}.generate", node.generate, batches=batches)
    return Stage(
        functools.partial(_model, f"{where}.model", factory(f"{where}.model", node.model), config),
        functools.partial(call, f"{where}.optimizer", factory(f"{where}.optimizer", node.optimizer)),
        loss,
        batches,
        node.num_steps,
        build(f"{where}.estimator", node.estimator) if node.get("estimator") else None,
        accumulate=node.get("accumulate", 1),
        autocast=node.get("autocast"),
        seed=derived_seed(config.trainer.seed, zlib.crc32(where.encode())),
        **{slot: _slot(f"{where}.{slot}", node[slot]) for slot in SLOTS if node.get(slot)},
    )


def _slot(where: str, node: DictConfig) -> Callable[..., Any]:
    """Return what a stage calls: a class is built once (metaopt.ClipNorm), a function gets its arguments."""
    made = factory(where, node)
    is_schedule = where.endswith(".schedule")  # a class too is built anew by the stage, around its optimizer
    return call(where, made) if isinstance(made.func, type) and not is_schedule else made


def _model(where: str, made: Callable[[], Any], config: DictConfig) -> nn.Module:
    device, dtype = config.trainer.device, getattr(torch, config.trainer.dtype)
    try:
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"trainer.device = {device!r} cannot be used here: {first_line(error)}") from error
    return call(where, made, kind=nn.Module).to(device=device, dtype=dtype)


def build_meta_params(config: DictConfig) -> AnyMetaParameters:
    """Return what is learned: one module, or a mapping where the config names several."""
    node, start_from = config.meta_params, config.trainer.get("start_from")
    nodes = {"": node} if "_target_" in node else node
    places = {name: f"meta_params.{name}".removesuffix(".") for name in nodes}
    with seeded(derived_seed(config.trainer.seed, _META_PARAMS)):
        named = {name: _model(place, factory(place, nodes[name]), config) for name, place in places.items()}
    meta_params: AnyMetaParameters = named.get("", named)
    if start_from is not None:
        call("trainer.start_from", load_meta_params, meta_params, start_from)
    return meta_params


def build_meta_optimizer(config: DictConfig, meta_params: AnyMetaParameters) -> torch.optim.Optimizer | None:
    """Return the optimizer of the meta-parameters, or None when there is nothing to learn."""
    learned = list(named_tensors(meta_params).values())
    return build("meta_optimizer", config.meta_optimizer, learned) if learned else None


def build_selection(config: DictConfig, bundle: DataBundle) -> Selection:
    """Return how the run looks at the selection stream: the last stage of the chain is scored."""
    return Selection(
        list(bundle.selection),
        stage=config.chain[-1],
        score=bundle.score,
        metric=bundle.selection_metric,
        every=config.trainer.select_every or max(config.trainer.meta_steps, 1),
        patience=config.trainer.patience,
    )


def build_trainer(
    config: DictConfig,
    bundle: DataBundle,
    observers: Sequence[Callable[[dict[str, Any]], None]] = (),
    checkpoints: Checkpoints | None = None,
) -> MetaTrainer:
    """Return the outer loop over the chain, with everything else that it holds."""
    chain, meta_params = build_chain(config, bundle), build_meta_params(config)
    return MetaTrainer(
        chain,
        build("objective", config.objective),
        meta_params,
        build_meta_optimizer(config, meta_params),
        bundle.validation,
        carry={name: config.stages[name].get("carry", "always") for name in config.chain},
        selection=build_selection(config, bundle),
        observers=observers,
        seed=derived_seed(config.trainer.seed, _VALIDATION),
        validation_batches=config.trainer.validation_batches,
        checkpoint=checkpoints,
    )


def build(where: str, node: DictConfig, *args: Any, kind: type = object, **kwargs: Any) -> Any:
    """Return what a `_target_` node makes of its own arguments and these."""
    return call(where, factory(where, node), *args, kind=kind, **kwargs)


def factory(where: str, node: DictConfig) -> functools.partial[Any]:
    """Return a plain partial of a `_target_`, its nested targets built; Hydra's own costs 100 µs at every call."""
    deferred = call(where, instantiate, node, _partial_=True, _convert_="all")
    return functools.partial(deferred.func, *deferred.args, **deferred.keywords)


def call(where: str, made: Callable[..., Any], *args: Any, kind: type = object, **kwargs: Any) -> Any:
    """Call a factory; what it raises, or returns of another kind, is told with the part of the config it comes from."""
    try:
        found = made(*args, **kwargs)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not exit_place(error):
            raise
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, SystemExit):
            raise ConfigError(f"{where}: {exit_place(cause)}") from error
        if isinstance(cause, MetaoptError):
            raise ConfigError(f"{where}: {cause}") from error
        frame = traceback.extract_tb(cause.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise ConfigError(f"{where}: {type(cause).__name__} at {place}: {cause}") from error
    if not isinstance(found, kind):
        raise ConfigError(f"{where}: the target returned a {type(found).__name__}, not a {kind.__name__}")
    return found


def stage_steps(config: DictConfig, meta_steps: int) -> dict[str, int]:
    """Return the plain training steps of each stage in the final comparison."""
    given, stages = config.final.num_steps, {str(name): config.stages[name] for name in config.chain}
    return {n: s.warmup_steps + meta_steps * s.num_steps if given is None else given for n, s in stages.items()}
