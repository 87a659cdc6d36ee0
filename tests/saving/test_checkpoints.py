"""Checkpoints: states come back as they were, damaged files are found out, and nothing is unpickled."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metaopt import ConfigError
from metaopt.saving.checkpoints import Checkpoints
from metaopt.saving.files import as_json, not_finite, replacing, write_text
from metaopt.saving.states import load_state, save_state

STATE: dict[str, Any] = {
    "tensors": {"a": torch.randn(3, 2), 7: torch.arange(4), "": torch.tensor(2.5), "none": torch.empty(0, 3)},
    "half": torch.ones(2, dtype=torch.bfloat16),
    "numbers": [1, -2.5, math.inf, True, None, "text \n é", 2**80],
    "pairs": (("a", 1), ("b", (2,))),
    "seen": {"x", "y"},
    "ordered": OrderedDict(a=1),
    "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
    "scalar": np.float32(1.5),
    "random": random.Random(1).getstate(),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save_state(STATE, tmp_path / "state")
    assert same(load_state(tmp_path / "state"), {**STATE, "ordered": {"a": 1}})


def test_views_and_ties_come_back_equal(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    save_state({"whole": whole, "view": whole[::2], "again": whole}, tmp_path / "state")
    found = load_state(tmp_path / "state")
    assert torch.equal(found["view"], whole[::2])
    assert torch.equal(found["again"], whole)


def test_what_cannot_be_held_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot hold parts\.loss\.1, a function"):
        save_state({"parts": {"loss": [1, print, len]}} | {"parts": {"loss": [1, lambda: 0]}}, Path("nowhere"))


def checkpoints(folder: Path, *steps: int, best: int = 0, **options: Any) -> Checkpoints:
    found = Checkpoints(folder, **options)
    for step in steps:
        state = {"step": step, "weights": torch.full((10,), float(step))}
        found.write(step, lambda state=state: state, best=step == best)
    return found


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints(tmp_path, 1, 2, 3, 4, 5, best=2)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == [2, 4, 5]
    newest = checkpoints(tmp_path, 6, best=6, keep=1).newest()
    assert newest is not None
    assert (newest.step, newest.state["step"]) == (6, 6)
    assert [path.name[:13] for path in tmp_path.iterdir()] == ["step-00000006"]


@pytest.mark.parametrize(("every", "due"), [(1, [True] * 6), (3, [False, False, True] * 2)])
def test_they_are_due_every_so_many_steps(every, due, tmp_path: Path) -> None:
    assert [Checkpoints(tmp_path, every).due(step) for step in range(1, 7)] == due


def test_without_a_period_they_are_due_as_often_as_they_are_cheap(tmp_path: Path, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("metaopt.saving.checkpoints.time.monotonic", lambda: now[0])

    def slow(*args: Any) -> None:
        now[0] += 3.0
        save_state(*args)

    monkeypatch.setattr("metaopt.saving.checkpoints.save_state", slow)
    found = checkpoints(tmp_path, 1)
    now[0] += 296.9
    assert not found.due(2)
    now[0] += 0.2  # 3 s of 300
    assert found.due(2)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"step": 3}))


def header_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:8])


@pytest.mark.parametrize("damage", [cut, flipped, emptied, pickled, header_only])
def test_a_damaged_one_is_told_and_the_one_before_is_taken(damage, tmp_path: Path) -> None:
    found = checkpoints(tmp_path, 1, 2)
    damage(max(tmp_path.iterdir()))
    with pytest.warns(RuntimeWarning, match="step-00000002.* cannot be used .*bytes are not those"):
        newest = found.newest()
    assert newest is not None
    assert newest.step == 1


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_planted_pickle_of_the_right_checksum_is_not_run(tmp_path: Path) -> None:
    bait, folder = tmp_path / "run", tmp_path / "checkpoints"
    found = checkpoints(folder, 1)
    data = pickle.dumps(Payload(bait))
    name = f"step-00000002-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    (folder / name).write_bytes(data)
    with pytest.warns(RuntimeWarning, match="step-00000002"):
        newest = found.newest()
    assert newest is not None
    assert newest.step == 1
    assert not bait.exists()


def test_what_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-notes.txt").write_text("mine")
    assert Checkpoints(tmp_path).newest() is None
    checkpoints(tmp_path, 1, 2, 3).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["step-notes.txt"]


def test_on_a_full_disk_training_goes_on(tmp_path: Path, monkeypatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    found = checkpoints(tmp_path, 1)
    monkeypatch.setattr("metaopt.saving.checkpoints.save_state", full)
    with pytest.warns(RuntimeWarning, match="step 2 could not be written: .*No space left"):
        found.write(2, dict)
    assert found.error
    assert [path.name[:13] for path in tmp_path.iterdir()] == ["step-00000001"]


# --- files


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")

    def stopped() -> None:
        with replacing(path) as written:
            written.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "old"
    assert [other.name for other in tmp_path.iterdir()] == ["result.json"]


def test_json_is_strict() -> None:
    found = {"a": [1.0, math.nan], "b": {"c": -math.inf, "d": (2, None)}}
    assert as_json(found) == '{"a": [1.0, null], "b": {"c": null, "d": [2, null]}}'
    assert list(not_finite(found)) == ["a.1", "b.c"]
