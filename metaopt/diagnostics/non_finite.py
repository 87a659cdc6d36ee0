"""Where something first stops being finite: in a stage's training, or on the way back from the meta-loss."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metaopt
from metaopt.base.errors import NonFiniteError
from metaopt.base.streams import Passing
from metaopt.core.chain import Chain, TrainedChain
from metaopt.core.contracts import Upstream
from metaopt.core.graphs import nodes
from metaopt.core.inner_loop import InnerLoop
from metaopt.core.meta_params import AnyMetaParameters, as_modules, named_tensors
from metaopt.core.plain import PlainSteps
from metaopt.core.unrolled import entries
from metaopt.core.view import Models, Tensors
from metaopt.estimators.products.base import DoubleBackward, Pullback, Wanted, leaves, linearized
from metaopt.estimators.step_loss import Key, StepLoss
from metaopt.estimators.storage import StepRecord
from metaopt.estimators.sweep import Sweep
from metaopt.estimators.update_vjp import Below

Cotangents = dict[Key, Tensor]
LOWER = "lower the inner learning rate, or clip: Stage(..., transform=metaopt.ClipNorm(1.0))"
LOOK = "look for a root or norm at 0, a log of 0 or 0/0 in the loss"


def locate_non_finite(
    chain: Chain, meta_loss: Callable[[TrainedChain], Tensor], meta_params: AnyMetaParameters
) -> str | None:
    """Say where a hypergradient first stops being finite: in the meta-objective, or at a stage's inner step.

    The stages are run again, and swept back step by step, by the exact product. The chain is not changed.

    Args:
        chain, meta_params: in the state in which the chain was unrolled.
        meta_loss: trained models → meta-loss, such as `lambda trained: objective(trained, batch, meta_params)`.

    Returns:
        What, in which stage, at which inner step, and the line of the loss if torch names it; None if all is finite.

    Raises:
        NonFiniteError: a stage's training itself stops being finite; it says where.
    """
    meta_params = as_modules(meta_params)
    with torch.no_grad(), locating_in_training():
        trained = chain.unroll(meta_params)
    models = Models()
    for name, model in trained.items():
        names = chain.stages[name].rule.names
        models[name] = model.with_params({n: p.detach().requires_grad_(n in names) for n, p in model.params.items()})
    results = {name: dataclasses.replace(result, model=models[name]) for name, result in trained.results.items()}
    cotangents: Cotangents = {}
    found = _at_objective(meta_loss(TrainedChain(results, None)), models, meta_params, cotangents)
    for name, stage in reversed(chain.stages.items()):
        upstream = Models(itertools.takewhile(lambda pair, name=name: pair[0] != name, models.items()))
        own = {n: cotangents.pop((name, n)) for n in stage.rule.names if (name, n) in cotangents}
        if own and not found:
            found = _through_stage(stage.begin(name, upstream, {}), meta_params, upstream, own, cotangents)
    return found


def located(
    error: NonFiniteError, chain: Chain, meta_loss: Callable[[TrainedChain], Tensor], meta_params: AnyMetaParameters
) -> NonFiniteError:
    """Return the error of a backward with where it arose, if `locate_non_finite` finds it."""
    where = locate_non_finite(chain, meta_loss, meta_params)
    return NonFiniteError(f"{error}. It arises {where}") if where else error


@contextmanager
def locating_in_training() -> Iterator[None]:
    """Say of a training inside the block that stops being finite what does so first, by running it once more."""
    try:
        yield
    except NonFiniteError as error:
        raise located_in_training(error) from None


def located_in_training(error: NonFiniteError) -> NonFiniteError:
    """Return the error of a training with what stopped being finite first, if it can be run again."""
    if error.training is None:
        return error
    loop, first = error.training[0], _first_in_training(*error.training)
    if isinstance(loop.batches, Passing):
        loop.batches.rewind()
    return NonFiniteError(f"stage {loop.name!r}: {first}") if first else error


def _first_in_training(loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> str | None:
    """Run a stage's steps once more, looking at each, and say what stops being finite first; None if nothing does."""
    if found := broken(named_tensors(meta_params)):
        return f"meta-parameter {found} is not finite before the first inner step; lower the meta-learning rate"
    with torch.no_grad():
        start = loop.start(loop.own, meta_params, upstream)
    if found := broken(start):
        return f"parameter {found} is not finite before the first inner step"
    models = Models({name: model.detach() for name, model in upstream.items()})
    steps = PlainSteps(loop, start, loop.rule.initial_state(), loop.start_buffers(), meta_params, models)
    for t in range(loop.num_steps):
        where, weights = f"inner step {t} of {loop.num_steps}", steps.weights().values()
        loss, gradients = steps.gradient(t)
        if not bool(loss.isfinite()):
            largest = max((float(w.abs().max()) for w in weights if w.numel()), default=0.0)
            return (
                f"the inner loss is {loss.item()} at {where}, with finite weights of up to {largest:.3g}; where they "
                f"grow, {LOWER}; otherwise {LOOK} or what is not finite in the batch"
            )
        if found := broken(gradients):
            return (
                f"the inner gradient of {found} is not finite at {where}, though the loss is {loss.item():.6g}; {LOOK}"
            )
        steps.update(t, gradients)
        if found := broken(steps.weights()):
            return f"parameter {found} is not finite after {t + 1} inner steps of {loop.num_steps}; {LOWER}"
    return None


