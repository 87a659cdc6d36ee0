"""The update half of an inner step, pulled back: to the weights and optimizer state before it, and to the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaopt.core.inner_loop import InnerLoop
from metaopt.core.meta_params import AnyMetaParameters, rebound
from metaopt.core.view import Tensors
from metaopt.estimators.products.base import leaves, linearized
from metaopt.estimators.storage import StepRecord
from metaopt.optimizers.flattened import JointStep
from metaopt.optimizers.kinds import carries_gradient, per_element

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
        shared = {("raw", n): x for n, x in raw.items()} | {("learned", n): x for n, x in learned.items()}
        again = bool(raw) or any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(hyperparameters))
        for step in loop.rule.parts(record.params, given, record.state, hyperparameters, most=MOST_ELEMENTS):
            for (kind, name), cotangent in _joint_vjp(step, record, given, above, shared, bool(raw), again).items():
                if kind == "raw":
                    add(of_gradient, name, cotangent)
                elif kind == "learned":
                    add(of_learned, name, cotangent)
                elif kind == "param":
                    below.params.update(step.split(cotangent))
                elif kind == "gradient":
                    of_gradient.update(step.split(cotangent))
                else:  # an entry that the parameters share counts once
                    once = {step.names[0]: cotangent}
                    split = step.split(cotangent) if per_element(name, cotangent) else once
                    below.state.update({(n, name): c for n, c in split.items()})
    return below, of_gradient, of_learned


def _joint_vjp(
    step: JointStep,
    record: StepRecord,
    gradient: Mapping[str, Tensor | None],
    above: Below,
    shared: Mapping[tuple[str, str], Tensor],
    transformed: bool,
    retain_graph: bool,
) -> dict[tuple[str, str], Tensor]:
    """Return the cotangents of what goes into one joint step, by (kind, name), and of what is shared with others."""
    joined, state = step.join(gradient), step.join_state(record.state)
    param, direct = leaves([step.join(record.params), joined])
    kept = as_leaves({k: v for k, v in state.items() if carries_gradient(k, v)})
    after, state_after = step.step(param, joined if transformed else direct, {**state, **kept})
    inputs = {("param", ""): param, **({} if transformed else {("gradient", ""): direct})}
    inputs |= {("state", k): v for k, v in kept.items()} | dict(shared)
    weights = {key: _weight(step, key, record, above) for key in ("", *(k for _, k in above.state))}
    weights = {key: w for key, w in weights.items() if w is not None}
    outputs = [state_after[key] if key else after for key in weights]
    found = linearized(outputs, list(weights.values()), list(inputs.values()), retain_graph)
    return {key: c for key, c in zip(inputs, found, strict=True) if c is not None}


def _weight(step: JointStep, key: str, record: StepRecord, above: Below) -> Tensor | None:
    """Return the cotangent of a joint step's weights (no key), or of one entry of its state; None if there is none."""
    each = {n: above.state.get((n, key)) if key else above.params.get(n) for n in step.names}
    present = {n: c for n, c in each.items() if c is not None}
    if not present:
        return None
    if key and not per_element(key, next(iter(present.values()))):
        return torch.stack(list(present.values())).sum(0)
    return step.join({n: present[n] if n in present else torch.zeros_like(record.params[n]) for n in step.names})


def add(sums: dict[Any, Tensor], key: Any, cotangent: Tensor | None) -> None:
    """Add a cotangent to those of the same tensor."""
    if cotangent is not None:
        sums[key] = sums[key] + cotangent if key in sums else cotangent


def as_leaves(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Return the same values by the same names, as leaves of a new graph."""
    return dict(zip(tensors, leaves(list(tensors.values())), strict=True))
