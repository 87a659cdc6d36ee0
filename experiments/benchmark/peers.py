"""Contestants from other libraries; each is imported only when it runs, and says what is missing if it cannot be."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from by_hand import Run
from torch import Tensor, nn
from work import OPTIMIZERS, Batch, Work, distillation, twice_differentiable, validation_loss, weighted_loss


def with_torchopt(work: Work) -> Run:
    """TorchOpt's `MetaAdam` and `MetaSGD`, one for each training, as in its examples of MAML.

    Its Adam takes a constant under the root, as its documentation asks for: without it a weight whose gradient is 0
    makes the hypergradient NaN.
    """
    torchopt = importlib.import_module("torchopt")
    options = dict(OPTIMIZERS[work.spec.optimizer][1])
    kind = torchopt.MetaSGD
    if work.spec.optimizer == "adam":
        kind = functools.partial(torchopt.MetaAdam, eps_root=1e-12)

    def run() -> Tensor:
        teacher, student = work.models()
        with twice_differentiable():
            optimizer = kind(teacher, **options)
            for batch in work.train:
                with work.casting():
                    loss = weighted_loss(teacher, batch, work.logits[batch["index"]].sigmoid())
                optimizer.step(loss)
            optimizer = kind(student, **options)
            for batch in work.unlabelled:
                with work.casting():
                    loss = distillation(student, batch, teacher)
                optimizer.step(loss)
            with work.casting():
                loss = validation_loss(student, work.validation)
            return torch.autograd.grad(loss, work.logits)[0]

    return run


class Weights(nn.Module):
    """A as a module, which is what Betty optimises."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone())


class Kept(torch.optim.SGD):
    """An optimizer that leaves the meta-parameters where they are, so that their gradient can be read."""

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do nothing."""


def with_betty(work: Work, method: str, **settings: Any) -> Run:
    """Betty's `ImplicitProblem`s teacher → student → A, with its approximations of the inverse Hessian.

    Its engine interleaves the problems' steps: T teacher steps for each step of the student. Here the problems are
    stepped in the order of the work, T and then T, and its hypergradient is taken at the end. Parameters that a loss
    does not read are kept from it: two of its methods refuse them.
    """
    problems, configs = importlib.import_module("betty.problems"), importlib.import_module("betty.configs")
    engine = importlib.import_module("betty.engine")
    logging.disable(logging.INFO)

    class Used(problems.ImplicitProblem):
        def trainable_parameters(self) -> list[nn.Parameter]:
            return [p for p in self.module.parameters() if p.requires_grad]

        meta_trainable_parameters = parameters = trainable_parameters

    class Teacher(Used):
        def training_step(self, batch: Batch) -> Tensor:
            with work.casting():
                return weighted_loss(self.module, batch, self.outer.module.logits[batch["index"]].sigmoid())

    class Student(Used):
        def training_step(self, batch: Batch) -> Tensor:
            with work.casting():
                return distillation(self.module, batch, self.teacher.module)

    class Outer(Used):
        def training_step(self, batch: Batch) -> Tensor:
            with work.casting():
                return validation_loss(self.student.module, batch)

    config = functools.partial(configs.Config, type=method, **settings)
    unused = _unused(work)

    def problem(kind: type, name: str, module: nn.Module, optimizer: Any, batches: Sequence[Batch]) -> Any:
        for parameter_name, parameter in module.named_parameters():
            parameter.requires_grad_(parameter_name not in unused)
        used = [p for p in module.parameters() if p.requires_grad]
        return kind(name=name, module=module, optimizer=optimizer(used), train_data_loader=batches, config=config())

    def run() -> Tensor:
        first, second = work.models()
        weights = Weights(work.logits)
        teacher = problem(Teacher, "teacher", first, work.optimizer, work.train)
        student = problem(Student, "student", second, work.optimizer, work.unlabelled)
        outer = problem(Outer, "outer", weights, functools.partial(Kept, lr=0.0), [work.validation])
        upward = {"u2l": {outer: [teacher]}, "l2u": {teacher: [student], student: [outer]}}
        strategy = "gpu" if work.spec.device == "cuda" else "cpu"
        engine.Engine(
            [teacher, student, outer], engine.EngineConfig(strategy=strategy, logger_type="none"), dependencies=upward
        )
        found: list[Tensor] = []
        outer.grad_callback = lambda: found.append(weights.logits.grad.clone())  # pyright: ignore[reportOptionalMemberAccess]
        with twice_differentiable():
            for stage in (teacher, student):
                for _ in range(work.spec.num_steps):
                    stage.one_step_descent()
            outer.one_step_descent()
        return found[0]

    return run


def _unused(work: Work) -> set[str]:
    """Return the names of the parameters that the model's output does not depend on."""
    params = dict(work.student.named_parameters())
    with twice_differentiable():
        loss = validation_loss(work.student, work.validation)
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {name for name, gradient in zip(params, found, strict=True) if gradient is None}
