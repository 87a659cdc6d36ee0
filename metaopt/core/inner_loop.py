"""One run of a stage's inner loop, in the two halves that every estimator is built from.

gradient: `loss_at(t, params, …)`, which owns all that must be the same when a step is replayed: batch, random
state, buffers, the mode of the model. update: `transform` (clipping, all-reduce), then the torch optimizer's own
step with that step's hyperparameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import NonFiniteError, StageError
from metaopt.base.streams import kept_random_state, set_seed
from metaopt.core.contracts import (
    Gradients,
    InnerLoss,
    LossFunction,
    Transform,
    Upstream,
    described,
    require_scalar,
    taken_by,
    telling,
)
from metaopt.core.graphs import refuse_graph, refuse_single_derivative
from metaopt.core.meta_params import AnyMetaParameters, as_given
from metaopt.core.view import Call, FunctionalModel, ModelStructure, Tensors, Training, names_read
from metaopt.optimizers.rule import State, UpdateRule

_LOOK_EVERY = 1000  # steps between two looks at the losses on an accelerator


class InnerModel(FunctionalModel):
    """The model inside its own inner step: in train mode, and its calls move `buffers` (batch-norm statistics)."""

    read_step: Callable[[], int]
    read: set[frozenset[str]] | None  # the names of what it reads are added here

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args and self.read is not None:
            self.note_reading(kwargs)
        return self._call(self.params, self.buffers, self.training, args, kwargs)

    def note_reading(self, inputs: Mapping[str, Any]) -> None:
        if self.read is not None:
            self.read.add(names_read(inputs))

    @property
    def step(self) -> int:
        return self.read_step()

    def _call_buffers(self) -> Tensors:
        return self.buffers

    def train(self, mode: bool = True) -> FunctionalModel:
        """Return the model itself, which is in train mode already, or a view in eval mode."""
        return self if mode else super().train(False)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries of some tensors are finite; an accelerator is waited for, once."""
    return bool(torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all())


@dataclass
class InnerResult:
    """What an inner loop ends with: the model, and all that `commit` carries on."""

    model: FunctionalModel
    losses: Tensor  # [num_steps], detached


