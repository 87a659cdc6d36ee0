"""What one inner step changes of its optimizer's hyperparameters: scheduled values, and learned ones in the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.optimizers.kinds import Kind
from metaopt.optimizers.step import number

# Hyperparameter → a value for all groups, a list of one per group, or a mapping from parameter names
Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """One parameter group at one step; its learned hyperparameters are in their graph.

    `rates` are by parameter, learned or 0 (by which torch's own step divides): `lr` is 1, and they scale the step.
    """

    hyperparameters: dict[str, Any]
    names: tuple[str, ...]  # of its trained parameters
    rates: Mapping[str, Any] | None = None


def check_overrides(overrides: Overrides, groups: Sequence[Group], kind: Kind, cls: str) -> None:
    """Raise for hyperparameters that an optimizer of this class does not have, and for ones that cannot be learned."""
    known, names = groups[0].hyperparameters, [name for group in groups for name in group.names]
    for key, value in overrides.items():
        if key not in known:
            raise ConfigError(f"overrides: {cls} has no hyperparameter {key!r}{did_you_mean(key, known)}")
        if isinstance(value, list) and len(value) != len(groups):
            raise ConfigError(f"overrides: {key!r} has {len(value)} values for {len(groups)} parameter groups")
        by_name = value if isinstance(value, Mapping) else {}
        for name in by_name.keys() - set(names):
            hint = did_you_mean(name, names)
            raise ConfigError(f"overrides: {key!r} names {name!r}, which is no trained parameter{hint}")
        for leaf in tree_leaves(list(by_name.values()) or value):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                _check_learned(key, leaf, kind, cls)


def _check_learned(key: str, value: Tensor, kind: Kind, cls: str) -> None:
    if key not in kind.learnable:
        reason = (kind.reasons or {}).get(key)
        raise ConfigError(
            f"overrides: {key!r} is a tensor that requires grad, and cannot be learned"
            f"{f' ({reason})' if reason else ''}; {cls} can learn {', '.join(kind.learnable) or 'none'}; pass a float"
        )
    if value.numel() != 1:
        raise ConfigError(
            f"overrides: {key!r} has shape {list(value.shape)}; give one number, a list of one per parameter "
            "group, or a mapping from parameter names to numbers"
        )
    if key == "momentum" and not value.item() > 0:
        raise ConfigError(f"overrides: a learned momentum is {value.item()}; keep it above 0 (a sigmoid does)")


def with_overrides(groups: Sequence[Group], overrides: Overrides, together: Sequence[str] = ()) -> list[Group]:
    """Return the groups of one step; one that gets values by parameter name is split, but for keys in `together`."""
    out = []
    for i, group in enumerate(groups):
        values = {k: v[i] if isinstance(v, list) else v for k, v in overrides.items()}
        by_name = {k: v for k, v in values.items() if isinstance(v, Mapping)}
        split = bool(by_name.keys() - set(together))
        for names in [(name,) for name in group.names] if split else [group.names]:
            own = {**group.hyperparameters, **values}
            for key, given in by_name.items():
                each = {name: given.get(name, group.hyperparameters[key]) for name in names}
                own[key] = each[names[0]] if split else each
            out.append(Group(own, names))
    return out


def in_graph(group: Group, given: Overrides, linear_in_rate: bool) -> Group:
    """Return a group as a differentiable step takes it: what was `given` tracked, and the rates apart."""
    own, rate, rates = dict(group.hyperparameters), group.hyperparameters.get("lr"), None
    if linear_in_rate and isinstance(rate, Mapping):
        rates = rate
    elif linear_in_rate and ((isinstance(rate, Tensor) and rate.requires_grad) or rate == 0):
        rates = dict.fromkeys(group.names, rate)
    if rates is not None:
        own["lr"] = 1.0
    return Group({k: number(v, True) if k in given else v for k, v in own.items()}, group.names, rates)
