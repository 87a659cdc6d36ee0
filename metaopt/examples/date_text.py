"""How dates are written: locales and formats by `babel`, and a tokenizer for the result."""

from __future__ import annotations

import datetime
import random
from collections.abc import Sequence
from typing import NamedTuple

from babel import Locale, UnknownLocaleError
from babel.dates import format_date
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metaopt.base.errors import ConfigError, did_you_mean

FORMATS = ("short", "medium", "long", "full")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TARGET_LENGTH = 5  # tokens of an ISO date: century, year, -month, -day, end
MAX_YEARS = 100  # two digits tell that many years apart

# A locale's tag, month and day of an ISO date with their hyphen, two digits or one, a word, any other sign.
TOKENS = r"<\w+>|(?<=\d{4})-\d{2}|(?<=\d{4}-\d{2})-\d{2}|\d{2}|\d|[^\W\d]+|[^\w\s]"


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
    """The ways in which dates are written here.

    Args:
        locales: of babel, such as `en_GB`.
        formats: of `short`, `medium`, `long`, `full`.
        first_year, last_year: the years that can occur, both included.

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
                f"dates: first_year={first_year}, last_year={last_year}: give years between 1000 and 9999, the first "
                f"not after the last, and {MAX_YEARS} at most, since some formats write only the last two digits"
            )
        self.locales, self.formats = tuple(locales), tuple(formats)
        first, end = datetime.date(first_year, 1, 1), datetime.date(last_year, 12, 31)
        self.calendar = [first + datetime.timedelta(days=n) for n in range((end - first).days + 1)]

    def write(self, date: datetime.date, locale: str, form: str) -> Written:
        """Return the date in one locale and format."""
        return Written(date, locale, format_date(date, form, locale=locale))

    def draw(self, dates: Sequence[datetime.date], count: int, rng: random.Random) -> list[Written]:
        """Return `count` of these dates, each in a locale and a format drawn at random."""
        drawn = rng.choices(dates, k=count)
        return [self.write(date, rng.choice(self.locales), rng.choice(self.formats)) for date in drawn]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer of all that can be written here; it depends on locales and formats only."""
        digits = [str(n) for n in range(10)] + [f"{n:02d}" for n in range(100)]
        hyphened = [f"-{n:02d}" for n in range(1, 32)]
        words = {token for text in self._samples() for token in _split(text)}
        vocabulary = [*SPECIAL.values(), *digits, *hyphened]
        vocabulary += sorted(words.difference(vocabulary))
        tokenizer = Tokenizer(
            models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=SPECIAL["unk_token"])
        )
        tokenizer.normalizer = _NORMALIZER
        tokenizer.pre_tokenizer = _SPLITTER
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)

    @property
    def max_length(self) -> int:
        """Tokens of the longest input."""
        return max(len(_split(text)) for text in self._samples())

    def _samples(self) -> list[str]:
        """Every month and weekday in every locale and format: all words that can occur, and the longest inputs."""
        days = [datetime.date(2001, month, day) for month in range(1, 13) for day in range(8, 15)]
        return [
            self.write(day, locale, form).model_input
            for locale in self.locales
            for form in self.formats
            for day in days
        ]


_NORMALIZER = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
_SPLITTER = pre_tokenizers.Split(Regex(TOKENS), behavior="removed", invert=True)


def _split(text: str) -> list[str]:
    return [token for token, _ in _SPLITTER.pre_tokenize_str(_NORMALIZER.normalize_str(text))]
