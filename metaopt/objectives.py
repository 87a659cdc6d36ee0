"""Meta-objectives: what the meta-parameters minimise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metaopt.errors import ConfigError, did_you_mean
from metaopt.functional import FunctionalModel
from metaopt.losses import cross_entropy_per_example, logits_of, model_inputs
from metaopt.meta_params import AnyMetaParameters

Trained = Mapping[str, FunctionalModel]


class MetaObjective(ABC):
    """What the meta-parameters minimise: the plug-in point that users subclass.

    `reads` names the stages it looks at, so that a misspelt one is found before any training.
    """

    reads: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        """Return the meta-loss, a scalar in the graph of the trained weights or the meta-parameters.

        Args:
            trained: stage name → trained model, in eval mode (`trained["student"].train()` for the other).
            batch: of the validation stream.
            meta_params: one module or a named mapping.
        """


class ValidationLoss(MetaObjective):
    """Mean cross-entropy of one trained stage on validation data.

    Args:
        stage: its name.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.reads = (stage,)

    def __call__(self, trained: Trained, batch: Any, meta_params: AnyMetaParameters) -> Tensor:
        if self.stage not in trained:
            raise ConfigError(f"ValidationLoss: no stage {self.stage!r}{did_you_mean(self.stage, trained)}")
        logits = logits_of(trained[self.stage](**model_inputs(batch)))
        return cross_entropy_per_example(logits, batch["labels"]).mean()
