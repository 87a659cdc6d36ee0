"""Exact reverse-mode differentiation through every inner step, by the graph that `higher` builds."""

from __future__ import annotations

from metaopt.core.contracts import Estimator, Upstream
from metaopt.core.graphs import behind_boundary, stages_read
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.view import differentiable_copy
from metaopt.optimizers.rule import HigherOptimizer


class Unrolled(Estimator):
    """Keep every inner step in the graph: exact, memory grows by one step's activations per inner step.

    `θ_{t+1} = Φ_t(θ_t, ∂L_t/∂θ_t, φ)`, and autograd differentiates the composition (Maclaurin et al., 2015,
    arXiv:1502.03492; Grefenstette et al., 2019, arXiv:1910.01727).
    """

    def __repr__(self) -> str:
        return "Unrolled()"

    def differentiate(self, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> InnerResult:
        """Run the loop by `higher`, one differentiable step after the other."""
        rule, names = loop.rule, loop.rule.names
        own = loop.structure.params
        optimizer = HigherOptimizer(rule, [own[name] for name in names], rule.initial_state())
        frozen, buffers, losses = loop.frozen, loop.start_buffers(), []
        with differentiable_copy(loop.structure, optimizer, names) as fast:
            params = loop.start(fast.params, meta_params, upstream)
            joint: list[str] = []
            for t in range(loop.num_steps):
                params, seen = behind_boundary(params, upstream, joint)
                loss, buffers = loop.loss_at(t, {**frozen, **params}, buffers, meta_params, seen, fast.call)
                if t == 0:
                    loop.check_graph(loss)
                    joint = stages_read(loss, seen)

                def transformed(gradients: tuple, t: int = t) -> list:
                    by_name = dict(zip(names, gradients, strict=True))
                    if t == 0:
                        loop.check_gradients(by_name)
                    return list(loop.transformed(by_name).values())

                params = fast.step(
                    loss, params, override=loop.hyperparameters(t, meta_params), grad_callback=transformed
                )
                losses.append(loss)
                loop.watch(losses)
            state = fast.optimizer_state
        return loop.finish(params, buffers, state, losses)
