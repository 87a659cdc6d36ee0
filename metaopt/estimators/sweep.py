"""The reverse sweep over stored inner steps, as one `torch.autograd.Function` per stage.

The forward runs the inner loop without a graph. The backward goes through the steps from the last to the first:
rebuild the step; pull the cotangent of (weights, state) back through the update (the optimizer's own step, with the
raw gradient as a leaf); pull what reaches the gradient back through it (the second-order product).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import StageError
from metaopt.base.streams import CHANGED, versions
from metaopt.core.contracts import Upstream
from metaopt.core.graphs import graph_leaves, refuse_second_derivative
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters, Lending, named_tensors
from metaopt.core.plain import PlainSteps
from metaopt.core.view import Models, Tensors
from metaopt.estimators.products.base import Product, Wanted
from metaopt.estimators.step_loss import Key, StepLoss, fixed_of, settings_of
from metaopt.estimators.storage import StepRecord, Storage
from metaopt.estimators.update_vjp import Below, add, added, update_vjp
from metaopt.optimizers.rule import State


class Sweep:
    """One stage's inner loop, run without a graph and differentiated step by step in reverse.

    Args:
        loop: the steps.
        meta_params, upstream: what the trained weights depend on, beside the initial weights.
        product: how second-order products are computed.
        storage: what is kept of the steps, and where; every state, on the device, if None.
        first: the first step that is differentiated; those before count as constants (truncation).
        first_order: drop `∂²L/∂θ²`, so that a step's weights depend on the last ones by the update alone.
    """

    def __init__(
        self,
        loop: InnerLoop,
        meta_params: AnyMetaParameters,
        upstream: Upstream,
        product: Product,
        storage: Storage | None = None,
        first: int = 0,
        first_order: bool = False,
    ) -> None:
        self.loop, self.meta_params, self.upstream, self.product = loop, meta_params, upstream, product
        self.first, self.first_order = first, first_order
        self._lend = Lending(meta_params)
        plain = Models({name: model.detach() for name, model in upstream.items()})

        def steps_from(
            params: Mapping[str, Tensor], state: State, buffers: Tensors
        ) -> PlainSteps:  # refers to no sweep: no cycle
            return PlainSteps(loop, params, state, buffers, meta_params, plain)

        self._plain, self._steps_from = plain, steps_from
        self.others: dict[Key, Tensor] = {(None, name): t for name, t in named_tensors(meta_params).items()}
        for stage, model in upstream.items():
            self.others |= {(stage, name): p for name, p in model.params.items() if p.requires_grad}
        self._settings, self._fixed = settings_of(loop, meta_params, plain), fixed_of(loop, plain)
        self._versions, self._frozen = versions(loop.batches), versions(loop.frozen)
        self.tape = (storage or Storage("states")).tape(loop, steps_from, first, product.uses_known_gradient)

    def run(self) -> InnerResult:
        """Run the inner loop; the result's weights are in the graph of everything in `others` and of learned starts."""
        own = {name: self.loop.structure.params[name].detach().clone() for name in self.loop.rule.names}
        start = self.loop.start(own, self.meta_params, self.upstream)
        result: list[InnerResult] = []
        outputs = _Stage.apply(self, result, len(start), *start.values(), *self.others.values())
        done = result[0]
        done.model = done.model.with_params({**done.model.params, **dict(zip(start, outputs, strict=True))})
        return done

    # --- forward ------------------------------------------------------------------------------------------------

    def forward(self, start: Sequence[Tensor]) -> InnerResult:
        """Run every step with torch's own optimizer, and keep what the backward needs."""
        loop, losses = self.loop, []
        initial = dict(zip(loop.rule.names, start, strict=True))
        with loop.opened(self._plain), self._lend(self._plain_meta):
            steps = self._steps_from(initial, loop.rule.initial_state(), loop.start_buffers())
            for t in range(loop.num_steps):
                self.tape.record(t, steps)
                buffers = steps.buffers
                loss, gradient = steps.gradient(t, self._refuse_closures if t == 0 else None)
                if t == 0:
                    loop.check_gradients(gradient)
                self.tape.record_gradient(t, gradient, buffers)
                steps.update(t, gradient)
                losses.append(loss)
                loop.watch(losses)
        self.require_unchanged()
        self._losses = dict(enumerate(losses)) if self.product.replays else {}
        return loop.finish(steps.weights(), steps.buffers, steps.state(), losses)

    @property
    def _plain_meta(self) -> Tensors:
        return {name: t.detach() for (stage, name), t in self.others.items() if stage is None}

    def _refuse_closures(self, loss: Tensor, params: Tensors) -> None:
        """Raise if the loss reads tensors that require grad and are neither handed in nor learned here."""
        loop = self.loop
        loop.check_graph(loss)
        known = {id(p) for p in params.values()}
        unknown = [leaf for leaf in graph_leaves(loss) if id(leaf) not in known]
        if any(leaf is t for leaf in unknown for t in self.others.values()):
            raise StageError(
                f"the loss of stage {loop.name!r} reads a meta-parameter from around it, whose gradient would be lost "
                "here: read it from the `meta_params` that the loss is handed, or use Unrolled()"
            )
        if unknown:  # what the loss makes anew at each call is its own affair (a gradient penalty's inputs)
            weights = {**loop.frozen, **params}
            again, _ = loop.loss_at(0, weights, loop.start_buffers(), self.meta_params, self._plain)
            kept = {id(leaf) for leaf in graph_leaves(again)}
            unknown = [leaf for leaf in unknown if id(leaf) in kept]
        if unknown:
            shapes = ", ".join(str(list(leaf.shape)) for leaf in unknown[:3])
            raise StageError(
                f"the loss of stage {loop.name!r} closes over {len(unknown)} tensor(s) that require grad (shapes "
                f"{shapes}): their gradient would be lost here. Freeze what is not learned "
                "(module.requires_grad_(False)), copy what is a batch's (x.clone().requires_grad_()), give the rest "
                "as meta-parameters, or use Unrolled()"
            )

    def require_unchanged(self) -> None:
        """Raise if a batch or a frozen weight has been written to since the steps began."""
        if versions(self.loop.frozen) != self._frozen:
            changed = zip(self.loop.frozen, self._frozen, versions(self.loop.frozen), strict=True)
            raise StageError(
                f"stage {self.loop.name!r}: the frozen weight {next(n for n, a, b in changed if a != b)!r} was changed "
                "between the unroll and its backward, which runs the steps again; call backward first, or unroll anew"
            )
        if versions(self.loop.batches) != self._versions:
            raise StageError(f"stage {self.loop.name!r}: {CHANGED}")

    # --- backward -----------------------------------------------------------------------------------------------

    def sweep_back(self, cotangents: Tensors, free: bool, others: dict[Key, Tensor]) -> Tensors:
        """Go through the steps in reverse; return the cotangents of the initial weights.

        Args:
            cotangents: of the trained weights.
            free: let go of each step once it is swept; there will be no second backward.
            others: cotangents of `self.others`, added to in place.
        """
        below = Below(cotangents)
        for t in reversed(range(self.first, self.loop.num_steps)):
            below = self.step_back(t, self.rebuild(t, free), below, others)
        return dict(below.params) if self.first == 0 else {}

    def rebuild(self, t: int, free: bool) -> StepRecord:
        """Return step t as it was."""
        with self._lend(self._plain_meta):
            return replace(self.tape.rebuild(t, free), loss=self._losses.get(t))

    def step_back(self, t: int, record: StepRecord, above: Below, others: dict[Key, Tensor]) -> Below:
        """Pull cotangents back through step t; those of `others` are added in place."""
        given = [x.detach() for x in self.others.values()]
        below, sums = self.product.take(self._pull_back, self.loss_of(t, record), given, above)
        for key, cotangent in sums.items():
            add(others, key, cotangent)
        return below

    def loss_of(self, t: int, record: StepRecord) -> StepLoss:
        """Return step t's loss as a function."""
        return StepLoss(t, record, self.loop, self._lend, self._plain, list(self.others), self._settings, self._fixed)

    def _pull_back(
        self, product: Product, loss: StepLoss, given: Sequence[Tensor], above: Below
    ) -> tuple[Below, dict[Key, Tensor]]:
        """Pull cotangents back through a step: linearize its loss, pull back the update, then the gradient."""
        record, sums = loss.record, dict[Key, Tensor]()
        wanted = Wanted(gradient=record.gradient is None, params=not self.first_order)
        gradient, pullback = self._linearized(product, loss, given, wanted)
        raw = record.gradient or dict(zip(record.params, gradient, strict=True))
        meta = {name: x for (stage, name), x in zip(self.others, given, strict=True) if stage is None}
        below, of_gradient = self.update_back(loss.t, record, raw, above, sums, meta)
        return replace(below, params=added(below.params, pullback(of_gradient, sums))), sums

    def linearize(self, t: int, record: StepRecord, wanted: Wanted) -> tuple[Any, Any]:
        """Return step t's gradient, and (u, sums) ↦ u·∂²L/∂θ² by name; u·∂²L/∂θ∂others is added to `sums`."""
        given = [x.detach() for x in self.others.values()]
        return self._linearized(self.product, self.loss_of(t, record), given, wanted)

    def _linearized(self, product: Product, loss: StepLoss, given: Sequence[Tensor], wanted: Wanted) -> tuple[Any, Any]:
        record = loss.record
        gradient, pull = product.linearize(loss, loss.params, given, wanted)

        def pullback(cotangents: Mapping[str, Tensor], sums: dict[Key, Tensor] | None) -> Mapping[str, Tensor]:
            second, beside = pull([cotangents.get(name) for name in record.params])
            if sums is not None:
                for key, cotangent in zip(self.others, beside, strict=True):
                    add(sums, key, cotangent)
            return loss.held(second)

        return gradient, pullback

    def update_back(
        self,
        t: int,
        record: StepRecord,
        gradient: Mapping[str, Tensor | None],
        above: Below,
        others: dict[Key, Tensor],
        meta: Tensors | None = None,
    ) -> tuple[Below, Mapping[str, Tensor]]:
        """Pull cotangents back through `update`: to what was before the step, and to the raw gradient."""
        learned = self._plain_meta if meta is None else meta
        below, of_gradient, learned = update_vjp(self.loop, t, record, gradient, learned, self._lend, above)
        for name, cotangent in learned.items():
            add(others, (None, name), cotangent)
        return below, of_gradient


