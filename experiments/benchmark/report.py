"""Tables and plots of what `run.py` has measured.

python experiments/benchmark/report.py                          # RESULTS.md and plots beside results.json
python experiments/benchmark/report.py --page docs/benchmark.md --readme README.md   # also between their markers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contestants import BASELINE, BY_NAME, UNIT, Contestant
from figures import WorkResults, better_elsewhere, goals, not_run, read
from largest import CAPS
from plots import plot

HERE = Path(__file__).resolve().parent
NOT_RUN, UNIT_CELL = "not run", "the unit"
NOBODY = "Nobody, in any figure that was measured.\n"
TIMED = (10, 50)
COMPACT = ("plain", "higher", "torchopt", "checkpoint", "unrolled", "gradients", "recompute", "captured")
TITLES = {"mlp": "MLP pair", "bert2bert": "BERT2BERT"}
MARKS = ("<!-- benchmark -->", "<!-- /benchmark -->")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def number(value: float | None, shape: str = ".2f") -> str:
    """Return a number as text."""
    return NOT_RUN if value is None else format(value, shape)


def error(value: float | None) -> str:
    """Return an error as text."""
    return NOT_RUN if value is None else "0" if value == 0 else f"{value:.0e}"


def exactness(work: WorkResults) -> str:
    """Return the table of errors and flops."""
    own = work.optimizer
    head = ["contestant", f"float64, {own}, T = {work.short}", f"float64, SGD, T = {work.short}"]
    head += [f"float32, T = {work.shown}", f"cosine, T = {work.shown}", "flops over plain"]
    rows = []
    for contestant in work.contestants:
        n = contestant.name
        errors = [work.get(work.short, n, f"float64, {o}", "relative") for o in (own, "sgd")]
        errors.append(work.get(work.shown, n, work.own, "relative"))
        cosine = number(work.get(work.shown, n, work.own, "cosine"), ".4f")
        cells = [UNIT_CELL] * 4 if n == UNIT else [*(error(e) for e in errors), cosine]
        rows.append([contestant.label, *cells, number(work.flops(n))])
    return table(head, rows)


def per_steps(work: WorkResults, measure: Callable[[int, str], float | None], shape: str, *more: Any) -> str:
    """Return a table with a column for each T, and more columns: (head, name → text)."""
    head = ["contestant", *(f"T = {t}" for t in work.steps), *(title for title, _ in more)]
    rows = [
        [c.label, *(number(measure(t, c.name), shape) for t in work.steps), *(text(c.name) for _, text in more)]
        for c in work.contestants
    ]
    return table(head, rows)


def times(work: WorkResults) -> str:
    """Return the table of times."""
    t = work.shown

    def spent(name: str) -> str:
        calls = work.get(t, name, "time", "seconds")
        return f"{number(work.seconds(t, name), '.3g')} ({len(calls)})" if calls else NOT_RUN

    return per_steps(
        work,
        work.time,
        ".2f",
        *((f"over `higher`, T = {s}", lambda n, s=s: number(work.time(s, n, BASELINE))) for s in work.steps),
        (f"seconds, T = {t} (rounds)", spent),
    )


def memory(work: WorkResults) -> str:
    """Return the table of bytes."""
    t = work.shown
    return per_steps(
        work,
        work.peak,
        ".1f",
        (f"MB, T = {t}", lambda n: megabytes(work, n)),
        (f"resident MB, T = {t}", lambda n: megabytes(work, n, "resident")),
        ("slope", lambda n: number(work.slope(n))),
        (f"largest T, {CAPS[work.workload] / 1e6:.0f} MB", lambda n: largest(work, n)),
    )


def largest(work: WorkResults, name: str) -> str:
    """Return the largest T as text."""
    found = work.largest.get(name)
    return (
        NOT_RUN
        if found is None
        else f"≥ {found['steps']:,}"
        if found["steps"] == found["most"]
        else f"{found['steps']:,}"
    )


def machine(sessions: Sequence[dict[str, Any]]) -> str:
    """Return where and when the numbers were measured."""
    lines = []
    for s in sessions:
        place = f"{s['processor']}, {s['cores']} cores, {s['memory_gb']} GB" + (f", {s['gpu']}" if s["gpu"] else "")
        versions = ", ".join(f"{name} {version}" for name, version in s["versions"].items() if version)
        lines.append((place, f"Python {s['python']}, {versions}", s["date"], s["load"]))
    found = []
    for place, versions in dict.fromkeys((place, versions) for place, versions, _, _ in lines):
        dates = [date for p, v, date, _ in lines if (p, v) == (place, versions)]
        loads = [load for p, v, _, load in lines if (p, v) == (place, versions)]
        span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        found.append(f"- {place}; one thread; {versions}; {span}; load at the start {min(loads)} to {max(loads)}")
    return "\n".join(found) + "\n"


def notes(work: WorkResults) -> str:
    """Return what failed, and of each contestant at each T the first warning."""
    lines: dict[str, list[str]] = {}
    for t in work.steps:
        for name, row in work.rows.get(t, {}).items():
            found = [f"failed: {row['failed']}"] if row.get("failed") else row.get("notes") or []
            for note in found[:1]:
                lines.setdefault(f"{BY_NAME[name].label}: {note}", []).append(str(t))
    return "".join(f"- T = {', '.join(steps)}, {line}\n" for line, steps in lines.items())


def section(work: WorkResults, pictures: Sequence[str]) -> str:
    """Return everything about one workload."""
    parts = [f"## {work.title}\n", "Error of A's gradient (relative), and flops:\n", exactness(work)]
    parts += ["Processor time over that of plain training, and over that of `higher`:\n", times(work)]
    parts += ["Most bytes of tensors held at once, over the bytes of one model's weights:\n", memory(work)]
    if not work.small:
        rows = [[g.what, f"≤ {g.must:.3g}", number(g.found, ".3g"), g.reached] for g in goals(work)]
        parts += ["Figures to reach:\n", table(["quantity", "must", "measured", "reached"], rows)]
    parts += ["Where others are better than an exact estimator here, by every figure of these tables:\n", better(work)]
    left_out = not_run(work)
    if left_out:
        parts += ["Not run:\n", "\n".join(f"- {line}" for line in left_out) + "\n"]
    parts += [f"![{name}]({name})\n" for name in pictures]
    if notes(work):
        parts += ["Notes:\n", notes(work)]
    return "\n".join(parts)


def better(work: WorkResults) -> str:
    """Return the table of what others do better than some exact estimator here; "all" if than each of them."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for cell in better_elsewhere(work):
        beaten = "**all**" if cell.all_beaten else ", ".join(BY_NAME[name].label for name in cell.beaten)
        quantity, _, steps = cell.what.rpartition(", T = ")
        figure = f"{cell.theirs} ({cell.best})"
        row = rows.setdefault((cell.who.label + _kind(work, cell.who), quantity or cell.what, beaten), [])
        row.append(f"T = {steps}: {figure}" if quantity else figure)
    head = ["who", "in what", "theirs (the best here)", "better than"]
    return (
        table(head, [[who, what, "; ".join(x), beaten] for (who, what, beaten), x in rows.items()]) if rows else NOBODY
    )


