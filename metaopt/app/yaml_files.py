"""YAML whose aliases stand for more than a machine can hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import yaml

from metaopt.base.errors import ConfigError

MOST = 1_000_000  # values of a file when each alias is written out
_OPTIONS = ("--config-dir", "-cd", "--config-path", "-cp")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def refuse_bombs(arguments: Sequence[str]) -> None:
    """Raise for a file of the user's config folder that OmegaConf would never be done with."""
    named = [value for option, value in itertools.pairwise(arguments) if option in _OPTIONS]
    named += [text.partition("=")[2] for text in arguments if text.startswith(tuple(f"{o}=" for o in _OPTIONS))]
    for path in (path for folder in named for path in Path(folder).rglob("*.yaml") if path.is_file()):
        try:
            text = path.read_text(encoding="utf-8")
            refuse_bomb(text, path)
        except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError):
            continue  # Hydra says so, if it reads it


def refuse_bomb(text: str, path: Path) -> None:
    """Raise for YAML that has more than a million values when each alias is written out."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 1  # while it is counted: it may be part of itself
            value = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = (part for pair in value for part in (pair if isinstance(pair, tuple) else (pair,)))
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=_LOADER) if "*" in text and "&" in text else None
    if root is not None and size(root) > MOST:
        raise ConfigError(f"{path}: its aliases stand for {size(root)} values, and {MOST} are too many")
