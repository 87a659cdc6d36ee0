"""Whether a command ended as it should: rightly, or with one message and nothing half-written."""

from __future__ import annotations

import json
import re
from pathlib import Path

from children import Ended, forked
from fuzz import Case

SECONDS = 8.0  # of processor time
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]")
LONGEST, MOST_LINES = 5000, 40  # of a message


def judged(case: Case, folder: Path) -> tuple[str, Ended]:
    """Run a case in a folder of its own; return what is wrong with its end, or nothing."""
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    ended = forked(folder, list(case.arguments), SECONDS, case.program)
    return "; ".join(_problems(case, ended, folder)), ended


def _problems(case: Case, ended: Ended, folder: Path) -> list[str]:
    found = []
    said = ended.out + ended.err
    if ended.code < 0:
        return [f"out of time, or killed by signal {-ended.code}"]
    if "Traceback (most recent call last)" in said:
        found.append("a traceback")
    if CONTROL.search(said):
        found.append("control characters")
    if ended.code and not ended.err.strip():
        found.append("no message")
    if ended.code and (len(ended.err) > LONGEST or ended.err.count("\n") > MOST_LINES):
        found.append("a message that nobody reads")
    if not ended.code and case.must_fail:
        found.append("silent")
    if ended.code and case.must_fail is False:
        found.append("refused")
    if list(folder.rglob("*.part")) or (folder / "planted").exists():
        found.append("half-written")
    results = [path for name in ("result", "check", "fidelity") for path in folder.rglob(f"{name}.json")]
    for path in (path for path in results if path.parent.name != "old"):
        try:
            status = json.loads(path.read_text())["status"]
        except (ValueError, KeyError):
            found.append("a broken result")
        else:
            well = (0, 2, 3) if case.program == "metaopt-check" else (0,)
            if (status == "complete") != (ended.code in well):
                found.append(f"exit code {ended.code}, and status {status}")
    return found