def broken(tensors: Mapping[Any, Tensor | None]) -> str:
    """Name the tensors that are not finite, or return an empty string."""
    bad = [key for key, t in tensors.items() if t is not None and not bool(entries(t.detach()).isfinite().all())]
    return ", ".join(repr(key) for key in bad[:3]) + (", …" if len(bad) > 3 else "")


def _at_objective(
    meta_loss: Tensor, models: Models, meta_params: AnyMetaParameters, cotangents: Cotangents
) -> str | None:
    """Differentiate the meta-objective alone, by trained weights and meta-parameters."""
    if not bool(meta_loss.isfinite()):
        return f"in the meta-objective: it is {meta_loss.item()}, at trained weights that are finite; {LOOK}"
    inputs: Cotangents = {(None, name): tensor for name, tensor in named_tensors(meta_params).items()}
    inputs |= {(stage, n): p for stage, model in models.items() for n, p in model.params.items() if p.requires_grad}
    gradients = torch.autograd.grad(meta_loss, list(inputs.values()), allow_unused=True)
    cotangents |= {key: g for key, g in zip(inputs, gradients, strict=True) if g is not None}
    bad = broken({f"{stage}.{name}" if stage else name: g for (stage, name), g in cotangents.items()})
    return f"in the meta-objective: its derivative by {bad} is not finite; {LOOK}" if bad else None


def _through_stage(
    loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream, above: Tensors, cotangents: Cotangents
) -> str | None:
    """Pull the cotangents of a stage's trained weights back through its steps, looking at each."""
    sweep = Sweep(loop, meta_params, upstream, DoubleBackward())
    start = loop.start(loop.own, meta_params, upstream)
    sweep.forward([start[name].detach() for name in loop.rule.names])
    below = Below(above)
    for t in reversed(range(loop.num_steps)):
        record = sweep.rebuild(t, False)
        last, below = below, sweep.step_back(t, record, below, cotangents)
        state = {(name, key): c for name, entry in below.state.items() for key, c in entry.items()}
        if broken(below.params) or broken(state) or broken(cotangents):
            return f"in stage {loop.name!r}, at inner step {t} of {loop.num_steps}: {_half(sweep, t, record, last)}"
    learned = [name for name, p in start.items() if p.grad_fn is not None]
    heads, weights = [start[name] for name in learned], [below.params.get(name) for name in learned]
    gradients = linearized(heads, weights, list(named_tensors(meta_params).values()))
    if broken(cotangents) or broken(dict(enumerate(gradients))):
        return f"in stage {loop.name!r}, before its first inner step: in a learned start"
    return None


def _half(sweep: Sweep, t: int, record: StepRecord, above: Below) -> str:
    """Say which half of a step has no finite derivative, and at which line if torch finds it."""
    gradient, _ = sweep.linearize(t, record, Wanted())
    raw = record.gradient or dict(zip(record.params, gradient, strict=True))
    if broken(sweep.update_back(t, record, raw, above, {})[1]):
        return "the optimizer's own step, or the gradient transform, has no finite derivative there; raise its eps"
    sweep.product = looking = _Looking()
    sweep.step_back(t, record, above, {})
    return f"the second derivative of the inner loss is not finite there{looking.line}; {LOOK}"


class _Looking(DoubleBackward):
    """Notes the line outside torch and metaopt whose second derivative is the first that is not finite."""

    line = ""

    def linearize(
        self, loss: StepLoss, params: Sequence[Tensor], others: Sequence[Tensor], wanted: Wanted
    ) -> tuple[Any, Pullback]:
        """Build the gradient with its graph, every node of which notes where it comes from."""
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it takes longer
            with torch.autograd.set_detect_anomaly(True, check_nan=False):
                at, beside = leaves(params), leaves(others)
                weights = loss.named(at)
                value = loss(weights, beside)
                gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
        for node in nodes(gradient for gradient in gradients if gradient is not None):
            node.register_hook(functools.partial(self._look, node))
        return gradients, lambda u: (linearized(gradients, u, at, True), linearized(gradients, u, beside))

    def _look(self, node: Any, below: Sequence[Tensor | None], above: Sequence[Tensor | None]) -> None:
        if not self.line and broken(dict(enumerate(below))) and not broken(dict(enumerate(above))):
            self.line = _line_of(node)


def _line_of(node: Any) -> str:
    """Return the innermost line outside torch and metaopt that made a node, or the one that it differentiates."""
    libraries = [str(Path(module.__file__ or "").parent) for module in (torch, metaopt)]
    while node is not None:
        traceback = "".join(node.metadata.get("traceback_", ()))
        frames = re.findall(r'File "(.+?)", line (\d+), in .*\n +(.+)', traceback)
        own = [frame for frame in frames if not any(frame[0].startswith(folder) for folder in libraries)]
        node = node.metadata.get("parent_")
        if node is None and own:
            return f", at {own[-1][0]}:{own[-1][1]}: `{own[-1][2]}`"
    return ""
