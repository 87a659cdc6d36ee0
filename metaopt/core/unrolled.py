"""Exact reverse-mode differentiation through every inner step, by the graph that `higher` builds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import higher
from torch import Tensor, nn

from metaopt.core.contracts import Estimator, Upstream
from metaopt.core.graphs import behind_boundary, models_behind_boundary
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.view import Tensors
from metaopt.optimizers.flattened import named
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
        buffers, losses = loop.start_buffers(), []
        with loop.opened(upstream), higher_loop(loop) as fast:
            params = loop.start(fast.params, meta_params, upstream)
            seen = models_behind_boundary(upstream)
            for t in range(loop.num_steps):
                params = behind_boundary(params)
                own = {**loop.frozen, **named(params)}
                loss, buffers = loop.loss_at(t, own, buffers, meta_params, seen, fast.call)
                if t == 0:
                    loop.check_graph(loss)
                params = fast.step(t, loss, params, loop.hyperparameters(t, meta_params))
                losses.append(loss)
                loop.watch(losses)
            state = fast.state
        return loop.finish(dict(params), buffers, state, losses)


class HigherLoop:
    """One `higher.innerloop_ctx` over a stage's trained parameters: `params` → `call` → `step`, all in the graph."""

    def __init__(self, loop: InnerLoop, fmodel: Any, diffopt: Any) -> None:
        self._loop, self._names, self._fmodel, self._diffopt = loop, loop.rule.names, fmodel, diffopt

    @property
    def params(self) -> Tensors:
        """The present fast weights, by name."""
        return dict(zip(self._names, self._fmodel.fast_params, strict=True))

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """The inner optimizer's state by parameter name, in the graph."""
        return self._diffopt.named_state

    def call(self, params: Mapping[str, Tensor], buffers: Tensors, training: bool, args: Any, kwargs: Any) -> Any:
        """Run the model through `higher`'s patched view; frozen parameters come along as they are."""

        def run(fast: Sequence[Tensor]) -> Any:
            lent = {**params, **dict(zip(self._names, fast, strict=True))}
            return self._loop.structure.call(lent, buffers, training, args, kwargs)

        return self._fmodel(run, params=[params[name] for name in self._names])

    def step(self, t: int, loss: Tensor, params: Tensors, hyperparameters: Mapping[str, Any]) -> Tensors:
        """Take inner step t by `higher`: the gradient of `loss`, then the update."""
        self._diffopt.named_params, by_name = params, named(params)
        self._diffopt.step(
            loss,
            params=[by_name[name] for name in self._names],
            override=hyperparameters,
            grad_callback=functools.partial(self._transformed, t),
        )
        return self._diffopt.named_params

    def _transformed(self, t: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        by_name = dict(zip(self._names, gradients, strict=True))
        if t == 0:
            self._loop.check_gradients(by_name)
        return list(self._loop.transformed(by_name).values())


class _View(nn.Module):
    """What `higher` patches: the trained parameters under plain names, and a forward that hands them on."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for i, param in enumerate(params.values()):
            self.register_parameter(f"p{i}", param)

    def forward(self, run: Callable[[Sequence[Tensor]], Any]) -> Any:
        return run(list(self._parameters.values()))


@contextmanager
def higher_loop(loop: InnerLoop) -> Iterator[HigherLoop]:
    """Open `higher.innerloop_ctx` over copies of a stage's trained parameters; release what it holds on leaving."""
    optimizer: Any = HigherOptimizer(loop.rule, list(loop.own.values()), loop.rule.initial_state())
    with higher.innerloop_ctx(_View(loop.own), optimizer, copy_initial_weights=True) as opened:
        fmodel: Any = opened[0]
        diffopt: Any = opened[1]
        try:
            yield HigherLoop(loop, fmodel, diffopt)
        finally:
            fmodel._fast_params = []  # higher refers in circles to every step's weights, and they to their graph
            fmodel._parameters.clear()
            diffopt.release()
