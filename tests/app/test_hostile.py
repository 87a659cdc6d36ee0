"""A user's strings are text wherever they appear: no markup, no formula, no control sequence ends a run."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import QUICK, command, result
from hostile import HOSTILE
from rich.console import Console

import metaopt
from metaopt import progress
from metaopt.app import report
from metaopt.diagnostics.check_result import CheckResult, CheckRow
from metaopt.diagnostics.fidelity_result import Cost, Deviation, FidelityResult, FidelityRow
from metaopt.saving.text import printable

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]")
FEW = [f"+data.num_{stream}=40" for stream in ("train", "unlabelled", "validation", "selection", "test")]

MINE = """
import dataclasses
import metaopt
from hostile import HOSTILE


def data(**sizes):
    found = metaopt.digits(batch_size=20, validation_batch_size=20, **sizes)
    batches = [{**batch, "source": batch["index"] % len(HOSTILE)} for batch in found.train]
    return dataclasses.replace(
        found, train=batches, facts={**found.facts, "num_sources": len(HOSTILE)}, source_names=HOSTILE,
        answers=lambda model, batches, count: [(text, text, text) for text in HOSTILE],
    )


class Loss(metaopt.InnerLoss):
    def __call__(self, model, batch, meta_params, upstream):
        raise ValueError("\\n".join(HOSTILE))
"""


@pytest.fixture
def shown() -> Any:
    """A console, and what was written to it, as a terminal without colours would get it."""
    console = Console(file=(out := io.StringIO()), width=6000, force_terminal=True, color_system=None, emoji=True)
    return SimpleNamespace(console=console, text=out.getvalue)


def assert_shown(text: str, *strings: str) -> None:
    assert not CONTROL.search(text)
    for string in strings:
        assert printable(string, 60).removesuffix("…").strip() in text, string


def cost() -> Cost:
    return Cost(1.0, 1.0, 1, 1.0)


def test_tables(shown: Any) -> None:
    rows = [CheckRow(name, name, 1.0, 1.0, 0.0, 0.1, 1e-4, sweep=((0.1, 1.0),)) for name in HOSTILE]
    report.print_check(shown.console, CheckResult(tuple(rows), 1.0, {}), sweep=True)
    named = tuple(FidelityRow(name, name, failure=name) for name in HOSTILE)
    steps = {str(name): 1 for name in HOSTILE[:4]}
    shown.console.print(FidelityResult(named, cost(), "float32", "cpu", steps, 1, 1, HOSTILE).table())
    weights = {name: torch.nn.Parameter(torch.zeros(2)) for name in HOSTILE}
    report.print_learned(shown.console, metaopt.TermWeights(HOSTILE), SimpleNamespace())  # type: ignore[arg-type]
    shown.console.print(report._table_of_tensors(weights))
    report.print_answers(shown.console, {name: [(name, name, name)] for name in HOSTILE})
    report.print_scores(shown.console, {name: dict.fromkeys(HOSTILE, 0.5) for name in HOSTILE}, HOSTILE[0])
    report.say(shown.console, HOSTILE, "red")
    assert_shown(shown.text(), *HOSTILE)


def test_plots(tmp_path: Path) -> None:
    records = [{"meta_step": i, "meta_loss": 1.0, **{f"inner_loss/{name}": 1.0 for name in HOSTILE}} for i in (1, 2)]
    report.plot_meta_loss(records, tmp_path / "losses.png")
    report.plot_scores({name: {HOSTILE[4]: 0.5, HOSTILE[-3]: 0.1} for name in HOSTILE}, tmp_path / "scores.png")
    rows = tuple(
        FidelityRow(name, name, in_float64=(deviation := Deviation(1.0, 0.1)), in_run=deviation, cost=cost())
        for name in HOSTILE
    )
    report.plot_fidelity(FidelityResult(rows, cost(), "float32", "cpu", {}, 1, 1), tmp_path / "fidelity.png")
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_bar(is_terminal: bool) -> None:
    console = Console(file=(out := io.StringIO()), width=300, force_terminal=is_terminal, color_system=None)
    with progress.progress_bar(console, HOSTILE[0], len(HOSTILE)) as advance:
        for name in HOSTILE:
            advance(name)
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", out.getvalue())
    assert_shown(text, HOSTILE[0], HOSTILE[-1])
    assert is_terminal or text.count("\n") == 1


def test_loggers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"meta_step": 1, **{f"inner_loss/{name}": 1.0 for name in HOSTILE}}
    with metaopt.CSVLogger(tmp_path) as logger:
        logger(record)
    metaopt.PrintLogger()(record)
    with (tmp_path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        assert len(next(csv.DictReader(file))) == len(record)
    assert_shown(capsys.readouterr().out, *HOSTILE)


def test_a_run_with_such_sources_and_texts_in_such_a_folder(tmp_path: Path) -> None:
    (tmp_path / "hostile_data.py").write_text(MINE)
    folder = tmp_path / "a [/] $x$ \x1b[31m :smile: \u202e\n é <b>"
    mine = ("data=custom", "data._target_=hostile_data.data", *FEW, "meta_params=source_weights")
    run = (*QUICK, *mine, "output.plots=true", "final.compare=[learned,uniform]", "logger=csv")
    done = command(tmp_path, *run, f"hydra.run.dir='{folder}'")
    assert done.returncode == 0, done.stderr
    assert_shown(done.stdout, "[/INST]", "\\x1b[31m")
    assert result(folder)["status"] == "complete"
    assert (folder / "weights.png").is_file()


def test_an_error_of_the_user_s_own_code(tmp_path: Path) -> None:
    (tmp_path / "hostile_loss.py").write_text(MINE)
    mine = ("loss@stages.teacher.loss=custom", "stages.teacher.loss._target_=hostile_loss.Loss")
    done = command(tmp_path, *QUICK, *mine)
    assert done.returncode == 1
    assert_shown(done.stderr, "[/INST]", "{name} %s")
