"""What a check of the hypergradient has found: rows, verdicts, and why a difference could not decide."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from metaopt.core.guards import left_out
from metaopt.diagnostics.tables import cell, plain, table

Verdict = Literal["agrees", "undecided", "differs"]
_COARSE = 1e5 * torch.finfo(torch.float64).eps  # relative noise that float64 alone does not make

_HEADLINES = {
    "agrees": "is right",
    "differs": "is not the derivative of this training",
    "undecided": "is neither shown right nor wrong",
}
_UNCERTAIN = "the difference is uncertain by {uncertainty:.1e} beside a slope of {slope:.1e}: "
_WHY_UNDECIDED = {
    "biased": "the gradient is an estimate by design, so a gap shows no mistake, nor that there is none. {biases}. To "
    "check everything else, choose a variant without it",
    "kink": "the meta-loss has a kink here (a ReLU, abs, max or clamp at its corner): one-sided slopes differ by "
    "{jump:.1e}, and the hypergradient may be either's. Move the meta-parameters a little, or warm up first",
    "casts": _UNCERTAIN + "a float32 operation inside the models rounds the meta-loss, at {casts}. "
    "all_in_float64=True (check.all_in_float64=true) leaves such casts out",
    "steps": _UNCERTAIN + "it changes from step to step by more than rounding explains. There is a kink or a jump "
    "within the steps, or they are too large: try smaller ones (steps=(1e-5, 1e-6, 1e-7))",
    "rough": _UNCERTAIN + "the meta-loss, {loss:.4g}, is rough by {noise:.1e}, more than rounding in float64. It jumps "
    "(round, argmax, a sample), or training amplifies rounding (Adam with a small eps where a gradient is zero)",
    "noise": _UNCERTAIN + "the meta-loss, {loss:.4g}, is rounded at {noise:.1e}, and dividing by the step makes that "
    "large. Take larger steps (steps=(1e-1, 1e-2, 1e-3)), or more inner steps",
}


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
        return self.gap / (self.scale or 1.0)

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

    def as_dict(self) -> dict[str, Any]:
        """Return the row for a file."""
        return {
            "meta_param": self.meta_param,
            "direction": self.direction,
            "verdict": self.verdict,
            "hypergradient": self.hypergradient,
            "central_difference": self.difference,
            "relative_error": self.error,
            "uncertainty": self.uncertainty,
            "step": self.step,
            "sweep": [{"step": step, "central_difference": slope} for step, slope in self.sweep],
        }


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check; prints as a table."""

    rows: tuple[CheckRow, ...]  # one per direction
    meta_loss: float  # as the hypergradient's own run had it
    gradient: dict[str, Tensor]  # the hypergradient, by name
    moved: tuple[str, ...] = ()  # buffers that training moves: running statistics
    plain_loss: float | None = None  # the meta-loss of the same training without a graph
    noise: float = 0.0  # of the meta-loss
    casts: tuple[str, ...] = ()  # places that take float64 tensors to a lower precision
    biases: tuple[str, ...] = ()  # why some plug-in's gradient is no derivative, as it says (`biased_because`)
    keepers: tuple[str, ...] = ()  # plug-ins whose answer depends on earlier calls
    in_place: tuple[str, ...] = ()  # places that update a tensor of the graph behind its back
    inexact: tuple[str, ...] = ()  # estimators that approximate

    @property
    def verdict(self) -> Verdict:
        """`differs` if any row does or a plug-in keeps something; `agrees` if a row of each meta-parameter does."""
        if self.keepers or self._with("differs"):
            return "differs"
        return "agrees" if self.rows and self._with("agrees") == self._with() else "undecided"

    @property
    def ok(self) -> bool:
        """Whether the verdict is `agrees`."""
        return self.verdict == "agrees"

    def _with(self, *verdicts: Verdict) -> dict[str, None]:
        """Return the meta-parameters that have a row of these verdicts, in order; all if none is given."""
        return dict.fromkeys(row.meta_param for row in self.rows if not verdicts or row.verdict in verdicts)

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        counts = {v: sum(row.verdict == v for row in self.rows) for v in ("agrees", "differs", "undecided")}
        verbs = {v: v if n == 1 else v.removesuffix("s") for v, n in counts.items()}
        told = ", ".join(f"{n} of {len(self.rows)} directions {verbs[v]}" for v, n in counts.items() if n)
        if counts["agrees"]:
            worst = max(row.error for row in self.rows if row.verdict == "agrees")
            told += f"; largest relative error where they agree {worst:.1e}"
        if self.keepers:
            return f"a plug-in keeps something from an earlier call; for what it keeps: {told}"
        names = self._with("differs") or [name for name in self._with() if name not in self._with("agrees")]
        of = f" of {_listed(names)}" if names else ""
        return f"the hypergradient{of} {_HEADLINES[self.verdict]}: {told}"

    def table(self, title: str = "") -> Table:
        """Return the rows, one block per meta-parameter."""
        head = ("direction", "hypergradient", "central difference", "rel. error", "uncertain by", "verdict")

        def cells(row: CheckRow, name: str) -> tuple[str, ...]:
            slopes = f"{row.hypergradient:+.6e}", f"{row.difference:+.6e}"
            return name, row.direction, *slopes, f"{row.error:.1e}", f"{row.uncertainty:.1e}", row.verdict

        blocks = itertools.groupby(self.rows, key=lambda row: row.meta_param)
        shown = ([cells(row, "" if i else name) for i, row in enumerate(rows)] for name, rows in blocks)
        return table(shown, ("meta-parameter", *head), ("meta-parameter", "verdict"), title)

    def sweep_table(self) -> Table:
        """Return how far the hypergradient is from the difference at each step; the step that was taken is marked."""
        steps = [step for step, _ in self.rows[0].sweep]
        made = table([], ("meta-parameter", "direction", *(f"h = {step:.0e}" for step in steps)), ["meta-parameter"])
        for row in self.rows:
            errors = [(h, f"{replace(row, difference=slope).error:.1e}") for h, slope in row.sweep]
            marked = (Text(f"{error} ←", style="bold") if h == row.step else f"{error}  " for h, error in errors)
            made.add_row(cell(row.meta_param), cell(row.direction), *marked)
        return made

    def __str__(self) -> str:
        return "\n".join([plain(self.table()), *self.remarks])

    def as_dict(self) -> dict[str, Any]:
        """Return all but the tensors, for a file."""
        more = {"meta_loss": self.meta_loss, "noise": self.noise, "casts": self.casts, "remarks": self.remarks}
        return {"verdict": self.verdict, **more, "rows": [row.as_dict() for row in self.rows]}

    @property
    def remarks(self) -> list[str]:
        """What the table alone does not say: why rows are undecided, and what may be wrong where they differ."""
        causes = {c: [row for row in self.rows if row.cause == c] for c in ("noise", "steps", "kink", "biased")}
        found = [f"undecided: {self._why(cause, rows)}" for cause, rows in causes.items() if rows]
        return found + [f"differs: {why}" for why in self._suspicions() if self.verdict == "differs"]

    def _why(self, cause: str, rows: list[CheckRow]) -> str:
        if self.casts and cause in ("noise", "steps"):
            cause = "casts"
        elif cause == "noise" and self.noise > _COARSE * abs(self.meta_loss):
            cause = "rough"
        return _WHY_UNDECIDED[cause].format(
            uncertainty=max(row.uncertainty for row in rows),
            slope=min(row.scale for row in rows),
            jump=max(row.jump for row in rows),
            casts=_listed(self.casts),
            biases="; ".join(self.biases),
            noise=self.noise,
            loss=self.meta_loss,
        )

    def _suspicions(self) -> Iterator[str]:
        plain_loss = self.meta_loss if self.plain_loss is None else self.plain_loss
        if self.keepers:
            yield (
                f"{_listed(self.keepers)} keeps something from an earlier call: a copy that was never called gives "
                "another meta-loss. Compute it anew at every call, from `model`, `meta_params` and `upstream`"
            )
        elif abs(self.meta_loss - plain_loss) > 1e-8 * abs(plain_loss) + 10 * self.noise:
            yield (
                f"the same training ended at a meta-loss of {self.meta_loss:.10g} with a graph and {plain_loss:.10g} "
                "without one: a plug-in draws from a generator of its own, or asks whether gradients are on"
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
                "some step of this training is not the one that is differentiated. Look for .detach(), .item(), "
                "torch.no_grad() or updates in place of what depends on the meta-parameters "
                "(metaopt.explain_hypergradient finds cuts), and for a backward of your own"
            )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
