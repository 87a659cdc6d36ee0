"""Exact reverse mode: every inner step in the graph that `higher` builds, and the one backward through all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import higher
import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, MissingPathError, NonFiniteError
from metaopt.core.contracts import Estimator, Upstream, require_scalar
from metaopt.core.inner_loop import InnerLoop, InnerResult
from metaopt.core.meta_params import AnyMetaParameters, TensorWeights, as_named, named_tensors
from metaopt.core.view import FunctionalModel, Models
from metaopt.optimizers.rule import Joined, State, named

OF = "trained by metaopt"  # in the metadata of the nodes of trained weights: chain, stage


class Unrolled(Estimator):
    """Keep every inner step in the graph: exact, memory grows by one step's activations per inner step.

    `θ_{t+1} = Φ_t(θ_t, ∂L_t/∂θ_t, φ)`, and autograd differentiates the composition (Maclaurin et al., 2015,
    arXiv:1502.03492; Grefenstette et al., 2019, arXiv:1910.01727).
    """

    def __repr__(self) -> str:
        return "Unrolled()"

    def differentiate(self, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> InnerResult:
        """Run the loop by `higher`, one differentiable step after the other."""
        buffers, losses, names = loop.start_buffers(), [], loop.rule.names
        with loop.opened(upstream), higher_loop(loop) as (fmodel, optimizer):

            def call(params: Mapping[str, Tensor], *args: Any) -> Any:
                def run(fast: Sequence[Tensor]) -> Any:
                    return loop.structure.call({**params, **dict(zip(names, fast, strict=True))}, *args)

                return fmodel(run, params=[params[name] for name in names])

            params: Mapping[str, Tensor] = dict(zip(names, fmodel.fast_params, strict=True))
            params, seen = loop.start(params, meta_params, upstream), models_behind_boundary(upstream)
            for t in range(loop.num_steps):
                params = behind_boundary(params)
                weights = {**loop.frozen, **named(params)}
                loss, buffers = loop.loss_at(t, weights, buffers, meta_params, seen, call)
                if t == 0:
                    loop.check_graph(loss)
                params = optimizer.advance(t, loss, params, loop.hyperparameters(t, meta_params))
                losses.append(loss)
                loop.watch(losses)
            return loop.finish(params, buffers, optimizer.named_state, losses)


class _View(nn.Module):
    """What `higher` patches: the trained parameters under plain names, and a forward that hands them on."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for i, param in enumerate(params.values()):
            self.register_parameter(f"p{i}", param)

    def forward(self, run: Callable[[Sequence[Any]], Any]) -> Any:
        return run(list(self._parameters.values()))


class _Optimizer:
    """What `higher` is handed in place of a torch optimizer: a private type, as its registry is the user's too."""

    def __init__(self, loop: InnerLoop) -> None:
        self.loop, self.state = loop, dict[Tensor, Any]()
        self.param_groups = [{"params": list(loop.own.values())}]


