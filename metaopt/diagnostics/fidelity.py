"""How far each estimator's hypergradient is from the exact one, and what it costs: on the user's own chain."""

from __future__ import annotations

import functools
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError, MissingPathError, StageError, first_line
from metaopt.base.ranges import check_counts
from metaopt.core.chain import Chain
from metaopt.core.contracts import Estimator, MetaObjective, Upstream
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.unrolled import Unrolled
from metaopt.diagnostics.backward import hypergradient
from metaopt.diagnostics.check import explained_dtypes
from metaopt.diagnostics.differences import Pipeline
from metaopt.diagnostics.fidelity_result import Cost, Deviation, FidelityResult, FidelityRow
from metaopt.diagnostics.meters import count_flops, peak_bytes
from metaopt.diagnostics.precision import Watch
from metaopt.estimators.checkpointed import Checkpointed, Truncated
from metaopt.estimators.products.base import Product
from metaopt.estimators.products.finite_difference import FiniteDifference

OWN, PLAIN = "as configured", "(plain training)"  # the chain's own estimators; training without one
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

    Every estimator runs the same steps of all stages, from the same state, on the same data, in the same random state
    (of the objective: `seed`). Errors are measured on float64 copies, where they are the estimator's own, and in the
    run's dtype; costs in the run's dtype, after a first run, apart from what that alone takes (a captured product's
    tracing). One that fails gets a row that says why. The user's chain and meta-parameters are not changed.

    Args:
        chain, objective, batch, meta_params: as in a meta-step.
        estimators: name → what all stages are differentiated by; the chain's own are measured too.
        num_runs: timed, interleaved with each other and with plain training; the median counts.
        num_points: of the training at which errors are measured; their mean counts.
        advance: takes the training (the chain, the meta-parameters) to its next point, and returns that one's batch.
        on_run: called after each run, for a progress bar: `num_calls(...)` times in all.

    Raises:
        ConfigError: options that cannot be used.
        StageError: there is no exact hypergradient to compare with, or it is 0.
        MissingPathError, NonFiniteError: there is no hypergradient at all.
    """
    check_counts("compare_estimators", num_runs=num_runs, num_points=num_points)
    if num_points > 1 and advance is None:
        raise ConfigError(f"compare_estimators: num_points={num_points} needs advance=..., which takes meta-steps")
    for name, given in estimators.items():
        if not isinstance(given, Estimator):
            kind = type(given).__name__
            raise ConfigError(f"compare_estimators: {name!r} is a {kind}, not an Estimator such as Truncated(5)")
    like = next(iter(chain.stages.values())).like
    step, plain = Pipeline(chain, objective, chain.move(batch), meta_params, seed), _Measured(PLAIN, None, on_run)
    methods = [_Measured(name, given, on_run) for name, given in {**estimators, OWN: None}.items()]
    notes: list[str] = []
    for point in range(num_points):
        if point and advance is not None:
            step = replace(step, batch=chain.move(advance()))
        copies = step.in_float64()
        exact, notes = _exact(copies)
        on_run()
        for method in methods:
            method.compare(method.in_float64, copies, exact)
        for method in methods:
            method.compare(method.in_run, step, exact)
    _measure_costs(plain, methods, step, num_runs, like.device)
    return FidelityResult(
        rows=tuple(method.row(chain, plain) for method in methods),
        plain=plain.cost(plain),
        dtype=str(like.dtype).removeprefix("torch."),
        place=_place(like.device),
        num_steps={name: stage.num_steps for name, stage in chain.stages.items()},
        num_points=num_points,
        num_runs=num_runs,
        warnings=tuple(text for method in (plain, *methods) for text in method.warnings.values()),
        notes=tuple(notes),
    )


def num_calls(num_estimators: int, num_points: int, num_runs: int) -> int:
    """Return how often `compare_estimators` calls `on_run`."""
    methods = num_estimators + 1
    return num_points * (1 + 2 * methods) + (2 + num_runs) * (methods + 1)


class TruncatedShare(Truncated):
    """`Truncated` to a share of each stage's steps, above 0 and at most 1: rounded, and at least one step."""

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


def _entries(step: Pipeline) -> Tensor:
    """Return all entries of a hypergradient, in float64."""
    found = hypergradient(step.run()[1], step.meta_params).values()
    return torch.cat([(g.to_dense() if g.is_sparse else g).flatten().double() for g in found])


