"""What each part of a chain reads, and which paths its graph has: one part at a time, whatever the estimator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt.base.random_state import seeded
from metaopt.core.chain import Chain, TrainedChain
from metaopt.core.contracts import require_scalar
from metaopt.core.graphs import entries
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.core.plain import PlainSteps
from metaopt.core.stage import Stage
from metaopt.core.view import FunctionalModel, Models
from metaopt.diagnostics.cuts import HAND_OVER, INITIAL, LOSS, OBJECTIVE, OVERRIDES, Cut, Source
from metaopt.diagnostics.inner_step import Step, mixed
from metaopt.diagnostics.marks import Watch, tensors_in
from metaopt.diagnostics.shaking import alike

_LOOKS = 3  # inner steps in which a value is given another one, to see whether it is more than a log
META_LOSS: Source = ("", "meta-loss")


@dataclass
class Reading:
    """One part of the chain: what its result depends on in the graph, what it only touched, and what it cut off.

    `edges` tells whether the derivative was ever other than 0, `harmless` how often a cut was found to change nothing.
    """

    part: str
    reader: Source
    edges: dict[Source, bool] = field(default_factory=dict)
    touched: set[Source] = field(default_factory=set)
    cuts: set[Cut] = field(default_factory=set)
    harmless: Counter[Cut] = field(default_factory=Counter)
    failure: str | None = None

    @property
    def stage(self) -> str | None:
        """Name of the stage; None for the meta-objective."""
        return None if self.reader == META_LOSS else self.reader[1]

    def connect(self, sources: Iterable[Source], nonzero: bool = True) -> None:
        """Add edges."""
        for source in sources:
            self.edges[source] = self.edges.get(source, False) or nonzero

    def joins(self, source: Source) -> bool:
        """Return whether a gradient passes from the source to the reader."""
        flat = any(source in cut.of and cut.operation.kind == "stepwise" for cut in self.cuts)
        return source in self.edges and (self.edges[source] or not flat)


class _Leaves:
    """Tensors to be differentiated to, each with its source."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.of: list[tuple[Source, Tensor]] = []

    def add(self, kind: str, tensors: Mapping[str, Tensor], owner: str | None = None) -> None:
        for name, tensor in tensors.items():
            self.of.append(((kind, owner or name), tensor))
            self._watch.add_source((kind, owner or name), {name: tensor})


def read_chain(chain: Chain, objective: Any, batch: Any, meta_params: AnyMetaParameters) -> list[Reading]:
    """Run the chain from its present state, step by step and part by part, and return what each part reads.

    Each part is differentiated on its own, from leaves of the weights that the earlier parts arrive at. Nothing of
    the chain is changed.
    """
    watch = Watch()
    leaves = _Leaves(watch)
    leaves.add("meta-parameter", named_tensors(meta_params))
    owners = chain._owners_apart_from(meta_params)
    readings, results, models = [], {}, Models()
    with torch.enable_grad():
        for name, stage in chain.stages.items():
            found, results[name] = _StageReader(watch, leaves, name, stage, meta_params, models, owners).read()
            readings += found
            models = Models({**models, name: results[name].model})
        trained = TrainedChain(results, version=None)
        readings.append(_read_objective(watch, leaves, objective, trained, batch, meta_params))
    return readings


