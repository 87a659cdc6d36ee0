"""The forum's pipeline at a real size: its pairs, its config, and the objective that its hand-over asks for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hydra import compose, initialize_config_module

import metaopt
from metaopt.app.config import prepare
from metaopt.app.run import train
from metaopt.examples.forum_pipeline import in_words, number_words

TINY = ("experiment=forum_pipeline", "debug=tiny", "output.plots=false", "output.save_models=false")


def composed(*overrides: str) -> Any:
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        return prepare(compose("config", overrides=list(overrides)), overrides)


def test_numbers_are_written_in_words():
    words = [in_words(number) for number in (0, 7, 10, 19, 20, 42, 100, 115, 742)]
    assert words[:6] == ["zero", "seven", "ten", "nineteen", "twenty", "forty two"]
    assert words[6:] == ["one hundred", "one hundred fifteen", "seven hundred forty two"]
    assert len({in_words(number) for number in range(1000)}) == 1000


def test_half_of_the_training_pairs_are_wrong_and_no_number_is_in_two_streams():
    data = number_words(seed=3)
    assert data.is_clean is not None
    assert int(data.is_clean.sum()) == 250
    rows = {name: list(data.stream(name)) for name in data.stream_names}
    inputs = {
        name: [tuple(row) for batch in found for row in batch["input_ids"].tolist()] for name, found in rows.items()
    }
    assert sorted(inputs["unlabelled"]) == sorted(inputs["train"])
    rest = [row for name in ("train", "validation", "selection", "test") for row in inputs[name]]
    assert len(rest) == len(set(rest)) == 1000
    right = {
        tuple(b["input_ids"][i].tolist()): b["labels"][i] for b in number_words(0.0, seed=3).train for i in range(100)
    }
    for batch in rows["train"]:
        for index, row, labels in zip(batch["index"], batch["input_ids"].tolist(), batch["labels"], strict=True):
            assert bool(labels.equal(right[tuple(row)])) == bool(data.is_clean[index])
    assert data.answers is not None
    answers = data.answers(lambda **inputs: inputs["decoder_input_ids"].new_zeros(3, 4, 40).float(), data.test, 3)
    assert [wrong for _, _, wrong in answers] == [""] * 3
    assert all(in_words(int(digits)) == words for words, digits, _ in answers)
    with pytest.raises(metaopt.ConfigError, match="1001 examples in all; there are only 1000 numbers"):
        number_words(num_test=251)


@pytest.mark.slow
@pytest.mark.parametrize("handover", ["hidden_states", "decoded"])
def test_the_experiment_runs_with_both_hand_overs(handover, tmp_path, capsys):
    train(composed(*TINY, f"handover={handover}", "data.num_train=40", "data.batch_size=20"), str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "complete"
    assert set(result["test"]) == {"learned", "uniform"}
    assert {"exact_match", "token_accuracy"} <= set(result["test"]["learned"])
    assert "agrees" in capsys.readouterr().out  # the opening check


def test_validating_on_tokens_what_read_hidden_states_is_warned_of(tmp_path):
    fed = (*TINY, "objective=validation_loss", "final=none", "trainer.check_first_step=false")
    with pytest.warns(
        UserWarning, match=r"stage 'student' read decoder_inputs_embeds, input_ids in training and reads"
    ):
        train(composed(*fed), str(tmp_path))


def test_the_pipeline_is_the_default_and_another_objective_wins():
    for handover in ("decoded", "hidden_states"):
        assert composed(f"handover={handover}").objective._target_ == "metaopt.PipelineLoss"
        plain = composed(f"handover={handover}", "objective=validation_loss").objective
        assert plain._target_ == "metaopt.ValidationLoss"
