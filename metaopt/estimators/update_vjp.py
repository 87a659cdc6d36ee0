"""The update half of an inner step, pulled back: to the weights and optimizer state before it, and to the gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from metaopt.core.inner_loop import InnerLoop
from metaopt.core.meta_params import Lending
from metaopt.core.view import Tensors
from metaopt.estimators.closed_forms import GRADIENT, PARAM, Key, Pieces, closed_form
from metaopt.estimators.products.base import leaves, linearized
from metaopt.estimators.storage import StepRecord
from metaopt.optimizers.rule import Block, Joined, JointStep, but
from metaopt.optimizers.step import TrackedFloat, carries_gradient, per_element

MOST_ELEMENTS = 2**17  # of what a step computes between: it stays in the processor's cache, and below the model's size


@dataclass
class Below:
    """Cotangents of a step's weights, by parameter name, and of its optimizer state, by name and piece of it."""

    params: Mapping[str, Tensor]
    state: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def update_vjp(
    loop: InnerLoop,
    t: int,
    record: StepRecord,
    gradient: Mapping[str, Tensor | None],
    learned: Tensors,
    lend: Lending,
    above: Below,
) -> tuple[Below, Mapping[str, Tensor], Tensors]:
    """Return the cotangents of what goes into `update`, from those of what comes out.

    Args:
        loop, t, record: the step, and what it was at.
        gradient: raw, before the transform; None where the loss does not use a parameter.
        learned: values of the meta-parameters by name.
        lend: where they live.
        above: cotangents of the weights and state after the step.

    Returns:
        Cotangents of (weights, state) before it, of the raw gradient, and of the meta-parameters.
    """
    learned = as_leaves(learned)
    of_learned: Tensors = {}
    with torch.enable_grad(), lend(learned):
        raw = as_leaves({n: g for n, g in gradient.items() if g is not None}) if loop.transform is not None else {}
        given = loop.transformed({**gradient, **raw} if raw else gradient)
        if record.handed is None:
            hyperparameters = loop.hyperparameters(t, lend.meta_params)
        else:
            hyperparameters, learned = record.handed
        given_leaves = tree_leaves(hyperparameters)
        read = any(isinstance(x, TrackedFloat) or (isinstance(x, Tensor) and x.requires_grad) for x in given_leaves)
        cls = type(loop.rule.optimizer)
        steps = list(loop.rule.parts(record.params, given, record.state, hyperparameters))
        above_state = _by_block([step.block for step in steps], above.state)
        params, state, of_gradient = {}, {}, {}
        for step in steps:
            weights = _weights(step.block, record.params, above.params, above_state)
            found = _joint_vjp(step, record, given, weights, learned if read else {}, of_learned, None if read else cls)
            params[step.block], of_gradient[step.block] = found.pop(PARAM, None), found.pop(GRADIENT, None)
            state[step.block] = {key: cotangent for (_, key), cotangent in found.items()}
        gradients = _joined(of_gradient, {})
        if raw:  # once for the step, in however many parts the update was taken
            outputs, cotangents = zip(*[(given[name], cotangent) for name, cotangent in gradients.items()], strict=True)
            back = linearized(outputs, cotangents, [*raw.values(), *learned.values()])
            gradients = {name: c for name, c in zip(raw, back, strict=False) if c is not None}
            for name, cotangent in zip(learned, back[len(raw) :], strict=True):
                add(of_learned, name, cotangent)
    return Below(_joined(params, above.params), _joined(state, above_state)), gradients, of_learned


def _joined(pieces: Mapping[Block, Any], above: Mapping[str, Any]) -> Joined:
    """Return what the blocks have, and of the parameters that no step has moved what they had."""
    present = {block: value for block, value in pieces.items() if value is not None and len(value)}
    return Joined(present, but(above, pieces))


