"""Shipped options run, each where it belongs; loops, and what is done with A afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file

import metaopt
from metaopt.app.config import prepare
from metaopt.app.run import train

DIGITS = ("experiment=digits", "debug=tiny", "trainer.check_first_step=false", "output.plots=false")
SMALL = ("data.num_train=256", "data.num_unlabelled=256", "data.num_validation=64", "data.num_selection=64")
QUICK = ("debug=tiny", "trainer.check_first_step=false", "output.plots=false", "final=none")
DATES = (*SMALL, *QUICK, "model.hidden_size=16")


def run(folder: Path, *overrides: str) -> float:
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        return train(prepare(compose("config", overrides=list(overrides)), overrides), str(folder))


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


AUGMENTED = ("loss=augmented", "loss.loss._target_=metaopt.WeightedLoss", "+loss.loss.weights=examples")
OPTIONS = [
    ("meta_params=class_weights",),
    ("meta_params=weight_network",),
    ("meta_params=weight_network", "meta_params.features=inputs", "meta_params.num_features=${facts.num_features}"),
    ("meta_params=term_weights", "loss=terms"),
    ("meta_params=soft_targets", "loss=soft_targets"),
    ("meta_params=gaussian_noise", "loss=augmented"),
    ("meta_params=noise_and_examples", *AUGMENTED, "loss.augmentation=noise"),
    ("meta_params.sparse=true", "meta_optimizer=sparse_adam"),
    ("schedule=linear_warmup", "transform=clip_norm", "limits.num_steps=2"),
    ("schedule@stages.student.schedule=cosine_warmup", "estimator=checkpointed", "limits.num_steps=2"),
    ("objective=regularised",),
    ("objective=all_stages",),
    ("objective=surrogate",),
    ("handover=gumbel_samples", "handover.generate=null"),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options_run_on_digits(options, tmp_path):
    run(tmp_path, *DIGITS, *options)
    assert result(tmp_path)["status"] == "complete"
    assert set(result(tmp_path)["test"]) == {"learned", "uniform"}
    assert all(record["hypergradient_norm"] > 0 for record in records(tmp_path))


HANDOVERS = ("generated", "expected_embeddings", "gumbel_samples", "hidden_states")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [*([f"handover={name}"] for name in HANDOVERS), ["meta_params=token_weights"]], ids=str
)
def test_options_run_on_dates(options, tmp_path):
    run(tmp_path, *DATES, *options)
    assert all(record["hypergradient_norm"] > 0 for record in records(tmp_path))


def test_what_was_learned_is_shown(tmp_path, capsys):
    run(tmp_path, *DIGITS, "meta_params=gaussian_noise", "loss=augmented")
    assert "noise strength" in capsys.readouterr().out


def test_soft_labels_on_inputs_alone_are_refused_for_an_encoder_decoder(tmp_path):
    with pytest.raises(metaopt.ConfigError, match="handover=decoded or generated"):
        run(tmp_path, *DATES, "handover=soft_labels")


def test_a_student_of_another_vocabulary_is_refused_before_training(tmp_path):
    with pytest.raises(metaopt.ConfigError, match=r"stage 'student': .*same tokenizer"):
        run(tmp_path, *DATES, "stages.student.model.vocab_size=400")
    assert not (tmp_path / "metrics.jsonl").exists()


# --- loops


@pytest.mark.parametrize(("carry", "restarts"), [("always", ()), ("never", (1, 2, 3)), ("2", (2,))])
def test_carry_decides_when_a_stage_starts_afresh(carry, restarts, tmp_path, monkeypatch):
    seen: list[tuple[int, list[str]]] = []
    weights: list[torch.Tensor] = []
    original = metaopt.Chain.reset

    def watched(chain: metaopt.Chain, stages: Any = None) -> None:
        names = list(stages)
        original(chain, names)
        seen.append((len(seen) + 1, names))
        weights.append(next(chain.stages["student"].model.parameters()).detach().clone())

    monkeypatch.setattr(metaopt.Chain, "reset", watched)
    run(tmp_path, *DIGITS, "final=none", f"stages.student.carry={carry}", "trainer.meta_steps=3")
    assert [step for step, names in seen if "student" in names] == list(restarts)
    drawn = [weights[step - 1] for step in restarts]
    for i, first in enumerate(drawn):  # a fresh initialisation each time
        assert all(not torch.equal(first, other) for other in drawn[i + 1 :])


def test_one_stage_and_three_stages(tmp_path):
    for name, stages in (("reweight", {"model"}), ("assistant", {"teacher", "assistant", "student"})):
        run(tmp_path / name, f"experiment={name}", *QUICK)
        assert {path.name for path in (tmp_path / name / "models").iterdir()} == stages
        assert all(record["hypergradient_norm"] > 0 for record in records(tmp_path / name))


def test_the_best_and_the_last_meta_parameters_are_kept(tmp_path):
    run(tmp_path, *DIGITS, "final=none", "trainer.meta_steps=3")
    best, last = (load_file(tmp_path / f"meta_params{which}.safetensors")["logits"] for which in ("", "_last"))
    assert not torch.equal(best, last)
    for which, expected in ((False, best), (True, last)):
        table = metaopt.ExampleWeights(len(best))
        metaopt.load_meta_params(table, tmp_path, last=which)
        assert torch.equal(table.logits, expected)
    with pytest.raises(metaopt.ConfigError, match="does not fit the meta-parameters ExampleWeights"):
        metaopt.load_meta_params(metaopt.ExampleWeights(3), tmp_path)


def test_a_run_can_start_from_what_another_has_learned(tmp_path):
    run(tmp_path / "first", *DIGITS, "final=none")
    options = ("trainer.meta_steps=0", "final=retrain", "final.num_steps=1", "data.num_unlabelled=300")
    run(tmp_path / "second", *DIGITS, *options, f"trainer.start_from={tmp_path / 'first'}")
    learned = [load_file(tmp_path / name / "meta_params.safetensors")["logits"] for name in ("first", "second")]
    assert torch.equal(*learned)
    assert set(result(tmp_path / "second")["test"]) == {"learned"}
    with pytest.raises(metaopt.ConfigError, match=r"trainer\.start_from: .*there is no such file"):
        run(tmp_path / "third", *DIGITS, f"trainer.start_from={tmp_path / 'nowhere'}")


# --- what A is used for afterwards


def test_the_final_retrain_saves_the_models_to_use(tmp_path):
    run(tmp_path, *DIGITS, "final=retrain", "final.num_steps=1")
    assert set(result(tmp_path)["test"]) == {"learned"}
    for stage in ("teacher", "student"):
        final, on_the_way = (
            load_file(tmp_path / folder / stage / "model.safetensors") for folder in ("final_models", "models")
        )
        assert any(not torch.equal(final[name], on_the_way[name]) for name in final)


def test_no_final_training(tmp_path, capsys):
    run(tmp_path, *DIGITS, "final=none")
    assert set(result(tmp_path)["test"]) == {"trained"}
    assert "test, of the models trained on the way" in capsys.readouterr().out
    assert not (tmp_path / "final_models").exists()
