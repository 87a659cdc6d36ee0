"""How far each estimator's hypergradient is from the exact one, and what it costs: on the user's own chain."""

from __future__ import annotations

import copy
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaopt.chain import Chain
from metaopt.diagnostics.backward import hypergradient
from metaopt.diagnostics.check import explained
from metaopt.diagnostics.differences import Pipeline
from metaopt.diagnostics.fidelity_result import Cost, Deviation, FidelityResult, FidelityRow
from metaopt.errors import ConfigError, StageError
from metaopt.estimators import Checkpointed, Estimator, Truncated, Unrolled
