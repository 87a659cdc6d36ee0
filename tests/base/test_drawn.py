"""The batches of an unroll, looked up or drawn again: the same as those that are held, whatever step asks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from small import example_weights, feature_batches, one_stage
from test_streams import LOADERS, taken
from torch import Tensor
from torch.utils.data import DataLoader

import metaopt
from metaopt.base import drawn
from metaopt.base.drawn import Listed, Redrawn, batches_ahead
from metaopt.base.streams import BatchStream
from metaopt.estimators import Checkpointed, Unrolled

IN_PROCESS = {name: make for name, make in LOADERS.items() if name != "workers"}
STEPS, PER_STEP = 9, 2


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    monkeypatch.setattr(drawn, "MOST_HELD", 0)


def ahead(stream: BatchStream, num_steps: int = STEPS) -> Any:
    return batches_ahead(stream, num_steps, PER_STEP, lambda batches: [batch.tolist() for batch in batches])


@pytest.mark.parametrize("start", [0, 3, 4, 6])
@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_step_gets_its_own_batches_as_often_as_it_asks(name, start):
    """From anywhere in an epoch, in any order; the stream stays where it is."""
    stream = BatchStream(IN_PROCESS[name](), seed=1)
    taken(stream, start)
    place, batches = str(stream.state_dict()), ahead(stream)
    assert isinstance(batches, Listed if name == "list" else Redrawn)
    found = list(batches)
    order = [*reversed(range(STEPS)), *random.Random(0).choices(range(STEPS), k=30)]
    assert [batches[t] for t in order] == [found[t] for t in order]
    assert str(stream.state_dict()) == place
    assert [batch for step in found for batch in step] == taken(stream, STEPS * PER_STEP)
    assert len(batches) == len(found) == STEPS


def test_worker_processes_are_not_started_again():
    stream = BatchStream(LOADERS["workers"](), seed=1)
    assert isinstance(ahead(stream, 3), list)


class Drawing(torch.utils.data.Dataset[Tensor]):
    """Twelve examples; it counts how often one is drawn."""

    draws = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        self.draws += 1
        return torch.tensor([index])


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
        assert len(batches._held) <= 4


@pytest.mark.parametrize("kind", ["list", "shuffled"])
def test_there_must_be_a_batch(kind):
    empty: Any = [] if kind == "list" else DataLoader([], 3)
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
    for _ in range(2):  # the second one goes on in the middle of an epoch
        trained = chain.unroll(phi)
        found = metaopt.hypergradient(metaopt.ValidationLoss("only")(trained, feature_batches(1, 8)[0], phi), phi)
        chain.commit(trained)
    return found


def test_the_hypergradient_is_that_of_held_batches(monkeypatch):
    few = Checkpointed(store="recompute", num_states=2)
    found = hypergradient(few)
    monkeypatch.setattr(drawn, "MOST_HELD", 1000)
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
