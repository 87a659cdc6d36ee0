"""The inner loss of one step, as a function of every tensor that enters it."""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metaopt.estimators.stores import StepRecord
from metaopt.functional import FunctionalModel, Models
from metaopt.inner_loop import InnerLoop
from metaopt.meta_params import AnyMetaParameters, TensorWeights, as_named, rebound
from metaopt.random_state import seeded

Key = tuple[str | None, str]  # (upstream stage, or None for a meta-parameter; name)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_MOST_ENTRIES = 100  # of a container that is looked into


class StepLoss:
    """Step t's loss as a function of (params, others), and of a context that is read only.

    Args:
        t: the step.
        record: what it was at.
        loop, meta_params: as in the inner loop.
        upstream: trained models outside the graph.
        keys: what `others` are, in order.
        settings: see `settings_of`.
    """

    def __init__(
        self,
        t: int,
        record: StepRecord,
        loop: InnerLoop,
        meta_params: AnyMetaParameters,
        upstream: Mapping[str, FunctionalModel],
        keys: Sequence[Key],
        settings: Hashable = None,
    ) -> None:
        self._t, self._record, self._loop, self._settings = t, record, loop, settings
        self._meta_params, self._upstream, self._keys = meta_params, upstream, list(keys)
        self._names = list(record.params)
        self._tree = {
            "batches": list(loop.batches[t]),
            "buffers": record.buffers,
            "frozen": loop.frozen,
            "upstream": {n: (dict(m.params), dict(m.buffers)) for n, m in upstream.items()},
        }
        flat, self._spec = pytree.tree_flatten(self._tree)
        self._constants = [None if isinstance(x, Tensor) else x for x in flat]
        self._tensors = [x for x in flat if isinstance(x, Tensor)]

    @property
    def context(self) -> list[Tensor]:
        """Batch, buffers, frozen weights, and what of the upstream models is not differentiated."""
        return self._tensors

    @property
    def stage(self) -> str:
        """Whose loss it is, for messages."""
        return self._loop.name

    @property
    def is_last(self) -> bool:
        """Whether it is of the stage's last step: the first that a sweep comes to."""
        return self._t == self._loop.num_steps - 1

    @property
    def obstacle(self) -> str | None:
        """What differs from step to step beside tensors."""
        strange = [type(x).__name__ for x in self._constants if not isinstance(x, _PLAIN)]
        texts = {tuple(x for x in pytree.tree_leaves(list(step)) if isinstance(x, str)) for step in self._loop.batches}
        if strange or len(texts) > 1:
            return f"a {strange[0]} in the batch" if strange else "texts in the batch that differ from step to step"
        return ", ".join(sorted(self._loop.beside)) or None

    @property
    def signature(self) -> Hashable:
        """Equal for two steps that differ in tensors only."""
        frozen = tuple(x if isinstance(x, Hashable) else repr(x) for x in self._constants)
        return str(self._spec), frozen, tuple(self._keys), tuple(self._names), self._settings

    @property
    def anchors(self) -> tuple[object, ...]:
        """Loss and modules: the signature holds their ids."""
        modules = [model.structure.module for model in self._upstream.values()]
        return self._loop.loss, self._loop.structure.module, *as_named(self._meta_params).values(), *modules

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Evaluate what is inside in the step's random state."""
        with seeded(self._loop.seeds[self._t], self._loop.device):
            yield

    def __call__(
        self, params: Sequence[Tensor], others: Sequence[Tensor], context: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return the loss at these weights, meta-parameters and upstream weights."""
        tree = self._tree if context is None else self._with_tensors(context)
        given: dict[Key, Tensor] = dict(zip(self._keys, others, strict=True))
        weights = {**tree["frozen"], **dict(zip(self._names, params, strict=True))}
        learned = {name: x for (stage, name), x in given.items() if stage is None}
        with rebound(self._meta_params, learned):
            return self._loop.loss_at(
                self._t, weights, tree["buffers"], self._meta_params, self._models(tree["upstream"], given),
                batches=tree["batches"],
            )[0]  # fmt: skip

    def _with_tensors(self, tensors: Sequence[Tensor]) -> Any:
        given = iter(tensors)
        shown = [next(given) if isinstance(x, Tensor) else x for x in pytree.tree_leaves(self._tree)]
        return pytree.tree_unflatten(shown, self._spec)

    def _models(self, tensors: Mapping[str, Any], given: Mapping[Key, Tensor]) -> Models:
        models = {}
        for stage, model in self._upstream.items():
            params, buffers = tensors[stage]
            params = {name: given.get((stage, name), p) for name, p in params.items()}
            models[stage] = model._with(params, buffers=buffers)
        return Models(models)


def settings_of(loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Mapping[str, FunctionalModel]) -> Hashable:
    """Return what a captured graph would freeze, as it is now: what the loss and the meta-parameters hold or close
    over, and the plain numbers and words of the models' modules. Tensors count by their identity."""
    models = [loop.structure.module, *(model.structure.module for model in upstream.values())]
    modules = [(id(m), _plain_attributes(m)) for model in models for m in model.modules()]
    parts = (loop.loss, *as_named(meta_params).values())
    read = [(None if isinstance(x, TensorWeights) else id(x), _held(x)) for x in parts]
    return loop.autocast, tuple(modules), tuple(read)


def _plain_attributes(module: nn.Module) -> Hashable:
    return tuple((name, value) for name, value in vars(module).items() if isinstance(value, _PLAIN))


def _held(x: Any, depth: int = 4) -> Hashable:
    if isinstance(x, (*_PLAIN, type, types.ModuleType, types.CodeType, types.BuiltinFunctionType)):
        return x
    if isinstance(x, Tensor):  # a graph holds its own constants, so that no other tensor gets the id of one
        return id(x), x._version if x.numel() == 1 and not x.is_inference() else 0  # float(x) would be frozen
    parts = _parts(x) if depth else {}
    return type(x), tuple((str(name), _held(part, depth - 1)) for name, part in parts.items())


def _parts(x: Any) -> Mapping[Any, Any]:
    if isinstance(x, nn.Module):
        return {name: _tensors_and_attributes(module) for name, module in x.named_modules()}
    if isinstance(x, (Mapping, list, tuple)) and len(x) > _MOST_ENTRIES:
        return {"length": len(x)}
    if isinstance(x, (list, tuple)):
        return dict(enumerate(x))
    if isinstance(x, functools.partial):
        return {"function": x.func, "arguments": x.args, **x.keywords}
    if isinstance(x, types.MethodType):
        return {"function": x.__func__, "self": x.__self__}
    if isinstance(x, types.FunctionType):
        cells = zip(x.__code__.co_freevars, x.__closure__ or (), strict=True)
        closed = {name: cell.cell_contents for name, cell in cells}
        of_module = {name: x.__globals__[name] for name in _names(x.__code__) if name in x.__globals__}
        return {"code": x.__code__, "defaults": x.__defaults__, "keywords": x.__kwdefaults__, **of_module, **closed}
    return x if isinstance(x, Mapping) else getattr(x, "__dict__", {})


def _tensors_and_attributes(module: nn.Module) -> dict[str, Any]:
    """Of one module, without its parts and without what is learned, which is an input of the graph."""
    tensors = {**module._buffers, **{n: p for n, p in module._parameters.items() if p is None or not p.requires_grad}}
    inner = ("_parameters", "_buffers", "_modules")
    return {**{k: v for k, v in vars(module).items() if k not in inner}, **tensors}


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the global names that a function reads, its inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
