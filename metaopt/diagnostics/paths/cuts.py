"""What cuts a path of gradient: the operations, where in the user's code they are, and what to write instead."""

from __future__ import annotations

import linecache
import os
import sys
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from metaopt.base.errors import BENEATH, LIBRARIES
from metaopt.core.view import FunctionalModel

Source = tuple[str, str]  # ("meta-parameter" or "stage", its name)
NO_GRAD = "torch.no_grad()"
META_LOSS: Source = ("", "meta-loss")
_WATCH = __name__.rpartition(".")[0]  # its frames lie below a torch call, and above the part that it runs


class Part(NamedTuple):
    """A part of the chain that user code is called in: of a stage, or the meta-objective."""

    name: str
    stage: str | None = None

    @property
    def reader(self) -> Source:
        """What depends on what the part reads."""
        return META_LOSS if self.stage is None else ("stage", self.stage)

    @property
    def writes(self) -> bool:
        """Whether it is the hand-over, which writes data without a graph."""
        return self.name == "the hand-over"

    def __str__(self) -> str:
        return self.name if self.stage is None else f"{self.name} of stage {self.stage!r}"


class Place(NamedTuple):
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


# Where Python is: the user's line, the library's inside of it, and whether this library cuts there itself.
Position = tuple[Place | None, Place | None, bool]
NOWHERE: Position = (None, None, False)


class Operation(NamedTuple):
    """What cuts: `severed` takes a value out of the graph, `stepwise` has the derivative 0.

    `choice` is stepwise as well, but only chooses between branches, as a relu does: beside a path it is no loss.
    """

    name: str
    kind: Literal["severed", "stepwise", "choice"]
    instead: str


class Cut(NamedTuple):
    """One operation that ends the path of what it is `of`, in a part of the chain.

    `place` is the user's line, `inside` the library's that it calls, and `intended` tells that this library cuts there.
    """

    operation: Operation
    part: Part
    of: frozenset[Source]
    place: Place | None
    inside: Place | None
    intended: bool

    @property
    def where(self) -> str:
        """The part of the chain, in words."""
        return str(self.part)

    @property
    def by_design(self) -> bool:
        """Whether nothing is wrong with it, where another path leads to the same reader."""
        return self.intended or self.operation.kind == "choice" or self.part.writes

    @property
    def key(self) -> tuple[str, Place | None]:
        """What tells it from other cuts of the same part."""
        return self.operation.name, self.place or self.inside

    def __str__(self) -> str:
        (name, shown), instead = self.key, self.operation.instead
        at = f" at {shown}" if shown else ""
        within = f" (inside it: {self.inside})" if self.place and self.inside else ""
        code = f"\n    {shown.code}" if shown and shown.code else ""
        if self.part.writes:
            there = "" if name == NO_GRAD else f"; there, {instead}"
            instead = f"in the stage's loss, from upstream[...]: a hand-over writes without a graph{there}"
        return f"{name}{at}{within}{code}\n  write instead: {instead}"


# --- the operations ---------------------------------------------------------------------------------------------

_GATE = "a smooth gate, torch.sigmoid((a - b) / temperature), if the gradient is to pass here"
_INTEGERS = "keep the floating values; integers have no derivative: mix rows, probabilities @ table, not table[index]"
_NUMBER = "the tensor itself: one of a single entry goes wherever a number goes"
_SMOOTH = "nothing, or a smooth stand-in: its derivative is 0 wherever it has one"
_SOFT = "soft labels, logits.softmax(-1) (metaopt.Distillation), hidden states, or expected embeddings"

_SEVERING = {"detach": ".detach()", "detach_": ".detach_()", "data": ".data", "__deepcopy__": "copy.deepcopy(...)"}
_SEVERING |= {"tensor": "torch.tensor(...)", "asarray": "torch.asarray(...)", "new_tensor": ".new_tensor(...)"}
NUMBERS = {name: f".{name}()" for name in ("item", "tolist", "numpy")} | {"__array__": "numpy.asarray(...)"}
NUMBERS |= {f"__{name}__": f"{name}(...)" for name in ("float", "int", "complex")} | {"__index__": "int(...)"}
_COMPARISONS = {"eq": "==", "ne": "!=", "gt": ">", "ge": ">=", "lt": "<", "le": "<=", "bool": ".bool()"}
_COMPARISONS |= {"greater": ">", "less": "<"} | {name: name for name in ("isclose", "logical_not", "isfinite")}
_FLAT = ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "bernoulli", "normal", "floor_divide", "__floordiv__")
_CASTS = {"to", "type", "type_as", "long", "int", "short", "byte", "char"}
_CHOOSING = {"max", "min", "topk", "sort", "argsort", "nonzero", "where", "unique", "searchsorted", "bucketize"}

# By the name of torch's function: what cuts by itself, whatever its input.
_KNOWN = {
    name: Operation(label, "severed", "the tensor itself (of several, torch.stack([...])); a detached copy is for logs")
    for name, label in _SEVERING.items()
}
_KNOWN["grad"] = Operation("torch.autograd.grad(...)", "severed", "torch.autograd.grad(..., create_graph=True)")
_KNOWN |= {name: Operation(label, "severed", _NUMBER) for name, label in NUMBERS.items()}
_KNOWN |= {name: Operation(f"comparison {sign}", "choice", _GATE) for name, sign in _COMPARISONS.items()}
_KNOWN |= {name: Operation(name, "stepwise", _SMOOTH) for name in _FLAT}
_KNOWN |= {name: Operation(name, "stepwise", _SOFT) for name in ("argmax", "argmin", "multinomial", "one_hot")}


def known(name: str) -> Operation | None:
    """Return what a torch function of this name cuts by itself, whatever its input; None if it need not."""
    return _KNOWN.get(name) or (None if name.startswith("__") else _KNOWN.get(name.rstrip("_")))


def operation(name: str, output: Any) -> Operation:
    """Return what a torch function is that gave this output without a gradient."""
    if found := known(name):
        return found
    if isinstance(output, Tensor) and not (output.is_floating_point() or output.is_complex()):
        label = "integer cast" if name in _CASTS else name
        return Operation(label, "choice" if name in _CHOOSING else "stepwise", _INTEGERS)
    return Operation(name, "severed", "an operation that keeps the graph: this one returns a tensor without it")


def without_grad() -> Operation:
    """Return what keeps torch from building a graph just now."""
    name = "torch.inference_mode()" if torch.is_inference_mode_enabled() else NO_GRAD
    return Operation(name, "severed", "the same outside of it, as far as its result is used")


# --- where ------------------------------------------------------------------------------------------------------


def position(outermost: bool = False) -> Position:
    """Return the innermost line of user code above the torch call in hand, or the outermost one."""
    frame: Any = sys._getframe(1)
    while _module(frame).startswith(_WATCH):
        frame = frame.f_back
    user, library, on_request = None, None, False
    while frame is not None and not _module(frame).startswith(_WATCH):
        top = _module(frame).partition(".")[0]
        if top not in LIBRARIES:
            user = frame
            if not outermost:
                break
        elif user is None and top not in BENEATH:
            library = library or frame
            on_request |= frame.f_code is FunctionalModel.detach.__code__  # the one cut of ours that a user asks for
        frame = frame.f_back
    if library is None or (on_request and user):
        return _place(user), None, False
    return _place(user), _place(library), _module(library).startswith("metaopt.")


def _module(frame: Any) -> str:
    return frame.f_globals.get("__name__") or ""


def _place(frame: Any) -> Place | None:
    return None if frame is None else Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
