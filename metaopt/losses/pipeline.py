"""A trained stage used as it was trained: the earlier stages' models make what it reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from metaopt.core.view import FunctionalModel, Models
from metaopt.losses.distillation import FromUpstream


class Pipeline(nn.Module):
    """A trained student behind the trained models that feed it, called with a batch or with the inputs in it."""

    def __init__(
        self, student: FunctionalModel, hand_over: FromUpstream, upstream: Mapping[str, FunctionalModel]
    ) -> None:
        super().__init__()
        self.module = student.structure.module  # says on which device the tensors are
        self._student, self._hand_over, self._upstream = student, hand_over, upstream

    def forward(self, **batch: Any) -> Any:
        inputs, _ = self._hand_over.student_inputs(self._student, batch, self._upstream)
        return self._student(**inputs)

    def train(self, mode: bool = True) -> Pipeline:
        return self  # its models have modes of their own

    @contextmanager
    def as_module(self) -> Iterator[nn.Module]:
        yield self


def as_trained(trained: Mapping[str, FunctionalModel], stage: str) -> FunctionalModel | Pipeline:
    """Return a stage's trained model, behind those that fed it in training where they did."""
    student = trained[stage]
    hand_over = None if student.trained is None else _feeding(student.trained.loss)
    if hand_over is None:
        return student
    earlier = itertools.takewhile(lambda name: name != stage, trained)
    return Pipeline(student, hand_over, Models({name: trained[name] for name in earlier}))


def _feeding(loss: Any) -> FromUpstream | None:
    """Return the hand-over in a loss that makes the student's inputs; None if the student reads the batch itself."""
    parts = (loss, getattr(loss, "loss", None), *getattr(loss, "terms", {}).values())
    makes = (p for p in parts if isinstance(p, FromUpstream) and type(p).student_inputs != FromUpstream.student_inputs)
    return next(makes, None)
