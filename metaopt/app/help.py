"""What `--help` prints of the config: the files themselves, whose comments say what each option does."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

PARTS = "_parts"  # pieces of other files: no options, so they are not listed
_DEFAULTS = re.compile(r"^defaults:\n((?:  .*\n)+)", re.MULTILINE)


def register() -> None:
    """Let the help templates write `${metaopt.file:NAME,${hydra.runtime}}`, `metaopt.chosen` and `metaopt.groups`."""

    def escaped(function: Callable[..., str]) -> Callable[..., str]:
        return lambda *arguments: function(*arguments).replace("$", "$$")  # a template comes after the interpolations

    for function in (file, chosen, groups):
        OmegaConf.register_new_resolver(f"metaopt.{function.__name__}", escaped(function), replace=True)


def file(name: str, runtime: Any) -> str:
    """Return a config file as it is written, without what it says of Hydra, the shared pieces in their places."""
    paths = [folder.joinpath(f"{name}.yaml") for folder in _folders(runtime)]
    text = next((path.read_text("utf-8") for path in paths if path.is_file()), "")
    if name == "config":
        return re.sub(r"\n^hydra:\n(?:  .*\n)+|^  - override hydra/.*\n", "", text, flags=re.MULTILINE)
    defaults = _DEFAULTS.search(text)
    return text.replace(defaults[0], "") + _inlined(defaults[1], text, runtime) if defaults else text


def chosen(runtime: Any) -> str:
    """Return the file of every option that is chosen."""
    pairs = [(group.split("@")[0], option) for group, option in runtime.choices.items()]
    options = dict.fromkeys((g, o) for g, o in pairs if o not in (None, "shared") and not g.startswith("hydra/"))
    return "\n".join(f"# --- {g}={o}\n{file(f'{g}/{o}', runtime)}" for g, o in reversed(options))


def groups(runtime: Any) -> str:
    """Return the options of each group, the user's own included."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in _folders(runtime) for path in folder.iterdir() if path.is_dir()):
        names = {inner.name.removesuffix(".yaml") for inner in path.iterdir() if inner.name.endswith(".yaml")}
        if names and not path.name.startswith(("_", ".")):
            found.setdefault(path.name, set()).update(names)
    lines = (f"{group}: {', '.join(sorted(found[group]))}" for group in sorted(found))
    return "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in lines)


def _inlined(defaults: str, own: str, runtime: Any) -> str:
    """Return the options that a file takes from shared pieces and does not set itself."""
    text = ""
    for piece in re.findall(rf"^  - /({PARTS}/.*)@(.*)$", defaults, re.MULTILINE):
        lines = [line for line in file(piece[0], runtime).splitlines(keepends=True) if not line.startswith("#")]
        kept = "".join(line for line in lines if not re.search(rf"^{line.split(':')[0]}:", own, re.MULTILINE))
        text += kept if piece[1] == "_here_" else f"{piece[1]}:\n{textwrap.indent(kept, '  ')}"
    return text


def _folders(runtime: Any) -> list[Any]:
    schemas = {"file": Path, "pkg": resources.files}
    found = [(source.schema, source.path) for source in runtime.config_sources if source.provider != "hydra"]
    return [schemas[schema](path) for schema, path in found if schema in schemas]
