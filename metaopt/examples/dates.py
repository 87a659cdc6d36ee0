"""Dates written out in several languages and formats → ISO dates, some of the training targets being wrong."""

from __future__ import annotations

import datetime
import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from babel import Locale, UnknownLocaleError
from babel.dates import format_date
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import check_counts, check_fraction
from metaopt.data.bundle import DataBundle
from metaopt.data.rows import streams
from metaopt.data.text_tokens import decoding, word_tokenizer
from metaopt.losses.decoding import sequence_answers, sequence_score, shown

CORRUPTIONS = ("sources", "random", "none")
LOCALES = ("en_US", "en_GB", "de", "fr", "es", "it", "nl", "sv")
FORMATS = ("short", "medium", "long", "full")
SHARES = {"train": 0.45, "unlabelled": 0.3, "validation": 0.1, "selection": 0.05, "test": 0.1}  # of the calendar
SCORING_BATCH_SIZE = 256
TARGET_LENGTH = 5  # tokens of an ISO date: century, year, -month, -day, end
MAX_YEARS = 100  # two digits tell that many years apart

# A locale's tag, month and day of an ISO date with their hyphen, two digits or one, a word, any other sign.
TOKENS = r"<\w+>|(?<=\d{4})-\d{2}|(?<=\d{4}-\d{2})-\d{2}|\d{2}|\d|[^\W\d]+|[^\w\s]"
NORMALIZER = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
SPLITTER = pre_tokenizers.Split(Regex(TOKENS), behavior="removed", invert=True)


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
        noise: fraction of wrong answers, from 0 to 1, for `random` only; None is 0.4.
        num_bad_sources: how many of the sources swap, for `sources` only; None is 5.
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
    if corruption not in CORRUPTIONS:
        raise ConfigError(f"dates: no corruption {corruption!r}{did_you_mean(corruption, CORRUPTIONS)}")
    for name, value, belongs_to in (("noise", noise, "random"), ("num_bad_sources", num_bad_sources, "sources")):
        if value is not None and corruption != belongs_to:
            raise ConfigError(f"dates: {name}={value!r} is for corruption={belongs_to!r}; here it is {corruption!r}")

    language = Language(locales, formats, first_year, last_year)
    rng = random.Random(seed)
    days = _split(language.calendar, rng, telling=corruption == "sources")
    written = {name: language.draw(days[name], size, rng) for name, size in sizes.items()}
    answers = {name: [iso(example.date) for example in written[name]] for name in SHARES if name != "unlabelled"}
    source = torch.arange(num_train) % num_sources
    right, good_sources = answers["train"], None
    if corruption == "sources":
        good_sources = _good_sources(num_sources, 5 if num_bad_sources is None else num_bad_sources, rng)
        is_swapped = (~good_sources)[source].tolist()
        answers["train"] = [iso(example.date, swap) for example, swap in zip(written["train"], is_swapped, strict=True)]
    elif corruption == "random":
        answers["train"] = _wrong_answers(right, 0.4 if noise is None else noise, rng)

    tokenizer = language.tokenizer()
    columns = {name: _columns(tokenizer, language.max_length, written[name], answers.get(name)) for name in SHARES}
    columns["train"]["source"] = source
    facts = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    facts |= {"vocab_size": len(tokenizer), "max_length": language.max_length, "max_target_length": TARGET_LENGTH}
    read_answers = functools.partial(tokenizer.batch_decode, skip_special_tokens=True)
    read = functools.partial(sequence_answers, _reader(columns, written), read_answers, decoding(facts))
    return DataBundle(
        **streams(columns, batch_size, validation_batch_size, SCORING_BATCH_SIZE),
        sizes=sizes,
        facts={**facts, "num_examples": num_train, "num_sources": num_sources},
        tokenizer=tokenizer,
        source_names=tuple(f"source {i + 1}" for i in range(num_sources)),
        good_sources=good_sources,
        is_clean=torch.tensor([given == date for given, date in zip(answers["train"], right, strict=True)]),
        score=functools.partial(sequence_score, **decoding(facts)),
        selection_metric="exact_match",
        answers=functools.partial(shown, read),
    )


class Written(NamedTuple):
    """A date, and how somebody wrote it."""

    date: datetime.date
    locale: str
    text: str

    @property
    def model_input(self) -> str:
        """The text after the tag of its locale."""
        return f"<{self.locale}> {self.text}"

    def __str__(self) -> str:
        return f"{self.text} ({self.locale})"


def iso(date: datetime.date, swap: bool = False) -> str:
    """Return `2021-03-05`, or with day and month swapped `2021-05-03`."""
    first, second = (date.day, date.month) if swap else (date.month, date.day)
    return f"{date.year:04d}-{first:02d}-{second:02d}"


