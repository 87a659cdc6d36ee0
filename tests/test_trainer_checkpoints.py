"""A training that goes on from its checkpoint ends with the bits of one that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainers import learned, shuffled, trainer, without_seconds

import metaopt
from metaopt import ConfigError, MetaTrainer, Selection
from metaopt.saving.checkpoints import Checkpoints


class StopError(Exception):
    """The process is gone."""


def stopping(at: int) -> Any:
    def observe(record: dict[str, Any]) -> None:
        if record["meta_step"] == at:
            raise StopError

    return observe


def states(run: MetaTrainer) -> list[torch.Tensor]:
    chain = [p.detach().clone() for stage in run.chain.stages.values() for p in stage.model.state_dict().values()]
    return [learned(run), *chain, torch.get_rng_state()]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "carry": {"carry": {"student": 3, "teacher": "never"}},
    "selection": {"selection": Selection(list(shuffled()), "student", every=2, patience=2)},
    "several batches": {"validation_batches": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("at", [1, 4])
def test_it_goes_on_bit_for_bit(name: str, at: int, tmp_path: Path) -> None:
    def run(*observers: Any, folder: Path | None = None, steps: int = 6) -> tuple[MetaTrainer, Any]:
        torch.manual_seed(3)
        made = Checkpoints(folder, every=2) if folder else None
        drawing = (*observers, lambda record: torch.rand(3))  # so does an observer of the user's own
        trained = trainer(observers=drawing, checkpoint=made, **OPTIONS[name])
        return trained, trained.fit(steps)

    right: list[dict[str, Any]] = []
    whole, result = run(right.append)
    expected = states(whole)
    with pytest.raises(StopError):
        run(stopping(at + 1), folder=tmp_path)
    records: list[dict[str, Any]] = []
    again, other = run(records.append, folder=tmp_path)
    done = at // 2 * 2
    assert without_seconds(records) == without_seconds(right[done:])
    assert all(map(torch.equal, states(again), expected))
    assert (other.meta_loss, other.score, other.best_step, other.stopped_early) == (
        result.meta_loss,
        result.score,
        result.best_step,
        result.stopped_early,
    )
    over: list[dict[str, Any]] = []
    last, same = run(over.append, folder=tmp_path)
    assert not over
    assert all(map(torch.equal, states(last), expected))
    assert (same.meta_loss, same.best_step, same.stopped_early) == (
        other.meta_loss,
        other.best_step,
        other.stopped_early,
    )


class Momentum:
    """A transform with a state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gradients: Any) -> Any:
        self.calls += 1
        return {name: g * (1 + 0.01 * self.calls) for name, g in gradients.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def small(folder: Path, transform: Any = None, width: int = 2, optimizer: Any = torch.optim.SGD) -> MetaTrainer:
    torch.manual_seed(0)
    batches = [
        {"inputs": torch.randn(4, 3), "labels": torch.randint(2, (4,)), "index": torch.arange(4)} for _ in range(3)
    ]
    weights = metaopt.ExampleWeights(4)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, inputs: Any) -> Any:
            return self.net(inputs)

    def make(params: Any) -> Any:
        return optimizer(params, lr=0.1)

    stage = metaopt.Stage(Named(), make, metaopt.WeightedLoss(), batches, 2, transform=transform, seed=1)
    return MetaTrainer(
        metaopt.Chain(only=stage),
        metaopt.ValidationLoss("only"),
        weights,
        torch.optim.Adam(weights.parameters(), lr=0.5),
        batches,
        checkpoint=folder,
        seed=2,
    )


def test_what_the_user_gives_and_has_a_state_is_in_the_checkpoint(tmp_path: Path) -> None:
    whole = small(tmp_path / "whole", Momentum())
    whole.fit(4)
    small(tmp_path / "parts", Momentum()).fit(2)
    transform = Momentum()
    again = small(tmp_path / "parts", transform)
    again.fit(4)
    assert transform.calls == whole.chain.stages["only"].transform.calls  # type: ignore[union-attr]
    assert torch.equal(learned(again), learned(whole))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 3}, r"only\.model\.net\.0\.weight: float32 \[2, 3\] there, float32 \[3, 3\] here"),
        ({"optimizer": torch.optim.Adam}, r"only\.optimizer: SGD there, Adam here"),
    ],
)
def test_another_training_s_checkpoint_is_refused_before_anything_is_loaded(options, said, tmp_path: Path) -> None:
    small(tmp_path).fit(2)
    other = small(tmp_path, **options)
    before = [p.detach().clone() for p in other.chain.stages["only"].model.parameters()]
    with pytest.raises(ConfigError, match=said):
        other.fit(3)
    assert other.step == 0
    assert all(map(torch.equal, before, other.chain.stages["only"].model.parameters()))


def test_another_optimizer_starts_anew_where_it_is_insisted_on(tmp_path: Path) -> None:
    first = small(tmp_path)
    first.fit(2)
    other = small(tmp_path, optimizer=torch.optim.Adam)
    assert other.resume(force=True) == 2
    assert torch.equal(learned(other), learned(first))
    other.fit(3)
    assert other.step == 3


def test_a_checkpoint_is_little_more_than_the_models_and_their_optimizers(tmp_path: Path) -> None:
    """Weights, and Adam's two moments; a model that is drawn by a factory is not kept twice."""
    batches = [{"inputs": torch.randn(4, 64), "labels": torch.randint(64, (4,)), "index": torch.arange(4)}]
    weights = metaopt.ExampleWeights(4)

    def adam(params: Any) -> Any:
        return torch.optim.Adam(params, lr=1e-3)

    stage = metaopt.Stage(Wide, adam, metaopt.WeightedLoss(), batches, 1)
    meta_optimizer = torch.optim.Adam(weights.parameters())
    run = MetaTrainer(
        metaopt.Chain(only=stage), metaopt.ValidationLoss("only"), weights, meta_optimizer, batches, checkpoint=tmp_path
    )
    run.fit(1)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size <= 3.5 * sum(p.nbytes for p in stage.model.parameters())


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))

    def forward(self, inputs: Any) -> Any:
        return self.layers(inputs)
