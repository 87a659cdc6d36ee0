"""`_target_` nodes: find what they name, and check their arguments against its signature before anything is built."""

from __future__ import annotations

import collections.abc
import difflib
import importlib
import importlib.util
import inspect
import os
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from metaopt.errors import did_you_mean

SPECIAL = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
_SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def problems_of_target(
    where: str, node: Any, supplied: int = 0, given: Collection[str] = (), complete: bool = True
) -> Iterator[str]:
    """Yield what is wrong with a `_target_` node and those nested in it.

    Args:
        where: its path in the config, for the messages.
        node: a plain container; strings with `${` are not resolved yet and are not checked.
        supplied: how many positional arguments the program adds when it calls the target.
        given: names of arguments that the program adds.
        complete: False where what calls the target is not known, so that it may add any argument.
    """
    if not isinstance(node, Mapping):
        yield f"{where} = {node!r}: a mapping with a _target_ is needed"
        return
    target = node.get("_target_")
    if not isinstance(target, str) or target == "???":
        yield (
            f"{where}._target_ is not set: give the dotted path of a class or function, "
            f"such as {where}._target_=my_module.MyClass"
        )
        return
    try:
        called = locate(target)
    except Exception as error:  # importing a user's module can raise anything
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        searched = f"searched: what is installed, and {os.getcwd()}"
        yield f"{where}._target_ = {target} cannot be imported: {kind}{error} ({searched})"
        return
    if not callable(called):
        yield f"{where}._target_ = {target}: a {type(called).__name__} cannot be called"
        return
    if inspect.isabstract(called):
        undefined = ", ".join(sorted(getattr(called, "__abstractmethods__", ())))
        yield f"{where}._target_ = {target}: the class does not define {undefined}"
        return
    yield from _problems_of_arguments(where, target, called, node, supplied, given, complete)


def locate(path: str) -> Any:
    """Return what a dotted path names, importing modules on the way; raise ImportError where it ends."""
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ImportError("a dotted path such as my_module.MyClass is needed")
    found: Any = importlib.import_module(parts[0])
    for end, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            parent, name = ".".join(parts[: end - 1]), ".".join(parts[:end])
            if isinstance(found, types.ModuleType) and importlib.util.find_spec(name) is not None:
                found = importlib.import_module(name)
                continue
            raise ImportError(f"{parent} has no {part!r}{_close(part, dir(found))}") from None
    return found


def names_class(path: Any) -> bool:
    """Return whether a dotted path names a class; False for one that names nothing."""
    try:
        return inspect.isclass(locate(path))
    except Exception:  # said by `problems_of_target`
        return False


def _close(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _problems_of_arguments(
    where: str,
    target: str,
    called: Any,
    node: Mapping[str, Any],
    supplied: int,
    given: Collection[str],
    complete: bool,
) -> Iterator[str]:
    arguments = {name: value for name, value in node.items() if name not in SPECIAL}
    for name, value in arguments.items():
        if value == "???":
            yield f"{where}.{name} is not set"
        elif isinstance(value, Mapping) and "_target_" in value:
            yield from problems_of_target(f"{where}.{name}", value, complete=not value.get("_partial_", False))
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # some built-in callables have none
        return
    named, takes_any = _named_parameters(signature, supplied + len(node.get("_args_", ())))
    hints = _type_hints(called)
    for name, value in arguments.items():
        if name not in named and not takes_any:
            yield f"{where}.{name}: {target} takes no such argument{did_you_mean(name, named)}"
        elif value not in ("???", named[name].default if name in named else None) and not fits(
            value, hints.get(name, Any)
        ):
            yield f"{where}.{name} = {value!r}: {target} takes {describe(hints[name])}"
    for name, parameter in named.items():
        missing = parameter.default is inspect.Parameter.empty and name not in arguments and name not in given
        if missing and complete:
            yield f"{where}.{name} is missing: {target} needs it; add +{where}.{name}=..."


def _named_parameters(signature: inspect.Signature, supplied: int) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters that a name in the config can set, and whether any name goes."""
    kinds = inspect.Parameter
    positional = [
        p for p in signature.parameters.values() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    taken = {p.name for p in positional[:supplied]}
    named = {
        name: p
        for name, p in signature.parameters.items()
        if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY) and name not in taken
    }
    return named, any(p.kind is kinds.VAR_KEYWORD for p in signature.parameters.values())


def _type_hints(called: Any) -> dict[str, Any]:
    function = called.__init__ if inspect.isclass(called) else called
    try:
        return typing.get_type_hints(function)
    except Exception:  # names that exist for the type checker only; such hints are not checked
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Return whether a config value can be what the type hint says; hints that a config cannot express pass."""
    if hint is Any or (isinstance(value, str) and "${" in value):
        return True
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is typing.Annotated:
        return fits(value, typing.get_args(hint)[0])
    return _fits_plain(value, hint, origin or hint)


def _fits_plain(value: Any, hint: Any, kind: Any) -> bool:
    if kind in (None, type(None)):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind in _SEQUENCES:
        inner = [option for option in typing.get_args(hint) if option is not Ellipsis]
        return isinstance(value, (list, tuple)) and all(any(fits(v, i) for i in inner or [Any]) for v in value)
    if kind in _MAPPINGS:
        return isinstance(value, Mapping)
    if not inspect.isclass(kind):  # a type variable, say
        return True
    if kind.__module__.split(".")[0] == "torch":  # a tensor or a module, which a config cannot write down
        return False
    return isinstance(value, (str, Mapping))  # a path, an enum, a typed dictionary


def describe(hint: Any) -> str:
    """Return a type hint as a user would write it."""
    if hint in (None, type(None)):
        return "null"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) in _SEQUENCES:
        return "a list of " + " or ".join(describe(option) for option in typing.get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint) or (hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint))
