"""Optimizers that users register: right against their own `step()` and central differences, or refused with the reason.

The stand-ins do what well-known packages do: keep attributes on themselves, count steps in their group, change
gradients in place, run under `no_grad` and on `.data`, take norms over a parameter or over a group, follow signs.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import ClassVar

import library
import pytest
import torch
from differences import difference_error, train_plainly
from problems import small_network
from reference import relative_error

import metaopt
from metaopt.estimators import Captured, Checkpointed

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("metaopt.optimizers.kinds.registered", {})


def weights(trained):
    return {name: value.detach() for name, value in trained["only"].params.items()}


class Lion(torch.optim.Optimizer):
    """A smooth relative of Lion: θ' = θ − η tanh(β₁ m + (1 − β₁) g), m' = β₂ m + (1 − β₂) g."""

    def __init__(self, params, lr=0.1, betas=(0.9, 0.8), smooth=0.5, differentiable=False):
        super().__init__(params, {"lr": lr, "betas": betas, "smooth": smooth, "differentiable": differentiable})

    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                beta1, beta2 = group["betas"]
                for param in (p for p in group["params"] if p.grad is not None):
                    state = self.state[param]
                    mean = state.get("mean", torch.zeros_like(param))
                    param.sub_((beta1 * mean + (1 - beta1) * param.grad).div(group["smooth"]).tanh() * group["lr"])
                    state["mean"] = beta2 * mean + (1 - beta2) * param.grad


class Plain(torch.optim.Optimizer):
    """Calls `move(group, param, gradient, state)` under no_grad: what the stand-ins below are made of."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.power = 2  # lost by copy.copy
        self.seen = 0

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            self.begin(group)
            for param in (p for p in group["params"] if p.grad is not None):
                self.move(group, param, param.grad, self.state[param])

    def begin(self, group):
        pass

    def move(self, group, param, gradient, state):
        raise NotImplementedError


class Normalised(Plain):
    """θ' = θ − η g / (‖g‖ + 1): a norm over each parameter."""

    def move(self, group, param, gradient, state):
        param -= group["lr"] * gradient / (gradient.norm() + 1)


def normalised_step(param, gradient, state, group):
    return param - group["lr"] * gradient / (gradient.square().sum().sqrt() + 1), dict(state)


class Rows(Plain):
    """A second moment by row, as Adafactor keeps it; changed in place after autograd has saved it."""

    def move(self, group, param, gradient, state):
        square = gradient.square().mean(-1) if gradient.dim() > 1 else gradient.square()
        mean = state.setdefault("rows", torch.zeros_like(square))
        mean.mul_(0.5).add_(square, alpha=0.5)
        root = mean.add(0.1).rsqrt().mul_(self.power)
        ratio = group["lr"] * (param.norm() / (1 + gradient.norm()))
        param.add_(gradient * (root.unsqueeze(-1) if gradient.dim() > 1 else root), alpha=-ratio)


class Decayed(Plain):
    """Momentum on `.data` whose weight decay is added to the gradient in place."""

    def move(self, group, param, gradient, state):
        gradient.add_(param.data.tanh(), alpha=0.3)
        mean = state.setdefault("mean", torch.zeros_like(param.data))
        torch.add(mean * 0.5, gradient, out=mean)
        param.data.mul_(0.99).addcdiv_(mean, mean.square().add_(1).sqrt_(), value=-group["lr"])


class Counting(Plain):
    """A rate that falls with a count and an average kept in the group, as schedule-free ones do."""

    def begin(self, group):
        group["count"] = group.get("count", 0) + 1
        group["sum"] = [*group.get("sum", []), group["count"] ** 0.5]

    def move(self, group, param, gradient, state):
        start = state.setdefault("start", param.clone())
        param.sub_(gradient.tanh(), alpha=group["lr"] / sum(group["sum"])).lerp_(start, 0.1 / group["count"])


