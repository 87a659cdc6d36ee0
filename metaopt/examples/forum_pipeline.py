"""Numbers in words → digits, some of the training answers being another number: pairs for the forum's pipeline."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metaopt.base.errors import ConfigError
from metaopt.base.ranges import check_counts, check_fraction
from metaopt.data.bundle import DataBundle
from metaopt.data.rows import streams
from metaopt.data.text_tokens import decoding
from metaopt.losses.decoding import sequence_answers, sequence_score, shown

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ONES += ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
TOKENS = ["<pad>", "<s>", "</s>", *"0123456789", *ONES, *TENS, "hundred"]
PAD, BOS, EOS = range(3)
DIGITS, WORDS = 3, 4  # of the longest number: `nine hundred ninety nine`


def in_words(number: int) -> str:
    """Return a number from 0 to 999 in English: 742 is `seven hundred forty two`."""
    hundreds, rest = divmod(number, 100)
    words = [ONES[hundreds], "hundred"] if hundreds else []
    if rest >= len(ONES):
        words += [TENS[rest // 10 - 2]]
        rest %= 10
    return " ".join([*words, ONES[rest]] if rest or not words else words)


def number_words(
    noise: float = 0.5,
    num_train: int = 500,
    num_validation: int = 150,
    num_selection: int = 100,
    num_test: int = 250,
    batch_size: int = 100,
    validation_batch_size: int = 150,
    seed: int = 0,
) -> DataBundle:
    """Return numbers from 0 to 999 in words with their three digits: `forty two` is `0 4 2`.

    Of the training pairs a fraction `noise` has the digits of another number. The unlabelled stream holds the training
    inputs without an answer; otherwise each number belongs to one stream.

    Raises:
        ConfigError: an argument is out of range, or there are not as many numbers.
    """
    sizes = {"train": num_train, "validation": num_validation, "selection": num_selection, "test": num_test}
    check_counts("number_words", batch_size=batch_size, validation_batch_size=validation_batch_size, **sizes)
    check_fraction("number_words", noise=noise)
    total = sum(sizes.values())
    if total > 10**DIGITS:
        raise ConfigError(f"number_words: {total} examples in all; there are only {10**DIGITS} numbers")
    rng = random.Random(seed)
    drawn = iter(rng.sample(range(10**DIGITS), total))
    numbers = {name: list(itertools.islice(drawn, size)) for name, size in sizes.items()}
    right, given = numbers["train"], list(numbers["train"])
    for i in rng.sample(range(num_train), round(noise * num_train)):
        given[i] = (given[i] + rng.randrange(1, 10**DIGITS)) % 10**DIGITS
    columns = {name: _inputs(found) | _targets(found) for name, found in numbers.items()}
    columns |= {"train": _inputs(right) | _targets(given), "unlabelled": _inputs(right)}
    facts = {"vocab_size": len(TOKENS), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    facts |= {"max_length": WORDS, "max_target_length": DIGITS + 1, "num_examples": num_train}
    read = functools.partial(sequence_answers, _read(" "), _read(""), decoding(facts))
    return DataBundle(
        **streams(columns, batch_size, validation_batch_size, 500),
        sizes={**sizes, "unlabelled": num_train},
        facts=facts,
        is_clean=torch.tensor([a == b for a, b in zip(right, given, strict=True)]),
        score=functools.partial(sequence_score, **decoding(facts)),
        selection_metric="token_accuracy",
        answers=functools.partial(shown, read),
    )


def _inputs(numbers: Sequence[int]) -> dict[str, Tensor]:
    rows = [[TOKENS.index(word, EOS + 1) for word in in_words(number).split()] for number in numbers]
    ids = torch.tensor([row + [PAD] * (WORDS - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def _targets(numbers: Sequence[int]) -> dict[str, Tensor]:
    digits = [[TOKENS.index(digit) for digit in f"{number:0{DIGITS}d}"] for number in numbers]
    whole = torch.tensor([[BOS, *row, EOS] for row in digits])
    return {"labels": whole[:, 1:].contiguous(), "decoder_input_ids": whole[:, :-1].contiguous()}


def _read(between: str) -> Callable[[Tensor], list[str]]:
    return lambda rows: [between.join(TOKENS[token] for token in row if token > EOS) for row in rows.tolist()]
