"""The batches of an unroll, looked up or drawn again: the same as those that are held, whatever step asks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from small import example_weights, feature_batches, one_stage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

import metaopt
from metaopt.base.streams import Ahead, BatchStream
from metaopt.core import stage
from metaopt.core.stage import _batches_ahead
from metaopt.estimators import Checkpointed, Unrolled

# Workers are forked, which later Pythons warn of where a library has started threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
STEPS, PER_STEP = 9, 2


class Drawing(Dataset[Tensor]):
    """Twelve examples, each beside a random number; it counts how often one is drawn."""

    draws = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        self.draws += 1
        return torch.tensor([index, random.random()])


LOADERS: dict[str, Any] = {
    "list": lambda: [torch.tensor([i]) for i in range(4)],
    "in order": lambda: DataLoader(Drawing(), 3),
    "shuffled": lambda: DataLoader(Drawing(), 3, shuffle=True),
    "own generator": lambda: DataLoader(
        Drawing(), 3, sampler=RandomSampler(Drawing(), generator=torch.Generator().manual_seed(7))
    ),
}


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    monkeypatch.setattr(stage, "MOST_HELD", 0)


def ahead(stream: BatchStream, num_steps: int = STEPS) -> Any:
    return _batches_ahead(stream, num_steps, PER_STEP, torch.zeros((), dtype=torch.float64))


def values(step: list[Tensor]) -> list[Any]:
    return [batch.tolist() for batch in step]


@pytest.mark.parametrize("start", [0, 3, 4, 6])
@pytest.mark.parametrize("name", LOADERS)
def test_a_step_gets_its_own_batches_as_often_as_it_asks(name, start):
    """From anywhere in an epoch, in any order; the stream stays where it is."""
    stream = BatchStream(LOADERS[name](), seed=1)
    stream.advance(start)
    place, batches = str(stream.state_dict()), ahead(stream)
    assert isinstance(batches, Ahead)
    assert bool(batches.source) == (name == "list")
    found = [values(step) for step in batches]
    order = [*reversed(range(STEPS)), *random.Random(0).choices(range(STEPS), k=30)]
    assert [values(batches[t]) for t in order] == [found[t] for t in order]
    assert str(stream.state_dict()) == place
    assert [batch for step in found for batch in step] == [b.tolist() for b in stream.peek(STEPS * PER_STEP)]
    assert len(batches) == len(found) == STEPS


def test_worker_processes_are_not_started_again():
    stream = BatchStream(DataLoader(Drawing(), 3, num_workers=1), seed=1)
    assert isinstance(ahead(stream, 3), list)


def test_an_epoch_is_drawn_again_once_by_a_sweep():
    data = Drawing()
    batches = ahead(BatchStream(DataLoader(data, 3, shuffle=True), seed=1), 10)  # five epochs
    data.draws = 0
    list(batches)
    assert data.draws == 5 * 12
    for t in reversed(range(10)):
        assert len(batches[t]) == PER_STEP
    assert data.draws == 9 * 12  # the last is held yet


def test_no_more_than_an_epoch_is_held():
    batches: Any = ahead(BatchStream(LOADERS["shuffled"](), seed=1), 20)
    for t in (*range(20), *reversed(range(20))):
        assert len(batches[t]) == PER_STEP
        assert len(batches._look_up._held) <= 4


@pytest.mark.parametrize("kind", ["list", "shuffled"])
def test_there_must_be_a_batch(kind):
    nothing: Any = []
    empty: Any = nothing if kind == "list" else DataLoader(nothing, 3)
    with pytest.raises(metaopt.ConfigError, match="not a single batch"):
        ahead(BatchStream(empty, seed=1))


# --- in a chain


def loader(examples: int = 15) -> Any:
    """The examples of three batches, in another order in each epoch."""
    each = {key: torch.cat([batch[key] for batch in feature_batches()]) for key in ("inputs", "labels", "index")}
    rows: Any = [{key: value[i] for key, value in each.items()} for i in range(examples)]
    return DataLoader(rows, 5, shuffle=True)


def hypergradient(estimator: Any, **options: Any) -> Any:
    phi = example_weights()
    chain = one_stage(batches=loader(), num_steps=11, accumulate=2, estimator=estimator, **options)
    chain.commit(chain.unroll(phi))  # so that the next goes on in the middle of an epoch
    trained = chain.unroll(phi)
    return metaopt.hypergradient(metaopt.ValidationLoss("only")(trained, feature_batches(1, 8)[0], phi), phi)


def test_the_hypergradient_is_that_of_held_batches(monkeypatch):
    few = Checkpointed(store="recompute", num_states=2)
    found = hypergradient(few)
    monkeypatch.setattr(stage, "MOST_HELD", 1000)
    for estimator in (few, Unrolled()):
        torch.testing.assert_close(found, hypergradient(estimator), rtol=1e-12, atol=1e-15)


def test_a_batch_that_the_loss_changes_in_place_is_refused():
    def changing(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        batch["inputs"].add_(1.0)
        return metaopt.WeightedLoss()(model, batch, phi, upstream)

    with pytest.raises(metaopt.StageError, match=r"a batch was changed in place.*clone\(\)"):
        hypergradient(Checkpointed(store="recompute"), loss=changing)


def test_batches_of_a_list_are_cast_when_they_are_asked_for():
    batches = [{key: t.float() if t.is_floating_point() else t for key, t in b.items()} for b in feature_batches()]
    stage = one_stage(batches=batches, num_steps=7).stages["only"]
    found = stage.begin("only", {}, {}).batches
    assert found[4][0]["inputs"].dtype == torch.float64
    assert found[4][0]["labels"] is batches[1]["labels"]
    assert found[4][0]["inputs"] is not found[4][0]["inputs"]
