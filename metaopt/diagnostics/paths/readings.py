"""What each part of a chain reads, and which paths its graph has: one part at a time, whatever the estimator."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt.base.streams import seeded
from metaopt.core.chain import Chain, TrainedChain
from metaopt.core.contracts import require_scalar
from metaopt.core.graphs import entries
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.core.plain import PlainSteps
from metaopt.core.stage import Stage
from metaopt.core.view import Models
from metaopt.diagnostics.paths.cuts import Cut, Part, Source
from metaopt.diagnostics.paths.inner_step import Step
from metaopt.diagnostics.paths.marks import Watch, tensors_in
from metaopt.diagnostics.paths.shaking import alike

_LOOKS = 3  # inner steps in which a value is given another one, to see whether it is more than a log


@dataclass
class Reading:
    """One part of the chain: what its result depends on in the graph, what it only touched, and what it cut off.

    `edges` tells whether the derivative was ever other than 0, `harmless` how often a cut was found to change nothing.
    """

    part: Part
    watch: Watch
    edges: dict[Source, bool] = field(default_factory=dict)
    touched: set[Source] = field(default_factory=set)
    cuts: set[Cut] = field(default_factory=set)
    harmless: Counter[Cut] = field(default_factory=Counter)
    failure: str | None = None

    def joins(self, source: Source) -> bool:
        """Return whether a gradient passes from the source to the reader."""
        flat = any(source in cut.of and cut.operation.kind == "stepwise" for cut in self.cuts)
        return source in self.edges and (self.edges[source] or not flat)

    def connect(self, sources: Iterable[Source], nonzero: bool = True) -> None:
        """Add edges from sources, other than the weights in training themselves."""
        for source in sources:
            if source != self.part.reader:
                self.edges[source] = self.edges.get(source, False) or nonzero

    def connect_by_gradient(self, value: Tensor | None) -> None:
        """Add an edge for every leaf that the value's graph reaches."""
        if value is None or not value.requires_grad:
            return
        watched = list(self.watch.sources.values())
        found = torch.autograd.grad(value, [leaf for _, leaf in watched], allow_unused=True)
        for (source, _), grad in zip(watched, found, strict=True):
            if grad is not None:
                self.connect([source], bool(entries(grad).any()))

    def read_values(self, compute: Callable[[], list[Any]]) -> list[Any]:
        """Return what this part computes, and note what it reads."""
        evaluate = functools.partial(self.watch.run, self.part, compute)
        values = evaluate()
        for value in values:
            self.connect(self.watch.sources_of(value))
        self.note(evaluate, values, values)
        return values

    def note(self, evaluate: Callable[[], list[Any]], values: list[Any], results: list[Any]) -> None:
        """Note what was touched, and the cuts whose values the result depends on.

        Args:
            evaluate: runs the part again.
            values: what it returned.
            results: tensors behind which cuts may lie.
        """
        self.touched |= self.watch.touched
        for cut in (self.watch.cuts_behind(results) | self.watch.numbers) - self.cuts:
            if self.harmless[cut] == _LOOKS:
                continue
            earlier = cut.part.writes or cut.part.stage != self.part.stage
            if earlier or _matters(self.watch, evaluate, values, cut):
                self.cuts.add(cut)
            else:
                self.harmless[cut] += 1


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


def read_chain(chain: Chain, objective: Any, batch: Any, meta_params: AnyMetaParameters) -> list[Reading]:
    """Run the chain from its present state, step by step and part by part, and return what each part reads.

    Each part is differentiated on its own, from leaves of the weights that the earlier parts arrive at. Nothing of
    the chain is changed.
    """
    watch = Watch()
    for name, tensor in named_tensors(meta_params).items():
        watch.add_source(("meta-parameter", name), [tensor])
    chain.check(meta_params)
    readings, results, models = [], {}, Models()
    with torch.enable_grad():
        for name, stage in chain.stages.items():
            found, results[name] = _StageReader(watch, name, stage, meta_params, models, chain.owners).read()
            readings += found
            models = Models({**models, name: results[name].model})
        trained = TrainedChain(results, version=None)
        readings.append(_read_objective(watch, lambda: [objective(trained, batch, meta_params)]))
    return readings


