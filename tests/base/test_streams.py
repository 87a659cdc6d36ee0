"""Batch streams: endless, resumable anywhere, and blind to what others draw."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler

from metaopt.base.errors import ConfigError
from metaopt.base.streams import BatchStream

# Workers are forked, which later Pythons warn of where a library has started threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

EXAMPLES: Any = list(range(10))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Augmented(list):
    """Examples that come with noise from torch, numpy and random."""

    def __getitem__(self, index: Any) -> Any:
        noise = float(torch.rand(())), float(np.random.rand()), random.random()
        return torch.tensor([float(super().__getitem__(index)), *noise], dtype=torch.float64)


class Counted(IterableDataset):
    """An iterable data set in an order that it draws itself."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(10).tolist())


LOADERS: dict[str, Any] = {
    "list": lambda: [torch.tensor([i]) for i in range(4)],
    "in order": lambda: DataLoader(EXAMPLES, 3),
    "shuffled": lambda: DataLoader(EXAMPLES, 3, shuffle=True),
    "own generator": lambda: DataLoader(EXAMPLES, 3, shuffle=True, generator=generator()),
    "sampler's generator": lambda: DataLoader(EXAMPLES, 3, sampler=RandomSampler(EXAMPLES, generator=generator())),
    "weighted": lambda: DataLoader(
        EXAMPLES, 3, sampler=WeightedRandomSampler(list(range(1, 11)), 7, generator=generator())
    ),
    "augmented": lambda: DataLoader(cast(Any, Augmented(EXAMPLES)), 3, shuffle=True),
    "iterable": lambda: DataLoader(Counted(), 3),
    "workers": lambda: DataLoader(EXAMPLES, 3, shuffle=True, num_workers=1),
}


@pytest.fixture(params=LOADERS)
def make(request: pytest.FixtureRequest) -> Any:
    return LOADERS[request.param]


def taken(stream: BatchStream, count: int) -> list[Any]:
    """The next batches; the stream moves on."""
    found = [batch.tolist() for batch in stream.peek(count)]
    stream.advance(count)
    return found


def test_looking_ahead_moves_nothing_and_keeps_what_was_seen(make):
    stream, plain = BatchStream(make(), seed=1), BatchStream(make(), seed=1)
    expected = taken(plain, 9)
    ahead = stream.peek(6)
    assert [batch.tolist() for batch in ahead] == expected[:6]
    assert all(a is b for a, b in zip(stream.peek(6), ahead, strict=True))
    assert stream.state_dict()["position"] == 0
    stream.advance(2)
    assert stream.peek(1)[0] is ahead[2]
    assert taken(stream, 7) == expected[2:]


@pytest.mark.sampled(3)
def test_a_stream_resumes_anywhere_bitwise(make):
    """In the middle of an epoch, at its end, and with batches looked at that were not passed."""
    expected = taken(BatchStream(make(), seed=1), 14)
    stream, place = BatchStream(make(), seed=1), 0
    for count in (0, 1, 3, 4, 6):
        assert taken(stream, count) == expected[place : place + count]
        place += count
        state = copy.deepcopy(stream.state_dict())
        stream.peek(3)
        assert str(stream.state_dict()) == str(state)
        torch.manual_seed(count)
        resumed = BatchStream(make(), seed=99)
        resumed.peek(2)
        resumed.load_state_dict(state)
        assert taken(resumed, 14 - place) == expected[place:]


def test_global_random_states_and_the_users_generators_are_left_alone(make):
    loader = make()
    sampler = getattr(loader, "sampler", None)
    own = [g for g in (getattr(loader, "generator", None), getattr(sampler, "generator", None)) if g is not None]
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state()), [g.get_state() for g in own]
    taken(BatchStream(loader, seed=1), 9)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(np.random.get_state()) == before[2]
    assert all(torch.equal(g.get_state(), state) for g, state in zip(own, before[3], strict=True))


def test_two_streams_over_one_loader_do_not_disturb_each_other(make):
    loader = make()
    alone = [taken(BatchStream(make(), seed), 8) for seed in (1, 2)]
    first, second = BatchStream(loader, 1), BatchStream(loader, 2)
    found: tuple[list[Any], list[Any]] = ([], [])
    for _ in range(4):
        found[0].extend(taken(first, 2))
        found[1].extend(taken(second, 2))
    assert [found[0], found[1]] == alone


def test_every_epoch_has_every_example_in_an_order_of_its_own():
    stream = BatchStream(LOADERS["shuffled"](), seed=1)
    epochs = [sum(taken(stream, 4), []) for _ in range(3)]  # noqa: RUF017
    assert [sorted(epoch) for epoch in epochs] == [EXAMPLES] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = BatchStream(LOADERS["shuffled"](), seed=2)
    assert sum(taken(other, 4), []) != epochs[0]  # noqa: RUF017


def test_a_list_is_cycled():
    assert taken(BatchStream([torch.tensor(i) for i in range(3)], 0), 8) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_augmentation_differs_from_batch_to_batch():
    noise = [row[1:] for batch in taken(BatchStream(LOADERS["augmented"](), 1), 8) for row in batch]
    assert len({tuple(values) for values in noise}) == len(noise) == 20


REFUSED: dict[str, tuple[Any, str]] = {
    "an iterator": (iter([1]), "a list_iterator can be read only once"),
    "a loader's iterator": (iter(DataLoader(EXAMPLES, 3)), "can be read only once, .* instead of iter"),
    "a mapping": ({"inputs": torch.ones(1)}, "a dict is no series of batches; give a list"),
    "a number": (3, "a int is no series of batches"),
    "persistent workers": (
        DataLoader(EXAMPLES, 3, num_workers=1, persistent_workers=True),
        "set persistent_workers=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cycled_or_resumed_is_refused(case):
    batches, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        BatchStream(batches, 0)


@pytest.mark.parametrize("batches", [[], DataLoader(EXAMPLES, 30, drop_last=True)], ids=["empty", "drop_last"])
def test_an_empty_series_is_refused_when_it_is_read(batches):
    with pytest.raises(ConfigError, match="not a single batch; check the data set and drop_last"):
        BatchStream(batches, 0).peek(1)


def test_an_exception_in_the_data_set_leaves_random_states_alone():
    class Broken(list):
        def __getitem__(self, index: Any) -> Any:
            raise OSError(f"disk {torch.rand(3)} {np.random.rand()} {random.random()}")

    own = generator()
    before = torch.get_rng_state(), random.getstate(), own.get_state()
    with pytest.raises(OSError, match="disk"):
        BatchStream(DataLoader(cast(Any, Broken(EXAMPLES)), 3, shuffle=True, generator=own), 0).peek(1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.equal(own.get_state(), before[2])
