"""The code, the commands, the options and the links of the README and of docs/ work as they stand there."""

import json
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import FEW_DATES
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

import metaopt
from metaopt.app import cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *DOCS]
OF_ONE_S_OWN = ROOT / "docs" / "your_own.md"  # the page with mine.py
VOCABULARY, BATCH, LENGTH = 20, 4, 6


def code_blocks(page: Path = README) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def bert2bert() -> EncoderDecoderModel:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    halves = [BertConfig(**sizes) for _ in range(2)]
    tokens = {"decoder_start_token_id": 1, "pad_token_id": 0}
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*halves, **tokens))


def batch(start: int) -> dict[str, torch.Tensor]:
    tokens = {key: torch.randint(VOCABULARY, (BATCH, LENGTH)) for key in ("input_ids", "decoder_input_ids", "labels")}
    return {**tokens, "index": torch.arange(start, start + BATCH)}


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the README's first example leaves behind, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    student = bert2bert()
    given: dict[str, Any] = {
        "train": range(2 * BATCH),
        "model1": bert2bert(),
        "model2": student,
        "train_batches": [batch(0), batch(BATCH)],
        "unlabelled_batches": [batch(0)],
        "validation_batches": [batch(0), batch(0)],
        "before": {key: value.clone() for key, value in student.state_dict().items()},
    }
    exec(code_blocks()[0], given)
    return given


def test_the_code_example_runs_on_an_encoder_decoder_and_moves_every_weight(namespace, tmp_path) -> None:
    assert bool((namespace["weights"].logits != 0).all())
    before, after = namespace["before"], namespace["model2"].state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before), "commit carries on from the trained weights"
    exec(code_blocks()[1], namespace)
    assert namespace["result"].meta_steps == 2
    assert len((tmp_path / "runs" / "mine" / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:`lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("page", [page for page in DOCS if "```python" in page.read_text()], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_behind_the_example(page, namespace) -> None:
    for block in code_blocks(page):
        if not block.startswith("# mine.py"):  # see `_own_folder`
            exec(block, namespace)
    if page.stem == "estimators":
        assert bool((namespace["weights"].logits.grad != 0).all())


# --- commands ---------------------------------------------------------------------------------------------------

SLOW = pytest.mark.slow
COMMANDS = {"metaopt": cli.main, "metaopt-check": cli.check_main, "metaopt-fidelity": cli.fidelity_main}
SMALLEST = {
    "metaopt": ("output.plots=false", "final=none", "trainer.check_first_step=false"),
    "metaopt-check": ("check.steps=[1e-3,1e-4]", "check.num_directions=1"),
    "metaopt-fidelity": ("fidelity.num_runs=1", "~fidelity.estimators.captured"),
}
WITHOUT_TEXT = [part.split("```python")[0] for page in PAGES for part in page.read_text().split("```\n")]


def found() -> list[str]:
    """Each command that begins an indented line or stands between backticks, once."""
    prose = "".join(re.sub(r"\\\n\s*", "", part) for part in WITHOUT_TEXT)
    lines = re.findall(r"^ {4}(metaopt(?:-\w+)?(?: .*)?)$", prose, re.MULTILINE)
    inline = re.findall(r"`(metaopt[\w-]* [^`…]+)`", prose)
    return list(dict.fromkeys(re.sub(r"\s+#.*", "", command) for command in [*lines, *inline]))


def smallest(command: str) -> list[str]:
    """The same command at the smallest sizes."""
    program, *arguments = shlex.split(command)
    if "--help" in arguments:
        return arguments
    of_dates = FEW_DATES if not re.search(r"(data|experiment)=", command) else ()
    more = ("debug=tiny", *SMALLEST[program], *of_dates)
    return [*arguments, *(option for option in more if option not in arguments)]


@pytest.fixture
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with the files that the pages speak of; what a command changes in this process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    (tmp_path / "mine.py").write_text(next(code for code in code_blocks(OF_ONE_S_OWN) if code.startswith("# mine.py")))
    for i, name in enumerate(("train", "more", "dev", "sel", "test")):
        rows = [{"question": f"{i}{j}?", "answer": f"{j}", "origin": "ab"[j % 2]} for j in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level
    sys.modules.pop("mine", None)


@pytest.mark.sampled(8)
@pytest.mark.usefixtures("_own_folder")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:stage 'student' read decoder_inputs_embeds")  # the thread's own objective
@pytest.mark.parametrize("command", [pytest.param(c, marks=SLOW if "fidelity" in c else ()) for c in found()])
def test_every_command_runs(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [command.split()[0], *smallest(command)])
    with suppress(SystemExit) if "check" in command or "help" in command else nullcontext():
        COMMANDS[sys.argv[0]]()
    if "--help" in command:
        assert "options of each group" in capsys.readouterr().out
        return
    jobs = re.findall(r"=\S+,\S+", command)
    written = [*tmp_path.rglob("result.json"), *tmp_path.rglob("check.json"), *tmp_path.rglob("fidelity.json")]
    assert len(written) == 2 ** len(jobs)


def test_the_commands_are_found() -> None:
    assert {"metaopt", "metaopt --help", "metaopt-check experiment=digits"} <= set(found())
    assert any("data=text" in command and "data.source=origin" in command for command in found())


def test_every_option_that_is_named_is_there() -> None:
    """Between backticks, such as `handover=decoded` or `transform@stages.teacher.transform=clip_norm`."""
    named = re.findall(r"`((?:[a-z][\w@./]*=[\w.…]+ ?)+)`", "".join(WITHOUT_TEXT))
    options = {tuple(option.split("=")) for group in named for option in group.split()}
    assert ("schedule@stages.student.schedule", "cosine") in options
    top = re.findall(r"^  - (\w+): ", (ROOT / "conf" / "config.yaml").read_text(), re.MULTILINE)
    single = re.findall(r"^(\w+): ", (ROOT / "conf" / "config.yaml").read_text(), re.MULTILINE)
    for key, option in sorted(pair for pair in options if pair[0] not in single):
        group, _, package = key.partition("@")
        if package or "." not in group:
            assert package or group in top, f"{key}={option} is refused: {group} is no part of the whole config"
            assert (ROOT / "conf" / group / f"{option}.yaml").is_file(), f"{key}={option}"


def test_every_public_name_that_is_named_exists() -> None:
    """In the pages, the configs, and what the package's own messages advise."""
    sources = [*PAGES, *ROOT.glob("conf/**/*.yaml"), *ROOT.glob("metaopt/**/*.py")]
    named = {name for path in sources for name in re.findall(r"\bmetaopt\.(\w+)", path.read_text())}
    parts = {path.stem for path in (ROOT / "metaopt").iterdir()} | {"conf"}
    assert named - parts <= {
        *metaopt.__all__,
        "cli",
        "__file__",
        "__version__",
        *("chosen", "file", "groups"),
    }  # help's resolvers


# --- pages ------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    assert {f"docs/{page.name}" for page in DOCS} <= set(re.findall(r"\]\(([^)#]+)", README.read_text()))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_a_page_says_for_whom_it_is(page) -> None:
    title, _, first = page.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert first.startswith("For ")


@pytest.mark.parametrize(
    "page", [*PAGES, *ROOT.glob("experiments/*/*.md")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_link_and_path_leads_somewhere(page) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:|\*)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`(?:python |pytest )?((?:metaopt|conf|tests|experiments|docs)/[\w./]*)", text):
        assert (ROOT / path).exists(), path
