"""Inner hyperparameters and initial weights that are learned, as meta-parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import matching
from metaopt.core.meta_params import AnyMetaParameters, MetaParameters, Uniform
from metaopt.meta_params.tables import select

# Name → raw number ↦ value, its inverse, and the bounds of what it reaches
_FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], tuple[float, float]]] = {
    "log": (torch.exp, torch.log, (0.0, math.inf)),
    "softplus": (nn.functional.softplus, lambda v: v + (-(-v).expm1()).log(), (0.0, math.inf)),
    "sigmoid": (torch.sigmoid, torch.logit, (0.0, 1.0)),
    "identity": (lambda raw: raw, lambda v: v, (-math.inf, math.inf)),
}
_UNIT = ("momentum", "betas", "dampening", "rho", "alpha")  # between 0 and 1; the others are positive


class LearnedHyperparameters(MetaParameters):
    """An inner optimizer's hyperparameters, learned: `LearnedHyperparameters(lr=0.01, betas=(0.9, 0.99))`.

    Each is a free number behind a map: `log` (value = exp(raw)) or `softplus` for positive ones, `sigmoid` for those
    between 0 and 1 (`momentum`, `betas`, …). A stage reads them by `Stage(..., overrides=metaopt.FromMeta())`.

    Args:
        parametrisations: hyperparameter → `log`, `softplus`, `sigmoid` or `identity`, where another than its own.
        hyperparameters: name → initial value: one number for all; a list of one per parameter group; or a mapping from
            parameter names to numbers (parameters that are not in it keep the optimizer's own). `betas` is a pair.

    Raises:
        ConfigError: a value outside the range of its map.
    """

    def __init__(self, parametrisations: Mapping[str, str] | None = None, **hyperparameters: Any) -> None:
        super().__init__()
        if not hyperparameters:
            raise ConfigError("LearnedHyperparameters: nothing to learn; name at least one: lr=0.01")
        given = dict(parametrisations or {})
        for key in given:
            if key not in hyperparameters:
                raise ConfigError(f"LearnedHyperparameters: parametrisations name {key!r}, which is not learned")
        self._forms = {key: given.get(key, "sigmoid" if key in _UNIT else "log") for key in hyperparameters}
        self._names: dict[str, list[str] | None] = {}
        for key, value in hyperparameters.items():
            self._names[key] = list(value) if isinstance(value, Mapping) else None
            numbers = list(value.values()) if isinstance(value, Mapping) else value
            self.register_parameter(key, nn.Parameter(_raw(key, numbers, self._forms[key])))

    def values(self) -> dict[str, Any]:
        """Return the hyperparameters in the graph, as a stage's `overrides` takes them."""
        return {key: self._value(key) for key in self._forms}

    def _value(self, key: str) -> Any:
        value, names = _FORMS[self._forms[key]][0](getattr(self, key)), self._names[key]
        parts: Any = list(value.unbind()) if value.dim() else value
        if key == "betas":
            parts = tuple(parts) if value.dim() == 1 else [tuple(pair.unbind()) for pair in parts]
        return parts if names is None else dict(zip(names, parts, strict=True))

    def numbers(self) -> dict[str, Any]:
        """Return the hyperparameters as plain numbers, to look at."""
        return {key: _as_numbers(value) for key, value in self.values().items()}

    def check(self, stage: Any) -> None:
        """Raise if the stage's optimizer does not have one of them, or cannot learn it."""
        stage.rule.check_overrides(self.values())


class InitialWeights(MetaParameters):
    """The initial weights of a stage, learned: a stage starts every unroll from them.

    `Stage(model, ..., initial=metaopt.FromMeta())`.

    Args:
        model: of the stage, or one of the same architecture, or a factory of one; its present weights are where the
            learning starts.
        names: patterns of the parameters to learn; the others start from the stage's own weights.

    Raises:
        ConfigError: a pattern that names no parameter that requires grad.
    """

    def __init__(self, model: nn.Module | Callable[[], nn.Module], names: Sequence[str] = ("*",)) -> None:
        super().__init__()
        model = model if isinstance(model, nn.Module) else model()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wanted = matching("InitialWeights", names, list(trained), "trained parameter")
        self._learned = [name for name in trained if name in wanted]
        for name in self._learned:
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in ("params", *path):
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(trained[name].detach().clone()))

    def values(self) -> dict[str, Tensor]:
        """Return the weights by the names that they have in the model."""
        return {name: self.get_parameter(f"params.{name}") for name in self._learned}

    def check(self, stage: Any) -> None:
        """Raise if one of them is no trained parameter of the stage's model."""
        unknown = [name for name in self._learned if name not in stage.rule.names]
        if unknown:
            raise ConfigError(
                f"InitialWeights: {unknown[0]!r} is no trained parameter of the stage's model"
                f"{did_you_mean(unknown[0], stage.rule.names)}"
            )


