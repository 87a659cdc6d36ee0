"""The user's own text, from files or the hub, for sequence-to-sequence models, causal ones and classifiers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Literal

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import check_counts
from metaopt.data.bundle import STREAMS, DataBundle
from metaopt.data.rows import streams
from metaopt.data.text_files import read_texts
from metaopt.data.text_tasks import TASKS, in_order, numbered
from metaopt.data.text_tokens import CHARACTERS, Collator, load_tokenizer, special_tokens
from metaopt.losses.decoding import scored, shown


def text(
    task: Literal["seq2seq", "causal", "classification"],
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
        decoder_start_token_id: None takes that of the model beside the tokenizer, or the token that begins a text.
        separator: between input and target of a causal model.
        max_length, max_target_length: tokens of inputs and targets; longer ones are cut, and a message says how many.
            None keeps them whole, as far as the tokenizer's model can read.
        selection_metric: None is `exact_match`, `token_accuracy` (texts without target) or `accuracy`.
        allow_overlap: accept inputs that are in two of the labelled streams.

    Raises:
        ConfigError: an unknown task, a missing file, column or value, an empty stream, two streams that overlap.
    """
    _refuse_contradictions(task, target, name, subset)
    limits = {"max_length": max_length, "max_target_length": max_target_length}
    check_counts("text", batch_size=batch_size, validation_batch_size=validation_batch_size)
    check_counts("text", **{option: limit for option, limit in limits.items() if limit is not None})

    wheres = dict(zip(STREAMS, (train, unlabelled, validation, selection, test), strict=True))
    columns = {"input": input, "target": target, "source": source}
    texts = read_texts(wheres, columns, {"path": name, "name": subset, "cache_dir": cache_dir}, allow_overlap)
    if task == "causal" and target is not None:
        for read in texts.values():
            read["input"] = [text + separator for text in read["input"]]
    coder = load_tokenizer(tokenizer, texts)
    special = special_tokens(coder, task, decoder_start_token_id)
    limits = {"max_length": max_length or coder.model_max_length, "max_target_length": max_target_length or sys.maxsize}
    made = TASKS[task](texts, coder, limits, special)
    metrics = made.metrics if target is not None else ("token_accuracy",)
    if selection_metric not in (None, *metrics):
        raise ConfigError(f"text: no metric {selection_metric!r}{did_you_mean(selection_metric, metrics)}")

    sizes = {stream: len(read["input"]) for stream, read in texts.items()}
    facts = {**made.facts, "num_examples": sizes["train"]}
    sources = in_order(texts["train"].get("source", ()))
    if sources:
        made.columns["train"]["source"] = numbered(texts["train"]["source"], sources, "train")
        facts["num_sources"] = len(sources)
    collate = Collator(coder, special["bos_token_id"] if task == "seq2seq" else None)
    return DataBundle(
        **streams(made.columns, batch_size, validation_batch_size, validation_batch_size, collate),
        sizes=sizes,
        facts={name: fact for name, fact in facts.items() if fact is not None},
        tokenizer=coder,
        source_names=tuple(sources),
        score=functools.partial(scored, made.measure),
        selection_metric=selection_metric or metrics[0],
        answers=functools.partial(shown, made.read) if target is not None else None,
    )


def _refuse_contradictions(task: str, target: str | None, name: str | None, subset: str | None) -> None:
    if task not in TASKS:
        raise ConfigError(f"text: no task {task!r}{did_you_mean(task, TASKS)}")
    if target is None and task != "causal":
        raise ConfigError(f"text: task={task!r} needs a target column; only causal models learn from inputs alone")
    if subset is not None and name is None:
        raise ConfigError(f"text: subset={subset!r} is one of a hub data set; give its name, too")
