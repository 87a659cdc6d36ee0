"""Where the path of every meta-parameter runs, and where and why it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from metaopt.base.errors import MissingPathError
from metaopt.core.chain import Chain
from metaopt.core.contracts import MetaObjective
from metaopt.core.graphs import nodes
from metaopt.core.meta_params import AnyMetaParameters, named_tensors
from metaopt.core.unrolled import OF, WHERE
from metaopt.core.view import FunctionalModel
from metaopt.diagnostics.paths.cuts import META_LOSS, Cut, Source
from metaopt.diagnostics.paths.readings import Reading, read_chain

_UNSEEN = (
    "What the meta-objective cuts is not in this graph, nor what an estimator leaves out by design: "
    "print(metaopt.explain_hypergradient(chain, objective, batch, meta_params)) looks there too"
)
_SAID = {"whole": "its path is whole", "partly cut": "its path is partly cut", "cut": "no path to the meta-loss"}
_MOST_ROUTES = 6
Links = list[tuple[Source, Source]]  # (source, its reader), in the order of the chain


@dataclass(frozen=True)
class Path:
    """The path of one meta-parameter to the meta-loss.

    `routes` are the ways that it runs, each a tuple of stage names; () is the meta-objective reading it directly.
    `cuts` are the operations at which it is lost, or a part of it; `remarks` say what else is missing.
    """

    meta_param: str
    routes: tuple[tuple[str, ...], ...]
    cuts: tuple[Cut, ...]
    remarks: tuple[str, ...]

    @property
    def status(self) -> Literal["whole", "partly cut", "cut"]:
        """`whole`, `partly cut` (some of what it acts through is not differentiated), or `cut`: no path at all."""
        if not self.routes:
            return "cut"
        return "partly cut" if self.cuts or self.remarks else "whole"

    def __str__(self) -> str:
        return f"meta-parameter {self.meta_param!r}: {self.text}"

    @property
    def text(self) -> str:
        """All but the name, as text."""
        lines = [_SAID[self.status]]
        if self.routes:
            lines += ["runs through " + ", and ".join(" → ".join((*route, "meta-loss")) for route in self.routes)]
        lost, only = ("partly lost", "also") if self.routes else ("lost", "only")
        for (where, of), cuts in itertools.groupby(self.cuts, key=lambda cut: (cut.where, cut.of)):
            lines += [f"{lost} in {where}, which has {' and '.join(map(_named, sorted(of)))} {only} through"]
            lines += ["  " + line for cut in cuts for line in str(cut).splitlines()]
        return "\n  ".join([*lines, *self.remarks])


@dataclass(frozen=True)
class Explanation:
    """One `Path` per meta-parameter, and who reads whom; prints as text.

    `readers` has reader → what it reads in the graph: stages and meta-parameters by name.
    """

    paths: tuple[Path, ...]
    readers: dict[str, tuple[str, ...]]
    failures: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """The meta-parameters without any path."""
        return tuple(path.meta_param for path in self.paths if path.status == "cut")

    @property
    def whole(self) -> bool:
        """Whether nothing is cut."""
        return all(path.status == "whole" for path in self.paths) and not self.failures

    def __getitem__(self, meta_param: str) -> Path:
        return {path.meta_param: path for path in self.paths}[meta_param]

    def __str__(self) -> str:
        alike: dict[str, list[str]] = {}
        for path in self.paths:
            alike.setdefault(path.text, []).append(repr(path.meta_param))
        said = [f"meta-parameter {', '.join(names)}: {text}" for text, names in alike.items()]
        read = [f"{who} reads {', '.join(what) or 'nothing that is learned'}" for who, what in self.readers.items()]
        return "\n".join([*said, "in the graph: " + "; ".join(read), *self.failures])


def explain_hypergradient(
    chain: Chain, objective: MetaObjective | Callable[..., Any], batch: Any, meta_params: AnyMetaParameters
) -> Explanation:
    """Tell where the path of every meta-parameter to the meta-loss runs, and at which lines of code it is cut.

    A path runs from φ through stages to the meta-loss; each link is a part of `∂²L/∂θ∂φ`, of the learned initial
    weights or hyperparameters, or of the meta-objective. The inner steps are run once, one after the other and
    without an estimator, so the links are those of the losses themselves. Nothing is changed. What is given is that of
    a meta-step.
    """
    readings = read_chain(chain, objective, batch, meta_params)
    links = list(dict.fromkeys((source, r.part.reader) for r in readings for source in r.edges if r.joins(source)))
    readers: dict[Source, list[Source]] = {reading.part.reader: [] for reading in readings}
    for source, reader in links:
        readers[reader].append(source)
    return Explanation(
        tuple(_path(("meta-parameter", name), readings, links) for name in named_tensors(meta_params)),
        {_named(reader): tuple(map(_named, sources)) for reader, sources in readers.items()},
        tuple(reading.failure for reading in readings if reading.failure),
    )


def explained(
    error: MissingPathError, chain: Chain, objective: Any, batch: Any, meta_params: AnyMetaParameters
) -> MissingPathError:
    """Return the same error, which says itself where every path is lost."""
    return _with(error, str(explain_hypergradient(chain, objective, batch, meta_params)))


def _signatures(loss: Tensor) -> set[tuple[Any, str]]:
    """Return (chain, stage) of the trained weights that a meta-loss reads in its graph, where the chain is alive."""
    found = [node.metadata.get(OF) for node in nodes([loss], ends=lambda node: OF in node.metadata)]
    return {(chain, stage) for reference, stage in filter(None, found) if (chain := reference()) is not None}


def explained_by_graph(error: MissingPathError, meta_loss: Tensor, meta_params: AnyMetaParameters) -> MissingPathError:
    """Return the same error, which says where the chain in the graph of the meta-loss loses the path, if one is there.

    The objective is not known here: one that reads the weights of the same stages stands for it.
    """
    read = _signatures(meta_loss)
    chains = {chain for chain, _ in read}
    if len(chains) != 1:
        return error

    def reads(trained: Mapping[str, FunctionalModel], batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        weights = [p for _, stage in read for p in trained[stage].params.values() if p.requires_grad]
        return torch.stack([weight.square().sum() for weight in weights]).sum()

    try:
        found = explain_hypergradient(chains.pop(), reads, None, meta_params)
    except Exception:  # the error that is at hand matters more
        return error
    found = replace(found, paths=tuple(found[name] for name in error.names))
    unseen = "" if all(path.cuts for path in found.paths) else f"\n{_UNSEEN}"
    return _with(error, f"{found}{unseen}")


def _with(error: MissingPathError, explanation: str) -> MissingPathError:
    said = str(error).partition("\n\n")[0].removesuffix(WHERE).rstrip()
    return MissingPathError(f"{said}\n\n{explanation}")


def _path(start: Source, readings: Sequence[Reading], links: Links) -> Path:
    routes = tuple(itertools.islice(_routes(start, links), _MOST_ROUTES))
    reached = _reached(start, links)
    cuts = dict.fromkeys(cut for reading in readings for cut in _cuts_of(reading, reached, links, bool(routes)))
    ends = {source for source, _ in links}.union([META_LOSS], *(cut.of for cut in cuts))
    return Path(start[1], routes, tuple(cuts), tuple(_dead_end(s, readings) for s in reached if s not in ends))


def _routes(start: Source, links: Links) -> Iterator[tuple[str, ...]]:
    for source, reader in links:
        if source == start and reader == META_LOSS:
            yield ()
        elif source == start:
            yield from ((reader[1], *rest) for rest in _routes(reader, links))


def _reached(start: Source, links: Links) -> list[Source]:
    """Return the start and all that it has a path to."""
    found = {start: None}
    for source, reader in links:  # in the order of the chain: once through is enough
        if source in found:
            found[reader] = None
    return list(found)


def _cuts_of(reading: Reading, reached: Iterable[Source], links: Links, exists: bool) -> Iterator[Cut]:
    """Yield the cuts of one part that keep something from the meta-loss that a meta-parameter reaches.

    Where a path `exists`, what never comes to the meta-loss is no loss, nor what is cut by design beside a gradient.
    """
    reader = reading.part.reader
    if exists and META_LOSS not in _reached(reader, links):
        return
    for cut in sorted(reading.cuts, key=lambda cut: (str(cut.key[1]), cut.operation.name)):
        lost = cut.of.intersection(reached)
        if exists and cut.by_design:
            lost = {source for source in lost if source != reader and (source, reader) not in links}
        if lost and (exists or reader not in reached):
            yield cut


def _dead_end(source: Source, readings: Sequence[Reading]) -> str:
    touching = [reading for reading in readings if source in reading.touched and reading.part.reader != source]
    if touching:
        listed = ", ".join(str(reading.part) for reading in touching)
        return (
            f"{_named(source)} is read in {listed}, but no gradient depends on it there; a new nn.Parameter(...) made "
            "of it would be a cut that leaves no trace"
        )
    if source[0] == "stage":
        return f"no later stage and no meta-objective reads {_named(source)}: take upstream[{source[1]!r}] in a loss"
    return f"nothing of the chain and no meta-objective reads {_named(source)}"


def _named(source: Source) -> str:
    return "the meta-loss" if source == META_LOSS else f"{source[0]} {source[1]!r}"