class FromMeta:
    """What a stage reads from meta-parameters: for its slots `overrides` and `initial`.

    From `metaopt.Uniform`, the baseline that learns nothing, it reads nothing: the stage keeps its optimizer's own
    hyperparameters, or its own initial weights.

    Args:
        name: of the meta-parameters, where several are given as a mapping; None where there is one module.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"FromMeta({self.name!r})"

    def __call__(self, meta_params: AnyMetaParameters, _: Any = None) -> Mapping[str, Any]:
        """Return the learned hyperparameters, or the learned weights, in the graph."""
        found = self._read(meta_params)
        return {} if found is None else found.values()

    def check(self, stage: Any, meta_params: AnyMetaParameters) -> None:
        """Raise if the stage cannot use what is learned; called before any training."""
        found = self._read(meta_params)
        if found is not None:
            found.check(stage)

    def _read(self, meta_params: AnyMetaParameters) -> LearnedHyperparameters | InitialWeights | None:
        if isinstance(meta_params, Mapping) and self.name is None and len(meta_params) > 1:
            fitting = [n for n, m in meta_params.items() if isinstance(m, (LearnedHyperparameters, InitialWeights))]
            raise ConfigError(
                f"FromMeta must say which meta-parameters it reads: FromMeta({(fitting or list(meta_params))[0]!r})"
            )
        if isinstance(meta_params, Mapping) and self.name is not None and self.name not in meta_params:
            hint = did_you_mean(self.name, meta_params)
            raise ConfigError(f"FromMeta({self.name!r}): there are no meta-parameters of that name{hint}")
        found = select(meta_params, self.name, "FromMeta")
        if isinstance(found, Uniform):
            return None
        if not hasattr(found, "values") or not hasattr(found, "check"):
            raise ConfigError(
                f"FromMeta reads a {type(found).__name__}; give metaopt.LearnedHyperparameters(...) or "
                "metaopt.InitialWeights(...), or write a function (meta_params, t) -> hyperparameters"
            )
        return found


def _raw(key: str, numbers: Any, form: str) -> Tensor:
    """Return the free numbers whose map gives the initial values."""
    if form not in _FORMS:
        raise ConfigError(f"LearnedHyperparameters: no parametrisation {form!r}{did_you_mean(form, _FORMS)}")
    try:
        values = torch.tensor(numbers, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"LearnedHyperparameters: {key}={numbers!r}: {error}") from error
    if key == "betas" and (values.dim() not in (1, 2) or values.shape[-1] != 2):
        raise ConfigError(f"LearnedHyperparameters: betas={numbers!r}: a pair is needed, or a list of pairs per group")
    _, inverse, (low, high) = _FORMS[form]
    if not bool(((values > low) & (values < high)).all()):
        wanted = f"between {low:g} and {high:g}" if high < math.inf else f"above {low:g}"
        raise ConfigError(
            f"LearnedHyperparameters: {key}={numbers!r} must be {wanted}, which its map ({form}) can reach; start "
            f"inside, or write parametrisations={{{key!r}: 'identity'}}"
        )
    return inverse(values).to(torch.get_default_dtype())


def _as_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _as_numbers(part) for name, part in value.items()}
    return [_as_numbers(part) for part in value] if isinstance(value, (list, tuple)) else float(value.detach())
