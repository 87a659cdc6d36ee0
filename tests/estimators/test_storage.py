"""`auto` predicts what the stored steps take, chooses the quickest store that fits a budget, and says so."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from matrices import pair
from small import SGD, example_weights, feature_batches, meta_loss, one_stage, two_stages
from small_models import Linear
from torch import Tensor, nn

import metaopt
from metaopt.diagnostics.meters import peak_bytes
from metaopt.estimators import Checkpointed, FirstOrder, Truncated, Unrolled
from metaopt.estimators.storage import Plan, Sizes, options, parse_bytes

SIZE, STEPS = 64, 32
WEIGHTS = SIZE * SIZE * 8  # θ
STATE = 3 * WEIGHTS + 4  # weights, two moments and a count of steps
EACH = Sizes(STEPS, WEIGHTS, STATE, STATE)
# What `auto` takes at its size as the budget, on a CPU: two states in hand are beside what is kept.
CHOICES = {
    Plan("states", "device", STEPS): STEPS * STATE,
    Plan("gradients", "device", 7): STEPS * WEIGHTS + 9 * STATE,
    Plan("recompute", "device", 16): 18 * STATE,
    Plan("recompute", "device", 7): 9 * STATE,
    Plan("recompute", "disk", 3): 5 * STATE,
    Plan("recompute", "disk", 1): 3 * STATE,
}
OTHERS = {
    Plan("gradients", "device", 2): STEPS * WEIGHTS + 4 * STATE,
    Plan("recompute", "device", 2): 4 * STATE,
    Plan("gradients", "disk", 7): 9 * STATE + WEIGHTS,
    Plan("gradients", "disk", 2): 4 * STATE + WEIGHTS,
}


def kept_as(plan: Plan, **options: Any) -> Checkpointed:
    """The estimator that is asked for a plan."""
    states = None if plan.kept == "states" else plan.num_states
    return Checkpointed(store=plan.kept, place=plan.place, num_states=states, **options)


class Wide(nn.Module):
    """Weights that are large beside the activations of two examples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs).tanh()


