"""Outputs of upstream models that several steps of a stage use: computed once, their cotangents summed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.errors import StageError
from metaopt.functional import FunctionalModel, Models
from metaopt.inner_loop import InnerLoop
from metaopt.random_state import python_draws, seeded

_WORDS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class OutputKey:
    """A floating tensor of a kept answer: by the order of a step's calls to an upstream model."""

    call: int
    tensor: int


@dataclass
class _Answer:
    """What an upstream model answered, and what it takes to differentiate it later."""

    args: Any
    kwargs: Any
    leaves: list[Any]
    spec: Any
    cotangents: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._versions = self._present_versions()

    def _present_versions(self) -> list[int]:
        return [x._version for x in self.leaves if isinstance(x, Tensor)]

    @property
    def changed(self) -> bool:
        """Whether a loss has written into it."""
        return self._present_versions() != self._versions


class UpstreamOutputs:
    """A memo of what upstream models answer to batches that more than one step of the stage uses.

    An answer is kept if the model is in eval mode, draws no random numbers, and is asked with tensors of the batch
    itself; and until a loss writes into it. The steps' losses then have it as a constant; their cotangents of it are
    added up, and one backward through the upstream model carries the sum on: `(Σ_t v_t) ∂o/∂θ` instead of
    `Σ_t v_t ∂o/∂θ`.

    Args:
        loop: the stage's.
        upstream: trained models outside the graph.
    """

    def __init__(self, loop: InnerLoop, upstream: Mapping[str, FunctionalModel]) -> None:
        self._loop, self._upstream = loop, upstream
        tensors = [{id(x) for x in pytree.tree_leaves(list(step)) if isinstance(x, Tensor)} for step in loop.batches]
        uses = Counter(key for step in tensors for key in step)
        self._shared = {key for key, count in uses.items() if count > 1}
        self._answers: dict[Hashable, _Answer | None] = {}  # None: not to be kept
        self._asked: dict[int, dict[str, list[_Answer | None]]] = {}
        self._now: dict[str, list[_Answer | None]] | None = None

    # --- forward ------------------------------------------------------------------------------------------------

    def recording(self) -> Models:
        """Return the upstream models as a plain sweep sees them: they keep what they answer."""

        def asking(stage: str) -> Any:
            return lambda params, buffers, training, args, kwargs: self._ask(
                stage, params, buffers, training, args, kwargs
            )

        return Models({stage: model.with_call(asking(stage)) for stage, model in self._upstream.items()})

    def begin(self, t: int) -> None:
        """Note from now on what step t asks."""
        self._now = self._asked[t] = defaultdict(list)

    def end(self) -> None:
        """Note nothing any more: the steps are run again, to rebuild them."""
        self._now = None
        for question in self._answers:
            self._forget_if_changed(question)

    def _forget_if_changed(self, question: Hashable) -> None:
        answer = self._answers.get(question)
        if answer is None or not answer.changed:
            return
        self._answers[question] = None
        for asked in self._asked.values():
            for stage, answers in asked.items():
                asked[stage] = [None if a is answer else a for a in answers]

    def _ask(self, stage: str, params: Any, buffers: Any, training: bool, args: Any, kwargs: Any) -> Any:
        structure = self._upstream[stage].structure
        question = self._question(stage, training, args, kwargs)
        if question is not None and question not in self._answers:
            self._answers[question] = self._first_answer(stage, params, buffers, args, kwargs)
        self._forget_if_changed(question)
        answer = None if question is None else self._answers[question]
        if self._now is not None:
            self._now[stage].append(answer)
        if answer is None:
            return structure.call(params, buffers, training, args, kwargs)
        return pytree.tree_unflatten(answer.leaves, answer.spec)

    def _question(self, stage: str, training: bool, args: Any, kwargs: Any) -> Hashable | None:
        asked, spec = pytree.tree_flatten((args, kwargs))
        known = (id(x) in self._shared if isinstance(x, Tensor) else isinstance(x, _WORDS) for x in asked)
        if training or not all(known):
            return None
        return stage, str(spec), tuple((id(x), x._version) if isinstance(x, Tensor) else x for x in asked)

    def _first_answer(self, stage: str, params: Any, buffers: Any, args: Any, kwargs: Any) -> _Answer | None:
        with torch.no_grad(), seeded(0, self._loop.device):  # puts back the step's own random state
            before = _draws(self._loop.device)
            out = self._upstream[stage].structure.call(params, buffers, False, args, kwargs)
            if _draws(self._loop.device) != before:
                return None
        leaves, spec = pytree.tree_flatten(out)
        return _Answer(args, kwargs, [x if isinstance(x, (Tensor, *_WORDS)) else _NotKept(x) for x in leaves], spec)

    # --- backward -----------------------------------------------------------------------------------------------

    def of_step(self, t: int) -> dict[tuple[str, OutputKey], Tensor]:
        """Return the kept tensors that step t's loss reads: arguments of it, beside the weights."""
        return {(stage, OutputKey(i, j)): a.leaves[j] for stage, i, a in self._kept(t) for j in _floating(a)}

    def add(self, t: int, key: tuple[str, OutputKey], cotangent: Tensor) -> None:
        """Add step t's cotangent of one of its kept tensors."""
        stage, which = key
        answer = self._asked[t][stage][which.call]
        assert answer is not None
        known = answer.cotangents.get(which.tensor)
        answer.cotangents[which.tensor] = cotangent if known is None else known + cotangent

    def model(
        self, t: int, stage: str, params: Mapping[str, Tensor], buffers: Any, given: Mapping[Any, Tensor]
    ) -> FunctionalModel:
        """Return an upstream model with these tensors, which answers with those of `given` where step t has them."""
        like, asked = self._upstream[stage], iter(self._asked.get(t, {}).get(stage, ()))
        count = iter(range(len(self._asked.get(t, {}).get(stage, ()))))

        def call(params: Any, buffers: Any, training: bool, args: Any, kwargs: Any) -> Any:
            answer, i = next(asked, None), next(count, -1)
            if answer is None:
                return like.structure.call(params, buffers, training, args, kwargs)
            shown = [given.get((stage, OutputKey(i, j)), x) for j, x in enumerate(answer.leaves)]
            return pytree.tree_unflatten(shown, answer.spec)

        return like.with_call(call, params, buffers)

    def pull_back(self) -> dict[tuple[str, str], Tensor]:
        """Return the cotangents of upstream weights, by (stage, name), that the summed cotangents give; reset them."""
        sums: dict[tuple[str, str], Tensor] = {}
        for question, answer in self._answers.items():
            if answer is None or not answer.cotangents:
                continue
            stage: str = question[0]  # type: ignore[index]
            for name, cotangent in self._through(stage, answer).items():
                sums[stage, name] = sums[stage, name] + cotangent if (stage, name) in sums else cotangent
            answer.cotangents = {}
        return sums

    def _through(self, stage: str, answer: _Answer) -> dict[str, Tensor]:
        model = self._upstream[stage]
        params = {n: p.detach().requires_grad_(p.is_floating_point()) for n, p in model.params.items()}
        buffers = {name: buffer.clone() for name, buffer in model.buffers.items()}
        with torch.enable_grad(), self._loop.casting():
            out = pytree.tree_leaves(model.structure.call(params, buffers, False, answer.args, answer.kwargs))
        heads = [(out[j], w) for j, w in answer.cotangents.items() if out[j].requires_grad]
        if not heads:
            return {}
        outputs, weights = zip(*heads, strict=True)
        found = torch.autograd.grad(outputs, list(params.values()), weights, allow_unused=True)
        return {name: c for name, c in zip(params, found, strict=True) if c is not None}

    def _kept(self, t: int) -> list[tuple[str, int, _Answer]]:
        asked = self._asked.get(t, {})
        return [(stage, i, a) for stage, answers in asked.items() for i, a in enumerate(answers) if a is not None]


class _NotKept:
    """Stands for a part of an output that is no tensor (a cache of keys and values), and says so when it is used."""

    def __init__(self, part: Any) -> None:
        object.__setattr__(self, "_kind", type(part).__name__)

    def __getattr__(self, name: str) -> NoReturn:
        kind = object.__getattribute__(self, "_kind")
        raise StageError(
            f"a loss reads .{name} of the {kind} in an upstream model's output; that output is kept for several inner "
            "steps, and only its tensors are. Use the tensors, or estimator=Unrolled()"
        )


def _floating(answer: _Answer) -> list[int]:
    return [j for j, x in enumerate(answer.leaves) if isinstance(x, Tensor) and x.is_floating_point()]


def _draws(device: torch.device) -> tuple[Any, ...]:
    of_torch = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return *(state.numpy().tobytes() for state in of_torch), *python_draws()
