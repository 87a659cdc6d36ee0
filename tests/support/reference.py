"""Routes to the hypergradient of a chain of trainings that share no code with the library under test.

1. Here: `hypergradient`, an unroll by hand, whose optimizer steps are formulas, then one `torch.autograd.grad`.
2. `differences.py`: the pipeline run by plain `torch.optim` without a graph, and central differences of it.
3. `closed_forms.py`: linear stages, trained and differentiated as matrix expressions.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensors = dict[str, Tensor]
State = dict[str, Any]
Options = Mapping[str, Any]
Objective = Callable[[Any, Tensors, Any], Tensor]


@dataclass
class Training:
    """One stage of a chain: `optimizer` is a factory, or a used optimizer over `model`'s own parameters."""

    model: nn.Module
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | torch.optim.Optimizer
    loss: Callable[[Any, Tensors, Any, Mapping[str, Any]], Tensor]  # (model, batch, phi, upstream)
    batches: Sequence[Tensors]
    num_steps: int
    seeds: Sequence[int] | None = None
    transform: Callable[[Tensors], Tensors] | None = None
    overrides: Callable[[Any, int], Mapping[str, Any]] | None = None
    initial: Callable[[Any, Mapping[str, Any]], Tensors] | None = None

    def private_copy(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A model and an optimizer over it (with its state, if used), neither shared with the caller."""
        if isinstance(self.optimizer, torch.optim.Optimizer):
            return copy.deepcopy((self.model, self.optimizer))
        model = copy.deepcopy(self.model)
        return model, self.optimizer([p for p in model.parameters() if p.requires_grad])

    def step_inputs(self, step: int) -> Tensors:
        """The batch of one step; the random state of that step is set as a side effect."""
        if self.seeds is not None:
            torch.manual_seed(self.seeds[step])
        return self.batches[step % len(self.batches)]


Chain = Mapping[str, Training]


@dataclass(frozen=True)
class Problem:
    """What a hypergradient is taken of."""

    chain: dict[str, Training]
    objective: Objective
    batch: Tensors
    phi: Any

    def with_stage(self, name: str, **changes: Any) -> Problem:
        """The same problem with one stage changed."""
        return replace(self, chain={**self.chain, name: replace(self.chain[name], **changes)})


@dataclass
class Trained:
    """A model with weights of its own: callable like the module."""

    module: nn.Module
    params: Tensors
    buffers: Tensors = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, {**self.params, **self.buffers}, args, kwargs)


@contextlib.contextmanager
def replayable() -> Iterator[None]:
    """Attention that can be differentiated twice; the caller's random state is put back."""
    with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng(devices=[]):
        yield


def safe_sqrt(value: Tensor) -> Tensor:
    """Square root with slope 0 at 0: exact inside Adam, where that slope meets a moment that is 0 too."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)


def sgd(param: Tensor, gradient: Tensor, state: State, option: Options) -> tuple[Tensor, State]:
    """One step of SGD: v' = μ v + (1 − d) g (at first v' = g), θ' = θ − η v'; Nesterov: θ − η (g + μ v')."""
    gradient = -gradient if option["maximize"] else gradient
    gradient = gradient + option["weight_decay"] * param
    momentum = option["momentum"]
    if isinstance(momentum, Tensor) or momentum != 0:
        velocity = state.get("momentum_buffer")
        kept = (1 - option["dampening"]) * gradient
        velocity = gradient if velocity is None else momentum * velocity + kept
        gradient = gradient + momentum * velocity if option["nesterov"] else velocity
        state = {"momentum_buffer": velocity}
    return param - option["lr"] * gradient, state


def adam(param: Tensor, gradient: Tensor, state: State, option: Options) -> tuple[Tensor, State]:
    """One step of Adam or AdamW: θ' = θ − η/(1 − β₁ᵗ) m / (√v / √(1 − β₂ᵗ) + ε), decay in g or on θ."""
    beta1, beta2 = option["betas"]
    lr, decay = option["lr"], option["weight_decay"]
    gradient = -gradient if option["maximize"] else gradient
    if option["decoupled_weight_decay"]:
        param = param * (1 - lr * decay)
    else:
        gradient = gradient + decay * param
    step = float(state.get("step", 0)) + 1
    mean = beta1 * state.get("exp_avg", 0) + (1 - beta1) * gradient
    square = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * gradient * gradient
    new = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    if option["amsgrad"]:
        largest = state.get("max_exp_avg_sq")
        square = square if largest is None else torch.maximum(largest, square)
        new["max_exp_avg_sq"] = square
    scale = safe_sqrt(square) / (1 - beta2**step) ** 0.5 + option["eps"]
    return param - lr / (1 - beta1**step) * mean / scale, new


FORMULAS = {torch.optim.SGD: sgd, torch.optim.Adam: adam, torch.optim.AdamW: adam}


@dataclass
class Slot:
    """What the optimizer keeps for one named parameter: its formula, options and state."""

    formula: Callable[[Tensor, Tensor, State, Options], tuple[Tensor, State]]
    option: Options
    state: State


def _slots(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Slot]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    slots = {}
    for group in optimizer.param_groups:
        option = {key: value for key, value in group.items() if key != "params"}
        for parameter in group["params"]:
            state = copy.deepcopy(optimizer.state.get(parameter, {}))
            slots[names[parameter]] = Slot(FORMULAS[type(optimizer)], option, state)
    return slots


def _unroll_training(stage: Training, phi: Any, upstream: Mapping[str, Trained]) -> Trained:
    module, optimizer = stage.private_copy()
    slots = _slots(module, optimizer)
    params = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in module.named_parameters()}
    if stage.initial is not None:
        params.update(stage.initial(phi, upstream))
    model = Trained(module.train(), params, {n: b.detach().clone() for n, b in module.named_buffers()})
    names = [name for name in slots if params[name].requires_grad]
    for step in range(stage.num_steps):
        loss = stage.loss(model, stage.step_inputs(step), phi, upstream)
        weights = [model.params[name] for name in names]
        found = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        gradients = {name: g for name, g in zip(names, found, strict=True) if g is not None}
        gradients = gradients if stage.transform is None else stage.transform(gradients)
        changes = {} if stage.overrides is None else stage.overrides(phi, step)
        model.params = dict(model.params)
        for name, gradient in gradients.items():
            slot = slots[name]
            option = {**slot.option, **changes}
            model.params[name], slot.state = slot.formula(model.params[name], gradient, slot.state, option)
    module.eval()
    return model


