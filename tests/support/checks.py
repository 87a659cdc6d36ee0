"""Checks of small chains in float64."""

from __future__ import annotations

from typing import Any

from small import example_weights, feature_batches, two_stages
from small_models import Network

import metaopt
from metaopt.diagnostics.check_result import CheckResult


def check(chain: metaopt.Chain, meta_params: Any = None, objective: Any = None, **options: Any) -> CheckResult:
    weights = meta_params or example_weights()
    objective = objective or metaopt.ValidationLoss(list(chain.stages)[-1])
    return metaopt.check_hypergradient(chain, objective, feature_batches(1, seed=8)[0], weights, **options)


def distilled(optimizer: Any) -> metaopt.Chain:
    """Two stages with dropout; without batch norm, whose running statistics carry no graph."""
    return two_stages(optimizer, Network(0.3), Network(0.3))


def verdicts(result: CheckResult) -> list[str]:
    return [row.verdict for row in result.rows]