def loss(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    return (phi.logits[:, None] * (model(batch["inputs"]) - 1.0) ** 2).mean()


def run(estimator: Any, num_steps: int = STEPS) -> metaopt.Chain:
    """Forward and backward of one stage by Adam; its chain."""
    phi = example_weights(2)
    torch.manual_seed(0)
    batch = {"inputs": torch.randn(2, SIZE, dtype=torch.float64)}
    adam = functools.partial(torch.optim.Adam, lr=0.01, eps=1e-2)
    chain = one_stage(loss, [batch], model=Wide, optimizer=adam, num_steps=num_steps, estimator=estimator)
    trained = chain.unroll(phi)["only"]
    metaopt.hypergradient(trained(batch["inputs"]).square().mean(), phi)
    return chain


@pytest.fixture(scope="module")
def beside() -> int:
    """What a sweep holds beside the stored steps: the training itself, and the graph of a later step."""
    of_two_steps = STATE + WEIGHTS  # the first has no moments yet
    return peak_bytes(lambda: run(Checkpointed(store="states"), 2)) - of_two_steps


@pytest.mark.sampled(2)
@pytest.mark.parametrize("plan", [*CHOICES, *OTHERS], ids=str)
def test_predictions_are_what_is_held(plan, beside, tmp_path):
    """Never more; less by a few states: a segment shares its first with the kept ones, and the meter sees no file."""
    size = {**CHOICES, **OTHERS}[plan]
    peak = peak_bytes(lambda: run(kept_as(plan, folder=tmp_path)))
    assert -3 * STATE < peak - beside - size < 0.1 * WEIGHTS


@pytest.mark.parametrize("plan", CHOICES, ids=str)
def test_auto_takes_the_quickest_that_fits_and_says_so(plan, caplog, tmp_path):
    estimator, size = Checkpointed(store="auto", budget=CHOICES[plan], folder=tmp_path), CHOICES[plan]
    with caplog.at_level(logging.INFO, logger="metaopt"):
        run(estimator)
    assert estimator.storage.chosen == {f"only ({STEPS} steps)": plan}
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        f"stage 'only', {STEPS} steps, budget {size}: store={plan.kept} on {plan.place}, {plan.num_states} states and "
        f"{size / 1e6:.3g} MB on the device, "
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_budget_is_overdrawn_and_more_is_never_slower(device):
    last = float("inf")
    for budget in range(3 * STATE, 40 * STATE, STATE // 3):
        fits = [option for option in options(EACH, device, budget) if option.size <= budget]
        best = min(option.cost for option in fits)
        assert best <= last
        last = best
    assert last == 4


def test_auto_looks_once_and_for_each_stage_and_length(caplog):
    """Once for all meta-steps; anew for other numbers of steps, and for the other stage."""
    estimator, phi = Checkpointed(store="auto", budget="1 MB"), example_weights()
    chain = two_stages(SGD, Linear(), Linear(), batches=feature_batches(2), estimator=estimator)
    with caplog.at_level(logging.INFO, logger="metaopt"):
        for _ in range(2):
            metaopt.hypergradient(meta_loss(chain, phi), phi)
        chain.stages["student"].num_steps = 5
        metaopt.hypergradient(meta_loss(chain, phi), phi)
    assert list(estimator.storage.chosen) == ["teacher (3 steps)", "student (3 steps)", "student (5 steps)"]
    assert len(caplog.records) == 3


def test_looking_ahead_changes_nothing():
    phi, found = example_weights(), []
    for estimator in (Unrolled(), Checkpointed(store="auto", budget="1 MB")):
        chain = two_stages(estimator=estimator)
        for _ in range(2):
            trained = chain.unroll(phi)
            chain.commit(trained)
        found.append(chain.stages["student"].model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-12, atol=1e-14)


def test_a_truncated_stage_stores_only_its_last_steps():
    estimator = Truncated(4, store="auto", budget=4 * STATE)
    run(estimator)
    assert estimator.storage.chosen == {"only (4 steps)": Plan("states", "device", 4)}


@pytest.mark.parametrize("kind", [Checkpointed, FirstOrder, functools.partial(Truncated, 2)])
def test_every_estimator_that_stores_steps_chooses(kind):
    problem, plain = pair("adam"), kind()
    chosen = problem.by_metaopt(kind(store="auto", budget="1 MB"))
    torch.testing.assert_close(chosen, problem.by_metaopt(plain), rtol=1e-12, atol=1e-14)


# --- refused


def test_too_small_a_budget_names_what_is_needed():
    with pytest.raises(
        metaopt.ConfigError,
        match=rf"stage 'only': budget=1000 is less than the {3 * STATE:,} bytes that any number of inner steps takes",
    ):
        run(Checkpointed(store="auto", budget=1000))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown store": ({"store": "gradient"}, "did you mean 'gradients'"),
    "an unknown place": ({"place": "dsk"}, "did you mean 'disk'"),
    "no budget": ({"store": "auto"}, r"auto needs a budget.*Checkpointed\(store='auto', budget='2 GB'\)"),
    "a budget that nobody reads": ({"budget": 100}, "no other store reads one"),
    "auto with a place": ({"store": "auto", "budget": 100, "place": "disk"}, "leave out place='disk'"),
    "words": ({"store": "auto", "budget": "much"}, "budget='much' is no number of bytes"),
    "an unknown unit": ({"store": "auto", "budget": "2 TB"}, "is no number of bytes"),
    "two points": ({"store": "auto", "budget": "1.2.3 MB"}, "is no number of bytes"),
    "nothing": ({"store": "auto", "budget": 0}, "is no number of bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", [Checkpointed, FirstOrder, functools.partial(Truncated, 2)])
def test_options_that_cannot_be_are_refused(case, kind):
    options, message = REFUSED[case]
    with pytest.raises(metaopt.ConfigError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2 GB", 2 * 10**9),
        ("500 MiB", 500 * 2**20),
        ("1.5kb", 1500),
        ("77", 77),
        (77, 77),
        ("3B", 3),
        (" 1 GiB ", 2**30),
    ],
)
def test_budgets_in_words(text, size):
    assert parse_bytes(text) == size


def test_the_representation_is_the_call():
    assert repr(Checkpointed(store="auto", budget="2 GB")) == (
        "Checkpointed(product=DoubleBackward(), store='auto', place='device', budget='2 GB')"
    )
