"""A watch over torch's functions: which values no longer carry the gradient of what they were computed from."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from metaopt.diagnostics.cuts import (
    NUMBERS,
    Cut,
    Operation,
    Position,
    Source,
    is_flat,
    is_hard,
    operation,
    position,
    without_grad,
)
from metaopt.diagnostics.shaking import shaken

_OF_THE_FIRST = {"to", "type", "type_as", "expand_as", "view_as", "reshape_as"}  # the others only lend shape or dtype
_WRITES = {f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod")}
_EACH_ITS_OWN = {"broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d"}


@dataclass(frozen=True)
class Mark:
    """What a tensor has lost on its way.

    `cuts` lie behind its value; `unconnected` if it had no graph when it was marked; `would_carry` is what it would
    carry if it were not written without a graph, at `written`.
    """

    cuts: frozenset[Cut] = frozenset()
    unconnected: bool = False
    would_carry: frozenset[Source] = frozenset()
    written: Position | None = None


_NONE = Mark()


class _Read:
    """What a function reads: the cuts behind its inputs, and the sources whose gradient they carry.

    It is made before the function runs, which may write to its inputs.
    """

    def __init__(self, watch: Watch, inputs: list[Tensor]) -> None:
        self.inputs, self.marks = inputs, [watch._mark(t) for t in inputs]
        self.live = [(t, t.grad_fn) for t in inputs if t.requires_grad]
        self.matters = bool(self.live) or any(mark is not _NONE for mark in self.marks)
        self._watch = watch

    @functools.cached_property
    def cuts(self) -> frozenset[Cut]:
        return _union(mark.cuts for mark in self.marks)

    @functools.cached_property
    def carried(self) -> frozenset[Source]:
        """Found by a walk through the graph, so only where something is cut."""
        return _union([*(m.would_carry for m in self.marks), *(self._watch.leads_to(*pair) for pair in self.live)])


class Watch(TorchFunctionMode):
    """Mark the tensors that torch's functions return while it is active.

    `touched` are the sources that were read, `numbers` the cuts whose values left torch as numbers, both since `over`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, tuple[Source, Tensor]] = {}
        self._marks: Any = WeakIdKeyDictionary()
        self._aliases: Any = WeakIdKeyDictionary()  # what .data and .detach() return → of what
        self._part, self._stage, self._without_graph = "", None, False
        self._stopped_at: Position | None = None
        self.numbers: set[Cut] = set()
        self.touched: set[Source] = set()
        self._shaken: tuple[Any, ...] | None = None
        self.was_shaken = False

    def add_source(self, source: Source, leaves: Mapping[str, Tensor]) -> None:
        """Watch what is computed from these leaves."""
        self._sources |= {id(leaf): (source, leaf) for leaf in leaves.values()}

    @contextmanager
    def over(
        self, part: str, stage: str | None = None, without_graph: bool = False, more: bool = False
    ) -> Iterator[None]:
        """Watch inside the block, which is this part of that stage.

        Args:
            part: in words.
            stage: None for the meta-objective.
            without_graph: the part has no graph by design, which `close` tells once it is done.
            more: go on with `touched` and `numbers`.
        """
        self._part, self._stage, self._without_graph = part, stage, without_graph
        self._stopped_at = None
        if not more:
            self.numbers, self.touched = set(), set()
        with self:
            yield

    @contextmanager
    def shaking(self, cut: Cut) -> Iterator[None]:
        """Change the value that leaves this cut, to see whether anything comes of it."""
        numbers, touched, self._shaken, self.was_shaken = self.numbers, self.touched, cut.key, False
        try:
            yield
        finally:
            self._shaken, self.numbers, self.touched = None, numbers, touched

    def sources_of(self, tensor: Any) -> frozenset[Source]:
        """Return what the graph of a tensor leads to."""
        live = isinstance(tensor, Tensor) and tensor.requires_grad
        return self.leads_to(tensor, tensor.grad_fn) if live else frozenset()

    def leads_to(self, tensor: Tensor, node: Any) -> frozenset[Source]:
        """Return the sources that a node of the graph leads to; a leaf is its own."""
        if node is None:
            return frozenset({self._sources[id(tensor)][0]} if id(tensor) in self._sources else ())
        seen, stack, found = set(), [node], set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in self._sources:
                found.add(self._sources[id(leaf)][0])
            stack += [parent for parent, _ in node.next_functions]
        return frozenset(found)

    def cuts_behind(self, value: Any) -> frozenset[Cut]:
        """Return the cuts behind a value, nested ones included."""
        return _union(self._mark(t).cuts for t in tensors_in(value))

    def close(self, written: Any) -> None:
        """Count as cut what a part without a graph has written."""
        for tensor in tensors_in(written):
            mark = self._mark(tensor)
            of = mark.would_carry | self.sources_of(tensor)
            if of:
                cut = self._cut(without_grad(), of, mark.written or Position(None, None, False))
                self._marks[tensor] = Mark(mark.cuts | {cut}, True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name == "_set_grad_enabled":
            if torch.is_grad_enabled() and not args[0]:
                self._stopped_at = position()
            elif args[0]:
                self._stopped_at = None
            return func(*args, **kwargs)
        read = _Read(self, _read_by(name, args, kwargs))
        output = func(*args, **kwargs)
        if name in ("data", "detach") and isinstance(output, Tensor):
            self._aliases[output] = args[0]
        if name in NUMBERS or tensors_in(output):
            self.touched |= {self._sources[id(t)][0] for t in read.inputs if id(t) in self._sources}
        if not read.matters:
            return output
        if name in NUMBERS:
            return self._number(name, output, read)
        changed = args[0] if name == "__setitem__" else () if name in _EACH_ITS_OWN else output
        for tensor in tensors_in(changed):
            new = self._mark_output(name, tensor, read)
            if _is_in_place(name):
                self._mark_aliases(tensor)
            if new is not None and new.key == self._shaken and tensor is changed:
                moved = self._shake(tensor)
                if not _is_in_place(name):
                    return moved
                if id(tensor) not in self._sources:
                    tensor.data.copy_(moved)
        return output

    def _mark_aliases(self, tensor: Tensor) -> None:
        """Mark whatever else has the memory that was written; through `.data` no graph comes along."""
        source = self._aliases.get(tensor)
        cuts = self._mark(tensor).cuts
        if source is not None and (of := self.sources_of(tensor)):
            cuts |= {self._cut(operation("data", tensor), of, position())}
        for other in (tensor._base, source):
            if other is not None and cuts:
                self._marks[other] = Mark(self._mark(other).cuts | cuts, not other.requires_grad)

    def _mark(self, tensor: Tensor) -> Mark:
        mark = self._marks.get(tensor, _NONE)
        # Inside an autograd.Function nothing has a graph, but what it returns gets one.
        return _NONE if mark.unconnected and tensor.grad_fn is not None else mark

    def _mark_output(self, name: str, output: Tensor, read: _Read) -> Cut | None:
        """Mark what a function returned, and return the cut if it is one."""
        connected = output.requires_grad and (output.grad_fn is not None or any(output is t for t in read.inputs))
        connected = connected and (torch.is_grad_enabled() or not _is_in_place(name))
        cuts, new = read.cuts, None
        if not connected or is_flat(name):
            if read.carried and self._without_graph and _is_real(output) and not is_hard(name):
                here = position(outermost=True)
                at = here if here.place else next((m.written for m in read.marks if m.written), here)
                self._marks[output] = Mark(cuts, True, read.carried, at)
                return None
            what, at = self._what_cuts(name, output)
            of = read.carried
            if not of and what.kind == "stepwise" and all(cut.operation.kind == "severed" for cut in cuts):
                of = _union(cut.of for cut in cuts)  # `.detach().argmax()`: to mend one of them would not do
            new = self._cut(what, of, at) if of else None
        cuts = cuts | {new} if new else cuts
        if cuts:
            self._marks[output] = Mark(cuts, not output.requires_grad)
        elif output in self._marks:
            del self._marks[output]
        return new

    def _shake(self, value: Any) -> Any:
        moved = shaken(value)
        if isinstance(value, Tensor):
            self._marks[moved] = self._marks[value]
            self.was_shaken |= not torch.equal(moved, value)
        else:
            self.was_shaken |= not np.array_equal(moved, value)
        return moved

    def _what_cuts(self, name: str, output: Tensor) -> tuple[Operation, Position]:
        if torch.is_grad_enabled() or is_hard(name) or not _is_real(output) or self._without_graph:
            return operation(name, output), position()
        return without_grad(), self._stopped_at or position(outermost=True)

    def _number(self, name: str, output: Any, read: _Read) -> Any:
        of = read.carried
        if not of and all(cut.operation.kind == "severed" for cut in read.cuts):
            of = _union(cut.of for cut in read.cuts)
        if not of:
            self.numbers |= read.cuts
            return output
        cut = self._cut(operation(name, output), of, position())
        self.numbers.add(cut)
        return self._shake(output) if cut.key == self._shaken else output

    def _cut(self, what: Operation, of: frozenset[Source], at: Position) -> Cut:
        return Cut(what, at.place, self._part, self._stage, of, at.inside, at.intended)


def _union(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
    return frozenset().union(*sets)


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of nested sequences and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for part in value.values() for t in tensors_in(part)]
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in tensors_in(part)]
    return []


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if name == "__get__" else name


def _read_by(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors whose values a function reads."""
    if name.endswith("_like") or (name.startswith("new_") and name != "new_tensor"):
        return []
    return tensors_in(args[:1]) if name in _OF_THE_FIRST else tensors_in((args, kwargs))


def _is_in_place(name: str) -> bool:
    return name in _WRITES or (name.endswith("_") and not name.startswith("__") and name != "requires_grad_")
