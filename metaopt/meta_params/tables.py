"""Meta-parameters by tables: a weight or a distribution per example, source, class or token; how readers find them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import check_counts
from metaopt.core.meta_params import AnyMetaParameters, TensorWeights, as_given, as_named, named_tensors

PARAMETRISATIONS = ("softmax", "sigmoid")
MANY = 2**16  # entries from which on a gradient is kept by rows
MOST_SHOWN = 32  # numbers that a summary lists


class MetaParameters(nn.Module):
    """Base class of what is learned; a plain `nn.Module` serves as well.

    One that weighs examples implements `forward(batch) -> weights [batch size]`, or [batch size, positions].
    `reads_losses` marks those that are called `forward(batch, losses)`, with each example's loss.
    """

    reads_losses: bool = False

    def summary(self) -> dict[str, float]:
        """Return the few numbers that tell what was learned, by name; tables of weights have reports of their own."""
        return {}

    def baseline(self) -> nn.Module:
        """Return what training without learning it would use: by default weight 1 for all."""
        return Uniform()


class Uniform(MetaParameters):
    """Weight 1 for every example: the baseline that learns nothing."""

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return ones [batch size]."""
        some = next(value for value in batch.values() if isinstance(value, Tensor))
        return torch.ones(len(some), device=some.device)


class _Table(MetaParameters):
    """A table of which a batch reads a few rows: of a large one no inner step makes a gradient of the whole.

    Unless `sparse`, the rows' gradients are made one dense gradient at the end of the backward.
    """

    sparse: bool

    def rows(self, table: Tensor, batch: Mapping[str, Tensor], key: str) -> Tensor:
        """Return the rows of `table` that the batch selects."""
        return look_up(table, batch, key, type(self).__name__, self.sparse or table.numel() >= MANY)

    def densify(self) -> None:
        """Have `.grad` made dense after a plain `meta_loss.backward()`, as `hypergradient` does it by `sparse`."""
        for table in self.parameters() if not self.sparse else ():
            table.register_post_accumulate_grad_hook(_dense)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.densify()  # a copy's parameter has no hooks


def _dense(table: Tensor) -> None:
    if table.grad is not None and table.grad.is_sparse:
        table.grad = table.grad.to_dense()


class _TableOfWeights(_Table):
    """One logit per entry, and a weight that is its sigmoid, or `n · softmax` over all n entries."""

    key: str  # which entry of a batch selects the weight

    def __init__(self, size: int, parametrisation: str, sparse: bool = False) -> None:
        super().__init__()
        where = type(self).__name__
        check_counts(where, weights=size)
        if parametrisation not in PARAMETRISATIONS:
            hint = did_you_mean(parametrisation, PARAMETRISATIONS)
            raise ConfigError(f"{where}: no parametrisation {parametrisation!r}{hint}")
        if sparse and parametrisation != "sigmoid":
            raise ConfigError(f"{where}: sparse=True needs parametrisation='sigmoid': a softmax moves every weight")
        self.parametrisation, self.sparse = parametrisation, sparse
        self.logits = nn.Parameter(torch.zeros(size))
        self.densify()

    def weights(self) -> Tensor:
        """Return all weights [n], in the graph."""
        if self.parametrisation == "sigmoid":
            return self.logits.sigmoid()
        return len(self.logits) * self.logits.softmax(0)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the weight of each example of the batch [batch size]."""
        if self.parametrisation == "sigmoid":
            return self.rows(self.logits, batch, self.key).sigmoid()
        return look_up(self.weights(), batch, self.key, type(self).__name__)


class SourceWeights(_TableOfWeights):
    """One weight per source (group) of the data: `w_s = n · softmax(logits)_s`, mean 1 over the n sources.

    `parametrisation="sigmoid"`: `w_s = σ(logits_s)`, which starts at 1/2.
    """

    key = "source"

    def __init__(self, num_sources: int, parametrisation: str = "softmax") -> None:
        super().__init__(num_sources, parametrisation)


class ExampleWeights(_TableOfWeights):
    """One weight per training example: `w_i = σ(logits_i)`, which starts at 1/2; `softmax`: `n · softmax(logits)_i`.

    A batch's `index` runs from 0 to n − 1. With `sparse` the hypergradient holds only the rows that the unroll has
    read, for tables of a million examples; the meta-optimizer is then `torch.optim.SparseAdam` or plain `SGD`.
    """

    key = "index"

    def __init__(self, num_examples: int, parametrisation: str = "sigmoid", sparse: bool = False) -> None:
        super().__init__(num_examples, parametrisation, sparse)


class ClassWeights(_TableOfWeights):
    """One weight per class, chosen by the label: `w_c = n · softmax(logits)_c`, mean 1; `sigmoid`: `σ(logits_c)`.

    For sequences the labels are tokens, and the weights are those of the positions [batch size, positions].
    """

    key = "labels"

    def __init__(self, num_labels: int, parametrisation: str = "softmax") -> None:
        super().__init__(num_labels, parametrisation)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the weight of each label, of the labels' shape; 0 where a position does not count."""
        known = {**batch, "labels": batch["labels"].clamp(min=0)} if "labels" in batch else batch
        weights = look_up(self.weights(), known, self.key, type(self).__name__)
        return weights.masked_fill(batch["labels"] < 0, 0.0)

    def summary(self) -> dict[str, float]:
        """Return the weight of each class, if there are not too many to read."""
        weights = self.weights().tolist() if len(self.logits) <= MOST_SHOWN else []
        return {f"class {i}": weight for i, weight in enumerate(weights)}


class TokenWeights(ClassWeights):
    """One weight per token of the vocabulary, chosen by the target token at each position; else as `ClassWeights`."""

    def __init__(self, vocab_size: int, parametrisation: str = "softmax") -> None:
        super().__init__(vocab_size, parametrisation)


