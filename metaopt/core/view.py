"""A model as a function of its weights: where a module keeps its tensors, and how it is lent others for a call.

A user's module stays where it is. For each call its parameters and buffers are swapped for the ones in hand and
swapped back afterwards, exceptions included: hooks, `ModuleList` slices, tied weights and shared submodules keep
working.
"""

from __future__ import annotations

import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaopt.base.errors import ConfigError, StageError, did_you_mean
from metaopt.core.guards import PlainWeightNorm, warn_of_other_inputs

Tensors = dict[str, Tensor]
Call = Callable[[Mapping[str, Tensor], Tensors, bool, Any, Any], Any]
Slot = tuple[dict[str, Any], str, str]  # (a submodule's own dict of tensors, attribute, deduplicated name)

_version, _mode = operator.attrgetter("_version"), operator.attrgetter("training")
_holders: dict[int, int] = {}  # id of a submodule → the thread that trains it, or lends it tensors
_holding = threading.Lock()


@contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep modules, each given with its submodules, to this thread inside the block.

    Raises:
        StageError: another thread has one of them; nothing was changed.
    """
    modules, thread = list(modules), threading.get_ident()  # a list, to keep them alive
    with _holding:
        for module in modules:
            if _holders.get(id(module), thread) != thread:
                raise StageError(
                    f"{type(module).__name__} is in use by another thread, which lends it other tensors while it runs; "
                    f"thread {threading.current_thread().name!r} needs one of its own, copy.deepcopy(...), or must "
                    "wait: hold one threading.Lock around unroll, objective and backward in both"
                )
        new = {id(module) for module in modules} - _holders.keys()
        _holders.update(dict.fromkeys(new, thread))
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
        self.modules = list(module.modules())
        self.stage = ""  # whose model it is, for messages
        self.unsaid: list[str] | None = None  # for the first read in eval mode; None until it was looked into
        self._ready: tuple[int, bool] | None = None  # thread and mode, inside `ready`
        self._buffered = [submodule._buffers for submodule in self.modules if submodule._buffers]
        self._recurrent = [submodule for submodule in self.modules if isinstance(submodule, nn.RNNBase)]
        self._normed = any(type(submodule).__name__ == "_WeightNorm" for submodule in self.modules)
        params, buffers = {id(p): n for n, p in self.params.items()}, {id(b): n for n, b in self.buffers.items()}
        self._param_slots = [slot for submodule in self.modules for slot in _slots(submodule._parameters, params)]
        self._buffer_slots = [slot for submodule in self.modules for slot in _slots(submodule._buffers, buffers)]

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
        empty = [(own, key) for own in self._buffered for key, buffer in own.items() if buffer is None]
        versions = list(map(_version, params.values()))
        own = []
        try:
            for slots, lent in ((self._param_slots, params), (self._buffer_slots, buffers)):
                for tensors, key, name in slots:
                    own.append((tensors, key, tensors[key]))
                    tensors[key] = lent[name]
            yield self.module
        finally:
            for tensors, key, name in self._buffer_slots:
                buffers[name] = tensors[key]
            for tensors, key, tensor in own:
                tensors[key] = tensor
            late = [key for tensors, key in empty if tensors[key] is not None]
            for tensors, key in empty:
                tensors[key] = None
            for submodule in self._recurrent:
                submodule._init_flat_weights()  # they cache their weights in a list, which would keep the graph
            if list(map(_version, params.values())) != versions:
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
                "call, which no gradient sees; compute a new tensor of them there (RWKV: config.rescale_every = 0)"
            )

    @contextmanager
    def ready(self, training: bool) -> Iterator[None]:
        """Keep the module to this thread and in this mode, ready to be differentiated twice; calls inside are quick.

        Attention runs in the math kernel: the fused ones have no second derivative.
        """
        with held(self.modules), sdpa_kernel(SDPBackend.MATH):
            modes, before = list(map(_mode, self.modules)), self._ready
            self._ready = threading.get_ident(), training
            try:
                self.module.train(training)
                yield
            finally:
                self._ready = before
                for submodule, mode in zip(self.modules, modes, strict=True):
                    submodule.training = mode

    @contextmanager
    def install(self, params: Mapping[str, Tensor], buffers: Tensors, training: bool) -> Iterator[nn.Module]:
        """Lend the module these tensors, in train or eval mode."""
        normed: AbstractContextManager[Any] = PlainWeightNorm() if self._normed else nullcontext()
        is_ready = self._ready == (threading.get_ident(), training)
        ready = nullcontext() if is_ready else self.ready(training)
        with ready, self.swap(params, buffers) as module, _refusing_recomputation(), normed:
            yield module

    def call(self, params: Mapping[str, Tensor], buffers: Tensors, training: bool, args: Any, kwargs: Any) -> Any:
        """Run the module's forward with these parameters and buffers."""
        with self.install(params, buffers, training) as module:
            return module(*args, **kwargs)


