"""The outer loop over a small chain."""

from __future__ import annotations

import functools
import io
from typing import Any

import torch
from chains import full_chain, shuffled
from small import example_weights
from torch import Tensor

import metaopt
from metaopt.trainer import MetaTrainer

META = functools.partial(torch.optim.Adam, lr=0.3)


def trainer(chain: metaopt.Chain | None = None, meta_params: Any = None, **options: Any) -> MetaTrainer:
    """A trainer over the full chain: shuffled validation data, Adam for A."""
    chain = chain or full_chain()
    weights = meta_params or example_weights()
    settings: dict[str, Any] = {"validation": shuffled(), "seed": 6}
    if "meta_optimizer" not in options:
        settings["meta_optimizer"] = META(weights.parameters())
    objective = options.pop("objective", None) or metaopt.ValidationLoss(list(chain.stages)[-1])
    return MetaTrainer(chain, objective, weights, **{**settings, **options})


def learned(run: MetaTrainer) -> Tensor:
    return run.meta_params.logits.detach().clone()  # type: ignore[union-attr, operator]


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]
