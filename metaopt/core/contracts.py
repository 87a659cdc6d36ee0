"""What the layer asks of its parts: loss, hand-over, meta-objective and estimator, and the types they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import StageError
from metaopt.base.telling import described, taken_by, telling
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.view import FunctionalModel
from metaopt.core.view import Tensors as Tensors

if TYPE_CHECKING:
    from metaopt.core.inner_loop import InnerLoop, InnerResult

Upstream = Mapping[str, FunctionalModel]
Trained = Mapping[str, FunctionalModel]
Gradients = Mapping[str, Tensor | None]  # of the parameters that a loss does not use: None
Transform = Callable[[Tensors], Tensors]
LossFunction = Callable[[Any, Any, AnyMetaParameters, Upstream], Tensor]
OnStep = Callable[[str, int, Tensor], None]  # stage, step, detached loss


class Estimator(ABC):
    """How a stage is differentiated: it runs an inner loop and connects the trained weights to what they depend on."""

    @property
    def exact(self) -> bool:
        """Whether the hypergradient is that of the training as it is run, but for rounding."""
        return True

    def check(self, name: str, stage: Any) -> None:  # noqa: B027
        """Raise if this stage cannot be differentiated so; called before any training."""

    @abstractmethod
    def differentiate(self, loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> InnerResult:
        """Run the inner loop; the result's `params` are in the graph of the meta-parameters and upstream weights.

        Args:
            loop: the steps to run, and their two halves.
            meta_params: one module or a named mapping.
            upstream: name → trained model of every earlier stage, in the graph.
        """


class InnerLoss(ABC):
    """What a stage minimises: subclass it, or give any function with the same arguments.

    `reads` names the earlier stages that the loss looks at, so that a misspelt one is found before any training.
    """

    reads: tuple[str, ...] = ()

    @abstractmethod
    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        """Return the loss, a scalar in the graph of the model's `params`.

        Args:
            model: the stage's own model at the present inner step; call it, or read its `.params`.
            batch: what the stage's stream yields.
            meta_params: as they were given to `chain.unroll`: a tensor, a module or a named mapping.
            upstream: name → trained model, for every earlier stage, in eval mode.
        """

    def problem_with(self, model: nn.Module, upstream: Mapping[str, nn.Module]) -> str | None:
        """Say why this loss cannot work with these modules (upstream: by name), before any training; None if it can."""
        return None


class MetaObjective(ABC):
    """What the meta-parameters minimise: the plug-in point that users subclass; `reads` as of an inner loss."""

    reads: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        """Return the meta-loss, a scalar in the graph of the trained weights or the meta-parameters.

        Args:
            trained: stage name → trained model, in eval mode (`trained["student"].train()` for the other).
            batch: of the validation stream.
            meta_params: a tensor, a module or a named mapping.
        """


class HandOver(ABC):
    """Writes a stage's data set with the upstream models, once per unroll and without a graph.

    Give it to a stage in place of its batches. What must carry gradient is computed in the stage's loss.

    Args:
        batches: what it starts from: a sequence or re-iterable; the stage keeps its position.
    """

    reads: tuple[str, ...] = ()

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    @abstractmethod
    def write(self, upstream: Upstream, batches: Sequence[Any]) -> Sequence[Any]:
        """Return one batch for each of these, written by the upstream models."""


def evaluate(objective: Any, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
    """Return the meta-loss; what the objective raises is told with the batch and the models that it was given."""

    def said() -> str:
        models = ", ".join(f"stage {name!r}: {taken_by(model.structure.module)}" for name, model in trained.items())
        return f"the meta-objective {type(objective).__name__}, on {described(batch)}; {models}"

    with telling(said):
        return objective(trained, batch, meta_params)


def require_scalar(loss: Any, where: str, needs_graph: bool = True) -> Tensor:
    """Return `loss` if it is a scalar tensor (in the graph); raise what is wrong with it otherwise."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise StageError(f"{where} must return a scalar tensor, got {shape}; reduce it with .mean() or .sum()")
    if needs_graph and torch.is_grad_enabled() and not loss.requires_grad:
        raise StageError(
            f"{where} returned a tensor without a graph: something in it ran under torch.no_grad(), was detached, or "
            "was rebuilt with torch.tensor(...); compute it from the model that is handed in. At which line, says "
            "print(metaopt.explain_hypergradient(chain, objective, batch, meta_params))"
        )
    return loss.reshape(())
