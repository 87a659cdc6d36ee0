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

STREAMS: tuple[str, ...] = ("train", "unlabelled", "validation", "selection", "test")


@dataclass(frozen=True)
class DataBundle:
    """Named streams of batches, and what goes with them. Every data target returns one.

    A stream is a re-iterable collection of batches: a DataLoader or a list. A batch is a mapping of names to tensors;
    `index` (int64 [B], position in the training set), `source` (int64 [B]) and `labels` are kept from the models.

    Raises:
        ConfigError: a stream can be read only once, or the parts do not fit each other.
    """

    train: Iterable[Any]  # what the first stage learns from, perhaps corrupted
    validation: Iterable[Any]  # clean; its loss trains the meta-parameters
    selection: Iterable[Any]  # clean; early stopping, best checkpoint, returned metric; never the validation data again
    test: Iterable[Any]  # clean; read once, at the end
    unlabelled: Iterable[Any] | None = None  # inputs that the later stages learn from; None where none needs it
    sizes: dict[str, int] = field(default_factory=dict)  # stream → number of examples
    facts: dict[str, Any] = field(default_factory=dict)  # `vocab_size` and the like; a config reads `${facts.…}`
    tokenizer: Any = None  # for reading and saving
    source_names: tuple[str, ...] = ()  # of the sources that `source` counts
    good_sources: Tensor | None = None  # bool [num_sources], True where a source is right; for scoring only
    is_clean: Tensor | None = None  # bool [num_examples], True where a training target is right; for scoring only
    # (model, batches) → {metric: value}, larger being better
    score: Callable[[Any, Iterable[Any]], dict[str, float]] | None = None
    selection_metric: str | None = None  # of `score`, to be maximised; None minimises the loss on `selection`
    # (model, batches, count) → [(input as written, right answer, model's answer)]
    answers: Callable[[Any, Iterable[Any], int], list[tuple[str, str, str]]] | None = None
    # (indices, path, title): draws these training examples into a PNG
    picture: Callable[[Sequence[int], Path, str], None] | None = None

    def __post_init__(self) -> None:
        for name in STREAMS:
            stream = getattr(self, name)
            is_missing = stream is None and name == "unlabelled"
            if not is_missing and (not isinstance(stream, Iterable) or isinstance(stream, Iterator)):
                raise ConfigError(
                    f"DataBundle: {name!r} is a {type(stream).__name__}, which cannot be read again and again; give a "
                    "list of batches or a DataLoader"
                )
        for name, size in self.sizes.items():
            if name not in STREAMS:
                raise ConfigError(f"DataBundle: sizes names no stream {name!r}{did_you_mean(name, STREAMS)}")
            check_counts("DataBundle", **{f"sizes[{name!r}]": size})
        for name, mask in (("good_sources", self.good_sources), ("is_clean", self.is_clean)):
            if mask is not None and (getattr(mask, "dtype", None) != torch.bool or mask.dim() != 1):
                kind = getattr(mask, "dtype", type(mask).__name__)
                raise ConfigError(f"DataBundle: {name} must be a bool tensor with one axis, got {kind}")
        sources, examples = self.facts.get("num_sources"), self.facts.get("num_examples", self.sizes.get("train"))
        counts = {"good_sources": sources, "is_clean": examples, "source_names": sources if self.source_names else None}
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
        """Return the stream called `name`; one that is not there is a ConfigError."""
        if name not in self.stream_names:
            near = did_you_mean(name, self.stream_names, others=False)
            raise ConfigError(f"this data set has no {name!r} stream (it has: {', '.join(self.stream_names)}){near}")
        return getattr(self, name)
