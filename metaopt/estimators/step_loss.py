"""The inner loss of one step, as a function of every tensor that enters it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.base.streams import seeded
from metaopt.core.contracts import Upstream
from metaopt.core.inner_loop import InnerLoop
from metaopt.core.meta_params import AnyMetaParameters, Lending, as_named
from metaopt.core.view import Models
from metaopt.estimators.places import split_tensors
from metaopt.estimators.storage import StepRecord
from metaopt.optimizers.rule import Joined, named

Key = tuple[str | None, str]  # (upstream stage, or None for a meta-parameter; name)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(eq=False)
class StepLoss:
    """Step t's loss as a function of (params, others), and of a context that is read only; deterministic.

    Args:
        t, record: the step, and what it was at.
        loop, lend: the inner loop, and its meta-parameters.
        upstream: trained models outside the graph.
        keys: what `others` are, in order.
        settings, fixed: see `settings_of` and `fixed_of`.
    """

    t: int
    record: StepRecord
    loop: InnerLoop
    lend: Lending
    upstream: Upstream
    keys: Sequence[Key]
    settings: Hashable
    fixed: tuple[list[Tensor], Callable[[Any], Any]]
    value: Tensor | None = field(default=None, init=False)  # when it was last called
    _stand_ins: list[Tensor] | None = field(default=None, init=False)

    @functools.cached_property
    def own(self) -> tuple[list[Tensor], Callable[[Any], Any]]:
        """The tensors of this step's batches and buffers, and what builds these around others."""
        return split_tensors((list(self.loop.batches[self.t]), self.record.buffers))

    @property
    def context(self) -> list[Tensor]:
        """What is read and not differentiated."""
        return [*self.own[0], *self.fixed[0]]

    @functools.cached_property
    def params(self) -> list[Tensor]:
        """The weights as they are held: some of them joined."""
        own = self.record.params
        return [*own.pieces.values(), *own.alone.values()] if isinstance(own, Joined) else list(own.values())

    def held(self, tensors: Sequence[Any]) -> Mapping[str, Any]:
        """Return tensors like `params` as a mapping from names; a None is left out."""
        own = self.record.params
        pieces, alone = (own.pieces, own.alone) if isinstance(own, Joined) else ({}, own)
        found = zip([*pieces, *alone], tensors, strict=True)
        present = {key: tensor for key, tensor in found if tensor is not None}
        blocks = {key: present[key] for key in pieces if key in present}
        return Joined(blocks, {key: present[key] for key in alone if key in present})

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
        spec = str(pytree.tree_structure((list(self.loop.batches[self.t]), self.record.buffers)))
        held = str(pytree.tree_structure(self.record.params))
        return spec, held, tuple(self.keys), tuple(self.record.params), self.settings, *map(id, self.anchors)

    def traced(self, record: StepRecord, context: Sequence[Tensor]) -> StepLoss:
        """Return the same step of other tensors: stand-ins, in a trace."""
        other = replace(self, record=record)
        other._stand_ins = list(context)
        return other

    def replaying(self) -> AbstractContextManager[None]:
        """Return the random state in which the step's loss is evaluated."""
        return seeded(self.loop.seeds[self.t], self.loop.device)

    def named(self, params: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return weights that are held as `params` by name, in their graph."""
        return named(self.held(params))

    def __call__(
        self, params: Mapping[str, Tensor], others: Sequence[Tensor], context: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Return the loss at these weights, meta-parameters and upstream weights; `context` replaces the step's."""
        given_context = self._stand_ins if context is None else context
        own, fixed = self.own, self.fixed
        if given_context is None:
            batches, buffers = list(self.loop.batches[self.t]), self.record.buffers
            frozen, beside = self.loop.frozen, {n: (m.params, m.buffers) for n, m in self.upstream.items()}
        else:
            batches, buffers = own[1](given_context[: len(own[0])])
            frozen, beside = fixed[1](given_context[len(own[0]) :])
        given: dict[Key, Tensor] = dict(zip(self.keys, others, strict=True))
        weights = {**frozen, **params}
        models = Models()
        for stage, model in self.upstream.items():
            theirs, kept = beside[stage]
            lent = {n: x for (of, n), x in given.items() if of == stage}
            models[stage] = model.with_params({**theirs, **lent}, buffers=kept)
        with self.lend({name: x for (stage, name), x in given.items() if stage is None}):
            at = (self.t, weights, buffers, self.lend.meta_params, models)
            self.value = self.loop.loss_at(*at, batches=batches)[0]
        return self.value


def fixed_of(loop: InnerLoop, upstream: Upstream) -> tuple[list[Tensor], Callable[[Any], Any]]:
    """Return what every step reads and none changes (frozen and upstream weights), and what builds it around others."""
    return split_tensors((loop.frozen, {n: (m.params, m.buffers) for n, m in upstream.items()}))


def settings_of(loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> Hashable:
    """Return the plain numbers and words that the models' modules, the loss and the meta-parameters hold, as they are
    now: some change a gradient and no loss (the strength of a gradient reversal)."""
    models = [loop.structure.module, *(model.structure.module for model in upstream.values())]
    modules: list[Any] = [m for x in (*models, *as_named(meta_params).values()) for m in x.modules()]
    held = (getattr(x, "__dict__", {}) for x in (*modules, loop.loss))
    return loop.autocast, tuple((name, value) for x in held for name, value in x.items() if isinstance(value, _PLAIN))
