"""The same four jobs under every launcher: the bits of runs alone, a score for Optuna, an end when they are told to."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import QUICK, ROOT, process, records, result, run

pytestmark = pytest.mark.slow

OPTIONS = (*QUICK, "output.save_models=false")
JOBS = ("trainer.seed=0,1", "optimizer.lr=0.1,0.2")
FOUR = [("0", "0.1"), ("0", "0.2"), ("1", "0.1"), ("1", "0.2")]


def needs(extra: str) -> Any:
    package = {"optuna": "hydra_optuna_sweeper"}.get(extra, f"hydra_{extra}_launcher")
    there = (
        importlib.util.find_spec("hydra_plugins") is not None
        and importlib.util.find_spec(f"hydra_plugins.{package}") is not None
    )
    return pytest.mark.skipif(not there, reason=f"the extra {extra} is not installed")


JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
LOCAL = ("hydra/launcher=submitit_local",)
LAUNCHERS = [
    pytest.param(JOBLIB, marks=needs("joblib"), id="joblib"),
    pytest.param(LOCAL, marks=needs("submitit"), id="submitit_local"),
    pytest.param(("hydra/launcher=ray",), marks=needs("ray"), id="ray"),
]


def bits(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    lines = [{key: value for key, value in record.items() if key != "seconds"} for record in records(folder)]
    return lines, (folder / "meta_params.safetensors").read_bytes()


def told(folder: Path) -> list[dict[str, Any]]:
    """What the jobs of the last launch say of themselves."""
    return sorted((json.loads(path.read_text()) for path in folder.glob(".jobs/*.json")), key=lambda job: job["job"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for i, (seed, rate) in enumerate(FOUR):
        run(folder / str(i), *OPTIONS, f"trainer.seed={seed}", f"optimizer.lr={rate}")
    return folder


def check(folder: Path, done: subprocess.CompletedProcess[str], alone: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert f"sweep {folder.name}" in done.stdout
    for i in range(4):
        assert bits(folder / str(i)) == bits(alone / str(i))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_four_jobs_give_the_bits_of_runs_alone(launcher, tmp_path, alone):
    check(tmp_path / "sweep", process(tmp_path, "-m", *OPTIONS, *JOBS, "hydra.sweep.dir=sweep", *launcher), alone)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_that_fails_harms_no_other(launcher, tmp_path):
    line = ("-m", *OPTIONS, "optimizer.lr=-1,0.1", "hydra.sweep.dir=sweep", *launcher)
    done = process(tmp_path, *line)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Invalid learning rate: -1" in done.stdout
    assert [job["status"] for job in told(tmp_path / "sweep")] == ["failed", "complete"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_jobs_end_with_their_launcher(launcher, number, tmp_path):
    endless = ("-m", *OPTIONS, "trainer.meta_steps=1000000", "trainer.seed=0,1", "hydra.sweep.dir=sweep", *launcher)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "metaopt", *endless]
    with subprocess.Popen(line, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as launched:
        wait_for(lambda: len(list(tmp_path.glob("sweep/*/metrics.jsonl"))) == 2)
        launched.send_signal(number)
        said = launched.communicate(timeout=120)[0].decode()
    of_ray = number == signal.SIGTERM and "hydra/launcher=ray" in launcher  # Ray takes SIGTERM, and ends as it likes
    assert launched.returncode == 128 + number or (of_ray and launched.returncode != 0), said
    assert "the sweep was interrupted; the same command with hydra.sweep.dir=sweep" in said
    jobs = told(tmp_path / "sweep")
    assert of_ray or [job["status"] for job in jobs] == ["interrupted", "interrupted"]  # Ray kills them
    wait_for(lambda: not any(Path(f"/proc/{job['process']}").exists() for job in jobs))


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@needs("optuna")
def test_optuna_gets_the_scores_and_the_same_search_again_runs_nothing_anew(tmp_path):
    search = ("hparams_search=digits_optuna", "hydra.sweeper.n_trials=4", "hydra.sweep.dir=sweep", *OPTIONS[1:])
    done = process(tmp_path, *search)
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / "sweep" / str(i) for i in range(4)]
    best = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    assert f"best_value: {max(result(folder)['score'] for folder in folders)}" in best
    before = [result(folder) for folder in folders]
    assert process(tmp_path, *search).returncode == 0
    assert [result(folder) for folder in folders] == before
    assert (tmp_path / "sweep" / "optimization_results.yaml").read_text() == best


@needs("optuna")
def test_optuna_goes_on_without_a_trial_that_fails(tmp_path):
    rates = ("++hydra.sweeper.params={optimizer.lr: 'choice(-1, 0.1)'}", "hydra.sweeper.sampler.seed=1")
    search = ("hparams_search=digits_optuna", "hydra.sweeper.n_trials=6", *rates, *OPTIONS[1:])
    done = process(tmp_path, *search, "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert {job["status"] for job in told(tmp_path / "sweep")} == {"failed", "complete"}
    assert len(told(tmp_path / "sweep")) == 6
    assert "best_value: 0." in (tmp_path / "sweep" / "optimization_results.yaml").read_text()


# --- Slurm: one node, started for these tests


@pytest.fixture(scope="module")
def _slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if shutil.which("slurmctld") is None or shutil.which("munged") is None or os.getuid() != 0:
        pytest.skip("needs root, slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    script = str(ROOT / "tools" / "slurm_up.sh")
    subprocess.run([script, str(folder)], check=True, stdout=subprocess.DEVNULL, timeout=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
    subprocess.run([script, str(folder), "down"], check=True, timeout=60)


SLURM = ("hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=1")


@needs("submitit")
@pytest.mark.usefixtures("_slurm")
def test_four_jobs_in_slurm(tmp_path, alone):
    done = process(tmp_path, "-m", *OPTIONS, *JOBS, "hydra.sweep.dir=sweep", *SLURM, "hydra.launcher.timeout_min=5")
    check(tmp_path / "sweep", done, alone)


@pytest.mark.long  # Slurm queues a job anew two minutes after it was cut
@needs("submitit")
@pytest.mark.usefixtures("_slurm")
def test_a_job_that_slurm_cuts_is_queued_again_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(SLOW_DOWN)
    long = ("trainer.meta_steps=60", "trainer.checkpoint_every=1", "hydra.sweep.dir=sweep")
    mine = ("objective=custom", "objective._target_=mine.Slow", "+objective.stage=student")
    limit = ("hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=20", "hydra.launcher.max_num_timeout=5")
    line = ("-m", *OPTIONS, *long, *mine, "trainer.seed=0", *SLURM, *limit)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "metaopt", *line], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = "".join(path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*.out"))
    assert "Requeued job" in said
    assert "going on after meta-step" in said
    assert [record["meta_step"] for record in records(tmp_path / "sweep" / "0")] == list(range(1, 61))
    monkeypatch.syspath_prepend(tmp_path)
    run(tmp_path / "alone", *OPTIONS, *long[:2], *mine, "trainer.seed=0")
    assert bits(tmp_path / "alone") == bits(tmp_path / "sweep" / "0")


SLOW_DOWN = """
import os
import time
import metaopt

class Slow(metaopt.ValidationLoss):
    def __call__(self, trained, batch, meta_params):
        time.sleep(2 if "SLURM_JOB_ID" in os.environ else 0)
        return super().__call__(trained, batch, meta_params)
"""
