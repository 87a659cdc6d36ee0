"""`_target_` nodes: find what they name, and check their arguments against its signature before anything is built."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from metaopt.base.errors import did_you_mean

SPECIAL = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
# What the program adds when it calls a part of a stage or of the run: positional arguments, those that a function gets
# at every step (a class is built without them), and named ones.
ADDED: dict[str, tuple[int, int, tuple[str, ...]]] = {
    **dict.fromkeys(("optimizer", "schedule", "meta_optimizer", "logger"), (1, 0, ())),
    "transform": (0, 1, ()),
    **dict.fromkeys(("overrides", "initial"), (0, 2, ())),
    "generate": (0, 0, ("batches",)),
}
Problems = Iterator[tuple[str, str]]  # path, and what is wrong there, {path} standing for it
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


def problems_of_targets(node: Any, path: str = "", is_nested: bool = False) -> Problems:
    """Yield what is wrong with the `_target_` nodes of plain containers; what `${` is in is not checked."""
    if _is_target(node):
        yield from _problems_of_target(node, path, is_nested)
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from problems_of_targets(value, f"{path}.{key}" if path else str(key), is_nested or _is_target(node))


def _problems_of_target(node: Mapping[str, Any], path: str, is_nested: bool) -> Problems:
    target, here = str(node["_target_"]), f"{path}._target_"
    if target == "???":
        yield here, " is not set: give the dotted path of a class or function, such as {path}=my_module.MyClass"
        return
    try:
        called = locate(target)
    except (Exception, SystemExit) as error:  # importing a user's module can raise anything
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        yield here, f" = {target} cannot be imported (from what is installed, or the current folder): {kind}{error}"
    else:
        yield from _problems_of_arguments(called, node, path, is_nested)


def locate(path: str) -> Any:
    """Return the callable of a dotted path, importing modules on the way; raise ImportError where it ends."""
    names = path.split(".")
    if not all(name.isidentifier() for name in names):
        raise ImportError("a dotted path such as my_module.MyClass is needed")
    found: Any = importlib.import_module(names[0])
    for end, name in enumerate(names[1:], 1):
        parent = ".".join(names[:end])
        if not hasattr(found, name) and hasattr(found, "__path__") and importlib.util.find_spec(f"{parent}.{name}"):
            importlib.import_module(f"{parent}.{name}")
        if not hasattr(found, name):
            raise ImportError(f"{parent} has no {name!r}{did_you_mean(name, dir(found), others=False)}")
        found = getattr(found, name)
    if not callable(found):
        raise ImportError(f"a {type(found).__name__} cannot be called")
    return found


def _problems_of_arguments(called: Any, node: Mapping[str, Any], path: str, is_nested: bool) -> Problems:
    """Yield what does not fit the signature; to a nested partial, the one who calls it may add anything."""
    target, arguments = node["_target_"], {name: value for name, value in node.items() if name not in SPECIAL}
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have none
        return
    part = re.sub(r"^stages\.[^.]+\.", "", path)
    supplied, per_step, given = (0, 0, ()) if is_nested else ADDED.get(part, (0, 0, ()))
    added = supplied + len(node.get("_args_", ())) + (0 if inspect.isclass(called) else per_step)
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:added]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in taken}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    hints = _type_hints(called)
    for name, value in arguments.items():
        here = f"{path}.{name}"
        if value == "???":
            yield here, " is not set"
        elif name not in named and not takes_any:
            yield here, f": {target} takes no such argument{did_you_mean(name, named)}"
        elif name not in named or value != named[name].default:
            for place, errors in _misfits(value, hints.get(name, Any)).items():
                inner = ".".join(map(str, (here, *place)))
                yield inner, f" = {errors[0]['input']!r}: {target} takes {wanted(errors)}"
    if not (is_nested and node.get("_partial_")):
        for name in (n for n, p in named.items() if p.default is p.empty and n not in (*arguments, *given)):
            yield f"{path}.{name}", f" is missing: {target} needs it; add +{{path}}=..."


def _type_hints(called: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(called.__init__ if inspect.isclass(called) else called)
    except Exception:  # names that exist for the type checker only; such hints are not checked
        return {}


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))


def _misfits(value: Any, hint: Any) -> dict[tuple[Any, ...], list[ErrorDetails]]:
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


def _is_open(errors: Sequence[ErrorDetails]) -> bool:
    """Return whether only the call can tell: a node to be built, an interpolation, a class that may read a text."""
    value = errors[0]["input"]
    is_object = isinstance(value, (str, Mapping)) and all(e["type"] == "needs_python_object" for e in errors)
    return is_object or _is_target(value) or "${" in str(value)


def by_place(error: ValidationError, data: Any) -> dict[tuple[Any, ...], list[ErrorDetails]]:
    """Group errors by where they lie in the data, the innermost counting; the members of a union are no places."""
    places: dict[tuple[Any, ...], list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        place, found = [], data
        for key in detail["loc"]:
            inner: Any = dict(enumerate(found)) if isinstance(found, list) else found
            if isinstance(inner, Mapping) and (key in inner or detail["type"] == "missing"):
                place, found = [*place, key], inner.get(key)
        places.setdefault(tuple(place), []).append(detail)
    return {place: found for place, found in places.items() if not any(p[:-1] == place for p in places if p)}


def wanted(errors: Sequence[ErrorDetails]) -> str:
    """Return what one place should hold, and the name that was meant."""
    said, names = [], []
    for error in errors:
        context, known = error.get("ctx", {}), _WANTED.get(error["type"])
        said.append(known.format(**context) if known else error["msg"].removeprefix("Input should be "))
        names += re.findall(r"'(.*?)'", str(context.get("expected", "")))
    return " or ".join(dict.fromkeys(said)) + did_you_mean(str(errors[0]["input"]), names, others=False)