def _slots(tensors: dict[str, Any], names: Mapping[int, str]) -> list[Slot]:
    return [(tensors, key, names[id(tensor)]) for key, tensor in tensors.items() if tensor is not None]


RECOMPUTES = (
    "the model recomputes part of its forward during the backward (torch.utils.checkpoint), when the trained weights "
    "are swapped back already; take the checkpointing out of its forward: estimators.Checkpointed() saves more memory"
)


@contextmanager
def _refusing_recomputation() -> Iterator[None]:
    """Raise if something inside the block asks to recompute saved tensors later, as `torch.utils.checkpoint` does."""
    users = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with nullcontext() if users else torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTES):
            yield
    except RuntimeError as error:
        if str(error) != RECOMPUTES:
            raise
        raise StageError(RECOMPUTES) from None


@dataclass(frozen=True)
class Training:
    """How a model was trained: in which stage, on what loss, for how many steps since its start or last reset.

    `read` has the names of the tensors that the loss called it with, for each way in which it did.
    """

    stage: str
    loss: Any
    step: int
    read: set[frozenset[str]]


def names_read(kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the tensors that a model reads, but for labels and masks, which say nothing themselves."""
    tensors = {name for name, value in kwargs.items() if isinstance(value, Tensor)}
    return frozenset(name for name in tensors if name != "labels" and not name.endswith("_mask"))


class FunctionalModel:
    """A model as a function of its weights: `f(inputs; params, buffers)`, called like the module it stands for.

    `params` has every parameter by deduplicated name, in the graph, frozen ones included; `buffers` are never changed
    by a call; `training` is the mode of a call (`train()` and `eval()` give a view in the other one);
    `optimizer_state` is the inner optimizer's by parameter name, detached; `trained` is None of a model in training.
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
        trained: Training | None = None,
    ) -> None:
        self.structure = structure
        self.params, self.buffers = dict(params), buffers
        self.training, self.trained = training, trained
        self.optimizer_state = dict(optimizer_state or {})
        self._call = call or structure.call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.trained is not None and not args and names_read(kwargs) not in self.trained.read:
            warn_of_other_inputs(self.trained, names_read(kwargs), "labels" in kwargs)
        return self._call(self.params, self._call_buffers(), self.training, args, kwargs)

    @property
    def config(self) -> Any:
        """The module's own `config` (of Hugging Face models), or None."""
        return getattr(self.structure.module, "config", None)

    @property
    def step(self) -> int:
        """Inner steps that its stage has taken since its start or last reset; in training, before this one."""
        return 0 if self.trained is None else self.trained.step

    def note_reading(self, inputs: Mapping[str, Any]) -> None:
        """Note, in training, that these inputs are what the model is trained on, in whatever form it reads them."""

    def _call_buffers(self) -> Tensors:
        if self.structure.unsaid and not self.training and torch.is_grad_enabled():
            warnings.warn(self.structure.unsaid.pop(), RuntimeWarning, stacklevel=3)
        return {name: buffer.clone() for name, buffer in self.buffers.items()}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a trained model has no attribute {name!r}; for the module's own methods and attributes write "
            f"`with model.as_module() as module: module.{name}`"
        )

    def __repr__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{type(self).__name__}({type(self.structure.module).__name__}, {len(self.params)} tensors, {mode})"

    def as_module(self) -> AbstractContextManager[nn.Module]:
        """Lend the user's module these weights, so that its own methods (`generate`) use them, in the graph."""
        return self.structure.install(self.params, self._call_buffers(), self.training)

    def train(self, mode: bool = True) -> FunctionalModel:
        """Return the same model as a view in train mode (dropout on, batch statistics)."""
        return self.with_params(self.params, training=mode)

    def eval(self) -> FunctionalModel:
        """Return the same model as a view in eval mode."""
        return self.train(False)

    def detach(self) -> FunctionalModel:
        """Return the same model with its weights taken out of the graph."""
        return self.with_params({name: p.detach() if p.requires_grad else p for name, p in self.params.items()})

    def with_params(
        self, params: Mapping[str, Tensor], training: bool | None = None, buffers: Tensors | None = None
    ) -> FunctionalModel:
        """Return the same model with other weights, in its own mode and with its own buffers where none are given."""
        model = FunctionalModel(self.structure, params, self.buffers if buffers is None else buffers)
        model.training = self.training if training is None else training
        model.optimizer_state, model.trained = self.optimizer_state, self.trained
        return model


class Models(dict[str, FunctionalModel]):
    """Trained models by stage name; a name that is not there raises, and says which are."""

    def __missing__(self, name: str) -> FunctionalModel:
        raise ConfigError(f"there is no stage {name!r} to read here{did_you_mean(name, self)}")
