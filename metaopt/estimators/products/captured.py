"""The exact product as a captured graph of tensor operations, replayed for every step."""

from __future__ import annotations

import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from metaopt.estimators.products.base import (
    Cotangents,
    DoubleBackward,
    Product,
    PullBack,
    Pullback,
    Wanted,
    agree,
    leaves,
    linearized,
)
from metaopt.estimators.products.whole_step import WholeSteps
from metaopt.estimators.step_loss import StepLoss

MOST_PROGRAMS = 16  # shapes, stages; the program used longest ago is dropped
MOST_CHANGES = 3  # captures in a row whose loss is another at the next replay


class Captured(Product):
    """One step's forward, backward and double backward, captured once and replayed; what no output needs is left out.

    Exact: the same operations as `DoubleBackward`, whose result the first replay is compared with. A graph belongs to
    the shapes of the tensors, to the modules and the loss, and to the numbers that they hold (dropout probabilities,
    temperatures). At every replay the loss must be the one that the forward had; where it is not, something has changed
    that is no input of the graph, and a new one is captured. Where a step cannot be captured (a branch on the values of
    a batch) or changes again and again (random numbers of Python), the product is `DoubleBackward`'s, and one warning
    says why.

    Source: torch.fx.experimental.proxy_tensor.make_fx.
    """

    replays = True

    def __init__(self) -> None:
        self._programs: OrderedDict[Hashable, _Program | None] = OrderedDict()
        self._changes: Counter[Hashable] = Counter()
        self._warned: set[str] = set()
        self._steps, self._seconds = WholeSteps(), 0.0

    def __repr__(self) -> str:
        return "Captured()"

    @property
    def tracing_seconds(self) -> float:
        """What capturing has taken so far."""
        return self._seconds + self._steps.seconds

    def take(self, pull_back: PullBack, loss: StepLoss, others: Sequence[Tensor], above: Any) -> Any:
        """Replay the whole step of a small model, its update included; otherwise its product alone."""
        found = self._steps.take(pull_back, loss, others, above)
        return pull_back(self, loss, others, above) if found is None else found

    def linearize(
        self, loss: StepLoss, params: Sequence[Tensor], others: Sequence[Tensor], wanted: Wanted
    ) -> tuple[Cotangents, Pullback]:
        """Replay the captured graph, as far as it does not depend on u; the pullback replays the rest."""
        key = (loss.signature, wanted, *(_shape(t) for t in (*params, *others, *loss.context)))
        for _ in range(2):
            if key not in self._programs:
                self._programs[key] = self._capture(loss, params, others, wanted)
                if len(self._programs) > MOST_PROGRAMS:
                    self._programs.popitem(last=False)
            program = self._programs[key]
            if program is None:
                break
            self._programs.move_to_end(key)
            value, gradient, pullback = program.start(loss, params, others)
            if loss.record.loss is None or agree([value], [loss.record.loss]):
                if not program.checked:
                    eager = DoubleBackward().linearize(loss, params, others, wanted)
                    return self._first_run(key, program, (gradient, pullback), eager)
                self._changes[key] = 0
                return gradient, pullback
            self._changes[key] += 1
            del self._programs[key]
            if self._changes[key] >= MOST_CHANGES:
                self._programs[key] = self._fall_back("its loss changes by more than its tensors, from step to step")
        return DoubleBackward().linearize(loss, params, others, wanted)

    def _capture(
        self, loss: StepLoss, params: Sequence[Tensor], others: Sequence[Tensor], wanted: Wanted
    ) -> _Program | None:
        if loss.obstacle:
            return self._fall_back(f"its loss reads {loss.obstacle}, which a captured graph would freeze")
        start = time.perf_counter()
        try:
            return _Program(loss, params, others, wanted)
        except Exception as error:  # whatever an operation raises that fake tensors cannot answer
            lines = str(error).strip().splitlines() or [""]
            return self._fall_back(f"{type(error).__name__}: {lines[0]}")
        finally:
            self._seconds += time.perf_counter() - start

    def _fall_back(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"Captured: an inner step cannot be captured ({reason}); its product is computed by DoubleBackward()",
                RuntimeWarning,
                stacklevel=2,
            )

    def _first_run(
        self, key: Hashable, program: _Program, run: tuple[Cotangents, Pullback], eager: tuple[Cotangents, Pullback]
    ) -> tuple[Cotangents, Pullback]:
        """Compare the first results with DoubleBackward's, and return those."""
        agrees = agree(run[0], eager[0]) if any(g is not None for g in run[0]) else True

        def pullback(cotangents: Sequence[Tensor | None]) -> tuple[Cotangents, Cotangents]:
            right, found = eager[1](cotangents), run[1](cotangents)
            if agrees and agree([*found[0], *found[1]], [*right[0], *right[1]]):
                program.checked = True
            else:
                self._programs[key] = self._fall_back("the captured graph's first result is not that of eager code")
            return right

        return eager[0], pullback


