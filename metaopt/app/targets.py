"""`_target_` nodes: find what they name, and check their arguments against its signature before anything is built."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from metaopt.base.errors import did_you_mean

SPECIAL = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
Place = tuple[int | str, ...]
SAID = "said"  # the type of an error whose text and place are ours
_WANTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "needs_python_object": "an object (a mapping with a _target_)",
    "none_required": "null",
    "string_type": "a text",
    "tuple_type": "a list",
}


def problems_of_target(
    node: Any, supplied: int = 0, given: Collection[str] = (), complete: bool = True
) -> Iterator[tuple[Place, str]]:
    """Yield what is wrong with a `_target_` node and those nested in it: where, and what, {path} being the whole path.

    Args:
        node: a plain container; strings with `${` are not resolved yet and are not checked.
        supplied: how many positional arguments the program adds when it calls the target.
        given: names of arguments that the program adds.
        complete: False where what calls the target is not known, so that it may add any argument.
    """
    if not isinstance(node, Mapping):
        yield (), f" = {node!r}: a mapping with a _target_ is needed"
        return
    target, here = node.get("_target_"), ("_target_",)
    if not isinstance(target, str) or target == "???":
        yield here, " is not set: give the dotted path of a class or function, such as {path}=my_module.MyClass"
        return
    try:
        called = locate(target)
    except Exception as error:  # importing a user's module can raise anything
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        searched = f"searched: what is installed, and {os.getcwd()}"
        yield here, f" = {target} cannot be imported: {kind}{error} ({searched})"
        return
    if not callable(called):
        yield here, f" = {target}: a {type(called).__name__} cannot be called"
    elif inspect.isabstract(called):
        undefined = ", ".join(sorted(getattr(called, "__abstractmethods__", ())))
        yield here, f" = {target}: the class does not define {undefined}"
    else:
        yield from _problems_of_arguments(target, called, node, supplied, given, complete)


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
            name = ".".join(parts[:end])
            if not isinstance(found, types.ModuleType) or importlib.util.find_spec(name) is None:
                parent = ".".join(parts[: end - 1])
                raise ImportError(f"{parent} has no {part!r}{did_you_mean(part, dir(found), others=False)}") from None
            found = importlib.import_module(name)
    return found


def names_class(path: Any) -> bool:
    """Return whether a dotted path names a class; False for one that names nothing."""
    try:
        return inspect.isclass(locate(path))
    except Exception:  # said by `problems_of_target`
        return False


def _problems_of_arguments(
    target: str, called: Any, node: Mapping[str, Any], supplied: int, given: Collection[str], complete: bool
) -> Iterator[tuple[Place, str]]:
    arguments = {name: value for name, value in node.items() if name not in SPECIAL}
    for name, value in arguments.items():
        if value == "???":
            yield (name,), " is not set"
        for place, inner in _targets_in(value, (name,)):
            for below, text in problems_of_target(inner, complete=not inner.get("_partial_", False)):
                yield (*place, *below), text
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have none
        return
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken = positional[: supplied + len(node.get("_args_", ()))]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in taken}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    hints = _type_hints(called)
    for name, value in arguments.items():
        if name not in named and not takes_any:
            yield (name,), f": {target} takes no such argument{did_you_mean(name, named)}"
        elif value not in ("???", named[name].default if name in named else None):
            for place, errors in _misfits(value, hints.get(name, Any)).items():
                yield (name, *place), f" = {errors[0]['input']!r}: {target} takes {wanted(errors)}"
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in arguments and name not in given and complete:
            yield (name,), f" is missing: {target} needs it; add +{{path}}=..."


def _type_hints(called: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(called.__init__ if inspect.isclass(called) else called)
    except Exception:  # names that exist for the type checker only; such hints are not checked
        return {}


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))


def _misfits(value: Any, hint: Any) -> dict[Place, list[ErrorDetails]]:
    """Return where a value is not what a type hint says, as JSON: a config can express no more."""
    try:
        _adapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        found = by_place(error, value)
        return {} if any(_is_open(details) for details in found.values()) else found
    except Exception:  # a hint that pydantic has no schema for, a value that JSON has no word for
        return {}
    return {}


def _is_target(node: Any) -> bool:
    return isinstance(node, Mapping) and "_target_" in node


def _targets_in(node: Any, place: Place) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    if _is_target(node):
        yield place, node
    elif isinstance(node, (Mapping, list)):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _targets_in(value, (*place, key))


def _is_open(errors: Sequence[ErrorDetails]) -> bool:
    """Return whether only the call can tell: a node to be built, an interpolation, a class that may read a text."""
    value = errors[0]["input"]
    is_object = isinstance(value, (str, Mapping)) and all(e["type"] == "needs_python_object" for e in errors)
    return is_object or _is_target(value) or "${" in str(value)


def by_place(error: ValidationError, data: Any) -> dict[Place, list[ErrorDetails]]:
    """Group errors by where they lie in the data, the innermost counting; the members of a union are no places."""
    places: dict[Place, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        place, found = detail["loc"], data  # ours, and what is missing, need not be in the data
        if detail["type"] not in ("missing", SAID):
            place = ()
            for key in detail["loc"]:
                inner: Any = dict(enumerate(found)) if isinstance(found, list) else found
                if isinstance(inner, Mapping) and key in inner:
                    place, found = (*place, key), inner[key]
        places.setdefault(place, []).append(detail)
    return {place: found for place, found in places.items() if not any(p[:-1] == place for p in places if p)}


def wanted(errors: Sequence[ErrorDetails]) -> str:
    """Return what one place should hold, and the name that was meant."""
    said, names = [], []
    for error in errors:
        context = error.get("ctx", {})
        known = _WANTED.get(error["type"])
        said.append(known.format(**context) if known else error["msg"].removeprefix("Input should be "))
        names += re.findall(r"'(.*?)'", str(context.get("expected", "")))
    return " or ".join(dict.fromkeys(said)) + did_you_mean(str(errors[0]["input"]), names, others=False)
