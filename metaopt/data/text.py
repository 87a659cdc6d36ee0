"""The user's own text, from files or the hub, for sequence-to-sequence models, causal ones and classifiers."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import check_counts
from metaopt.data.bundle import STREAMS, DataBundle
from metaopt.data.rows import streams
from metaopt.data.text_files import LABELLED, Where, read_texts, refuse_overlap, refuse_same_files
from metaopt.data.text_tasks import Causal, Classification, SequenceToSequence, Texts, in_order
from metaopt.data.text_tokens import (
    CHARACTERS,
    NO_LIMIT,
    Lengths,
    character_tokenizer,
    decoder_start,
    load_tokenizer,
)
from metaopt.losses.decoding import scored, shown

log = logging.getLogger(__name__)

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
    if task not in get_args(Task):
        raise ConfigError(f"text: no task {task!r}{did_you_mean(task, get_args(Task))}")
    check_counts("text", batch_size=batch_size, validation_batch_size=validation_batch_size)
    limits = {"max_length": max_length, "max_target_length": max_target_length}
    check_counts("text", **{option: limit for option, limit in limits.items() if limit is not None})
    if target is None and task != "causal":
        raise ConfigError(f"text: task={task!r} needs a target column; only causal models learn from inputs alone")
    if subset is not None and name is None:
        raise ConfigError(f"text: subset={subset!r} is one of a hub data set; give its name, too")
    places = _places(train, unlabelled, validation, selection, test)
    refuse_same_files(places, are_files=name is None)

    texts = {
        stream: read_texts(
            f"{stream} = {where}" + (f" of {name!r}" if name else ""),
            where,
            _columns(stream, input, target, source),
            {"path": name, "name": subset, "cache_dir": cache_dir},
        )
        for stream, where in places.items()
    }
    if not allow_overlap:
        refuse_overlap({stream: texts[stream]["input"] for stream in LABELLED})
    coder = load_tokenizer(tokenizer) if tokenizer != CHARACTERS else _characters(texts, separator * (task == "causal"))
    if max_length is None and coder.model_max_length < NO_LIMIT:
        limits["max_length"] = coder.model_max_length
    inputs, targets = (Lengths(coder, option, limit) for option, limit in limits.items())
    if task == "seq2seq":
        start = decoder_start(coder, tokenizer, decoder_start_token_id)
        made = SequenceToSequence(texts, inputs, targets, start)
    elif task == "causal":
        made = Causal(texts, inputs, targets, separator)
    else:
        made = Classification(texts, inputs, targets)
    cut = [f"cut to {x.option}={x.limit} tokens: {', '.join(x.cut)}" for x in (inputs, targets) if x.cut]
    if cut:
        log.warning("text: %s; raise the limit (data.max_length=...) to keep them whole", "; ".join(cut))
    sources = in_order(texts["train"].get("source", ()))
    if sources:
        number = {name: i for i, name in enumerate(sources)}
        made.columns["train"]["source"] = [number[name] for name in texts["train"]["source"]]
        made.facts["num_sources"] = len(sources)
    if selection_metric not in (None, *made.metrics):
        raise ConfigError(f"text: no metric {selection_metric!r}{did_you_mean(selection_metric, made.metrics)}")
    facts = {**made.facts, "num_examples": len(texts["train"]["input"])}
    return DataBundle(
        **streams(made.columns, batch_size, validation_batch_size, validation_batch_size, made.collate),
        sizes={stream: len(found["input"]) for stream, found in texts.items()},
        facts={name: fact for name, fact in facts.items() if fact is not None},
        tokenizer=coder,
        source_names=tuple(sources),
        score=functools.partial(scored, made.measure),
        selection_metric=selection_metric or made.metrics[0],
        answers=functools.partial(shown, made.read) if made.has_answers else None,
    )


def _places(*wheres: Where | None) -> dict[str, Where]:
    places = {stream: where for stream, where in zip(STREAMS, wheres, strict=True) if where}
    for stream in LABELLED:
        if stream not in places:
            raise ConfigError(
                f"text: there is no {stream} stream: give {stream}=... (a file, or a split of the hub data set); no "
                "other can stand in for it"
            )
    return places


def _columns(stream: str, input: str, target: str | None, source: str | None) -> dict[str, str]:
    columns = {"input": input}
    if target is not None and stream != "unlabelled":
        columns["target"] = target
    if source is not None and stream == "train":
        columns["source"] = source
    return columns


def _characters(texts: Texts, separator: str) -> PreTrainedTokenizerBase:
    read = texts["train"], texts.get("unlabelled", {})
    seen = [columns.get(role, ()) for columns in read for role in ("input", "target")]
    return character_tokenizer(itertools.chain(*seen, separator if "target" in texts["train"] else ""))
