"""The stateless view of a model that `higher` patches, and every workaround that today's models need.

A user's module stays where it is. For each call its parameters and buffers are swapped for the ones in hand and
swapped back afterwards, exceptions included. `higher` sees only a thin module that registers the trained
parameters, so hooks, `ModuleList` slices, tied weights and shared submodules keep working.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import higher
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from metaopt.errors import ConfigError, StageError, did_you_mean

Tensors = dict[str, Tensor]
Slot = tuple[dict[str, Any], str, str]  # (a submodule's own dict of tensors, attribute, deduplicated name)


class ModelStructure:
    """Where a module keeps its parameters and buffers: one slot per (submodule, attribute), one name per tensor.

    A tied weight has several slots and one name. A submodule that is reached by two names has its slots once:
    swapping a slot twice would leave the trained weight in the user's module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        param_names = {id(p): name for name, p in module.named_parameters()}
        buffer_names = {id(b): name for name, b in module.named_buffers()}
        self._recurrent = [submodule for submodule in module.modules() if isinstance(submodule, nn.RNNBase)]
        self._normed = any(type(submodule).__name__ == "_WeightNorm" for submodule in module.modules())
        self._all_buffers = [submodule._buffers for submodule in module.modules()]
        self._param_slots: list[Slot] = []
        self._buffer_slots: list[Slot] = []
        for submodule in module.modules():
            for slots, tensors, names in (
                (self._param_slots, submodule._parameters, param_names),
                (self._buffer_slots, submodule._buffers, buffer_names),
            ):
                slots += [(tensors, key, names[id(t)]) for key, t in tensors.items() if t is not None]

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The user's own parameters, by deduplicated name."""
        return dict(self.module.named_parameters())

    @property
    def buffers(self) -> Tensors:
        """The user's own buffers, by deduplicated name."""
        return dict(self.module.named_buffers())

    @contextmanager
    def swap(self, params: Mapping[str, Tensor], buffers: Tensors) -> Iterator[nn.Module]:
        """Lend the module these parameters and buffers, and give it its own back on leaving.

        Buffers are moved in place by the module's own forward; one that is assigned anew is written to `buffers`.
        """
        empty = [(tensors, key) for tensors in self._all_buffers for key, buffer in tensors.items() if buffer is None]
        slots = [(tensors, key, params[name]) for tensors, key, name in self._param_slots]
        slots += [(tensors, key, buffers[name]) for tensors, key, name in self._buffer_slots]
        own = [tensors[key] for tensors, key, _ in slots]
        try:
            for tensors, key, lent in slots:
                tensors[key] = lent
            yield self.module
        finally:
            for tensors, key, name in self._buffer_slots:
                buffers[name] = tensors[key]
            for (tensors, key, _), tensor in zip(slots, own, strict=True):
                tensors[key] = tensor
            late = [key for tensors, key in empty if tensors[key] is not None]
            for tensors, key in empty:
                tensors[key] = None
            for submodule in self._recurrent:
                submodule._init_flat_weights()  # they cache their weights in a list, which would keep the graph
        if late:
            raise StageError(
                f"the model fills a buffer in its forward that was None before ({', '.join(late)}), so it cannot be "
                "carried from step to step; register it with its initial tensor: register_buffer(name, tensor)"
            )

    @contextmanager
    def install(self, params: Mapping[str, Tensor], buffers: Tensors, training: bool) -> Iterator[nn.Module]:
        """Lend the module these tensors, in train or eval mode, ready to be differentiated twice.

        Attention runs in the math kernel: the fused ones have no second derivative.
        """
        normed: AbstractContextManager[Any] = _PlainWeightNorm() if self._normed else nullcontext()
        modes = [(submodule, submodule.training) for submodule in self.module.modules()]
        try:
            with self.swap(params, buffers), sdpa_kernel(SDPBackend.MATH), _refusing_recomputation(), normed:
                self.module.train(training)
                yield self.module
        finally:
            for submodule, mode in modes:
                submodule.training = mode

    def call(self, params: Mapping[str, Tensor], buffers: Tensors, training: bool, args: Any, kwargs: Any) -> Any:
        """Run the module's forward with these parameters and buffers."""
        with self.install(params, buffers, training) as module:
            return module(*args, **kwargs)


class _PlainWeightNorm(TorchFunctionMode):
    """Weight norm by its formula `g v / ‖v‖`: torch's kernel takes ‖v‖ as a constant in the second derivative."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:  # pyright: ignore[reportPrivateImportUsage]
            v, g, dim = args
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


RECOMPUTES = (
    "the model recomputes part of its forward during the backward (torch.utils.checkpoint), when the trained weights "
    "are swapped back already; take the checkpointing out of its forward: estimators.Checkpointed() saves more memory"
)


@contextmanager
def _refusing_recomputation() -> Iterator[None]:
    """Raise if something inside the block asks to recompute saved tensors later, as `torch.utils.checkpoint` does."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    if hooks is not None:  # the user's own, around the unroll
        yield
        return
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTES):
            yield
    except RuntimeError as error:
        if str(error) != RECOMPUTES:
            raise
        raise StageError(RECOMPUTES) from None