def _by_block(blocks: Sequence[Block], state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return cotangents of the state by name, unless these blocks have them; what parameters share is the first's."""
    if not isinstance(state, Joined) or state.pieces.keys() <= set(blocks):
        return state
    each = dict(state.alone)
    for block, piece in state.pieces.items():
        own = {k: v for k, v in piece.items() if per_element(k, v)}
        each.update(block.split(own))
        each[block.names[0]] = {**piece, **each[block.names[0]]}
    return each


def _weights(
    block: Block, params: Mapping[str, Tensor], above: Mapping[str, Tensor], state: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the cotangents of a block's weights (under no key) and of the entries of its state, where there are."""

    def joined(present: dict[str, Tensor]) -> Tensor:
        return block.join({n: present[n] if n in present else torch.zeros_like(params[n]) for n in block.names})

    weights: dict[str, Tensor] = {}
    if isinstance(above, Joined) and block in above.pieces:
        weights[""] = above.pieces[block]
    elif present := {n: above[n] for n in block.names if n in above}:
        weights[""] = joined(present)
    if isinstance(state, Joined) and block in state.pieces:
        return {**weights, **state.pieces[block]}
    each = {n: state[n] for n in block.names if n in state}
    for key in dict.fromkeys(key for entry in each.values() for key in entry):
        present = {n: entry[key] for n, entry in each.items() if key in entry}
        shared = not per_element(key, next(iter(present.values())))
        weights[key] = torch.stack(list(present.values())).sum(0) if shared else joined(present)
    return weights


def _joint_vjp(
    step: JointStep,
    record: StepRecord,
    gradient: Mapping[str, Tensor | None],
    above: Mapping[str, Tensor],
    learned: Tensors,
    of_learned: Tensors,
    cls: type[Optimizer] | None,
) -> dict[Key, Tensor]:
    """Return the cotangents of what goes into one joint step, by (kind, key); add those of `learned` to the sums.

    It is taken on so many elements at a time that what it computes between is never as large as the model, and by the
    formula of the class if one is given and has one.
    """
    block, out = step.block, dict[Key, Tensor]()
    if not above:
        return out
    params, gradients, state = block.join(record.params), block.join(gradient).detach(), block.join(record.state)
    formula = closed_form(cls, step, params, state, above, by_graph) if cls is not None else None
    pull: Callable[..., Pieces] = formula or functools.partial(by_graph, learned=learned)
    fresh = torch.empty_like if formula else torch.zeros_like  # a graph may lack a piece, a formula gives every one
    size = params.numel() if block.flat else 0
    for start in range(0, max(size, 1), MOST_ELEMENTS):
        elements = slice(start, min(start + MOST_ELEMENTS, size)) if size > MOST_ELEMENTS else None

        def part(values: Mapping[str, Any], elements: slice | None = elements) -> Mapping[str, Any]:
            if elements is None:
                return values
            return {key: value[elements] if per_element(key, value) else value for key, value in values.items()}

        own = part({"param": params, "gradient": gradients})
        here = {k: u for k, u in above.items() if start == 0 or per_element(k, u)}  # what is shared counts once
        found = pull(step, own["param"], own["gradient"], part(state), part(here), elements)
        for (kind, key), cotangent in found.items():
            if cotangent is None:
                continue
            if kind == "learned":
                add(of_learned, key, cotangent)
            elif elements is None or not per_element(key, cotangent):
                add(out, (kind, key), cotangent)
            else:
                if (kind, key) not in out:
                    out[kind, key] = fresh(params)
                out[kind, key][elements] = cotangent
    return out


def by_graph(
    step: JointStep,
    param: Tensor,
    gradient: Tensor,
    state: Mapping[str, Any],
    above: Mapping[str, Tensor],
    elements: slice | None,
    learned: Tensors | None = None,
) -> Pieces:
    """Return the cotangents of what goes into a joint step (of these elements), by differentiating it."""
    learned = learned or {}
    inputs = dict(zip((PARAM, GRADIENT), leaves([param, gradient]), strict=True))
    kept = as_leaves({key: value for key, value in state.items() if carries_gradient(key, value)})
    after, state_after = step(inputs[PARAM], inputs[GRADIENT], {**state, **kept}, elements)
    inputs |= {("state", key): value for key, value in kept.items()}
    inputs |= {("learned", name): value for name, value in learned.items()}
    outputs = [state_after[key] if key else after for key in above]
    found = linearized(outputs, list(above.values()), list(inputs.values()), bool(learned))
    return dict(zip(inputs, found, strict=True))


def add(sums: dict[Any, Tensor], key: Any, cotangent: Tensor | None) -> None:
    """Add a cotangent to those of the same tensor."""
    if cotangent is not None:
        sums[key] = sums[key] + cotangent if key in sums else cotangent


def added(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the sums of cotangents by parameter name, in the blocks of both if they have the same."""
    held = [x.pieces for x in (one, other) if isinstance(x, Joined) and not x.alone]
    if len(held) == 2 and held[0].keys() == held[1].keys():
        return Joined({block: piece + held[1][block] for block, piece in held[0].items()}, {})
    sums = dict(one)
    for name, cotangent in other.items():
        add(sums, name, cotangent)
    return sums


def as_leaves(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Return the same values by the same names, as leaves of a new graph."""
    return dict(zip(tensors, leaves(list(tensors.values())), strict=True))
