"""The user's own files, or a hub data set, read into columns of text by Hugging Face `datasets`."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metaopt.base.errors import ConfigError, did_you_mean

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
LABELLED = ("train", "validation", "selection", "test")

Where = str | Sequence[str]  # a file, several files, or a split of a hub data set
Columns = dict[str, list[Any]]


class Reader:
    """Reads the streams of one data set.

    Args:
        name: of a hub data set, whose splits the streams are; None for files.
        subset: of the hub data set; None for its only one.
        cache_dir: where `datasets` keeps its copies; None for its own place.

    Raises:
        ConfigError: the package `datasets` is not installed.
    """

    def __init__(self, name: str | None = None, subset: str | None = None, cache_dir: str | None = None) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError("text needs the package datasets: pip install 'metaopt-chain[text]'") from error
        self._datasets: Any = datasets
        self._name, self._subset, self._cache_dir = name, subset, cache_dir
        if subset is not None and name is None:
            raise ConfigError(f"text: subset={subset!r} is one of a hub data set; give its name, too")

    def read(self, stream: str, where: Where, columns: Mapping[str, str]) -> Columns:
        """Return a stream's columns, none of their values missing.

        Args:
            stream: for the messages.
            where: file, files, or split.
            columns: what a column is for (`input`) → its name in the data.

        Raises:
            ConfigError: no such file or split, no such column, no row, or a row without a value.
        """
        rows = self._load(stream, where)
        if not len(rows):
            raise ConfigError(f"text: {stream} = {where} has no example")
        found: Columns = {}
        for role, column in columns.items():
            if column not in rows.column_names:
                raise ConfigError(
                    f"text: {stream} = {where} has no column {column!r}{did_you_mean(column, rows.column_names)}; name "
                    f"the one that holds each example's {role} with {role}=... (in a config: data.{role}=...)"
                )
            names = getattr(rows.features[column], "names", None)  # a hub data set's classes, counted from 0
            found[role] = [names[v] if names and isinstance(v, int) and v >= 0 else v for v in rows[column]]
            for number, value in enumerate(found[role], 1):
                if isinstance(value, (list, dict, tuple)):
                    raise ConfigError(
                        f"text: {stream} = {where}, row {number}: column {column!r} holds a {type(value).__name__}; "
                        "one text (or label) per row is needed"
                    )
                if value is None or (isinstance(value, str) and not value.strip()):
                    raise ConfigError(f"text: {stream} = {where}, row {number}: column {column!r} is empty")
        return found

    def _load(self, stream: str, where: Where) -> Any:
        load, progress = self._datasets.load_dataset, self._datasets.utils
        with _without_bars(progress):
            try:
                if self._name is not None:
                    return load(self._name, self._subset, split=where, cache_dir=self._cache_dir)
                options = _options(self._datasets, stream, where)
                return load(**options, split="train", cache_dir=self._cache_dir)
            except ConfigError:
                raise
            except Exception as error:  # each format and the hub fail in ways of their own
                of = f" of {self._name!r}" if self._name else ""
                cause: BaseException = error
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
                raise ConfigError(f"text: {stream} = {where}{of} cannot be read: {reason}") from error


def _options(datasets: Any, stream: str, where: Where) -> dict[str, Any]:
    """Return the arguments with which `load_dataset` reads these files."""
    paths = files_of(where)
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"text: {stream}: there is no file {str(path)!r} (looked for in {Path.cwd()})")
        if not path.stat().st_size:
            raise ConfigError(f"text: {stream} = {path} has no example")
    endings = {path.suffix.lower() for path in paths}
    if len(endings) != 1 or not endings <= set(READERS):
        raise ConfigError(
            f"text: {stream} = {where}: files that end in {', '.join(READERS)} can be read, those of a stream all alike"
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


@contextmanager
def _without_bars(utils: Any) -> Iterator[None]:
    """Keep `datasets` from drawing bars for what takes a moment; put its setting back."""
    were_off = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            utils.enable_progress_bars()


def refuse_same_files(streams: Mapping[str, Where], are_files: bool) -> None:
    """Raise if two streams are the same file or split; the unlabelled inputs may be those of training."""
    places = {
        name: {str(path.resolve()) for path in files_of(where)} if are_files else {str(where)}
        for name, where in streams.items()
    }
    for one, other in itertools.combinations(places, 2):
        shared = places[one] & places[other]
        if shared and {one, other} != {"train", "unlabelled"}:
            raise ConfigError(
                f"text: {one} and {other} are both {shared.pop()}: what trains the models, what trains A, what selects "
                "and what tests must be different examples; split it"
            )


def refuse_overlap(inputs: Mapping[str, Sequence[Any]]) -> None:
    """Raise if an input occurs in two labelled streams."""
    sets = {name: set(inputs[name]) for name in LABELLED}
    for one, other in itertools.combinations(LABELLED, 2):
        shared = sets[one] & sets[other]
        if shared:
            example = str(min(shared, key=str))
            raise ConfigError(
                f"text: {len(shared)} of the inputs in {other} are also in {one} (such as "
                f"{example[:60]!r}), so what is measured there is known already; remove them from one, or accept it "
                "with allow_overlap=True (in a config: data.allow_overlap=true)"
            )