class _StageReader:
    """Reads the parts of one stage, in the order in which an unroll uses them."""

    def __init__(
        self,
        watch: Watch,
        leaves: _Leaves,
        name: str,
        stage: Stage,
        meta_params: AnyMetaParameters,
        upstream: Models,
        owners: Mapping[int, str],
    ) -> None:
        self.watch, self.leaves, self.name, self.stage = watch, leaves, name, stage
        self.meta_params, self.upstream, self.owners = meta_params, upstream, owners
        self.reader: Source = ("stage", name)
        self.own: dict[str, Tensor] = {}

    def read(self) -> tuple[list[Reading], InnerResult]:
        """Return the readings, and the trained model with leaves for weights."""
        overrides, loss = Reading(OVERRIDES, self.reader), Reading(LOSS, self.reader)
        loop = self._begin(loss)
        initial, start = self._initial(loop)
        steps = PlainSteps(
            loop, start, loop.rule.initial_state(), loop.start_buffers(), self.meta_params, self.upstream
        )
        losses = []
        for t in range(loop.num_steps):
            self._overrides(loop, t, overrides)
            value = self._step(loop, t, steps, loss)
            if value is None:
                break
            losses.append(value)
        result = InnerResult(self._model(loop, steps), torch.stack(losses) if losses else torch.empty(0), len(losses))
        return [initial, overrides, loss], result

    def _begin(self, reading: Reading) -> InnerLoop:
        """Draw or write the data; the tensors that a hand-over has cut are met again in the loss that reads them."""

        def begin() -> InnerLoop:
            with self.watch.over(HAND_OVER, self.name, without_graph=True):
                return self.stage.begin(self.name, self.upstream, self.owners)

        loop = begin()
        self.watch.close([list(micro) for micro in loop.batches])
        data = tensors_in(loop.batches)
        by_users = [cut for cut in self.watch.numbers if cut.place]  # a library's own only steer it
        reading.cuts |= {c for c in by_users if _matters(self.watch, lambda: tensors_in(begin().batches), data, c)}
        return loop

    def _initial(self, loop: InnerLoop) -> tuple[Reading, dict[str, Tensor]]:
        reading = Reading(INITIAL, self.reader)
        own = {name: loop.structure.params[name].detach() for name in loop.rule.names}

        def evaluate() -> list[Tensor]:
            with self.watch.over(INITIAL, self.name):
                return list(loop.start(own, self.meta_params, self.upstream).values())

        start = evaluate()
        for tensor in start:
            reading.connect(self.watch.sources_of(tensor))
        _note(self.watch, reading, evaluate, start, start)
        return reading, dict(zip(own, start, strict=True))

    def _overrides(self, loop: InnerLoop, t: int, reading: Reading) -> None:
        def evaluate() -> list[Any]:
            with self.watch.over(OVERRIDES, self.name):
                return _numbers_in(loop.hyperparameters(t, self.meta_params))

        values = evaluate()
        for value in values:
            reading.connect(self.watch.sources_of(value))
        _note(self.watch, reading, evaluate, values, values)

    def _step(self, loop: InnerLoop, t: int, steps: PlainSteps, reading: Reading) -> Tensor | None:
        """Read the loss of step t and move on; None if there is no gradient to move along."""
        step = Step(self.watch, loop, t, self._own(steps), steps.buffers, self.meta_params, self.upstream)
        values = step.evaluate()
        loss, gradients, buffers = step.loss, step.gradients, step.buffers
        trains = any(g is not None for g in gradients.values())
        _connect(reading, mixed(values) if trains else None, self.leaves)
        _note(self.watch, reading, step.evaluate, values, [loss, *values])
        steps.buffers = buffers
        if not trains:
            reading.failure = step.failure or f"the loss of stage {self.name!r} reads no weight that it trains"
            return None
        steps.update(t, {name: None if g is None else g.detach() for name, g in gradients.items()})
        return loss.detach()

    @torch.no_grad()
    def _own(self, steps: PlainSteps) -> dict[str, Tensor]:
        """Return the present weights in the stage's leaves."""
        weights = steps.weights()
        if not self.own:
            self.own = {name: weight.requires_grad_() for name, weight in weights.items()}
            self.watch.add_source(self.reader, self.own)
        for name, leaf in self.own.items():
            leaf.copy_(weights[name])
        return self.own

    def _model(self, loop: InnerLoop, steps: PlainSteps) -> FunctionalModel:
        weights = {name: weight.requires_grad_() for name, weight in steps.weights().items()}
        self.leaves.add("stage", weights, self.name)
        return loop.trained_model({**loop.frozen, **weights}, steps.buffers, steps.state())


def _read_objective(
    watch: Watch, leaves: _Leaves, objective: Any, trained: TrainedChain, batch: Any, meta_params: AnyMetaParameters
) -> Reading:
    reading = Reading(OBJECTIVE, META_LOSS)

    def evaluate() -> list[Any]:
        with seeded(0), watch.over(OBJECTIVE):
            return [objective(trained, batch, meta_params)]

    values = evaluate()
    if isinstance(values[0], Tensor):
        _connect(reading, require_scalar(values[0], "the meta-objective", needs_graph=False), leaves)
    else:
        reading.failure = f"the meta-objective returns a {type(values[0]).__name__}, not a tensor"
    _note(watch, reading, evaluate, values, values)
    return reading


def _connect(reading: Reading, value: Tensor | None, leaves: _Leaves) -> None:
    """Add an edge for every leaf that the value's graph reaches."""
    if value is None or not value.requires_grad:
        return
    found = torch.autograd.grad(value, [leaf for _, leaf in leaves.of], allow_unused=True)
    for (source, _), grad in zip(leaves.of, found, strict=True):
        if grad is not None:
            reading.connect([source], bool(entries(grad).any()))


def _note(
    watch: Watch, reading: Reading, evaluate: Callable[[], list[Any]], values: list[Any], results: list[Any]
) -> None:
    """Note what was touched, and the cuts whose values the result depends on.

    Args:
        evaluate: runs the part again.
        values: what it returned.
        results: tensors behind which cuts may lie.
    """
    reading.touched |= watch.touched
    for cut in (watch.cuts_behind(results) | watch.numbers) - reading.cuts:
        if reading.harmless[cut] == _LOOKS:
            continue
        if cut.part == HAND_OVER or cut.stage != reading.stage or _matters(watch, evaluate, values, cut):
            reading.cuts.add(cut)
        else:
            reading.harmless[cut] += 1


def _matters(watch: Watch, evaluate: Callable[[], list[Any]], values: list[Any], cut: Cut) -> bool:
    """Return whether the result changes with the value that the cut lets through: one that is logged does not."""
    with watch.shaking(cut):
        try:
            again = evaluate()
        except Exception:
            return True
        if not watch.was_shaken:
            return cut not in watch.numbers
    return len(values) != len(again) or not all(map(alike, values, again))


def _numbers_in(value: Any) -> list[Any]:
    """Return the tensors and numbers of nested hyperparameters."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else None
    return [value] if parts is None else [n for part in parts for n in _numbers_in(part)]
