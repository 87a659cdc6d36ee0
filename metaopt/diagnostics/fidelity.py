"""How far each estimator's hypergradient is from the exact one, and what it costs: on the user's own chain."""

from __future__ import annotations

import copy
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError, MissingPathError, StageError
from metaopt.base.random_state import seeded
from metaopt.base.ranges import check_counts
from metaopt.core.chain import Chain
from metaopt.core.contracts import Estimator, MetaObjective, Upstream, evaluate
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.unrolled import Unrolled
from metaopt.diagnostics.backward import hypergradient
from metaopt.diagnostics.check import _explained
from metaopt.diagnostics.differences import Pipeline
from metaopt.diagnostics.fidelity_result import Cost, Deviation, FidelityResult, FidelityRow
from metaopt.diagnostics.meters import count_flops, peak_bytes
from metaopt.diagnostics.precision import Watch
from metaopt.estimators.checkpointed import Checkpointed, Truncated
from metaopt.estimators.products.base import Product
from metaopt.estimators.products.finite_difference import FiniteDifference

OWN, PLAIN = "as configured", ""  # the chain's own estimators; training without one
T = TypeVar("T")


def compare_estimators(
    chain: Chain,
    objective: MetaObjective,
    batch: Any,
    meta_params: AnyMetaParameters,
    estimators: Mapping[str, Estimator],
    *,
    num_runs: int = 5,
    num_points: int = 1,
    advance: Callable[[], Any] | None = None,
    seed: int = 0,
    on_run: Callable[[], object] = lambda: None,
) -> FidelityResult:
    """Measure each estimator's error against the exact hypergradient, and its time, peak bytes and flops.

    Every estimator runs the same steps of all stages, from the same state, on the same data, in the same random state.
    Errors are measured on float64 copies, where they are the estimator's own, and in the run's dtype; costs in the
    run's dtype, after a first run, without what that alone takes (a captured product's tracing). One that fails gets a
    row that says why. The user's chain and meta-parameters are not changed.

    Args:
        chain, objective, batch, meta_params: as in a meta-step.
        estimators: name → what all stages are differentiated by; the chain's own are measured too.
        num_runs: timed, interleaved with each other and with plain training; the median counts.
        num_points: of the training at which errors are measured.
        advance: takes the training (the chain, the meta-parameters) to its next point, and returns that one's batch.
        seed: of the random state in which the objective is evaluated.
        on_run: called after each run, for a progress bar: `num_calls(...)` times in all.

    Raises:
        ConfigError: options that cannot be used.
        StageError: there is no exact hypergradient to compare with, or it is 0.
        MissingPathError, NonFiniteError: there is no hypergradient at all.
    """
    check_counts("compare_estimators", num_runs=num_runs, num_points=num_points)
    if num_points > 1 and advance is None:
        raise ConfigError(f"compare_estimators: num_points={num_points} needs advance=..., which takes meta-steps")
    step = _MetaStep(chain, objective, chain.move(batch), meta_params, seed)
    comparison = _Comparison(estimators, on_run)
    notes: tuple[str, ...] = ()
    for point in range(num_points):
        if point and advance is not None:
            step = replace(step, batch=chain.move(advance()))
        notes = comparison.add_point(step)
    plain, costs = comparison.costs(step, num_runs)
    like = next(iter(chain.stages.values())).like
    return FidelityResult(
        rows=tuple(comparison.row(name, costs.get(name), chain) for name in comparison.estimators),
        plain=plain,
        dtype=str(like.dtype).removeprefix("torch."),
        place=_place(like.device),
        num_steps={name: stage.num_steps for name, stage in chain.stages.items()},
        num_points=num_points,
        num_runs=num_runs,
        warnings=tuple(comparison.warnings.values()),
        notes=notes,
    )


def num_calls(num_estimators: int, num_points: int, num_runs: int) -> int:
    """Return how often `compare_estimators` calls `on_run`."""
    methods = num_estimators + 1
    return num_points * (1 + 2 * methods) + (2 + num_runs) * (methods + 1)


