"""Contestants that a user writes without a library for it: plain training, `higher`, a hand unroll, checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import higher
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from work import OPTIMIZERS, Batch, Work, distillation, twice_differentiable, validation_loss, weighted_loss

Run = Callable[[], Tensor | None]
Tensors = list[Tensor]


def plain(work: Work) -> Run:
    """Both trainings by torch.optim, no meta-gradient: the unit of time and flops."""

    def run() -> None:
        teacher, student = work.models()
        weights = work.logits.detach().sigmoid()
        with twice_differentiable():
            optimizer = work.optimizer(teacher.parameters())
            for batch in work.train:
                with work.casting():
                    loss = weighted_loss(teacher, batch, weights[batch["index"]])
                _plain_step(loss, optimizer)
            teacher.requires_grad_(False)
            optimizer = work.optimizer(student.parameters())
            for batch in work.unlabelled:
                with work.casting():
                    loss = distillation(student, batch, teacher)
                _plain_step(loss, optimizer)

    return run


def _plain_step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def with_higher(work: Work) -> Run:
    """`higher` as its README shows it: `innerloop_ctx` over the model and its optimizer."""

    def run() -> Tensor:
        teacher, student = work.models()
        first_optimizer, second_optimizer = (work.optimizer(m.parameters()) for m in (teacher, student))
        with (
            twice_differentiable(),
            higher.innerloop_ctx(teacher, first_optimizer) as (first, first_steps),
            higher.innerloop_ctx(student, second_optimizer) as (second, second_steps),
        ):
            for batch in work.train:
                with work.casting():
                    loss = weighted_loss(first, batch, work.logits[batch["index"]].sigmoid())
                first_steps.step(loss)
            for batch in work.unlabelled:
                with work.casting():
                    loss = distillation(second, batch, first)
                second_steps.step(loss)
            with work.casting():
                loss = validation_loss(second, work.validation)
            return torch.autograd.grad(loss, work.logits)[0]

    return run


# --- a hand unroll: functional_call, and torch's update formulas written out


def _adam(p: Tensor, g: Tensor, state: Tensors, t: int, options: dict[str, float]) -> tuple[Tensor, Tensors]:
    beta1, beta2 = 0.9, 0.999
    mean = beta1 * state[0] + (1 - beta1) * g
    square = beta2 * state[1] + (1 - beta2) * g * g
    positive = square > 0  # slope 0 where nothing has arrived yet
    root = torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
    scale = root / (1 - beta2**t) ** 0.5 + options["eps"]
    return p - options["lr"] / (1 - beta1**t) * mean / scale, [mean, square]


def _sgd(p: Tensor, g: Tensor, state: Tensors, t: int, options: dict[str, float]) -> tuple[Tensor, Tensors]:
    if "momentum" in options:
        state = [options["momentum"] * state[0] + g]
        g = state[0]
    return p - options["lr"] * g, state


class HandUnroll:
    """One training, unrolled step by step; parameters that its loss does not read are left out.

    Args:
        work: what is trained.
        model: whose forward, and whose initial weights.
        loss: (model, batch, the tensors handed to `train`) → the inner loss.
        checkpointed: recompute each step in the backward.
    """

    def __init__(
        self, work: Work, model: nn.Module, loss: Callable[[Any, Batch, Tensors], Tensor], checkpointed: bool
    ) -> None:
        self._work, self._loss, self._checkpointed = work, loss, checkpointed
        self._options = OPTIMIZERS[work.spec.optimizer][1]
        self._formula, self._num_states = {"adam": (_adam, 2), "sgd": (_sgd, 0), "momentum": (_sgd, 1)}[
            work.spec.optimizer
        ]
        self.model = model
        self.names: list[str] = []

    def train(self, batches: Sequence[Batch], others: Tensors) -> Tensors:
        """Return the trained weights, in the graph of `others`."""
        params = dict(self.model.named_parameters())
        with self._work.casting():
            loss = self._loss(self.model, batches[0], others)
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        self.names = [name for name, gradient in zip(params, found, strict=True) if gradient is not None]
        del loss, found
        weights = [params[name].detach().clone().requires_grad_() for name in self.names]
        flat = weights + [torch.zeros_like(w) for w in weights for _ in range(self._num_states)]
        for t, batch in enumerate(batches, start=1):
            step = functools.partial(self._step, t, batch, len(others))
            if self._checkpointed:
                flat = checkpoint(step, *others, *flat, use_reentrant=False, preserve_rng_state=False)
            else:
                flat = step(*others, *flat)
            assert isinstance(flat, list)
        return flat[: len(self.names)]

    def _step(self, t: int, batch: Batch, num_others: int, *tensors: Tensor) -> Tensors:
        others, flat = list(tensors[:num_others]), tensors[num_others:]
        n = len(self.names)
        with self._work.casting():
            loss = self._loss(self.with_weights(flat[:n]), batch, others)
        gradients = torch.autograd.grad(loss, flat[:n], create_graph=True)
        new, states = [], []
        for i, gradient in enumerate(gradients):
            start = n + i * self._num_states
            p, state = self._formula(flat[i], gradient, list(flat[start : start + self._num_states]), t, self._options)
            new.append(p)
            states += state
        return new + states

    def with_weights(self, weights: Sequence[Tensor]) -> Callable[..., Any]:
        """Return the model as a function, with these weights."""
        given = dict(zip(self.names, weights, strict=True))
        return lambda **inputs: functional_call(self.model, given, (), inputs)


def by_formula(work: Work, checkpointed: bool = False) -> Run:
    """A hand unroll; with `checkpointed`, `torch.utils.checkpoint` around each step.

    The student is differentiated first, down to the trained teacher's weights, then the teacher: the chain rule.
    """

    def run() -> Tensor:
        first_model, second_model = work.models()

        def teacher_loss(model: Any, batch: Batch, others: Tensors) -> Tensor:
            return weighted_loss(model, batch, others[0][batch["index"]].sigmoid())

        first = HandUnroll(work, first_model, teacher_loss, checkpointed)

        def student_loss(model: Any, batch: Batch, others: Tensors) -> Tensor:
            return distillation(model, batch, first.with_weights(others))

        second = HandUnroll(work, second_model, student_loss, checkpointed)
        with twice_differentiable():
            taught = first.train(work.train, [work.logits])
            handed = [w.detach().requires_grad_() for w in taught]
            trained = second.train(work.unlabelled, handed)
            with work.casting():
                loss = validation_loss(second.with_weights(trained), work.validation)
            cotangents = torch.autograd.grad(loss, handed)
            return torch.autograd.grad(taught, work.logits, cotangents)[0]

    return run
