"""The user's own files, or a hub data set, read into columns of text by Hugging Face `datasets`."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaopt.base.errors import ConfigError, did_you_mean, first_line

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
LABELLED = ("train", "validation", "selection", "test")

Where = str | Sequence[str]  # a file, several files, or a split of a hub data set


def read_texts(place: str, where: Where, columns: Mapping[str, str], hub: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return a stream's columns as text, none of their values missing.

    Args:
        place: stream and place, for the messages.
        where: file, files, or split.
        columns: what a column is for (`input`) → its name in the data.
        hub: what `datasets.load_dataset` takes: `path` and `name` of a hub data set (None for files), `cache_dir`.

    Raises:
        ConfigError: no such file or split, no such column, no row, or a row without a value.
    """
    rows = _load(place, where, hub)
    if not len(rows):
        raise ConfigError(f"text: {place} has no example")
    found = {}
    for role, column in columns.items():
        if column not in rows.column_names:
            raise ConfigError(
                f"text: {place} has no column {column!r}{did_you_mean(column, rows.column_names)}; name the one that "
                f"holds each example's {role} with {role}=... (in a config: data.{role}=...)"
            )
        names = getattr(rows.features[column], "names", None)  # a hub data set's classes, counted from 0
        values = [names[v] if names and isinstance(v, int) and v >= 0 else v for v in rows[column]]
        for number, value in enumerate(values, 1):
            if isinstance(value, (list, dict, tuple)):
                raise ConfigError(
                    f"text: {place}, row {number}: column {column!r} holds a {type(value).__name__}; one text (or "
                    "label) per row is needed"
                )
            if value is None or not str(value).strip():
                raise ConfigError(f"text: {place}, row {number}: column {column!r} is empty")
        found[role] = [str(value) for value in values]
    return found


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
        raise ConfigError(f"text: {place} cannot be read: {first_line(cause)}") from error
    finally:
        if not were_off:
            bars.enable_progress_bars()


def _files(datasets: Any, place: str, where: Where) -> dict[str, Any]:
    """Return the arguments with which `load_dataset` reads these files."""
    paths = files_of(where)
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"text: {place}: there is no file {str(path)!r} (looked for in {Path.cwd()})")
        if not path.stat().st_size:
            raise ConfigError(f"text: {place} has no example")
    endings = {path.suffix.lower() for path in paths}
    if len(endings) != 1 or not endings <= set(READERS):
        raise ConfigError(
            f"text: {place}: files that end in {', '.join(READERS)} can be read, those of a stream all alike"
        )
    ending = endings.pop()
    options: dict[str, Any] = {"path": READERS[ending], "data_files": {"train": [str(path) for path in paths]}}
    if READERS[ending] == "csv":  # as it is written: '007' is no number and 'NA' no missing value
        separator = "\t" if ending == ".tsv" else ","
        with paths[0].open(newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file, delimiter=separator), [])
        features = datasets.Features({column: datasets.Value("string") for column in header})
        options |= {"sep": separator, "features": features, "keep_default_na": False, "encoding": "utf-8-sig"}
    return options


def files_of(where: Where) -> list[Path]:
    """Return the files that a stream is read from."""
    return [Path(path).expanduser() for path in ([where] if isinstance(where, str) else where)]


def refuse_same_files(streams: Mapping[str, Where], are_files: bool) -> None:
    """Raise if two streams are the same file or split; the unlabelled inputs may be those of training."""
    for (one, here), (other, there) in itertools.combinations(streams.items(), 2):
        places = [{p.resolve() for p in files_of(w)} if are_files else {str(w)} for w in (here, there)]
        if places[0] & places[1] and {one, other} != {"train", "unlabelled"}:
            raise ConfigError(
                f"text: {one} and {other} are both {(places[0] & places[1]).pop()}: what trains the models, what "
                "trains A, what selects and what tests must be different examples; split it"
            )


def refuse_overlap(inputs: Mapping[str, Sequence[str]]) -> None:
    """Raise if an input occurs in two labelled streams."""
    for one, other in itertools.combinations(LABELLED, 2):
        shared = set(inputs[one]) & set(inputs[other])
        if shared:
            raise ConfigError(
                f"text: {len(shared)} of the inputs in {other} are also in {one} (such as {min(shared)[:60]!r}), so "
                "what is measured there is known already; remove them from one, or accept it with allow_overlap=True "
                "(in a config: data.allow_overlap=true)"
            )
