"""Dates written out in several languages and formats → ISO dates, some of the training targets being wrong."""

from __future__ import annotations

import datetime
import functools
import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import check_counts, check_fraction
from metaopt.data.bundle import DataBundle
from metaopt.data.rows import streams
from metaopt.examples.date_text import FORMATS, TARGET_LENGTH, Language, Written, is_telling, iso
from metaopt.losses.decoding import sequence_answers, sequence_score, shown

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
    num_bad, share = _amounts(corruption, noise, num_sources, num_bad_sources)
    language = Language(locales, formats, first_year, last_year)
    rng = random.Random(seed)
    pools = _split(language.calendar, rng, telling=corruption == "sources")
    written = {name: language.draw(pools[name], size, rng) for name, size in sizes.items()}
    answers = {name: [iso(example.date) for example in written[name]] for name in SHARES if name != "unlabelled"}
    right, source = answers["train"], torch.arange(num_train) % num_sources
    good_sources = None
    if corruption == "sources":
        good_sources = torch.ones(num_sources, dtype=torch.bool)
        good_sources[rng.sample(range(num_sources), num_bad)] = False
        swap = (~good_sources)[source].tolist()
        answers["train"] = [iso(example.date, swap[i]) for i, example in enumerate(written["train"])]
    else:
        answers["train"] = _wrong_answers(right, share, rng)
    tokenizer = language.tokenizer()
    columns = {name: _columns(language, tokenizer, written[name], answers.get(name)) for name in SHARES}
    columns["train"]["source"] = source
    as_written = {
        tuple(ids): str(example)
        for name, examples in written.items()
        for ids, example in zip(columns[name]["input_ids"].tolist(), examples, strict=True)
    }
    tokens = {name: int(getattr(tokenizer, f"{name}_token_id")) for name in ("pad", "bos", "eos")}
    decoding = {**tokens, "max_length": TARGET_LENGTH}
    facts = {f"{name}_token_id": token for name, token in tokens.items()}
    facts |= {"vocab_size": len(tokenizer), "max_length": language.max_length, "max_target_length": TARGET_LENGTH}
    read = (
        lambda rows: [as_written[tuple(row)] for row in rows.tolist()],
        lambda rows: tokenizer.batch_decode(rows, skip_special_tokens=True),
    )
    return DataBundle(
        **streams(columns, batch_size, validation_batch_size, SCORING_BATCH_SIZE),
        sizes=sizes,
        facts={**facts, "num_examples": num_train, "num_sources": num_sources},
        tokenizer=tokenizer,
        source_names=tuple(f"source {i + 1}" for i in range(num_sources)),
        good_sources=good_sources,
        is_clean=torch.tensor([given == date for given, date in zip(answers["train"], right, strict=True)]),
        score=functools.partial(sequence_score, **decoding),
        selection_metric="exact_match",
        answers=functools.partial(shown, functools.partial(sequence_answers, *read, decoding)),
    )


def _amounts(corruption: str, noise: float | None, num_sources: int, num_bad: int | None) -> tuple[int, float]:
    """Return the number of bad sources, and the fraction of wrong answers."""
    if corruption not in CORRUPTIONS:
        raise ConfigError(f"dates: no corruption {corruption!r}{did_you_mean(corruption, CORRUPTIONS)}")
    for name, value, belongs_to in (("noise", noise, "random"), ("num_bad_sources", num_bad, "sources")):
        if value is not None and corruption != belongs_to:
            raise ConfigError(f"dates: {name}={value!r} is for corruption={belongs_to!r}; here it is {corruption!r}")
    if corruption == "sources":
        num_bad = 5 if num_bad is None else num_bad
        if isinstance(num_bad, bool) or not isinstance(num_bad, int) or not 0 <= num_bad <= num_sources:
            raise ConfigError(f"dates: num_bad_sources={num_bad!r} must lie between 0 and num_sources={num_sources}")
        return num_bad, 0.0
    noise = {"none": 0.0, "random": 0.4 if noise is None else noise}[corruption]
    check_fraction("dates", noise=noise)
    return 0, noise


def _wrong_answers(right: Sequence[str], noise: float, rng: random.Random) -> list[str]:
    """Return the answers, a fraction `noise` of them another one's date."""
    texts, days = list(right), sorted(set(right))
    if noise and len(days) < 2:
        raise ConfigError("dates: there is only one training date, so there is no wrong one to answer; raise num_train")
    position = {day: i for i, day in enumerate(days)}
    for i in rng.sample(range(len(texts)), round(noise * len(texts))):
        texts[i] = days[(position[texts[i]] + rng.randrange(1, len(days))) % len(days)]
    return texts


def _split(days: Sequence[datetime.date], rng: random.Random, telling: bool) -> dict[str, list[datetime.date]]:
    """Deal the calendar out to the streams; `telling` keeps only telling dates where models are scored."""
    days = rng.sample(days, len(days))
    ends = [round(share * len(days)) for share in itertools.accumulate(SHARES.values())]
    pools = {name: days[a:b] for name, a, b in zip(SHARES, [0, *ends], ends, strict=False)}
    if telling:
        pools |= {name: list(filter(is_telling, pools[name])) for name in ("validation", "selection", "test")}
    return pools


def _columns(
    language: Language, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Written], answers: list[str] | None
) -> dict[str, Tensor]:
    """Return inputs [N, L], and `labels` [N, 5] with the end token, `decoder_input_ids` [N, 5] with the begin token."""
    texts = [example.model_input for example in examples]
    encoded = tokenizer(texts, padding="max_length", max_length=language.max_length, return_tensors="pt")
    columns = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    if answers is not None:
        ids = tokenizer(answers)["input_ids"]
        whole = torch.tensor([[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in ids])
        columns |= {"labels": whole[:, 1:].contiguous(), "decoder_input_ids": whole[:, :-1].contiguous()}
    return columns
