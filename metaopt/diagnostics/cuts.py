"""What cuts a path of gradient: the operations, where in the user's code they are, and what to write instead."""

from __future__ import annotations

import linecache
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from metaopt.base.telling import BENEATH, LIBRARIES

Kind = Literal["severed", "stepwise", "choice"]
Source = tuple[str, str]  # ("meta-parameter" or "stage", its name)

LOSS, TRANSFORM, HAND_OVER = "the loss", "the transform", "the hand-over"
INITIAL, OVERRIDES, OBJECTIVE = "the initial weights", "the overrides", "the meta-objective"
NO_GRAD = "torch.no_grad()"
WRITTEN = "in the stage's loss, from upstream[...]: a hand-over writes without a graph"
_TRACKED_FROM, _TRACKER = "metaopt.diagnostics.readings", "metaopt.diagnostics.marks"
_ON_REQUEST = ("metaopt.core.view", "detach")  # the one cut of this library that a user asks for


@dataclass(frozen=True)
class Place:
    """A line of source code."""

    file: str
    line: int
    function: str

    @property
    def code(self) -> str:
        """The line itself, as far as its source can be read."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        relative = os.path.relpath(self.file)
        return f"{self.file if relative.startswith('..') else relative}:{self.line}, in {self.function}"


@dataclass(frozen=True)
class Operation:
    """What cuts: `severed` takes a value out of the graph, `stepwise` has the derivative 0.

    `choice` is stepwise as well, but only chooses between branches, as a relu does: beside a path it is no loss.
    """

    name: str
    kind: Kind
    instead: str


@dataclass(frozen=True)
class Cut:
    """One operation that ends the path of what it is `of`.

    `part` says where: the loss, hand-over, initial weights, overrides or transform of `stage`, or the meta-objective
    (`stage` is None). `inside` is the library's line, where a library cuts on behalf of `place`.
    """

    operation: Operation
    place: Place | None
    part: str
    stage: str | None
    of: frozenset[Source]
    inside: Place | None = None
    intended: bool = False

    @property
    def where(self) -> str:
        """The part of the chain, in words."""
        return self.part if self.stage is None else f"{self.part} of stage {self.stage!r}"

    @property
    def instead(self) -> str:
        """What to write instead."""
        if self.part != HAND_OVER:
            return self.operation.instead
        return WRITTEN + ("" if self.operation.name == NO_GRAD else f"; there, {self.operation.instead}")

    @property
    def key(self) -> tuple[str, Place | None]:
        """What tells it from other cuts of the same part."""
        return self.operation.name, self.place or self.inside

    def __str__(self) -> str:
        shown = self.place or self.inside
        at = f" at {shown}" if shown else ""
        within = f" (inside it: {self.inside})" if self.place and self.inside else ""
        code = f"\n    {shown.code}" if shown and shown.code else ""
        return f"{self.operation.name}{at}{within}{code}\n  write instead: {self.instead}"


_TENSOR = "the tensor itself: one of a single entry goes wherever a number goes"
_SOFT = "soft labels, logits.softmax(-1) (metaopt.Distillation), hidden states, or expected embeddings"
_SMOOTH = "nothing, or a smooth stand-in: its derivative is 0 wherever it has one"
_GATE = "a smooth gate, torch.sigmoid((a - b) / temperature), if the gradient is to pass here"
_INTEGERS = "keep the floating values; integers have no derivative: mix rows, probabilities @ table, not table[index]"

_OUTSIDE = "the same outside of it, as far as its result is used"
_SEVERING = {
    "detach": (".detach()", "the tensor without .detach(); a detached copy is for logs"),
    "detach_": (".detach_()", "the tensor without .detach_()"),
    "data": (".data", "the tensor without .data"),
    "tensor": ("torch.tensor(...)", "the tensor itself, or torch.stack([...]) of several: torch.tensor copies values"),
    "asarray": ("torch.asarray(...)", "the tensor itself"),
    "new_tensor": (".new_tensor(...)", "the tensor itself: .new_tensor copies values"),
    "__deepcopy__": ("copy.deepcopy(...)", "the tensor itself, or .clone()"),
    "grad": ("torch.autograd.grad(...)", "torch.autograd.grad(..., create_graph=True)"),
}
NUMBERS = {
    "item": ".item()",
    "tolist": ".tolist()",
    "numpy": ".numpy()",
    "__array__": "numpy.asarray(...)",
    "__float__": "float(...)",
    "__int__": "int(...)",
    "__index__": "int(...)",
    "__complex__": "complex(...)",
}
_FLAT = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "bernoulli", "normal", "floor_divide", "__floordiv__"}
_CASTS = {"to", "type", "type_as", "long", "int", "short", "byte", "char"}
_COMPARISONS = {"eq": "==", "ne": "!=", "gt": ">", "ge": ">=", "lt": "<", "le": "<=", "bool": ".bool()"}
_COMPARISONS |= {
    "greater": ">",
    "less": "<",
    "isclose": "isclose",
    "logical_not": "logical_not",
    "isfinite": "isfinite",
}
_CHOOSING = {"max", "min", "topk", "sort", "argsort", "nonzero", "where", "unique", "searchsorted", "bucketize"}


def is_flat(name: str) -> bool:
    """Return whether a function of this name has the derivative 0."""
    return _bare(name) in _FLAT


def is_hard(name: str) -> bool:
    """Return whether a function of this name cuts by itself, whatever its input."""
    return _bare(name) in _SEVERING or is_flat(name)


def _bare(name: str) -> str:
    return name if name.startswith("__") else name.rstrip("_")


def without_grad() -> Operation:
    """Return what keeps torch from building a graph just now."""
    name = "torch.inference_mode()" if torch.is_inference_mode_enabled() else NO_GRAD
    return Operation(name, "severed", _OUTSIDE)


def operation(name: str, output: Any) -> Operation:
    """Return what a torch function is that gave this output without a gradient."""
    bare = _bare(name)
    if name in NUMBERS:
        return Operation(NUMBERS[name], "severed", _TENSOR)
    if name in _SEVERING or bare in _SEVERING:
        label, instead = _SEVERING.get(name) or _SEVERING[bare]
        return Operation(label, "severed", instead)
    if name in _COMPARISONS:
        return Operation(f"comparison {_COMPARISONS[name]}", "choice", _GATE)
    if bare in _FLAT:
        return Operation(bare, "stepwise", _SMOOTH)
    if name in ("argmax", "argmin", "multinomial", "one_hot"):
        return Operation(name, "stepwise", _SOFT)
    if isinstance(output, Tensor) and not (output.is_floating_point() or output.is_complex()):
        if name in _CASTS:
            return Operation("integer cast", "stepwise", _INTEGERS)
        return Operation(name, "choice" if name in _CHOOSING else "stepwise", _INTEGERS)
    return Operation(name, "severed", "an operation that keeps the graph: this one returns a tensor without it")


@dataclass(frozen=True)
class Position:
    """Where Python is: the user's line, and the library's inside of it; `intended` where this library cuts itself."""

    place: Place | None
    inside: Place | None
    intended: bool


def position(outermost: bool = False) -> Position:
    """Return the innermost line of user code above the torch call in hand, or the outermost one."""
    frame: Any = sys._getframe(1)
    user, library, requested = None, None, False
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        if module == _TRACKED_FROM:
            break
        top = module.partition(".")[0]
        if top not in LIBRARIES:
            user = frame
            if not outermost:
                break
        elif user is None and top not in BENEATH and module not in (_TRACKER, __name__):
            library = library or frame
            requested = requested or (module, frame.f_code.co_name) == _ON_REQUEST
        frame = frame.f_back
    if library is None or (requested and user):
        return Position(_place(user), None, False)
    intended = library.f_globals["__name__"].partition(".")[0] == "metaopt"
    return Position(_place(user), _place(library), intended)


def _place(frame: Any) -> Place | None:
    return None if frame is None else Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
