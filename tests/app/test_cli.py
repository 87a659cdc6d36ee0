"""The command: what a run leaves behind, plug-ins from the user's folder, sweeps, and how it says no."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DIGITS, FEW_DATES, QUICK, ROOT, command, files, process, records, result, run
from safetensors.torch import load_file

from metaopt.base.errors import ConfigError, MissingPathError, NonFiniteError

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
META_PARAMS = ("meta_params.safetensors", "meta_params_last.safetensors")  # the best by selection, and the last


# --- one run ----------------------------------------------------------------------------------------------------


def test_shell_completion_does_not_import_torch() -> None:
    code = "import sys, metaopt.app.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_help_prints_every_chosen_file_with_its_comments(tmp_path: Path) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("# My own model.\n_target_: mine.Model\n")
    for option, comment in {"gpt2": "LoRA adapters alone", "mine": "# My own model."}.items():
        done = command(tmp_path, "--config-dir", "conf", "--help", f"model={option}", "product=finite_difference")
        assert done.returncode == 0, done.stderr
        assert all(words in done.stdout for words in (comment, "select_every: 10 ", "relative step; null"))
        assert re.search(r"^model: .*\bgpt2, .*\bmine\b", done.stdout, re.MULTILINE)
        assert done.stdout.count("\nnum_steps: 5 ") == 2, (
            "an option of a shared piece that a stage sets stands there once"
        )
        assert not re.search(r"_parts: |@_here_|\$\$|shared,", done.stdout)


def test_a_reader_of_the_help_that_has_seen_enough_gets_no_traceback() -> None:
    line = [sys.executable, "-m", "metaopt", "--help"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, said = process.communicate(timeout=100)
    assert said == ""


def test_the_experiments_are_found() -> None:
    assert "digits" in EXPERIMENTS


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:stage 'student' read decoder_inputs_embeds")  # the thread's own objective
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(FEW_DATES, marks=pytest.mark.slow, id="the default, on few dates"),
        *(
            pytest.param((f"experiment={name}",), marks=[pytest.mark.slow] if "forum" in name else [])
            for name in EXPERIMENTS
        ),
    ],
    ids=str,
)
def test_every_experiment_runs_for_two_meta_steps(overrides: Sequence[str], tmp_path: Path) -> None:
    run(tmp_path, *overrides, "debug=tiny")
    assert [record["meta_step"] for record in records(tmp_path)] == [1, 2]
    assert result(tmp_path)["status"] == "complete"


def test_what_a_run_leaves_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = run(tmp_path, *DIGITS)
    found = files(tmp_path)
    models = {f"models/{stage}/model.safetensors" for stage in ("teacher", "student")}
    plots = {"meta_loss.png", "weights.png", "lowest_weights.png", "comparison.png"}
    assert found == {"config.yaml", "metrics.jsonl", "result.json", *META_PARAMS, *models, *plots}
    for path in plots:
        assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")
    written = result(tmp_path)
    assert {"meta_loss", "accuracy", "noise_auc"} <= set(written["metrics"])
    assert written["seed"] == 0
    assert written["versions"]["python"]
    assert set(written["test"]) == {"learned", "uniform"}
    assert 0 <= score <= 1
    shown = capsys.readouterr().out
    assert "hypergradient of the first meta-step" in shown
    assert "learned example weights" in shown
    assert "fresh models" in shown
    assert "num_features: 64" in (tmp_path / "config.yaml").read_text()


def test_parts_can_be_switched_off(tmp_path: Path) -> None:
    run(tmp_path, *QUICK, "output.save_models=false")
    found = files(tmp_path)
    assert found == {"config.yaml", "metrics.jsonl", "result.json", *META_PARAMS}
    assert "accuracy" in result(tmp_path)["metrics"]


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    def lines(name: str, seed: int) -> list[dict[str, Any]]:
        run(tmp_path / name, *QUICK, f"trainer.seed={seed}", "limits.num_steps=3")
        return [{key: v for key, v in record.items() if key != "seconds"} for record in records(tmp_path / name)]

    first = lines("a", 0)
    assert lines("b", 0) == first
    assert lines("c", 1) != first


def test_the_check_of_the_first_step_changes_nothing(tmp_path: Path) -> None:
    losses = []
    for check in ("true", "false"):
        run(tmp_path / check, *QUICK, f"trainer.check_first_step={check}")
        losses.append([record["meta_loss"] for record in records(tmp_path / check)])
    assert losses[0] == losses[1]


def test_a_model_that_cannot_be_checked_is_trained_nonetheless(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("+model.num_features=${facts.num_features}", "+model.num_labels=${facts.num_labels}")
    mine = ("model=custom", "model._target_=small_models.SinglePrecision", *sizes)
    run(tmp_path, *QUICK, "trainer.check_first_step=true", *mine)
    assert "could not be checked, on a float64 copy: expected a Float32 matrix" in capsys.readouterr().out
    assert result(tmp_path)["status"] == "complete"


def test_uniform_takes_the_inner_steps_and_no_meta_step(tmp_path: Path) -> None:
    run(tmp_path, *QUICK, "meta_params=uniform")
    assert all("hypergradient_norm" not in record for record in records(tmp_path))
    assert load_file(tmp_path / "meta_params.safetensors") == {}


def test_float64(tmp_path: Path) -> None:
    run(tmp_path, *QUICK, "trainer.dtype=float64")
    weights = load_file(tmp_path / "models" / "student" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float64"}


@pytest.mark.parametrize(
    ("given", "used"), [((), 1), (("trainer.num_threads=3",), 3), (("trainer.num_threads=null",), 2)]
)
def test_the_number_of_threads_is_the_config_s_and_is_put_back(given, used, tmp_path: Path) -> None:
    torch.set_num_threads(2)  # as torch itself would on a machine of two cores
    try:
        run(tmp_path, *QUICK, *given)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert result(tmp_path)["num_threads"] == used


def test_no_meta_step_at_all(tmp_path: Path) -> None:
    run(tmp_path, *QUICK, "trainer.meta_steps=0", "stages.teacher.warmup_steps=1")
    assert records(tmp_path) == []
    assert result(tmp_path)["status"] == "complete"


def test_carry_reaches_the_trainer(tmp_path: Path) -> None:
    def meta_losses(carry: str) -> list[float]:
        run(tmp_path / carry, *QUICK, f"stages.student.carry={carry}", f"stages.teacher.carry={carry}")
        return [record["meta_loss"] for record in records(tmp_path / carry)]

    always, never = meta_losses("always"), meta_losses("never")
    assert always[0] == never[0]
    assert always[1] != never[1]


# --- stops and refusals -----------------------------------------------------------------------------------------


def test_a_missing_path_stops_the_run_before_anything_moves(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="logits"):
        run(tmp_path, *QUICK, "stages.teacher.loss._target_=metaopt.CrossEntropy")
    assert records(tmp_path) == []
    assert result(tmp_path)["status"] == "failed"
    assert "logits" in result(tmp_path)["error"]


def test_a_non_finite_meta_loss_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        run(tmp_path, *QUICK, "optimizer.lr=1e38", "limits.num_steps=5")
    assert result(tmp_path)["status"] == "failed"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=-1"], "stages.teacher.optimizer: ValueError"),
        (["data.noise=1.5"], "data: "),
        (["trainer.device=gpu"], "trainer.device = 'gpu' cannot be used here"),
        (["handover=hard_labels"], "argmax"),
        (["objective.stage=studnet"], "did you mean 'student'?"),
        (["stages.student.loss.upstream=techer"], "did you mean 'teacher'?"),
        (["stages.student.loss.upstream=student"], "stage 'student', which does not come before it"),
        (["objective=custom", "objective._target_=metaopt.MetaObjective"], "objective: TypeError"),
        (["chain=[student]", "~stage@stages.teacher"], "this is the first of chain"),
        (["meta_params.parametrisation=soft"], "no parametrisation 'soft'"),
    ],
)
def test_refusals_while_building(overrides: Sequence[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, *QUICK, *overrides)
    assert message in str(caught.value)
    assert records(tmp_path) == []


FEW = [f"data.num_{stream}=64" for stream in ("train", "unlabelled", "validation", "selection", "test")]


def test_a_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage 'teacher': .*vocab_size is 30, and the data need"):
        run(tmp_path, *FEW, "debug=tiny", "model.vocab_size=30")


def test_a_pretrained_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.teacher\.model: .*cannot load encoder='nowhere'"):
        run(tmp_path, *FEW, "debug=tiny", "model=pretrained_bert2bert", "model.encoder=nowhere")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        pytest.param(  # in a process of its own
            ["stages.student.num_steps=0", "trainer.meta_steps=x"],
            ["2 problems", "at least 1", "a whole number"],
            marks=pytest.mark.slow,
        ),
        (["optimiser=sgd"], ["did you mean 'optimizer'?"]),
        (["optimizer=sgdd"], ["Could not find 'optimizer/sgdd'", "    adamw\n"]),
        (["logger=cvs"], ["logger/cvs: there is no such option (did you mean 'csv'?)"]),
        (["trainer.meta_step=3"], ["did you mean 'meta_steps'?"]),
    ],
)
def test_a_refusal_is_a_message_without_a_traceback(
    arguments: Sequence[str], messages: Sequence[str], tmp_path: Path
) -> None:
    done = (process if len(arguments) > 1 else command)(tmp_path, *arguments)
    assert done.returncode == 1
    assert all(message in done.stderr for message in messages)
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))


# --- the user's own folder --------------------------------------------------------------------------------------

PLUG_INS = """
import torch
from torch import nn
import metaopt


