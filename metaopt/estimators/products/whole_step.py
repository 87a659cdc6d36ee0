"""A whole step of a sweep as one captured graph: gradient, update and the pull-back of both."""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from metaopt.base.streams import set_seed
from metaopt.estimators.products.base import DoubleBackward, PullBack, agree
from metaopt.estimators.products.given import Given
from metaopt.estimators.step_loss import StepLoss
from metaopt.estimators.storage import StepRecord
from metaopt.optimizers.kinds import SUPPORTED
from metaopt.optimizers.rule import Joined

MOST_WEIGHTS = 2**14  # of a model whose operations are so short that calling them is what takes the time
MOST_TENSORS = 32  # that its weights are in: tracing takes its time by operation, seconds a step for a transformer
MOST_STEPS = 16


@dataclass
class _Step:
    """A captured step: its graph, the structure of what it returns, and what its key has the `id`s of."""

    graph: fx.GraphModule
    spec: pytree.TreeSpec
    anchors: tuple[object, ...]


class WholeSteps:
    """The captured steps of a product, by all that steers them and is no tensor; None for what cannot be captured.

    A step is captured where nothing but tensors differs from step to step: one of torch's own optimizers, without
    transform. What a schedule or overrides give it are tensors too, where it could be learned. Its loss must be the one
    that the forward had, or its product is taken instead.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # spent on tracing
        self._steps: OrderedDict[Hashable, _Step | None] = OrderedDict()
        self._last: tuple[Any, ...] | None = None  # sweep, structure, key: what the next step is likely to have

    def take(self, pull_back: Any, loss: StepLoss, others: Sequence[Tensor], above: Any) -> Any:
        """Return the cotangents below a step, and of `others`, by its captured graph; None if it has none."""
        loop, record = loss.loop, loss.record
        own = type(loop.rule.optimizer) in SUPPORTED and loop.transform is None and not loss.obstacle
        if not own or len(loop.rule.names) > MOST_TENSORS or sum(x.numel() for x in loss.params) > MOST_WEIGHTS:
            return None
        given = Given(loss, others)
        if not given.possible:
            return None
        at = record.params, record.state, record.gradient, above.params, above.state
        held = (*at, tuple(others), loss.context, given.inputs)
        parts = list(_leaves(held))
        tensors = [x for x in parts if isinstance(x, Tensor)]
        shape = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in parts]
        shape.append(tuple([tuple(b) if isinstance(b, Mapping) else type(b) for b in loop.batches[loss.t]]))
        key = self._key(pull_back, loss, [*shape, *given.structure], given)
        if key not in self._steps:
            right = pull_back(DoubleBackward(), loss, others, above)
            start = time.perf_counter()
            step = self._captured(pull_back, loss, above, held, given)
            self.seconds += time.perf_counter() - start
            agrees = step is not None and _alike(self._replayed(step, loss, above, tensors, given), right)
            self._steps[key] = step if agrees else None
            if len(self._steps) > MOST_STEPS:
                self._steps.popitem(last=False)
            return right
        step = self._steps[key]
        found = None if step is None else self._replayed(step, loss, above, tensors, given)
        if found is None:
            self._steps[key] = None  # more than tensors has changed: its product sees what
        return found

    def _replayed(self, step: _Step, loss: StepLoss, above: Any, tensors: Sequence[Tensor], given: Given) -> Any:
        """Return what the captured step gives; None if its loss is not the one that the forward had."""
        with torch.no_grad():
            set_seed(loss.loop.seeds[loss.t], loss.loop.device)
            value, *found = step.graph.forward(*tensors)
        known = loss.record.loss
        if known is not None and not torch.equal(value, known) and not torch.allclose(value, known, equal_nan=True):
            return None
        params, state, sums = pytree.tree_unflatten(found, step.spec)
        return type(above)(params, state), given.pulled_back(sums)

    def _key(self, pull_back: Any, loss: StepLoss, shape: Any, given: Given) -> Hashable:
        sweep, known = pull_back.__self__, self._last
        if known is None or known[0]() is not sweep or known[1] != shape:
            signature = loss.signature, sweep.first_order, given.beside(), str(shape)
            self._last = known = weakref.ref(sweep), shape, signature
        return known[2]

    def _captured(self, pull_back: PullBack, loss: StepLoss, above: Any, held: Any, given: Given) -> _Step | None:
        made: list[pytree.TreeSpec] = []
        parts, spec = pytree.tree_flatten(held)
        if list(map(id, parts)) != list(map(id, _leaves(held))):
            return None

        def whole(*inputs: Tensor) -> list[Tensor]:
            rest = iter(inputs)
            rebuilt = [next(rest) if isinstance(x, Tensor) else x for x in parts]
            params, state, gradient, of_params, of_state, *beside = pytree.tree_unflatten(rebuilt, spec)
            others, context, numbers = beside
            with torch.enable_grad():
                record = StepRecord(params, state, loss.record.buffers, gradient, handed=given.handed(numbers))
                traced = loss.traced(record, context)
                below, sums = pull_back(DoubleBackward(), traced, others, type(above)(of_params, of_state))
            out, structure = pytree.tree_flatten((below.params, below.state, sums))
            made.append(structure)
            assert traced.value is not None
            return [traced.value.detach().clone(), *out]

        try:
            graph = make_fx(whole, tracing_mode="fake", _allow_non_fake_inputs=True)(
                *[x for x in parts if isinstance(x, Tensor)]
            )
        except Exception:  # the product says why, when it meets the same
            return None
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return _Step(graph, made[-1], loss.anchors)


def _leaves(tree: Any) -> Iterator[Any]:
    """Yield the leaves of a structure in pytree's order, at a fraction of its time."""
    if isinstance(tree, Joined):
        tree = (*tree.pieces.values(), *tree.alone.values())
    if isinstance(tree, (dict, list, tuple)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(part)
    else:
        yield tree


def _alike(found: Any, right: Any) -> bool:
    """Whether two results are equal but for rounding."""
    if found is None or found[1].keys() != right[1].keys():
        return False
    ordered = {key: found[1][key] for key in right[1]}
    one, other = (pytree.tree_leaves((x.params, x.state, sums)) for x, sums in ((found[0], ordered), right))
    return len(one) == len(other) and agree(one, other)
