"""The reverse sweep over several meta-steps, what it holds and for how long, and what it cannot take."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import inner_loops
import pytest
import torch
from inner_loops import Work, of_small
from reference import relative_error
from small import example_weights, one_stage, two_stages
from torch import Tensor, nn

import metaopt
from metaopt.diagnostics.meters import HeldBytes
from metaopt.estimators import Captured, Checkpointed, DoubleBackward, FiniteDifference, Unrolled
from metaopt.estimators.products import captured, whole_step

EXACT = 1e-12
STORES = ("states", "gradients", "recompute")


# --- several meta-steps


def test_meta_steps_with_commits_reuse_the_captured_programs(monkeypatch):
    captures = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        captures.append(1)
        return make_fx(*args, **kwargs)

    make_fx = captured.make_fx
    for module in (captured, whole_step):
        monkeypatch.setattr(module, "make_fx", counting)
    counts = []
    works = [of_small(two_stages)(estimator) for estimator in (Unrolled(), Checkpointed(Captured(), "recompute"))]
    for _ in range(3):
        found = []
        for work in works:
            trained = work.chain.unroll(work.phi)
            found.append(metaopt.hypergradient(work.objective(trained), work.phi))
            work.chain.commit(trained)
            with torch.no_grad():
                work.phi.logits -= found[0]["logits"]
        assert relative_error(found[1], found[0]) < 1e-10  # rounding of three trainings in a row
        counts.append(len(captures))
    assert counts[1] == counts[-1] <= 12  # teacher and student: with and without gradient, state, cotangents of it


@pytest.mark.parametrize(
    "estimator",
    [
        Checkpointed(),
        Checkpointed(store="states"),
        Checkpointed(store="recompute", place="disk"),
        Checkpointed(place="disk"),
        Checkpointed(Captured()),
    ],
    ids=repr,
)
def test_a_second_backward_needs_retain_graph(estimator):
    work = of_small(two_stages)(estimator)
    loss = work.meta_loss()
    first = metaopt.hypergradient(loss, work.phi, retain_graph=True)
    second = metaopt.hypergradient(loss, work.phi)
    assert (
        relative_error(second, first) < 1e-14
    )  # what is captured is compared with eager code first, whose result counts
    with pytest.raises(RuntimeError, match="second time"):
        metaopt.hypergradient(loss, work.phi)


# --- memory


class Wide(nn.Module):
    """Weights that are large beside everything else: 20 kB."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(50, 50, bias=False, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs).sin()


BYTES = 50 * 50 * 8


def wide(estimator: Any, on_call: Any = lambda: None, num_steps: int = 16) -> Work:
    """One stage of many steps on a batch of two examples; `on_call` is called by each inner loss."""
    phi = example_weights(2)

    def loss(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        on_call()
        return (meta_params.logits[:, None] * (model(batch["inputs"]) - 1) ** 2).mean()

    batch = {"inputs": torch.randn(2, 50, dtype=torch.float64)}
    chain = one_stage(loss, [batch], model=Wide, optimizer=inner_loops.ADAM, num_steps=num_steps, estimator=estimator)
    return Work(chain, phi, lambda trained: trained["only"](batch["inputs"]).square().mean())


@pytest.mark.parametrize("retain_graph", [False, True])
def test_backward_frees_each_step_as_it_goes(retain_graph):
    held, seen = HeldBytes(), []
    work = wide(Checkpointed(), lambda: seen.append(held.now))
    with held:
        loss = work.meta_loss()
        forward = len(seen)
        metaopt.hypergradient(loss, work.phi, retain_graph=retain_graph)
    backward = seen[forward:]
    assert len(backward) == forward == 16
    freed = backward[1] - backward[-1]  # sixteen gradients, and four states of weights and two moments
    assert (freed > 20 * BYTES) is not retain_graph


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("product", "store"),
    [(DoubleBackward, "states"), (DoubleBackward, "recompute"), (Captured, "gradients"), (FiniteDifference, "states")],
)
def test_nothing_is_held_once_the_graph_is_gone(store, product):
    """Without the garbage collector, which would come late."""
    held = HeldBytes()
    work = wide(Checkpointed(product(), store), num_steps=3)
    work.hypergradient()  # the first one captures
    gc.collect()
    gc.disable()
    try:
        with held:
            trained = work.chain.unroll(work.phi)
            loss = work.objective(trained)
            found = metaopt.hypergradient(loss, work.phi)
            del trained, loss
        assert held.now <= sum(g.nbytes for g in found.values()) + 64
    finally:
        gc.enable()


# --- disk


@pytest.mark.parametrize("store", STORES)
def test_files_go_with_the_steps_and_their_folder_with_the_last(store, tmp_path):
    def count() -> int:
        return len(list(tmp_path.glob("metaopt-*/*.safetensors")))

    counts: list[int] = []
    work = wide(Checkpointed(store=store, place="disk", folder=tmp_path), lambda: counts.append(count()), 9)
    loss = work.meta_loss()
    written = count()
    assert written == {"states": 9, "gradients": 9 + 3, "recompute": 3}[store]
    counts.clear()
    metaopt.hypergradient(loss, work.phi)
    assert min(counts) <= 2
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_dropped_without_a_backward_leaves_no_files(tmp_path):
    work = wide(Checkpointed(place="disk", folder=tmp_path), num_steps=4)
    loss = work.meta_loss()
    assert list(tmp_path.iterdir())
    del loss
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    for folder in (tmp_path / "absent", Path(__file__)):
        with pytest.raises(metaopt.StageError, match=rf"no folder can be made in .*{folder.name}.*folder=\.\.\."):
            wide(Checkpointed(place="disk", folder=folder)).meta_loss()


def test_a_disk_that_fills_up_is_named(tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("metaopt.estimators.places.save_file", full)
    with pytest.raises(metaopt.StageError, match=r"cannot be written \(No space left"):
        wide(Checkpointed(place="disk", folder=tmp_path)).meta_loss()
    assert not list(tmp_path.iterdir())


# --- refused


def test_a_tensor_that_the_loss_closes_over_is_refused():
    outside = torch.ones((), dtype=torch.float64, requires_grad=True)
    work = of_small(two_stages)(Checkpointed())
    loss = work.chain.stages["teacher"].loss
    work.chain.stages["teacher"].loss = lambda *args: outside * loss(*args)
    with pytest.raises(metaopt.StageError, match="closes over 1 tensor"):
        work.hypergradient()


def test_meta_parameters_that_change_before_the_backward_are_noticed():
    work = of_small(two_stages)(Checkpointed())
    loss = work.meta_loss()
    with torch.no_grad():
        work.phi.logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        metaopt.hypergradient(loss, work.phi)
