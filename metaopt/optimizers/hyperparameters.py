"""What one inner step changes of its optimizer's hyperparameters: scheduled values, and learned ones in the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.optimizers.kinds import Kind

# Hyperparameter → a value for all groups, a list of one per group, or a mapping from parameter names
Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """One parameter group: its hyperparameters and the names of its trained parameters."""

    hyperparameters: dict[str, Any]
    names: tuple[str, ...]


def check_overrides(overrides: Overrides, optimizer: Optimizer, kind: Kind, members: Sequence[Sequence[str]]) -> None:
    """Raise for hyperparameters that an optimizer does not have, and for ones that cannot be learned.

    Args:
        overrides: of one step.
        optimizer, kind: the user's, and what is known of its class.
        members: the names of the trained parameters of each group.
    """
    names, cls = [name for group in members for name in group], type(optimizer).__name__
    known = [k for k in optimizer.param_groups[0] if k != "params"]
    for key, value in overrides.items():
        if key not in known:
            raise ConfigError(f"overrides: {cls} has no hyperparameter {key!r}{did_you_mean(key, known)}")
        if isinstance(value, list) and len(value) != len(members):
            raise ConfigError(
                f"overrides: {key!r} has {len(value)} values for {len(members)} parameter groups; "
                "give one value, or a list of one per group"
            )
        unknown = [name for name in value if name not in names] if isinstance(value, Mapping) else []
        if unknown:
            raise ConfigError(
                f"overrides: {key!r} names {unknown[0]!r}, which is no trained parameter"
                f"{did_you_mean(unknown[0], names)}"
            )
        for learned in _in_graph(value):
            _check_learned(key, learned, kind, cls)


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
        raise ConfigError(
            f"overrides: a learned momentum is {value.item()}, and at 0 torch keeps no momentum buffer; keep it "
            "above 0 (a sigmoid does)"
        )


def _in_graph(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a graph that an override holds."""
    if isinstance(value, Tensor) and value.requires_grad:
        yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for part in parts:
        yield from _in_graph(part)


def with_overrides(groups: list[Group], overrides: Overrides, together: Sequence[str] = ()) -> list[Group]:
    """Return the groups of one step; one that gets values by parameter name is split, but for keys in `together`."""
    out = []
    for i, group in enumerate(groups):
        values = {k: v[i] if isinstance(v, list) else v for k, v in overrides.items()}
        mapped = {k: v for k, v in values.items() if isinstance(v, Mapping)}
        split = any(k not in together for k in mapped)
        for names in [(name,) for name in group.names] if split else [group.names]:
            own = {
                k: {n: v.get(n, group.hyperparameters[k]) for n in names} if not split else v[names[0]]
                for k, v in mapped.items()
                if not split or names[0] in v
            }
            given = {k: v for k, v in values.items() if k not in mapped}
            out.append(Group({**group.hyperparameters, **given, **own}, names))
    return out


def rate_scales(group: Group) -> dict[str, Any] | None:
    """Return by name the rates that scale a step of rate 1: learned ones, and 0, by which torch's own step divides."""
    rate = group.hyperparameters["lr"]
    if isinstance(rate, Mapping):
        return dict(rate)
    learned = isinstance(rate, Tensor) and rate.requires_grad
    return dict.fromkeys(group.names, rate) if learned or rate == 0 else None
