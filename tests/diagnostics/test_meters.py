"""The meters give the known cost of computations that can be counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metaopt.base.errors import MetaoptError
from metaopt.diagnostics.meters import HeldBytes, count_flops, peak_bytes, resident_peak

N = 16
MATRIX = 4 * N * N  # bytes


def products(num_steps: int, requires_grad: bool) -> Callable[[], Tensor]:
    """`num_steps` matrix products one after the other; with a graph, each input is kept for the backward."""
    weight = torch.ones(N, N, requires_grad=requires_grad)
    start = torch.ones(N, N)

    def run() -> Tensor:
        x = start
        for _ in range(num_steps):
            x = x @ weight
        return x

    return run


@pytest.mark.sampled(2)
@pytest.mark.parametrize("num_steps", [1, 5])
def test_a_graph_holds_every_activation_and_a_plain_chain_two(num_steps):
    assert peak_bytes(products(num_steps, True)) == num_steps * MATRIX
    assert peak_bytes(products(num_steps, False)) == min(num_steps, 2) * MATRIX


def test_what_is_freed_before_counts_no_more():
    def one_after_the_other():
        torch.zeros(100)
        torch.zeros(50)

    assert peak_bytes(one_after_the_other) == 400


def test_views_and_changes_in_place_are_not_counted_again():
    there = torch.ones(N, N)

    def run():
        there.add_(1.0).mul_(2.0)
        new = there + 1
        return there.view(-1)[3:], new.t(), new.reshape(-1)[1:], new.detach(), new.relu_()

    assert peak_bytes(run) == MATRIX


def test_what_is_made_inside_and_stays_is_held_after():
    kept = []
    with HeldBytes() as held:
        for _ in range(3):
            kept.append(torch.zeros(N, N))
            torch.ones(N, N)  # freed at once
        assert held.now == 3 * MATRIX
        kept.pop()
    assert held.now == 2 * MATRIX
    assert held.peak == 4 * MATRIX
    kept.clear()
    assert held.now == 0


def test_a_backward_frees_as_it_goes_and_its_gradients_count():
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(N, N, bias=False), nn.Tanh()) for _ in range(6)))
    inputs = torch.ones(N, N)

    def run():
        layers(inputs).sum().backward()

    # six outputs of tanh are kept; gradients take their place, beside what is in flight between two layers
    assert 6 * MATRIX < peak_bytes(run) <= 10 * MATRIX


def test_meters_can_be_nested_in_each_other():
    run, inner, flops = products(4, True), [], []
    assert peak_bytes(lambda: inner.append(peak_bytes(run))) == 4 * MATRIX
    assert inner == [4 * MATRIX]
    assert peak_bytes(lambda: flops.append(count_flops(run))) == 4 * MATRIX
    assert flops == [4 * 2 * N**3]


def test_flops_of_a_step_are_three_products_per_layer_but_two_for_the_first():
    model = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    inputs = torch.ones(7, 8)
    forward = 2 * 7 * (8 * 5 + 5 * 3)
    assert count_flops(lambda: model(inputs)) == forward
    assert count_flops(lambda: model(inputs).sum().backward()) == 3 * forward - 2 * 7 * 8 * 5


def test_resident_size_grows_by_what_is_written():
    size = 40_000_000
    assert 0.9 * size < resident_peak(lambda: torch.ones(size // 4)) < 1.2 * size
    assert resident_peak(lambda: None) < 0.1 * size


def test_where_the_kernel_does_not_tell_resident_size_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("metaopt.diagnostics.meters._PROCESS", tmp_path / "no-such-folder")
    with pytest.raises(MetaoptError, match="which this system does not offer"):
        resident_peak(lambda: None)
