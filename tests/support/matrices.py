"""Two small stages whose inner steps are maps of vectors, and the estimators as expressions of those maps' Jacobians.

z = (θ, optimizer state) is one vector, `Φ_t(z, g, inputs)` a step's update by the formulas of `reference.py`, and
`g_t(θ, inputs)` its gradient; `inputs` are φ = (example weights, logarithm of the rate, initial weights) and, in the
second stage, the trained weights of the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from problems import normal
from reference import adam, sgd
from torch import Tensor, nn
from torch.func import grad, jacrev

import metaopt
from metaopt.estimators import Estimator

EXAMPLES, SIZE = 4, 3
Formula = Callable[..., Any]
Derivative = Callable[["Vectors", tuple[Tensor, ...]], tuple[Tensor, ...]]  # stage, inputs → dθ/dinputs


@dataclass(frozen=True)
class Inner:
    """An inner optimizer: torch's, and its formula with the state that it keeps."""

    factory: Callable[..., torch.optim.Optimizer]
    formula: Formula
    kept: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """What torch's has by default, and what the factory sets."""
        return self.factory([nn.Parameter(torch.zeros(1))]).defaults


OPTIMIZERS = {
    "sgd": Inner(functools.partial(torch.optim.SGD, lr=0.3, weight_decay=0.1), sgd),
    "momentum": Inner(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.8), sgd, ("momentum_buffer",)),
    "adam": Inner(functools.partial(torch.optim.Adam, lr=0.05, eps=1e-2), adam, ("exp_avg", "exp_avg_sq")),
}


class Phi(nn.Module):
    """φ: example weights, logarithm of the first stage's rate, its initial weights."""

    def __init__(self) -> None:
        super().__init__()
        draw = normal(0)
        self.weights = nn.Parameter(draw(EXAMPLES).abs() + 0.5)
        self.rate = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        self.start = nn.Parameter(draw(SIZE))


