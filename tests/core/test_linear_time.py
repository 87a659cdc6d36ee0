"""The time of an unroll is linear in its steps: counted in nodes of the graph, not in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import higher
import torch
from small import ADAM, SGD, cross_entropy, example_weights, feature_batches, one_stage, two_stages
from small_models import CLASSES, FEATURES, Network
from torch import Tensor, nn

import metaopt


def visited_nodes(loss: Tensor, targets: list[Tensor]) -> int:
    """How many nodes `autograd.grad(loss, targets)` looks at: it stops below the targets' smallest height.

    A node's height is the longest path from it to a leaf, as in the engine's own pruning.
    """
    height: dict[Any, int] = {}
    stack = [loss.grad_fn]
    while stack:
        node = stack[-1]
        below = [parent for parent, _ in node.next_functions if parent is not None]  # type: ignore[union-attr]
        waiting = [parent for parent in below if parent not in height]
        if waiting:
            stack += waiting
            continue
        height[stack.pop()] = 1 + max((height[parent] for parent in below), default=-1)
    edges = [torch.autograd.graph.get_gradient_edge(target).node for target in targets]
    lowest = min(height.get(node, 0) for node in edges)
    seen, queue = {loss.grad_fn}, [loss.grad_fn]
    while queue:
        for parent, _ in queue.pop().next_functions:  # type: ignore[union-attr]
            if parent is not None and parent not in seen and height[parent] >= lowest:
                seen.add(parent)
                queue.append(parent)
    return len(seen)


class WithUnused(Network):
    """A network with a parameter that its forward does not use, like BERT's pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)


def nodes_per_step(loss: Callable[..., Tensor], run: Callable[[Callable[..., Tensor]], object]) -> list[int]:
    """Nodes that the gradient of each inner step visits, while `run` runs a loop on the loss it is given."""
    counts: list[int] = []

    def counted(model: Any, *rest: Any) -> Tensor:
        value = loss(model, *rest)
        params = model.params.values() if hasattr(model, "params") else model.parameters()
        counts.append(visited_nodes(value, [p for p in params if p.requires_grad]))
        return value

    run(counted)
    return counts


def test_every_step_of_an_unroll_visits_as_many_nodes_as_the_first():
    def run(loss: Any) -> None:
        one_stage(loss, feature_batches(1), model=WithUnused(), optimizer=ADAM, num_steps=8).unroll(example_weights())

    counts = nodes_per_step(cross_entropy, run)
    assert len(counts) == 8
    assert len(set(counts)) == 1


def test_every_step_of_a_student_but_the_first_stops_at_the_teacher():
    """However long the teacher was trained; the first step finds out whether the student's loss reads it."""
    counts = {}
    for teacher_steps in (1, 6):
        chain = two_stages(teacher=WithUnused(), student=WithUnused(), batches=feature_batches(1))
        chain.stages["teacher"].num_steps = teacher_steps
        loss = chain.stages["student"].loss

        def run(counted: Any, chain: metaopt.Chain = chain) -> None:
            chain.stages["student"].loss = counted
            chain.unroll(example_weights())

        counts[teacher_steps] = nodes_per_step(loss, run)
    assert len({*counts[1][1:], *counts[6][1:]}) == 1
    assert counts[6][0] > counts[6][1]


def test_by_hand_every_step_still_visits_the_whole_history():
    model, batch = WithUnused(), feature_batches(1)[0]

    def run(loss: Any) -> None:
        with higher.innerloop_ctx(model, SGD(model.parameters())) as (fast, diffopt):
            for _ in range(8):
                diffopt.step(loss(fast, batch, None, None))

    counts = nodes_per_step(cross_entropy, run)
    assert counts == sorted(set(counts))
    assert counts[-1] > 5 * counts[0]
