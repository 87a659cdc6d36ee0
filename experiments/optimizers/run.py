"""Every inner optimizer and option: is the step torch's own, and is the hypergradient that of the plain run?

    python experiments/optimizers/run.py             # the whole table; about a minute on one core
    python experiments/optimizers/run.py NAdam RAdam # some optimizers
    python experiments/optimizers/run.py others      # optimizers of other packages, of those that are installed

One small network in float64, one stage of inner steps, one weight per example; every optimizer starts fresh ("cold")
and from state that two steps have left ("warm"). `trajectory`: distance of the trained weights from those that plain
`torch.optim` gives. `hypergradient`: distance from central differences of that plain run, by `Unrolled` and by
`Checkpointed`. All three are relative.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import metaopt
from metaopt.estimators import Checkpointed, Estimator, Unrolled

EXAMPLES, FEATURES, BATCHES = 4, 3, 2
OPTIONS: dict[type[torch.optim.Optimizer], tuple[dict[str, Any], ...]] = {
    torch.optim.SGD: (
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.4},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2},
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.2, "maximize": True},
        {"lr": 0.1, "momentum": 0.9, "foreach": True},
        {"lr": 0.1, "momentum": 0.9, "fused": True},
    ),
    torch.optim.Adam: (
        {"lr": 0.03},
        {"lr": 0.03, "eps": 0.1},
        {"lr": 0.03, "betas": (0.5, 0.8), "eps": 1e-3},
        {"lr": 0.03, "weight_decay": 0.2},
        {"lr": 0.03, "weight_decay": 0.3, "decoupled_weight_decay": True},
        {"lr": 0.03, "betas": (0.5, 0.5), "amsgrad": True},
        {"lr": 0.03, "eps": 1e-2, "maximize": True},
        {"lr": 0.03, "foreach": True},
        {"lr": 0.03, "fused": True},
    ),
    torch.optim.AdamW: (
        {"lr": 0.03},
        {"lr": 0.03, "weight_decay": 0.5, "eps": 1e-2},
        {"lr": 0.03, "betas": (0.5, 0.5), "amsgrad": True, "eps": 1e-2},
        {"lr": 0.03, "eps": 1e-2, "maximize": True},
        {"lr": 0.03, "fused": True},
    ),
    torch.optim.NAdam: (
        {"lr": 0.03},
        {"lr": 0.03, "betas": (0.5, 0.8), "eps": 1e-3},
        {"lr": 0.03, "momentum_decay": 0.1},
        {"lr": 0.03, "weight_decay": 0.2},
        {"lr": 0.03, "weight_decay": 0.3, "decoupled_weight_decay": True},
        {"lr": 0.03, "eps": 1e-2, "maximize": True},
        {"lr": 0.03, "foreach": True},
    ),
    torch.optim.RAdam: (
        {"lr": 0.03},
        {"lr": 0.03, "betas": (0.5, 0.8), "eps": 1e-2},
        {"lr": 0.03, "weight_decay": 0.2},
        {"lr": 0.03, "weight_decay": 0.3, "decoupled_weight_decay": True},
        {"lr": 0.03, "maximize": True},
        {"lr": 0.03, "foreach": True},
    ),
    torch.optim.Adamax: (
        {"lr": 0.03},
        {"lr": 0.03, "betas": (0.5, 0.8), "eps": 1e-2},
        {"lr": 0.03, "weight_decay": 0.2},
        {"lr": 0.03, "maximize": True},
        {"lr": 0.03, "foreach": True},
    ),
    torch.optim.Adagrad: (
        {"lr": 0.1},
        {"lr": 0.1, "lr_decay": 0.2},
        {"lr": 0.1, "weight_decay": 0.2},
        {"lr": 0.1, "initial_accumulator_value": 0.1, "eps": 1e-2},
        {"lr": 0.1, "maximize": True},
        {"lr": 0.1, "foreach": True},
        {"lr": 0.1, "fused": True},
    ),
    torch.optim.Adadelta: (
        {"lr": 1.0},
        {"lr": 0.7, "rho": 0.5, "eps": 1e-2},
        {"lr": 0.7, "weight_decay": 0.2},
        {"lr": 0.7, "maximize": True},
        {"lr": 0.7, "foreach": True},
    ),
    torch.optim.RMSprop: (
        {"lr": 0.01},
        {"lr": 0.01, "alpha": 0.8, "eps": 1e-2},
        {"lr": 0.01, "momentum": 0.9},
        {"lr": 0.01, "centered": True},
        {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.2, "eps": 1e-2},
        {"lr": 0.01, "maximize": True},
        {"lr": 0.01, "foreach": True},
    ),
    torch.optim.ASGD: (
        {"lr": 0.1},
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 1},
        {"lr": 0.1, "weight_decay": 0.2},
        {"lr": 0.01, "maximize": True},
        {"lr": 0.1, "foreach": True},
    ),
    metaopt.Muon: (
        {"lr": 0.03},
        {"lr": 0.03, "momentum": 0.5, "nesterov": False, "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)},
        {"lr": 0.03, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw", "eps": 1e-3},
        {"lr": 0.03, "use_muon": False, "adamw_betas": (0.5, 0.8), "adamw_eps": 1e-3},
    ),
    metaopt.Adafactor: (
        {"lr": None},
        {"lr": None, "warmup_init": True, "weight_decay": 0.2, "eps": (1e-30, 3e3)},
        {"lr": 0.03, "relative_step": False, "scale_parameter": False, "beta1": 0.7, "weight_decay": 0.2},
        {"lr": 0.03, "relative_step": False, "clip_threshold": 0.5, "decay_rate": -0.5, "eps": (1e-4, 1e-2)},
    ),
}


def steps_of(kind: type[torch.optim.Optimizer]) -> int:
    """Inner steps: RAdam takes an adaptive step from its sixth on only."""
    return 8 if kind is torch.optim.RAdam else 4


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    optimizer: str
    options: str
    start: str
    trajectory: float
    unrolled: float
    checkpointed: float

    def __str__(self) -> str:
        errors = (f"{error:.0e}" if error else "0" for error in (self.trajectory, self.unrolled, self.checkpointed))
        return "| " + " | ".join((self.optimizer, self.options, self.start, *errors)) + " |"


class Network(nn.Module):
    """A tanh network with a scalar gain."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.first, self.last = nn.Linear(FEATURES, 4), nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.gain * self.last(self.first(inputs).tanh())


