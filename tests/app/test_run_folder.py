"""A run's folder holds one run and says how it stands, whatever happens to the process or after the learning."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUICK, command, records, result, run
from safetensors.torch import load_file

from metaopt.app import report
from metaopt.app import run as app_run
from metaopt.app.folder import RunFolder
from metaopt.app.interrupts import Interrupted
from metaopt.app.resume import go_on
from metaopt.base.errors import ConfigError

TESTED = ("experiment=digits", "debug=tiny", "trainer.check_first_step=false", "trainer.checkpoint_every=1")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def bits(folder: Path) -> Any:
    """All that a run leaves, but for times and what is of the process."""
    kept = ("status", "metrics", "score", "best", "test", "answers", "doubts")
    found: dict[str, Any] = {
        name: data for name, data in contents(folder).items() if not name.startswith("checkpoints")
    }
    for name in ("result.json", "metrics.jsonl"):
        found.pop(name)
    lines = [{k: v for k, v in record.items() if k != "seconds"} for record in records(folder)]
    return found, lines, {key: result(folder).get(key) for key in kept}


# --- one run in a folder


def test_a_result_says_who_runs_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(app_run.Run, "warm_up", lambda self: seen.append(result(tmp_path)))
    run(tmp_path, *QUICK)
    assert seen[0]["status"] == "running"
    assert seen[0]["process"] == os.getpid()
    assert {"host", "started", "command", "directory", "config_digest", "overrides", "versions"} <= set(seen[0])
    found = result(tmp_path)
    assert found["status"] == "complete"
    assert found["best"]["meta_step"] in (1, 2)
    assert found["score"] == found["best"]["score"]
    assert stat.S_IMODE((tmp_path / "meta_params.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "metrics.jsonl").stat().st_mode
    )


def test_a_folder_with_a_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    run(tmp_path, *QUICK)
    before = contents(tmp_path)
    for overrides in (QUICK, (*QUICK, "trainer.seed=1"), ("debug=tiny",)):
        with pytest.raises(ConfigError, match=r"holds a run \(complete\); go on with it: .*resume=.*overwrite=true"):
            run(tmp_path, *overrides)
    assert contents(tmp_path) == before


def test_overwriting_begins_when_all_is_built(tmp_path: Path) -> None:
    run(tmp_path, *TESTED, "output.plots=false")
    before = contents(tmp_path)
    with pytest.raises(ConfigError):
        run(tmp_path, *QUICK, "overwrite=true", "optimizer.lr=-1")
    assert contents(tmp_path) == before
    run(tmp_path, *QUICK, "overwrite=true", "output.save_models=false", "trainer.seed=1")
    assert result(tmp_path)["seed"] == 1
    assert not (tmp_path / "models").exists()
    run(tmp_path / "alone", *QUICK, "output.save_models=false", "trainer.seed=1")
    assert contents(tmp_path).keys() - contents(tmp_path / "alone").keys() == {
        f"alone/{name}" for name in contents(tmp_path / "alone")
    } | {name for name in contents(tmp_path) if name.startswith("checkpoints")}


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"status": "running", "process": 7, "host": "there"}))
    (tmp_path / "config.yaml").write_text("chain: []")
    held = RunFolder(tmp_path)
    held.claim(may_hold=True)
    before = contents(tmp_path)
    for more in ((), ("resume=auto",), ("overwrite=true",)):
        with pytest.raises(ConfigError, match=r"is in use by another run \(process 7 on there\)"):
            run(tmp_path, *QUICK, *more)
    assert contents(tmp_path) == before
    held.release()
    with pytest.raises(ConfigError, match=r"holds a run \(running\)"):
        run(tmp_path, *QUICK)


def test_another_experiment_does_not_go_on_in_the_folder(tmp_path: Path) -> None:
    run(tmp_path, *QUICK)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)is of another training; .*optimizer\.lr: .* there, 0\.5 here"):
        run(tmp_path, *QUICK, "resume=auto", "optimizer.lr=0.5")
    assert contents(tmp_path) == before


def test_a_result_is_strict_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(may_hold=False)
    folder.open({})
    folder.tell(metrics={"loss": float("nan"), "accuracy": 0.5})
    found = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert found["metrics"] == {"loss": None, "accuracy": 0.5}
    assert found["not_finite"] == ["metrics.loss"]
    folder.tell(metrics={"loss": 1.0})
    assert "not_finite" not in result(tmp_path)
    folder.release()


# --- what fails after learning


def failing(*args: Any, **options: Any) -> Any:
    raise ValueError("nobody expected this")


@pytest.mark.parametrize(
    ("place", "name"),
    [("the plots", "plot_meta_loss"), ("the report", "print_scores"), ("saving the models", "save_models")],
)
def test_what_fails_after_learning_is_told_and_the_rest_goes_on(place, name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(app_run if name == "save_models" else report, name, failing)
    with pytest.raises(app_run.LateError, match=f"{place}: ValueError: nobody expected this") as caught:
        run(tmp_path, *TESTED)
    found = result(tmp_path)
    assert found["status"] == "complete_with_errors"
    assert found["errors"] == [f"{place}: ValueError: nobody expected this"]
    assert caught.value.score == found["score"]
    assert set(found["test"]) == {"learned", "uniform"}
    assert load_file(tmp_path / "meta_params.safetensors")
    assert f"{place}: ValueError: nobody expected this; the run goes on" in capsys.readouterr().out


def test_a_test_that_fails_loses_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_run.Run, "_test", failing)
    with pytest.raises(app_run.LateError, match=r"the test of learned weights: .*\n.*the test of uniform weights"):
        run(tmp_path, *TESTED)
    assert (tmp_path / "weights.png").exists()


def test_a_result_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    original = app_run.Run.learn

    def learn(self: Any) -> None:
        monkeypatch.setattr("metaopt.app.folder.write_text", full)
        original(self)

    monkeypatch.setattr(app_run.Run, "learn", learn)
    with pytest.raises(app_run.LateError, match=r"result\.json: could not be written: .*No space left"):
        run(tmp_path, *TESTED)
    assert load_file(tmp_path / "meta_params.safetensors")
    assert (tmp_path / "comparison.png").exists()


def test_a_logger_that_fails_stops_nothing(tmp_path: Path) -> None:
    mine = ("logger=custom", "logger._target_=loggers_that_fail.Failing")
    with pytest.raises(app_run.LateError, match="the logger: RuntimeError: the network is gone"):
        run(tmp_path, *QUICK, *mine)
    assert len(records(tmp_path)) == 2
    assert result(tmp_path)["errors"] == ["the logger: RuntimeError: the network is gone"]


def test_the_exit_code_of_a_run_with_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "print_scores", failing)
    done = command(tmp_path, *QUICK, "hydra.run.dir=out")
    assert done.returncode == 1
    assert "what was learned is in" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_learned_is_there_before_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the process is killed after the last record, A is on disk, bitwise."""
    run(tmp_path / "whole", *QUICK)
    seen: list[bytes] = []
    original = app_run.Run._log

    def killed(self: Any, record: Any) -> None:
        original(self, record)
        if record["meta_step"] == 2:
            seen.append((tmp_path / "cut" / "meta_params.safetensors").read_bytes())
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(app_run.Run, "_log", killed)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", *QUICK)
    assert seen == [(tmp_path / "whole" / "meta_params.safetensors").read_bytes()]