class Operations(Plain):
    """Hands its rate to torch's own operations, in and out of place."""

    def move(self, group, param, gradient, state):
        rate, slope = group["lr"], gradient.tanh()
        step = torch.rsub(slope, rate).add(slope, alpha=rate).true_divide(1 + rate)
        step.lerp_(slope, rate).addcdiv_(slope, 1 + slope.square(), value=rate)
        param.sub_(step, alpha=rate)


class CountingItself(Plain):
    """The count is an attribute, which every copy would have of its own."""

    def begin(self, group):
        self.seen += 1

    def move(self, group, param, gradient, state):
        param.sub_(gradient, alpha=group["lr"] / (1 + self.seen))


class CountingInItsClass(CountingItself):
    """The count is the class's."""

    total = 0

    def begin(self, group):
        CountingInItsClass.total += 1


class CountingByParameter(CountingItself):
    """The count is in a mapping, and changed in place."""

    counts: ClassVar = defaultdict(int)

    def begin(self, group):
        self.counts["steps"] += 1


class NormOfGroup(Plain):
    """θ' = θ − η g / (‖all gradients‖ + 1)."""

    def begin(self, group):
        gradients = [p.grad.flatten() for p in group["params"] if p.grad is not None]
        self.norm = torch.cat(gradients).norm()

    def move(self, group, param, gradient, state):
        param -= group["lr"] * gradient / (self.norm + 1)


class NormOfEarlier(Plain):
    """The same, in a way that leaves no attribute."""

    def move(self, group, param, gradient, state):
        gradients = [p.grad.flatten() for p in group["params"] if p.grad is not None]
        param -= group["lr"] * gradient / (torch.cat(gradients).norm() + 1)


class Sign(Plain):
    """θ' = 0.9 θ − η sign(g)."""

    def move(self, group, param, gradient, state):
        param.mul_(0.9).sub_(gradient.sign(), alpha=group["lr"])


class Cut(Plain):
    """Reads a norm out of the graph."""

    def move(self, group, param, gradient, state):
        param -= group["lr"] * gradient / (gradient.norm().item() + 1)


class Late(Plain):
    """Cuts the graph from its sixth step on."""

    def move(self, group, param, gradient, state):
        state["step"] = state.get("step", 0) + 1
        norm = gradient.norm()
        param -= group["lr"] * gradient / ((norm.item() if state["step"] > 5 else norm) + 1)


