"""What a captured graph would freeze: where that changes between two unrolls, a new one is captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import relative_error
from small import example_weights, meta_loss, one_stage
from small_models import Network
from torch import Tensor, nn

import metaopt
from metaopt.estimators import Captured, Checkpointed, Unrolled

EXACT = 1e-12


def found(chain: metaopt.Chain, phi: Any) -> dict[str, Tensor]:
    return metaopt.hypergradient(meta_loss(chain, phi), phi)


class Held(nn.Module):
    """A loss that holds a number, a tensor, a buffer, and lists of them."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.numbers = 1.0, [1.0, 2.0]
        self.factor = torch.ones(3, dtype=torch.float64)
        self.single = torch.ones((), dtype=torch.float64)
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))

    def forward(self, model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        logits = model(batch["inputs"]) * self.factor * self.scale / self.temperature * self.numbers[1]
        return float(self.single) * (phi(batch) * F.cross_entropy(logits, batch["labels"], reduction="none")).mean()


class Scaled(metaopt.MetaParameters):
    """Example weights times a number and a buffer, neither of which is learned."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table, self.factor = example_weights(), 1.0
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, batch: Any) -> Tensor:
        return self.table(batch) * self.scale * self.factor


def set_to(part: str, name: str, value: Any) -> Any:
    """A change of the loss, the meta-parameters or the model between two unrolls."""

    def change(chain: metaopt.Chain, phi: Any) -> None:
        stage = chain.stages["only"]
        setattr({"loss": stage.loss, "phi": phi, "dropout": getattr(stage.model, "dropout", None)}[part], name, value)

    return change


def written(part: str, name: str) -> Any:
    """As `set_to`, in place."""

    def change(chain: metaopt.Chain, phi: Any) -> None:
        with torch.no_grad():
            getattr({"loss": chain.stages["only"].loss, "phi": phi}[part], name).mul_(2.0)

    return change


def second(chain: metaopt.Chain, phi: Any) -> None:
    chain.stages["only"].loss.numbers[1] = 3.0  # type: ignore[attr-defined]


def learned(chain: metaopt.Chain, phi: Any) -> None:
    with torch.no_grad():
        phi.table.logits.add_(1.0)


def doubled(*size: int) -> Tensor:
    return 2.0 * torch.ones(size, dtype=torch.float64)


CHANGES = {
    "a number of the loss": set_to("loss", "temperature", 2.0),
    "an entry of its list": second,
    "its tensor": set_to("loss", "factor", doubled(3)),
    "its tensor, in place": written("loss", "factor"),
    "its tensor that is read as a number": written("loss", "single"),
    "its buffer": set_to("loss", "scale", doubled(3)),
    "its buffer, in place": written("loss", "scale"),
    "a number of the meta-parameters": set_to("phi", "factor", 2.0),
    "their buffer": set_to("phi", "scale", doubled()),
    "their buffer, in place": written("phi", "scale"),
    "their learned values": learned,
    "a dropout probability": set_to("dropout", "p", 0.7),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_unrolls_is_honoured(name):
    found_by = {}
    for estimator in (Unrolled(), Checkpointed(Captured(), "states")):
        torch.manual_seed(1)
        chain, phi = one_stage(Held(), model=Network(0.3), num_steps=2, estimator=estimator), Scaled()
        before = found(chain, phi)
        CHANGES[name](chain, phi)
        found_by[type(estimator)] = before, found(chain, phi)
    for captured_one, exact in zip(found_by[Checkpointed], found_by[Unrolled], strict=True):
        assert relative_error(captured_one, exact) < EXACT
    assert relative_error(found_by[Unrolled][1], found_by[Unrolled][0]) > 1e-2


FACTOR = 1.0


def test_what_a_function_closes_over_is_honoured(monkeypatch):
    closed, listed, phi = 1.0, [1.0], example_weights()

    def helper(losses: Tensor) -> Tensor:
        return sum(losses * FACTOR for _ in listed)  # type: ignore[return-value]

    def loss(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        losses = phi(batch) * F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")
        return helper(losses).mean() * closed * listed[0]

    chains = [one_stage(loss, num_steps=2, estimator=e) for e in (Unrolled(), Checkpointed(Captured()))]

    def compared() -> float:
        assert relative_error(found(chains[1], phi), found(chains[0], phi)) < EXACT
        return float(found(chains[1], phi)["logits"].norm())

    seen = [compared()]
    closed = 2.0
    seen.append(compared())
    listed[0] = 3.0
    seen.append(compared())
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    seen.append(compared())
    assert len(set(seen)) == 4
