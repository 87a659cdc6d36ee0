"""What is learned beside tables of weights: hyperparameters, initial weights, a weight network, terms, noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.base.ranges import check_counts, matching
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.meta_params.tables import MetaParameters, Uniform, check_positive, select

EMBEDDINGS = "inputs_embeds"

Map = Callable[[Tensor], Tensor]
# Name → raw number ↦ value, and its inverse, which is not finite outside the range
_FORMS: dict[str, tuple[Map, Map]] = {
    "log": (torch.exp, torch.log),
    "softplus": (nn.functional.softplus, lambda v: v + (-(-v).expm1()).log()),
    "sigmoid": (torch.sigmoid, torch.logit),
    "identity": (torch.clone, torch.clone),
}
_UNIT = ("momentum", "betas", "dampening", "rho", "alpha")  # between 0 and 1; the others are positive


class LearnedHyperparameters(MetaParameters):
    """An inner optimizer's hyperparameters, learned: `LearnedHyperparameters(lr=0.01, betas=(0.9, 0.99))`.

    Each is a free number behind a map: `log` (value = exp(raw)) or `softplus` for positive ones, `sigmoid` for those
    between 0 and 1 (`momentum`, `betas`, …), or `identity`; `parametrisations` names another than its own. A stage
    reads them by `Stage(..., overrides=metaopt.FromMeta())`.

    Args:
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
        self._names = {key: list(value) for key, value in hyperparameters.items() if isinstance(value, Mapping)}
        for key, value in hyperparameters.items():
            numbers = list(value.values()) if key in self._names else value
            self.register_parameter(key, nn.Parameter(_raw(key, numbers, self._forms[key])))

    def values(self) -> dict[str, Any]:
        """Return the hyperparameters in the graph, as a stage's `overrides` takes them."""
        return {key: self._by_name(key, _parts(key, self._value(key))) for key in self._forms}

    def numbers(self) -> dict[str, Any]:
        """Return the hyperparameters as plain numbers, to look at."""
        return {key: self._by_name(key, self._value(key).tolist()) for key in self._forms}

    def _value(self, key: str) -> Tensor:
        return _FORMS[self._forms[key]][0](getattr(self, key))

    def _by_name(self, key: str, parts: Any) -> Any:
        return dict(zip(self._names[key], parts, strict=True)) if key in self._names else parts


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
    raw = _FORMS[form][1](values)
    if not raw.isfinite().all():
        wanted = {"sigmoid": "between 0 and 1", "identity": "finite"}.get(form, "above 0")
        hint = f"or write parametrisations={{{key!r}: 'identity'}}"
        raise ConfigError(f"LearnedHyperparameters: {key}={numbers!r} must be {wanted} for its map ({form}), {hint}")
    return raw.to(torch.get_default_dtype())


def _parts(key: str, value: Tensor) -> Any:
    """Return a value as an optimizer has it: one number, or a list by group; `betas` as pairs."""
    if value.dim() == 0:
        return value
    if key == "betas":
        return tuple(value.unbind()) if value.dim() == 1 else [tuple(pair.unbind()) for pair in value.unbind()]
    return list(value.unbind())


class InitialWeights(MetaParameters):
    """The initial weights of a stage, learned: `Stage(model, ..., initial=metaopt.FromMeta())` starts from them.

    The learning starts from the present weights of `model`, the stage's own or one of its architecture, or a factory of
    one. `names` are patterns of the parameters to learn; the others start from the stage's own weights.

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
            *path, last = f"params.{name}".split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(trained[name].detach().clone()))

    def values(self) -> dict[str, Tensor]:
        """Return the weights by the names that they have in the model."""
        return {name: self.get_parameter(f"params.{name}") for name in self._learned}


class FromMeta:
    """What a stage reads from meta-parameters: for its slots `overrides` and `initial`.

    `name` says which, where several are given as a mapping. From `metaopt.Uniform`, the baseline that learns nothing,
    it reads nothing: the stage keeps its optimizer's own hyperparameters, or its own initial weights.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"FromMeta({self.name!r})"

    def __call__(self, meta_params: AnyMetaParameters, _: Any = None) -> Mapping[str, Any]:
        found = select(meta_params, self.name, "FromMeta")
        return {} if isinstance(found, Uniform) else found.values()

    def check(self, stage: Any, meta_params: AnyMetaParameters) -> None:
        """Raise if the stage cannot use what is learned; called before any training."""
        found = select(meta_params, self.name, "FromMeta")
        if isinstance(found, LearnedHyperparameters):
            stage.rule.check_overrides(found.values())
        elif isinstance(found, InitialWeights):
            for name in found.values().keys() - set(stage.rule.names):
                hint = did_you_mean(name, stage.rule.names)
                raise ConfigError(f"InitialWeights: {name!r} is no trained parameter of the stage's model{hint}")
        elif not isinstance(found, Uniform) and not hasattr(found, "values"):
            wanted = "metaopt.LearnedHyperparameters(...) or metaopt.InitialWeights(...)"
            raise ConfigError(f"FromMeta reads a {type(found).__name__}; give {wanted}")


