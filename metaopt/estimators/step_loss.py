"""The inner loss of one step, as a function of every tensor that enters it."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metaopt.estimators.stores import StepRecord
from metaopt.estimators.upstream_outputs import UpstreamOutputs
from metaopt.functional import FunctionalModel, Models
from metaopt.inner_loop import InnerLoop
from metaopt.meta_params import AnyMetaParameters, as_named, rebound
from metaopt.random_state import seeded

Key = tuple[str | None, Hashable]  # (upstream stage, or None for a meta-parameter; name, or which output)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class StepLoss:
    """Step t's loss as a function of (params, others), and of a context that is read only.

    Args:
        t: the step.
        record: what it was at.
        loop, meta_params: as in the inner loop.
        upstream: trained models outside the graph.
        outputs: upstream outputs that several steps share.
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
        outputs: UpstreamOutputs,
        keys: Sequence[Key],
        settings: Hashable = None,
    ) -> None:
        self._t, self._record, self._loop, self._settings = t, record, loop, settings
        self._meta_params, self._upstream, self._outputs, self._keys = meta_params, upstream, outputs, list(keys)
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
    def obstacle(self) -> str | None:
        """What differs from step to step beside tensors."""
        strange = [type(x).__name__ for x in self._constants if not isinstance(x, _PLAIN)]
        return f"a {strange[0]} in the batch" if strange else ", ".join(sorted(self._loop.beside)) or None

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
        learned: dict[str, Tensor] = {str(name): x for (stage, name), x in given.items() if stage is None}
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
        for stage in self._upstream:
            params, buffers = tensors[stage]
            params = {name: given.get((stage, name), p) for name, p in params.items()}
            models[stage] = self._outputs.model(self._t, stage, params, buffers, given)
        return Models(models)


def settings_of(loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Mapping[str, FunctionalModel]) -> Hashable:
    """Return the plain numbers and words that modules and loss hold now; a captured graph would freeze them."""
    held: list[Any] = [loop.loss, loop.autocast, *loop.structure.module.modules()]
    parts = [*as_named(meta_params).values(), *(model.structure.module for model in upstream.values()), loop.loss]
    held += [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    return tuple((type(x).__name__, id(x), _plain_attributes(x)) for x in held)


def _plain_attributes(x: Any, depth: int = 1) -> Hashable:
    if isinstance(x, functools.partial):
        x = {"func": x.func, **{str(i): v for i, v in enumerate(x.args)}, **x.keywords}
    attributes = x if isinstance(x, dict) else getattr(x, "__dict__", {})
    found: list[Hashable] = [(k, v) for k, v in attributes.items() if isinstance(v, _PLAIN)]
    if depth and not isinstance(x, nn.Module):
        found += [(k, _plain_attributes(v, depth - 1)) for k, v in attributes.items() if hasattr(v, "__dict__")]
    return tuple(found)
