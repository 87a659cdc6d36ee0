"""A network that weighs each example by its loss and features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError
from metaopt.base.ranges import check_counts
from metaopt.core.meta_params import MetaParameters


class WeightNetwork(MetaParameters):
    """`w_i = σ(f(ℓ_i, x_i))`, f being a network of one hidden layer (Meta-Weight-Net: Shu et al., 2019,
    arXiv:1902.07379).

    The number of meta-parameters does not grow with the data, and unseen examples have a weight too. `WeightedLoss`
    hands it each example's loss at every inner step.

    Args:
        hidden_size: of the hidden layer.
        features: entry of a batch that is read beside the loss, floats [B, ...]; None for the loss alone.
        num_features: how many numbers that are per example; 0 without features.
        normalise: divide the weights by their mean over the batch, as in the paper.
    """

    reads_losses = True

    def __init__(
        self, hidden_size: int = 100, features: str | None = None, num_features: int = 0, normalise: bool = False
    ) -> None:
        super().__init__()
        check_counts("WeightNetwork", hidden_size=hidden_size)
        if (features is None) != (num_features == 0) or num_features < 0:
            raise ConfigError(
                f"WeightNetwork: features={features!r} and num_features={num_features} do not fit: name an entry of "
                "the batch and how many numbers it has per example, or neither"
            )
        self.features, self.normalise = features, normalise
        self.layers = nn.Sequential(nn.Linear(1 + num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, 1))

    @property
    def _first(self) -> nn.Linear:
        return cast(nn.Linear, self.layers[0])

    def forward(self, batch: Mapping[str, Tensor], losses: Tensor) -> Tensor:
        """Return the weight of each example [B], from its features and its loss [B], in the graph."""
        like = self._first.weight
        columns = [losses.to(like.dtype)[:, None]]
        if self.features is not None:
            columns.append(self._read(batch).to(like.dtype).flatten(1))
        weights = self.layers(torch.cat(columns, dim=1))[:, 0].sigmoid()
        return weights / weights.mean() if self.normalise else weights

    def _read(self, batch: Mapping[str, Tensor]) -> Tensor:
        wanted = self._first.in_features - 1
        found = batch.get(self.features or "")
        if found is None or not found.is_floating_point() or found[0].numel() != wanted:
            what = "lacks" if found is None else f"has as {found.dtype} {list(found.shape)}"
            raise ConfigError(
                f"WeightNetwork reads batch[{self.features!r}], which this batch {what}; {wanted} floating numbers per "
                "example are needed"
            )
        return found

    def summary(self) -> dict[str, float]:
        """Return the weight at a few losses, where it reads nothing else."""
        if self.features is not None:
            return {}
        losses = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0])
        with torch.no_grad():
            weights = self.forward({}, losses.to(self._first.weight.device)).tolist()
        return {f"weight at loss {loss:g}": weight for loss, weight in zip(losses.tolist(), weights, strict=True)}