def unroll(chain: Chain, phi: Any) -> dict[str, Trained]:
    """Train every stage in order by the formulas above, the whole graph kept."""
    trained: dict[str, Trained] = {}
    with replayable():
        for name, stage in chain.items():
            trained[name] = _unroll_training(stage, phi, dict(trained))
    return trained


def named_tensors(phi: Any) -> Tensors:
    """The meta-parameters by name, of a module or of a mapping of modules."""
    if isinstance(phi, Mapping):
        return {f"{key}.{n}": t for key, part in phi.items() for n, t in named_tensors(part).items()}
    return dict(phi.named_parameters())


def hypergradient(problem: Problem) -> Tensors:
    """d objective(trained, batch, φ) / dφ by one `torch.autograd.grad` through the hand-written unroll."""
    tensors = named_tensors(problem.phi)
    with replayable():
        meta_loss = problem.objective(unroll(problem.chain, problem.phi), problem.batch, problem.phi)
        return dict(zip(tensors, torch.autograd.grad(meta_loss, list(tensors.values())), strict=True))


def norm(tensors: Tensors) -> float:
    """Euclidean length of all tensors together."""
    return sum(float(t.double().square().sum()) for t in tensors.values()) ** 0.5


def relative_error(found: Mapping[str, Tensor], expected: Tensors) -> float:
    """‖found − expected‖ / ‖expected‖ over all tensors together, in float64."""
    assert found.keys() == expected.keys()
    return norm({n: found[n].double() - t.double() for n, t in expected.items()}) / norm(expected)