Call = Callable[[Mapping[str, Tensor], Tensors, bool, Any, Any], Any]


class FunctionalModel:
    """A model as a function of its weights: `f(inputs; params, buffers)`, called like the module it stands for.

    Args:
        structure: of the user's module.
        params: deduplicated name → tensor, in the graph; frozen parameters included.
        buffers: name → tensor; a call works on clones and never changes them.
        training: the mode in which a call runs; `train()` and `eval()` give a view in the other one.
        optimizer_state: name → the inner optimizer's state of that parameter, detached.

    Inside an inner loss, `step` counts the inner steps that the stage has taken since its start or last reset.
    """

    def __init__(
        self,
        structure: ModelStructure,
        params: Mapping[str, Tensor],
        buffers: Tensors,
        *,
        training: bool = False,
        optimizer_state: Mapping[str, Mapping[str, Any]] | None = None,
        call: Call | None = None,
    ) -> None:
        self._structure = structure
        self._call = call or structure.call
        self.params = dict(params)
        self.buffers = buffers
        self.training = training
        self.optimizer_state = dict(optimizer_state or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.params, self._call_buffers(), self.training, args, kwargs)

    @property
    def config(self) -> Any:
        """The module's own `config` (of Hugging Face models), or None."""
        return getattr(self._structure.module, "config", None)

    @property
    def step(self) -> int:
        """Inner steps before this one, of the model in training; 0 of a trained model."""
        return 0

    def _call_buffers(self) -> Tensors:
        return {name: buffer.clone() for name, buffer in self.buffers.items()}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a trained model has no attribute {name!r}; for the module's own methods and attributes write "
            f"`with model.as_module() as module: module.{name}`"
        )

    def __repr__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{type(self).__name__}({type(self._structure.module).__name__}, {len(self.params)} tensors, {mode})"

    @contextmanager
    def as_module(self) -> Iterator[nn.Module]:
        """Lend the user's module these weights, so that its own methods (`generate`) use them, in the graph."""
        with self._structure.install(self.params, self._call_buffers(), self.training) as module:
            yield module

    def train(self, mode: bool = True) -> FunctionalModel:
        """Return the same model as a view in train mode (dropout on, batch statistics)."""
        return self._with(self.params, training=mode)

    def eval(self) -> FunctionalModel:
        """Return the same model as a view in eval mode."""
        return self.train(False)

    def detach(self) -> FunctionalModel:
        """Return the same model with its weights taken out of the graph."""
        return self._with({name: p.detach() if p.requires_grad else p for name, p in self.params.items()})

    @property
    def structure(self) -> ModelStructure:
        """Of the module that this model is a view of."""
        return self._structure

    def with_call(
        self, call: Call, params: Mapping[str, Tensor] | None = None, buffers: Tensors | None = None
    ) -> FunctionalModel:
        """Return the same model with another way to run it, and with other tensors where they are given."""
        params, buffers = self.params if params is None else params, self.buffers if buffers is None else buffers
        state = self.optimizer_state
        return FunctionalModel(
            self._structure, params, buffers, training=self.training, optimizer_state=state, call=call
        )

    def _with(self, params: Mapping[str, Tensor], training: bool | None = None) -> FunctionalModel:
        mode = self.training if training is None else training
        return FunctionalModel(
            self._structure, params, self.buffers, training=mode, optimizer_state=self.optimizer_state
        )


class Models(dict[str, FunctionalModel]):
    """Trained models by stage name; a name that is not there raises, and says which are."""

    def __missing__(self, name: str) -> FunctionalModel:
        raise ConfigError(f"there is no stage {name!r} to read here{did_you_mean(name, self)}")


class InnerModel(FunctionalModel):
    """The model inside its own inner step: in train mode, and its calls move `buffers` (batch-norm statistics)."""

    read_step: Callable[[], int] = staticmethod(lambda: 0)

    @property
    def step(self) -> int:
        """Inner steps that the stage has taken before this one, since its start or last reset."""
        return self.read_step()

    def _call_buffers(self) -> Tensors:
        return self.buffers

    def train(self, mode: bool = True) -> FunctionalModel:
        """Return the model itself, which is in train mode already, or a view in eval mode."""
        return self if mode else super().train(False)