class WeightNetwork(MetaParameters):
    """`w_i = σ(f(ℓ_i, x_i))`, f being a network of one hidden layer (Meta-Weight-Net: Shu et al., 2019,
    arXiv:1902.07379).

    The number of meta-parameters does not grow with the data, and unseen examples have a weight too. `WeightedLoss`
    hands it each example's loss at every inner step.

    Args:
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
            given = f"features={features!r} and num_features={num_features}"
            raise ConfigError(f"WeightNetwork: {given} do not fit: name an entry of the batch and its size, or neither")
        self.features, self.num_features, self.normalise = features, num_features, normalise
        self.layers = nn.Sequential(nn.Linear(1 + num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, 1))

    def forward(self, batch: Mapping[str, Tensor], losses: Tensor) -> Tensor:
        """Return the weight of each example [B], from its features and its loss [B], in the graph."""
        columns = [losses[:, None]]
        if self.features is not None:
            found = batch.get(self.features)
            if found is None or not found.is_floating_point() or found[0].numel() != self.num_features:
                wanted = f"{self.num_features} floating numbers per example"
                raise ConfigError(f"WeightNetwork reads batch[{self.features!r}], which must be there: {wanted}")
            columns.append(found.flatten(1))
        like = next(self.layers.parameters())
        read = torch.cat([column.to(like.dtype) for column in columns], dim=1)
        weights = self.layers(read)[:, 0].sigmoid()
        return weights / weights.mean() if self.normalise else weights

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        if self.features is not None:
            return {}
        losses = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0])
        weights = self({}, losses.to(next(self.layers.parameters()).device)).tolist()
        return {f"weight at loss {loss:g}": weight for loss, weight in zip(losses.tolist(), weights, strict=True)}


class TermWeights(MetaParameters):
    """One positive weight per named term of a loss, `w_k = exp(a_k)`, that starts at `initial` > 0."""

    def __init__(self, names: Sequence[str], initial: float = 1.0) -> None:
        super().__init__()
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"TermWeights: names={list(names)}: at least one is needed, and each once")
        check_positive("TermWeights", initial=initial)
        self.names, self.initial = tuple(names), initial
        self.log_weights = nn.Parameter(torch.full((len(names),), initial).log())

    def forward(self) -> dict[str, Tensor]:
        """Return name → weight, in the graph."""
        return dict(zip(self.names, self.log_weights.exp(), strict=True))

    def summary(self) -> dict[str, float]:
        return {name: weight.item() for name, weight in self().items()}

    def baseline(self) -> nn.Module:
        return TermWeights(self.names, self.initial)


class GaussianNoise(MetaParameters):
    """Noise of learned strength on continuous inputs: `x' = x + σ ε`, `σ = exp(s)`, ε standard normal.

    ε is drawn at each inner step from the replayed random state, so that the hypergradient of σ is exact.

    σ starts at `initial` > 0; `size` is 1, or the number of features for a strength each. `key` is the entry of a
    batch; `inputs_embeds` for a model of tokens, whose own embeddings of them get the noise.
    """

    def __init__(self, initial: float = 0.1, size: int = 1, key: str = "inputs") -> None:
        super().__init__()
        check_counts("GaussianNoise", size=size)
        check_positive("GaussianNoise", initial=initial)
        self.key = key
        self.log_strength = nn.Parameter(torch.full((size,), initial).log())

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch with noise."""
        values = batch.get(self.key)
        if values is None or not values.is_floating_point():
            hint = f"for models of tokens: key='{EMBEDDINGS}'"
            raise ConfigError(f"GaussianNoise reads batch[{self.key!r}], which must be there and floating; {hint}")
        strength = self.log_strength.exp().to(values.dtype)
        return {**batch, self.key: values + strength * torch.randn_like(values)}

    def summary(self) -> dict[str, float]:
        return {"noise strength": self.log_strength.exp().mean().item()}
