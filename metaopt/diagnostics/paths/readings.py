"""What each part of a chain reads, and which paths its graph has: one part at a time, whatever the estimator."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaopt.base.errors import StageError
from metaopt.base.streams import seeded
from metaopt.core.chain import Chain, TrainedChain
from metaopt.core.contracts import Gradients, Tensors, require_scalar
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.core.plain import PlainSteps
from metaopt.core.unrolled import entries
from metaopt.core.view import Models
from metaopt.diagnostics.paths.cuts import Cut, Part, Source
from metaopt.diagnostics.paths.marks import Watch, tensors_in

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

    def connect_by_gradient(self, values: Iterable[Any]) -> None:
        """Add an edge for every leaf that the values' graph reaches; each entry counts with another factor."""
        live = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
        factors = [torch.linspace(0.5, 1.5, v.numel(), dtype=v.dtype, device=v.device).view_as(v) for v in live]
        watched = list(self.watch.sources.values())
        found = torch.autograd.grad(live, [leaf for _, leaf in watched], factors, allow_unused=True) if live else ()
        for (source, _), grad in zip(watched, found, strict=bool(live)):
            if grad is not None:
                self.connect([source], bool(entries(grad).any()))

    def read_values(self, compute: Callable[[], list[Any]]) -> list[Any]:
        """Return what this part computes, and note what it reads."""
        evaluate = functools.partial(self.watch.run, self.part, compute)
        values = evaluate()
        self.connect(self.watch.read(values).carried)
        self.note(evaluate, values, values)
        return values

    def note(self, evaluate: Callable[[], list[Any]], values: list[Any], results: list[Any]) -> None:
        """Note what was touched, and the cuts behind `results` on which the `values` of another run depend."""
        self.touched |= self.watch.touched
        for cut in (self.watch.read(results).cuts | self.watch.numbers) - self.cuts:
            earlier = cut.part.writes or cut.part.stage != self.part.stage
            if self.harmless[cut] < _LOOKS and (earlier or self.watch.matters(cut, evaluate, values)):
                self.cuts.add(cut)
            else:
                self.harmless[cut] += 1


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
        for name in chain.stages:
            found, results[name] = _read_stage(watch, name, chain, meta_params, models)
            readings += found
            models = Models({**models, name: results[name].model})
        trained = TrainedChain(results, version=None)
        readings.append(_read_objective(watch, lambda: [objective(trained, batch, meta_params)]))
    return readings


def _read_stage(
    watch: Watch, name: str, chain: Chain, meta_params: AnyMetaParameters, upstream: Models
) -> tuple[list[Reading], InnerResult]:
    """Return the readings of a stage's parts, in order, and its trained model with leaves for weights."""
    parts = ("the initial weights", "the overrides", "the loss")
    initial, overrides, reading = readings = [Reading(Part(part, name), watch) for part in parts]
    loop = _begin(reading, lambda: chain.stages[name].begin(name, upstream, chain.owners))
    own = {n: p.detach() for n, p in loop.own.items()}
    start = initial.read_values(lambda: list(loop.start(own, meta_params, upstream).values()))
    weights = dict(zip(own, start, strict=True))
    steps = PlainSteps(loop, weights, loop.rule.initial_state(), loop.start_buffers(), meta_params, upstream)
    leaves = {n: weight.requires_grad_() for n, weight in steps.weights().items()}
    watch.add_source(("stage", name), leaves.values())
    losses = []
    for t in range(loop.num_steps):
        overrides.read_values(lambda t=t: tree_leaves(loop.hyperparameters(t, meta_params)))
        with torch.no_grad():
            for n, weight in steps.weights().items():
                leaves[n].copy_(weight)
        taken = _Step(watch, loop, t, leaves, steps.buffers, meta_params, upstream).read(reading)
        if taken is None:
            break
        loss, gradients, steps.buffers = taken
        steps.update(t, gradients)
        losses.append(loss)
    trained = {n: weight.requires_grad_() for n, weight in steps.weights().items()}
    watch.add_source(("stage", name), trained.values())
    model = loop.trained_model({**loop.frozen, **trained}, steps.buffers, steps.state())
    return readings, InnerResult(model, torch.stack(losses) if losses else torch.empty(0))


