"""Muon and Adafactor against the optimizers whose formulas they are: torch's Muon and AdamW, transformers' Adafactor.

Cold, warm, Unrolled and Checkpointed are in the table of `test_differentiable_optimizers.py`.
"""

from __future__ import annotations

import copy
import functools

import library
import pytest
import torch
import transformers
from differences import difference_error
from problems import small_network
from reference import relative_error
from torch import nn

import metaopt
from metaopt.optimizers.rule import UpdateRule

STEPS = 8


class Net(nn.Module):
    """A tall and a wide matrix, a tensor of three dimensions, vectors and a number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tall, self.wide = nn.Linear(3, 5), nn.Linear(5, 2)
        self.cube, self.gain = nn.Parameter(torch.randn(2, 3, 2)), nn.Parameter(torch.tensor(0.7))
        self.double()

    def forward(self, x):
        return torch.einsum("bi,kji,bj->bk", self.wide(self.tall(x).tanh()), self.cube, x) * self.gain


def train(net, optimizers):
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(4, 3, generator=draw, dtype=torch.float64)
        net.zero_grad()
        (net(x) - x[:, :2]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


MUON = [
    {"lr": 0.02},
    {"lr": 0.02, "nesterov": False, "momentum": 0.5, "weight_decay": 0.3},
    {"lr": 0.02, "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
    {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"},
]


@pytest.mark.parametrize("options", MUON, ids=str)
def test_muon_is_torch_s_in_float64_and_adamw_for_the_rest(options, monkeypatch):
    net = Net()
    twin = copy.deepcopy(net)
    found = train(twin, [metaopt.Muon(twin.parameters(), **options, adamw_betas=(0.8, 0.9), adamw_eps=1e-3)])
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's Newton–Schulz, but in float64
    matrices, rest = ([p for p in net.parameters() if (p.dim() == 2) is kind] for kind in (True, False))
    of_rest = {"lr": options["lr"], "weight_decay": options.get("weight_decay", 0.1), "betas": (0.8, 0.9), "eps": 1e-3}
    expected = train(net, [torch.optim.Muon(matrices, **options), torch.optim.AdamW(rest, **of_rest)])
    assert relative_error(found, expected) < 1e-12


ADAFACTOR = [
    {},
    {"warmup_init": True, "weight_decay": 0.2, "eps": (1e-30, 1e3)},
    {"lr": 0.03, "relative_step": False, "scale_parameter": False, "beta1": 0.7, "weight_decay": 0.2},
    {"lr": 0.03, "relative_step": False, "clip_threshold": 0.5, "decay_rate": -0.5, "eps": (1e-4, 1e-2)},
]


@pytest.mark.parametrize("options", ADAFACTOR, ids=str)
def test_adafactor_is_transformers_in_float64(options):
    net = Net()
    twin = copy.deepcopy(net)
    expected = train(net, [transformers.Adafactor(net.parameters(), **options)])
    assert relative_error(train(twin, [metaopt.Adafactor(twin.parameters(), **options)]), expected) < 1e-12


BOTH = {
    "Muon": functools.partial(metaopt.Muon, lr=0.03, adamw_eps=1e-3),
    "Adafactor": functools.partial(metaopt.Adafactor, lr=0.03, relative_step=False, beta1=0.7),
}


@pytest.mark.parametrize("name", BOTH)
def test_a_learned_rate_is_differentiated_at_0_too(name):
    problem = small_network(BOTH[name]).with_stage("only", overrides=lambda phi, t: {"lr": t * phi.values[0] / 10})
    assert difference_error(library.hypergradient(problem), problem, num_random=1) < 1e-8


@pytest.mark.parametrize("name", BOTH)
def test_rows_without_gradient_give_no_nan_in_float32(name):
    """`small_network` has an input that is always 0: a column of exact zeros, over Adafactor's ε = 1e-30."""
    exact = small_network(BOTH[name])
    found = {}
    for dtype in (torch.float32, torch.float64):
        chain = library.as_chain(exact).twin(dtype)
        phi = copy.deepcopy(exact.phi).to(dtype)
        batch = {k: v.to(dtype) for k, v in exact.batch.items()}
        loss = exact.objective(chain.unroll(phi), batch, phi)
        found[dtype] = metaopt.hypergradient(loss, phi)
    assert relative_error({n: g.double() for n, g in found[torch.float32].items()}, found[torch.float64]) < 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: metaopt.Muon(p, adjust_lr_fn="none"), "'original' or 'match_rms_adamw'"),
        (lambda p: metaopt.Muon(p, momentum=-1.0), "momentum is -1.0"),
        (lambda p: metaopt.Adafactor(p, lr=0.1), "no rate and no schedule"),
        (lambda p: metaopt.Adafactor(p, relative_step=False), "needs one"),
        (lambda p: metaopt.Adafactor(p, lr=0.1, relative_step=False, warmup_init=True), "warmup_init"),
    ],
)
def test_options_that_contradict_each_other_are_refused(make, message):
    with pytest.raises(metaopt.ConfigError, match=message):
        make([nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize("cls", [transformers.Adafactor, torch.optim.Muon, torch.optim.Adafactor])
def test_the_ones_that_cannot_train_name_ours(cls):
    with pytest.raises(metaopt.ConfigError, match=rf"metaopt\.{cls.__name__}"):
        library.as_chain(small_network(lambda params: cls([p for p in params if p.dim() == 2])))


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
@pytest.mark.parametrize("size", [0.0, 1e-14])
def test_a_gradient_that_vanishes_has_finite_slopes_in_float32(shape, size):
    param = nn.Parameter(torch.randn(shape))
    rule = UpdateRule(BOTH["Adafactor"]([param]), {"p": param})
    gradient = (size * torch.randn(shape)).requires_grad_()
    after, _ = rule.step({"p": param.detach()}, {"p": gradient}, {})
    (slope,) = torch.autograd.grad((after["p"] * torch.randn(shape)).sum(), gradient)
    assert slope.isfinite().all()