class Around(Plain):
    """Keeps another optimizer, as Lookahead does, and steps that."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.inner = [torch.optim.SGD([p for g in self.param_groups for p in g["params"]], lr)]

    def step(self, closure=None):
        self.inner[0].step()


class Raising(Plain):
    """Cannot step yet, as a schedule-free one before its `train()`."""

    def begin(self, group):
        raise ValueError("call train() first")


GOOD = {
    "smooth Lion": (Lion, {"learnable": ("lr", "smooth"), "elementwise": True}),
    "function": (Normalised, {"step": normalised_step, "learnable": ("lr",)}),
    "norm of a parameter": (Normalised, {"learnable": ("lr",)}),
    "rows": (Rows, {}),
    "in place": (Decayed, {"elementwise": True, "learnable": ("lr",)}),
    "group": (Counting, {"learnable": ("lr",)}),
    "operations": (Operations, {"learnable": ("lr",), "elementwise": True}),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", GOOD)
def test_a_registered_optimizer_is_differentiated(name):
    cls, options = GOOD[name]
    metaopt.register_optimizer(cls, **options)
    problem = small_network(functools.partial(cls, lr=0.1)).with_stage("only", num_steps=5)
    plain = weights(train_plainly(problem.chain, problem.phi))
    chain = library.as_chain(problem)
    found = library.hypergradient(problem, chain)
    assert relative_error(weights(chain.unroll(problem.phi)), plain) < 1e-12
    assert difference_error(found, problem, num_random=1) < 1e-8
    stores = [Checkpointed(store=store) for store in ("states", "gradients", "recompute")]
    for estimator in (*stores, Checkpointed(product=Captured()), Checkpointed(place="disk")):
        swept = library.as_chain(problem, estimator=estimator)
        assert relative_error(library.hypergradient(problem, swept), found) < 1e-12, estimator
    twin = chain.twin(torch.float64)  # as the checks take it
    assert relative_error(weights(twin.unroll(problem.phi)), plain) < 1e-12
    assert relative_error(weights(chain.train(problem.phi)), plain) < 1e-15
    if options.get("learnable"):
        learned = problem.with_stage("only", overrides=lambda phi, t: {"lr": phi.values[t % 2] / 10})
        assert difference_error(library.hypergradient(learned), learned, num_random=1) < 1e-8


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("carried", ["unrolled", "trained", "saved"])
def test_a_registered_optimizer_carries_on(name, carried):
    """Three steps and two more are five: its state, and what it wrote into its groups, are committed and saved."""
    cls, options = GOOD[name]
    metaopt.register_optimizer(cls, **options)
    problem = small_network(functools.partial(cls, lr=0.1)).with_stage("only", num_steps=5)
    plain = weights(train_plainly(problem.chain, problem.phi))
    chain = library.as_chain(problem)
    stage = chain.stages["only"]
    for steps in (3, 2):
        stage.num_steps = steps
        if carried == "trained":
            chain.train(problem.phi)
        else:
            chain.commit(chain.unroll(problem.phi))
        if carried == "saved":
            state = chain.state_dict()
            chain = library.as_chain(problem)
            stage = chain.stages["only"]
            chain.load_state_dict(state)
    assert relative_error({n: p.detach() for n, p in stage.model.named_parameters()}, plain) < 1e-12


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Cut, {}, r"was registered, but the derivative of its step is .* central difference"),
        (Late, {}, r"was registered, but the derivative of its step is .* central difference"),
        (Normalised, {"step": lambda p, g, s, o: (p - o["lr"] * g, {})}, r"was registered.*away from its own step\(\)"),
        (Normalised, {"elementwise": True}, r"away from its own step\(\).*elementwise=False"),
        (Lion, {"learnable": ("rate",)}, r"was registered.*'rate', which is no float"),
        (Lion, {"step": lambda p, g, s, o: 1 / 0}, r"was registered.*raises ZeroDivisionError"),
        (CountingItself, {}, r"its step changes self\.seen, which is no state"),
        (CountingInItsClass, {}, r"its step changes CountingInItsClass\.total"),
        (CountingByParameter, {}, r"its step changes CountingByParameter\.counts"),
        (NormOfGroup, {}, r"its step changes self\.norm"),
        (NormOfEarlier, {}, r"its step of one parameter depends on the others"),
        (Sign, {}, r"derivative of its step with respect to the gradient is zero"),
        (Around, {}, r"its attribute 'inner' holds parameters or an optimizer"),
        (Raising, {}, r"its own step\(\) raises ValueError: call train\(\) first"),
    ],
)
def test_what_cannot_be_right_is_refused_before_any_training(cls, options, message):
    metaopt.register_optimizer(cls, **options)
    with pytest.raises(metaopt.ConfigError, match=rf"{cls.__name__} .*{message}"):
        library.as_chain(small_network(cls))


def test_a_sign_may_learn_its_rate():
    metaopt.register_optimizer(Sign, learnable=("lr",))
    learned = small_network(Sign).with_stage("only", overrides=lambda phi, t: {"lr": phi.values[t % 2] / 10})
    assert difference_error(library.hypergradient(learned), learned, num_random=1) < 1e-8


def test_a_count_in_the_group_neither_stands_still_nor_is_overridden():
    metaopt.register_optimizer(Counting)
    problem = small_network(Counting)
    chain = library.as_chain(problem)
    chain.commit(chain.unroll(problem.phi))
    assert chain.stages["only"].optimizer.param_groups[0]["count"] == problem.chain["only"].num_steps
    chain.stages["only"].overrides = lambda phi, t: {"count": 1}
    with pytest.raises(metaopt.ConfigError, match="itself writes 'count'"):
        chain.unroll(problem.phi)