# --- signals


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR2", 140)])
def test_a_signal_ends_a_run_in_one_line(name, code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2")
    first = {n: signal.signal(getattr(signal, n), signal.SIG_DFL) for n in names}  # under nohup some are ignored
    monkeypatch.setattr(app_run.Run, "_log", lambda *_: os.kill(os.getpid(), getattr(signal, name)))
    try:
        done = command(tmp_path, *QUICK, "hydra.run.dir=out")
        assert [signal.getsignal(getattr(signal, n)) for n in names] == [signal.SIG_DFL] * 4
    finally:
        for n in names:
            signal.signal(getattr(signal, n), first[n])
    assert done.returncode == code
    said = f"{name}: the run was interrupted after meta-step 1 of 2; go on: metaopt resume={tmp_path / 'out'}"
    assert done.stderr.strip() == said
    assert result(tmp_path / "out")["status"] == "interrupted"


def test_a_scheduler_s_own_handler_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    monkeypatch.setattr(app_run.Run, "_log", lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
    try:
        run(tmp_path, *QUICK)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [signal.SIGUSR2] * 2


def test_a_job_that_is_queued_again_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So submitit leaves a process, once the job is queued again."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(app_run.Run, "learn", lambda _: sys.exit(-1))
    with pytest.raises(SystemExit):
        run(tmp_path, *QUICK)
    assert result(tmp_path)["status"] == "interrupted"


# --- go on


def stop_at(monkeypatch: pytest.MonkeyPatch, place: str, nth: int = 1) -> None:
    """Let the process be ended when it comes to a method of the run for the nth time."""
    calls, original = [0], getattr(app_run.Run, place)

    def method(self: Any, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(app_run.Run, place, method)


def test_a_run_that_ended_before_it_began_is_begun_anew(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run(tmp_path, *QUICK, "optimizer.lr=-1")
    assert result(tmp_path)["status"] == "failed"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "of_another").touch()
    run(tmp_path, *QUICK, "resume=auto", "output.save_models=false")
    assert result(tmp_path)["status"] == "complete"
    assert not (tmp_path / "models").exists()


def test_what_is_the_user_s_own_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "result.json").write_text("of another program")
    with pytest.raises(ConfigError, match="holds a run"):
        run(tmp_path / "theirs", *QUICK)
    (tmp_path / "models").mkdir()
    (tmp_path / "mine.png").touch()
    run(tmp_path, *QUICK, "output.save_models=false")
    assert (tmp_path / "models").exists()
    run(tmp_path, *QUICK, "overwrite=true")
    assert (tmp_path / "mine.png").exists()


@pytest.mark.parametrize(
    ("place", "nth"),
    [
        ("build", 1),
        ("warm_up", 1),
        ("learn", 1),
        ("observe", 2),
        ("observe", 4),
        ("compare", 1),
        ("_test", 2),
        ("save", 1),
    ],
)
def test_a_run_goes_on_from_wherever_it_was_stopped(place, nth, tmp_path: Path, monkeypatch, capsys) -> None:
    options = (*TESTED, "trainer.meta_steps=4", "trainer.select_every=2", "stages.teacher.warmup_steps=2")
    options = (
        *options,
        "stages.student.carry=3",
        "stages.student.loss.temperature=2",
        "logger=csv",
        "final.save_models=true",
    )
    run(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        stop_at(patch, place, nth)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", *options)
    assert result(tmp_path / "cut")["status"] == "interrupted"
    run(tmp_path / "cut", *options, "resume=auto")
    one, other = bits(tmp_path / "cut"), bits(tmp_path / "whole")
    for found, _, _ in (one, other):  # its rows have times
        assert found.pop("metrics.csv").count(b"\n") == 5
    assert one == other
    capsys.readouterr()
    before = contents(tmp_path / "cut")
    score = run(tmp_path / "cut", *options, "resume=auto")
    assert score == result(tmp_path / "whole")["score"]
    assert "complete already" in capsys.readouterr().out
    assert contents(tmp_path / "cut") == before


def test_resume_takes_the_folder_s_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", *QUICK, "trainer.seed=3")
    with monkeypatch.context() as patch:
        stop_at(patch, "observe", 2)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", *QUICK, "trainer.seed=3", "trainer.checkpoint_every=1")
    done = command(tmp_path, "resume=cut")
    assert done.returncode == 0, done.stderr
    assert "going on after meta-step 1" in done.stdout
    assert bits(tmp_path / "cut")[1:] == bits(tmp_path / "whole")[1:]
    longer = command(tmp_path, "resume=cut", "trainer.meta_steps=3")
    assert longer.returncode == 1
    assert "trainer.meta_steps: 2 there, 3 here" in longer.stderr
    assert (
        go_on(str(tmp_path / "cut"), ["trainer.meta_steps=3", "resume_force=true"]) == result(tmp_path / "cut")["score"]
    )
    assert [record["meta_step"] for record in records(tmp_path / "cut")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["resume=nowhere"], "nowhere/config.yaml cannot be read"),
        (["resume=cut", "optimizer@stages.student.optimizer=sgd"], "there is no optimizer@stages"),
        (["resume=cut", "trainer.meta_step=3"], "did you mean 'meta_steps'"),
    ],
)
def test_what_resume_cannot_take_is_said(options, said, tmp_path: Path) -> None:
    run(tmp_path / "cut", *QUICK)
    done = command(tmp_path, *options)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_other_optimizers_are_refused_unless_insisted_on(tmp_path: Path) -> None:
    run(tmp_path, *QUICK, "trainer.checkpoint_every=1")
    more = (*QUICK, "resume=auto", "trainer.meta_steps=3", "meta_optimizer=sgd")
    with pytest.raises(ConfigError, match=r"meta_optimizer\._target_: torch\.optim\.Adam there"):
        run(tmp_path, *more)
    run(tmp_path, *more, "resume_force=true")
    assert len(records(tmp_path)) == 3
    assert torch.get_num_threads() == 1
