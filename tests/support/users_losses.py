"""Inner losses as users write them: what they ask an upstream model, and the leaves that they make of their own."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from networks import Gained
from problems import Values, normal, regularised_error, soft_labels, weighted_squared_error
from reference import Problem, Training
from small_models import Network
from torch import Tensor, nn

import metaopt

# --- what a student asks its teacher


class Drawing(nn.Module):
    """Scales its answers in eval mode by a random number, if it is given any."""

    def __init__(self, draws: Any = None) -> None:
        super().__init__()
        self.network, self.draws = Network(0.3), draws

    def forward(self, inputs: Tensor) -> Tensor:
        scale = 1.0 if self.draws is None or self.training else self.draws()
        return self.network(inputs) * scale


def once(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    return soft_labels(model, batch, phi, upstream, teacher="teacher", temperature=2.0)


def twice(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Asks with the batch, with a tensor of its own, and with the batch again."""
    log_q = model(batch["inputs"]).log_softmax(-1)
    asked = [batch["inputs"], batch["inputs"].tanh(), batch["inputs"]]
    answers = [upstream["teacher"](x).softmax(-1) for x in asked]
    return -sum((p * log_q).sum(-1).mean() * (i + 1) for i, p in enumerate(answers))  # type: ignore[return-value]


def sometimes(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Asks at the steps of the first batch only."""
    if int(batch["index"][0]) == 0:
        return once(model, batch, phi, upstream)
    return metaopt.WeightedLoss()(model, batch, phi, upstream)


def in_train_mode(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    return once(model, batch, phi, {"teacher": upstream["teacher"].train()})


def writing_into_the_answer(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Divides the teacher's logits in place, from the second batch on."""
    logits = upstream["teacher"](batch["inputs"])
    if int(batch["index"][0]) > 0:
        logits /= 3.0
    return -(logits.softmax(-1) * model(batch["inputs"]).log_softmax(-1)).sum(-1).mean()


def without_grad(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Asks outside the graph."""
    with torch.no_grad():
        logits = upstream["teacher"](batch["inputs"])
    return -(logits.softmax(-1) * model(batch["inputs"]).log_softmax(-1)).sum(-1).mean()


def partly_without_grad(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Asks inside and outside the graph."""
    return once(model, batch, phi, upstream) + without_grad(model, batch, phi, upstream)


# Loss, what the teacher draws in eval mode, and whether the loss may be captured: not what branches on a batch's values
# or draws outside torch's graph.
ASKING: dict[str, tuple[Callable[..., Tensor], Any, bool]] = {
    "asks once": (once, None, True),
    "asks twice": (twice, None, True),
    "asks sometimes": (sometimes, None, False),
    "asks in train mode": (in_train_mode, None, True),
    "writes into the answer": (writing_into_the_answer, None, False),
    "asks partly without grad": (partly_without_grad, None, True),
    "draws by torch": (once, lambda: torch.rand(()), False),
    "draws by random": (once, random.random, False),
    "draws by numpy": (once, np.random.rand, False),
}

# --- leaves of the loss's own: gradient penalties, adversarial training


def penalty(model: Any, x: Tensor) -> Tensor:
    """Mean squared norm of the output's slope by the inputs."""
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().sum(1).mean()


def with_penalty(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    error = weighted_squared_error(model, batch, phi, upstream)
    return error + 0.3 * penalty(model, batch["inputs"].clone().requires_grad_())


def weighted_penalty(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Its strength is learned, its inputs are noised, and the leaf is a Parameter."""
    error = weighted_squared_error(model, batch, phi, upstream)
    noised = nn.Parameter(batch["inputs"] + 0.1 * torch.randn_like(batch["inputs"]))
    return error + phi.values[0] * penalty(model, noised)


def adversarial(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """At inputs moved along their loss's slope, which depends on the weights; the leaf stays in the graph."""
    shift = torch.zeros_like(batch["inputs"], requires_grad=True)
    error = weighted_squared_error(model, {**batch, "inputs": batch["inputs"] + shift}, phi, upstream)
    (slope,) = torch.autograd.grad(error, shift, create_graph=True)
    worst = batch["inputs"] + shift + 0.5 * slope / slope.norm()
    return weighted_squared_error(model, {**batch, "inputs": worst}, phi, upstream)


def marked_inside(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """As wav2vec2's feature extractor marks what it reads."""
    read = batch["inputs"][:]
    read.requires_grad = True
    return weighted_squared_error(model, {**batch, "inputs": read}, phi, upstream)


LEAVES: dict[str, Callable[..., Tensor]] = {
    "gradient penalty": with_penalty,
    "learned gradient penalty": weighted_penalty,
    "adversarial": adversarial,
    "inputs marked inside": marked_inside,
}


def of_leaves(loss: Callable[..., Tensor]) -> Problem:
    """Three steps of a tanh network by Adam, over two batches."""
    draw = normal(0)
    batches = [{"inputs": draw(4, 3), "labels": draw(4)} for _ in range(2)]
    adam = functools.partial(torch.optim.Adam, lr=0.05, eps=1e-3)
    stage = Training(Gained(), adam, loss, batches, num_steps=3)
    batch = {"inputs": draw(4, 3), "labels": draw(4)}
    return Problem({"only": stage}, regularised_error("only"), batch, Values(draw(4) ** 2))