class _Program:
    """A captured step in two graphs: what does not depend on the cotangent u, and the rest."""

    def __init__(self, loss: StepLoss, params: Sequence[Tensor], others: Sequence[Tensor], wanted: Wanted) -> None:
        self.checked = False
        self._anchors, self._num_params = loss.anchors, len(params)  # their ids are in the signature
        self._shown: list[list[bool]] = []  # of gradient and products: which are not None
        named = list(loss.named(params).values())
        num_params, end = len(params), len(params) + len(others)

        def joint(inputs: list[Tensor]) -> list[Tensor]:
            """(params, others, context, u) → loss, gradient, products, without the entries that are None."""
            with torch.enable_grad():
                at, beside = leaves(inputs[:num_params]), leaves(inputs[num_params:end])
                weights = loss.named(at)
                value = loss(weights, beside, inputs[end : -len(named)])
                shown = value.detach().clone()
                graph = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
                below = at if wanted.params else []
                products = linearized(graph, inputs[-len(named) :], [*below, *beside])
            products = [None] * (num_params - len(below)) + products
            gradients = [g.detach() if g is not None and wanted.gradient else None for g in graph]
            self._shown = [[t is not None for t in part] for part in (gradients, products)]
            return [shown, *(t for t in (*gradients, *products) if t is not None)]

        inputs = [*params, *others, *loss.context, *map(torch.zeros_like, named)]
        graph = make_fx(joint, tracing_mode="fake", _allow_non_fake_inputs=True)(inputs)
        self._before, self._after = _split(graph, len(inputs) - len(named), sum(self._shown[0]))

    def start(
        self, loss: StepLoss, params: Sequence[Tensor], others: Sequence[Tensor]
    ) -> tuple[Tensor, Cotangents, Pullback]:
        """Run the first graph, which gives the loss too; the pullback runs the second."""
        with torch.no_grad(), loss.replaying():
            value, gradients, kept = self._before(*params, *others, *loss.context)
        named = loss.named(params).values()

        def pullback(cotangents: Sequence[Tensor | None]) -> tuple[Cotangents, Cotangents]:
            given = [torch.zeros_like(p) if u is None else u for p, u in zip(named, cotangents, strict=True)]
            with torch.no_grad():
                found = _placed(self._after(*kept, *given), self._shown[1])
            return found[: self._num_params], found[self._num_params :]

        return value, _placed(gradients, self._shown[0]), pullback


def _split(graph: fx.GraphModule, num_fixed: int, num_gradients: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a joint graph in two: (fixed inputs → loss, gradient, values to keep) and (kept values, u → products)."""
    graph.graph.eliminate_dead_code()
    *nodes, output = graph.graph.nodes
    loss, *rest_of = output.args[0]
    gradients, products = rest_of[:num_gradients], rest_of[num_gradients:]
    late = {node for node in nodes if node.op == "placeholder"} - set(nodes[:num_fixed])
    for node in nodes:
        if not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    kept = [n for n in nodes if n not in late and (n in products or not late.isdisjoint(n.users))]

    before, after = fx.Graph(), fx.Graph()
    early: dict[fx.Node, fx.Node] = {}
    rest = {node: after.placeholder(f"kept_{i}") for i, node in enumerate(kept)}
    for node in nodes:
        if node in late:
            rest[node] = after.node_copy(node, rest.__getitem__)
        else:
            early[node] = before.node_copy(node, early.__getitem__)
    before.output((early[loss], [early[g] for g in gradients], [early[n] for n in kept]))
    after.output([rest[p] for p in products])
    return fx.GraphModule(graph, before), fx.GraphModule(graph, after)


def _placed(tensors: Sequence[Tensor], shown: Sequence[bool]) -> Cotangents:
    """Put tensors where `shown` says, and None elsewhere."""
    rest = iter(tensors)
    return [next(rest) if there else None for there in shown]


def _shape(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
