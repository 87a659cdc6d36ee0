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
    "Adafactor": "torch_optim.adafactor",
    "Annealed": "soft_inputs",
    "AugmentedLoss": "augmentation",
    "CSVLogger": "loggers",
    "Captured": "estimators",
    "Chain": "chain",
    "Checkpointed": "estimators",
    "ClassWeights": "meta_params",
    "ClipNorm": "transforms",
    "ClipValue": "transforms",
    "ConfigError": "errors",
    "ConjugateGradient": "estimators",
    "CrossEntropy": "losses",
    "DataBundle": "data.bundle",
    "Decoded": "handover",
    "Distillation": "losses",
    "DoubleBackward": "estimators",
    "Entropy": "objectives",
    "Estimator": "estimators",
    "ExampleWeights": "meta_params",
    "ExpectedEmbeddings": "soft_inputs",
    "FiniteDifference": "estimators",
    "FirstOrder": "estimators",
    "FixedWeights": "meta_params",
    "FromMeta": "learned",
    "FromUpstream": "losses",
    "GaussianNoise": "augmentation",
    "Generated": "handover",
    "GumbelSamples": "soft_inputs",
    "HandOver": "handover",
    "HardLabels": "losses",
    "HiddenStates": "losses",
    "InitialWeights": "learned",
    "InnerLoss": "losses",
    "LearnedHyperparameters": "learned",
    "LabelSmoothing": "losses",
    "Logger": "loggers",
    "cross_entropy_per_example": "losses",
    "load_meta_params": "tracking",
    "locate_non_finite": "diagnostics.non_finite",
    "MetaObjective": "objectives",
    "MetaParameters": "meta_params",
    "MetaResult": "trainer",
    "MetaTrainer": "trainer",
    "MetaoptError": "errors",
    "MissingPathError": "errors",
    "Muon": "torch_optim.muon",
    "Neumann": "estimators",
    "NonFiniteError": "errors",
    "OneStep": "estimators",
    "PipelineLoss": "objectives",
    "PrintLogger": "loggers",
    "Product": "estimators",
    "Selection": "trainer",
    "SoftTargetLoss": "soft_targets",
    "SoftTargets": "soft_targets",
    "SourceWeights": "meta_params",
    "Sparsity": "objectives",
    "Stage": "stage",
    "StageError": "errors",
    "SumOfLosses": "loss_terms",
    "SumOfObjectives": "objectives",
    "SurrogateLoss": "objectives",
    "TensorBoardLogger": "loggers",
    "TermWeights": "loss_terms",
    "TokenWeights": "meta_params",
    "Truncated": "estimators",
    "Uniform": "meta_params",
    "Unrolled": "estimators",
    "ValidationLoss": "objectives",
    "WandbLogger": "loggers",
    "WeightNetwork": "weight_network",
    "WeightedLoss": "losses",
    "backward": "diagnostics.backward",
    "check_hypergradient": "diagnostics.check",
    "compare_estimators": "diagnostics.fidelity",
    "explain_hypergradient": "diagnostics.explain",
    "grouped": "transforms",
    "hypergradient": "diagnostics.backward",
    "mixed_jacobian": "mixed",
    "mixed_vjp": "mixed",
    "model_inputs": "losses",
    "register_optimizer": "torch_optim.kinds",
    "sequential": "transforms",
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
    from metaopt.augmentation import AugmentedLoss as AugmentedLoss
    from metaopt.augmentation import GaussianNoise as GaussianNoise
    from metaopt.chain import Chain as Chain
    from metaopt.data.bundle import DataBundle as DataBundle
    from metaopt.diagnostics.backward import backward as backward
    from metaopt.diagnostics.backward import hypergradient as hypergradient
    from metaopt.diagnostics.check import check_hypergradient as check_hypergradient
    from metaopt.diagnostics.explain import explain_hypergradient as explain_hypergradient
    from metaopt.diagnostics.fidelity import compare_estimators as compare_estimators
    from metaopt.diagnostics.non_finite import locate_non_finite as locate_non_finite
    from metaopt.errors import ConfigError as ConfigError
    from metaopt.errors import MetaoptError as MetaoptError
    from metaopt.errors import MissingPathError as MissingPathError
    from metaopt.errors import NonFiniteError as NonFiniteError
    from metaopt.errors import StageError as StageError
    from metaopt.estimators import Captured as Captured
    from metaopt.estimators import Checkpointed as Checkpointed
    from metaopt.estimators import ConjugateGradient as ConjugateGradient
    from metaopt.estimators import DoubleBackward as DoubleBackward
    from metaopt.estimators import Estimator as Estimator
    from metaopt.estimators import FiniteDifference as FiniteDifference
    from metaopt.estimators import FirstOrder as FirstOrder
    from metaopt.estimators import Neumann as Neumann
    from metaopt.estimators import OneStep as OneStep
    from metaopt.estimators import Product as Product
    from metaopt.estimators import Truncated as Truncated
    from metaopt.estimators import Unrolled as Unrolled
    from metaopt.handover import Decoded as Decoded
    from metaopt.handover import Generated as Generated
    from metaopt.handover import HandOver as HandOver
    from metaopt.learned import FromMeta as FromMeta
    from metaopt.learned import InitialWeights as InitialWeights
    from metaopt.learned import LearnedHyperparameters as LearnedHyperparameters
    from metaopt.loggers import CSVLogger as CSVLogger
    from metaopt.loggers import Logger as Logger
    from metaopt.loggers import PrintLogger as PrintLogger
    from metaopt.loggers import TensorBoardLogger as TensorBoardLogger
    from metaopt.loggers import WandbLogger as WandbLogger
    from metaopt.loss_terms import SumOfLosses as SumOfLosses
    from metaopt.loss_terms import TermWeights as TermWeights
    from metaopt.losses import CrossEntropy as CrossEntropy
    from metaopt.losses import Distillation as Distillation
    from metaopt.losses import FromUpstream as FromUpstream
    from metaopt.losses import HardLabels as HardLabels
    from metaopt.losses import HiddenStates as HiddenStates
    from metaopt.losses import InnerLoss as InnerLoss
    from metaopt.losses import LabelSmoothing as LabelSmoothing
    from metaopt.losses import WeightedLoss as WeightedLoss
    from metaopt.losses import cross_entropy_per_example as cross_entropy_per_example
    from metaopt.losses import model_inputs as model_inputs
    from metaopt.meta_params import ClassWeights as ClassWeights
    from metaopt.meta_params import ExampleWeights as ExampleWeights
    from metaopt.meta_params import FixedWeights as FixedWeights
    from metaopt.meta_params import MetaParameters as MetaParameters
    from metaopt.meta_params import SourceWeights as SourceWeights
    from metaopt.meta_params import TokenWeights as TokenWeights
    from metaopt.meta_params import Uniform as Uniform
    from metaopt.mixed import mixed_jacobian as mixed_jacobian
    from metaopt.mixed import mixed_vjp as mixed_vjp
    from metaopt.objectives import Entropy as Entropy
    from metaopt.objectives import MetaObjective as MetaObjective
    from metaopt.objectives import PipelineLoss as PipelineLoss
    from metaopt.objectives import Sparsity as Sparsity
    from metaopt.objectives import SumOfObjectives as SumOfObjectives
    from metaopt.objectives import SurrogateLoss as SurrogateLoss
    from metaopt.objectives import ValidationLoss as ValidationLoss
    from metaopt.soft_inputs import Annealed as Annealed
    from metaopt.soft_inputs import ExpectedEmbeddings as ExpectedEmbeddings
    from metaopt.soft_inputs import GumbelSamples as GumbelSamples
    from metaopt.soft_targets import SoftTargetLoss as SoftTargetLoss
    from metaopt.soft_targets import SoftTargets as SoftTargets
    from metaopt.stage import Stage as Stage
    from metaopt.torch_optim.adafactor import Adafactor as Adafactor
    from metaopt.torch_optim.kinds import register_optimizer as register_optimizer
    from metaopt.torch_optim.muon import Muon as Muon
    from metaopt.tracking import load_meta_params as load_meta_params
    from metaopt.trainer import MetaResult as MetaResult
    from metaopt.trainer import MetaTrainer as MetaTrainer
    from metaopt.trainer import Selection as Selection
    from metaopt.transforms import ClipNorm as ClipNorm
    from metaopt.transforms import ClipValue as ClipValue
    from metaopt.transforms import grouped as grouped
    from metaopt.transforms import sequential as sequential
    from metaopt.weight_network import WeightNetwork as WeightNetwork
