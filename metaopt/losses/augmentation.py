"""Data augmentation whose strength is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, StageError
from metaopt.base.ranges import check_counts
from metaopt.core.contracts import InnerLoss, Upstream
from metaopt.core.meta_params import AnyMetaParameters, MetaParameters, Uniform
from metaopt.core.view import FunctionalModel
from metaopt.losses.logits import model_inputs
from metaopt.meta_params.tables import select

EMBEDDINGS = "inputs_embeds"


class GaussianNoise(MetaParameters):
    """Noise of learned strength on continuous inputs: `x' = x + σ ε`, `σ = exp(s)`, ε standard normal.

    ε is drawn at each inner step from the replayed random state, so that the hypergradient of σ is exact.

    Args:
        initial: σ at the start, above 0.
        size: 1, or the number of features for a strength each.
        key: entry of a batch; `inputs_embeds` for a model of tokens, whose own embeddings of them get the noise.
    """

    def __init__(self, initial: float = 0.1, size: int = 1, key: str = "inputs") -> None:
        super().__init__()
        check_counts("GaussianNoise", size=size)
        if not initial > 0:
            raise ConfigError(f"GaussianNoise: initial={initial} must be above 0")
        self.key = key
        self.log_strength = nn.Parameter(torch.full((size,), initial).log())

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch with noise."""
        values = batch.get(self.key)
        if values is None or not values.is_floating_point():
            raise ConfigError(
                f"GaussianNoise reads batch[{self.key!r}], which must be there and floating (there are: "
                f"{', '.join(batch)}); for models of tokens: key='{EMBEDDINGS}'"
            )
        strength = self.log_strength.exp().to(values.dtype)
        return {**batch, self.key: values + strength * torch.randn_like(values)}

    def summary(self) -> dict[str, float]:
        """Return the mean strength."""
        return {"noise strength": self.log_strength.exp().mean().item()}

    def baseline(self) -> nn.Module:
        """Return no noise at all."""
        return Uniform()


class AugmentedLoss(InnerLoss):
    """Another loss on augmented data.

    Args:
        loss: what is computed on the augmented batch.
        augmentation: which of several meta-parameters augments; None when there is only one.
    """

    def __init__(self, loss: InnerLoss, augmentation: str | None = None) -> None:
        self.loss, self.augmentation = loss, augmentation
        self.reads = getattr(loss, "reads", ())

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        module = select(meta_params, self.augmentation, "AugmentedLoss")
        if not isinstance(module, Uniform):  # the baseline: nothing is augmented
            if getattr(module, "key", None) == EMBEDDINGS and EMBEDDINGS not in batch:
                batch = embedded(model, batch)
            batch = module(batch)
        return self.loss(model, batch, meta_params, upstream)

    def problem_with(self, model: nn.Module, upstream: Mapping[str, nn.Module]) -> str | None:
        """Say what the loss inside says."""
        return self.loss.problem_with(model, upstream) if isinstance(self.loss, InnerLoss) else None


def embedded(model: FunctionalModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with its `input_ids` replaced by the model's own embeddings of them, in the graph."""
    batch = dict(batch)
    model.note_reading(model_inputs(batch))
    with model.as_module() as module:
        table: Any = getattr(module, "get_input_embeddings", lambda: None)()
        if table is None or "input_ids" not in batch:
            raise StageError(f"{model!r} has no get_input_embeddings(), or the batch no input_ids to embed")
        batch[EMBEDDINGS] = table(batch.pop("input_ids"))
    return batch
