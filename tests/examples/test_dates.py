"""The dates task: what is written, what is right, who errs, and how it is scored."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaopt import ConfigError, DataBundle
from metaopt.examples.dates import FORMATS, LOCALES, TARGET_LENGTH, Language, dates, is_telling, iso
from metaopt.losses.decoding import greedy_decode, sequence_score

SMALL: dict[str, Any] = {
    "num_train": 240,
    "num_unlabelled": 100,
    "num_validation": 60,
    "num_selection": 40,
    "num_test": 50,
    "batch_size": 16,
    "validation_batch_size": 20,
    "first_year": 2010,
    "last_year": 2013,
}
STREAMS = ("train", "unlabelled", "validation", "selection", "test")


def rows(data: DataBundle, stream: str) -> dict[str, Tensor]:
    """All examples of a stream, in the order of its data set."""
    return dict(data.stream(stream).dataset.columns)  # type: ignore[attr-defined]


def read(data: DataBundle, ids: Tensor) -> list[str]:
    return data.tokenizer.batch_decode(ids, skip_special_tokens=True)


class Oracle(nn.Module):
    """Answers what it was told for each input, right or wrong."""

    def __init__(self, data: DataBundle, answers: dict[str, Tensor]) -> None:
        super().__init__()
        self.vocab_size = data.facts["vocab_size"]
        ids, labels = answers["input_ids"].tolist(), answers["labels"]
        self.known = {tuple(row): label for row, label in zip(ids, labels, strict=True)}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        labels = torch.stack([self.known[tuple(row)] for row in input_ids.tolist()])
        return nn.functional.one_hot(labels[:, : decoder_input_ids.shape[1]], self.vocab_size).float()


# --- how dates are written --------------------------------------------------------------------------------------


def test_a_date_is_written_as_babel_writes_it() -> None:
    language = Language(LOCALES, FORMATS, 2000, 2029)
    day = datetime.date(2021, 3, 5)
    texts = {(locale, form): language.write(day, locale, form).text for locale in LOCALES for form in FORMATS}
    assert texts["en_US", "long"] == "March 5, 2021"
    assert texts["it", "full"] == "venerdì 5 marzo 2021"
    assert texts["en_US", "short"] == "3/5/21"
    assert texts["en_GB", "short"] == "05/03/2021"


@pytest.mark.parametrize("locales", [LOCALES, ("ja", "ar", "th", "hu", "pl")])
def test_every_date_is_inside_the_vocabulary_and_the_length(locales: tuple[str, ...]) -> None:
    language = Language(locales, FORMATS, 2019, 2020)
    tokenizer = language.tokenizer()
    written = [language.write(d, lo, f).model_input for d in language.calendar[::3] for lo in locales for f in FORMATS]
    ids = tokenizer(written)["input_ids"]
    assert len(written) > 4000
    assert max(map(len, ids)) <= language.max_length
    assert not any(tokenizer.unk_token_id in row for row in ids)


def test_an_iso_date_is_four_tokens_and_reads_back() -> None:
    language = Language(LOCALES, FORMATS, 2000, 2029)
    tokenizer = language.tokenizer()
    texts = [iso(day, swap) for day in language.calendar[::7] for swap in (False, True)]
    ids = tokenizer(texts)["input_ids"]
    assert {len(row) for row in ids} == {TARGET_LENGTH - 1}
    assert tokenizer.batch_decode(ids) == texts
    assert tokenizer.convert_ids_to_tokens(tokenizer("2021-03-05")["input_ids"]) == ["20", "21", "-03", "-05"]


def test_the_numeric_formats_differ_by_their_locale_only() -> None:
    language = Language(("en_US", "es"), ("short",), 2000, 2029)
    third_of_april, fourth_of_march = datetime.date(2021, 4, 3), datetime.date(2021, 3, 4)
    american, spanish = language.write(third_of_april, "en_US", "short"), language.write(fourth_of_march, "es", "short")
    assert american.text == spanish.text == "4/3/21"
    assert american.model_input != spanish.model_input


def test_the_vocabulary_does_not_depend_on_seed_size_or_years() -> None:
    changes: dict[str, Any] = {"seed": 5, "num_train": 50, "first_year": 1990, "last_year": 1991}
    one, other = dates(**SMALL), dates(**SMALL | changes)
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


# --- streams ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("corruption", ["sources", "random", "none"])
def test_no_date_is_in_two_streams(corruption: str) -> None:
    locales = ("en_US", "fr")
    data = dates(corruption, locales=locales, **SMALL)
    # Answers cannot tell (the unlabelled stream has none, the training ones lie): the text as written does.
    language = Language(locales, FORMATS, SMALL["first_year"], SMALL["last_year"])
    dates_of: dict[tuple[int, ...], datetime.date] = {}
    for locale in locales:
        for form in FORMATS:
            days = language.calendar
            ids = data.tokenizer([language.write(day, locale, form).model_input for day in days])["input_ids"]
            dates_of.update({tuple(row): day for row, day in zip(ids, days, strict=True)})
    found = {}
    for name in STREAMS:
        columns = rows(data, name)
        inputs = zip(columns["input_ids"].tolist(), columns["attention_mask"].sum(1).tolist(), strict=True)
        found[name] = {dates_of[tuple(row[:length])] for row, length in inputs}
        assert found[name]
    assert sum(map(len, found.values())) == len(set().union(*found.values()))


def test_batches_carry_what_each_stream_promises() -> None:
    data = dates(**SMALL)
    inputs, answers = {"input_ids", "attention_mask"}, {"labels", "decoder_input_ids"}
    expected = {
        "train": inputs | answers | {"index", "source"},
        "unlabelled": inputs | {"index"},
        "validation": inputs | answers,
        "selection": inputs | answers,
        "test": inputs | answers,
    }
    for name, keys in expected.items():
        batch = next(iter(data.stream(name)))
        assert set(batch) == keys, name
        assert {value.dtype for value in batch.values()} == {torch.int64}
        assert batch["input_ids"].shape[1] == data.facts["max_length"]
        assert len(rows(data, name)["input_ids"]) == data.sizes[name] == SMALL[f"num_{name}"]
    assert next(iter(data.train))["labels"].shape == (16, TARGET_LENGTH)
    assert next(iter(data.validation))["labels"].shape == (20, TARGET_LENGTH)


def test_the_decoder_input_is_the_answer_one_token_later() -> None:
    data = dates(**SMALL)
    columns = rows(data, "train")
    assert (columns["decoder_input_ids"][:, 0] == data.facts["bos_token_id"]).all()
    assert torch.equal(columns["decoder_input_ids"][:, 1:], columns["labels"][:, :-1])
    assert (columns["labels"][:, -1] == data.facts["eos_token_id"]).all()


def test_index_counts_the_training_examples() -> None:
    data = dates(**SMALL)
    seen = torch.cat([batch["index"] for batch in data.train])
    assert len(seen.unique()) == SMALL["num_train"] == data.facts["num_examples"]
    batch, columns = next(iter(data.train)), rows(data, "train")
    assert all(torch.equal(value, columns[key][batch["index"]]) for key, value in batch.items())


def test_the_order_follows_torchs_generator_and_changes_between_epochs() -> None:
    data = dates(**SMALL)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append([torch.cat([batch["index"] for batch in data.train]).tolist() for _ in range(2)])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0][0] != orders[0][1]


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data() -> None:
    one, same, other = (rows(dates(seed=seed, **SMALL), "train") for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["input_ids"], other["input_ids"])


# --- corruption -------------------------------------------------------------------------------------------------


def right_answers(data: DataBundle, **options: Any) -> list[str]:
    """The training answers when nothing is corrupted: the same dates, drawn by the same seed."""
    clean = dates("none", **SMALL | options)
    assert torch.equal(rows(clean, "train")["input_ids"], rows(data, "train")["input_ids"])
    return read(clean, rows(clean, "train")["labels"])


def test_bad_sources_swap_day_and_month_and_good_ones_do_not() -> None:
    data = dates(**SMALL)
    assert data.good_sources is not None
    assert data.is_clean is not None
    assert (len(data.good_sources), int(data.good_sources.sum())) == (8, 3)
    assert len(data.source_names) == data.facts["num_sources"] == 8
    columns, right = rows(data, "train"), right_answers(data)
    for given, answer, source, clean in zip(
        read(data, columns["labels"]), right, columns["source"].tolist(), data.is_clean.tolist(), strict=True
    ):
        swapped = iso(datetime.date.fromisoformat(answer), swap=True)
        assert given == (answer if data.good_sources[source] else swapped)
        assert clean == (given == answer)
    assert torch.bincount(columns["source"]).tolist() == [30] * 8


def test_the_seed_draws_which_sources_are_bad() -> None:
    masks = {tuple(dates(seed=seed, **SMALL).good_sources.tolist()) for seed in range(4)}  # type: ignore[union-attr]
    assert len(masks) > 1


def test_a_swap_matters_wherever_models_are_scored() -> None:
    data, plain = dates(**SMALL), dates("none", **SMALL)
    for name in ("validation", "selection", "test"):
        days = [datetime.date.fromisoformat(text) for text in read(data, rows(data, name)["labels"])]
        assert all(map(is_telling, days))
        days = [datetime.date.fromisoformat(text) for text in read(plain, rows(plain, name)["labels"])]
        assert not all(map(is_telling, days))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("noise", [0.0, 0.25, 1.0])
def test_random_corruption_makes_exactly_the_asked_fraction_wrong(noise: float) -> None:
    data = dates("random", noise=noise, **SMALL)
    given, right = read(data, rows(data, "train")["labels"]), right_answers(data)
    wrong = [a != b for a, b in zip(given, right, strict=True)]
    assert data.is_clean is not None
    assert sum(wrong) == round(noise * SMALL["num_train"])
    assert data.is_clean.tolist() == [not w for w in wrong]
    assert data.good_sources is None
    assert all(datetime.date.fromisoformat(text) for text in given)


def test_none_leaves_every_answer_right() -> None:
    data = dates("none", **SMALL)
    assert data.is_clean is not None
    assert data.is_clean.all()


# --- scoring ----------------------------------------------------------------------------------------------------


def test_score_of_right_and_of_swapped_answers() -> None:
    data = dates(**SMALL)
    assert data.score is not None
    right = rows(data, "test")
    assert data.score(Oracle(data, right), data.test) == {"exact_match": 1.0, "token_accuracy": 1.0}
    swapped = {**right, "labels": right["labels"][:, [0, 1, 3, 2, 4]]}
    assert data.score(Oracle(data, swapped), data.test) == {"exact_match": 0.0, "token_accuracy": pytest.approx(0.6)}


def test_score_counts_each_example_once_over_unequal_batches() -> None:
    data = dates(**SMALL)
    columns = rows(data, "test")
    labels = columns["labels"].clone()
    labels[:10] = labels[:10][:, [0, 1, 3, 2, 4]]
    parts = [slice(0, 7), slice(7, 8), slice(8, 50)]
    batches = [{key: value[part] for key, value in columns.items()} for part in parts]
    assert data.score is not None
    score = data.score(Oracle(data, {**columns, "labels": labels}), batches)
    assert score == {"exact_match": pytest.approx(0.8), "token_accuracy": pytest.approx(0.92)}


def test_score_of_nothing_is_an_error() -> None:
    data = dates(**SMALL)
    assert data.score is not None
    with pytest.raises(ConfigError, match="not a single batch"):
        data.score(Oracle(data, rows(data, "test")), [])


def test_answers_show_input_right_answer_and_given_answer() -> None:
    data = dates(**SMALL)
    assert data.answers is not None
    right = rows(data, "test")
    swapped = {**right, "labels": right["labels"][:, [0, 1, 3, 2, 4]]}
    answers = data.answers(Oracle(data, swapped), data.test, 6)
    language = Language(LOCALES, FORMATS, SMALL["first_year"], SMALL["last_year"])
    assert len(answers) == 6
    for written, wanted, given in answers:
        day = datetime.date.fromisoformat(wanted)
        assert written in {str(language.write(day, locale, form)) for locale in LOCALES for form in FORMATS}
        assert given == iso(day, swap=True)
    assert [wanted for _, wanted, _ in answers] == read(data, right["labels"][:6])


def test_greedy_decoding_stops_each_answer_at_its_end_and_fills_the_rest() -> None:
    pad, bos, eos = 0, 1, 2
    script = torch.tensor([[5, eos, 6, 7], [5, 6, 7, 8], [eos, 5, 5, 5]])

    def model(input_ids: Tensor, attention_mask: Tensor | None, decoder_input_ids: Tensor) -> Tensor:
        assert (decoder_input_ids[:, 0] == bos).all()
        return nn.functional.one_hot(script[:, : decoder_input_ids.shape[1]], 9).float()

    answers = greedy_decode(model, torch.zeros(3, 2, dtype=torch.int64), None, bos, eos, pad, max_length=4)
    assert answers.tolist() == [[5, eos, pad, pad], [5, 6, 7, 8], [eos, pad, pad, pad]]


def test_labels_that_are_shorter_than_the_answer_do_not_match_by_their_beginning() -> None:
    batch = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "labels": torch.tensor([[5, 2, -100]])}
    tokens = {"bos": 1, "eos": 2, "pad": 0, "max_length": 4}

    def answering(*script: int) -> Any:
        table = torch.tensor([script])
        return lambda input_ids, decoder_input_ids=None, attention_mask=None: nn.functional.one_hot(
            table[:, : 3 if decoder_input_ids is None else decoder_input_ids.shape[1]], 9
        ).float()

    assert sequence_score(answering(5, 2, 8, 8), [batch], **tokens) == {"exact_match": 1.0, "token_accuracy": 1.0}
    assert sequence_score(answering(5, 6, 2, 8), [batch], **tokens)["exact_match"] == 0.0


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruption": "source"}, "'source'.*did you mean 'sources'"),
        ({"corruption": 1.5}, "no corruption 1.5"),
        ({"corruption": "random", "noise": 1.5}, r"noise=1\.5 must be a fraction between 0 and 1"),
        ({"corruption": "random", "noise": -0.1}, "noise=-0.1"),
        ({"corruption": "random", "noise": "much"}, "noise='much'"),
        ({"noise": 0.3}, "noise=0.3 is for corruption='random'; here it is 'sources'"),
        ({"corruption": "none", "num_bad_sources": 2}, "num_bad_sources=2 is for corruption='sources'"),
        ({"num_bad_sources": 9}, "num_bad_sources=9 must lie between 0 and num_sources=8"),
        ({"num_sources": 0}, "num_sources=0"),
        ({"num_train": 0}, "num_train=0 must be a whole number of at least 1"),
        ({"num_test": 2.5}, "num_test=2.5"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"locales": ["de", "klingon"]}, "babel has no locale 'klingon'"),
        ({"locales": []}, "locales="),
        ({"locales": "de"}, "locales='de' must be a list"),
        ({"formats": ["ful"]}, "'ful'.*did you mean 'full'"),
        ({"first_year": 2013, "last_year": 2010}, "first_year=2013, last_year=2010"),
        ({"first_year": 1900, "last_year": 2000}, "100 at most"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dates(**SMALL | options)