def best_of_all(work: WorkResults) -> str:
    """Return a line for each of the others that is better than every exact estimator here in something."""
    lines: dict[str, list[str]] = {}
    for cell in better_elsewhere(work):
        if cell.all_beaten:
            who = cell.who.label + _kind(work, cell.who)
            lines.setdefault(who, []).append(f"{cell.what}: {cell.theirs} (here {cell.best})")
    return "\n".join(f"- {who}: {'; '.join(cells)}." for who, cells in lines.items()) + "\n" if lines else NOBODY


def _kind(work: WorkResults, who: Contestant) -> str:
    cosine = work.get(work.shown, who.name, work.own, "cosine")
    return "" if cosine is None or cosine > 0.999 else f" (cosine {cosine:.2f})"


EXPLAINED = """\
Two trainings in a row, T steps each; the gradient is that of the student's validation loss with respect to A, the
weights of the teacher's examples. Everybody starts from the same weights, reads the same batches, of which every
inner step has its own, and computes the same losses; no dropout; attention by the kernel that can be differentiated
twice. Errors are against a hand unroll in float64. `higher`'s own Adam adds eps before the bias correction, where
torch adds it after: its error with Adam is that difference, and with SGD there is none. Betty's methods take the
inner trainings as converged: judge them by the cosine. Times are processor time, everybody's in one process and by
turns; a ratio is the median of the rounds' ratios. The slope is that of the peak between the two largest T, per step
and stage, in weights of one model. Resident sizes are the growth of a fresh process; those of captured products
include the capture. The largest T was found by running, in fresh processes that are ended when they have grown by
more than the cap, within a tenth; "≥": the search ended there. Nothing is extrapolated; what was not run is listed
with why.
"""


