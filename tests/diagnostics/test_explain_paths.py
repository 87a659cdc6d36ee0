"""Paths that are cut in part, end somewhere, or have no graph at all; and what an explanation leaves alone."""

from __future__ import annotations

import copy
import runpy
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cut_lines import line_of, seen, shown
from small import assert_same, chain_state, example_weights, feature_batches, one_stage, two_stages
from torch import nn

import metaopt

ROOT = Path(__file__).parent.parent.parent
BATCH = feature_batches(1, seed=8)[0]
STUDENT = metaopt.ValidationLoss("student")


def plain_loss(model, batch, meta_params, upstream):
    return metaopt.CrossEntropy()(model, batch, meta_params, upstream)


def two_factors(model, batch, meta_params, upstream):
    weights = meta_params(batch)
    share = weights.sum().detach()  # cut
    return (weights / share * F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")).sum()


def test_one_of_two_factors():
    chain = one_stage(two_factors)
    path = metaopt.explain_hypergradient(chain, metaopt.ValidationLoss("only"), BATCH, example_weights())["logits"]
    assert (path.status, path.routes) == ("partly cut", (("only",),))
    (cut,) = path.cuts
    assert seen(cut) == (".detach()", line_of(two_factors))
    assert cut.of == {("meta-parameter", "logits")}
    assert "its path is partly cut" in str(path)


def two_losses(model, batch, meta_params, upstream):
    logits, taught = model(batch["inputs"]), upstream["teacher"](batch["inputs"])
    hard = taught.argmax(-1)  # cut
    return F.cross_entropy(logits, taught.softmax(-1)) + F.cross_entropy(logits, hard)


def test_one_of_two_losses():
    chain = two_stages()
    chain.stages["student"].loss = two_losses
    path = metaopt.explain_hypergradient(chain, STUDENT, BATCH, example_weights())["logits"]
    assert (path.status, path.routes) == ("partly cut", (("teacher", "student"),))
    (cut,) = path.cuts
    assert seen(cut) == ("argmax", line_of(two_losses))
    assert cut.of == {("stage", "teacher")}


def weighed_but_hard(model, batch, meta_params, upstream):
    labels = upstream["teacher"](batch["inputs"]).argmax(-1)  # cut
    return (meta_params(batch) * F.cross_entropy(model(batch["inputs"]), labels, reduction="none")).mean()


def test_a_direct_path_beside_one_that_is_cut():
    chain = two_stages()
    chain.stages["student"].loss = weighed_but_hard
    path = metaopt.explain_hypergradient(chain, STUDENT, BATCH, example_weights())["logits"]
    assert (path.status, path.routes) == ("partly cut", (("student",),))
    assert list(map(seen, path.cuts)) == [("argmax", line_of(weighed_but_hard))]


def by_own_loss(model, batch, meta_params, upstream):
    losses = F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")
    difficulty = losses.detach()  # cut
    return (meta_params(batch) * difficulty * losses).mean()


def test_the_model_in_training_read_as_a_constant():
    found = metaopt.explain_hypergradient(
        one_stage(by_own_loss), metaopt.ValidationLoss("only"), BATCH, example_weights()
    )
    (cut,) = found["logits"].cuts
    assert (found["logits"].status, cut.of) == ("partly cut", {("stage", "only")})
    assert seen(cut) == (".detach()", line_of(by_own_loss))


def test_a_stage_that_ignores_the_one_before():
    chain = two_stages()
    chain.stages["student"].loss = plain_loss
    path = metaopt.explain_hypergradient(chain, STUDENT, BATCH, example_weights())["logits"]
    assert (path.status, path.cuts) == ("cut", ())
    assert path.remarks == (
        "no later stage and no meta-objective reads stage 'teacher': take upstream['teacher'] in a loss",
    )


def test_a_meta_parameter_that_nothing_reads():
    both = {"weights": example_weights(), "other": nn.Linear(1, 1, bias=False, dtype=torch.float64)}
    chain = two_stages()
    chain.stages["teacher"].loss = metaopt.WeightedLoss("weights")
    found = metaopt.explain_hypergradient(chain, STUDENT, BATCH, both)
    assert found.missing == ("other.weight",)
    assert found["other.weight"].remarks == (
        "nothing of the chain and no meta-objective reads meta-parameter 'other.weight'",
    )
    assert found["weights.logits"].status == "whole"


def test_a_term_without_the_weights_in_training():
    def additive(model, batch, meta_params, upstream):
        return F.cross_entropy(model(batch["inputs"]), batch["labels"]) + meta_params.logits.sum()

    found = metaopt.explain_hypergradient(one_stage(additive), metaopt.ValidationLoss("only"), BATCH, example_weights())
    (remark,) = found["logits"].remarks
    assert found.missing == ("logits",)
    assert "is read in the loss of stage 'only', but no gradient" in remark


def test_a_meta_loss_that_reads_another_stage():
    chain = two_stages()
    chain.stages["student"].loss = plain_loss
    healthy = metaopt.explain_hypergradient(chain, metaopt.ValidationLoss("teacher"), BATCH, example_weights())
    assert healthy["logits"].status == "whole"


# --- losses and objectives without any graph


def float_loss(model, batch, meta_params, upstream):
    return F.cross_entropy(model(batch["inputs"]), batch["labels"]).item()  # cut


def test_a_loss_that_is_no_tensor():
    found = metaopt.explain_hypergradient(
        one_stage(float_loss), metaopt.ValidationLoss("only"), BATCH, example_weights()
    )
    assert found.missing == ("logits",)
    assert any("the loss of stage 'only' must return a scalar tensor, got a float" in text for text in found.failures)
    assert not found.whole


def float_objective(trained, batch, meta_params) -> Any:
    return STUDENT(trained, batch, meta_params).item()  # cut


def test_an_objective_that_is_no_tensor():
    found = metaopt.explain_hypergradient(two_stages(), float_objective, BATCH, example_weights())
    (cut,) = found["logits"].cuts
    assert seen(cut) == (".item()", line_of(float_objective))
    assert found.failures == ("the meta-objective returns a float, not a tensor",)


# --- around it


@pytest.mark.parametrize("estimator", [metaopt.Unrolled(), metaopt.Checkpointed()], ids=repr)
def test_the_estimator_makes_no_difference(estimator):
    chain = two_stages(estimator=estimator)
    assert metaopt.explain_hypergradient(chain, STUDENT, BATCH, example_weights()).whole
    chain.stages["student"].loss = two_losses
    path = metaopt.explain_hypergradient(chain, STUDENT, BATCH, example_weights())["logits"]
    assert list(map(seen, path.cuts)) == [("argmax", line_of(two_losses))]


def test_nothing_of_the_chain_is_changed():
    chain, weights = two_stages(), example_weights()
    chain.stages["student"].loss = two_losses
    before, kept = chain_state(chain), copy.deepcopy(weights.state_dict())
    with torch.no_grad():
        first = str(metaopt.explain_hypergradient(chain, STUDENT, BATCH, weights))
    assert_same(chain_state(chain), before)
    assert_same(dict(weights.state_dict()), dict(kept))
    assert weights.logits.grad is None
    assert str(metaopt.explain_hypergradient(chain, STUDENT, BATCH, weights)) == first


def test_the_trainer_says_where_the_path_is_lost():
    chain, weights = two_stages(), example_weights()
    chain.stages["student"].loss = by_hard_labels
    optimizer = torch.optim.Adam(weights.parameters())
    trainer = metaopt.MetaTrainer(chain, STUDENT, weights, optimizer, [BATCH], seed=0)
    with pytest.raises(metaopt.MissingPathError) as raised:
        trainer.fit(1)
    text = str(raised.value)
    for part in ("meta-parameter 'logits'", "the loss of stage 'student'", "argmax", shown(by_hard_labels), "softmax"):
        assert part in text
    assert "explain_hypergradient" not in text


def by_hard_labels(model, batch, meta_params, upstream):
    return F.cross_entropy(model(batch["inputs"]), upstream["teacher"](batch["inputs"]).argmax(-1))  # cut


def test_meta_parameters_of_one_fate_are_told_together():
    def unweighted(model, batch, meta_params, upstream):
        return metaopt.CrossEntropy()(model, batch, meta_params, upstream)

    found = metaopt.explain_hypergradient(
        one_stage(unweighted), metaopt.ValidationLoss("only"), BATCH, metaopt.WeightNetwork(3).double()
    )
    assert len(found.missing) == 4
    assert str(found).count("no path to the meta-loss") == 4

    def detached(model, batch, meta_params, upstream):
        losses = F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")
        return (meta_params(batch, losses).detach() * losses).mean()  # cut

    found = metaopt.explain_hypergradient(
        one_stage(detached), metaopt.ValidationLoss("only"), BATCH, metaopt.WeightNetwork(3).double()
    )
    assert len(found.missing) == 4
    assert str(found).count("no path to the meta-loss") == 1


@pytest.mark.filterwarnings("ignore:stage 'M2' read decoder_inputs_embeds")  # the thread's own objective
def test_the_experiment_prints_what_its_readme_shows(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = ROOT / "experiments" / "cut_paths"
    runpy.run_path(str(folder / "run.py"))["main"]()
    printed = textwrap.indent(capsys.readouterr().out.strip(), "    ", lambda line: bool(line.strip()))
    assert printed in (folder / "README.md").read_text()