class Mine(metaopt.MetaObjective):
    def __init__(self, alpha: float = 1.0):
        self.alpha = alpha

    def __call__(self, trained, batch, meta_params):
        print("alpha is", self.alpha)
        logits = trained["student"](inputs=batch["inputs"])
        return self.alpha * nn.functional.cross_entropy(logits, batch["labels"])


class Loss(metaopt.InnerLoss):
    def __call__(self, model, batch, meta_params, upstream):
        losses = nn.functional.cross_entropy(model(inputs=batch["inputs"]), batch["labels"], reduction="none")
        return (meta_params(batch) * losses).mean()


def data(size: int = 8) -> metaopt.DataBundle:
    index = torch.arange(size)
    batch = {"inputs": torch.randn(size, 3), "labels": index % 2, "index": index}
    streams = dict.fromkeys(("train", "unlabelled", "validation", "selection", "test"), [batch])
    facts = {"num_features": 3, "num_labels": 2, "num_examples": size, "width": 5}
    return metaopt.DataBundle(**streams, sizes=dict.fromkeys(streams, size), facts=facts)


class Net(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, inputs):
        return self.layers(inputs)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_plug_ins.py").write_text(PLUG_INS)
    return tmp_path


def test_a_plug_in_objective_from_the_current_folder(folder: Path) -> None:
    done = command(folder, *QUICK, "objective=custom", "objective._target_=my_plug_ins.Mine")
    assert done.returncode == 0, done.stderr
    assert "alpha is 1.0" in done.stdout


