"""Dates written out in several languages and formats → ISO dates, some of the training targets being wrong."""

from __future__ import annotations

import datetime
import functools
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import check_counts, check_fraction
from metaopt.data.bundle import DataBundle
from metaopt.data.rows import in_order, shuffled
from metaopt.examples.date_text import FORMATS, TARGET_LENGTH, Language, Written, is_telling, iso
from metaopt.losses.decoding import evaluating, greedy_decode, sequence_score, to_model

CORRUPTIONS = ("sources", "random", "none")
LOCALES = ("en_US", "en_GB", "de", "fr", "es", "it", "nl", "sv")
SHARES = {"train": 0.45, "unlabelled": 0.3, "validation": 0.1, "selection": 0.05, "test": 0.1}  # of the calendar
SCORING_BATCH_SIZE = 256


def dates(
    corruption: str = "sources",
    noise: float | None = None,
    num_sources: int = 8,
    num_bad_sources: int | None = None,
    num_train: int = 16000,
    num_unlabelled: int = 8000,
    num_validation: int = 512,
    num_selection: int = 512,
    num_test: int = 512,
    batch_size: int = 64,
    validation_batch_size: int = 128,
    locales: Sequence[str] = LOCALES,
    formats: Sequence[str] = FORMATS,
    first_year: int = 2000,
    last_year: int = 2029,
    seed: int = 0,
) -> DataBundle:
    """Return dates as the `babel` package writes them, such as `venerdì 5 marzo 2021`, with their ISO dates.

    An input begins with its locale, so that `03/04/21` has one right answer. Each day of the calendar belongs to one
    stream. Tokens are words, signs, and numbers of one or two digits; in an ISO date also month and day with their
    hyphen: `2021-03-05` is `20 21 -03 -05`. Every training example comes from one of the sources, which are equally
    large. What `corruption` does to their answers:

    - `sources`: some sources swap day and month, always (`2021-05-03`). Validation, selection and test then only hold
      dates where the swap makes another possible date (day ≤ 12, day ≠ month): nothing but trust in the right sources
      tells which is meant.
    - `random`: a fraction of the answers is another date, whatever the source.
    - `none`: all answers are right.

    Args:
        corruption: `sources`, `random` or `none`.
        noise: fraction of wrong answers, from 0 to 1, for `random` only; None is 0.4.
        num_sources, num_bad_sources: of the training data, and how many of them swap, for `sources` only; None is 5.
        num_train, num_unlabelled, num_validation, num_selection, num_test: examples of each stream.
        batch_size, validation_batch_size: of what models learn from, and of what the meta-parameters learn from.
        locales, formats: of babel; formats are `short`, `medium`, `long`, `full`.
        first_year, last_year: of the calendar, 100 years at most (some formats write only the last two digits).
        seed: of all that is drawn here, which sources are bad included.

    Raises:
        ConfigError: an argument is unknown or out of range.
    """
    counts = num_train, num_unlabelled, num_validation, num_selection, num_test
    sizes = dict(zip(SHARES, counts, strict=True))
    check_counts("dates", **{f"num_{name}": size for name, size in sizes.items()})
    check_counts("dates", batch_size=batch_size, validation_batch_size=validation_batch_size, num_sources=num_sources)
    corrupt = _corruption(corruption, noise, num_sources, num_bad_sources)
    language = Language(locales, formats, first_year, last_year)
    rng = random.Random(seed)
    pools = _split(language.calendar, rng, telling=corruption == "sources")
    written = {name: language.draw(pools[name], size, rng) for name, size in sizes.items()}
    return _bundle(language, written, corrupt(written["train"], rng), num_sources, batch_size, validation_batch_size)


# --- what is wrong with the training targets --------------------------------------------------------------------


@dataclass(frozen=True)
class _Answers:
    """The training targets: each one's text, source and whether it is right; and which sources are."""

    texts: list[str]
    source: Tensor
    is_clean: Tensor
    good_sources: Tensor | None = None


def _corruption(corruption: str, noise: float | None, num_sources: int, num_bad_sources: int | None) -> Any:
    """Return the function (examples, rng) → answers that these options describe."""
    if corruption not in CORRUPTIONS:
        raise ConfigError(f"dates: no corruption {corruption!r}{did_you_mean(corruption, CORRUPTIONS)}")
    for name, value, belongs_to in (("noise", noise, "random"), ("num_bad_sources", num_bad_sources, "sources")):
        if value is not None and corruption != belongs_to:
            raise ConfigError(f"dates: {name}={value!r} is for corruption={belongs_to!r}; here it is {corruption!r}")
    if corruption == "sources":
        num_bad = 5 if num_bad_sources is None else num_bad_sources
        if isinstance(num_bad, bool) or not isinstance(num_bad, int) or not 0 <= num_bad <= num_sources:
            raise ConfigError(f"dates: num_bad_sources={num_bad!r} must lie between 0 and num_sources={num_sources}")
        return functools.partial(_bad_sources, num_sources, num_bad)
    noise = {"none": 0.0, "random": 0.4 if noise is None else noise}[corruption]
    check_fraction("dates", noise=noise)
    return functools.partial(_wrong_answers, num_sources, noise)


def _bad_sources(num_sources: int, num_bad: int, examples: Sequence[Written], rng: random.Random) -> _Answers:
    good = torch.ones(num_sources, dtype=torch.bool)
    good[rng.sample(range(num_sources), num_bad)] = False
    source = torch.arange(len(examples)) % num_sources
    swapped = (~good)[source].tolist()
    texts = [iso(example.date, swap=swap) for example, swap in zip(examples, swapped, strict=True)]
    return _Answers(texts, source, _are_right(texts, examples), good)


