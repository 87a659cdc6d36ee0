"""One run of a stage's inner loop, in the two halves that every estimator is built from.

gradient: `loss_at(t, params, …)`, which owns all that must be the same when a step is replayed: batch, random
state, buffers, the mode of the model. update: `transform` (clipping, all-reduce), then the torch optimizer's own
step with that step's hyperparameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import NonFiniteError, StageError
from metaopt.base.random_state import seeded
from metaopt.base.telling import described, taken_by, telling
from metaopt.core.contracts import InnerLoss, LossFunction, Tensors, Transform, Upstream, require_scalar
from metaopt.core.graphs import foreign_parameters
from metaopt.core.guards import naming_inference_tensors, refuse_recomputation, refuse_single_derivative
from metaopt.core.meta_params import AnyMetaParameters, as_given
from metaopt.core.non_finite import first_in_training
from metaopt.core.plain import PlainSteps
from metaopt.core.structure import ModelStructure
from metaopt.core.view import Call, FunctionalModel, InnerModel, Models, Training
from metaopt.optimizers.flattened import State
from metaopt.optimizers.rule import UpdateRule

_LOOK_EVERY = 16  # steps between two looks at the losses on an accelerator


@dataclass
class InnerResult:
    """What an inner loop ends with: the model, and all that `commit` carries on."""

    model: FunctionalModel
    losses: Tensor  # [num_steps], detached
    num_steps: int


@dataclass
class InnerLoop:
    """T inner steps of one stage from its present state, with everything fixed that a replay must repeat.

    Args:
        name: the stage's, for messages.
        structure: of the stage's module.
        rule: its update rule.
        loss: its inner loss.
        batches: per step, its micro-batches (one unless gradients are accumulated).
        seeds: per step, of the random state in which the loss is evaluated.
        transform: applied to the step's gradients, by parameter name, before the optimizer.
        autocast: the dtype in which the loss is evaluated by `torch.autocast`; None for the weights' own.
        hyperparameters: t, meta-parameters → the step's overrides (schedule, learned rates).
        initial: meta-parameters, upstream → learned initial weights by name.
        first_step: inner steps that the stage has taken before; a loss reads `model.step`.
        first_of_training: False for the later parts of a training that is run in parts: `initial` is over by then.
        offset, total: steps of the training before these and in all, where it is run in parts; for messages.
        owners: `id` → name of every parameter of the chain's own modules.
        beside: what the loss has read that differs from step to step and is no tensor.
        read: the names of the tensors with which the loss of the first step has called the model.
    """

    name: str
    structure: ModelStructure
    rule: UpdateRule
    loss: InnerLoss | LossFunction
    batches: Sequence[Sequence[Any]]
    seeds: Sequence[int]
    device: torch.device
    transform: Transform | None = None
    autocast: torch.dtype | None = None
    hyperparameters: Callable[[int, AnyMetaParameters], dict[str, Any]] = field(default=lambda t, meta_params: {})
    initial: Callable[[AnyMetaParameters, Upstream], Mapping[str, Tensor]] | None = None
    first_of_training: bool = True
    first_step: int = 0
    offset: int = 0
    total: int | None = None
    owners: Mapping[int, str] = field(default_factory=dict)
    beside: set[str] = field(default_factory=set)
    read: set[frozenset[str]] = field(default_factory=set)
    _read: tuple[AnyMetaParameters, Upstream] | None = field(default=None, init=False, repr=False)

    @property
    def num_steps(self) -> int:
        """T, the number of inner steps."""
        return len(self.batches)

    @functools.cached_property
    def frozen(self) -> Tensors:
        """Return copies of the parameters that no step changes; of a kind of their own (quantised), themselves."""
        others = {n: p for n, p in self.structure.params.items() if n not in self.rule.names}
        return {n: p.detach().clone() if type(p) is nn.Parameter else p for n, p in others.items()}

    def start(self, own: Mapping[str, Tensor], meta_params: AnyMetaParameters, upstream: Upstream) -> Tensors:
        """Return the trained parameters before step 0: `own`, but for those that `initial` gives."""
        self._read = meta_params, upstream  # to look again, if something stops being finite
        params = dict(own)
        if self.initial is None or not self.first_of_training:
            return params
        with telling(lambda: f"the initial weights of stage {self.name!r}"):
            given = self.initial(as_given(meta_params), upstream)
        for name, value in given.items():
            if name not in params or value.shape != params[name].shape:
                raise StageError(
                    f"stage {self.name!r}: initial gives {name!r} of shape {list(value.shape)}, which is no trained "
                    f"parameter of that shape; there are: {', '.join(params)}"
                )
            params[name] = value if value.requires_grad else value.detach().clone().requires_grad_()
        return params

    def start_buffers(self) -> Tensors:
        """Return copies of the module's buffers."""
        return {name: buffer.detach().clone() for name, buffer in self.structure.buffers.items()}

    def loss_at(
        self,
        t: int,
        params: Mapping[str, Tensor],
        buffers: Tensors,
        meta_params: AnyMetaParameters,
        upstream: Upstream,
        call: Call | None = None,
        batches: Sequence[Any] | None = None,
    ) -> tuple[Tensor, Tensors]:
        """Return the inner loss of step t at these weights, and the buffers that its calls leave behind.

        With several micro-batches it is their mean, whose gradient is the accumulated one.
        """
        torch.clear_autocast_cache()  # it would keep the low-precision copy of a weight that has moved since
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        moved, given = dict(own), as_given(meta_params)
        model = InnerModel(self.structure, params, moved, training=True, call=call)
        model.read_step = functools.partial(self._read_step, t)
        model.read = self.read if t == 0 else None
        micro = self.batches[t] if batches is None else batches
        telling_loss = telling(lambda: self._said_of_loss(t, micro))
        with telling_loss, naming_inference_tensors(self.name), seeded(self.seeds[t], self.device), self.casting():
            losses = [
                require_scalar(self.loss(model, batch, given, upstream), f"the loss of stage {self.name!r}")
                for batch in micro
            ]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        still = {n for n, b in moved.items() if b is own[n] and b._version == 0 and not b.is_floating_point()}
        # The version says nothing of floating ones: batch norm's kernel moves its statistics without a new one.
        return loss, {n: buffers[n] if n in still else b for n, b in moved.items()}

    def _said_of_loss(self, t: int, micro: Sequence[Any]) -> str:
        where = f"the loss of stage {self.name!r}, inner step {self.offset + t} of {self.total or self.num_steps}"
        batch = described(micro[0] if len(micro) == 1 else list(micro))
        return f"{where}, on {batch}; {taken_by(self.structure.module)}"

    def _read_step(self, t: int) -> int:
        self.beside.add("model.step")
        return self.first_step + t

    def casting(self) -> AbstractContextManager[Any]:
        """Return autocast to the stage's dtype, without the cache that would outlive a weight; or nothing."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast, cache_enabled=False)

    def transformed(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Apply the gradient transform to the gradients there are; a parameter that the loss missed keeps None."""
        if self.transform is None:
            return dict(gradients)
        present = {name: g for name, g in gradients.items() if g is not None}
        with telling(lambda: f"the transform of stage {self.name!r}, on {described(present)}"):
            changed = self.transform(present)
        if set(changed) != set(present):
            raise StageError(f"stage {self.name!r}: transform must return a gradient for each name it is given")
        return {**gradients, **changed}

    def check_graph(self, loss: Tensor) -> None:
        """Raise if the first step's loss runs through a module's own weights instead of the copies in training."""
        refuse_recomputation(loss, self.name)
        foreign = foreign_parameters(loss, self.owners)
        if foreign:
            shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            raise StageError(
                f"the loss of stage {self.name!r} reaches the weights of a user's own module ({shown}), which this "
                "unroll does not train; call the `model` and `upstream[...]` that the loss is handed instead"
            )

    def check_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Raise if the first step's loss depends on none of the trained parameters, or has no second derivative."""
        refuse_single_derivative(gradients, self.name)
        if all(g is None for g in gradients.values()):
            raise StageError(
                f"the loss of stage {self.name!r} depends on none of the {len(gradients)} parameters that it trains; "
                "call the `model` that the loss is handed"
            )

    def watch(self, losses: Sequence[Tensor]) -> None:
        """Stop at a loss that is not finite; an accelerator is asked every few steps, since asking waits for it."""
        every = 1 if self.device.type == "cpu" else _LOOK_EVERY
        if len(losses) % every == 0:
            self._require_finite({"an inner loss": torch.stack([loss.detach() for loss in losses[-every:]])})

    def _require_finite(self, tensors: Mapping[str, Tensor]) -> None:
        broken = [name for name, tensor in tensors.items() if not bool(tensor.detach().isfinite().all())]
        if broken:
            first = None if self._read is None else first_in_training(self, *self._read)
            raise NonFiniteError(f"stage {self.name!r}: {first or f'{broken[0]} is not finite'}")

    def finish(self, params: Tensors, buffers: Tensors, state: State, losses: Sequence[Tensor]) -> InnerResult:
        """Check that every inner loss and weight is finite, and wrap up the trained model."""
        values = torch.stack([loss.detach() for loss in losses]) if losses else torch.empty(0)
        self._require_finite({"an inner loss": values, **{f"parameter {name!r}": p for name, p in params.items()}})
        detached = {n: {k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for n, s in state.items()}
        model = self.trained_model({**self.frozen, **params}, buffers, detached)
        return InnerResult(model, values, self.num_steps)

    def trained_model(self, params: Tensors, buffers: Tensors, state: State) -> FunctionalModel:
        """Return the model that this loop ends with."""
        trained = Training(self.name, self.loss, self.first_step + self.num_steps, self.read)
        return FunctionalModel(self.structure, params, buffers, optimizer_state=state, trained=trained)

    def run_without_graph(
        self,
        meta_params: AnyMetaParameters,
        upstream: Upstream,
        on_step: Callable[[str, int, Tensor], None] | None = None,
    ) -> InnerResult:
        """Run the same steps with torch's own optimizer, keeping nothing: training as it is without metaopt."""
        own = {name: self.structure.params[name] for name in self.rule.names}
        with torch.no_grad():
            start = self.start(own, meta_params, upstream)
        detached = Models({name: model.detach() for name, model in upstream.items()})
        steps = PlainSteps(self, start, self.rule.initial_state(), self.start_buffers(), meta_params, detached)
        losses = []
        for t in range(self.num_steps):
            loss, gradients = steps.gradient(t, (lambda loss, params: self.check_graph(loss)) if t == 0 else None)
            if t == 0:
                self.check_gradients(gradients)
            steps.update(t, gradients)
            losses.append(loss)
            self.watch(losses)
            if on_step is not None:
                on_step(self.name, t, loss)
        return self.finish(steps.weights(), steps.buffers, steps.state(), losses)