def _begin(reading: Reading, begin: Callable[[], InnerLoop]) -> InnerLoop:
    """Draw or write the data; the tensors that a hand-over has cut are met again in the loss that reads them."""
    watch = reading.watch
    write = functools.partial(watch.run, Part("the hand-over", reading.part.stage), begin)
    loop = write()
    watch.close([list(micro) for micro in loop.batches])
    data = tensors_in(list(loop.batches))
    by_users = [cut for cut in watch.numbers if cut.place]  # a library's own only steer it
    reading.cuts |= {cut for cut in by_users if watch.matters(cut, lambda: tensors_in(list(write().batches)), data)}
    return loop


class _Step:
    """One inner step that can be evaluated again: its loss, raw gradients and moved buffers."""

    def __init__(self, watch: Watch, loop: InnerLoop, t: int, params: dict[str, Tensor], *at: Any) -> None:
        self._watch, self._loop, self._t, self._params, self._at = watch, loop, t, params, at
        self._loss: Any = None
        self._gradients: dict[str, Tensor | None] = dict.fromkeys(params)
        self._buffers: Any = at[0]
        self._failure = ""

    def read(self, reading: Reading) -> tuple[Tensor, Gradients, Tensors] | None:
        """Note what the step reads; return loss, gradients and buffers, or None if nothing can move."""
        values = self._evaluate()
        loss, gradients, buffers = self._loss, self._gradients, self._buffers
        trains = any(g is not None for g in gradients.values())
        reading.connect_by_gradient(values if trains else [])
        reading.note(self._evaluate, values, [loss, *values])
        if not trains:
            reading.failure = self._failure or f"the loss of stage {self._loop.name!r} reads no weight that it trains"
            return None
        return loss.detach(), {name: None if g is None else g.detach() for name, g in gradients.items()}, buffers

    def _evaluate(self) -> list[Any]:
        """Return the step's gradients as the optimizer gets them; of a loss without a graph, the loss."""
        watch, loop, given, self._loss = self._watch, self._loop, self._loop.loss, None

        def recorded(*args: Any) -> Any:  # kept whether or not it can be differentiated
            self._loss = given(*args)
            return self._loss

        loop.loss = recorded
        params = {**loop.frozen, **self._params}
        try:
            taken = watch.run(Part("the loss", loop.name), lambda: loop.loss_at(self._t, params, *self._at))
        except StageError as error:  # that it has no graph is what is to be explained
            if self._loss is None:
                raise
            self._failure = str(error)
            return [self._loss]
        finally:
            loop.loss = given
        self._loss, self._buffers = taken
        found = torch.autograd.grad(self._loss, list(self._params.values()), create_graph=True, allow_unused=True)
        self._gradients = dict(zip(self._params, found, strict=True))
        transform = Part("the transform", loop.name)
        after = watch.run(transform, lambda: loop.transformed(self._gradients), more=True)
        return [g for g in after.values() if g is not None] or [self._loss]


def _read_objective(watch: Watch, compute: Callable[[], list[Any]]) -> Reading:
    reading = Reading(Part("the meta-objective"), watch)

    def evaluate() -> list[Any]:
        with seeded(0):
            return watch.run(reading.part, compute)

    values = evaluate()
    if isinstance(values[0], Tensor):
        reading.connect_by_gradient([require_scalar(values[0], "the meta-objective", needs_graph=False)])
    else:
        reading.failure = f"the meta-objective returns a {type(values[0]).__name__}, not a tensor"
    reading.note(evaluate, values, values)
    return reading