def split(phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """φ as one vector → weights, logarithm of the rate, initial weights."""
    return phi[:EXAMPLES], phi[EXAMPLES], phi[EXAMPLES + 1 :]


@dataclass(frozen=True)
class Vectors:
    """One stage as maps of vectors; `upstream` says that its labels are what the first stage has become."""

    inner: Inner
    batches: Sequence[Mapping[str, Tensor]]
    num_steps: int
    ridge: float
    bend: Callable[[Tensor], Tensor] = torch.tanh
    upstream: bool = False
    weighted: bool = True
    learned: bool = False  # rate and initial weights
    clip: float | None = None  # the gradient's largest norm

    def loss(self, theta: Tensor, inputs: tuple[Tensor, ...], t: int) -> Tensor:
        """½ mean wᵢ (bend(xᵢᵀθ) − yᵢ)² + ½ ridge ‖θ‖²."""
        batch = self.batches[t % len(self.batches)]
        labels = self.bend(batch["inputs"] @ inputs[1]) if self.upstream else batch["labels"]
        weights = split(inputs[0])[0] if self.weighted else 1.0
        error = self.bend(batch["inputs"] @ theta) - labels
        return (weights * error**2).mean() / 2 + self.ridge / 2 * (theta**2).sum()

    def gradient(self, theta: Tensor, inputs: tuple[Tensor, ...], t: int) -> Tensor:
        """∂L_t/∂θ."""
        return grad(self.loss)(theta, inputs, t)

    def update(self, z: Tensor, gradient: Tensor, inputs: tuple[Tensor, ...], t: int) -> Tensor:
        """Φ_t."""
        option = self.inner.options()
        if self.clip is not None:
            gradient = gradient * (self.clip / (gradient.norm() + 1e-6)).clamp(max=1.0)
        if self.learned:
            option["lr"] = split(inputs[0])[1].exp()
        theta, *kept = z.split(SIZE)
        state = {**dict(zip(self.inner.kept, kept, strict=True)), "step": t}
        after, state = self.inner.formula(theta, gradient, state, option)
        return torch.cat([after, *(state[name] for name in self.inner.kept)])

    def step(self, z: Tensor, inputs: tuple[Tensor, ...], t: int) -> Tensor:
        """The whole inner step."""
        return self.update(z, self.gradient(z[:SIZE], inputs, t), inputs, t)

    def start(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """z before the first step."""
        theta = split(inputs[0])[2] if self.learned else torch.full((SIZE,), 0.3, dtype=torch.float64)
        return torch.cat([theta, torch.zeros(SIZE * len(self.inner.kept), dtype=torch.float64)])

    def run(self, inputs: tuple[Tensor, ...], num_steps: int | None = None) -> Tensor:
        """z after the steps, in the graph."""
        z = self.start(inputs)
        for t in range(self.num_steps if num_steps is None else num_steps):
            z = self.step(z, inputs, t)
        return z

    # --- Jacobians of step t, at the z that it starts from

    def at(self, t: int, inputs: tuple[Tensor, ...]) -> Jacobians:
        """All of them."""
        z = self.run(inputs, t).detach()
        g = self.gradient(z[:SIZE], inputs, t)
        return Jacobians(
            of_state=jacrev(self.step)(z, inputs, t),
            of_inputs=jacrev(self.step, 1)(z, inputs, t),
            update_of_state=jacrev(self.update)(z, g, inputs, t),
            update_of_gradient=jacrev(self.update, 1)(z, g, inputs, t),
            mixed=jacrev(self.gradient, 1)(z[:SIZE], inputs, t),
        )

    def stage(self, estimator: Estimator | None) -> metaopt.Stage:
        """The same as a stage of metaopt."""
        model = nn.Linear(SIZE, 1, bias=False, dtype=torch.float64)
        model.weight.data.fill_(0.3)
        learned: dict[str, Any] = {
            "overrides": lambda phi, t: {"lr": phi.rate.exp()},
            "initial": lambda phi, upstream: {"weight": phi.start[None]},
        }
        options = learned if self.learned else {}
        options |= {} if self.clip is None else {"transform": metaopt.ClipNorm(self.clip)}
        return metaopt.Stage(
            model, self.inner.factory, self.as_loss, self.batches, self.num_steps, estimator, seed=0, **options
        )

    def as_loss(self, model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        """The same loss in metaopt's words."""
        labels = batch["labels"]
        if self.upstream:
            labels = self.bend(upstream["first"](batch["inputs"])[:, 0])
        error = self.bend(model(batch["inputs"])[:, 0]) - labels
        weights = phi.weights if self.weighted else 1.0
        return (weights * error**2).mean() / 2 + self.ridge / 2 * (model.params["weight"] ** 2).sum()


@dataclass(frozen=True)
class Jacobians:
    """Of one step: ∂z'/∂z and ∂z'/∂inputs in all; ∂Φ/∂z and ∂Φ/∂g of the update alone; ∂²L/∂θ∂inputs."""

    of_state: Tensor
    of_inputs: tuple[Tensor, ...]
    update_of_state: Tensor
    update_of_gradient: Tensor
    mixed: tuple[Tensor, ...]


@dataclass(frozen=True)
class Pair:
    """Two stages, the second of which learns from the first; the meta-loss reads both, or the last one alone."""

    stages: tuple[Vectors, ...]
    phi: Phi = field(default_factory=Phi)
    reads_last: bool = False

    @property
    def vector(self) -> Tensor:
        """φ as one vector."""
        return torch.cat([p.detach().flatten() for p in self.phi.parameters()])

    def inputs(self, position: int) -> tuple[Tensor, ...]:
        """Of one of the stages."""
        if position == 0:
            return (self.vector,)
        return self.vector, self.stages[0].run((self.vector,))[:SIZE]

    def meta_loss(self, trained: Sequence[Tensor]) -> Tensor:
        """½ Σ of squared sines of the weights, of each stage or of the last one alone."""
        read = trained[-1:] if self.reads_last else trained
        return sum((0.3 + theta).sin().square().sum() / 2 for theta in read)  # type: ignore[return-value]

    def cotangents(self, trained: Sequence[Tensor]) -> list[Tensor]:
        """d meta-loss / dθ of each stage's trained weights."""
        return list(grad(self.meta_loss)(list(trained)))

    def by(self, *derivatives: Derivative) -> Tensor:
        """The hypergradient, with each stage's dθ/dinputs by one function, or its own; the chain rule does the rest."""
        trained = [stage.run(self.inputs(i))[:SIZE] for i, stage in enumerate(self.stages)]
        cotangents = self.cotangents(trained)
        total, above = torch.zeros(len(self.vector), dtype=torch.float64), None
        for i, (stage, cotangent) in enumerate(zip(self.stages, cotangents, strict=True)):
            of_phi, *of_upstream = derivatives[i % len(derivatives)](stage, self.inputs(i))
            whole = of_phi if above is None else of_phi + of_upstream[0] @ above
            total, above = total + cotangent @ whole, whole
        return total

    def by_metaopt(self, *estimators: Estimator) -> Tensor:
        """The library's, by one estimator, or one for each stage."""
        made = {
            name: stage.stage(estimators[i % len(estimators)])
            for i, (name, stage) in enumerate(zip(("first", "second"), self.stages, strict=False))
        }
        trained = metaopt.Chain(**made).unroll(self.phi)
        loss = self.meta_loss([model.params["weight"][0] for model in trained.values()])
        parameters = list(self.phi.parameters())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        return torch.cat([part.flatten() for part in parts])


def pair(optimizer: str = "momentum", num_steps: int = 5, **changes: Any) -> Pair:
    """Both stages with that optimizer; `changes` of both."""
    draw = normal(1)
    batches = [{"inputs": draw(EXAMPLES, SIZE), "labels": draw(EXAMPLES)} for _ in range(2)]
    first = Vectors(OPTIMIZERS[optimizer], batches, num_steps, ridge=0.05, learned=True)
    second = replace(first, learned=False, upstream=True, batches=batches[::-1])
    return Pair(tuple(replace(stage, **changes) for stage in (first, second)))


def alone(whole: Pair, position: int = 0) -> Pair:
    """One of its stages."""
    return replace(whole, stages=(whole.stages[position],))


def error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


# --- the estimators, as matrices


def exact(stage: Vectors, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """dθ_T/dinputs."""
    return tuple(j[:SIZE] for j in jacrev(stage.run)(inputs))


def truncated(last: int) -> Derivative:
    """Σ_{t ≥ T−last} A_{T−1} … A_{t+1} B_t."""

    def derivative(stage: Vectors, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = [torch.zeros(len(stage.start(inputs)), len(x), dtype=torch.float64) for x in inputs]
        for t in range(stage.num_steps - last, stage.num_steps):
            at = stage.at(t, inputs)
            found = [at.of_state @ f + b for f, b in zip(found, at.of_inputs, strict=True)]
        return tuple(f[:SIZE] for f in found)

    return derivative


def first_order(stage: Vectors, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As `exact`, with ∂Φ/∂z of the update alone in place of ∂z'/∂z, initial weights included."""
    found = list(jacrev(stage.start)(inputs))
    for t in range(stage.num_steps):
        at = stage.at(t, inputs)
        found = [at.update_of_state @ f + b for f, b in zip(found, at.of_inputs, strict=True)]
    return tuple(f[:SIZE] for f in found)


def neumann(terms: int) -> Derivative:
    """Σ_{j < terms} A^j B of the last step."""

    def derivative(stage: Vectors, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        at = stage.at(stage.num_steps - 1, inputs)
        powers = [torch.linalg.matrix_power(at.of_state, j) for j in range(terms)]
        return tuple((sum(powers) @ b)[:SIZE] for b in at.of_inputs)  # type: ignore[operator]

    return derivative


def hessian_and_mixed(stage: Vectors, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """∂²L/∂θ² and ∂²L/∂θ∂inputs of the last step's loss, at the trained weights."""
    theta, t = stage.run(inputs)[:SIZE].detach(), stage.num_steps - 1
    return jacrev(stage.gradient)(theta, inputs, t), jacrev(stage.gradient, 1)(theta, inputs, t)