def _will_run_again() -> bool:
    """Return whether the running backward keeps the graph (`retain_graph=True`); torch says so under no public name."""
    ask = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


class _Stage(torch.autograd.Function):
    """A stage as one node: (initial weights, meta-parameters, upstream weights) → trained weights."""

    @staticmethod
    def forward(ctx: Any, sweep: Sweep, result: list[InnerResult], num_params: int, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.sweep = sweep
        ctx.save_for_backward(*tensors)  # notices a second backward, and an in-place change of A before the first
        result.append(sweep.forward(tensors[:num_params]))
        return tuple(result[0].model.params[name] for name in sweep.loop.rule.names)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        sweep: Sweep = ctx.sweep
        refuse_second_derivative(f"stage {sweep.loop.name!r}", "give the stage estimator=metaopt.Unrolled()")
        _ = ctx.saved_tensors
        sweep.require_unchanged()
        names = sweep.loop.rule.names
        present = {n: c for n, c in zip(names, cotangents, strict=True) if c is not None}
        others: dict[Key, Tensor] = {}
        # autograd comes here also along a path that is cut above, with nothing
        with sweep.loop.opened(sweep.upstream):
            params = sweep.sweep_back(present, not _will_run_again(), others) if present else {}
        return None, None, None, *(params.get(name) for name in names), *(others.get(key) for key in sweep.others)
