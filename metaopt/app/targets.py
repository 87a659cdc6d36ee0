"""`_target_` nodes: find what they name, and check their arguments against its signature before anything is built."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from metaopt.base.errors import did_you_mean

SPECIAL = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
Place = tuple[int | str, ...]
Problems = Iterator[tuple[Place, str]]
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
    node: Any, supplied: int = 0, per_step: int = 0, given: Collection[str] = (), complete: bool = True
) -> Problems:
    """Yield what is wrong with a `_target_` node and those nested in it: where, and what, {path} being the whole path.

    Args:
        node: a plain container; strings with `${` are not resolved yet and are not checked.
        supplied: how many positional arguments the program adds when it calls the target.
        per_step: how many more a function gets at every step; a class is built without them.
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
        yield from _problems_of_nested(node)
        added = supplied if inspect.isclass(called) else supplied + per_step
        yield from _problems_of_arguments(called, node, added, given if complete else None)


def locate(path: str) -> Any:
    """Return what a dotted path names, importing modules on the way; raise ImportError where it ends."""
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
    return found


def _problems_of_nested(node: Any) -> Problems:
    """Yield what is wrong with the `_target_` nodes below a node."""
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        found: Problems = iter(())
        if _is_target(value):
            found = problems_of_target(value, complete=not value.get("_partial_", False))
        elif isinstance(value, (Mapping, list)):
            found = _problems_of_nested(value)
        yield from (((key, *place), text) for place, text in found)


def _problems_of_arguments(called: Any, node: Mapping[str, Any], added: int, given: Collection[str] | None) -> Problems:
    """Yield what does not fit the signature; `given` None: what is missing may be added by the caller."""
    target, arguments = node["_target_"], {name: value for name, value in node.items() if name not in SPECIAL}
    yield from (((name,), " is not set") for name, value in arguments.items() if value == "???")
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have none
        return
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken = positional[: added + len(node.get("_args_", ()))]
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
        if parameter.default is parameter.empty and name not in arguments and given is not None and name not in given:
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
        context, known = error.get("ctx", {}), _WANTED.get(error["type"])
        said.append(known.format(**context) if known else error["msg"].removeprefix("Input should be "))
        names += re.findall(r"'(.*?)'", str(context.get("expected", "")))
    return " or ".join(dict.fromkeys(said)) + did_you_mean(str(errors[0]["input"]), names, others=False)
