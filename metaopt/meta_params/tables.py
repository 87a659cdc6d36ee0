"""Meta-parameters: what the outer problem learns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.core.meta_params import MetaParameters, look_up

PARAMETRISATIONS = ("softmax", "sigmoid")
MOST_SHOWN = 32  # numbers that a summary lists


class _TableOfWeights(MetaParameters):
    """One logit per entry, and a weight that is its sigmoid, or `n · softmax` over all n entries."""

    key: str  # which entry of a batch selects the weight

    def __init__(self, size: int, parametrisation: str, sparse: bool = False) -> None:
        super().__init__()
        where = type(self).__name__
        if size < 1:
            raise ConfigError(f"{where}: {size} weights; at least 1 is needed")
        if parametrisation not in PARAMETRISATIONS:
            hint = did_you_mean(parametrisation, PARAMETRISATIONS)
            raise ConfigError(f"{where}: no parametrisation {parametrisation!r}{hint}")
        if sparse and parametrisation != "sigmoid":
            raise ConfigError(f"{where}: sparse=True needs parametrisation='sigmoid': a softmax moves every weight")
        self.parametrisation, self.sparse = parametrisation, sparse
        self.logits = nn.Parameter(torch.zeros(size))

    def weights(self) -> Tensor:
        """Return all weights [n], in the graph."""
        if self.parametrisation == "sigmoid":
            return self.logits.sigmoid()
        return len(self.logits) * self.logits.softmax(0)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the weight of each example of the batch [batch size]."""
        if self.parametrisation == "sigmoid":
            return look_up(self.logits, batch, self.key, type(self).__name__, self.sparse).sigmoid()
        return look_up(self.weights(), batch, self.key, type(self).__name__)


class SourceWeights(_TableOfWeights):
    """One weight per source (group) of the data: `w_s = n · softmax(logits)_s`, mean 1 over the n sources.

    Args:
        num_sources: n.
        parametrisation: `softmax`, or `sigmoid` for `w_s = σ(logits_s)`, which starts at 1/2.
    """

    key = "source"

    def __init__(self, num_sources: int, parametrisation: str = "softmax") -> None:
        super().__init__(num_sources, parametrisation)


class ExampleWeights(_TableOfWeights):
    """One weight per training example: `w_i = σ(logits_i)`, which starts at 1/2.

    Args:
        num_examples: n; a batch's `index` runs from 0 to n − 1.
        parametrisation: `sigmoid`, or `softmax` for `w_i = n · softmax(logits)_i`.
        sparse: the hypergradient holds only the rows that the unroll has read, for tables of a million examples; the
            meta-optimizer is then `torch.optim.SparseAdam` or plain `SGD`.
    """

    key = "index"

    def __init__(self, num_examples: int, parametrisation: str = "sigmoid", sparse: bool = False) -> None:
        super().__init__(num_examples, parametrisation, sparse)


class ClassWeights(_TableOfWeights):
    """One weight per class, chosen by the label: `w_c = n · softmax(logits)_c`, mean 1 over the n classes.

    For sequences the labels are tokens, and the weights are those of the positions [batch size, positions].

    Args:
        num_labels: n.
        parametrisation: `softmax`, or `sigmoid` for `w_c = σ(logits_c)`.
    """

    key = "labels"

    def __init__(self, num_labels: int, parametrisation: str = "softmax") -> None:
        super().__init__(num_labels, parametrisation)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the weight of each label, of the labels' shape; 0 where a position does not count."""
        if "labels" not in batch:
            raise ConfigError(f"{type(self).__name__} reads batch['labels'], which this batch lacks")
        labels = batch["labels"]
        weights = look_up(self.weights(), {"labels": labels.clamp(min=0)}, self.key, type(self).__name__)
        return weights.masked_fill(labels < 0, 0.0)

    def summary(self) -> dict[str, float]:
        """Return the weight of each class, if there are not too many to read."""
        weights = self.weights().tolist() if len(self.logits) <= MOST_SHOWN else []
        return {f"class {i}": weight for i, weight in enumerate(weights)}


class TokenWeights(ClassWeights):
    """One weight per token of the vocabulary, chosen by the target token at each position; else as `ClassWeights`."""

    def __init__(self, vocab_size: int, parametrisation: str = "softmax") -> None:
        super().__init__(vocab_size, parametrisation)


class FixedWeights(MetaParameters):
    """Given weights that are not learned: an oracle mask, or learned weights once they are frozen.

    Args:
        weights: [n].
        key: which entry of a batch selects the weight: `index` or `source`.
    """

    table: Tensor

    def __init__(self, weights: Tensor, key: str = "index") -> None:
        super().__init__()
        self.key = key
        self.register_buffer("table", weights.detach().clone().to(torch.get_default_dtype()))

    def weights(self) -> Tensor:
        """Return all weights [n]."""
        return self.table

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the weight of each example of the batch [batch size]."""
        return look_up(self.table, batch, self.key, type(self).__name__)
