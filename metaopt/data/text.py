"""The user's own text, from files or the hub, for sequence-to-sequence models, causal ones and classifiers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import check_counts
from metaopt.data.bundle import STREAMS, DataBundle
from metaopt.data.padding import loader
from metaopt.data.text_files import LABELLED, Columns, Reader, Where, refuse_overlap, refuse_same_files
from metaopt.data.text_tasks import Parts, ReadText, causal, classification, in_order, sequence_to_sequence
from metaopt.data.text_tokens import (
    CHARACTERS,
    NO_LIMIT,
    Lengths,
    character_tokenizer,
    decoder_start,
    end_token,
    load_tokenizer,
)

log = logging.getLogger(__name__)

TASKS = ("seq2seq", "causal", "classification")
Task = Literal["seq2seq", "causal", "classification"]


def text(
    task: Task,
    train: str | Sequence[str],
    validation: str | Sequence[str],
    selection: str | Sequence[str],
    test: str | Sequence[str],
    unlabelled: str | Sequence[str] | None = None,
    *,
    name: str | None = None,
    subset: str | None = None,
    input: str = "input",
    target: str | None = "target",
    source: str | None = None,
    tokenizer: str = CHARACTERS,
    decoder_start_token_id: int | None = None,
    separator: str = "\n",
    max_length: int | None = None,
    max_target_length: int | None = None,
    batch_size: int = 32,
    validation_batch_size: int = 64,
    selection_metric: str | None = None,
    allow_overlap: bool = False,
    cache_dir: str | None = None,
) -> DataBundle:
    """Return streams of batches from text of one's own: JSON lines, CSV, TSV or Parquet files, or a hub data set.

    All batches carry `input_ids` and `attention_mask` [B, L]; `train` and `unlabelled` also `index` [B], and `train`
    `source` [B] where there is such a column. What is to be predicted depends on the task:

    - `seq2seq`: `labels` and `decoder_input_ids` [B, M], the same one position later.
    - `causal`: `labels` [B, L], the tokens themselves, as Hugging Face's causal models take them and shift them: of
      the target behind the input and a separator, or of the whole input where `target` is None. A model of one's own
      has `loss_type = "ForCausalLM"` as an attribute, so that its labels are shifted, too.
    - `classification`: `labels` [B]; the classes are the different values of `target` in `train`, in order.

    Args:
        task: what the models do.
        train, validation, selection, test: a file each, or several; with `name`, splits such as `validation[:50%]`.
        unlabelled: inputs that later stages learn from; a target column is not read.
        name, subset: of a data set on the Hugging Face hub; None for files.
        input, target, source: columns; sources keep the names that they have there.
        tokenizer: a folder or hub name, or `characters`, made from the training data.
        decoder_start_token_id: of sequence-to-sequence models; None takes that of the model that lies beside the
            tokenizer, or the token that begins a text.
        separator: between input and target of a causal model.
        max_length, max_target_length: tokens of inputs and targets; longer ones are cut, and a message says how many.
            None keeps them whole, as far as the tokenizer's model can read.
        batch_size, validation_batch_size: of what models are trained on, and of what A is trained on.
        selection_metric: None is `exact_match`, `token_accuracy` (texts without target) or `accuracy`.
        allow_overlap: accept inputs that are in two of the labelled streams.
        cache_dir: where `datasets` keeps its copies; None for its own place.

    Raises:
        ConfigError: an unknown task, a missing file, column or value, an empty stream, two streams that overlap.
    """
    if task not in TASKS:
        raise ConfigError(f"text: no task {task!r}{did_you_mean(task, TASKS)}")
    check_counts("text", batch_size=batch_size, validation_batch_size=validation_batch_size)
    limits = {"max_length": max_length, "max_target_length": max_target_length}
    check_counts("text", **{option: limit for option, limit in limits.items() if limit is not None})
    if target is None and task != "causal":
        raise ConfigError(f"text: task={task!r} needs a target column; only causal models learn from inputs alone")
    places = _places(train, validation, selection, test, unlabelled)
    refuse_same_files(places, are_files=name is None)
    columns = _read(Reader(name, subset, cache_dir), places, input, target, source)
    if not allow_overlap:
        refuse_overlap({stream: columns[stream]["input"] for stream in LABELLED})
    read = ReadText(columns, _tokenizer(tokenizer, columns, separator if task == "causal" and target else ""))
    limit = _limit(read.tokenizer) if max_length is None else max_length
    lengths = {"max_length": Lengths(limit, "max_length")}
    lengths["max_target_length"] = Lengths(max_target_length, "max_target_length")
    if task == "seq2seq":
        parts = sequence_to_sequence(read, lengths, decoder_start(read.tokenizer, tokenizer, decoder_start_token_id))
    elif task == "causal":
        parts = causal(read, lengths, separator)
    else:
        parts = classification(read, lengths)
    if selection_metric not in (None, *parts.metrics):
        raise ConfigError(f"text: no metric {selection_metric!r}{did_you_mean(selection_metric, parts.metrics)}")
    cut = [length.message for length in lengths.values() if length.message]
    if cut:
        log.warning("text: %s; raise the limit (data.max_length=...) to keep them whole", "; ".join(cut))
    return _bundle(read, parts, (batch_size, validation_batch_size), selection_metric)


# --- reading ----------------------------------------------------------------------------------------------------


def _places(*wheres: Where | None) -> dict[str, Where]:
    order = ("train", "validation", "selection", "test", "unlabelled")
    places = {stream: where for stream, where in zip(order, wheres, strict=True) if where}
    for stream in LABELLED:
        if stream not in places:
            raise ConfigError(
                f"text: there is no {stream} stream: give {stream}=... (a file, or a split of the hub data set). train "
                "trains the models, validation trains A, selection chooses, test is read once; none can stand in for "
                "another"
            )
    return {stream: places[stream] for stream in STREAMS if stream in places}


def _read(
    reader: Reader, places: Mapping[str, Where], input: str, target: str | None, source: str | None
) -> dict[str, Columns]:
    found = {}
    for stream, where in places.items():
        wanted = {"input": input}
        if target is not None and stream != "unlabelled":
            wanted["target"] = target
        if source is not None and stream == "train":
            wanted["source"] = source
        found[stream] = reader.read(stream, where, wanted)
    return found


def _tokenizer(name: str, columns: Mapping[str, Columns], separator: str) -> Any:
    if name != CHARACTERS:
        return load_tokenizer(name)
    roles = [(stream, role) for stream in ("train", "unlabelled") if stream in columns for role in ("input", "target")]
    texts = [str(value) for stream, role in roles for value in columns[stream].get(role, ())]
    return character_tokenizer([*texts, separator])


def _limit(tokenizer: Any) -> int | None:
    return tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else None


# --- the bundle -------------------------------------------------------------------------------------------------


def _bundle(read: ReadText, parts: Parts, batch_sizes: tuple[int, int], selection_metric: str | None) -> DataBundle:
    sizes = {stream: len(columns["inputs"]) for stream, columns in parts.columns.items()}
    sources = read.texts("train", "source") if "source" in read.columns["train"] else []
    source_names = in_order(sources)
    for stream in ("train", "unlabelled"):
        if stream in parts.columns:
            parts.columns[stream]["index"] = range(sizes[stream])
    if sources:
        number = {name: i for i, name in enumerate(source_names)}
        parts.columns["train"]["source"] = [number[name] for name in sources]
    size, validation_size = batch_sizes
    batched = {
        "train": (size, True),
        "unlabelled": (size, True),
        "validation": (validation_size, True),
        "selection": (validation_size, False),
        "test": (validation_size, False),
    }
    streams: dict[str, Any] = {
        stream: loader(columns, parts.collator, *batched[stream]) for stream, columns in parts.columns.items()
    }
    tokens = {"vocab_size": len(read.tokenizer), "pad_token_id": read.tokenizer.pad_token_id}
    facts = {**tokens, "eos_token_id": end_token(read.tokenizer), **parts.facts, "num_examples": sizes["train"]}
    if sources:
        facts["num_sources"] = len(source_names)
    return DataBundle(
        **streams,
        sizes=sizes,
        facts={name: fact for name, fact in facts.items() if fact is not None},
        tokenizer=read.tokenizer,
        source_names=tuple(source_names),
        score=parts.score,
        selection_metric=selection_metric or parts.metrics[0],
        answers=parts.answers,
    )
