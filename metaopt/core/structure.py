"""Where a module keeps its tensors, and how it is lent others for a call.

A user's module stays where it is. For each call its parameters and buffers are swapped for the ones in hand and
swapped back afterwards, exceptions included: hooks, `ModuleList` slices, tied weights and shared submodules keep
working.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from metaopt.base.errors import StageError

Tensors = dict[str, Tensor]
Slot = tuple[dict[str, Any], str, str]  # (a submodule's own dict of tensors, attribute, deduplicated name)


_holders: dict[int, int] = {}  # id of a submodule → the thread that trains it, or lends it tensors
_holding = threading.Lock()


@contextmanager
def held(structures: Collection[ModelStructure]) -> Iterator[None]:
    """Keep modules, with all their submodules, to this thread inside the block.

    Raises:
        StageError: another thread has one of them; nothing was changed.
    """
    thread = threading.get_ident()
    with _holding:
        taken = next((s for s in structures for m in s.modules if _holders.get(id(m), thread) != thread), None)
        new = {id(m): thread for s in structures for m in s.modules if id(m) not in _holders} if taken is None else {}
        _holders.update(new)
    if taken is not None:
        raise StageError(
            f"{type(taken.module).__name__} is in use by another thread, which lends it other tensors while it runs; "
            f"thread {threading.current_thread().name!r} needs one of its own, copy.deepcopy(...), or must wait: hold "
            "one threading.Lock around unroll, objective and backward in both"
        )
    try:
        yield
    finally:
        with _holding:
            for key in new:
                del _holders[key]


class ModelStructure:
    """Where a module keeps its parameters and buffers: one slot per (submodule, attribute), one name per tensor.

    A tied weight has several slots and one name. A submodule that is reached by two names has its slots once:
    swapping a slot twice would leave the trained weight in the user's module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        param_names = {id(p): name for name, p in module.named_parameters()}
        buffer_names = {id(b): name for name, b in module.named_buffers()}
        self.modules = list(module.modules())
        self._recurrent = [submodule for submodule in module.modules() if isinstance(submodule, nn.RNNBase)]
        self._normed = any(type(submodule).__name__ == "_WeightNorm" for submodule in module.modules())
        self._all_buffers = [submodule._buffers for submodule in module.modules()]
        self.stage = ""  # whose model it is, for messages
        self.unsaid: list[str] | None = None  # for the first read in eval mode; None until it was looked into
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
        with held([self]), self._lent(params, buffers):
            yield self.module

    @contextmanager
    def _lent(self, params: Mapping[str, Tensor], buffers: Tensors) -> Iterator[None]:
        empty = [(tensors, key) for tensors in self._all_buffers for key, buffer in tensors.items() if buffer is None]
        slots = [(tensors, key, params[name]) for tensors, key, name in self._param_slots]
        slots += [(tensors, key, buffers[name]) for tensors, key, name in self._buffer_slots]
        own = [tensors[key] for tensors, key, _ in slots]
        versions = [tensor._version for tensor in params.values()]
        try:
            for tensors, key, lent in slots:
                tensors[key] = lent
            yield
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
            if [tensor._version for tensor in params.values()] != versions:
                self._refuse_writing(params, versions)
        if late:
            raise StageError(
                f"the model fills a buffer in its forward that was None before ({', '.join(late)}), so it cannot be "
                "carried from step to step; register it with its initial tensor: register_buffer(name, tensor)"
            )

    def _refuse_writing(self, params: Mapping[str, Tensor], versions: list[int]) -> None:
        written = [name for (name, p), before in zip(params.items(), versions, strict=True) if p._version != before]
        if any(p.requires_grad for name, p in self.params.items() if name in written):
            raise StageError(
                f"stage {self.stage!r}: the model ({type(self.module).__name__}) writes into its weights during a "
                "call, which no gradient sees; compute a new tensor of them there (RWKV rescales its weights in "
                "eval mode: set model.config.rescale_every = 0)"
            )

    @contextmanager
    def install(self, params: Mapping[str, Tensor], buffers: Tensors, training: bool) -> Iterator[nn.Module]:
        """Lend the module these tensors, in train or eval mode, ready to be differentiated twice.

        Attention runs in the math kernel: the fused ones have no second derivative.
        """
        normed: AbstractContextManager[Any] = _PlainWeightNorm() if self._normed else nullcontext()
        with self.swap(params, buffers), sdpa_kernel(SDPBackend.MATH), _refusing_recomputation(), normed:
            modes = [(submodule, submodule.training) for submodule in self.modules]
            try:
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
