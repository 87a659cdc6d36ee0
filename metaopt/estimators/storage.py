"""Which store an inner loop gets, and where; `auto` chooses from a budget of bytes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.core.contracts import Upstream
from metaopt.core.inner_loop import InnerLoop
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.plain import PlainSteps
from metaopt.estimators.places import PLACES, Place, PlaceName, make_place
from metaopt.estimators.stores import KEPT, Kept, spacing

log = logging.getLogger("metaopt")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass
class Storage:
    """What an estimator was asked to keep of the steps, and where.

    Args:
        store: `states`, `gradients`, `recompute`, or `auto`.
        place: `device`, `host` or `disk`; `auto` chooses it too.
        budget: of `auto`: bytes that the stored steps of a stage may take on the device.
        folder: of `disk`.

    Raises:
        ConfigError: an unknown name, or options that do not go together.
    """

    store: Kept | str = "gradients"
    place: PlaceName = "device"
    budget: int | str | None = None
    folder: str | Path | None = None
    chosen: dict[str, tuple[Kept, PlaceName]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.store != "auto" and self.store not in KEPT:
            raise ConfigError(f"store={self.store!r}{did_you_mean(str(self.store), (*KEPT, 'auto'))}")
        if self.place not in PLACES:
            raise ConfigError(f"place={self.place!r}{did_you_mean(self.place, PLACES)}")
        if (self.store == "auto") != (self.budget is not None):
            raise ConfigError(
                f"store={self.store!r}, budget={self.budget!r}: auto needs a budget and no other store reads one; "
                "write Checkpointed(store='auto', budget='2 GB')"
            )
        if self.store == "auto" and self.place != "device":
            raise ConfigError(f"store='auto' chooses the place too; leave out place={self.place!r}")
        self._bytes = None if self.budget is None else parse_bytes(self.budget)

    def __str__(self) -> str:
        beside = f", budget={self.budget!r}" if self.budget is not None else ""
        return f"store={self.store!r}, place={self.place!r}{beside}"

    def resolve(
        self, loop: InnerLoop, num_steps: int, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> tuple[Kept, Place]:
        """Return what to keep of the `num_steps` steps of this loop, and where."""
        kept, place = self.store, self.place
        if self._bytes is not None:
            kept, place = self._choose(loop, num_steps, meta_params, upstream, self._bytes)
        return kept, make_place(place, loop.device, self.folder)  # type: ignore[return-value]

    def _choose(
        self, loop: InnerLoop, num_steps: int, meta_params: AnyMetaParameters, upstream: Upstream, budget: int
    ) -> tuple[Kept, PlaceName]:
        key = f"{loop.name} ({num_steps} steps)"
        if key not in self.chosen:
            weights, state = _probe(loop, meta_params, upstream)
            options = list(_options(num_steps, weights, state, loop.device.type))
            fits = [option for option in options if option[2] <= budget]
            if not fits:
                raise ConfigError(
                    f"stage {loop.name!r}: budget={self.budget!r} is less than the {min(o[2] for o in options):,} "
                    f"bytes that {num_steps} steps take at least; raise the budget, or take fewer inner steps"
                )
            kept, place, size = fits[0]
            self.chosen[key] = (kept, place)
            log.info(
                "stage %r, %d steps, budget %s: store=%s on %s, %.3g MB on the device",
                loop.name, num_steps, self.budget, kept, place, size / 1e6,
            )  # fmt: skip
        return self.chosen[key]


def _options(num_steps: int, weights: int, state: int, device: str) -> Iterator[tuple[Kept, PlaceName, int]]:
    """Yield what can be kept and where, with its bytes on the device, the quickest first."""
    segment = spacing(num_steps)
    kept_states = -(-num_steps // segment)
    yield "states", "device", num_steps * state
    yield "gradients", "device", num_steps * weights + (kept_states + segment) * state
    if device == "cuda":
        yield "gradients", "host", segment * (state + weights)
    yield "recompute", "device", (kept_states + segment) * state
    if device == "cuda":
        yield "recompute", "host", segment * state
    yield "gradients", "disk", segment * (state + weights)
    yield "recompute", "disk", segment * state


def _probe(loop: InnerLoop, meta_params: AnyMetaParameters, upstream: Upstream) -> tuple[int, int]:
    """Return the bytes of the trained weights, and of weights, optimizer state and buffers, after one step."""
    params = {name: loop.structure.params[name] for name in loop.rule.names}
    plain = {name: model.detach() for name, model in upstream.items()}
    steps = PlainSteps(loop, params, loop.rule.initial_state(), loop.start_buffers(), meta_params, plain)
    steps.update(0, steps.gradient(0)[1])
    weights = num_bytes(steps.weights())
    return weights, weights + num_bytes(steps.state()) + num_bytes(steps.buffers)


def num_bytes(tree: object) -> int:
    """Return the bytes of the tensors in a nested structure."""
    return sum(x.nbytes for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


def parse_bytes(budget: int | str) -> int:
    """Return bytes from a number, or from a text such as `"2 GB"` or `"500 MiB"`."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([kKmMgG]?i?[bB])?\s*", str(budget))
    try:
        size = float(found[1]) * UNITS[(found[2] or "B").upper()] if found else 0.0
    except ValueError:
        size = 0.0
    if size < 1:
        raise ConfigError(f"budget={budget!r} is no number of bytes; write 500000000, '500 MB' or '2 GiB'")
    return int(size)
