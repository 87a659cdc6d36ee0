"""No cut is reported where there is none: all that is shipped, values that are logged, and library code that cuts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from library import as_chain
from networks import bert2bert
from problems import distilled_features, distilled_text, fed_with_hidden_states, linear_stages, probed_text
from small import ADAM, example_weights, feature_batches, one_stage, text_batch, two_stages

import metaopt
from metaopt.app import build
from metaopt.app.config import prepare
from metaopt.examples.forum_thread import GlobalScale, Step1, Step2, Step3, data

BATCH = feature_batches(1, seed=8)[0]
STUDENT = metaopt.ValidationLoss("student")

PROBLEMS = {
    "text": distilled_text,
    "features": lambda: distilled_features(batch_norm=True, dropout=0.2),
    "hidden states": fed_with_hidden_states,
    "probe": probed_text,
    "linear": lambda: linear_stages(3, 0.9)[1],
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name):
    problem = PROBLEMS[name]()
    found = metaopt.explain_hypergradient(as_chain(problem), problem.objective, problem.batch, problem.phi)
    assert found.whole, str(found)
    assert all(path.routes for path in found.paths)


DIGITS = ("experiment=digits", "debug=tiny")
DATES = ("data.num_train=64", "data.num_unlabelled=64", "data.num_validation=64", "data.num_selection=64")
DATES += ("debug=tiny", "model.hidden_size=16")
AUGMENTED = ("loss=augmented", "loss.loss._target_=metaopt.WeightedLoss", "+loss.loss.weights=examples")
OPTIONS = [
    (*DIGITS, "meta_params=class_weights", "transform@stages.teacher.transform=clip_norm"),
    (*DIGITS, "meta_params=weight_network"),
    (*DIGITS, "meta_params=term_weights", "loss=terms", "transform@stages.teacher.transform=clip_value"),
    (*DIGITS, "meta_params=soft_targets", "loss=soft_targets"),
    (*DIGITS, "meta_params=gaussian_noise", "loss=augmented"),
    (*DIGITS, "meta_params=noise_and_examples", *AUGMENTED, "loss.augmentation=noise"),
    (*DIGITS, "meta_params.sparse=true", "meta_optimizer=sparse_adam", "estimator=checkpointed"),
    (*DIGITS, "objective=regularised", "schedule@stages.teacher.schedule=cosine"),
    (*DIGITS, "objective=all_stages"),
    (*DIGITS, "objective=surrogate"),
    (*DIGITS, "handover=gumbel_samples", "handover.generate=null"),
    (*DATES, "handover=decoded", "meta_params=token_weights"),
    *(
        pytest.param((*DATES, f"handover={name}"), marks=pytest.mark.slow)
        for name in ("generated", "expected_embeddings", "gumbel_samples", "hidden_states")
    ),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options[-2:]))
def test_shipped_configs(options):
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        config = prepare(compose("config", overrides=list(options)), list(options))
    bundle = build.build_data(config)
    config.facts = bundle.facts
    chain, meta_params = build.build_chain(config, bundle), build.build_meta_params(config)
    batch = chain.move(next(iter(bundle.validation)))
    found = metaopt.explain_hypergradient(chain, build.build("objective", config.objective), batch, meta_params)
    assert found.paths
    assert found.whole, str(found)


def test_learned_hyperparameters_and_initial_weights():
    phi = {
        "rates": metaopt.LearnedHyperparameters(lr=0.1, momentum=0.9).double(),
        "start": metaopt.InitialWeights(one_stage().stages["only"].model),
    }
    chain = one_stage(
        metaopt.CrossEntropy(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        overrides=metaopt.FromMeta("rates"),
        initial=metaopt.FromMeta("start"),
    )
    found = metaopt.explain_hypergradient(chain, metaopt.ValidationLoss("only"), BATCH, phi)
    assert found.whole, str(found)
    assert len(found.paths) == 4


def test_the_pipeline_of_the_thread_whose_argmax_only_shifts_the_loss():
    bundle, scale = data(), GlobalScale().double()
    batch = next(iter(bundle.train))
    chain = metaopt.Chain(
        first=metaopt.Stage(bert2bert(), ADAM, Step1(), [batch], 2),
        second=metaopt.Stage(bert2bert(), ADAM, Step2(), [batch], 2),
    )
    with pytest.warns(UserWarning, match="stage 'second' read decoder_inputs_embeds, input_ids in training"):
        found = metaopt.explain_hypergradient(chain, Step3("second"), batch, scale)
    assert found.whole, str(found)


LOG = []


def logging_loss(model, batch, meta_params, upstream):
    logits, taught = model(batch["inputs"]), upstream["teacher"](batch["inputs"])
    loss = F.cross_entropy(logits, taught.softmax(-1))
    with torch.no_grad():
        agreement = (logits.argmax(-1) == taught.argmax(-1)).to(loss).mean()
    weights = meta_params.logits.detach().sigmoid()
    LOG.append((loss.item(), float(agreement), taught.max().tolist(), weights.numpy(), f"{loss:.3f}", weights.mean()))
    if loss > 1e6 or not bool(loss.isfinite()):
        raise AssertionError
    return loss


def logging_objective(trained, batch, meta_params):
    loss = STUDENT(trained, batch, meta_params)
    LOG.append((loss.item(), loss.detach()))
    return loss


def logging_transform(gradients):
    LOG.append([g.norm().item() for g in gradients.values()])
    return gradients


def test_values_that_are_only_logged():
    chain = two_stages(transform=logging_transform)
    chain.stages["student"].loss = logging_loss
    found = metaopt.explain_hypergradient(chain, logging_objective, BATCH, example_weights())
    assert LOG
    assert found.whole, str(found)


def test_masks_that_choose_as_a_relu_does():
    def confident(model, batch, meta_params, upstream):
        taught = upstream["teacher"](batch["inputs"]).softmax(-1)
        sure, _ = taught.max(-1)
        kept = (sure > 0.4).to(taught)
        losses = F.cross_entropy(model(batch["inputs"]), taught, reduction="none")
        return (kept * losses).mean() + torch.where(losses > 1, losses, 0.5 * losses**2).mean()

    chain = two_stages()
    chain.stages["student"].loss = confident
    assert metaopt.explain_hypergradient(chain, STUDENT, BATCH, example_weights()).whole


def test_hard_labels_that_a_shipped_hand_over_writes():
    written = metaopt.Decoded([text_batch()], bos_token_id=1, eos_token_id=2, pad_token_id=0, max_length=3)

    def chain(loss):
        teacher = metaopt.Stage(bert2bert(), ADAM, metaopt.WeightedLoss(), [text_batch()], 2)
        return metaopt.Chain(teacher=teacher, student=metaopt.Stage(bert2bert(), ADAM, loss, written, 2))

    soft, hard = (
        metaopt.explain_hypergradient(chain(loss), STUDENT, text_batch(8), example_weights(4))["logits"]
        for loss in (metaopt.Distillation(), metaopt.CrossEntropy())
    )
    assert soft.status == "whole"
    assert hard.status == "cut"
    assert [(cut.operation.name, cut.where) for cut in hard.cuts] == [("argmax", "the hand-over of stage 'student'")]
    assert "in the stage's loss, from upstream[...]" in str(hard)