def test_the_user_s_own_config_folder(folder: Path) -> None:
    (folder / "conf" / "objective").mkdir(parents=True)
    (folder / "conf" / "objective" / "mine.yaml").write_text("_target_: my_plug_ins.Mine\nalpha: 0.5\n")
    done = command(folder, "--config-dir", "conf", *QUICK, "objective=mine", "objective.alpha=0.25")
    assert done.returncode == 0, done.stderr
    assert "alpha is 0.25" in done.stdout


def test_the_user_s_own_data_model_and_loss(folder: Path) -> None:
    done = command(
        folder,
        *QUICK,
        "data=custom",
        "data._target_=my_plug_ins.data",
        "+data.size=6",
        "model=custom",
        "model._target_=my_plug_ins.Net",
        "+model.width=${facts.width}",
        "loss=custom",
        "loss._target_=my_plug_ins.Loss",
        "hydra.run.dir=out",
    )
    assert done.returncode == 0, done.stderr
    assert load_file(folder / "out" / "meta_params.safetensors")["logits"].shape == (6,)
    assert load_file(folder / "out" / "models" / "student" / "model.safetensors")["layers.0.weight"].shape == (5, 3)


THREE = """
# @package _global_
defaults:
  - /stage@stages.assistant: distilled
  - _self_
chain: [teacher, assistant, student]
"""

