"""The inner loss of one step, as a function of every tensor that enters it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.base.streams import seeded
from metaopt.core.contracts import Upstream
from metaopt.core.inner_loop import InnerLoop
from metaopt.core.meta_params import AnyMetaParameters, as_named, rebound
from metaopt.core.view import Models
from metaopt.estimators.places import split_tensors
from metaopt.estimators.storage import StepRecord
from metaopt.optimizers.flattened import Joined

Key = tuple[str | None, str]  # (upstream stage, or None for a meta-parameter; name)
ABSENT: Any = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(eq=False)
class StepLoss:
    """Step t's loss as a function of (params, others), and of a context that is read only; deterministic.

    Args:
        t, record: the step, and what it was at.
        loop, meta_params: as in the inner loop.
        upstream: trained models outside the graph.
        keys: what `others` are, in order.
        settings: see `settings_of`.
    """

    t: int
    record: StepRecord
    loop: InnerLoop
    meta_params: AnyMetaParameters
    upstream: Upstream
    keys: Sequence[Key]
    settings: Hashable = None

    def __post_init__(self) -> None:
        self._tree: dict[str, Any] = {
            "batches": list(self.loop.batches[self.t]),
            "buffers": self.record.buffers,
            "frozen": self.loop.frozen,
            "upstream": {n: (dict(m.params), dict(m.buffers)) for n, m in self.upstream.items()},
        }
        self.context, self._around = split_tensors(self._tree)  # what is read and not differentiated
        self.params, self._named = split_tensors(self.record.params)  # as they are held: some of them joined

    @property
    def is_last(self) -> bool:
        """Whether it is of the stage's last step: the first that a sweep comes to."""
        return self.t == self.loop.num_steps - 1

    @property
    def obstacle(self) -> str | None:
        """What differs from step to step and may change a gradient without changing the loss."""
        return ", ".join(sorted(self.loop.beside)) or None

    @property
    def anchors(self) -> tuple[object, ...]:
        """Loss and modules, whose identity is part of the signature."""
        modules = [model.structure.module for model in self.upstream.values()]
        return self.loop.loss, self.loop.structure.module, *modules

    @property
    def signature(self) -> Hashable:
        """Equal for two steps that differ in tensors, or in what else a batch holds."""
        spec = str(pytree.tree_structure(self._tree))
        held = str(pytree.tree_structure(self.record.params))
        return spec, held, tuple(self.keys), tuple(self.record.params), self.settings, *map(id, self.anchors)

    def replaying(self) -> AbstractContextManager[None]:
        """Return the random state in which the step's loss is evaluated."""
        return seeded(self.loop.seeds[self.t], self.loop.device)

    def present(self, tensors: Sequence[Tensor | None]) -> Mapping[str, Tensor]:
        """Return those that there are of tensors like `params`."""
        held = self._named([x if x is not None else ABSENT for x in tensors])
        if not isinstance(held, Joined):
            return {name: x for name, x in held.items() if x is not ABSENT}
        pieces, alone = ({k: x for k, x in part.items() if x is not ABSENT} for part in (held.pieces, held.alone))
        return Joined(pieces, alone)

    def named(self, params: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return weights that are held as `params` by name, in their graph."""
        return dict(self._named(params))

    def __call__(
        self, params: Mapping[str, Tensor], others: Sequence[Tensor], context: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return the loss at these weights, meta-parameters and upstream weights; `context` replaces the step's."""
        tree: dict[str, Any] = self._tree if context is None else self._around(context)
        given: dict[Key, Tensor] = dict(zip(self.keys, others, strict=True))
        weights = {**tree["frozen"], **params}
        models = Models()
        for stage, model in self.upstream.items():
            own, buffers = tree["upstream"][stage]
            lent = {n: x for (of, n), x in given.items() if of == stage}
            models[stage] = model.with_params({**own, **lent}, buffers=buffers)
        with rebound(self.meta_params, {name: x for (stage, name), x in given.items() if stage is None}):
            at = (self.t, weights, tree["buffers"], self.meta_params, models)
            return self.loop.loss_at(*at, batches=tree["batches"])[0]


def settings_of(loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> Hashable:
    """Return the plain numbers and words that the models' modules, the loss and the meta-parameters hold, as they are
    now: some change a gradient and no loss (the strength of a gradient reversal)."""
    models = [loop.structure.module, *(model.structure.module for model in upstream.values())]
    modules: list[Any] = [m for x in (*models, *as_named(meta_params).values()) for m in x.modules()]
    held = (getattr(x, "__dict__", {}) for x in (*modules, loop.loss))
    return loop.autocast, tuple((name, value) for x in held for name, value in x.items() if isinstance(value, _PLAIN))