def inner_loss(model: Any, batch: dict[str, Tensor], weights: Any, upstream: Any) -> Tensor:
    """mean wᵢ (model(xᵢ) − yᵢ)²."""
    return (weights(batch) * (model(batch["inputs"])[:, 0] - batch["labels"]) ** 2).mean()


def new_batch(number: int) -> dict[str, Tensor]:
    """Four examples; the last feature is always 0, so that some gradients are exactly 0."""
    inputs = torch.randn(EXAMPLES, FEATURES, dtype=torch.float64)
    inputs[:, -1] = 0.0
    index = torch.arange(EXAMPLES) + EXAMPLES * number
    return {"inputs": inputs, "labels": torch.randn(EXAMPLES, dtype=torch.float64), "index": index}


class Problem:
    """A model, an optimizer over it, data and weights; what metaopt is asked, and the same by plain torch."""

    def __init__(self, factory: Callable[..., torch.optim.Optimizer], num_steps: int, warm: bool) -> None:
        torch.manual_seed(0)
        self.num_steps, self.factory, self.warm = num_steps, factory, warm
        self.network = Network().double()
        self.batches = [new_batch(number) for number in range(BATCHES)]
        self.validation = new_batch(0)
        self.weights = metaopt.ExampleWeights(EXAMPLES * BATCHES).double()
        nn.init.normal_(self.weights.logits)

    def start(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return a model and its optimizer, fresh or used."""
        model = copy.deepcopy(self.network)
        optimizer = self.factory(model.parameters())
        if self.warm:
            self.train(model, optimizer, BATCHES)
        return model, optimizer

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        """Ordinary training."""
        for step in range(num_steps):
            optimizer.zero_grad()
            inner_loss(model, self.batches[step % BATCHES], self.weights, {}).backward()
            optimizer.step()

    def meta_loss(self, model: Any) -> Tensor:
        """Squared error on one more batch."""
        return (model(self.validation["inputs"])[:, 0] - self.validation["labels"]).square().mean()

    def plain(self, change: Tensor | None = None) -> tuple[nn.Module, float]:
        """Train a copy with the weights' logits moved; return it and its meta-loss."""
        model, optimizer = self.start()
        before = self.weights.logits.data
        self.weights.logits.data = before if change is None else before + change
        self.train(model, optimizer, self.num_steps)
        self.weights.logits.data = before
        with torch.no_grad():
            return model, float(self.meta_loss(model))

    def unrolled(self, estimator: Estimator) -> tuple[Any, Tensor]:
        """Return metaopt's trained model, and its hypergradient."""
        model, optimizer = self.start()
        stage = metaopt.Stage(model, optimizer, inner_loss, self.batches, self.num_steps, estimator, seed=0)
        trained = metaopt.Chain(only=stage).unroll(self.weights)["only"]
        found = metaopt.hypergradient(self.meta_loss(trained), self.weights)
        return trained, found["logits"]

    def difference(self, direction: Tensor, step: float = 1e-3) -> float:
        """Central difference of the plain run's meta-loss along a direction, extrapolated to step 0."""
        rough, fine = (
            (self.plain(h * direction)[1] - self.plain(-h * direction)[1]) / (2 * h) for h in (step, step / 2)
        )
        return fine + (fine - rough) / 3


def measure(kind: type[torch.optim.Optimizer], options: dict[str, Any], warm: bool, name: str = "") -> Row:
    """Return one line of the table."""
    inner: Any = torch.optim.AdamW if "optimizer" in inspect.signature(kind).parameters else None

    def factory(params: Any) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(None):  # some greet
            optimizer = kind(inner(params, lr=0.03) if inner else params, **options)
        if hasattr(optimizer, "train"):  # schedule-free ones are switched to training
            optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]
        return optimizer

    problem = Problem(factory, 8 if name else steps_of(kind), warm)
    expected = dict(problem.plain()[0].named_parameters())
    errors, trajectory = [], 0.0
    for estimator in (Unrolled(), Checkpointed()):
        trained, found = problem.unrolled(estimator)
        directions = torch.randn(2, len(found), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        slopes = [problem.difference(d) for d in directions]
        off = [abs(float(found @ d) - slope) for d, slope in zip(directions, slopes, strict=True)]
        errors.append(max(off) / float(found.norm()))
        if isinstance(estimator, Unrolled):
            apart = sum(float((trained.params[n] - p).detach().square().sum()) for n, p in expected.items())
            trajectory = (apart / sum(float(p.detach().square().sum()) for p in expected.values())) ** 0.5
    shown = ", ".join(f"{key}={value}" for key, value in options.items())
    return Row(name or kind.__name__, shown, "warm" if warm else "cold", trajectory, *errors)


def cases(names: list[str] | None = None) -> Iterator[tuple[type[torch.optim.Optimizer], dict[str, Any], bool]]:
    """Yield every optimizer × options × start; of the named optimizers only, if any are named."""
    for kind, variants in OPTIONS.items():
        for options in variants if not names or kind.__name__ in names else ():
            yield from ((kind, options, warm) for warm in (False, True))


OTHERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("lion_pytorch", "Lion", {"lr": 0.01}),
    ("adabelief_pytorch", "AdaBelief", {"lr": 0.03, "print_change_log": False}),
    ("adabelief_pytorch", "AdaBelief", {"lr": 0.03, "print_change_log": False, "rectify": False, "eps": 1e-8}),
    ("pytorch_optimizer", "Lamb", {"lr": 0.03}),
    ("pytorch_optimizer", "Lamb", {"lr": 0.03, "pre_norm": True}),
    ("pytorch_optimizer", "AdaBelief", {"lr": 0.03, "eps": 1e-8}),
    ("pytorch_optimizer", "AdaBelief", {"lr": 0.03, "rectify": True}),
    ("pytorch_optimizer", "Lookahead", {"k": 3}),
    ("prodigyopt", "Prodigy", {"lr": 1.0}),
    ("schedulefree", "AdamWScheduleFree", {"lr": 0.03}),
    ("schedulefree", "SGDScheduleFree", {"lr": 0.1}),
    ("transformers", "Adafactor", {}),
    ("transformers", "Adafactor", {"lr": 0.02, "relative_step": False, "beta1": 0.7, "weight_decay": 0.2}),
)


