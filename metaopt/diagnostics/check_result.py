"""What a check of the hypergradient has found: rows, verdicts, and why a difference could not decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from metaopt.core.guards import left_out

Verdict = Literal["agrees", "undecided", "differs"]
MOST_NAMED = 3  # places that a remark names
_COARSE = 1e5 * torch.finfo(torch.float64).eps  # relative noise that float64 alone does not make


@dataclass(frozen=True)
class CheckRow:
    """One direction of one meta-parameter: its slope by the hypergradient and by central differences.

    `uncertainty` is what the difference itself cannot decide: the change between neighbouring steps of its sweep, or
    the rounding of the meta-loss (`rounding`). `jump` is how much the slope changes at a kink that lies right here,
    `sweep` has the difference at each step, and `biased` marks a training whose gradients are estimates by design.
    """

    meta_param: str
    direction: str
    hypergradient: float
    difference: float
    uncertainty: float
    step: float
    tolerance: float
    rounding: float = 0.0
    jump: float = 0.0
    biased: bool = False
    sweep: tuple[tuple[float, float], ...] = ()

    @property
    def scale(self) -> float:
        """The larger of the two slopes."""
        return max(abs(self.hypergradient), abs(self.difference))

    @property
    def gap(self) -> float:
        """How far the two slopes are apart."""
        return abs(self.hypergradient - self.difference)

    @property
    def error(self) -> float:
        """Relative error of the hypergradient against the difference."""
        return self.gap / self.scale if self.scale else 0.0

    @property
    def verdict(self) -> Verdict:
        """`agrees`, `undecided` (the difference cannot tell), or `differs`."""
        allowed = self.tolerance * self.scale
        if self.gap <= allowed and self.uncertainty <= 10 * allowed:
            return "agrees"
        return "undecided" if self.biased or self.gap <= 10 * self.uncertainty + self.jump else "differs"

    @property
    def cause(self) -> Literal["", "noise", "steps", "kink", "biased"]:
        """Why an undecided row is undecided."""
        if self.verdict != "undecided":
            return ""
        if self.gap <= 10 * self.uncertainty:
            return "noise" if self.uncertainty <= 10 * self.rounding else "steps"
        return "kink" if self.gap <= 10 * self.uncertainty + self.jump else "biased"


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check; prints as a table.

    Args:
        rows: one per direction.
        meta_loss: as the hypergradient's own run had it.
        gradient: the hypergradient, by name.
        moved: buffers that training moves: running statistics.
        plain_loss: the meta-loss of the same training without a graph.
        noise: of the meta-loss.
        casts: places that take float64 tensors to a lower precision.
        biases: why some plug-in's gradient is no derivative, as it says itself (`biased_because`).
        in_place: places that update a tensor of the graph behind its back.
        inexact: estimators that approximate.
        keepers: plug-ins whose answer depends on earlier calls.
    """

    rows: tuple[CheckRow, ...]
    meta_loss: float
    gradient: dict[str, Tensor]
    moved: tuple[str, ...] = ()
    plain_loss: float | None = None
    noise: float = 0.0
    casts: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    keepers: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """`differs` if any row does or a plug-in keeps something; `agrees` if a row of each meta-parameter does."""
        if self.keepers or any(row.verdict == "differs" for row in self.rows):
            return "differs"
        shown = {row.meta_param for row in self.rows if row.verdict == "agrees"}
        return "agrees" if shown and shown == {row.meta_param for row in self.rows} else "undecided"

    @property
    def ok(self) -> bool:
        """Whether the verdict is `agrees`."""
        return self.verdict == "agrees"

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        counts = {v: sum(row.verdict == v for row in self.rows) for v in ("agrees", "differs", "undecided")}
        told = ", ".join(f"{n} of {len(self.rows)} directions {_verb(v, n)}" for v, n in counts.items() if n)
        agreed = [row.error for row in self.rows if row.verdict == "agrees"]
        worst = f"; largest relative error where they agree {max(agreed):.1e}" if agreed else ""
        if self.keepers:
            return f"a plug-in keeps something from an earlier call; for what it keeps: {told}{worst}"
        shown = {row.meta_param for row in self.rows if row.verdict == "agrees"}
        wrong = {row.meta_param: None for row in self.rows if row.verdict == "differs"}
        names = wrong or {row.meta_param: None for row in self.rows if row.meta_param not in shown}
        of = f" of {_listed(names)}" if names else ""
        return f"the hypergradient{of} {_HEAD[self.verdict]}: {told}{worst}"

    def __str__(self) -> str:
        head = ("meta-parameter", "direction", "hypergradient", "central difference", "rel. error", "verdict")
        rows = [
            (r.meta_param, r.direction, f"{r.hypergradient:+.8e}", f"{r.difference:+.8e}", f"{r.error:.1e}", r.verdict)
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in [head, *rows]]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, *self.remarks])

    def as_dict(self) -> dict[str, Any]:
        """Return all but the tensors, for a file."""
        rows = [
            {
                "meta_param": row.meta_param,
                "direction": row.direction,
                "verdict": row.verdict,
                "hypergradient": row.hypergradient,
                "central_difference": row.difference,
                "relative_error": row.error,
                "uncertainty": row.uncertainty,
                "step": row.step,
                "sweep": [{"step": step, "central_difference": slope} for step, slope in row.sweep],
            }
            for row in self.rows
        ]
        more = {"meta_loss": self.meta_loss, "noise": self.noise, "casts": self.casts, "remarks": self.remarks}
        return {"verdict": self.verdict, **more, "rows": rows}

    @property
    def remarks(self) -> list[str]:
        """What the table alone does not say: why rows are undecided, and what may be wrong where they differ."""
        found = [f"undecided: {self._why(cause, rows)}" for cause, rows in self._undecided()]
        if self.verdict == "differs":
            found += [f"differs: {why}" for why in self._suspicions()]
        return found

    def _undecided(self) -> Iterator[tuple[str, list[CheckRow]]]:
        for cause in ("noise", "steps", "kink", "biased"):
            rows = [row for row in self.rows if row.cause == cause]
            if rows:
                yield cause, rows

    def _why(self, cause: str, rows: list[CheckRow]) -> str:
        if cause == "biased":
            return (
                f"the gradient is an estimate by design, so a gap shows no mistake, nor that there is none. "
                f"{'; '.join(self.biases)}. To check everything else, choose a variant without it"
            )
        if cause == "kink":
            jump = max(row.jump for row in rows)
            return (
                f"the meta-loss has a kink here: one-sided slopes differ by {jump:.1e}, and the hypergradient may be "
                "either's (a ReLU, abs, max or clamp exactly at its corner). Check where it is smooth: move the "
                "meta-parameters a little, or warm up first"
            )
        uncertain = f"the difference is uncertain by {max(row.uncertainty for row in rows):.1e}"
        slope = f"which is too much beside a slope of {min(row.scale for row in rows):.1e}"
        if self.casts:
            return (
                f"{uncertain}, {slope}: a float32 operation inside the models rounds the meta-loss, at "
                f"{_listed(self.casts)}. all_in_float64=True (check.all_in_float64=true) leaves such casts out"
            )
        if cause == "steps":
            return (
                f"{uncertain}, {slope}: it changes from step to step by more than rounding explains. Either the "
                "meta-loss has a kink or a jump within the steps, or they are too large: try smaller ones "
                "(steps=(1e-5, 1e-6, 1e-7))"
            )
        if self.noise > _COARSE * abs(self.meta_loss):
            return (
                f"{uncertain}, {slope}: the meta-loss is rough, by {self.noise:.1e} at a value of "
                f"{self.meta_loss:.4g}, which is more than rounding in float64. It jumps (round, argmax, a sample), "
                "or training amplifies rounding (Adam with a small eps where a gradient is zero; many steps)"
            )
        return (
            f"{uncertain}, {slope}: the meta-loss is {self.meta_loss:.4g}, rounded at {self.noise:.1e}, and dividing "
            "by the step makes that large. Take larger steps (steps=(1e-1, 1e-2, 1e-3)), or more inner steps, so that "
            "the meta-parameter has more effect"
        )

    def _suspicions(self) -> Iterator[str]:
        if self.keepers:
            yield (
                f"{_listed(self.keepers)} keeps something from an earlier call: a copy that was never called gives "
                "another meta-loss, and a later meta-step trains on what is stale. Compute it anew at every call, from "
                "`model`, `meta_params` and `upstream`"
            )
        elif self._repeats_otherwise:
            yield (
                f"the same training ended at a meta-loss of {self.meta_loss:.10g} with a graph and at "
                f"{self.plain_loss:.10g} without one. A plug-in draws random numbers from a generator of its own, asks "
                "whether gradients are on, or keeps something from an earlier call"
            )
        if self.moved:
            yield f"training moves {left_out(self.moved)}"
        if self.in_place:
            yield (
                f"{_listed(self.in_place)} updates in place, under no_grad, what the graph holds: the training goes on "
                "with the new value, the hypergradient with the old one. Return a new tensor: g * scale"
            )
        elif self.inexact:
            yield (
                f"an approximation by design ({_listed(self.inexact)}): the relative error is its own, as long as an "
                "exact estimator agrees; check with Unrolled() (estimator=unrolled)"
            )
        elif not self.keepers:
            yield (
                "some step of this training is not the one that is differentiated. Look in your losses, transforms, "
                "hand-overs and objective for .detach(), .item(), torch.no_grad() or an in-place update of something "
                "that depends on the meta-parameters (metaopt.explain_hypergradient finds cuts), and for a backward of "
                "your own"
            )

    @property
    def _repeats_otherwise(self) -> bool:
        if self.plain_loss is None:
            return False
        return abs(self.meta_loss - self.plain_loss) > 1e-8 * abs(self.plain_loss) + 10 * self.noise


_HEAD = {
    "agrees": "is right",
    "differs": "is not the derivative of this training",
    "undecided": "is neither shown right nor wrong",
}


def _verb(verdict: str, count: int) -> str:
    if verdict == "undecided":
        return "undecided"
    return verdict if count == 1 else verdict.removesuffix("s")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MOST_NAMED]) + (", …" if len(names) > MOST_NAMED else "")