class TruncatedShare(Truncated):
    """`Truncated`, its number of steps given as a share of each stage's: rounded, and at least one.

    Args:
        share: of the stage's steps, above 0 and at most 1.
        product: as of `Checkpointed`.
    """

    def __init__(self, share: float, product: Product | None = None) -> None:
        super().__init__(1, product)
        if not 0 < share <= 1:
            raise ConfigError(f"TruncatedShare: share={share} must be above 0 and at most 1")
        self.share = share

    def __repr__(self) -> str:
        return f"TruncatedShare({self.share}, product={self.product!r})"

    def differentiate(self, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> InnerResult:
        """Run the loop as one autograd function, and store its last steps."""
        last = max(1, round(self.share * loop.num_steps))
        return self._sweep(loop, meta_params, upstream, first=loop.num_steps - last)


@dataclass(frozen=True)
class _MetaStep:
    """One meta-step up to its hypergradient: it can be taken again and again, since nothing moves."""

    chain: Chain
    objective: MetaObjective
    batch: Any
    meta_params: AnyMetaParameters
    seed: int

    def by(self, estimator: Estimator | None) -> _MetaStep:
        """Return the same meta-step, all stages differentiated by this estimator; None for their own."""
        if estimator is None:
            return self
        stages = {name: copy.copy(stage) for name, stage in self.chain.stages.items()}
        for stage in stages.values():
            stage.estimator = estimator
        return replace(self, chain=Chain(**stages))

    def in_float64(self) -> tuple[_MetaStep, tuple[str, ...]]:
        """Return the same meta-step of copies in float64, and a note if its gradient is an estimate by design."""
        copies = Pipeline(self.chain, self.objective, self.batch, self.meta_params, self.seed)
        step = _MetaStep(copies._chain, copies._objective, copies._batch, copies.meta_params, self.seed)
        notes = f"the exact hypergradient is itself an estimate by design: {'; '.join(copies.biases)}"
        return step, (notes,) if copies.biases else ()

    def hypergradient(self) -> Tensor:
        """Return all entries of the hypergradient, in float64."""
        with seeded(self.seed):
            trained = self.chain.unroll(self.meta_params)
            loss = evaluate(self.objective, trained, self.batch, self.meta_params)
        found = hypergradient(loss, self.meta_params).values()
        return torch.cat([(g.to_dense() if g.is_sparse else g).flatten().double() for g in found])

    def exact(self) -> tuple[Tensor, tuple[str, ...]]:
        """Return the exact hypergradient (its stand-in, where nothing can be differentiated twice), and notes on it."""
        failures: list[Exception] = []
        with _explained(Watch()):
            for estimator in (Checkpointed(), Unrolled(), Checkpointed(FiniteDifference())):
                try:
                    found = self.by(estimator).hypergradient()
                    break
                except RuntimeError as error:
                    failures.append(error)
            else:
                raise failures[0]
        if not bool(found.any()):
            raise StageError(
                "the exact hypergradient is 0 here, so no estimator can be told from another; measure at a later point "
                "of the training (fidelity.warmup_steps=100), or look for the cause with metaopt-check"
            )
        notes = []
        if not estimator.exact:
            notes.append(f"errors are against {estimator!r} in float64, since the exact estimators fail")
        if found.numel() == 1:
            notes.append("a single number is learned, so a cosine is no more than a sign: go by the relative error")
        return found, tuple(notes)

    @torch.no_grad()
    def train(self) -> None:
        """Train all stages without a graph."""
        self.chain.unroll(self.meta_params)


class _Comparison:
    """The measurements so far: deviations by name, failures and warnings."""

    def __init__(self, estimators: Mapping[str, Estimator], on_run: Callable[[], object]) -> None:
        for name, given in estimators.items():
            if not isinstance(given, Estimator):
                kind = type(given).__name__
                raise ConfigError(f"compare_estimators: {name!r} is a {kind}, not an Estimator such as Truncated(5)")
        self.estimators: dict[str, Estimator | None] = {**estimators, OWN: None}
        self.warnings: dict[tuple[str, str], str] = {}
        self._on_run = on_run
        self._failures: dict[str, str] = {}
        self._found: dict[tuple[str, str], list[Deviation]] = {}

    def add_point(self, step: _MetaStep) -> tuple[str, ...]:
        """Measure errors at this point of the training; return notes on what they are measured against."""
        copies, biases = step.in_float64()
        exact, notes = copies.exact()
        self._on_run()
        for where, one in (("in_float64", copies), ("in_run", step)):
            for name, estimator in self.estimators.items():
                found = self._attempt(name, lambda e=estimator, s=one: s.by(e).hypergradient())
                if found is not None:
                    self._found.setdefault((name, where), []).append(_deviation(found, exact))
        return *biases, *notes

    def costs(self, step: _MetaStep, num_runs: int) -> tuple[Cost, dict[str, Cost]]:
        """Return the cost of plain training, and of each estimator that does not fail."""
        device = next(iter(step.chain.stages.values())).like.device
        tasks: dict[str, Callable[[], object]] = {PLAIN: step.train}
        tasks |= {name: step.by(estimator).hypergradient for name, estimator in self.estimators.items()}
        step.train()
        flops = {name: self._attempt(name, lambda t=task: count_flops(t)) for name, task in tasks.items()}
        peaks = {name: self._attempt(name, lambda t=task: peak_bytes(t, device)) for name, task in tasks.items()}
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(num_runs):
            for name, task in tasks.items():
                taken = self._attempt(name, lambda t=task: _seconds(t, device))
                seconds[name].append(float("nan") if taken is None else taken)
        costs = {}
        for name in tasks:
            ratios = [own / plain for own, plain in zip(seconds[name], seconds[PLAIN], strict=True)]
            count, peak, plain = flops[name], peaks[name], flops[PLAIN]
            if name not in self._failures and count is not None and peak is not None:
                ratio = count / plain if plain else None
                costs[name] = Cost(statistics.median(seconds[name]), statistics.median(ratios), peak, ratio)
        return costs.pop(PLAIN), costs

    def row(self, name: str, cost: Cost | None, chain: Chain) -> FidelityRow:
        """Return what was found of one estimator; None in `estimators` stands for the chain's own."""
        given = self.estimators[name]
        used = [given] if given is not None else [stage.estimator for stage in chain.stages.values()]
        return FidelityRow(
            name,
            ", ".join(dict.fromkeys(map(repr, used))),
            all(estimator.exact for estimator in used),
            *(Deviation.mean(self._found.get((name, where), [])) for where in ("in_float64", "in_run")),
            cost=cost,
            failure=self._failures.get(name, ""),
        )

    def _attempt(self, name: str, fn: Callable[[], T]) -> T | None:
        """Run a measurement unless this estimator has failed before; keep its error and its warnings."""
        try:
            with self._noting(name):
                return None if name in self._failures else fn()
        except Exception as error:  # an estimator of the user's may raise anything; the others are measured still
            if name == PLAIN:
                raise
            self._failures[name] = _reason(error)
            return None
        finally:
            self._on_run()

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """Keep what an estimator warns of, once; other warnings go on to where they go."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            yield
        for warning in caught:
            text = str(warning.message)
            if issubclass(warning.category, RuntimeWarning):
                self.warnings.setdefault((name, re.sub(r"[-+.e\d]+", "", text)), f"{name}: {text}")
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _deviation(found: Tensor, exact: Tensor) -> Deviation:
    size = float(found.norm() * exact.norm())
    cosine = float(found @ exact) / size if size else 0.0
    return Deviation(cosine, float((found - exact).norm() / exact.norm()))


def _seconds(fn: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _place(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads > 1)}"


def _reason(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text.split('. ')[0] if isinstance(error, MissingPathError) else text}"