class _Boundary(torch.autograd.Function):
    """Identity over many tensors as one node of the graph.

    `autograd.grad(loss, params)` walks back until it is past every target. A parameter that the loss does not use
    would make it walk the whole history at every step: O(T²). Behind one common node, no target lies deeper.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


def behind_boundary(
    params: Mapping[str, Tensor], upstream: Mapping[str, FunctionalModel], joint: Collection[str]
) -> tuple[Tensors, Models]:
    """Pass an inner step's parameters, and all upstream weights, through identity nodes.

    Args:
        params: of the step.
        upstream: name → model.
        joint: the stages that the loss is known to read. They share the node of `params`, so that no walk goes past
            it; the others have a node of their own, or a path that is cut would look like one that is there.
    """
    keyed: dict[tuple[str, str], Tensor] = {("", name): p for name, p in params.items()}
    keyed |= {(stage, name): p for stage, model in upstream.items() for name, p in model.params.items()}
    for group in [("", *joint), *((stage,) for stage in upstream if stage not in joint)]:
        live = {key: p for key, p in keyed.items() if key[0] in group and p.requires_grad}
        if live:
            keyed |= dict(zip(live, _Boundary.apply(*live.values()), strict=True))
    inner = {name: keyed["", name] for name in params}
    return inner, Models({s: m._with({n: keyed[s, n] for n in m.params}) for s, m in upstream.items()})


def stages_read(loss: Tensor, upstream: Mapping[str, FunctionalModel]) -> list[str]:
    """Return the upstream stages whose boundary a loss reaches, each behind a node of its own."""
    reached = set(nodes([loss]))
    boundaries = {stage: {p.grad_fn for p in model.params.values()} - {None} for stage, model in upstream.items()}
    return [stage for stage, own in boundaries.items() if own & reached]


class _View(nn.Module):
    """What `higher` patches: the trained parameters under plain names, and a forward that hands them on."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = list(params)
        for i, param in enumerate(params.values()):
            self.register_parameter(f"p{i}", param)

    def forward(self, run: Callable[[Tensors], Any]) -> Any:
        return run({name: getattr(self, f"p{i}") for i, name in enumerate(self.names)})


class DifferentiableCopy:
    """One `higher` inner loop over a model: `params` → `call` → `step`, every step kept in the graph."""

    def __init__(self, structure: ModelStructure, names: list[str], fmodel: Any, diffopt: Any) -> None:
        self._structure = structure
        self._names = names
        self._fmodel = fmodel
        self._diffopt = diffopt

    @property
    def params(self) -> Tensors:
        """The present fast weights, by name."""
        return dict(zip(self._names, self._fmodel.fast_params, strict=True))

    def call(self, params: Mapping[str, Tensor], buffers: Tensors, training: bool, args: Any, kwargs: Any) -> Any:
        """Run the model through `higher`'s patched view; frozen parameters come along as they are."""

        def run(fast: Tensors) -> Any:
            return self._structure.call({**params, **fast}, buffers, training, args, kwargs)

        return self._fmodel(run, params=[params[name] for name in self._names])

    def step(self, loss: Tensor, params: Mapping[str, Tensor], **options: Any) -> Tensors:
        """Take one inner step by `higher`'s differentiable optimizer: gradient of `loss`, then update."""
        fast = self._diffopt.step(loss, params=[params[name] for name in self._names], **options)
        return dict(zip(self._names, fast, strict=True))

    def release(self) -> None:
        """Let go of what the optimizer holds of the graph."""
        self._diffopt.release()

    @property
    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The inner optimizer's state by parameter name, in the graph."""
        return self._diffopt.named_state


@contextmanager
def differentiable_copy(structure: ModelStructure, optimizer: Any, names: list[str]) -> Iterator[DifferentiableCopy]:
    """Open `higher.innerloop_ctx` over the parameters `names` of a module; release what it holds on leaving.

    Args:
        structure: of the user's module, whose weights are copied and never changed.
        optimizer: what `metaopt.optimizers` registered with `higher`.
        names: the trained parameters, in the optimizer's order.
    """
    view = _View({name: structure.params[name] for name in names})
    with higher.innerloop_ctx(view, optimizer, copy_initial_weights=True) as (fmodel, diffopt):
        opened = DifferentiableCopy(structure, names, fmodel, diffopt)
        try:
            yield opened
        finally:
            fmodel._fast_params = []  # higher refers in circles to every step's weights, and they to their graph
            fmodel._parameters.clear()
            opened.release()


def nodes(heads: Iterable[Tensor]) -> Iterator[Any]:
    """Yield the nodes of the graph of some tensors, up to the boundary and with it."""
    seen: set[Any] = set()
    stack: list[Any] = [head.grad_fn for head in heads]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if type(node).__name__ != "_BoundaryBackward":
            stack += [parent for parent, _ in node.next_functions]


def graph_leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors that require grad and that a loss reaches this side of the boundary."""
    return (node.variable for node in nodes([loss]) if hasattr(node, "variable"))


def foreign_parameters(loss: Tensor, owners: Mapping[int, str]) -> list[str]:
    """Name the modules' own parameters that a loss reaches directly, past the differentiable copies.

    Args:
        loss: an inner loss whose parameters stand behind a boundary.
        owners: `id(parameter)` → its name, for every parameter of every stage's own module.
    """
    return sorted({owners[id(leaf)] for leaf in graph_leaves(loss) if id(leaf) in owners})
