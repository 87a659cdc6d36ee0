"""The update half of an inner step, pulled back: to the weights and optimizer state before it, and to the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaopt.core.inner_loop import InnerLoop
from metaopt.core.meta_params import AnyMetaParameters, rebound
from metaopt.estimators.products.base import leaves
from metaopt.estimators.stores import StepRecord
from metaopt.optimizers.flattened import JointStep
from metaopt.optimizers.kinds import carries_gradient, per_element

Tensors = dict[str, Tensor]
MOST_ELEMENTS = 2**16
StateKey = tuple[str, str]  # (parameter; which piece of its optimizer state)


@dataclass
class Below:
    """Cotangents of a step's weights and optimizer state."""

    params: Tensors
    state: dict[StateKey, Tensor] = field(default_factory=dict)


def update_vjp(
    loop: InnerLoop,
    t: int,
    record: StepRecord,
    gradient: Mapping[str, Tensor | None],
    learned: Tensors,
    meta_params: AnyMetaParameters,
    above: Below,
) -> tuple[Below, Tensors, Tensors]:
    """Return the cotangents of what goes into `update`, from those of what comes out.

    Parameters that the optimizer treats alike are joined, which saves most of the time of many small ones; in parts of
    bounded size, so that what the step computes between is never as large as the model.

    Args:
        loop, t, record: the step, and what it was at.
        gradient: raw, before the transform; None where the loss does not use a parameter.
        learned: values of the meta-parameters by name.
        meta_params: where they live.
        above: cotangents of the weights and state after the step.

    Returns:
        Cotangents of (weights, state) before it, of the raw gradient, and of the meta-parameters.
    """
    present = {name: g for name, g in gradient.items() if g is not None}
    learned = as_leaves(learned)
    below = Below({n: c for n, c in above.params.items() if n not in present})
    below.state = {(n, k): c for (n, k), c in above.state.items() if n not in present}
    of_gradient: Tensors = {}
    of_learned: Tensors = {}
    with torch.enable_grad(), rebound(meta_params, learned):
        raw = as_leaves(present) if loop.transform is not None else {}
        given = loop.transformed({**gradient, **raw})
        hyperparameters = loop.hyperparameters(t, meta_params)
        shared = bool(raw) or any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(hyperparameters))
        for step in loop.rule.parts(record.params, given, record.state, hyperparameters, most=MOST_ELEMENTS):
            part = _Part(step, record, given, above, joint_leaf=not raw)
            found = _vjp(part.heads, [*part.inputs, *raw.values(), *learned.values()], retain_graph=shared)
            part.give_back(found, below, of_gradient)
            for names, sums in ((raw, of_gradient), (learned, of_learned)):
                for name in names:
                    add(sums, name, next(found))
            del part, found
    return below, of_gradient, of_learned


def add(sums: dict[Any, Tensor], key: Any, cotangent: Tensor | None) -> None:
    """Add a cotangent to those of the same tensor."""
    if cotangent is not None:
        sums[key] = sums[key] + cotangent if key in sums else cotangent


class _Part:
    """One joint step with its inputs as leaves, and its outputs beside their cotangents."""

    def __init__(
        self, step: JointStep, record: StepRecord, gradient: Mapping[str, Tensor | None], above: Below, joint_leaf: bool
    ) -> None:
        self.step, self._above, self._joint_leaf = step, above, joint_leaf
        joined = step.join(gradient)
        state = step.join_state(record.state)
        self._kept = as_leaves({k: v for k, v in state.items() if carries_gradient(k, v)})
        self._at, self._raw = leaves([step.join(record.params), joined])
        after, state_after = step.step(self._at, self._raw if joint_leaf else joined, {**state, **self._kept})
        of_state = {key: self._of_state(key, record) for key in {k: None for _, k in above.state}}
        heads = [(after, self._joined({n: above.params.get(n) for n in step.names}, record.params))]
        heads += [(state_after[key], c) for key, c in of_state.items() if c is not None]
        self.heads = [(head, c) for head, c in heads if c is not None]
        self.inputs = [self._at, *([self._raw] if joint_leaf else []), *self._kept.values()]

    def _of_state(self, key: str, record: StepRecord) -> Tensor | None:
        present = {n: self._above.state.get((n, key)) for n in self.step.names}
        first = next((c for c in present.values() if c is not None), None)
        if first is None:
            return None
        if per_element(key, first):
            return self._joined(present, record.params)
        return torch.stack([c for c in present.values() if c is not None]).sum(0)

    def _joined(self, cotangents: Mapping[str, Tensor | None], like: Tensors) -> Tensor | None:
        if all(c is None for c in cotangents.values()):
            return None
        return self.step.join({n: torch.zeros_like(like[n]) if c is None else c for n, c in cotangents.items()})

    def give_back(self, found: Iterator[Tensor | None], below: Below, of_gradient: Tensors) -> None:
        """Split the cotangents of this part's inputs by parameter name."""
        if (direct := next(found)) is not None:
            below.params.update(self.step.split(direct))
        if self._joint_leaf and (through := next(found)) is not None:
            of_gradient.update(self.step.split(through))
        for key in self._kept:
            if (cotangent := next(found)) is None:
                continue
            # an entry that the parameters share counts once
            split = self.step.split(cotangent) if per_element(key, cotangent) else {self.step.names[0]: cotangent}
            below.state.update({(name, key): c for name, c in split.items()})


def as_leaves(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Return the same values by the same names, as leaves of a new graph."""
    return dict(zip(tensors, leaves(list(tensors.values())), strict=True))


def _vjp(
    outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor], retain_graph: bool
) -> Iterator[Tensor | None]:
    outputs = [(head, weight) for head, weight in outputs if head.requires_grad]
    if not outputs:
        return iter([None] * len(inputs))
    heads, weights = zip(*outputs, strict=True)
    return iter(torch.autograd.grad(heads, inputs, weights, allow_unused=True, retain_graph=retain_graph))
