"""The reverse sweep over stored inner steps, as one `torch.autograd.Function` per stage.

The forward runs the inner loop without a graph. The backward goes through the steps from the last to the first:
rebuild the step; pull the cotangent of (weights, state) back through the update (the optimizer's own step, with the
raw gradient as a leaf); pull what reaches the gradient back through it (the second-order product).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metaopt.errors import StageError
from metaopt.estimators.products import Product, leaves
from metaopt.estimators.stores import Kept, StepRecord, Tape
from metaopt.functional import FunctionalModel, graph_leaves
from metaopt.inner_loop import InnerLoop, InnerResult, PlainSteps, Upstream
from metaopt.meta_params import AnyMetaParameters, named_tensors, rebound
from metaopt.optimizers import State, carries_gradient

Tensors = dict[str, Tensor]
Key = tuple[str | None, str]  # (upstream stage, or None for a meta-parameter; name)
StateKey = tuple[str, str]  # (parameter; which piece of its optimizer state)


class Sweep:
    """One stage's inner loop, run without a graph and differentiated step by step in reverse.

    Args:
        loop: the steps.
        meta_params, upstream: what the trained weights depend on, beside the initial weights.
        product: how second-order products are computed.
        kept: what is stored of the steps.
        first: the first step that is differentiated; those before count as constants (truncation).
        first_order: drop `∂²L/∂θ²`, so that a step's weights depend on the last ones as if by identity.
    """

    def __init__(
        self,
        loop: InnerLoop,
        meta_params: AnyMetaParameters,
        upstream: Upstream,
        product: Product,
        kept: Kept,
        first: int = 0,
        first_order: bool = False,
    ) -> None:
        self.loop, self.meta_params, self.upstream = loop, meta_params, upstream
        self.product, self.first, self.first_order = product, first, first_order
        meta: dict[Key, Tensor] = {(None, name): t for name, t in named_tensors(meta_params).items()}
        above: dict[Key, Tensor] = {
            (stage, name): p for stage, model in upstream.items() for name, p in model.params.items() if p.requires_grad
        }
        self.others = {**meta, **above}
        self._plain = {name: model.detach() for name, model in upstream.items()}
        self.tape = Tape(kept, loop, meta_params, self._plain, first)

    def run(self) -> InnerResult:
        """Run the inner loop; the result's weights are in the graph of everything in `others` and of learned starts."""
        loop = self.loop
        own = {name: p.detach().clone() for name, p in loop.structure.params.items()}
        start = loop.start({name: own[name] for name in loop.rule.names}, self.meta_params, self.upstream)
        names = list(start)
        result: list[InnerResult] = []
        outputs = _Stage.apply(self, result, len(names), *start.values(), *self.others.values())
        done = result[0]
        params = {**done.model.params, **dict(zip(names, outputs, strict=True))}
        state, buffers = done.model.optimizer_state, done.model.buffers
        done.model = FunctionalModel(loop.structure, params, buffers, optimizer_state=state)
        return done

    def forward(self, start: Sequence[Tensor]) -> InnerResult:
        """Run every step with torch's own optimizer, and keep what the backward needs."""
        loop = self.loop
        initial = dict(zip(loop.rule.names, start, strict=True))
        plain = {name: t.detach() for (stage, name), t in self.others.items() if stage is None}
        losses = []
        with rebound(self.meta_params, plain):
            args = (loop.rule.initial_state(), loop.start_buffers(), self.meta_params, self._plain)
            steps = PlainSteps(loop, initial, *args)
            for t in range(loop.num_steps):
                self.tape.record(t, steps)
                buffers = steps.buffers
                loss, gradient = steps.gradient(t, self._refuse_closures if t == 0 else None)
                if t == 0:
                    loop.check_gradients(gradient)
                self.tape.record_gradient(t, gradient, buffers)
                steps.update(t, gradient)
                losses.append(loss)
        return loop.finish(steps.weights(), steps.buffers, steps.state(), losses)

    def _refuse_closures(self, loss: Tensor, params: Tensors) -> None:
        """Raise if the loss reads tensors that require grad and are neither handed in nor learned here."""
        self.loop.check_graph(loss)
        known = {id(p) for p in params.values()}
        unknown = [leaf for leaf in graph_leaves(loss) if id(leaf) not in known]
        if unknown:
            shapes = ", ".join(str(list(leaf.shape)) for leaf in unknown[:3])
            raise StageError(
                f"the loss of stage {self.loop.name!r} closes over {len(unknown)} tensor(s) that require grad (shapes "
                f"{shapes}): their gradient would be lost here. Give them as meta-parameters, or use Unrolled()"
            )

    def backward(self, cotangents: Sequence[Tensor | None]) -> tuple[Tensors, dict[Key, Tensor]]:
        """Return the cotangents of the initial weights and of `others`."""
        names = self.loop.rule.names
        params: Tensors = {n: c for n, c in zip(names, cotangents, strict=True) if c is not None}
        state: dict[StateKey, Tensor] = {}
        others: dict[Key, Tensor] = {}
        plain = {name: t.detach() for (stage, name), t in self.others.items() if stage is None}
        for t in reversed(range(self.first, self.loop.num_steps)):
            with rebound(self.meta_params, plain):
                record = self.tape.rebuild(t)
            params, state = self._step_back(t, record, params, state, others)
        return (params if self.first == 0 else {}), others

    def _step_back(
        self, t: int, record: StepRecord, params: Tensors, state: dict[StateKey, Tensor], others: dict[Key, Tensor]
    ) -> tuple[Tensors, dict[StateKey, Tensor]]:
        """Pull cotangents back through step t; those of `others` are added in place."""
        names = list(record.params)
        detached = [tensor.detach() for tensor in self.others.values()]
        gradient, pullback = self.product.linearize(self._loss(t, record), list(record.params.values()), detached)
        raw = record.gradient or dict(zip(names, gradient, strict=True))
        direct, before, through_gradient = self._update_back(t, record, raw, params, state, others)
        second, to_others = pullback([through_gradient.get(name) for name in names])
        for key, cotangent in zip(self.others, to_others, strict=True):
            _add(others, key, cotangent)
        if not self.first_order:
            for name, cotangent in zip(names, second, strict=True):
                _add(direct, name, cotangent)
        return direct, before

    def _loss(self, t: int, record: StepRecord) -> Any:
        """Return step t's loss as a function of (params, others)."""
        loop, keys, names, frozen = self.loop, list(self.others), list(record.params), self.loop.frozen

        def loss(params: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
            given = dict(zip(keys, others, strict=True))
            upstream = self._upstream_with(given)
            with rebound(self.meta_params, {name: x for (stage, name), x in given.items() if stage is None}):
                weights = {**frozen, **dict(zip(names, params, strict=True))}
                return loop.loss_at(t, weights, record.buffers, self.meta_params, upstream)[0]

        return loss

    def _upstream_with(self, given: Mapping[Key, Tensor]) -> dict[str, FunctionalModel]:
        return {
            stage: model._with({name: given.get((stage, name), p) for name, p in model.params.items()})
            for stage, model in self._plain.items()
        }

    def _update_back(
        self,
        t: int,
        record: StepRecord,
        gradient: Mapping[str, Tensor | None],
        params: Tensors,
        state: dict[StateKey, Tensor],
        others: dict[Key, Tensor],
    ) -> tuple[Tensors, dict[StateKey, Tensor], Tensors]:
        """Pull cotangents back through `update`: to the weights and state before it, and to the raw gradient."""
        present = {name: g for name, g in gradient.items() if g is not None}
        flowing = {(n, k): v for n, entry in record.state.items() for k, v in entry.items() if carries_gradient(k, v)}
        at, raw, kept = _as_leaves(record.params), _as_leaves(present), _as_leaves(flowing)
        learned = _as_leaves({name: t for (stage, name), t in self.others.items() if stage is None})
        entries: State = {n: {k: kept.get((n, k), v) for k, v in entry.items()} for n, entry in record.state.items()}
        with torch.enable_grad(), rebound(self.meta_params, learned):
            hyperparameters = self.loop.hyperparameters(t, self.meta_params)
            transformed = self.loop.transformed({**gradient, **raw})
            after, state_after = self.loop.rule.step(at, transformed, entries, hyperparameters)
        outputs = [(after[name], cotangent) for name, cotangent in params.items()]
        outputs += [(state_after[n][k], cotangent) for (n, k), cotangent in state.items()]
        found = iter(_vjp(outputs, [*at.values(), *raw.values(), *kept.values(), *learned.values()]))
        direct, to_gradient, before, to_learned = (
            {key: next(found) for key in part} for part in (at, raw, kept, learned)
        )
        for name, cotangent in to_learned.items():
            _add(others, (None, name), cotangent)
        return _present(direct), _present(before), _present(to_gradient)


def _as_leaves(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    return dict(zip(tensors, leaves(list(tensors.values())), strict=True))


def _present(cotangents: Mapping[Any, Tensor | None]) -> dict[Any, Tensor]:
    return {key: cotangent for key, cotangent in cotangents.items() if cotangent is not None}


def _vjp(outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    outputs = [(head, weight) for head, weight in outputs if head.requires_grad]
    if not outputs:
        return [None] * len(inputs)
    heads, weights = zip(*outputs, strict=True)
    return list(torch.autograd.grad(heads, inputs, weights, allow_unused=True))


def _add(into: dict[Any, Tensor], key: Any, cotangent: Tensor | None) -> None:
    if cotangent is not None:
        into[key] = into[key] + cotangent if key in into else cotangent


class _Stage(torch.autograd.Function):
    """A stage as one node: (initial weights, meta-parameters, upstream weights) → trained weights."""

    @staticmethod
    def forward(ctx: Any, sweep: Sweep, result: list[InnerResult], num_params: int, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.sweep, ctx.num_params = sweep, num_params
        ctx.save_for_backward(*tensors)  # notices an in-place change of A between the forward and the backward
        result.append(sweep.forward(tensors[:num_params]))
        return tuple(result[0].model.params[name] for name in sweep.loop.rule.names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        sweep = ctx.sweep
        _ = ctx.saved_tensors
        params, others = sweep.backward(cotangents)
        of_params = [params.get(name) for name in sweep.loop.rule.names]
        return None, None, None, *of_params, *(others.get(key) for key in sweep.others)
