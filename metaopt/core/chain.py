"""A chain: stages in order, each trained on what the earlier ones have become."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, StageError, did_you_mean
from metaopt.base.streams import Passing, move
from metaopt.core.contracts import InnerLoss, OnStep
from metaopt.core.guards import note_moved_buffers, refuse_unusable
from metaopt.core.inner_loop import InnerResult
from metaopt.core.meta_params import AnyMetaParameters, as_modules, as_named, named_tensors
from metaopt.core.plain import train_plainly
from metaopt.core.stage import Stage
from metaopt.core.unrolled import sign
from metaopt.core.view import FunctionalModel, Models, held

_SLOTS = operator.attrgetter("loss", "estimator", "overrides", "initial", "transform")


class TrainedChain(dict[str, FunctionalModel]):
    """The outcome of one unroll: stage name → trained model, and what `commit` needs."""

    def __init__(self, results: Mapping[str, InnerResult], version: object) -> None:
        super().__init__({name: result.model for name, result in results.items()})
        self.results, self.version = dict(results), version

    def __missing__(self, name: str) -> FunctionalModel:
        raise KeyError(f"no stage {name!r}{did_you_mean(name, self)}")

    @property
    def losses(self) -> dict[str, Tensor]:
        """Stage name → its inner losses [num_steps], detached."""
        return {name: result.losses for name, result in self.results.items()}


class Chain:
    """Stages in order; composition of differentiable functions, so one backward runs through all of them.

    Args:
        stages: name=Stage(...), in the order in which they are trained.

    Raises:
        ConfigError: no stage, or a loss that reads a stage that does not come before its own.
    """

    def __init__(self, **stages: Stage) -> None:
        if not stages:
            raise ConfigError("Chain: no stages; give at least one: Chain(model=Stage(...))")
        self.stages = dict(stages)
        self.owners: dict[int, str] = {}  # id → `stage.name`, of every parameter of the stages' own modules
        self._checked: list[Any] = []  # what was found usable
        self._version = object()  # of the chain's state; a new one whenever it moves
        earlier: dict[str, nn.Module] = {}
        for name, stage in stages.items():
            if not isinstance(stage, Stage):
                raise ConfigError(f"Chain: {name!r} is a {type(stage).__name__}, not a Stage")
            for reader in (stage.loss, stage.batches):
                for read in getattr(reader, "reads", ()):
                    if read not in earlier:
                        raise ConfigError(
                            f"stage {name!r}: {type(reader).__name__} reads stage {read!r}, which does not come before "
                            f"it{did_you_mean(read, earlier)}"
                        )
            if isinstance(stage.loss, InnerLoss) and (problem := stage.loss.problem_with(stage.model, earlier)):
                raise ConfigError(f"stage {name!r}: {problem}")
            earlier[name] = stage.model
        self._note_owners()

    def _note_owners(self) -> None:
        self.owners = {}
        for name, stage in self.stages.items():
            for param_name, param in stage.structure.params.items():
                other = self.owners.setdefault(id(param), f"{name}.{param_name}").partition(".")[0]
                if other != name:
                    raise ConfigError(
                        f"stages {other!r} and {name!r} share the parameter {param_name!r}; give each its own copy: "
                        "copy.deepcopy(model). To start a stage from another's trained weights: Stage(..., "
                        f"initial=lambda meta_params, upstream: upstream[{other!r}].params)"
                    )

    def __repr__(self) -> str:
        return f"Chain({' → '.join(self.stages)})"

    def unroll(self, meta_params: AnyMetaParameters) -> TrainedChain:
        """Run every stage's inner loop from the chain's present state, and return the trained models in the graph.

        Neither weights, optimizer state, batch streams nor random state are changed: the same call gives the same
        bits. Under `torch.no_grad()` it is a plain sweep of the same steps.
        """
        meta_params = as_modules(meta_params)
        self.check(meta_params)
        results: dict[str, InnerResult] = {}
        models = Models()
        with self._held(meta_params):
            for name, stage in self.stages.items():
                loop = stage.begin(name, models, self.owners)
                if torch.is_grad_enabled():
                    results[name] = stage.estimator.differentiate(loop, meta_params, models)
                    sign(results[name].model.params.values(), self, name)
                    if stage.structure.unsaid is None:  # looked at once, since an accelerator is waited for
                        note_moved_buffers(results[name].model)
                else:
                    results[name] = train_plainly(loop, meta_params, models)
                models = Models({**models, name: results[name].model})
        return TrainedChain(results, self._version)

    def commit(self, trained: TrainedChain, stages: Iterable[str] | None = None) -> None:
        """Carry on from the outcome of the last `unroll`: weights, optimizer state, batch streams and random state.

        Of the stages named; of all if None.
        """
        if trained.version is not self._version:
            raise StageError(
                "commit: this unroll started from a state that the chain has left (by a commit, reset or train), or "
                "from another chain; unroll again, or restore a state with chain.load_state_dict(...)"
            )
        with self._held():
            for name in self._select(stages):
                self.stages[name].commit(trained.results[name])
        self._version = object()

    def reset(self, stages: Iterable[str] | None = None) -> None:
        """Restore (or, from a factory, draw anew) weights and optimizer state; streams and random state move on."""
        with self._held():
            for name in self._select(stages):
                self.stages[name].reset()
        self._version = object()

    def train(
        self,
        meta_params: AnyMetaParameters,
        num_steps: int | Mapping[str, int] | None = None,
        on_step: OnStep | None = None,
    ) -> TrainedChain:
        """Train the stages one after the other with plain `torch.optim`, without a graph, and commit each.

        A stage whose training fails stays as it was before; those before it have moved.

        Args:
            meta_params: read, never changed.
            num_steps: of every stage, or per stage name (0 leaves a stage as it is); the stages' own if None.
            on_step: called with stage name, step and detached loss.

        Returns:
            The trained models, without a graph; there is nothing left to commit.
        """
        meta_params = as_modules(meta_params)
        self.check(meta_params)
        steps = self._steps_of(num_steps)
        self._version = object()
        results: dict[str, InnerResult] = {}
        models = Models()
        with self._held(meta_params):
            for name, stage in self.stages.items():
                loop = stage.begin(name, models, self.owners, steps[name], passing=True)
                results[name] = train_plainly(loop, meta_params, models, on_step)
                stage.commit(results[name], passed=isinstance(loop.batches, Passing))
                models = Models({**models, name: results[name].model})
        return TrainedChain(results, version=None)

    def _steps_of(self, num_steps: int | Mapping[str, int] | None) -> dict[str, Any]:
        given = dict(num_steps if isinstance(num_steps, Mapping) else dict.fromkeys(self.stages, num_steps))
        self._select(given)
        steps = {n: stage.num_steps if given.get(n) is None else given[n] for n, stage in self.stages.items()}
        for name, count in steps.items():
            if not isinstance(count, int) or count < 0:
                raise ConfigError(f"train: num_steps={count!r} of stage {name!r} must be a whole number from 0")
        return steps

    def state_dict(self) -> dict[str, Any]:
        """Return every stage's weights, optimizer state, stream position and random state."""
        return {name: stage.state_dict() for name, stage in self.stages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if set(state) != set(self.stages):
            raise ConfigError(f"load_state_dict: stages {sorted(state)} do not fit the chain's {sorted(self.stages)}")
        for name, stage in self.stages.items():
            stage.load_state_dict(state[name])
        self._version = object()

    def twin(self, dtype: torch.dtype = torch.float64) -> Chain:
        """Return an independent copy of the chain in another dtype, with the same data ahead of it."""
        return Chain(**{name: stage.twin(dtype) for name, stage in self.stages.items()})

    @property
    def device(self) -> torch.device:
        """Where the last stage's model is."""
        return next(reversed(self.stages.values())).like.device

    def move(self, batch: Any) -> Any:
        """Return a batch on the chain's device, its floating tensors in the chain's dtype."""
        return move(batch, next(reversed(self.stages.values())).like)

    def _held(self, meta_params: AnyMetaParameters | None = None) -> AbstractContextManager[None]:
        """Keep the stages' modules, and meta-parameters, to this thread: no other one may lend them tensors."""
        roots = [*(stage.model for stage in self.stages.values()), *as_named(meta_params or {}).values()]
        return held(module for root in roots for module in root.modules())

    def check(self, meta_params: AnyMetaParameters) -> None:
        """Refuse, before any training, what cannot be unrolled; again only if a module or a slot has changed."""
        if torch.is_inference_mode_enabled():
            raise StageError("inference mode keeps tensors out of any graph for good; use torch.no_grad() instead")
        modules = as_named(meta_params)
        now: list[Any] = [*modules]
        for module in modules.values():
            now.append(type(module))
            for tensor in (*module.parameters(), *module.buffers()):
                now += [id(tensor), type(tensor), tensor.requires_grad]
        for stage in self.stages.values():
            now += [_as_it_is(stage.model), *_SLOTS(stage)]
        if now == self._checked:
            return
        self._note_owners()
        for name, module in modules.items():
            refuse_unusable(module, f"meta-parameters {name!r}" if name else "meta-parameters")
        for name, stage in self.stages.items():
            stage.check(name, meta_params)
        for name, tensor in named_tensors(modules).items():
            if id(tensor) in self.owners:
                raise ConfigError(
                    f"meta-parameter {name!r} is the parameter {self.owners[id(tensor)]!r} of a stage's own model, "
                    "which commit would overwrite with inner-trained weights; give a copy: copy.deepcopy(model)"
                )
        self._checked = now

    def _select(self, stages: Iterable[str] | None) -> list[str]:
        names = [stages] if isinstance(stages, str) else list(self.stages if stages is None else stages)
        for name in names:
            if name not in self.stages:
                raise ConfigError(f"no stage {name!r}{did_you_mean(name, self.stages)}")
        return names


def _as_it_is(module: nn.Module) -> Hashable:
    """Return what tells whether a module is as it was: submodules, attributes, hooks, parameters and their freezing."""
    seen: list[Hashable] = []
    for m in module.modules():
        seen += [type(m), *map(id, vars(m).values()), *map(id, m._modules.values()), *map(id, m._parameters.values())]
        seen += [len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks)]
        for p in m._parameters.values():
            if p is not None:
                hooks = len(p._backward_hooks or ()), len(getattr(p, "_post_accumulate_grad_hooks", None) or ())
                seen += [type(p), p.dtype, p.requires_grad, *hooks]
    return tuple(seen)
