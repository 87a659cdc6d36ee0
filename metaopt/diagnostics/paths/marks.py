"""A watch over torch's functions: which values no longer carry the gradient of what they were computed from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from metaopt.diagnostics.paths.cuts import (
    NOWHERE,
    NUMBERS,
    Cut,
    Part,
    Position,
    Source,
    known,
    operation,
    position,
    without_grad,
)

T = TypeVar("T")
_OF_THE_FIRST = {"to", "type", "type_as", "expand_as", "view_as", "reshape_as"}  # the others only lend shape or dtype
_WRITES = {f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod")}
_EACH_ITS_OWN = {"broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d"}
_SAME = 1e-6  # relative distance up to which two runs count as the same


class Mark(NamedTuple):
    """What a tensor has lost on its way.

    `cuts` lie behind its value; `unconnected` if it had no graph when it was marked; `would_carry` is what it would
    carry if it were not written without a graph, at `written`.
    """

    cuts: frozenset[Cut] = frozenset()
    unconnected: bool = False
    would_carry: frozenset[Source] = frozenset()
    written: Position | None = None


_NONE = Mark()


class Read:
    """What the inputs of a function carry; made before the function runs, which may write to them."""

    def __init__(self, watch: Watch, inputs: list[Tensor]) -> None:
        self.inputs, self.marks = inputs, [watch.mark(t) for t in inputs]
        self._heads = {id(t): t.grad_fn for t in inputs if t.requires_grad}
        self.matters = bool(self._heads) or any(mark is not _NONE for mark in self.marks)
        self.cuts = _union(mark.cuts for mark in self.marks)
        self._watch = watch

    @functools.cached_property
    def carried(self) -> frozenset[Source]:
        """The sources whose gradient the inputs carry: a walk through the graph, so only where something is cut."""
        leaves, seen, stack = set(self._heads), set(), [*self._heads.values()]
        while stack:
            node: Any = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                leaves.add(id(getattr(node, "variable", None)))
                stack += [parent for parent, _ in node.next_functions]
        reached = frozenset(source for leaf, (source, _) in self._watch.sources.items() if leaf in leaves)
        return reached.union(*(mark.would_carry for mark in self.marks))

    @property
    def carried_if_mended(self) -> frozenset[Source]:
        """The same, but for `.detach()` before it: of `.detach().argmax()` it would not do to mend one."""
        mendable = all(cut.operation.kind == "severed" for cut in self.cuts)
        return self.carried or (_union(cut.of for cut in self.cuts) if mendable else frozenset())


class Watch(TorchFunctionMode):
    """Mark the tensors that torch's functions return in what it runs.

    `sources` are the leaves that are watched. `touched` has those that were read, `numbers` the cuts whose values left
    torch as numbers, both by the last part that was run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, tuple[Source, Tensor]] = {}
        self.numbers: set[Cut] = set()
        self.touched: set[Source] = set()
        self._marks: Any = WeakIdKeyDictionary()
        self._aliases: Any = WeakIdKeyDictionary()  # what .data and .detach() return → of what
        self._part = Part("")
        self._stopped_at: Position | None = None
        self._shaken: tuple[Any, ...] | None = None
        self._was_shaken = False

    def add_source(self, source: Source, leaves: Iterable[Tensor]) -> None:
        """Watch what is computed from these leaves."""
        self.sources |= {id(leaf): (source, leaf) for leaf in leaves}

    def run(self, part: Part, function: Callable[[], T], more: bool = False) -> T:
        """Return what a function returns that is this part of the chain; `more` goes on with `touched` and `numbers`.

        A part that writes has no graph by design, which `close` tells once it is done.
        """
        self._part, self._stopped_at = part, None
        if not more:
            self.numbers, self.touched = set(), set()
        with self:
            return function()

    def matters(self, cut: Cut, evaluate: Callable[[], list[Any]], values: list[Any]) -> bool:
        """Return whether a part that gave `values` gives others if the cut lets another value through.

        It does not with one that is only logged.
        """
        numbers, touched, self._shaken, self._was_shaken = self.numbers, self.touched, cut.key, False
        try:
            again = evaluate()
            if not self._was_shaken:
                return cut not in self.numbers
        except Exception:
            return True
        finally:
            self._shaken, self.numbers, self.touched = None, numbers, touched
        return len(values) != len(again) or not all(map(_alike, values, again))

    def mark(self, tensor: Tensor) -> Mark:
        """Return what a tensor has lost."""
        mark = self._marks.get(tensor, _NONE)
        # Inside an autograd.Function nothing has a graph, but what it returns gets one.
        return _NONE if mark.unconnected and tensor.grad_fn is not None else mark

    def read(self, value: Any) -> Read:
        """Return what a value carries, nested ones included."""
        return Read(self, tensors_in(value))

    def close(self, written: Any) -> None:
        """Count as cut what a part without a graph has written."""
        for tensor in tensors_in(written):
            mark = self.mark(tensor)
            if of := self.read(tensor).carried:
                cut = Cut(without_grad(), self._part, of, *(mark.written or NOWHERE))
                self._marks[tensor] = Mark(mark.cuts | {cut}, True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name == "_set_grad_enabled":
            if args[0] or torch.is_grad_enabled():
                self._stopped_at = None if args[0] else position()
            return func(*args, **kwargs)
        read = Read(self, _read_by(name, args, kwargs))
        output = func(*args, **kwargs)
        if name in ("data", "detach") and isinstance(output, Tensor):
            self._aliases[output] = args[0]
        if name in NUMBERS or tensors_in(output):
            self.touched |= {self.sources[id(t)][0] for t in read.inputs if id(t) in self.sources}
        if not read.matters:
            return output
        if name in NUMBERS:
            return self._number(name, output, read)
        changed = args[0] if name == "__setitem__" else () if name in _EACH_ITS_OWN else output
        for tensor in tensors_in(changed):
            new = self._mark_output(name, tensor, read)
            if is_in_place(name):
                self._mark_aliases(tensor)
            if new is not None and new.key == self._shaken and tensor is changed:
                moved = self._shake(tensor)
                if not is_in_place(name):
                    return moved
                if id(tensor) not in self.sources:
                    tensor.data.copy_(moved)
        return output

    def _number(self, name: str, output: Any, read: Read) -> Any:
        """Note a value that leaves torch."""
        if not read.carried_if_mended:
            self.numbers |= read.cuts
            return output
        cut = Cut(operation(name, output), self._part, read.carried_if_mended, *position())
        self.numbers.add(cut)
        return self._shake(output) if cut.key == self._shaken else output

    def _mark_output(self, name: str, output: Tensor, read: Read) -> Cut | None:
        """Mark what a function returned, and return the cut if it is one."""
        connected = output.requires_grad and (output.grad_fn is not None or any(output is t for t in read.inputs))
        connected = connected and (torch.is_grad_enabled() or not is_in_place(name))
        by_itself, new = known(name), None
        if not connected or (by_itself and by_itself.kind == "stepwise"):
            real = output.is_floating_point() or output.is_complex()
            if read.carried and self._part.writes and real and not by_itself:
                here = position(outermost=True)
                earlier = [] if here[0] else [mark.written for mark in read.marks if mark.written]
                self._marks[output] = Mark(read.cuts, True, read.carried, [*earlier, here][0])
                return None
            what = operation(name, output)
            of = read.carried_if_mended if what.kind == "stepwise" else read.carried
            if of and (torch.is_grad_enabled() or by_itself or not real or self._part.writes):
                new = Cut(what, self._part, of, *position())
            elif of:
                new = Cut(without_grad(), self._part, of, *(self._stopped_at or position(outermost=True)))
        if cuts := read.cuts | {new} if new else read.cuts:
            self._marks[output] = Mark(cuts, not output.requires_grad)
        elif output in self._marks:
            del self._marks[output]
        return new

    def _mark_aliases(self, tensor: Tensor) -> None:
        """Mark whatever else has the memory that was written; through `.data` no graph comes along."""
        source, cuts = self._aliases.get(tensor), self.mark(tensor).cuts
        if source is not None and (of := self.read(tensor).carried):
            cuts |= {Cut(operation("data", tensor), self._part, of, *position())}
        for other in (tensor._base, source):
            if other is not None and cuts:
                self._marks[other] = Mark(self.mark(other).cuts | cuts, not other.requires_grad)

    def _shake(self, value: Any) -> Any:
        given = value if isinstance(value, Tensor) else torch.as_tensor(value)
        moved = _shaken(given)
        self._was_shaken |= not torch.equal(moved, given)
        if given is value:
            self._marks[moved] = self._marks[value]
            return moved
        return moved.numpy() if isinstance(value, np.ndarray) else moved.tolist()


def _shaken(value: Tensor) -> Tensor:
    """Return other values of the same kind: moved, or in another order where only some values are allowed."""
    if value.is_floating_point() or value.is_complex():
        return (value if value.requires_grad else value.detach()) * 1.1 + 0.1
    if value.dtype == torch.bool:
        return ~value
    moved = value.flatten().roll(1).reshape(value.shape)
    return torch.where(value > 0, value - 1, value + 1) if torch.equal(moved, value) else moved


def _alike(a: Any, b: Any) -> bool:
    """Return whether two values are the same but for rounding."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a == b)
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    gap, size = (a.detach() - b.detach()).abs(), a.detach().abs()
    return a.numel() == 0 or bool(gap.max() <= _SAME * size.max())


def _union(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
    return frozenset().union(*sets)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of nested sequences and mappings."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [t for part in parts for t in tensors_in(part)]


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if name == "__get__" else name


def _read_by(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors whose values a function reads."""
    if name.endswith("_like") or (name.startswith("new_") and name != "new_tensor"):
        return []
    return tensors_in(args[:1]) if name in _OF_THE_FIRST else tensors_in((args, kwargs))


def is_in_place(name: str) -> bool:
    """Return whether a torch function of this name writes to its first input."""
    return name in _WRITES or (name.endswith("_") and not name.startswith("__") and name != "requires_grad_")
