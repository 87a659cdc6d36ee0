"""The stateless view of a model that `higher` patches.

`higher` sees only a thin module that registers the trained parameters; a call lends them to the user's own module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import higher
import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.core.structure import ModelStructure

Tensors = dict[str, Tensor]
Call = Callable[[Mapping[str, Tensor], Tensors, bool, Any, Any], Any]


@dataclass(frozen=True)
class Training:
    """How a model was trained, for whoever uses it as it was.

    Args:
        stage: its name.
        loss: what it minimised.
        step: inner steps since its start or last reset.
        read: of each way in which the loss called it, the names of the tensors that it read.
    """

    stage: str
    loss: Any
    step: int
    read: set[frozenset[str]]

    def warn_of_others(self, kwargs: Mapping[str, Any]) -> None:
        """Warn, once for the same names, if a call lacks what every call in training had."""
        now = names_read(kwargs)
        made = {"decoder_input_ids"} if "labels" in kwargs else set()  # by the model itself
        if not now or not self.read or any(names <= now | made for names in self.read):
            return
        before = " or ".join(sorted(", ".join(sorted(names)) for names in self.read))
        self.read.add(now)
        warnings.warn(
            f"stage {self.stage!r} read {before} in training and reads {', '.join(sorted(now))} now: inputs that it "
            f"never saw. Feed it as in training: metaopt.PipelineLoss({self.stage!r}), objective=pipeline (a loss of "
            "your own makes the student's inputs in student_inputs(...) of a metaopt.FromUpstream)",
            UserWarning,
            stacklevel=3,
        )


def names_read(kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the tensors that a model reads, but for labels and masks, which say nothing themselves."""
    tensors = {name for name, value in kwargs.items() if isinstance(value, Tensor)}
    return frozenset(name for name in tensors if name != "labels" and not name.endswith("_mask"))


class FunctionalModel:
    """A model as a function of its weights: `f(inputs; params, buffers)`, called like the module it stands for.

    Args:
        structure: of the user's module.
        params: deduplicated name → tensor, in the graph; frozen parameters included.
        buffers: name → tensor; a call works on clones and never changes them.
        training: the mode in which a call runs; `train()` and `eval()` give a view in the other one.
        optimizer_state: name → the inner optimizer's state of that parameter, detached.
        trained: how it was trained; None of a model that is in training, or was not trained here.
    """

    def __init__(
        self,
        structure: ModelStructure,
        params: Mapping[str, Tensor],
        buffers: Tensors,
        *,
        training: bool = False,
        optimizer_state: Mapping[str, Mapping[str, Any]] | None = None,
        call: Call | None = None,
        trained: Training | None = None,
    ) -> None:
        self._structure = structure
        self._call = call or structure.call
        self.params = dict(params)
        self.buffers = buffers
        self.training = training
        self.optimizer_state = dict(optimizer_state or {})
        self.trained = trained

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.trained is not None and not args:
            self.trained.warn_of_others(kwargs)
        return self._call(self.params, self._call_buffers(), self.training, args, kwargs)

    @property
    def config(self) -> Any:
        """The module's own `config` (of Hugging Face models), or None."""
        return getattr(self._structure.module, "config", None)

    @property
    def step(self) -> int:
        """Inner steps that its stage has taken since its start or last reset; in training, before this one."""
        return 0 if self.trained is None else self.trained.step

    def note_reading(self, inputs: Mapping[str, Any]) -> None:
        """Note, in training, that these inputs are what the model is trained on, in whatever form it reads them."""

    def _call_buffers(self) -> Tensors:
        if self._structure.unsaid and not self.training and torch.is_grad_enabled():
            warnings.warn(self._structure.unsaid.pop(), RuntimeWarning, stacklevel=3)
        return {name: buffer.clone() for name, buffer in self.buffers.items()}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a trained model has no attribute {name!r}; for the module's own methods and attributes write "
            f"`with model.as_module() as module: module.{name}`"
        )

    def __repr__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{type(self).__name__}({type(self._structure.module).__name__}, {len(self.params)} tensors, {mode})"

    @contextmanager
    def as_module(self) -> Iterator[nn.Module]:
        """Lend the user's module these weights, so that its own methods (`generate`) use them, in the graph."""
        with self._structure.install(self.params, self._call_buffers(), self.training) as module:
            yield module

    def train(self, mode: bool = True) -> FunctionalModel:
        """Return the same model as a view in train mode (dropout on, batch statistics)."""
        return self._with(self.params, training=mode)

    def eval(self) -> FunctionalModel:
        """Return the same model as a view in eval mode."""
        return self.train(False)

    def detach(self) -> FunctionalModel:
        """Return the same model with its weights taken out of the graph."""
        return self._with({name: p.detach() if p.requires_grad else p for name, p in self.params.items()})

    @property
    def structure(self) -> ModelStructure:
        """Of the module that this model is a view of."""
        return self._structure

    def _with(
        self, params: Mapping[str, Tensor], training: bool | None = None, buffers: Tensors | None = None
    ) -> FunctionalModel:
        mode = self.training if training is None else training
        buffers = self.buffers if buffers is None else buffers
        beside: dict[str, Any] = {"optimizer_state": self.optimizer_state, "trained": self.trained}
        return FunctionalModel(self._structure, params, buffers, training=mode, **beside)