def _exact(copies: Pipeline) -> tuple[Tensor, list[str]]:
    """Return the exact hypergradient (its stand-in, where nothing can be differentiated twice), and notes on it."""
    failures: list[Exception] = []
    with explained_dtypes(Watch()):
        for estimator in (Checkpointed(), Unrolled(), Checkpointed(FiniteDifference())):
            try:
                found = _entries(copies.by(estimator))
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
    if copies.biases:
        notes.append(f"the exact hypergradient is itself an estimate by design: {'; '.join(copies.biases)}")
    if not estimator.exact:
        notes.append(f"errors are against {estimator!r} in float64, since the exact estimators fail")
    if found.numel() == 1:
        notes.append("a single number is learned, so a cosine is no more than a sign: go by the relative error")
    return found, notes


@dataclass
class _Measured:
    """What was found of one estimator so far (None: the chain's own); after its first failure nothing more is."""

    name: str
    estimator: Estimator | None
    on_run: Callable[[], object]
    in_float64: list[Deviation] = field(default_factory=list)
    in_run: list[Deviation] = field(default_factory=list)
    failure: str = ""
    warnings: dict[str, str] = field(default_factory=dict)  # a text without its numbers → the remark
    costs: list[Any] = field(default_factory=list)  # flops, peak bytes, and the seconds of each run
    tracing: float = 0.0  # seconds, in the run's dtype

    def compare(self, found: list[Deviation], step: Pipeline, exact: Tensor) -> None:
        """Add how far the hypergradient of a meta-step is from the exact one."""
        own = step.by(self.estimator)
        before = _tracing_seconds(own.chain)
        entries = self.attempt(lambda: _entries(own))
        self.tracing += _tracing_seconds(own.chain) - before if found is self.in_run else 0.0
        if entries is not None:
            size = float(entries.norm() * exact.norm())
            cosine = float(entries @ exact) / size if size else 0.0
            found.append(Deviation(cosine, float((entries - exact).norm() / exact.norm())))

    def attempt(self, fn: Callable[[], T]) -> T | None:
        """Run a measurement unless one has failed before; keep its error, and what it warns of, once."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            try:
                return None if self.failure else fn()
            except Exception as error:  # an estimator of the user's may raise anything; the others are measured still
                if self.name == PLAIN:
                    raise
                text = first_line(error)
                text = text.split(". ")[0] if isinstance(error, MissingPathError) else text
                self.failure = f"{type(error).__name__}: {text}"
                return None
            finally:
                for text in (str(warning.message) for warning in caught):
                    self.warnings.setdefault(re.sub(r"[-+.e\d]+", "", text), f"{self.name}: {text}")
                self.on_run()

    def cost(self, plain: _Measured) -> Cost:
        """Return what it costs beside plain training."""
        (flops, peak, *seconds), (plain_flops, _, *others) = self.costs, plain.costs
        ratios = [own / other for own, other in zip(seconds, others, strict=True)]
        more = flops / plain_flops if plain_flops else None
        return Cost(statistics.median(seconds), statistics.median(ratios), peak, more, self.tracing)

    def row(self, chain: Chain, plain: _Measured) -> FidelityRow:
        """Return what was found."""
        used = [stage.estimator for stage in chain.stages.values()] if self.estimator is None else [self.estimator]
        return FidelityRow(
            self.name,
            ", ".join(dict.fromkeys(map(repr, used))),
            all(estimator.exact for estimator in used),
            Deviation.mean(self.in_float64),
            Deviation.mean(self.in_run),
            None if self.failure else self.cost(plain),
            self.failure,
        )


def _tracing_seconds(chain: Chain) -> float:
    """Return what the products of a chain's estimators have taken to trace so far."""
    products = {id(p): p for p in (getattr(stage.estimator, "product", None) for stage in chain.stages.values())}
    return sum(getattr(product, "tracing_seconds", 0.0) for product in products.values())


def _measure_costs(
    plain: _Measured, methods: list[_Measured], step: Pipeline, num_runs: int, device: torch.device
) -> None:
    """Measure plain training and each estimator: flops, peak, and seconds in turns."""

    @torch.no_grad()
    def train() -> None:
        step.chain.unroll(step.meta_params)

    tasks: list[tuple[_Measured, Callable[[], object]]] = [(plain, train)]
    tasks += [(method, functools.partial(_entries, step.by(method.estimator))) for method in methods]
    measures: list[Callable[[Callable[[], object]], float]] = [count_flops, lambda task: peak_bytes(task, device)]
    measures += [lambda task: _seconds(task, device)] * num_runs
    train()
    for measure in measures:
        for method, task in tasks:
            method.costs.append(method.attempt(functools.partial(measure, task)))


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