def summary(sessions: Sequence[dict[str, Any]], works: Sequence[WorkResults]) -> str:
    """Return the section for a page: a table per workload, where others are better, and the machine."""
    return "\n".join([*(short(work) for work in works if not work.small), "Measured on:\n", machine(sessions)])


def short(work: WorkResults) -> str:
    """Return one table of a workload; each column says at which T it was measured."""
    t, few = work.shown, work.short
    head = ["", f"error, float64, SGD, T = {few}", f"cosine, float32, T = {t}", f"flops, T = {few}"]
    head += [
        *(f"time, T = {s}" for s in TIMED),
        f"peak MB, T = {t}",
        f"largest T in {CAPS[work.workload] / 1e6:.0f} MB",
    ]
    rows = []
    for c in work.contestants:
        n = c.name
        own = [error(work.error("float64, sgd", few, n)), number(work.get(t, n, work.own, "cosine"), ".3f")]
        spent = [number(work.time(s, n)) for s in TIMED]
        own = [UNIT_CELL, UNIT_CELL] if n == UNIT else own
        rows.append([c.label, *own, number(work.flops(n)), *spent, megabytes(work, n), largest(work, n)])
    title = f"Two trainings in a row ({work.title}); flops and processor time over those of plain training:\n"
    return "\n".join([title, table(head, rows), "Better than every exact estimator here:\n", best_of_all(work)])


def compact(works: Sequence[WorkResults]) -> str:
    """Return one table of all workloads, for the README: times over plain training, and bytes."""
    works = [work for work in works if not work.small]
    head = ["processor time over plain training"]
    head += [f"{TITLES[work.workload]}, {work.optimizer}, T = {t}" for work in works for t in TIMED]
    head += [f"{TITLES[work.workload]}: MB at T = {work.shown}" for work in works[:1]]
    rows = [
        [BY_NAME[n].label]
        + [number(work.time(t, n)) for work in works for t in TIMED]
        + [megabytes(work, n) for work in works[:1]]
        for n in COMPACT
    ]
    return table(head, rows)


def megabytes(work: WorkResults, name: str, key: str = "bytes") -> str:
    """Return bytes at the T that is shown, in MB."""
    value = work.get(work.shown, name, key)
    return number(None if value is None else value / 1e6, ",.0f" if value is None or value > 1e7 else ",.1f")


def insert(path: Path, text: str) -> None:
    """Put a text between the marker comments of a file."""
    content = path.read_text()
    if any(mark not in content for mark in MARKS):
        raise SystemExit(f"{path} lacks the comments {MARKS[0]} and {MARKS[1]}, between which the table goes")
    before, after = content.split(MARKS[0])[0], content.split(MARKS[1])[1]
    path.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}")


def main() -> None:
    """Write RESULTS.md, the plots, and the sections of pages if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=HERE / "results.json")
    parser.add_argument("--page", type=Path, help="file with marker comments, for a table of each workload")
    parser.add_argument("--readme", type=Path, help="file with marker comments, for one table of few lines")
    options = parser.parse_args()
    sessions, works = read(options.results)
    works = sorted((w for w in works if any(UNIT in rows for rows in w.rows.values())), key=lambda w: w.title)
    if not works:
        raise SystemExit(f"{options.results} has no measurements yet; run experiments/benchmark/run.py")
    parts = ["# Results\n", "Written by `report.py`.\n", EXPLAINED, machine(sessions)]
    for work in works:
        parts.append(section(work, plot(work, options.results.parent)))
    path = options.results.with_name(
        "RESULTS.md" if options.results.stem == "results" else f"{options.results.stem}.md"
    )
    path.write_text("\n".join(parts))
    print(f"written to {path}")
    if options.page:
        insert(options.page, summary(sessions, works))
    if options.readme:
        insert(options.readme, compact(works))


if __name__ == "__main__":
    main()