def _wrong_answers(num_sources: int, noise: float, examples: Sequence[Written], rng: random.Random) -> _Answers:
    texts = [iso(example.date) for example in examples]
    days = sorted(set(texts))
    if noise and len(days) < 2:
        raise ConfigError("dates: there is only one training date, so there is no wrong one to answer; raise num_train")
    position = {day: i for i, day in enumerate(days)}
    for i in rng.sample(range(len(texts)), round(noise * len(texts))):
        texts[i] = days[(position[texts[i]] + rng.randrange(1, len(days))) % len(days)]
    return _Answers(texts, torch.arange(len(texts)) % num_sources, _are_right(texts, examples))


def _are_right(texts: Sequence[str], examples: Sequence[Written]) -> Tensor:
    return torch.tensor([text == iso(example.date) for text, example in zip(texts, examples, strict=True)])


# --- streams ----------------------------------------------------------------------------------------------------


def _split(days: Sequence[datetime.date], rng: random.Random, telling: bool) -> dict[str, list[datetime.date]]:
    """Deal the calendar out to the streams; `telling` keeps only telling dates where models are scored."""
    days = rng.sample(days, len(days))
    ends = [round(share * len(days)) for share in itertools.accumulate(SHARES.values())]
    pools = {name: days[a:b] for name, a, b in zip(SHARES, [0, *ends], ends, strict=False)}
    if telling:
        pools |= {name: list(filter(is_telling, pools[name])) for name in ("validation", "selection", "test")}
    return pools


def _bundle(
    language: Language,
    written: Mapping[str, Sequence[Written]],
    answers: _Answers,
    num_sources: int,
    batch_size: int,
    validation_batch_size: int,
) -> DataBundle:
    tokenizer = language.tokenizer()
    columns = _columns(tokenizer, language.max_length, written, answers)
    tokens = {name: int(getattr(tokenizer, f"{name}_token_id")) for name in ("pad", "bos", "eos")}
    decoding: dict[str, int] = {**tokens, "max_length": TARGET_LENGTH}
    facts = {f"{name}_token_id": token for name, token in tokens.items()}
    facts |= {"vocab_size": len(tokenizer), "max_length": language.max_length, "max_target_length": TARGET_LENGTH}
    facts |= {"num_examples": len(written["train"]), "num_sources": num_sources}
    as_written = {
        tuple(ids): str(example)
        for name, examples in written.items()
        for ids, example in zip(columns[name]["input_ids"].tolist(), examples, strict=True)
    }
    return DataBundle(
        train=shuffled(columns["train"], batch_size),
        unlabelled=shuffled(columns["unlabelled"], batch_size),
        validation=shuffled(columns["validation"], validation_batch_size),
        selection=in_order(columns["selection"], SCORING_BATCH_SIZE),
        test=in_order(columns["test"], SCORING_BATCH_SIZE),
        sizes={name: len(examples) for name, examples in written.items()},
        facts=facts,
        tokenizer=tokenizer,
        source_names=tuple(f"source {i + 1}" for i in range(num_sources)),
        good_sources=answers.good_sources,
        is_clean=answers.is_clean,
        score=functools.partial(sequence_score, **decoding),
        selection_metric="exact_match",
        answers=functools.partial(_answer, tokenizer, decoding, as_written),
    )


def _columns(
    tokenizer: PreTrainedTokenizerFast, max_length: int, written: Mapping[str, Sequence[Written]], answers: _Answers
) -> dict[str, dict[str, Tensor]]:
    """Return what the batches of each stream are cut from: name → tensor, one row per example."""
    columns: dict[str, dict[str, Tensor]] = {}
    for name, examples in written.items():
        texts = [example.model_input for example in examples]
        encoded = tokenizer(texts, padding="max_length", max_length=max_length, return_tensors="pt")
        columns[name] = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        if name in ("train", "unlabelled"):
            columns[name]["index"] = torch.arange(len(examples))
        if name != "unlabelled":
            right = [iso(example.date) for example in examples]
            columns[name] |= _targets(tokenizer, answers.texts if name == "train" else right)
    columns["train"]["source"] = answers.source
    return columns


def _targets(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return `labels` [N, 5], with the end token, and `decoder_input_ids` [N, 5], with the begin token."""
    answers = tokenizer(list(texts))["input_ids"]
    whole = torch.tensor([[tokenizer.bos_token_id, *answer, tokenizer.eos_token_id] for answer in answers])
    return {"labels": whole[:, 1:].contiguous(), "decoder_input_ids": whole[:, :-1].contiguous()}


def _answer(
    tokenizer: PreTrainedTokenizerFast,
    decoding: Mapping[str, int],
    as_written: Mapping[tuple[int, ...], str],
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    count: int,
) -> list[tuple[str, str, str]]:
    """Return (input as written, right answer, the model's answer) of the first `count` examples."""
    rows: list[tuple[str, str, str]] = []
    with evaluating(model) as module:
        for batch in batches:
            batch = to_model({key: value[: count - len(rows)] for key, value in batch.items()}, module)
            ids, labels = batch["input_ids"], batch["labels"]
            guesses = greedy_decode(module, ids, batch["attention_mask"], **decoding)
            written = [as_written[tuple(row)] for row in ids.tolist()]
            read = [tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (labels, guesses)]
            rows += zip(written, *read, strict=True)
            if len(rows) >= count:
                break
    return rows
