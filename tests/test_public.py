"""What can be imported, what importing costs, and who may import whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import metaopt

PACKAGE = Path(metaopt.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
CONTRACT = {
    "Stage",
    "Chain",
    "WeightedLoss",
    "Distillation",
    "HiddenStates",
    "HardLabels",
    "InnerLoss",
    "ValidationLoss",
    "MetaObjective",
    "MetaParameters",
    "ExampleWeights",
    "SourceWeights",
    "Uniform",
    "MetaTrainer",
    "Unrolled",
    "backward",
    "check_hypergradient",
    "DataBundle",
}


def imported_by(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_importing_the_package_loads_neither_torch_nor_higher():
    code = (
        "import sys, metaopt\n"
        "loaded = {'torch', 'higher', 'transformers', 'hydra', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "metaopt.MetaoptError\n"
        "assert 'torch' not in sys.modules\n"
        "metaopt.Chain\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_every_public_name_can_be_imported():
    assert set(metaopt.__all__) >= CONTRACT
    assert dir(metaopt) == metaopt.__all__
    for name in metaopt.__all__:
        found = getattr(metaopt, name)
        assert found.__name__.removeprefix("metaopt.") == name
        assert found.__doc__, f"metaopt.{name} has no docstring"


def test_no_target_in_conf_names_anything_but_a_public_name():
    targets = set()
    for path in (PACKAGE.parent / "conf").rglob("*.yaml"):
        targets |= set(re.findall(r"_target_[:=] *([\w.]+)", path.read_text()))
    assert {"metaopt.Unrolled", "torch.optim.Adam", "metaopt.dates"} <= targets
    libraries = ("torch.", "transformers.", "metaopt.examples.", "my_")  # my_: a user's own, in comments
    others = {target for target in targets if not target.startswith(libraries)}
    others.remove("metaopt.app.sweep.Watch")  # what Hydra calls, and no part of a run
    assert others <= {f"metaopt.{name}" for name in metaopt.__all__}


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="Chian"):
        _ = metaopt.Chian  # type: ignore[attr-defined]


def test_only_one_module_imports_higher():
    assert {path.name for path in MODULES if "higher" in imported_by(path)} == {"unrolled.py"}


def test_the_package_imports_neither_tests_nor_experiments():
    assert len(MODULES) > 15
    tests = {path.stem for path in (Path(__file__).parent / "support").glob("*.py")}
    for path in MODULES:
        assert not imported_by(path) & ({"tests", "experiments", "pytest"} | tests), path


def test_the_version_is_that_of_the_distribution():
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    found = re.search(r'^version = "(.+)"', project, re.MULTILINE)
    assert found is not None
    assert found[1] == metaopt.__version__
