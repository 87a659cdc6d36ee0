"""The update half of an inner step, pulled back: to the weights and optimizer state before it, and to the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaopt.core.inner_loop import InnerLoop
from metaopt.core.meta_params import Lending
from metaopt.core.view import Tensors
from metaopt.estimators.products.base import leaves, linearized
from metaopt.estimators.storage import StepRecord
from metaopt.optimizers.rule import Block, Joined, JointStep, but
from metaopt.optimizers.step import carries_gradient, per_element

MOST_ELEMENTS = 2**16  # of what a step computes between: it stays in the processor's cache, and below the model's size


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
        hyperparameters = loop.hyperparameters(t, lend.meta_params)
        read = any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(hyperparameters))
        steps = list(loop.rule.parts(record.params, given, record.state, hyperparameters))
        above_state = _by_block([step.block for step in steps], above.state)
        params, state, of_gradient = {}, {}, {}
        for step in steps:
            weights = _weights(step.block, record.params, above.params, above_state)
            found = _joint_vjp(step, record, given, weights, learned if read else {}, of_learned)
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


def _weights(block: Block, params: Tensors, above: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, Tensor]:
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


PARAM, GRADIENT = ("param", ""), ("gradient", "")


def _joint_vjp(
    step: JointStep,
    record: StepRecord,
    gradient: Mapping[str, Tensor | None],
    weights: Mapping[str, Tensor],
    learned: Tensors,
    of_learned: Tensors,
) -> dict[tuple[str, str], Tensor]:
    """Return the cotangents of what goes into one joint step, by (kind, key); add those of `learned` to the sums.

    It is taken on so many elements at a time that what it computes between is never as large as the model.
    """
    block, out = step.block, dict[tuple[str, str], Tensor]()
    if not weights:
        return out
    params, gradients, state = block.join(record.params), block.join(gradient).detach(), block.join(record.state)
    size = params.numel() if block.flat else 0
    for start in range(0, max(size, 1), MOST_ELEMENTS):
        elements = slice(start, start + MOST_ELEMENTS) if size > MOST_ELEMENTS else None

        def part(key: str, value: Any, elements: slice | None = elements) -> Any:
            return value if elements is None or not per_element(key, value) else value[elements]

        inputs = dict(zip((PARAM, GRADIENT), leaves([part("", params), part("", gradients)]), strict=True))
        own = {key: part(key, value) for key, value in state.items()}
        kept = as_leaves({key: value for key, value in own.items() if carries_gradient(key, value)})
        after, state_after = step(inputs[PARAM], inputs[GRADIENT], {**own, **kept}, elements)
        inputs |= {("state", key): value for key, value in kept.items()}
        inputs |= {("learned", name): value for name, value in learned.items()}
        here = {k: w for k, w in weights.items() if start == 0 or per_element(k, w)}  # what is shared counts once
        outputs = [state_after[key] if key else after for key in here]
        found = linearized(outputs, [part(k, w) for k, w in here.items()], list(inputs.values()), bool(learned))
        for (kind, key), cotangent in zip(inputs, found, strict=True):
            if cotangent is None:
                continue
            if kind == "learned":
                add(of_learned, key, cotangent)
            elif elements is None or not per_element(key, cotangent):
                add(out, (kind, key), cotangent)
            else:
                out.setdefault((kind, key), torch.zeros_like(params))[elements] = cotangent
    return out


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
