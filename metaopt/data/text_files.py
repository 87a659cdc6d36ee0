"""The user's own files, or a hub data set, read into columns of text by Hugging Face `datasets`."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaopt.base.errors import ConfigError, did_you_mean, first_line
from metaopt.data.bundle import STREAMS

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
LABELLED = ("train", "validation", "selection", "test")
ROLES = {"input": STREAMS, "target": LABELLED, "source": ("train",)}  # what is read of which streams

Where = str | Sequence[str]  # a file, several files, or a split of a hub data set
Texts = dict[str, dict[str, list[str]]]  # stream → role → one text per example


def read_texts(
    wheres: Mapping[str, Where | None],
    columns: Mapping[str, str | None],
    hub: Mapping[str, Any],
    allow_overlap: bool = False,
) -> Texts:
    """Return each stream's columns as text, none of their values missing.

    Args:
        columns: what a column is for, as in `ROLES` → its name in the data.
        hub: what `datasets.load_dataset` takes: `path` and `name` of a hub data set (None for files), `cache_dir`.

    Raises:
        ConfigError: no such file, split, column or row, a row without a value, or streams that share examples.
    """
    given = {stream: where for stream, where in wheres.items() if where}
    for stream in LABELLED:
        if stream not in given:
            raise ConfigError(
                f"text: there is no {stream} stream: give {stream}=... (a file, or a split of a hub data set)"
            )
    places = {s: {str(w)} if hub["path"] else {str(p.resolve()) for p in _paths(w)} for s, w in given.items()}
    _refuse_shared(places, "file or split", "split it")
    texts: Texts = {}
    for stream, where in given.items():
        place = f"text: {stream} = {where}" + (f" of {hub['path']!r}" if hub["path"] else "")
        rows = _load(place, where, hub)
        if not len(rows):
            raise ConfigError(f"{place} has no example")
        read = {role: column for role, column in columns.items() if column is not None and stream in ROLES[role]}
        texts[stream] = {role: _column(place, rows, role, column) for role, column in read.items()}
    if not allow_overlap:
        mend = "remove them from one, or accept it with allow_overlap=True (in a config: data.allow_overlap=true)"
        _refuse_shared({stream: set(texts[stream]["input"]) for stream in LABELLED}, "of the inputs", mend)
    return texts


def _refuse_shared(streams: Mapping[str, set[str]], what: str, mend: str) -> None:
    """Raise if two streams have something in common; the unlabelled inputs may be those of training."""
    for (one, here), (other, there) in itertools.combinations(streams.items(), 2):
        shared = here & there
        if shared and {one, other} != {"train", "unlabelled"}:
            raise ConfigError(
                f"text: {one} and {other} share {len(shared)} {what} (such as {min(shared)[:200]!r}): what trains the "
                f"models, what trains A, what selects and what tests must be different examples; {mend}"
            )


def _column(place: str, rows: Any, role: str, column: str) -> list[str]:
    if column not in rows.column_names:
        raise ConfigError(
            f"{place} has no column {column!r}{did_you_mean(column, rows.column_names)}; name the one that holds each "
            f"example's {role} with {role}=... (in a config: data.{role}=...)"
        )
    names = getattr(rows.features[column], "names", None)  # a hub data set's classes, counted from 0
    try:
        values = [names[v] if names and isinstance(v, int) and v >= 0 else v for v in rows[column]]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: column {column!r} is not in UTF-8 ({error}); save the file as UTF-8") from error
    for number, value in enumerate(values, 1):
        if isinstance(value, (list, dict, tuple)):
            kind = type(value).__name__
            raise ConfigError(f"{place}, row {number}: column {column!r} holds a {kind}; one text per row is needed")
        if value is None or not str(value).strip():
            raise ConfigError(f"{place}, row {number}: column {column!r} is empty")
    return [str(value) for value in values]


def _load(place: str, where: Where, hub: Mapping[str, Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("text needs the package datasets: pip install 'metaopt-chain[text]'") from error
    options = {**hub, "split": where} if hub["path"] else {**hub, "split": "train", **_files(datasets, place, where)}
    bars: Any = datasets.utils
    were_off = bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        return datasets.load_dataset(**options)
    except Exception as error:  # each format and the hub fail in ways of their own
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ConfigError(f"{place} cannot be read: {first_line(cause)}") from error
    finally:
        if not were_off:
            bars.enable_progress_bars()


def _files(datasets: Any, place: str, where: Where) -> dict[str, Any]:
    """Return the arguments with which `load_dataset` reads these files."""
    paths = _paths(where)
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{place}: there is no file {str(path)!r} (looked for in {Path.cwd()})")
        if not path.stat().st_size:
            raise ConfigError(f"{place} has no example")
    ending, *others = {path.suffix.lower() for path in paths}
    if others or ending not in READERS:
        raise ConfigError(f"{place}: files that end in {', '.join(READERS)} can be read, those of a stream all alike")
    options: dict[str, Any] = {"path": READERS[ending], "data_files": {"train": [str(path) for path in paths]}}
    if READERS[ending] == "csv":  # as it is written: '007' is no number and 'NA' no missing value
        separator = "\t" if ending == ".tsv" else ","
        with paths[0].open(newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file, delimiter=separator), [])
        features = datasets.Features({column: datasets.Value("string") for column in header})
        options |= {"sep": separator, "features": features, "keep_default_na": False, "encoding": "utf-8-sig"}
    return options


def _paths(where: Where) -> list[Path]:
    return [Path(path).expanduser() for path in ([where] if isinstance(where, str) else where)]