TWO = """
first: {_target_: metaopt.ExampleWeights, num_examples: "${facts.num_examples}"}
second: {_target_: metaopt.ExampleWeights, num_examples: "${facts.num_examples}"}
"""


def run_from(conf: Path, folder: Path, *overrides: str) -> None:
    """A run in this process that finds the user's options too."""
    run(folder, *QUICK, f"hydra.searchpath=[file://{conf}]", *overrides)


def test_a_stage_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "conf" / "debug").mkdir(parents=True)
    tiny = (ROOT / "conf" / "debug" / "tiny.yaml").read_text().removeprefix("# @package _global_")
    (tmp_path / "conf" / "debug" / "three.yaml").write_text(THREE + tiny)
    run_from(tmp_path / "conf", tmp_path / "out", "debug=three")
    assert {path.name for path in (tmp_path / "out" / "models").iterdir()} == {"teacher", "assistant", "student"}
    assert all("inner_loss/assistant" in record for record in records(tmp_path / "out"))


def test_several_meta_parameters_and_one_that_nothing_reads(tmp_path: Path) -> None:
    (tmp_path / "conf" / "meta_params").mkdir(parents=True)
    (tmp_path / "conf" / "meta_params" / "two.yaml").write_text(TWO)
    with pytest.raises(MissingPathError, match=r"second\.logits"):
        run_from(tmp_path / "conf", tmp_path / "out", "meta_params=two", "+loss.weights=first")


def test_a_broken_plug_in_is_shown_by_its_own_lines(folder: Path) -> None:
    (folder / "broken.py").write_text(PLUG_INS.replace('trained["student"]', 'trained["student"].nothing'))
    done = command(folder, *QUICK, "objective=custom", "objective._target_=broken.Mine")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.strip().splitlines()[-3:]
    assert said[0].startswith("AttributeError: a trained model has no attribute 'nothing'")
    assert said[1].startswith("raised in the meta-objective Mine, on {input")
    assert "broken.py:" in said[2]
    assert said[2].endswith('logits = trained["student"].nothing(inputs=batch["inputs"])')
    (failed,) = folder.rglob("result.json")
    assert json.loads(failed.read_text())["error"].splitlines()[-1] == said[2]


def test_a_sweep_runs_every_job(tmp_path: Path) -> None:
    sweep = ("optimizer=sgd,adam", "meta_params=example_weights,uniform", "hydra.sweep.dir=sweep")
    torch.set_num_threads(2)
    try:
        done = command(tmp_path, "-m", *QUICK, *sweep)
    finally:
        torch.set_num_threads(1)
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "sweep").glob("[0-9]*"))
    assert [(result(path)["status"], result(path)["num_threads"]) for path in folders] == [("complete", 1)] * 4
    learns = [any("hypergradient_norm" in record for record in records(path)) for path in folders]
    assert learns == [True, False, True, False]


def test_a_failing_job_does_not_stop_a_sweep(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", *QUICK, "optimizer.lr=-1,0.1", "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert "Invalid learning rate" in done.stderr
    assert "Traceback" not in done.stderr
    assert [result(tmp_path / "sweep" / str(job))["status"] for job in (0, 1)] == ["failed", "complete"]
