"""The wheel: it carries the configs, and runs from a foreign folder with the user's own files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import metaopt

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml"))


def call(*line: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        line, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_the_configs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith("metaopt_chain-")
    assert CONFIGS
    assert {f"metaopt/{path}" for path in CONFIGS} <= names
    assert {"metaopt/conf/__init__.py", "metaopt/py.typed", "metaopt/__init__.pyi", "metaopt/app/cli.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "conf/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_the_configs(tmp_path: Path) -> None:
    call(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path), cwd=ROOT)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {*CONFIGS, "conf/__init__.py", "metaopt/app/cli.py", "tests/test_packaging.py", "Makefile"} <= names


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", f"--target={site}", str(wheel)]
    call(*pip, cwd=ROOT)
    return site


def metaopt_from(site: Path, *arguments: str, cwd: Path) -> str:
    script = [sys.executable, str(site / "bin" / "metaopt")]  # the console script: the folder is not on its path
    return call(*script, *arguments, cwd=cwd, PYTHONPATH=str(site), OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_a_config_of_one_s_own_in_a_foreign_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, _self_]\nhydra: {searchpath: ['pkg://metaopt.conf']}\noptimizer: {lr: 0.5}\n"
    )
    shown = metaopt_from(installed, "--config-dir", ".", "--config-name", "mine", "--cfg", "job", cwd=tmp_path)
    assert "lr: 0.5" in shown


@pytest.mark.slow
def test_parts_of_one_s_own_run_from_a_foreign_folder(installed: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "your_own.md").read_text()
    code = re.search(r"```python\n(# mine\.py\n.*?)```", page, re.DOTALL)
    command = re.search(r"^    metaopt (experiment=digits data=custom .*\n.*Worst)$", page, re.MULTILINE)
    assert code is not None
    assert command is not None
    assert len(code[1].splitlines()) <= 40
    (tmp_path / "mine.py").write_text(code[1] + '\nprint("from", metaopt.__file__)\n')
    arguments = command[1].replace("\\\n", " ").split()
    assert f"from {installed}" in metaopt_from(installed, *arguments, "debug=tiny", "hydra.run.dir=out", cwd=tmp_path)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "complete"
    assert result["metrics"]["meta_loss"] > 0


def test_versions_agree() -> None:
    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert declared[1] == metaopt.__version__


def test_every_direct_dependency_is_pinned() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    assert extras is not None
    lists = re.findall(r"^dependencies = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    lists += re.findall(r"^[\w-]+ = \[(.*?)\]$", extras[1], re.MULTILINE | re.DOTALL)
    required = {re.split(r"[\[<>=]", name)[0] for block in lists for name in re.findall(r'"([^"]+)"', block)}
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert required - {"metaopt-chain"} == pinned
    assert len(lists) >= 3
