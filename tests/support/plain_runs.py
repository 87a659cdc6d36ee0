"""Inner training as one writes it in plain PyTorch, beside the same training as a stage."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from differences import central_difference
from networks import Gained
from reference import Tensors, named_tensors, norm, relative_error, replayable
from torch import Tensor, nn

import metaopt
from metaopt.estimators import Checkpointed, Estimator

SEED = 5


def batches(count: int = 4, size: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensors]:
    """Batches for `Gained`; `index` runs through all of them."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [
        {"inputs": draw(size, 3).to(dtype), "labels": draw(size).to(dtype), "index": torch.arange(size) + size * number}
        for number in range(count)
    ]


def weighted_error(model: Any, batch: Tensors, meta_params: Any, upstream: Any = None) -> Tensor:
    """mean σ(aᵢ) (model(xᵢ) − yᵢ)², a the logits of `meta_params`, or of its part `weights`."""
    table = meta_params["weights"] if isinstance(meta_params, dict) else meta_params
    return (table.logits.sigmoid()[batch["index"]] * (model(batch["inputs"])[:, 0] - batch["labels"]) ** 2).mean()


def example_weights(count: int = 16) -> metaopt.ExampleWeights:
    """Logits in float64 that are not all alike."""
    weights = metaopt.ExampleWeights(count).double()
    nn.init.normal_(weights.logits, generator=torch.Generator().manual_seed(4))
    return weights


@dataclass
class Recipe:
    """How one model is trained; `clip` and `learned` say in plain torch what a stage is told by its slots.

    Args:
        clip: parameters, after the backward.
        learned: optimizer, model, meta-parameters, step: sets hyperparameters before a step (or weights at step 0).
        slots: what the stage is given beside what is named here.
    """

    optimizer: Callable[[Any], torch.optim.Optimizer]
    model: Callable[[], nn.Module] = Gained
    num_steps: int = 5
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    clip: Callable[[list[Any]], Any] | None = None
    learned: Callable[[torch.optim.Optimizer, nn.Module, Any, int], None] | None = None
    accumulate: int = 1
    autocast: str | None = None
    slots: dict[str, Any] | None = None
    plain_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    dtype: torch.dtype = torch.float64

    def stage(self, estimator: Estimator | None = None) -> metaopt.Stage:
        """The training as a stage."""
        return metaopt.Stage(
            self.model().to(self.dtype),
            self.optimizer,
            weighted_error,
            batches(dtype=self.dtype),
            self.num_steps,
            estimator,
            schedule=self.schedule,
            accumulate=self.accumulate,
            autocast=self.autocast,
            seed=SEED,
            **(self.slots or {}),
        )

    def chain(self, estimator: Estimator | None = None) -> metaopt.Chain:
        """The stage alone in a chain."""
        return metaopt.Chain(only=self.stage(estimator))

    def run_plainly(self, meta_params: Any, num_steps: int | None = None) -> nn.Module:
        """The training loop that a user would write."""
        model, seeds, data = self.model().to(self.dtype), self.stage(), batches(dtype=self.dtype)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = self.plain_optimizer(model) if self.plain_optimizer else self.optimizer(trained)
        schedule = self.schedule(optimizer) if self.schedule else None
        for step in range(num_steps or self.num_steps):
            optimizer.zero_grad()
            torch.manual_seed(seeds.step_seed(step))
            if self.learned is not None:
                with torch.no_grad():
                    self.learned(optimizer, model, meta_params, step)
            for part in range(self.accumulate):
                batch = data[(step * self.accumulate + part) % len(data)]
                with self.precision():
                    loss = weighted_error(model, batch, meta_params) / self.accumulate
                loss.backward()
            if self.clip is not None:
                self.clip(trained)
            optimizer.step()
            if schedule is not None:
                schedule.step()
        return model.eval()

    def precision(self) -> Any:
        """Autocast, if it is asked for."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def meta_loss(model: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Squared error on one more batch."""
    batch = batches(5, dtype=dtype)[-1]
    return (model(batch["inputs"])[:, 0] - batch["labels"]).square().mean()


def hypergradient(recipe: Recipe, meta_params: Any, estimator: Estimator | None = None) -> Tensors:
    """The library's, by the names of the meta-parameters."""
    trained = recipe.chain(estimator).unroll(meta_params)["only"]
    return metaopt.hypergradient(meta_loss(trained, recipe.dtype), meta_params)


def difference_error(recipe: Recipe, meta_params: Any, found: Tensors, only: Sequence[str] = ()) -> float:
    """|⟨found, d⟩ − central difference along d of the plain run| / ‖found‖, the larger of two d; a number has one.

    Args:
        recipe, meta_params, found: what is checked.
        only: meta-parameters along which d goes; all if none are named.
    """
    generator, errors = torch.Generator().manual_seed(0), []
    of_interest = {n: g for n, g in found.items() if not only or n in only}
    for _ in range(min(2, sum(g.numel() for g in of_interest.values()))):
        drawn = {n: torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in of_interest.items()}
        direction = {n: d / norm(drawn) for n, d in drawn.items()}

        def value(distance: float, direction: Tensors = direction) -> float:
            moved = copy.deepcopy(meta_params)
            with torch.no_grad():
                for name, tensor in named_tensors(moved).items():
                    if name in direction:
                        tensor.add_(direction[name], alpha=distance)
            with replayable():
                model = recipe.run_plainly(moved)
            with torch.no_grad():
                return float(meta_loss(model))

        slope = sum(float((of_interest[n] * d).sum()) for n, d in direction.items())
        errors.append(abs(slope - central_difference(value, 1e-3).value) / norm(of_interest))
    return max(errors)


def weights_of(model: Any) -> Tensors:
    """Detached parameters of a module or a trained model."""
    items = model.named_parameters() if isinstance(model, nn.Module) else model.params.items()
    return {name: p.detach() for name, p in items}


def assert_proven(recipe: Recipe, meta_params: Any, only: Sequence[str] = ()) -> Tensors:
    """Trajectory, going on after a commit, and hypergradient by both estimators are those of the plain run."""
    chain = recipe.chain()
    plain, longer = (weights_of(recipe.run_plainly(meta_params, n * recipe.num_steps)) for n in (1, 2))
    trained = chain.unroll(meta_params)
    assert relative_error(weights_of(trained["only"]), plain) < 1e-12
    assert relative_error(weights_of(recipe.chain().train(meta_params)["only"]), plain) < 1e-13
    if (recipe.slots or {}).get("initial") is None:
        chain.commit(trained)
        assert relative_error(weights_of(chain.unroll(meta_params)["only"]), longer) < 1e-12
    found = hypergradient(recipe, meta_params)
    assert difference_error(recipe, meta_params, found, only) < 1e-8
    assert relative_error(hypergradient(recipe, meta_params, Checkpointed()), found) < 1e-12
    return found


def without(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with something changed, to see that it matters."""
    return replace(recipe, **changes)
