"""Everybody who takes part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from by_hand import Run, by_formula, plain, with_higher
from peers import with_betty, with_torchopt
from torch import Tensor
from work import Batch, Work, distillation, validation_loss, weighted_loss

import metaopt

UNIT, BASELINE, OURS = "plain", "higher", "unrolled"  # what ratios are taken over


class UnavailableError(Exception):
    """A contestant that cannot run here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Args:
        name: on the command line and in the results.
        label: in tables.
        make: work → a call that goes through both trainings and returns A's gradient, the same at each call.
        exact: whether that is the gradient of the meta-loss, up to rounding.
        captures: its first call does what later ones need not.
        ours: it is an estimator of this project.
    """

    name: str
    label: str
    make: Callable[[Work], Run]
    exact: bool = True
    captures: bool = False
    ours: bool = False


def with_metaopt(work: Work, estimator: Callable[[], Any]) -> Run:
    """This project: a chain of two stages, `metaopt.backward`."""
    spec = work.spec
    weights = metaopt.ExampleWeights(len(work.logits)).to(spec.device, work.logits.dtype)
    weights.logits.data.copy_(work.logits.data)
    teacher, student = work.models()

    def weighted(model: Any, batch: Batch, meta_params: Any, upstream: Any) -> Tensor:
        return weighted_loss(model, batch, meta_params(batch))

    def distilled(model: Any, batch: Batch, meta_params: Any, upstream: Any) -> Tensor:
        return distillation(model, batch, upstream["teacher"])

    stage = functools.partial(
        metaopt.Stage, num_steps=spec.num_steps, autocast="bfloat16" if spec.autocast else None, seed=0
    )
    chain = metaopt.Chain(
        teacher=stage(teacher, work.optimizer, weighted, work.train, estimator=estimator()),
        student=stage(student, work.optimizer, distilled, work.unlabelled, estimator=estimator()),
    )

    def run() -> Tensor:
        trained = chain.unroll(weights)
        with work.casting():
            loss = validation_loss(trained["student"], work.validation)
        return metaopt.hypergradient(loss, weights)["logits"]

    return run


def ours(name: str, label: str, estimator: str, *args: Any, **options: Any) -> Contestant:
    """An estimator of this project; arguments that are names of classes are made into instances of them."""
    exact = options.pop("exact", True)
    product = options.pop("product", None)

    def make(work: Work) -> Run:
        def new() -> Any:
            given = {} if product is None else {"product": _class(product)()}
            return _class(estimator)(*args, **given, **options)

        new()
        return with_metaopt(work, new)

    return Contestant(name, label, make, exact, captures=product == "Captured", ours=True)


def _class(name: str) -> Any:
    found = getattr(metaopt, name, None)
    if found is None:
        raise UnavailableError(f"metaopt {metaopt.__version__} has no {name}")
    return found


def _needs(module: str, make: Callable[[Work], Run]) -> Callable[[Work], Run]:
    def tried(work: Work) -> Run:
        try:
            return make(work)
        except ImportError as error:
            raise UnavailableError(f"{module} cannot be imported with torch {torch.__version__}: {error}") from error

    return tried


def _betty(method: str, label: str, **settings: Any) -> Contestant:
    make = _needs("betty", functools.partial(with_betty, method=method, **settings))
    return Contestant(f"betty-{method}", f"Betty, {label}", make, exact=False)


CONTESTANTS = (
    Contestant("plain", "plain training, no meta-gradient", plain, exact=False),
    Contestant("higher", "`higher` by hand", with_higher),
    Contestant("torchopt", "TorchOpt", _needs("torchopt", with_torchopt)),
    Contestant("checkpoint", "hand unroll, `torch.utils.checkpoint`", functools.partial(by_formula, checkpointed=True)),
    _betty("darts", "finite difference"),
    _betty("neumann", "Neumann, 5 terms", neumann_iterations=5, neumann_alpha=0.1),
    _betty("cg", "conjugate gradient, 5 iterations", cg_iterations=5),
    _betty("sama", "SAMA"),
    ours("unrolled", "`Unrolled()`", "Unrolled"),
    ours("states", '`Checkpointed(store="states")`', "Checkpointed", store="states"),
    ours("gradients", "`Checkpointed()`", "Checkpointed", store="gradients"),
    ours("recompute", '`Checkpointed(store="recompute")`', "Checkpointed", store="recompute"),
    ours("disk", '`Checkpointed(place="disk")`', "Checkpointed", place="disk"),
    ours("captured", "`Checkpointed(Captured())`", "Checkpointed", product="Captured"),
    ours("captured-recompute", '`Checkpointed(Captured(), store="recompute")`', "Checkpointed", product="Captured",
         store="recompute"),
    ours("difference", "`Checkpointed(FiniteDifference())`", "Checkpointed", product="FiniteDifference", exact=False),
    ours("truncated", "`Truncated(5)`", "Truncated", 5, exact=False),
    ours("one-step", "`OneStep()`", "OneStep", exact=False),
    ours("first-order", "`FirstOrder()`", "FirstOrder", exact=False),
    ours("neumann", "`Neumann(5)`", "Neumann", 5, exact=False),
    ours("cg", "`ConjugateGradient(5)`", "ConjugateGradient", 5, exact=False),
)  # fmt: skip
ON_A_GPU = (
    ours("host", '`Checkpointed(place="host")`', "Checkpointed", place="host"),
    ours("host-recompute", '`Checkpointed(store="recompute", place="host")`', "Checkpointed", store="recompute",
         place="host"),
    ours("captured-host", '`Checkpointed(Captured(), place="host")`', "Checkpointed", product="Captured", place="host"),
)  # fmt: skip
BY_NAME = {contestant.name: contestant for contestant in (*CONTESTANTS, *ON_A_GPU)}
