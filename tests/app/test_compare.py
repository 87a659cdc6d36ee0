"""Runs side by side: every status, seeds, differences, damaged folders, hostile strings, and the files written."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import QUICK, ROOT, run
from hostile import HOSTILE
from safetensors.numpy import save_file

import metaopt
from metaopt.app.compare.main import main
from metaopt.app.compare.reading import MOST, Run, read_runs
from metaopt.app.compare.rows import chosen, rows_of
from metaopt.base.errors import ConfigError

CONFIG: dict[str, Any] = {
    "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.1},
    "stages": {"teacher": {"optimizer": {"_target_": "torch.optim.Adam", "lr": 0.1}}},
    "data": {"seed": "${trainer.seed}"},
    "meta_params": {"parametrisation": "softmax"},
    "trainer": {"seed": 0, "meta_steps": 3, "select_every": 1},
    "output": {"plots": True},
    "facts": {},
}
SGD = {"_target_": "torch.optim.SGD", "lr": 0.5}


def a_run(
    folder: Path, seed: int = 0, score: float | None = 0.5, config: Mapping[str, Any] = CONFIG, **told: Any
) -> Path:
    """Write a run as it would lie there; `config=None` for one that has not come so far."""
    folder.mkdir(parents=True)
    numbers = {
        "score": score,
        "best": {"meta_step": 2, "score": score},
        "metrics": {"meta_loss": 1.5, "accuracy": 0.75},
    }
    known = {"status": "complete", "overrides": [f"trainer.seed={seed}"], "seed": seed, "seconds": 10.0}
    tests = {"test": {"learned": {"accuracy": 0.75}, "uniform": {"accuracy": 0.5}}}
    (folder / "result.json").write_text(json.dumps({**known, **numbers, **tests, **told}))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "trainer": {**config["trainer"], "seed": seed}}))
    records = [{"meta_step": i, "meta_loss": 3.0 - i / 2, "selection/accuracy": i / 10} for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def a_sweep(folder: Path) -> dict[str, list[float]]:
    """Two optimizers by three seeds; return the scores of each."""
    scores = {"adam": [0.5, 0.7, 0.9], "sgd": [0.4, 0.7, 0.5]}
    for i, (name, of_seeds) in enumerate(scores.items()):
        config = CONFIG if name == "adam" else {**CONFIG, "optimizer": SGD, "stages": {"teacher": {"optimizer": SGD}}}
        for seed, score in enumerate(of_seeds):
            overrides = [f"optimizer={name}", f"trainer.seed={seed}"]
            a_run(folder / str(10 * i + seed), seed, score, config, overrides=overrides)
    return scores


def running(process: int, host: str = platform.node(), started: str = "") -> dict[str, Any]:
    started = started or datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"status": "running", "process": process, "host": host, "started": started, "seconds": 0.0}


def compare(*arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    code = left.value.code
    return (code, "") if isinstance(code, int) else (1, str(code))


def only(folder: Path) -> Run:
    (found,) = read_runs([folder])
    return found


# --- one folder --------------------------------------------------------------------------------------------------


def test_a_run_is_read(tmp_path: Path) -> None:
    found = only(a_run(tmp_path / "a", seed=3))
    assert (found.name, found.status, found.seed, found.error) == ("a", "complete", 3, "")
    assert found.options["stages.teacher.optimizer.lr"] == 0.1
    assert not {"trainer.seed", "output.plots"} & {*found.options, *found.given}
    assert found.numbers == {
        "score": 0.5,
        "best_step": 2,
        "seconds": 10.0,
        "test/learned/accuracy": 0.75,
        "test/uniform/accuracy": 0.5,
        "meta_loss": 1.5,
        "meta_step": 3,
        "selection/accuracy": 0.3,
    }


@pytest.mark.parametrize("status", ["complete", "complete_with_errors", "failed", "interrupted"])
def test_every_status_is_told_with_its_error(tmp_path: Path, status: str, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "a", status=status, error="no such thing\n  a hint")
    assert only(tmp_path).status == status
    assert compare(tmp_path) == (0, "")
    assert rf"a: {status}: no such thing\n  a hint" in capsys.readouterr().out


def test_a_running_run_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    for process, status in {os.getpid(): "running", gone.pid: "killed", 10**30: "killed", -3: "killed"}.items():
        assert only(a_run(tmp_path / str(process), **running(process))).status == status
    elsewhere = only(a_run(tmp_path / "far", **running(gone.pid, host="another")))
    assert elsewhere.status == "running"
    assert "cannot be seen from here" in elsewhere.error


@pytest.mark.skipif(not Path("/proc/uptime").exists(), reason="elsewhere a later process under the number is not told")
def test_a_later_process_under_the_same_number_is_another(tmp_path: Path) -> None:
    assert only(a_run(tmp_path / "a", **running(os.getpid(), started="2020-01-01T00:00:00+00:00"))).status == "killed"


def test_the_time_of_one_that_was_cut_short_is_that_to_its_last_word(tmp_path: Path) -> None:
    a_run(tmp_path / "a", **running(10**30, started="2020-01-01T00:00:00+00:00"))
    os.utime(tmp_path / "a" / "metrics.jsonl", (0, 1577836800 + 90))
    os.utime(tmp_path / "a" / "result.json", (0, 1577836800 + 1))
    assert only(tmp_path).numbers["seconds"] == 90


@pytest.mark.parametrize(
    "given", [{"metrics": {"meta_loss": None}, "score": None}, {"metrics": {"meta_loss": math.nan}}]
)
def test_what_was_not_finite_is_nan_and_counts_for_nothing(tmp_path: Path, given: dict[str, Any]) -> None:
    a_run(tmp_path / "0", seed=0, not_finite=["metrics.meta_loss", "test.uniform.accuracy"], **given)
    a_run(tmp_path / "1", seed=1)
    (row,) = rows_of(read_runs([tmp_path]))
    assert math.isnan(row.runs[0].numbers["meta_loss"])
    assert math.isnan(row.runs[0].numbers["test/uniform/accuracy"])
    assert row.numbers["meta_loss"].told() == {"mean": 1.5, "se": None, "n": 1}


DAMAGES = {
    "result.json": ["", "{", "[]", "[" * 100_000, '{"status": 3}', '{"status": "odd"}', "\x00", b"\xff\xfe", None],
    "config.yaml": ["a: [", "- a", "a: " + "[" * 100_000, "- " * 100_000, "a: 1\n\t- b", b"\xff\xfe", "a: *b", None],
    "metrics.jsonl": ["", '{"meta_step": 1', "[1]\nnull\n" + "[" * 100_000, b"\xff\n", '{"meta_loss": "x"}', None],
    "meta_params.safetensors": ["", "x" * 100, b"\xff" * 100, None],
}


@pytest.mark.parametrize("file", DAMAGES)
def test_a_damaged_folder_is_a_line_and_never_a_traceback(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path / "runs" / "whole")
    for i, content in enumerate(DAMAGES[file]):
        path = a_run(tmp_path / "runs" / f"{i}", seed=i) / file
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert compare(tmp_path, "--html", tmp_path / "a.html") == (0, "")
    told = capsys.readouterr().out + (tmp_path / "a.html").read_text()
    if file == "metrics.jsonl":
        assert "cannot be read" not in told
    else:
        for i, content in enumerate(DAMAGES[file]):
            absent = content is None and file != "meta_params.safetensors"
            words = f"{file} is missing" if absent else f"{file} (cannot be read|has no status)"
            assert re.search(rf"{i}(</b>)?: \w+: {words}", told) or (content is None and not absent), (i, content)


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (a_run(tmp_path / "a") / "config.yaml").write_text("\n".join(lines))
    assert f"more than {MOST} entries" in only(tmp_path).error


@pytest.mark.parametrize(
    "told",
    [
        {key: value}
        for key in ("overrides", "metrics", "test", "best", "seconds", "score", "errors", "error", "seed", "not_finite")
        for value in ([], {}, "x", 10**400, [None, 3], {"a": {"b": []}}, None, True)
    ],
    ids=str,
)
def test_a_result_with_something_else_in_it_is_read(tmp_path: Path, told: dict[str, Any]) -> None:
    a_run(tmp_path / "a", **{"status": "running", "started": 3, "process": "x", "host": platform.node(), **told})
    assert compare(tmp_path, "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv") == (0, "")


def test_runs_are_found_below_once_and_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("sweep/10", "sweep/2", "single", "sweep/2/models/x", ".hidden/y"):
        a_run(tmp_path / name)
    (tmp_path / "sweep" / "check").mkdir()
    (tmp_path / "sweep" / "check" / "config.yaml").write_text("a: 1")  # metaopt-check leaves that
    found = read_runs([tmp_path, tmp_path / "sweep", tmp_path / "single"])
    assert [r.name for r in found] == ["single", "sweep/2", "sweep/10"]


def test_a_folder_that_is_not_there_or_holds_no_run_is_said(tmp_path: Path) -> None:
    assert "there is no such folder" in compare(tmp_path / "no")[1]
    assert "no run there or below" in compare(tmp_path)[1]


# --- rows --------------------------------------------------------------------------------------------------------


def test_seeds_are_gathered_with_mean_and_standard_error(tmp_path: Path) -> None:
    scores = a_sweep(tmp_path)
    rows = rows_of(read_runs([tmp_path]))
    assert [row.name for row in rows] == ["optimizer=adam", "optimizer=sgd"], "what the choice explains has no column"
    for row, values in zip(rows, scores.values(), strict=True):
        expected = {"mean": np.mean(values), "se": np.std(values, ddof=1) / 3**0.5, "n": 3}
        assert row.numbers["score"].told() == pytest.approx(expected)


def test_differences_are_paired_over_the_common_seeds(tmp_path: Path) -> None:
    a_sweep(tmp_path)
    a_run(tmp_path / "more", 7, 100.0, overrides=["optimizer=adam", "trainer.seed=7"])
    rows = rows_of(read_runs([tmp_path]))
    base = chosen([rows], ["optimizer=adam"])
    (other,) = (row for row in rows if row is not base)
    by_hand = [-0.1, 0.0, -0.4]  # of seeds 0, 1 and 2; sgd has no seed 7
    mean = sum(by_hand) / 3
    error = (sum((difference - mean) ** 2 for difference in by_hand) / 2 / 3) ** 0.5
    assert other.minus(base)["score"].told() == pytest.approx({"mean": mean, "se": error, "n": 3})


def test_only_complete_runs_count_where_there_are_any(tmp_path: Path) -> None:
    a_run(tmp_path / "0", 0, 0.5)
    a_run(tmp_path / "1", 1, 99.0, status="interrupted")
    a_run(tmp_path / "2", 2, 0.7)
    (row,) = rows_of(read_runs([tmp_path]))
    assert row.numbers["score"].mean == pytest.approx(0.6)
    assert row.status == "2 complete, 1 interrupted"


def test_one_that_failed_before_its_config_was_written_is_with_those_that_were_given_the_same(tmp_path: Path) -> None:
    a_sweep(tmp_path)
    given = ["optimizer=sgd", "trainer.seed=9"]
    a_run(tmp_path / "x", 9, None, None, overrides=given, status="failed", metrics={}, test={})  # type: ignore[arg-type]
    assert [len(row.runs) for row in rows_of(read_runs([tmp_path]))] == [3, 4]


def test_equal_configs_are_one_variant_however_they_were_asked_for(tmp_path: Path) -> None:
    a_run(tmp_path / "0", 0, overrides=["optimizer=adam", "+note=x"])
    a_run(tmp_path / "1", 1, overrides=["experiment=digits", "output.plots=false"])
    assert [row.name for row in rows_of(read_runs([tmp_path]))] == ["all runs"]


def test_what_no_override_explains_is_a_column(tmp_path: Path) -> None:
    a_run(tmp_path / "0")
    a_run(tmp_path / "1", config={**CONFIG, "optimizer": SGD, "stages": {"teacher": {"optimizer": SGD}}})
    names = [row.name for row in rows_of(read_runs([tmp_path]))]
    assert names == ["optimizer._target_=torch.optim.Adam", "optimizer._target_=torch.optim.SGD"]


# --- the command -------------------------------------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[str]]:
    """The cells of the tables that are printed."""
    assert compare(*arguments) == (0, "")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_table_has_options_status_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_sweep(tmp_path)
    adam, sgd = shown(capsys, tmp_path)
    assert adam[:5] == ["adam", "3", "complete", "0.70 ± 0.12", "10 ± 0"]
    assert sgd[:4] == ["sgd", "3", "complete", "0.533 ± 0.088"]
    *_, minus = shown(capsys, tmp_path, "--against", "optimizer=adam")
    assert minus[:4] == ["sgd", "3", "complete", "-0.17 ± 0.12"]


def test_single_runs_sorting_and_filtering(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_sweep(tmp_path)
    rows = shown(capsys, tmp_path, "--each", "--sort", "score", "--reverse", "--filter", "trainer.seed<2")
    assert [row[:4] for row in rows] == [
        ["adam", "1", "1", "complete"],
        ["sgd", "11", "1", "complete"],
        ["adam", "0", "0", "complete"],
        ["sgd", "10", "0", "complete"],
    ]
    assert [row[0] for row in shown(capsys, tmp_path, "--filter", "score>0.6")] == ["3"], "one row, no option differs"
    assert len(shown(capsys, tmp_path, "--each", "--filter", "score>=0.7", "--filter", "optimizer=sgd")) == 1
    assert compare(tmp_path, "--filter", "status!=complete") == (1, "")
    assert "did you mean 'score'" in compare(tmp_path, "--sort", "scor")[1]
    assert "did you mean 'optimizer.lr'" in compare(tmp_path, "--filter", "optimiser.lr=3")[1]
    assert "is no condition" in compare(tmp_path, "--filter", "score")[1]
    assert "choose one of\n  optimizer=adam\n  optimizer=sgd" in compare(tmp_path, "--against", "optimizer=adagrad")[1]
    assert "x.csv cannot be written" in compare(tmp_path, "--csv", tmp_path / "no" / "x.csv")[1]


def test_missing_values_are_sorted_last_either_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, score in enumerate((0.2, None, 0.1)):
        a_run(tmp_path / str(seed), seed, score)
    for reverse in ((), ("--reverse",)):
        rows = shown(capsys, tmp_path, "--each", "--sort", "score", *reverse)
        assert rows[-1][0] == "1"


def test_csv_and_json_are_read_back(tmp_path: Path) -> None:
    scores = a_sweep(tmp_path / "runs")
    files = tmp_path / "a.csv", tmp_path / "a.json"
    assert compare(tmp_path, "--against", "optimizer=adam", "--csv", files[0], "--json", files[1]) == (0, "")
    with files[0].open(newline="") as file:
        adam, sgd = csv.DictReader(file)
    assert float(adam["score"]) == pytest.approx(np.mean(scores["adam"]))
    assert float(sgd["score_difference"]) == pytest.approx(-1 / 6)
    assert (sgd["optimizer"], sgd["runs"], sgd["score_difference_n"]) == ("sgd", "10; 11; 12", "3")
    told = json.loads(files[1].read_text(), parse_constant=lambda name: pytest.fail(name))
    assert told[1]["differences"]["score"]["mean"] == pytest.approx(-1 / 6)
    assert [r["numbers"]["score"] for r in told[1]["runs"]] == scores["sgd"]


def test_the_command_imports_neither_torch_nor_what_only_a_page_needs(tmp_path: Path) -> None:
    a_sweep(tmp_path)
    code = (
        "import sys\nfrom metaopt.app.compare.main import compare, parser\n"
        f"assert compare(parser().parse_args([{str(tmp_path)!r}])) == 0\n"
        "loaded = {'torch', 'transformers', 'hydra', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_a_real_run_is_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = run(tmp_path, *QUICK)
    capsys.readouterr()
    ((_, status, *numbers),) = shown(capsys, tmp_path, "--html", tmp_path / "a.html")
    assert status == "complete"
    assert float(numbers[0]) == pytest.approx(score, rel=1e-3)
    assert "<h3>weights</h3>" in (tmp_path / "a.html").read_text()


# --- the page ----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would read them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_has_tables_curves_and_weights_and_no_reference_outside(tmp_path: Path) -> None:
    a_sweep(tmp_path)
    for path in tmp_path.iterdir():
        logits = np.array([0.0, 1.0, 2.0]) if path.name < "10" else np.zeros(100)
        save_file({"logits": logits}, path / "meta_params.safetensors")
    assert compare(tmp_path, "--against", "optimizer=sgd", "--html", tmp_path / "a.html") == (0, "")
    page = Page((tmp_path / "a.html").read_text())
    assert page.tags.count("table") == 3, "rows, differences, single runs"
    assert page.tags.count("img") == 2 + 2, "meta-loss and accuracy; the weights of each"
    assert {"meta_loss", "selection/accuracy", "weights", "optimizer=sgd"} <= {*page.texts}
    for name, value in page.attributes:
        if name in ("src", "href", "content", "style"):
            assert not re.search(r"https?:|//|url\(", re.sub(r"base64,.*|'sha256-.*", "", value or ""))
    assert page.tags.count("script") == 1
    assert not {"link", "iframe", "object"} & {*page.tags}


def test_hostile_strings_are_text_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, text in enumerate(HOSTILE):
        config = {**CONFIG, "data": {"note": text.encode("utf-8", "replace").decode()}}
        told = {"errors": [text], "metrics": {text: 0.5}, "test": {text: {text: 0.5}}, "overrides": [f"note={text}"]}
        name = re.sub(r"[/\x00]", "", text.encode("utf-8", "replace").decode())[:50].strip() or str(i)
        a_run(tmp_path / "runs" / f"{i} {name}", seed=i, config=config, status="failed", **told)
        record = json.dumps({"meta_step": 1, f"selection/{text if i % 4 == 0 else 'x'}": 0.5, "meta_loss": 1.0})
        (tmp_path / "runs" / f"{i} {name}" / "metrics.jsonl").write_text(record)
        if i % 4 == 1:
            save_file({f"x{name}": np.arange(3.0)}, tmp_path / "runs" / f"{i} {name}" / "meta_params.safetensors")
    files = tmp_path / "a.html", tmp_path / "a.csv", tmp_path / "a.json"
    assert compare(tmp_path, "--html", files[0], "--csv", files[1], "--json", files[2]) == (0, "")
    assert compare(tmp_path, "--each") == (0, "")
    out, page = capsys.readouterr().out, Page(files[0].read_text(encoding="utf-8"))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out)
    assert "[bold red]x[/bold red]" in out
    assert page.tags.count("script") == 1
    assert any("<b>x</b><script>alert(1)</script>" in text for text in page.texts)
    assert any("$x$" in text for text in page.texts)
    ours = {"lang", "charset", "http-equiv", "content", "name", "class", "style", "data-v", "src", "alt"}
    assert {name for name, _ in page.attributes} == ours
    with files[1].open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(HOSTILE)
    assert len(json.loads(files[2].read_text())) == len(HOSTILE)


# --- in code -----------------------------------------------------------------------------------------------------


def test_load_runs_gives_a_data_frame(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    scores = a_sweep(tmp_path)
    a_run(tmp_path / "x", 9, None, status="failed", error="oh", overrides=["optimizer=sgd", "trainer.seed=9"])
    frame: Any = metaopt.load_runs(tmp_path)
    assert len(frame) == 7
    assert frame.groupby("optimizer")["score"].mean()["adam"] == pytest.approx(np.mean(scores["adam"]))
    assert frame["error"].tolist().count("oh") == 1
    assert "optimizer.lr" not in frame
    every: Any = metaopt.load_runs([tmp_path], all_options=True)
    assert set(every["optimizer.lr"]) == {0.1, 0.5}


def test_load_runs_without_pandas_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'metaopt-chain[compare]'")):
        metaopt.load_runs(tmp_path)
