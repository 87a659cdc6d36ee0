"""Loggers, by command and in code, and the progress bar."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from commands import DIGITS, QUICK, records, run
from rich.console import Console
from trainers import trainer

import metaopt
from metaopt import progress

MINE = """
import metaopt


class Mine(metaopt.Logger):
    def __call__(self, record):
        with open(self.folder / "mine.txt", "a") as file:
            print(record["meta_step"], file=file)

    def close(self):
        (self.folder / "closed.txt").touch()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_scalars_weights_and_plots(tmp_path: Path) -> None:
    run(tmp_path, *DIGITS, "trainer.check_first_step=false", "final=none", "logger=tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("meta_loss")]
    expected = [(record["meta_step"], record["meta_loss"]) for record in records(tmp_path)]
    assert [step for step, _ in losses] == [step for step, _ in expected]
    assert [value for _, value in losses] == pytest.approx([value for _, value in expected], rel=1e-6)
    tags = events.Tags()
    assert {"inner_loss/teacher", "hypergradient_norm", "final/noise_auc"} <= set(tags["scalars"])
    assert tags["histograms"] == ["weights"]
    assert set(tags["images"]) == {"meta_loss", "weights", "lowest_weights"}


@pytest.mark.parametrize(("option", "module"), [("tensorboard", "torch.utils.tensorboard.writer"), ("wandb", "wandb")])
def test_without_its_package_the_extra_is_named(option, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(metaopt.ConfigError, match=rf"metaopt-chain\[{option}\]"):
        run(tmp_path, *QUICK, f"logger={option}")


class StandIn(SimpleNamespace):
    """What `WandbLogger` uses of the module `wandb`, writing down what it is told."""

    def __init__(self) -> None:
        told: dict[str, Any] = {"log": [], "finished": 0, "summary": {}}
        wandb_run = SimpleNamespace(
            log=lambda values, step=None: told["log"].append((step, values)),
            summary=told["summary"],
            finish=lambda: told.update(finished=told["finished"] + 1),
        )
        super().__init__(told=told, Image=Path, Histogram=len)
        self.init = lambda **options: told.update(init=options) or wandb_run


def test_wandb_is_told_config_numbers_weights_and_plots(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module := StandIn())
    options = ("trainer.check_first_step=false", "final=none", "logger=wandb", "logger.name=mine", "optimizer.lr=0.3")
    run(tmp_path, *DIGITS, *options)
    told = module.told
    assert {key: told["init"][key] for key in ("project", "name", "mode")} == {
        "project": "metaopt",
        "name": "mine",
        "mode": "offline",
    }
    assert told["init"]["config"]["stages"]["student"]["optimizer"]["lr"] == 0.3
    *steps, (_, last) = told["log"]
    assert [(step, values["meta_loss"]) for step, values in steps] == [
        (record["meta_step"], record["meta_loss"]) for record in records(tmp_path)
    ]
    assert last == {**{p.stem: p for p in tmp_path.glob("*.png")}, "weights_histogram": 800}
    assert "noise_auc" in told["summary"]
    assert told["finished"] == 1


def test_a_run_that_fails_closes_its_logger(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module := StandIn())
    with pytest.raises(metaopt.NonFiniteError):
        run(tmp_path, *QUICK, "optimizer.lr=1e38", "limits.num_steps=5", "logger=wandb")
    assert module.told["finished"] == 1


def test_a_logger_of_the_user_s_and_csv_by_command(tmp_path, monkeypatch):
    (tmp_path / "my_loggers.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    run(tmp_path / "a", *QUICK, "logger=custom", "logger._target_=my_loggers.Mine")
    assert (tmp_path / "a" / "mine.txt").read_text().split() == ["1", "2"]
    assert (tmp_path / "a" / "closed.txt").exists()
    run(tmp_path / "b", *QUICK, "logger=csv")
    with (tmp_path / "b" / "metrics.csv").open() as file:
        found = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert found == records(tmp_path / "b")


def test_loggers_are_observers_in_code(tmp_path, capsys):
    with metaopt.CSVLogger(tmp_path / "new") as table, metaopt.PrintLogger(every=2) as lines:
        selection = metaopt.Selection(trainer().validation.peek(1), "student", every=3)
        trainer(selection=selection, observers=[table, lines]).fit(4)
    with (tmp_path / "new" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["meta_step"], bool(row["selection/loss"])) for row in rows] == [
        ("1", False),
        ("2", False),
        ("3", True),
        ("4", True),
    ]
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown] == ["meta-step 2", "meta-step 3", "meta-step 4"]
    assert "meta_loss " in shown[0]


@pytest.mark.parametrize("where", ["terminal", "notebook", "log file", "not asked"])
def test_the_bar_is_shown_in_a_terminal_and_a_notebook_and_nowhere_else(where, monkeypatch):
    file, notebook = io.StringIO(), MagicMock()
    for module in ("IPython", "IPython.display", "ipywidgets"):
        monkeypatch.setitem(sys.modules, module, notebook)
    console = Console(file=file, force_terminal=where in ("terminal", "not asked"), force_jupyter=False, width=100)
    console.is_jupyter = where == "notebook"
    monkeypatch.setattr(progress, "Console", type("Mine", (Console,), {"__new__": lambda cls: console}))
    trainer().fit(2, progress=where != "not asked")
    assert ("2/2" in file.getvalue()) == (where == "terminal")
    assert notebook.display.called == (where == "notebook")