def others() -> None:
    """Print what registering optimizers of other packages gives, of those that are installed."""
    print("| optimizer | options | start | trajectory | hypergradient, Unrolled | hypergradient, Checkpointed |")
    print("|---|---|---|---|---|---|")
    for package, name, options in OTHERS:
        try:
            cls = getattr(importlib.import_module(package), name)
        except ImportError:
            print(f"| {package}.{name} | | not installed | | | |")
            continue
        metaopt.register_optimizer(cls)
        for warm in (False, True):
            try:
                print(measure(cls, options, warm, f"{package}.{name}"), flush=True)
            except metaopt.MetaoptError as error:
                print(f"| {package}.{name} | {options} | refused: {error} | | | |", flush=True)
                break


def main() -> None:
    """Print the table, as Markdown, and its worst entries."""
    torch.set_num_threads(1)
    if sys.argv[1:] == ["others"]:
        others()
        return
    print("| optimizer | options | start | trajectory | hypergradient, Unrolled | hypergradient, Checkpointed |")
    print("|---|---|---|---|---|---|")
    rows = []
    for case in cases(sys.argv[1:]):
        rows.append(measure(*case))
        print(rows[-1], flush=True)
    worst = (max(getattr(row, name) for row in rows) for name in ("trajectory", "unrolled", "checkpointed"))
    print("\n{} rows; worst: trajectory {:.0e}, Unrolled {:.0e}, Checkpointed {:.0e}".format(len(rows), *worst))


if __name__ == "__main__":
    main()
