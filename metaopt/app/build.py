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

from metaopt.app.tracking import load_meta_params
from metaopt.base.errors import ConfigError, MetaoptError
from metaopt.base.random_state import derived_seed, seeded
from metaopt.core.chain import Chain
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.core.stage import Stage
from metaopt.data.bundle import DataBundle
from metaopt.losses.distillation import FromUpstream
from metaopt.models.small import check_fits
from metaopt.trainer import MetaTrainer, Selection

_META_PARAMS, _VALIDATION = 1, 2  # what a seed is derived for, beside the stages


def build_data(config: DictConfig) -> DataBundle:
    """Return the data set's streams, each cut to `limits.batches`."""
    seed, limit = config.trainer.seed, config.limits.batches
    with seeded(seed):
        bundle = _call("data", _factory("data", config.data))
        if not isinstance(bundle, DataBundle):
            raise ConfigError(f"data: {config.data._target_} returned a {type(bundle).__name__}, not a DataBundle")
        if limit is None:
            return bundle
        cut = {name: list(itertools.islice(bundle.stream(name), limit)) for name in bundle.stream_names}
        return replace(bundle, **cut)


def build_chain(config: DictConfig, bundle: DataBundle) -> Chain:
    """Return the chain of stages that `chain` names, on the configured device and in the configured dtype."""
    stages: dict[str, Stage] = {}
    for name in config.chain:
        stages[name] = _stage(f"stages.{name}", config, config.stages[name], bundle, is_first=not stages)
        check_fits(stages[name].model, bundle.facts, name)
    return Chain(**stages)


def _stage(where: str, config: DictConfig, node: DictConfig, bundle: DataBundle, is_first: bool) -> Stage:
    batches = _call(f"{where}.data", bundle.stream, node.data)
    if node.get("generate") is not None:
        batches = _call(f"{where}.generate", _factory(f"{where}.generate", node.generate), batches=batches)
    loss = _call(f"{where}.loss", _factory(f"{where}.loss", node.loss))
    if is_first and isinstance(loss, FromUpstream):
        raise ConfigError(
            f"{where}.loss: {type(loss).__name__} learns from an earlier stage, and this is the first of chain = "
            f"{list(config.chain)}; put a supervised stage before it, or write stage@{where}=supervised"
        )
    slots = {slot: node[slot] for slot in ("schedule", "transform", "overrides", "initial") if node.get(slot)}
    estimator = None if node.get("estimator") is None else _call(where, _factory(f"{where}.estimator", node.estimator))
    return Stage(
        functools.partial(_model, f"{where}.model", _factory(f"{where}.model", node.model), *_place(config)),
        functools.partial(_call, f"{where}.optimizer", _factory(f"{where}.optimizer", node.optimizer)),
        loss,
        batches,
        node.num_steps,
        estimator,
        accumulate=node.get("accumulate", 1),
        autocast=node.get("autocast"),
        seed=derived_seed(config.trainer.seed, zlib.crc32(where.encode())),
        **{slot: _slot(f"{where}.{slot}", part, slot) for slot, part in slots.items()},
    )


def _slot(where: str, node: DictConfig, slot: str) -> Callable[..., Any]:
    """Return what a stage calls: a class is built once (metaopt.ClipNorm), a function gets its arguments."""
    factory = _factory(where, node)
    return _call(where, factory) if slot != "schedule" and isinstance(factory.func, type) else factory


def _model(where: str, factory: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    model = _call(where, factory)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{where}: the target returned a {type(model).__name__}, not an nn.Module")
    return model.to(device=device, dtype=dtype)


def _place(config: DictConfig) -> tuple[torch.device, torch.dtype]:
    name = config.trainer.device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"trainer.device = {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device, getattr(torch, config.trainer.dtype)


def build_meta_params(config: DictConfig) -> AnyMetaParameters:
    """Return what is learned: one module, or a mapping where the config names several."""
    node = config.meta_params
    nodes = {"": node} if "_target_" in node else dict(node)
    modules = {}
    with seeded(derived_seed(config.trainer.seed, _META_PARAMS)):
        for name, part in nodes.items():
            where = f"meta_params.{name}".rstrip(".")
            modules[name] = _model(where, _factory(where, part), *_place(config))
    meta_params: AnyMetaParameters = modules.get("", modules)
    if config.trainer.get("start_from") is not None:
        _call("trainer.start_from", load_meta_params, meta_params, config.trainer.start_from)
    return meta_params


def build_objective(config: DictConfig) -> Callable[..., Any]:
    """Return the meta-objective."""
    return _call("objective", _factory("objective", config.objective))


def build_meta_optimizer(config: DictConfig, meta_params: AnyMetaParameters) -> torch.optim.Optimizer | None:
    """Return the optimizer of the meta-parameters, or None when there is nothing to learn."""
    learned = list(named_tensors(meta_params).values())
    factory = _factory("meta_optimizer", config.meta_optimizer)
    return _call("meta_optimizer", factory, learned) if learned else None


def build_selection(config: DictConfig, bundle: DataBundle) -> Selection | None:
    """Return how the run looks at the selection stream (the last stage of the chain is scored), if there is one."""
    if bundle.selection is None:
        if config.trainer.patience is not None:
            raise ConfigError("trainer.patience: this data set has no 'selection' stream to look at")
        return None
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
    chain: Chain,
    objective: Callable[..., Any],
    meta_params: AnyMetaParameters,
    meta_optimizer: torch.optim.Optimizer | None,
    observers: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> MetaTrainer:
    """Return the outer loop."""
    return MetaTrainer(
        chain,
        objective,
        meta_params,
        meta_optimizer,
        bundle.validation,
        carry={name: config.stages[name].get("carry", "always") for name in config.chain},
        selection=build_selection(config, bundle),
        observers=observers,
        seed=derived_seed(config.trainer.seed, _VALIDATION),
        validation_batches=config.trainer.validation_batches,
    )


def build_logger(config: DictConfig, folder: Path) -> Any:
    """Return the logger that the config names, writing to the run's folder; None for none."""
    node = config.get("logger")
    return _call("logger", _factory("logger", node), folder) if node else None


# --- calling a target -------------------------------------------------------------------------------------------


def _factory(where: str, node: DictConfig) -> functools.partial[Any]:
    """Return a plain partial of a `_target_`, its nested targets built; Hydra's own costs 100 µs at every call."""
    deferred = _call(where, functools.partial(instantiate, node, _partial_=True, _convert_="all"))
    return functools.partial(deferred.func, *deferred.args, **deferred.keywords)


def _call(where: str, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a factory; whatever it raises becomes one message that says which part of the config it comes from."""
    try:
        return factory(*args, **kwargs)
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, MetaoptError):
            raise ConfigError(f"{where}: {cause}") from error
        frame = traceback.extract_tb(cause.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise ConfigError(f"{where}: {type(cause).__name__} at {place}: {cause}") from error


def stage_steps(config: DictConfig, meta_steps: int) -> dict[str, int]:
    """Return the plain training steps of each stage in the final comparison."""
    names = [str(name) for name in config.chain]
    given: int | None = config.final.num_steps
    if given is not None:
        return dict.fromkeys(names, given)
    return {name: config.stages[name].warmup_steps + meta_steps * config.stages[name].num_steps for name in names}
