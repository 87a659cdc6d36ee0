"""The inner loss of one step, as a function of every tensor that enters it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.base.random_state import seeded
from metaopt.core.inner_loop import InnerLoop
from metaopt.core.meta_params import AnyMetaParameters, as_named, rebound
from metaopt.core.view import FunctionalModel, Models
from metaopt.estimators.stores import StepRecord

Key = tuple[str | None, str]  # (upstream stage, or None for a meta-parameter; name)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


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
        self.expected = record.loss
        self._meta_params, self._upstream, self._keys = meta_params, upstream, list(keys)
        self._names = list(record.params)
        self._tree = {
            "batches": list(loop.batches[t]),
            "buffers": record.buffers,
            "frozen": loop.frozen,
            "upstream": {n: (dict(m.params), dict(m.buffers)) for n, m in upstream.items()},
        }
        flat, self._spec = pytree.tree_flatten(self._tree)
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
        """What differs from step to step and may change a gradient without changing the loss."""
        return ", ".join(sorted(self._loop.beside)) or None

    @property
    def signature(self) -> Hashable:
        """Equal for two steps that differ in tensors, or in what else a batch holds."""
        return str(self._spec), tuple(self._keys), tuple(self._names), self._settings, *map(id, self.anchors)

    @property
    def anchors(self) -> tuple[object, ...]:
        """Loss and modules."""
        modules = [model.structure.module for model in self._upstream.values()]
        return self._loop.loss, self._loop.structure.module, *modules

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
    """Return the plain numbers and words that the models' modules, the loss and the meta-parameters hold, as they are
    now: some change a gradient and no loss (the strength of a gradient reversal)."""
    models = [loop.structure.module, *(model.structure.module for model in upstream.values())]
    modules = [m for x in (*models, *as_named(meta_params).values()) for m in x.modules()]
    held = (getattr(x, "__dict__", {}) for x in (*modules, loop.loss))
    return loop.autocast, tuple((name, value) for x in held for name, value in x.items() if isinstance(value, _PLAIN))
