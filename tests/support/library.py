"""The problems of `problems.py` handed to metaopt: every call builds a chain of its own from copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from reference import Problem, Tensors, Training, named_tensors

import metaopt
from metaopt.estimators import Estimator


def as_stage(training: Training, loss: Any = None, estimator: Estimator | None = None, seed: int = 5) -> metaopt.Stage:
    """The same training as a stage; `loss` replaces the hand-written one."""
    model, used = training.private_copy()
    return metaopt.Stage(
        model,
        used if isinstance(training.optimizer, torch.optim.Optimizer) else training.optimizer,
        loss or training.loss,
        training.batches,
        training.num_steps,
        estimator,
        transform=training.transform,
        overrides=training.overrides,
        initial=training.initial,
        seed=seed,
    )


def as_chain(
    problem: Problem, losses: Mapping[str, Any] | None = None, estimator: Estimator | None = None
) -> metaopt.Chain:
    """The same chain; `losses` replaces hand-written losses by the library's, per stage."""
    losses = losses or {}
    return metaopt.Chain(**{name: as_stage(t, losses.get(name), estimator) for name, t in problem.chain.items()})


def hypergradient(problem: Problem, chain: metaopt.Chain | None = None, objective: Any = None) -> Tensors:
    """The library's hypergradient: unroll, meta-loss, backward; read off the meta-parameters' `.grad`."""
    chain = as_chain(problem) if chain is None else chain
    tensors = named_tensors(problem.phi)
    for tensor in tensors.values():
        tensor.grad = None
    meta_loss = (objective or problem.objective)(chain.unroll(problem.phi), problem.batch, problem.phi)
    metaopt.backward(meta_loss, problem.phi)
    return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


def replayed(problem: Problem, chain: metaopt.Chain) -> Problem:
    """The same problem with the random state in which the chain evaluates each inner step."""
    seeds = {n: [s.step_seed(t) for t in range(s.num_steps)] for n, s in chain.stages.items()}
    return replace(problem, chain={n: replace(t, seeds=seeds[n]) for n, t in problem.chain.items()})
