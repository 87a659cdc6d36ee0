"""Whatever is given to the commands: each ends in seconds with one message and a code, or runs rightly."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from children import warm_up
from fuzz import cases
from judge import judged

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.mark.parametrize(
    "part", [pytest.param(0, marks=pytest.mark.slow), *(pytest.param(i, marks=pytest.mark.long) for i in (1, 2))]
)
@pytest.mark.usefixtures("_alone")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_every_case_ends_with_one_message_or_rightly(part: int, tmp_path: Path) -> None:
    every = cases()
    assert len(every) >= 300
    assert len({case.name for case in every}) == len(every)
    failed: list[str] = []
    seconds = 0.0
    with warm_up(tmp_path):
        for number, case in enumerate(every[part::3]):
            folder = tmp_path / str(number)
            folder.mkdir()
            problem, ended = judged(case, folder)
            seconds += ended.seconds
            if problem:
                said = f"code {ended.code}: {' '.join(case.arguments)}\n{ended.err[-600:]}"
                failed.append(f"{case.name}: {problem}; {said}")
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(every[part::3])} cases, {len(failed)} failed, {seconds:.0f} s of processor time")
    assert not failed, "\n\n".join(failed)