class _TorchOptimizer(higher.optim.DifferentiableOptimizer):
    """`higher`'s interface over `UpdateRule.step`: the one registration that serves every torch optimizer."""

    def __init__(self, other: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(other, *args, **kwargs)
        self._loop: InnerLoop = other.loop
        self.named_state: State = self._loop.rule.initial_state()
        self._next: tuple[int, Mapping[str, Tensor], Mapping[str, Any]] = 0, {}, {}

    def advance(
        self, t: int, loss: Tensor, params: Mapping[str, Tensor], hyperparameters: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Take inner step t: the gradient of `loss` by `higher`, then the update."""
        self._next, by_name = (t, params, hyperparameters), named(params)
        self.step(loss, params=[by_name[name] for name in self._loop.rule.names])
        return self._next[1]

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        (group,), (grads,) = self.param_groups, grouped_grads
        (t, params, hyperparameters), rule = self._next, self._loop.rule
        gradients = dict(zip(rule.names, grads, strict=True))
        if t == 0:
            self._loop.check_gradients(gradients)
        params, self.named_state = rule.step(
            params, self._loop.transformed(gradients), self.named_state, hyperparameters
        )
        moved, self._next = named(params), (t, params, hyperparameters)
        group["params"] = [moved[name] for name in rule.names]

    def release(self) -> None:
        """Let go of weights and state, which would keep the graph alive until the next garbage collection."""
        self.param_groups, self.named_state, self._next, self._fmodel = [], {}, (0, {}, {}), None


higher.register_optim(_Optimizer, _TorchOptimizer)  # pyright: ignore[reportArgumentType]


@contextmanager
def higher_loop(loop: InnerLoop) -> Iterator[tuple[Any, Any]]:
    """Open `higher.innerloop_ctx` over copies of a stage's trained parameters; release what it holds on leaving."""
    optimizer: Any = _Optimizer(loop)
    with higher.innerloop_ctx(_View(loop.own), optimizer, copy_initial_weights=True) as opened:
        fmodel, diffopt = list[Any](opened)
        try:
            yield fmodel, diffopt
        finally:
            fmodel._fast_params = []  # higher refers in circles to every step's weights, and they to their graph
            fmodel._parameters.clear()
            diffopt.release()


# --- where a stage's graph ends, and whose it is ----------------------------------------------------------------


class _Boundary(torch.autograd.Function):
    """Identity over many tensors as one node of the graph.

    `autograd.grad(loss, params)` walks back until it is past every target. A parameter that the loss does not use
    would make it walk the whole history at every step: O(T²). Behind one common node, no target lies deeper.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(map(Tensor.view_as, tensors, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


def behind_boundary(params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Pass an inner step's parameters through one identity node, unless they are views of one tensor already."""
    if isinstance(params, Joined) and len(params.pieces) == 1 and not params.alone:
        return params
    live = {name: tensor for name, tensor in params.items() if tensor.requires_grad}
    return {**params, **dict(zip(live, _Boundary.apply(*live.values()), strict=True))} if live else params


def models_behind_boundary(upstream: Mapping[str, FunctionalModel]) -> Models:
    """Pass each upstream model's weights through an identity node: what a stage's own graph ends at.

    From the second step on a stage's weights lie above the upstream ones that their gradient read: no walk goes past.
    """
    return Models({n: model.with_params(dict(behind_boundary(model.params))) for n, model in upstream.items()})


def sign(weights: Iterable[Tensor], chain: object, stage: str) -> None:
    """Note in the graph of trained weights whose they are, for an error that has nothing but the graph."""
    last: set[Any] = {weight.grad_fn for weight in weights} - {None}
    for node in last:
        node.metadata[OF] = (weakref.ref(chain), stage)


def entries(gradient: Tensor) -> Tensor:
    """Return a gradient's entries; of a sparse one, those of the rows that it holds."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


# --- the one backward, with what can be wrong with it said aloud ------------------------------------------------


def hypergradient(meta_loss: Tensor, meta_params: AnyMetaParameters, retain_graph: bool = False) -> dict[str, Tensor]:
    """Return d meta-loss / d meta-parameters by name (nothing if there is nothing to learn); no `.grad` is touched.

    Raises:
        NonFiniteError: the meta-loss or a hypergradient is NaN or infinite.
        MissingPathError: a meta-parameter has no path to the meta-loss.
    """
    meta_loss = require_scalar(meta_loss, "the meta-objective", needs_graph=False)
    tensors = named_tensors(meta_params)
    if not bool(meta_loss.isfinite()):
        raise NonFiniteError(
            f"the meta-loss is {meta_loss.item()}: the trained models overflowed on the validation batch; lower the "
            "inner learning rate or the number of inner steps. No meta-parameter was changed"
        )
    if not tensors:
        if any(isinstance(module, TensorWeights) for module in as_named(meta_params).values()):
            raise ConfigError(
                "the meta-parameters are given as a tensor that does not require grad, so nothing can be learned: "
                "torch.rand(2, requires_grad=True), or A.requires_grad_()"
            )
        return {}
    if not meta_loss.requires_grad:
        raise _missing(list(tensors), "the meta-loss has no graph at all")
    grads = torch.autograd.grad(meta_loss, list(tensors.values()), retain_graph=retain_graph, allow_unused=True)
    modules = [module for root in as_named(meta_params).values() for module in root.modules()]
    dense = {id(p) for m in modules if getattr(m, "sparse", None) is False for p in m.parameters(recurse=False)}
    found = {
        name: grad.to_dense() if grad.is_sparse and id(tensor) in dense else grad
        for (name, tensor), grad in zip(tensors.items(), grads, strict=True)
        if grad is not None
    }
    if missing := [name for name in tensors if name not in found]:
        raise _missing(missing, "no path of the graph leads from it to the meta-loss")
    if broken := [name for name, grad in found.items() if not bool(entries(grad).isfinite().all())]:
        raise NonFiniteError(
            f"the hypergradient of {', '.join(map(repr, broken))} is not finite though the meta-loss is "
            f"{meta_loss.item():.6g}; metaopt.locate_non_finite(...) says where it arises. Nothing was changed"
        )
    return found


def accumulate(hypergradients: Mapping[str, Tensor], meta_params: AnyMetaParameters) -> None:
    """Add hypergradients to the `.grad` of the meta-parameters, by name."""
    for name, tensor in named_tensors(meta_params).items():
        found = hypergradients[name]
        tensor.grad = found if tensor.grad is None else tensor.grad + found


def _missing(names: list[str], what: str) -> MissingPathError:
    listed = ", ".join(repr(name) for name in names)
    return MissingPathError(f"meta-parameter {listed}: {what}, so there is no hypergradient. {WHERE}", names)


WHERE = (
    "No loss or objective reads it, or argmax, .detach(), .item(), torch.no_grad() or torch.tensor(...) stands between "
    "it and the loss; at which line, says print(metaopt.explain_hypergradient(chain, objective, batch, meta_params))"
)
