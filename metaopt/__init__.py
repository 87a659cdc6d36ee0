"""metaopt: exact gradients through a chain of trainings."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the configs lie beside the package; in a wheel they are `metaopt/conf`.
_CHECKOUT = Path(__file__).resolve().parent.parent
if not (_CHECKOUT / "metaopt" / "conf").is_dir() and (_CHECKOUT / "conf" / "config.yaml").is_file():
    __path__.append(str(_CHECKOUT))

# Public name → module. Imported on first use: shell completion runs this package at every TAB, and torch takes seconds.
_PUBLIC = {
    "Chain": "chain",
    "ConfigError": "errors",
    "CrossEntropy": "losses",
    "DataBundle": "data.bundle",
    "Distillation": "losses",
    "Estimator": "estimators",
    "ExampleWeights": "meta_params",
    "FixedWeights": "meta_params",
    "HandOver": "handover",
    "HardLabels": "losses",
    "HiddenStates": "losses",
    "InnerLoss": "losses",
    "MetaObjective": "objectives",
    "MetaParameters": "meta_params",
    "MetaTrainer": "trainer",
    "MetaoptError": "errors",
    "MissingPathError": "errors",
    "NonFiniteError": "errors",
    "SourceWeights": "meta_params",
    "Stage": "stage",
    "StageError": "errors",
    "Uniform": "meta_params",
    "Unrolled": "estimators",
    "ValidationLoss": "objectives",
    "WeightedLoss": "losses",
    "backward": "diagnostics",
    "check_hypergradient": "check",
    "hypergradient": "diagnostics",
}

__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'metaopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"metaopt.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from metaopt.chain import Chain as Chain
    from metaopt.check import check_hypergradient as check_hypergradient
    from metaopt.data.bundle import DataBundle as DataBundle
    from metaopt.diagnostics import backward as backward
    from metaopt.diagnostics import hypergradient as hypergradient
    from metaopt.errors import ConfigError as ConfigError
    from metaopt.errors import MetaoptError as MetaoptError
    from metaopt.errors import MissingPathError as MissingPathError
    from metaopt.errors import NonFiniteError as NonFiniteError
    from metaopt.errors import StageError as StageError
    from metaopt.estimators import Estimator as Estimator
    from metaopt.estimators import Unrolled as Unrolled
    from metaopt.handover import HandOver as HandOver
    from metaopt.losses import CrossEntropy as CrossEntropy
    from metaopt.losses import Distillation as Distillation
    from metaopt.losses import HardLabels as HardLabels
    from metaopt.losses import HiddenStates as HiddenStates
    from metaopt.losses import InnerLoss as InnerLoss
    from metaopt.losses import WeightedLoss as WeightedLoss
    from metaopt.meta_params import ExampleWeights as ExampleWeights
    from metaopt.meta_params import FixedWeights as FixedWeights
    from metaopt.meta_params import MetaParameters as MetaParameters
    from metaopt.meta_params import SourceWeights as SourceWeights
    from metaopt.meta_params import Uniform as Uniform
    from metaopt.objectives import MetaObjective as MetaObjective
    from metaopt.objectives import ValidationLoss as ValidationLoss
    from metaopt.stage import Stage as Stage
    from metaopt.trainer import MetaTrainer as MetaTrainer
