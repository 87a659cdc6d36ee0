"""What must hold on any machine: everybody runs, flops and errors stay in bounds; never a time."""

from __future__ import annotations

from contestants import UNIT, Contestant
from figures import WorkResults

ERROR = 1e-10  # in float64, relative
NEAR = 1e-4  # finite differences, in float64
SLACK = 1.01
FLOPS = {  # over plain training, as counted at the sizes of `--small`; they do not depend on the machine
    "mlp": {"higher": 2.276, "unrolled": 2.276, "states": 3.499, "gradients": 3.499, "recompute": 4.166,
            "disk": 3.499, "captured": 3.141, "captured-recompute": 3.927},
    "bert2bert": {"higher": 2.755, "unrolled": 2.755, "states": 4.134, "gradients": 4.134, "recompute": 4.801,
                  "disk": 4.134, "captured": 3.862, "captured-recompute": 4.619},
}  # fmt: skip


def broken(work: WorkResults) -> list[str]:
    """Return a line for everything that does not hold."""
    return [line for c in work.contestants for t in work.rows for line in _broken(work, t, c)]


def _broken(work: WorkResults, t: int, contestant: Contestant) -> list[str]:
    name, where = contestant.name, f"{work.title}, T = {t}, {contestant.label}"
    row = work.rows[t].get(name, {})
    if row.get("unavailable"):
        return []
    if row.get("failed") or not row:
        return [f"{where}: {row.get('failed') or 'was not run'}"]
    wanted = ("flops", "bytes", "time") if name == UNIT else ("flops", "bytes", "time", work.own)
    lines = [f"{where}: no {key}" for key in wanted if row.get(key) is None]
    limit, found = _limit(work, contestant), work.get(t, name, work.own, "relative")
    if limit is not None and found is not None and not found <= limit:
        lines.append(f"{where}: relative error {found:.1e} of A's gradient, must be at most {limit:.0e}")
    flops, most = work.flops(name), FLOPS[work.workload].get(name)
    if most is not None and flops is not None and not flops <= SLACK * most:
        lines.append(f"{where}: {flops:.3f} plain trainings' flops, must be at most {SLACK * most:.3f}")
    return lines


def _limit(work: WorkResults, contestant: Contestant) -> float | None:
    """Return the largest error that a contestant may have; None where it is not ours to say."""
    if contestant.ours:
        return ERROR if contestant.exact else NEAR if contestant.name == "difference" else None
    own_adam = contestant.name == "higher" and work.optimizer == "adam"
    return ERROR if contestant.name in ("higher", "checkpoint") and not own_adam else None