class _StageReader:
    """Reads the parts of one stage, in the order in which an unroll uses them."""

    def __init__(
        self,
        watch: Watch,
        name: str,
        stage: Stage,
        meta_params: AnyMetaParameters,
        upstream: Models,
        owners: Mapping[int, str],
    ) -> None:
        self.watch, self.name, self.stage = watch, name, stage
        self.meta_params, self.upstream, self.owners = meta_params, upstream, owners
        self.own: dict[str, Tensor] = {}

    def read(self) -> tuple[list[Reading], InnerResult]:
        """Return the readings, and the trained model with leaves for weights."""
        parts = ("the initial weights", "the overrides", "the loss")
        initial, overrides, loss = (Reading(Part(part, self.name), self.watch) for part in parts)
        loop = self._begin(loss)
        given, phi, upstream = loop.structure.params, self.meta_params, self.upstream
        own = {name: given[name].detach() for name in loop.rule.names}
        start = initial.read_values(lambda: list(loop.start(own, phi, upstream).values()))
        weights = dict(zip(own, start, strict=True))
        steps = PlainSteps(loop, weights, loop.rule.initial_state(), loop.start_buffers(), phi, upstream)
        losses = []
        for t in range(loop.num_steps):
            overrides.read_values(lambda t=t: _numbers_in(loop.hyperparameters(t, phi)))
            value = self._step(loop, t, steps, loss)
            if value is None:
                break
            losses.append(value)
        trained = {name: weight.requires_grad_() for name, weight in steps.weights().items()}
        self.watch.add_source(("stage", self.name), trained.values())
        model = loop.trained_model({**loop.frozen, **trained}, steps.buffers, steps.state())
        result = InnerResult(model, torch.stack(losses) if losses else torch.empty(0))
        return [initial, overrides, loss], result

    def _begin(self, reading: Reading) -> InnerLoop:
        """Draw or write the data; the tensors that a hand-over has cut are met again in the loss that reads them."""

        def begin() -> InnerLoop:
            stage, handover = self.stage, Part("the hand-over", self.name)
            return self.watch.run(handover, lambda: stage.begin(self.name, self.upstream, self.owners), True)

        loop = begin()
        self.watch.close([list(micro) for micro in loop.batches])
        data = tensors_in(loop.batches)
        by_users = [cut for cut in self.watch.numbers if cut.place]  # a library's own only steer it
        reading.cuts |= {c for c in by_users if _matters(self.watch, lambda: tensors_in(begin().batches), data, c)}
        return loop

    def _step(self, loop: InnerLoop, t: int, steps: PlainSteps, reading: Reading) -> Tensor | None:
        """Read the loss of step t and move on; None if there is no gradient to move along."""
        step = Step(self.watch, loop, t, self._own(steps), steps.buffers, self.meta_params, self.upstream)
        values = step.evaluate()
        loss, gradients, buffers = step.loss, step.gradients, step.buffers
        reading.connect_by_gradient(step.mixed(values))
        reading.note(step.evaluate, values, [loss, *values])
        steps.buffers = buffers
        if all(g is None for g in gradients.values()):
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
            self.watch.add_source(("stage", self.name), self.own.values())
        for name, leaf in self.own.items():
            leaf.copy_(weights[name])
        return self.own


def _read_objective(watch: Watch, compute: Callable[[], list[Any]]) -> Reading:
    reading = Reading(Part("the meta-objective"), watch)

    def evaluate() -> list[Any]:
        with seeded(0):
            return watch.run(reading.part, compute)

    values = evaluate()
    if isinstance(values[0], Tensor):
        reading.connect_by_gradient(require_scalar(values[0], "the meta-objective", needs_graph=False))
    else:
        reading.failure = f"the meta-objective returns a {type(values[0]).__name__}, not a tensor"
    reading.note(evaluate, values, values)
    return reading


def _numbers_in(value: Any) -> list[Any]:
    """Return the tensors and numbers of nested hyperparameters."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else None
    return [value] if parts is None else [n for part in parts for n in _numbers_in(part)]
