"""What a schedule or overrides give an inner step, as tensors that enter its captured graph."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.estimators.products.base import leaves, linearized
from metaopt.estimators.step_loss import StepLoss
from metaopt.estimators.update_vjp import add, as_leaves
from metaopt.optimizers.kinds import SUPPORTED
from metaopt.optimizers.step import TrackedFloat, number

_Place = enum.Enum("_Place", ["GIVEN", "LEARNED"])  # of an input among the hyperparameters


class Given:
    """The hyperparameters of a step: numbers and tensors are `inputs`, what they lie in is `structure`.

    Rates enter as `θ + η (θ₁ − θ)`, one of 0 like any other. Another 0 is structure: torch leaves out what it scales.

    Args:
        loss, others: the step, and the meta-parameters and upstream weights at which it is.
    """

    def __init__(self, loss: StepLoss, others: Sequence[Tensor]) -> None:
        rule = loss.loop.rule
        self._groups, self._learnable = rule.groups, SUPPORTED[type(rule.optimizer)].learnable
        self._meta, self._learned, self.inputs = dict[str, Tensor](), dict[int, Tensor](), list[Tensor]()
        self.possible = True
        with torch.enable_grad():
            values = loss.loop.hyperparameters(loss.t, loss.lend.meta_params)
            if any(isinstance(x, Tensor) and x.requires_grad for x in pytree.tree_leaves(values)):
                named = zip(loss.keys, others, strict=True)
                self._meta = as_leaves({name: x for (stage, name), x in named if stage is None})
                with loss.lend(self._meta):
                    values = loss.loop.hyperparameters(loss.t, loss.lend.meta_params)
            self._trees = {key: pytree.tree_flatten(value) for key, value in values.items()}
            self._parts = {key: [self._placed(key, x) for x in parts] for key, (parts, _) in self._trees.items()}
        self.structure = [(key, spec, *map(repr, self._parts[key])) for key, (_, spec) in self._trees.items()]

    def _placed(self, key: str, part: Any) -> Any:
        """Make a number or tensor an input, and return its place; what else there may be is returned."""
        if isinstance(part, Tensor) and part.requires_grad and part.numel() == 1:
            self._learned[len(self.inputs)] = part = part.reshape(())
            place = _Place.LEARNED
        else:
            part, place = number(part), _Place.GIVEN
            if not isinstance(part, (int, float)) or isinstance(part, bool) or (part == 0 and key != "lr"):
                self.possible &= isinstance(part, (bool, int, float, str, type(None)))
                return part
            part = torch.tensor(part, dtype=torch.float64)
        self.possible &= key in self._learnable
        self.inputs.append(part.detach())
        return place

    def beside(self) -> str:
        """Return the parameter groups without what all of them are given."""
        whole = {key for key, (_, spec) in self._trees.items() if spec.type is not dict}
        return repr([({k: v for k, v in g.hyperparameters.items() if k not in whole}, g.names) for g in self._groups])

    def handed(self, inputs: Sequence[Tensor]) -> tuple[Mapping[str, Any], dict[Any, Tensor]]:
        """Return the hyperparameters with these `inputs` in their places, and of these the learned ones, by number."""
        learned = {i: leaves([inputs[i]])[0] for i in self._learned}
        rest, values = iter([learned.get(i, x) for i, x in enumerate(inputs)]), dict[str, Any]()
        for key, (_, spec) in self._trees.items():
            entering = [next(rest) if isinstance(x, _Place) else x for x in self._parts[key]]
            if key != "lr":
                entering = [TrackedFloat(x) if isinstance(x, Tensor) else x for x in entering]
            values[key] = pytree.tree_unflatten(entering, spec)
        rates = values.get("lr", {})
        if not isinstance(rates, dict):  # by name is how they are taken apart from the step
            each = rates if isinstance(rates, list) else [rates] * len(self._groups)
            values["lr"] = {name: rate for g, rate in zip(self._groups, each, strict=True) for name in g.names}
        return values, learned

    def pulled_back(self, sums: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """Return cotangents by key, those of learned hyperparameters pulled back to the meta-parameters."""
        above = [sums.pop((None, i), None) for i in self._learned]
        back = linearized(list(self._learned.values()), above, list(self._meta.values()))
        for name, cotangent in zip(self._meta, back, strict=True):
            add(sums, (None, name), cotangent)
        return sums
