"""What the layer asks of its parts (loss, hand-over, meta-objective, estimator), and how it calls and tells of them.

What user code raises keeps its type; a note on it says where it was called, and with what.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, StageError, own_lines, tell, was_told
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

        `loop` has the steps and their two halves; `upstream` the trained model of every earlier stage, in the graph.
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

    Give it to a stage in place of its batches; it starts from some of its own (a sequence or re-iterable), whose
    position the stage keeps. What must carry gradient is computed in the stage's loss.
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


class telling:  # noqa: N801  # reads as a statement: `with telling(...)`
    """Note on an exception that passes where it was raised, and the user's own lines on its way; once.

    What is not an `Exception` (KeyboardInterrupt) passes untouched. `where` returns the line that says which part of
    what was called, and with what; it is called only if something is raised.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception) or was_told(error):
            return
        hint = "; most often a label or token is beyond the model's classes or vocabulary: the CPU says which"
        hint = hint if "device-side assert" in str(error) else ""  # torch words it for its own developers
        tell(error, "\n".join([f"raised in {self._where()}{hint}", *own_lines(trace)]))


def described(batch: Any) -> str:
    """Return a batch in a few words: names, dtypes and shapes; of integers on the CPU, their range."""
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name}: {described(value)}" for name, value in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return f"{type(batch).__name__}({', '.join(map(described, batch[:8]))}{', …' if len(batch) > 8 else ''})"
    if not isinstance(batch, Tensor):
        return type(batch).__name__
    integers = not (batch.is_floating_point() or batch.is_complex()) and batch.numel() and batch.device.type == "cpu"
    values = f" {int(batch.min())}…{int(batch.max())}" if integers and type(batch) is Tensor else ""
    return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}{values}"


def taken_by(module: nn.Module) -> str:
    """Return what a model's forward takes, in words."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        names = []
    return f"{type(module).__name__} takes ({', '.join(names[:12])}{', …' if len(names) > 12 else ''})"


def require_arguments(function: Any, names: tuple[str, ...], where: str) -> None:
    """Raise if a function cannot be called with arguments of these names, by position."""
    if not callable(function):
        raise ConfigError(f"{where} is a {type(function).__name__}; give a function of ({', '.join(names)})")
    called: Any = function
    if isinstance(function, nn.Module) and type(function).__call__ is nn.Module.__call__:
        called = function.forward
    try:
        inspect.signature(called).bind(*names)
    except ValueError:  # a builtin has none
        return
    except TypeError as error:
        taken = ", ".join(inspect.signature(called).parameters)
        name = getattr(function, "__name__", type(function).__name__)
        instance = f"; give an instance: {name}(...)" if isinstance(function, type) else ""
        raise ConfigError(
            f"{where} is called with ({', '.join(names)}), and {name} takes ({taken}): {error}{instance}"
        ) from None
