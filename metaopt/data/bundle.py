"""What a data set gives to a run: named streams of batches, and what the models and the report must know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import check_counts

STREAMS = ("train", "unlabelled", "validation", "selection", "test")

Score = Callable[[Any, Iterable[Any]], dict[str, float]]
Answers = Callable[[Any, Iterable[Any], int], list[tuple[str, str, str]]]
Picture = Callable[[Sequence[int], Path, str], None]


@dataclass(frozen=True)
class DataBundle:
    """Named streams of batches, and what goes with them. Every data target returns one.

    A stream is a re-iterable collection of batches: a DataLoader or a list. A batch is a mapping of names to tensors;
    `index` (int64 [B], position in the training set), `source` (int64 [B]) and `labels` are kept from the models.

    Args:
        train: what the first stage learns from, perhaps corrupted.
        validation: clean; its loss trains the meta-parameters.
        selection: clean; early stopping, best checkpoint and the returned metric. Never the validation data again.
        test: clean; read once, at the end.
        unlabelled: inputs that the later stages learn from; None where no stage needs it.
        sizes: stream → number of examples.
        facts: what a model must know, such as `vocab_size` or `num_labels`; a config reads it as `${facts.…}`.
        tokenizer: for reading and saving; None for data without one.
        source_names: of the sources that `source` counts.
        good_sources: bool [num_sources], True where a source is right. For scoring only.
        is_clean: bool [num_examples], True where a training target is right. For scoring only.
        score: `(model, batches) -> {metric: value}`; larger is better.
        selection_metric: which metric of `score` is maximised; None minimises the loss on `selection`.
        answers: `(model, batches, count) -> [(input as written, right answer, model's answer)]`.
        picture: `(indices, path, title)` draws these training examples into a PNG.

    Raises:
        ConfigError: a stream can be read only once, or the parts do not fit each other.
    """

    train: Iterable[Any]
    validation: Iterable[Any]
    selection: Iterable[Any]
    test: Iterable[Any]
    unlabelled: Iterable[Any] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    source_names: tuple[str, ...] = ()
    good_sources: Tensor | None = None
    is_clean: Tensor | None = None
    score: Score | None = None
    selection_metric: str | None = None
    answers: Answers | None = None
    picture: Picture | None = None

    def __post_init__(self) -> None:
        for name in STREAMS:
            stream = getattr(self, name)
            can_be_read_again = isinstance(stream, Iterable) and not isinstance(stream, Iterator)
            if not can_be_read_again and not (stream is None and name == "unlabelled"):
                raise ConfigError(
                    f"DataBundle: {name!r} is a {type(stream).__name__}, which cannot be read again and again; give a "
                    "list of batches or a DataLoader"
                )
        for name in self.sizes:
            if name not in STREAMS:
                raise ConfigError(f"DataBundle: sizes names no stream {name!r}{did_you_mean(name, STREAMS)}")
        check_counts("DataBundle", **{f"sizes[{name!r}]": size for name, size in self.sizes.items()})
        sources, examples = self.facts.get("num_sources"), self.facts.get("num_examples", self.sizes.get("train"))
        for name, mask in (("good_sources", self.good_sources), ("is_clean", self.is_clean)):
            if mask is not None and (getattr(mask, "dtype", None) != torch.bool or mask.dim() != 1):
                kind = getattr(mask, "dtype", type(mask).__name__)
                raise ConfigError(f"DataBundle: {name} must be a bool tensor with one axis, got {kind}")
        counts = {"good_sources": sources, "source_names": sources if self.source_names else None, "is_clean": examples}
        for name, count in counts.items():
            given = getattr(self, name)
            if given is not None and count is not None and len(given) != count:
                raise ConfigError(f"DataBundle: {name} has {len(given)} entries for {count}")
        if self.selection_metric is not None and self.score is None:
            raise ConfigError(
                f"DataBundle: selection_metric={self.selection_metric!r} is read from score(...), which is missing; "
                "give score=..., or selection_metric=None to select by the loss"
            )

    @property
    def stream_names(self) -> tuple[str, ...]:
        """Names of the streams that this data set has, in the order of `STREAMS`."""
        return tuple(name for name in STREAMS if getattr(self, name) is not None)

    def stream(self, name: str) -> Iterable[Any]:
        """Return the stream called `name`; an unknown or missing one is a ConfigError."""
        if name not in STREAMS:
            raise ConfigError(f"no stream {name!r} in a data set{did_you_mean(name, STREAMS)}")
        if getattr(self, name) is None:
            raise ConfigError(f"this data set has no {name!r} stream (it has: {', '.join(self.stream_names)})")
        return getattr(self, name)