def is_telling(date: datetime.date) -> bool:
    """Return whether swapping day and month makes another date that is as possible as this one."""
    return date.day <= 12 and date.day != date.month


class Language:
    """The ways in which dates of the years from the first to the last are written, by babel's locales and formats.

    Raises:
        ConfigError: an unknown locale or format, or years that two digits cannot tell apart.
    """

    def __init__(self, locales: Sequence[str], formats: Sequence[str], first_year: int, last_year: int) -> None:
        for name, given in (("locales", locales), ("formats", formats)):
            if isinstance(given, str) or not given:
                raise ConfigError(f"dates: {name}={given!r} must be a list with at least one entry")
        for form in formats:
            if form not in FORMATS:
                raise ConfigError(f"dates: formats: no format {form!r}{did_you_mean(form, FORMATS)}")
        for locale in locales:
            try:
                Locale.parse(locale)
            except (UnknownLocaleError, ValueError, TypeError) as error:
                raise ConfigError(f"dates: locales: babel has no locale {locale!r}; write 'en_GB' or 'de'") from error
        if not (1000 <= first_year <= last_year <= 9999 and last_year - first_year < MAX_YEARS):
            raise ConfigError(
                f"dates: first_year={first_year}, last_year={last_year}: give years in order from 1000 to 9999, and "
                f"{MAX_YEARS} at most, since some formats write only the last two digits"
            )
        self.locales, self.formats = tuple(locales), tuple(formats)
        first, end = datetime.date(first_year, 1, 1), datetime.date(last_year, 12, 31)
        self.calendar = [first + datetime.timedelta(days=n) for n in range((end - first).days + 1)]
        # every month and weekday: all words that can occur, and the longest inputs
        days = [datetime.date(2001, month, day) for month in range(1, 13) for day in range(8, 15)]
        every = itertools.product(days, self.locales, self.formats)
        samples = [_tokens(self.write(*sample).model_input) for sample in every]
        self.words, self.max_length = set(itertools.chain(*samples)), max(map(len, samples))

    def write(self, date: datetime.date, locale: str, form: str) -> Written:
        """Return the date in one locale and format."""
        return Written(date, locale, format_date(date, form, locale=locale))

    def draw(self, dates: Sequence[datetime.date], count: int, rng: random.Random) -> list[Written]:
        """Return `count` of these dates, each in a locale and a format drawn at random."""
        drawn = rng.choices(dates, k=count)
        return [self.write(date, rng.choice(self.locales), rng.choice(self.formats)) for date in drawn]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer of all that can be written here; it depends on locales and formats only."""
        digits = [str(n) for n in range(10)] + [f"{n:02d}" for n in range(100)] + [f"-{n:02d}" for n in range(1, 32)]
        return word_tokenizer([*digits, *sorted(self.words.difference(digits))], SPLITTER, NORMALIZER)


def _tokens(text: str) -> list[str]:
    return [token for token, _ in SPLITTER.pre_tokenize_str(NORMALIZER.normalize_str(text))]


def _good_sources(num_sources: int, num_bad: int, rng: random.Random) -> Tensor:
    if num_bad not in range(num_sources + 1):
        raise ConfigError(f"dates: num_bad_sources={num_bad!r} must lie between 0 and num_sources={num_sources}")
    good = torch.ones(num_sources, dtype=torch.bool)
    good[rng.sample(range(num_sources), num_bad)] = False
    return good


def _wrong_answers(right: Sequence[str], noise: float, rng: random.Random) -> list[str]:
    """Return the answers, a fraction `noise` of them another one's date."""
    check_fraction("dates", noise=noise)
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
    tokenizer: PreTrainedTokenizerFast, max_length: int, examples: Sequence[Written], answers: list[str] | None
) -> dict[str, Tensor]:
    """Return inputs [N, L], and `labels` [N, 5] with the end token, `decoder_input_ids` [N, 5] with the begin token."""
    texts = [example.model_input for example in examples]
    encoded = tokenizer(texts, padding="max_length", max_length=max_length, return_tensors="pt")
    columns = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    if answers is not None:
        ids = tokenizer(answers)["input_ids"]
        whole = torch.tensor([[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in ids])
        columns |= {"labels": whole[:, 1:].contiguous(), "decoder_input_ids": whole[:, :-1].contiguous()}
    return columns


def _reader(
    columns: Mapping[str, Mapping[str, Tensor]], written: Mapping[str, Sequence[Written]]
) -> Callable[[Tensor], list[str]]:
    """Return what tells inputs as they were written, which their tokens do not."""
    texts = {
        tuple(ids): str(example)
        for name, examples in written.items()
        for ids, example in zip(columns[name]["input_ids"].tolist(), examples, strict=True)
    }
    return lambda rows: [texts[tuple(row)] for row in rows.tolist()]
