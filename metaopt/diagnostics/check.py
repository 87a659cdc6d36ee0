"""Central differences of the whole pipeline, set beside the hypergradient."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError, MetaoptError, StageError, did_you_mean, is_library
from metaopt.base.streams import seeded
from metaopt.core.chain import Chain
from metaopt.core.contracts import MetaObjective
from metaopt.core.guards import moved_buffers
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.diagnostics.backward import hypergradient
from metaopt.diagnostics.check_result import CheckResult, CheckRow
from metaopt.diagnostics.differences import NUM_NOISE_RUNS, Pipeline, sweep
from metaopt.diagnostics.precision import AllInFloat64, Watch

STEPS = (1e-3, 1e-4, 1e-5, 1e-6)
Coordinates = Mapping[str, Sequence[int]]


def check_hypergradient(
    chain: Chain,
    objective: MetaObjective,
    batch: Any,
    meta_params: AnyMetaParameters,
    *,
    num_directions: int = 1,
    coordinates: Coordinates | None = None,
    steps: Sequence[float] = STEPS,
    tolerance: float = 1e-4,
    seed: int = 0,
    all_in_float64: bool = False,
    on_run: Callable[[], object] = lambda: None,
) -> CheckResult:
    """Compare the hypergradient with central differences of the whole pipeline, on float64 copies.

    `(f(φ + h d) − f(φ − h d)) / 2h`, where f runs every stage with torch's own optimizers and no graph, over a sweep
    of h that tells rounding from truncation. The user's chain and meta-parameters are not changed.

    Args:
        chain, objective, batch, meta_params: as in a meta-step.
        num_directions: random unit directions per meta-parameter, drawn from `seed`.
        coordinates: meta-parameter name → flat indices to check one by one.
        steps: of the sweep, relative to a unit direction.
        tolerance: relative error up to which the two agree.
        all_in_float64: leave out the casts to float32 inside models and losses, which hide small differences.
        on_run: called after each run of the pipeline, for a progress bar: `num_runs(...)` times in all.

    Raises:
        ConfigError: an option that cannot be used.
        StageError: a plug-in keeps a float32 tensor that does not go with the float64 copies.
        MissingPathError, NonFiniteError: there is no hypergradient to check.
    """
    if len(steps) < 2 or any(step <= 0 for step in steps) or len(set(steps)) < len(steps):
        raise ConfigError(f"steps={list(steps)}: a sweep needs two steps or more, all above 0 and each once")
    watch = Watch()
    with AllInFloat64() if all_in_float64 else nullcontext(), explained_dtypes(watch):
        pipeline = Pipeline(chain, objective, batch, meta_params, seed, on_run).in_float64()
        directions = _directions(named_tensors(pipeline.meta_params), num_directions, coordinates or {}, seed)
        with watch:
            trained, loss = pipeline.run()
        gradient, biases = hypergradient(loss, pipeline.meta_params), pipeline.biases
        first, _, towards = directions[0]
        here, noise = pipeline.noise(first, towards)
        rows = []
        for name, label, direction in directions:
            ends = pipeline.along(name, direction, [sign * h for h in steps for sign in (1, -1)])
            slope, found = float((gradient[name] * direction).sum()), sweep(ends, here, steps, noise)
            if not slope and not any(difference for _, difference in found.sweep):
                found = replace(found, uncertainty=0.0)  # an entry that no batch holds agrees on zero
            rows.append(CheckRow(name, label, slope, tolerance=tolerance, biased=bool(biases), **vars(found)))
        keepers = pipeline.keepers(first, towards, max(steps), noise)
    approximate = {name: stage for name, stage in chain.stages.items() if not stage.estimator.exact}
    return CheckResult(
        rows=tuple(rows),
        meta_loss=float(loss.detach()),
        gradient=gradient,
        moved=tuple(f"{stage}.{buffer}" for stage, model in trained.items() for buffer in moved_buffers(model)),
        plain_loss=here,
        noise=noise,
        casts=watch.casts,
        in_place=watch.in_place,
        biases=biases,
        inexact=tuple(f"{stage.estimator!r} of stage {name!r}" for name, stage in approximate.items()),
        keepers=keepers,
    )


def num_runs(
    meta_params: AnyMetaParameters, num_directions: int, coordinates: Coordinates, steps: Sequence[float]
) -> int:
    """Return how often `check_hypergradient` runs the pipeline."""
    directions = _directions(named_tensors(meta_params), num_directions, coordinates, seed=0)
    return 1 + NUM_NOISE_RUNS + 2 * len(steps) * len(directions)


def _directions(
    tensors: Mapping[str, Tensor], num_random: int, coordinates: Coordinates, seed: int
) -> list[tuple[str, str, Tensor]]:
    if not tensors:
        raise ConfigError("there is nothing to check: the meta-parameters hold no tensor that requires grad")
    for name, indices in coordinates.items():
        if name not in tensors:
            raise ConfigError(f"coordinates: there is no meta-parameter {name!r}{did_you_mean(name, tensors)}")
        size = tensors[name].numel()
        if outside := [index for index in indices if not 0 <= index < size]:
            raise ConfigError(f"coordinates: {name!r} has {size} entries, there is no {outside[0]}")
    found = []
    with seeded(seed):
        for name, tensor in tensors.items():
            single = tensor.numel() == 1  # it has but one direction, up to its sign
            for i in range(min(num_random, 0 if coordinates.get(name) else 1) if single else num_random):
                direction = torch.randn(tensor.shape, dtype=tensor.dtype).to(tensor.device)
                found.append((name, f"random {i + 1}", direction / direction.norm()))
            for index in coordinates.get(name, ()):
                direction = torch.zeros_like(tensor)
                direction.view(-1)[index] = 1.0
                found.append((name, f"entry {index}", direction))
    if not found:
        raise ConfigError("there is no direction to check: num_directions=1 takes a random one of each meta-parameter")
    return found


@contextmanager
def explained_dtypes(watch: Watch) -> Iterator[None]:
    """Say what to do where a plug-in's own float32 tensor meets a float64 copy, or where it updates one in place."""
    try:
        yield
    except MetaoptError:
        raise
    except RuntimeError as error:
        text = re.split(r"\. |\n", str(error))[0]
        frames = list(traceback.walk_tb(error.__traceback__))
        frame, line = next((pair for pair in reversed(frames) if not is_library(pair[0])), frames[-1])
        where = f"{Path(frame.f_code.co_filename).name}, line {line}"
        if re.search(r"(?i)in-?place", text):
            raise StageError(
                f"{', '.join(watch.in_place) or f'something before {where}'} updates in place what the graph still "
                f"needs ({text}). Make a new tensor instead of p.mul_(...), p += ... or p[...] = ...; weight decay is "
                "the optimizer's, clipping the transform's"
            ) from error
        if re.search(r"(?i)\bdouble\b.*\bfloat\b|\bfloat\b.*\bdouble\b", text):
            raise StageError(
                f"{where}: {text}. The check runs float64 copies of models, meta-parameters and batches, and this "
                "stayed as it was. Cast a plug-in's own tensors where they are used (table.to(logits.dtype)), make it "
                "an nn.Module with buffers, or read what is kept from an earlier call anew: upstream[...]"
            ) from error
        raise
