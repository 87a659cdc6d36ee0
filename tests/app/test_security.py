"""What comes from elsewhere is no code: payloads in data, models, meta-parameters and checkpoints do not run."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUICK, run
from transformers import BertConfig, BertForSequenceClassification

import metaopt
from metaopt import ConfigError
from metaopt.app.resume import go_on


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, bait: Path) -> None:
        self.bait = bait

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.bait}",)


@pytest.fixture
def bait(tmp_path: Path) -> Path:
    """A file that is there once a payload has run."""
    return tmp_path / "bait"


def test_the_payload_works(bait: Path) -> None:
    pickle.loads(pickle.dumps(Payload(bait)))
    assert bait.exists()


@pytest.mark.parametrize("name", ["meta_params.safetensors", "meta_params_last.safetensors"])
def test_meta_parameters(name: str, bait: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Payload(bait)))
    with pytest.raises(ConfigError, match=r"meta_params(_last)?\.safetensors"):
        metaopt.load_meta_params(metaopt.ExampleWeights(3), tmp_path, last="last" in name)
    assert not bait.exists()


def test_checkpoints(bait: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", *QUICK)
    data = pickle.dumps(Payload(bait))
    planted = f"step-00000009-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    (tmp_path / "run" / "checkpoints" / planted).write_bytes(data)
    with pytest.warns(RuntimeWarning, match="step-00000009"):
        run(tmp_path / "run", *QUICK, "resume=auto", "resume_force=true")
    assert not bait.exists()


def test_a_result_and_a_config_are_parsed_as_data(bait: Path, tmp_path: Path) -> None:
    run(tmp_path, *QUICK)
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(f"{config}\nmine: !!python/object/apply:os.system ['touch {bait}']\n")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        go_on(str(tmp_path))
    (tmp_path / "result.json").write_bytes(pickle.dumps(Payload(bait)))
    with pytest.raises(ConfigError, match="holds a run"):
        run(tmp_path, *QUICK)
    assert not bait.exists()


def planted_model(folder: Path, bait: Path) -> None:
    """A BERT whose folder has code of its own, and weights in a pickle."""
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(vocab_size=11, **sizes)).save_pretrained(folder)
    (folder / "modeling_mine.py").write_text(f"import pathlib\npathlib.Path({str(bait)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoModelForSequenceClassification": "modeling_mine.Mine",
        "AutoConfig": "modeling_mine.Mine",
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_a_model_folder_s_code_is_not_run(bait: Path, tmp_path: Path) -> None:
    planted_model(tmp_path / "model", bait)
    assert metaopt.from_pretrained("classification", str(tmp_path / "model")) is not None
    assert not bait.exists()


def test_a_model_folder_s_pickle_is_not_run(bait: Path, tmp_path: Path) -> None:
    planted_model(tmp_path / "model", bait)
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"weight": Payload(bait)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ConfigError):
        metaopt.from_pretrained("classification", str(tmp_path / "model"))
    assert not bait.exists()


def test_a_data_folder_s_code_is_not_run(bait: Path, tmp_path: Path) -> None:
    """Beside the files lie a loading script of the folder's name and a pickle; a formula of a spreadsheet is a text."""
    folder = tmp_path / "data"
    folder.mkdir()
    splits = ("train", "validation", "selection", "test")
    for i, split in enumerate(splits):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["input", "target"], [f"=cmd|'/C touch'!A{i}", "a"], [f"fine {i}", "b"]])
    (folder / "data.py").write_text(f"import pathlib\npathlib.Path({str(bait)!r}).touch()\n")
    (folder / "dataset_infos.json").write_text("{}")
    given = [str(folder / f"{split}.csv") for split in splits]
    bundle = metaopt.text("classification", *given, batch_size=2, cache_dir=str(tmp_path / "cache"))
    assert len(list(bundle.train)) == 1
    (folder / "train.pkl").write_bytes(pickle.dumps(Payload(bait)))
    with pytest.raises(ConfigError):
        metaopt.text("classification", str(folder / "train.pkl"), *given[1:], cache_dir=str(tmp_path / "cache"))
    assert not bait.exists()