@dataclass
class InnerLoop:
    """T inner steps of one stage from its present state, with everything fixed that a replay must repeat."""

    name: str
    structure: ModelStructure
    rule: UpdateRule
    loss: InnerLoss | LossFunction
    batches: Sequence[Sequence[Any]]  # per step, its micro-batches (one unless gradients are accumulated)
    seeds: Sequence[int]  # per step, of the random state in which the loss is evaluated
    device: torch.device
    transform: Transform | None
    autocast: torch.dtype | None
    initial: Callable[[AnyMetaParameters, Upstream], Mapping[str, Tensor]] | None
    hyperparameters: Callable[[int, AnyMetaParameters], dict[str, Any]]  # of a step: scheduled and learned
    first_step: int  # inner steps that the stage has taken before; a loss reads `model.step`
    owners: Mapping[int, str]  # `id` → name of every parameter of the chain's own modules
    read: set[frozenset[str]]  # names of the tensors with which the loss of the first step has called the model
    seen: set[str]  # what of the loss's graph has been looked through since the stage was checked
    beside: set[str] = field(default_factory=set, init=False)  # read by the loss, of each step another, and no tensor
    _opened: bool = field(default=False, init=False, repr=False)
    _started: tuple[AnyMetaParameters, Upstream] | None = field(default=None, init=False, repr=False)

    @property
    def num_steps(self) -> int:
        """T, the number of inner steps."""
        return len(self.batches)

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """The trained parameters of the user's own module, by name."""
        params = self.structure.params
        return {name: params[name] for name in self.rule.names}

    @functools.cached_property
    def frozen(self) -> Tensors:
        """Return the parameters that no step changes, uncopied and outside the graph; quantised ones as they are."""
        others = {n: p for n, p in self.structure.params.items() if n not in self.rule.names}
        return {n: p.detach() if type(p) is nn.Parameter else p for n, p in others.items()}

    def start(self, own: Mapping[str, Tensor], meta_params: AnyMetaParameters, upstream: Upstream) -> Tensors:
        """Return the trained parameters before step 0: `own`, but for those that `initial` gives."""
        self._started = meta_params, upstream  # to look again, if something stops being finite
        params = dict(own)
        if self.initial is None:
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

    @contextmanager
    def opened(self, upstream: Upstream) -> Iterator[None]:
        """Do once what every step needs: keep the random state, and have the modules in their modes, until the end."""
        with ExitStack() as stack:
            stack.enter_context(kept_random_state(self.device))
            for model in upstream.values():
                stack.enter_context(model.structure.ready(model.training))
            stack.enter_context(self.structure.ready(True))
            self._opened = True
            stack.callback(setattr, self, "_opened", False)
            yield

    # --- the two halves of a step -------------------------------------------------------------------------------

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
        micro = self.batches[t] if batches is None else batches
        own = {name: buffer.clone() for name, buffer in buffers.items()} if buffers else {}
        moved, given = dict(own), as_given(meta_params)
        model = InnerModel(self.structure, params, moved, training=True, call=call)
        model.read_step = functools.partial(self._read_step, t)
        model.read = self.read if t == 0 else None
        ready = nullcontext() if self._opened else self.opened(upstream)
        with telling(lambda: self._said_of_loss(t, micro)), ready, self.casting():
            set_seed(self.seeds[t], self.device)
            losses = [self._loss(model, batch, given, upstream) for batch in micro]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        if not buffers:
            return loss, buffers
        # The version says nothing of floating ones: batch norm's kernel moves its statistics without a new one.
        still = {n for n, b in moved.items() if b is own[n] and b._version == 0 and not b.is_floating_point()}
        return loss, {n: buffers[n] if n in still else b for n, b in moved.items()}

    def _loss(self, model: InnerModel, *args: Any) -> Tensor:
        try:
            return require_scalar(self.loss(model, *args), f"the loss of stage {self.name!r}")
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
            raise StageError(
                f"the loss of stage {self.name!r} reads a tensor that was made under torch.inference_mode(): make it "
                "under torch.no_grad(), or read tensor.clone()"
            ) from error

    def _said_of_loss(self, t: int, micro: Sequence[Any]) -> str:
        batch = described(micro[0] if len(micro) == 1 else list(micro))
        step = f"inner step {t} of {self.num_steps}"
        return f"the loss of stage {self.name!r}, {step}, on {batch}; {taken_by(self.structure.module)}"

    def _read_step(self, t: int) -> int:
        self.beside.add("model.step")
        return self.first_step + t

    def casting(self) -> AbstractContextManager[Any]:
        """Return autocast to the stage's dtype, without the cache that would outlive a weight; or nothing."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast, cache_enabled=False)

    def transformed(self, gradients: Gradients) -> Gradients:
        """Apply the gradient transform to the gradients there are; a parameter that the loss missed keeps None."""
        if self.transform is None:
            return gradients
        present = {name: g for name, g in gradients.items() if g is not None}
        with telling(lambda: f"the transform of stage {self.name!r}, on {described(present)}"):
            changed = self.transform(present)
        if set(changed) != set(present):
            raise StageError(f"stage {self.name!r}: transform must return a gradient for each name it is given")
        return {**gradients, **changed}

    # --- what is looked at on the way ---------------------------------------------------------------------------

    def check_graph(self, loss: Tensor) -> None:
        """Raise if the first step's loss runs through a module's own weights instead of the copies in training."""
        if "loss" not in self.seen:
            refuse_graph(loss, self.owners, self.name)
            self.seen.add("loss")

    def check_gradients(self, gradients: Gradients) -> None:
        """Raise if the first step's loss depends on none of the trained parameters, or has no second derivative."""
        if "gradient" not in self.seen and any(g is not None and g.requires_grad for g in gradients.values()):
            refuse_single_derivative(gradients, self.name)
            self.seen.add("gradient")
        if set(gradients.values()) == {None}:
            raise StageError(
                f"the loss of stage {self.name!r} depends on none of the {len(gradients)} parameters that it trains; "
                "call the `model` that the loss is handed"
            )

    def watch(self, losses: list[Tensor]) -> None:
        """Stop at a loss that is not finite; an accelerator is asked every few steps, since asking waits for it."""
        if self.device.type == "cpu":
            finite = math.isfinite(losses[-1].item())
        else:
            finite = len(losses) % _LOOK_EVERY != 0 or all_finite(losses[-_LOOK_EVERY:])
        if not finite:
            self._stop(losses)

    def _stop(self, losses: Sequence[Tensor], what: str = "") -> None:
        """Raise for the first loss that is not finite, or for what else is not."""
        for t, loss in enumerate(losses):
            if not math.isfinite(loss.item()):
                what = f"the inner loss is {loss.item()} at inner step {t} of {self.num_steps}"
                break
        raise NonFiniteError(
            f"stage {self.name!r}: {what}; lower the inner learning rate, or clip: Stage(..., "
            "transform=metaopt.ClipNorm(1.0)). metaopt.locate_non_finite(...) says what is not finite first",
            self._started and (self, *self._started),
        )

    def finish(
        self, params: Mapping[str, Tensor], buffers: Tensors, state: State, losses: Sequence[Tensor]
    ) -> InnerResult:
        """Check that every inner loss and weight is finite, and wrap up the trained model."""
        values = torch.stack([loss.detach() for loss in losses]) if losses else torch.empty(0)
        if losses and not all_finite([values, *params.values()]):
            what = next((name for name, p in params.items() if not all_finite([p])), "")
            self._stop(losses, f"parameter {what!r} is not finite after {self.num_steps} inner steps")
        detached = {n: {k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for n, s in state.items()}
        model = self.trained_model({**self.frozen, **params}, buffers, detached)
        return InnerResult(model, values)

    def trained_model(self, params: Tensors, buffers: Tensors, state: State) -> FunctionalModel:
        """Return the model that this loop ends with."""
        trained = Training(self.name, self.loss, self.first_step + self.num_steps, self.read)
        return FunctionalModel(self.structure, params, buffers, optimizer_state=state, trained=trained)