class FixedWeights(MetaParameters):
    """Given weights [n] that are not learned: an oracle mask, or learned weights once they are frozen.

    `key` is the entry of a batch that selects the weight: `index` or `source`.
    """

    table: Tensor

    def __init__(self, weights: Tensor, key: str = "index") -> None:
        super().__init__()
        self.key = key
        self.register_buffer("table", weights.detach().clone().to(torch.get_default_dtype()))

    def weights(self) -> Tensor:
        return self.table

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return look_up(self.table, batch, self.key, type(self).__name__)


class ExampleTensor(TensorWeights):
    """A user's own tensor as losses read it: entry i is the weight of example i."""

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return look_up(self.weights(), batch, "index", "a tensor as meta-parameters")


class SoftTargets(_Table):
    """A learned distribution over the classes for each training example (Vyas et al., 2020, arXiv:2009.09496).

    `q_i = softmax(c · onehot(y_i) + r_i)`: it starts at the given label, which has the probability
    `e^c / (e^c + num_labels − 1)` by c = `confidence` > 0, and r moves it elsewhere; `sparse` as in `ExampleWeights`.
    """

    def __init__(self, num_examples: int, num_labels: int, confidence: float = 4.0, sparse: bool = False) -> None:
        super().__init__()
        check_counts("SoftTargets", num_examples=num_examples, num_labels=num_labels)
        check_positive("SoftTargets", confidence=confidence)
        self.confidence, self.sparse = confidence, sparse
        self.offsets = nn.Parameter(torch.zeros(num_examples, num_labels))
        self.densify()

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the targets of a batch [B, C], from its `labels` [B] and `index`."""
        offsets, labels = self.rows(self.offsets, batch, "index"), batch["labels"]
        if labels.dim() != 1 or not in_bounds(labels, offsets.shape[1]):
            raise ConfigError(f"SoftTargets: the labels do not fit {offsets.shape[1]} classes, one label per example")
        given = F.one_hot(labels, offsets.shape[1]).to(offsets.dtype)
        return (self.confidence * given + offsets).softmax(-1)

    def baseline(self) -> nn.Module:
        return SoftTargets(*self.offsets.shape, confidence=self.confidence)


# --- how losses and reports read meta-parameters ----------------------------------------------------------------


def check_positive(where: str, **numbers: float) -> None:
    """Raise for a number that is not above 0."""
    for name, value in numbers.items():
        if not value > 0:
            raise ConfigError(f"{where}: {name}={value} must be above 0")


def select(meta_params: AnyMetaParameters, name: str | None, reader: str) -> Any:
    """Return the module that the class `reader` reads: the one called `name`, or the only one there is."""
    alone = isinstance(meta_params, (Tensor, nn.Module)) and not isinstance(meta_params, nn.ModuleDict)
    modules: Any = {None: meta_params} if alone else meta_params
    if name is None and len(modules) == 1:
        (found,) = modules.values()
    elif name in modules:
        found = modules[name]
    elif alone:
        raise ConfigError(f"{reader} reads meta-parameters {name!r}, but they are one module without a name")
    else:
        said = "must say which meta-parameters it reads" if name is None else f"reads meta-parameters {name!r}"
        raise ConfigError(f"{reader} {said}, by a name that they have{did_you_mean(name or '', modules)}")
    return ExampleTensor(found) if isinstance(found, Tensor) else found


def in_bounds(index: Tensor, size: int) -> bool:
    """Whether all of `index` lies in [0, size); not asked in a captured graph, nor where it would wait."""
    if isinstance(index, FakeTensor) or not index.numel() or index.device.type != "cpu":
        return True
    return int(index.min()) >= 0 and int(index.max()) < size


def look_up(table: Tensor, batch: Mapping[str, Tensor], key: str, reader: str, sparse: bool = False) -> Tensor:
    """Return the row of a table [n] or [n, C] at each of `batch[key]`; if `sparse`, its gradient holds no others."""
    if key not in batch:
        raise ConfigError(f"{reader} reads batch[{key!r}], which this batch lacks (it has: {', '.join(batch)})")
    index = batch[key]
    if not in_bounds(index, len(table)):
        seen = f"batch[{key!r}] runs from {int(index.min())} to {int(index.max())}"
        raise ConfigError(f"{reader} has {len(table)} weights, and {seen}; number from 0, and give one to each")
    if not sparse:
        # not table[index], which counts −1 from the end
        return table.index_select(0, index.flatten()).unflatten(0, index.shape)
    return F.embedding(index, table, sparse=True) if table.dim() == 2 else table.gather(0, index, sparse_grad=True)


def baseline(meta_params: AnyMetaParameters) -> AnyMetaParameters:
    """Return what training without these meta-parameters uses in their place."""
    plain = {name: _baseline_of(module) for name, module in as_named(meta_params).items()}
    like = next(iter(named_tensors(meta_params).values()), None)
    if like is not None:
        for module in plain.values():
            module.requires_grad_(False).to(like)
    return as_given(plain.get("", plain))


def _baseline_of(module: nn.Module) -> nn.Module:
    if isinstance(module, TensorWeights):
        return TensorWeights(torch.ones_like(module.weights()), module.name)
    return module.baseline() if isinstance(module, MetaParameters) else Uniform()


def summary(meta_params: AnyMetaParameters) -> dict[str, float]:
    """Return the few numbers that tell what was learned, by name."""
    parts = {name: m.summary() for name, m in as_named(meta_params).items() if isinstance(m, MetaParameters)}
    return {": ".join(filter(None, (name, key))): value for name, s in parts.items() for key, value in s.items()}
