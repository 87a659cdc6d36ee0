"""Inner steps by torch's own optimizer, without a graph: a training as it is without metaopt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt.base.streams import Passing
from metaopt.core.contracts import Gradients, OnStep, Upstream
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.view import Models, Tensors
from metaopt.optimizers.hyperparameters import Overrides, with_overrides
from metaopt.optimizers.rule import Block, Joined, State, copied, load_state
from metaopt.optimizers.step import GROUP, honours_differentiable, number, shallow

if TYPE_CHECKING:
    from metaopt.core.inner_loop import InnerLoop, InnerResult


class PlainSteps:
    """The two halves of an inner step, one call each, by torch's own optimizer over copies of `params` and `state`.

    `params` has the weights by name: leaves that require grad, which a step moves. They are joined where the
    optimizer's step allows it.
    """

    params: dict[str, Tensor]

    def __init__(
        self,
        loop: InnerLoop,
        params: Mapping[str, Tensor],
        state: State,
        buffers: Tensors,
        meta_params: AnyMetaParameters,
        upstream: Upstream,
    ) -> None:
        self.buffers, self._overridden = buffers, False
        self._loop, self._rule, self._meta_params, self._upstream = loop, loop.rule, meta_params, upstream
        self._bind(params, state)

    def _bind(self, params: Mapping[str, Tensor], state: State, apart: bool = False) -> None:
        """Copy weights and state into an optimizer of their own, each parameter `apart` if asked to."""
        self._joint: dict[Block, Tensor] = {}
        for group in self._rule.groups:
            for names in [(name,) for name in group.names] if apart else [group.names]:
                for block in self._rule.blocks(names, params, state):
                    self._joint[block] = block.join(params).detach().clone()
        views = {name: view for block, joint in self._joint.items() for name, view in block.split(joint).items()}
        self.params = {name: views[name].detach().requires_grad_() for name in self._rule.names}
        self._optimizer = shallow(self._rule.optimizer, [])
        self._group({})
        blocks = {joint: block for block, joint in self._joint.items()}
        for group in self._optimizer.param_groups:
            for joint in group["params"]:
                load_state(self._optimizer, group, joint, blocks[joint].join(state))

    def _group(self, overrides: Overrides) -> None:
        """Give the optimizer its groups with the hyperparameters of one step, as plain values."""
        written = self._written()
        self._optimizer.param_groups = []
        for group in with_overrides(self._rule.groups, overrides):
            params = [joint for block, joint in self._joint.items() if block.names[0] in group.names]
            given = {key: number(group.hyperparameters[key]) for key in overrides}
            own = written.get(params[0], {}) if params else {}
            self._optimizer.param_groups.append({**group.hyperparameters, **given, **own, "params": params})

    def _written(self) -> dict[Tensor, dict[str, Any]]:
        """Return what a step has written into the group of each tensor."""
        groups, keys = self._optimizer.param_groups, self._rule.written
        return {p: {k: group[k] for k in keys if k in group} for group in groups for p in group["params"]}

    def gradient(self, t: int, inspect: Callable[[Tensor, Tensors], None] | None = None) -> tuple[Tensor, Gradients]:
        """Return the loss of step t, detached, and its raw gradient; buffers move on.

        `inspect` is called with the loss in its graph and the weights that it may depend on.
        """
        own = self.params
        with torch.enable_grad():
            weights = {**self._loop.frozen, **own}
            loss, buffers = self._loop.loss_at(t, weights, self.buffers, self._meta_params, self._upstream)
            if inspect is not None:
                inspect(loss, own)
            gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        self.buffers = {name: b.detach() if b.requires_grad else b for name, b in buffers.items()}
        by_name = dict(zip(own, gradients, strict=True))
        complete = not any(gradient is None for gradient in gradients)
        return loss.detach(), Joined({b: b.join(by_name) for b in self._joint}, {}) if complete else by_name

    @torch.no_grad()
    def update(self, t: int, gradients: Gradients) -> None:
        """Transform the raw gradient of step t, and let the optimizer step; what has no gradient stays as it is."""
        gradients, overrides = self._loop.transformed(gradients), self._loop.hyperparameters(t, self._meta_params)
        if overrides:
            self._rule.check_overrides(overrides)
        by_name = any(isinstance(value, Mapping) for value in overrides.values())
        complete = isinstance(gradients, Joined) or not any(gradient is None for gradient in gradients.values())
        if (by_name or not complete) and any(len(block.names) > 1 for block in self._joint):
            self._bind(self.params, self.state(), apart=True)
        if overrides or self._overridden:
            self._group(overrides)
            self._overridden = bool(overrides)
        to_change = not honours_differentiable(self._rule.optimizer)  # a step may write into it (torch's never do)
        for block, joint in self._joint.items():
            given = block.join(gradients) if complete or gradients[block.names[0]] is not None else None
            joint.grad = given.clone() if to_change and given is not None else given
        self._optimizer.step()

    def weights(self) -> Mapping[str, Tensor]:
        """Return copies of the present weights."""
        return Joined({block: joint.detach().clone() for block, joint in self._joint.items()}, {})

    def state(self) -> State:
        """Return a copy of the present optimizer state, with what was written into the groups."""
        written, pieces = self._written(), {}
        for block, joint in self._joint.items():
            of_group = {GROUP + key: value for key, value in written[joint].items()}
            pieces[block] = copied({**self._optimizer.state.get(joint, {}), **of_group})
        return Joined(pieces, {})


def train_plainly(
    loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream, on_step: OnStep | None = None
) -> InnerResult:
    """Run the same steps with torch's own optimizer, keeping nothing; on failure a stream goes back."""
    models = Models({name: model.detach() for name, model in upstream.items()})
    losses: list[Tensor] = []
    try:
        with torch.no_grad():
            start = loop.start(loop.own, meta_params, upstream)
        steps = PlainSteps(loop, start, loop.rule.initial_state(), loop.start_buffers(), meta_params, models)
        with nullcontext() if on_step else loop.opened(upstream):  # what is called meanwhile may draw random numbers
            for t in range(loop.num_steps):
                loss, gradients = steps.gradient(t, (lambda loss, params: loop.check_graph(loss)) if t == 0 else None)
                if t == 0:
                    loop.check_gradients(gradients)
                steps.update(t, gradients)
                losses.append(loss)
                loop.watch(losses)
                if on_step is not None:
                    on_step(loop.name, t, loss)
        return loop.finish(steps.weights(), steps.buffers, steps.state(), losses)
    except BaseException:
        if isinstance(loop.batches, Passing):
            loop.batches.rewind()
        raise