class Models(dict[str, FunctionalModel]):
    """Trained models by stage name; a name that is not there raises, and says which are."""

    def __missing__(self, name: str) -> FunctionalModel:
        raise ConfigError(f"there is no stage {name!r} to read here{did_you_mean(name, self)}")


class InnerModel(FunctionalModel):
    """The model inside its own inner step: in train mode, and its calls move `buffers` (batch-norm statistics)."""

    read_step: Callable[[], int] = staticmethod(lambda: 0)
    read: set[frozenset[str]] | None = None  # the names of what it reads are added here

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            self.note_reading(kwargs)
        return super().__call__(*args, **kwargs)

    def note_reading(self, inputs: Mapping[str, Any]) -> None:
        if self.read is not None:
            self.read.add(names_read(inputs))

    @property
    def step(self) -> int:
        """Inner steps that the stage has taken before this one, since its start or last reset."""
        return self.read_step()

    def _call_buffers(self) -> Tensors:
        return self.buffers

    def train(self, mode: bool = True) -> FunctionalModel:
        """Return the model itself, which is in train mode already, or a view in eval mode."""
        return self if mode else super().train(False)


class _View(nn.Module):
    """What `higher` patches: the trained parameters under plain names, and a forward that hands them on."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = list(params)
        for i, param in enumerate(params.values()):
            self.register_parameter(f"p{i}", param)

    def forward(self, run: Callable[[Tensors], Any]) -> Any:
        return run({name: getattr(self, f"p{i}") for i, name in enumerate(self.names)})


class DifferentiableCopy:
    """One `higher` inner loop over a model: `params` → `call` → `step`, every step kept in the graph."""

    def __init__(self, structure: ModelStructure, names: list[str], fmodel: Any, diffopt: Any) -> None:
        self._structure = structure
        self._names = names
        self._fmodel = fmodel
        self._diffopt = diffopt

    @property
    def params(self) -> Tensors:
        """The present fast weights, by name."""
        return dict(zip(self._names, self._fmodel.fast_params, strict=True))

    def call(self, params: Mapping[str, Tensor], buffers: Tensors, training: bool, args: Any, kwargs: Any) -> Any:
        """Run the model through `higher`'s patched view; frozen parameters come along as they are."""

        def run(fast: Tensors) -> Any:
            return self._structure.call({**params, **fast}, buffers, training, args, kwargs)

        return self._fmodel(run, params=[params[name] for name in self._names])

    def step(self, loss: Tensor, params: Mapping[str, Tensor], **options: Any) -> Tensors:
        """Take one inner step by `higher`'s differentiable optimizer: gradient of `loss`, then update."""
        fast = self._diffopt.step(loss, params=[params[name] for name in self._names], **options)
        return dict(zip(self._names, fast, strict=True))

    def release(self) -> None:
        """Let go of what the optimizer holds of the graph."""
        self._diffopt.release()

    @property
    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The inner optimizer's state by parameter name, in the graph."""
        return self._diffopt.named_state


@contextmanager
def differentiable_copy(structure: ModelStructure, optimizer: Any, names: list[str]) -> Iterator[DifferentiableCopy]:
    """Open `higher.innerloop_ctx` over the parameters `names` of a module; release what it holds on leaving.

    Args:
        structure: of the user's module, whose weights are copied and never changed.
        optimizer: what `metaopt.optimizers.rule` registered with `higher`.
        names: the trained parameters, in the optimizer's order.
    """
    view = _View({name: structure.params[name] for name in names})
    with higher.innerloop_ctx(view, optimizer, copy_initial_weights=True) as (fmodel, diffopt):
        opened = DifferentiableCopy(structure, names, fmodel, diffopt)
        try:
            yield opened
        finally:
            fmodel._fast_params = []  # higher refers in circles to every step's weights, and they to their graph
            fmodel._parameters.clear()
            opened.release()
