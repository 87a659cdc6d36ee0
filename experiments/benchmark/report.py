"""Tables and plots of what `run.py` has measured.

python experiments/benchmark/report.py                          # RESULTS.md and plots beside results.json
python experiments/benchmark/report.py --readme docs/benchmark.md   # also between that page's markers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contestants import BASELINE, BY_NAME, UNIT
from figures import WorkResults, better_elsewhere, goals, read
from plots import plot

HERE = Path(__file__).resolve().parent
NOT_RUN, UNIT_CELL = "not run", "the unit"
MARKS = ("<!-- benchmark -->", "<!-- /benchmark -->")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def number(value: float | None, shape: str = ".2f") -> str:
    """Return a number as text."""
    return NOT_RUN if value is None else format(value, shape)


def error(value: float | None) -> str:
    return NOT_RUN if value is None else "0" if value == 0 else f"{value:.0e}"


def exactness(work: WorkResults) -> str:
    """Return the table of errors and flops."""
    own = next(o for o in ("momentum", "adam", "sgd") if f", {o}" in work.title)
    head = ["contestant", f"float64, {own}, T = {work.short}", f"float64, SGD, T = {work.short}"]
    head += [f"float32, T = {work.shown}", f"cosine, T = {work.shown}", "flops over plain"]
    rows = []
    for contestant in work.contestants:
        n = contestant.name
        errors = [work.get(work.short, n, f"float64, {o}", "relative") for o in (own, "sgd")]
        errors.append(work.get(work.shown, n, "float32", "relative"))
        cosine = number(work.get(work.shown, n, "float32", "cosine"), ".4f")
        rows.append([contestant.label, *(error(e) for e in errors), cosine, number(work.flops(n))])
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
        calls = work.get(t, name, "seconds")
        return f"{number(work.seconds(t, name))} ({len(calls)})" if calls else NOT_RUN

    return per_steps(
        work,
        work.time,
        ".2f",
        (f"seconds, T = {t} (calls)", spent),
        (f"over `higher`, T = {t}", lambda n: number(work.time(t, n, BASELINE))),
    )


def memory(work: WorkResults) -> str:
    """Return the table of bytes."""
    t = work.shown

    def megabytes(name: str, key: str) -> str:
        value = work.get(t, name, key)
        return number(None if value is None else value / 1e6, ",.0f")

    return per_steps(
        work,
        work.peak,
        ".1f",
        (f"MB, T = {t}", lambda n: megabytes(n, "bytes")),
        (f"resident MB, T = {t}", lambda n: megabytes(n, "resident")),
        ("slope", lambda n: number(work.slope(n))),
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
    """Return what failed, and the warnings."""
    lines = []
    for t in work.steps:
        for name, row in work.rows[t].items():
            lines += [f"- T = {t}, {BY_NAME[name].label}: failed: {row['failed']}"] if row.get("failed") else []
            lines += [f"- T = {t}, {BY_NAME[name].label}: {note}" for note in row.get("notes") or []]
    return "\n".join(lines) + "\n" if lines else ""


def section(work: WorkResults, pictures: Sequence[str]) -> str:
    """Return everything about one workload."""
    parts = [f"## {work.title}\n", "Error of A's gradient (relative), and flops:\n", exactness(work)]
    parts += ["Wall time over that of plain training:\n", times(work)]
    parts += ["Most bytes of tensors held at once, over the bytes of one model's weights:\n", memory(work)]
    if work.title.startswith("bert2bert, adam") and "small" not in work.title:
        rows = [[g.what, f"≤ {g.must:.3g}", number(g.found, ".3g"), g.reached] for g in goals(work)]
        parts += ["Figures to reach:\n", table(["quantity", "must", "measured", "reached"], rows)]
    better = better_elsewhere(work)
    if better:
        parts += ["Where others are better:\n", "\n".join(f"- {line}" for line in better) + "\n"]
    parts += [f"![{name}]({name})\n" for name in pictures]
    if notes(work):
        parts += ["Notes:\n", notes(work)]
    return "\n".join(parts)


EXPLAINED = """\
Two trainings in a row, T steps each; the gradient is that of the student's validation loss with respect to A, the
weights of the teacher's examples. Everybody starts from the same weights, reads the same batches and computes the same
losses; no dropout; attention by the kernel that can be differentiated twice. Errors are against a hand unroll in
float64. `higher`'s own Adam adds eps before the bias correction, where torch adds it after: its error with Adam is that
difference, and with SGD there is none. Betty's methods take the inner trainings as converged: judge them by the
cosine. The slope is that of the peak between the two largest T, per step and stage. Resident sizes are the growth of a
fresh process; those of captured products include the capture. "not run": the contestant was left out of that part of
the measurement (`run.py --only … --measure …`), for time or for memory; nothing is extrapolated.
"""


def summary(sessions: Sequence[dict[str, Any]], works: Sequence[WorkResults]) -> str:
    """Return the section for a page: a table per workload, where others are better, and the machine."""
    return "\n".join(
        [*(short(work) for work in works if "small" not in work.title), "Measured on:\n", machine(sessions)]
    )


def short(work: WorkResults) -> str:
    """Return one table of a workload; each column says at which T it was measured."""
    t, few = work.shown, work.short
    head = ["", f"error, float64, SGD, T = {few}", f"cosine, float32, T = {t}", f"flops, T = {few}"]
    head += [*(f"time, T = {s}" for s in work.steps if s in (10, 50)), f"peak MB, T = {t}"]
    rows = []
    for c in work.contestants:
        n, held = c.name, work.get(t, c.name, "bytes")
        errors = [error(work.get(few, n, "float64, sgd", "relative"))]
        errors.append(number(work.get(t, n, "float32", "cosine"), ".3f"))
        spent = [number(work.time(s, n), ".1f") for s in work.steps if s in (10, 50)]
        megabytes = number(None if held is None else held / 1e6, ",.0f")
        own = [UNIT_CELL, UNIT_CELL] if n == UNIT else errors
        rows.append([c.label, *own, number(work.flops(n)), *spent, megabytes])
    title = f"Two trainings in a row ({work.title}); flops and wall time over those of plain training:\n"
    lines = [title, table(head, rows)]
    better = better_elsewhere(work) or ["nobody, in any cell that was measured."]
    return "\n".join([*lines, "Where others are better:\n", "\n".join(f"- {line}" for line in better) + "\n"])


def insert(path: Path, text: str) -> None:
    """Put a text between the marker comments of a file."""
    content = path.read_text()
    if any(mark not in content for mark in MARKS):
        raise SystemExit(f"{path} lacks the comments {MARKS[0]} and {MARKS[1]}, between which the table goes")
    before, after = content.split(MARKS[0])[0], content.split(MARKS[1])[1]
    path.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}")


def main() -> None:
    """Write RESULTS.md, the plots, and a page's section if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=HERE / "results.json")
    parser.add_argument("--readme", type=Path, help="file with the marker comments to write between")
    options = parser.parse_args()
    sessions, works = read(options.results)
    works = [work for work in works if any(UNIT in rows for rows in work.rows.values())]
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
    if options.readme:
        insert(options.readme, summary(sessions, works))


if __name__ == "__main__":
    main()
