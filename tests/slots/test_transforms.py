"""Inner training as people write it: schedules, clipping, accumulation, groups, frozen weights, autocast, dropout.

Each is set beside the loop that a user would write in plain PyTorch: trajectory within 1e-12, hypergradient within 1e-8
of central differences of that loop, and both estimators alike to 1e-12.
"""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from hydra import compose, initialize_config_module
from networks import Gained
from plain_runs import Recipe, assert_proven, batches, example_weights, hypergradient, meta_loss, weights_of, without
from reference import relative_error
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import lr_scheduler

import metaopt
from metaopt.app.build import build_chain, build_data
from metaopt.app.config import prepare, with_facts
from metaopt.estimators import Checkpointed

MOMENTUM = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = functools.partial(torch.optim.Adam, lr=0.03, eps=1e-3)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.03, eps=1e-3, weight_decay=0.3)


# --- schedules

SCHEDULES = {
    "StepLR": (ADAM, functools.partial(lr_scheduler.StepLR, step_size=2, gamma=0.3)),
    "MultiStepLR": (MOMENTUM, functools.partial(lr_scheduler.MultiStepLR, milestones=[1, 3])),
    "ExponentialLR": (ADAM, functools.partial(lr_scheduler.ExponentialLR, gamma=0.8)),
    "CosineAnnealingLR": (ADAMW, functools.partial(lr_scheduler.CosineAnnealingLR, T_max=7)),
    "CosineAnnealingWarmRestarts": (ADAM, functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3)),
    "LambdaLR": (ADAM, functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step))),
    "LinearLR": (MOMENTUM, functools.partial(lr_scheduler.LinearLR, start_factor=0.1, total_iters=4)),
    "OneCycleLR moves betas": (ADAM, functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=12)),
    "OneCycleLR moves momentum": (MOMENTUM, functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=12)),
    "CyclicLR": (MOMENTUM, functools.partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2)),
    "linear warm-up": (
        ADAM,
        functools.partial(transformers.get_linear_schedule_with_warmup, num_warmup_steps=2, num_training_steps=8),
    ),
    "cosine warm-up": (
        ADAMW,
        functools.partial(transformers.get_cosine_schedule_with_warmup, num_warmup_steps=2, num_training_steps=8),
    ),
    "SequentialLR": (
        ADAM,
        functools.partial(
            metaopt.sequential,
            schedules=[
                functools.partial(lr_scheduler.LinearLR, start_factor=0.1, total_iters=2),
                functools.partial(lr_scheduler.CosineAnnealingLR, T_max=8),
            ],
            milestones=[2],
        ),
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    optimizer, schedule = SCHEDULES[name]
    recipe = Recipe(optimizer, schedule=schedule)
    found = assert_proven(recipe, example_weights())
    assert relative_error(hypergradient(without(recipe, schedule=None), example_weights()), found) > 1e-2


def test_a_schedule_that_has_ended_says_so():
    schedule = functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=3)
    with pytest.raises(metaopt.ConfigError, match=r"schedule: OneCycleLR at step 4: .*total steps"):
        Recipe(MOMENTUM, schedule=schedule, num_steps=6).chain().unroll(example_weights())


def test_a_schedule_and_overrides_do_not_overwrite_each_other():
    schedule = functools.partial(lr_scheduler.StepLR, step_size=2)
    recipe = Recipe(ADAM, schedule=schedule, slots={"overrides": lambda meta_params, t: {"lr": 0.1}})
    with pytest.raises(metaopt.ConfigError, match="schedule and overrides both give 'lr'"):
        recipe.chain().unroll(example_weights())


def over_its_own(schedule):
    return schedule(MOMENTUM([nn.Parameter(torch.zeros(1))]))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda optimizer: 3, "the factory returned a int"),
        ("cosine", r"a str was given; give .*: schedule=functools.partial\(torch"),
        (
            over_its_own(functools.partial(lr_scheduler.StepLR, step_size=3)),
            r"a StepLR was given; .*: schedule=functools.partial\(StepLR, ...\)",
        ),
        (over_its_own(SCHEDULES["linear warm-up"][1]), r"schedule=functools.partial\(LambdaLR, ...\)"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule, message):
    with pytest.raises(metaopt.ConfigError, match=message):
        Recipe(ADAM, schedule=schedule).chain()


# --- clipping

CLIPS = {
    "norm": (metaopt.ClipNorm(0.5), lambda params: clip_grad_norm_(params, 0.5)),
    "norm, some steps": (metaopt.ClipNorm(1.0), lambda params: clip_grad_norm_(params, 1.0)),
    "norm inf": (metaopt.ClipNorm(0.2, norm_type=float("inf")), lambda p: clip_grad_norm_(p, 0.2, float("inf"))),
    "norm 1": (metaopt.ClipNorm(1.5, 1.0), lambda params: clip_grad_norm_(params, 1.5, 1.0)),
    "value": (metaopt.ClipValue(0.3), lambda params: clip_grad_value_(params, 0.3)),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["momentum", "adam"])
@pytest.mark.parametrize("name", CLIPS)
def test_clipping(name, optimizer):
    transform, clip = CLIPS[name]
    recipe = Recipe(optimizer, clip=clip, slots={"transform": transform})
    found = assert_proven(recipe, example_weights())
    assert relative_error(hypergradient(without(recipe, slots=None), example_weights()), found) > 1e-2


def test_clipping_what_is_small_changes_nothing():
    gradients = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(())}
    for transform in (metaopt.ClipNorm(6.0), metaopt.ClipValue(4.5)):
        assert all(torch.equal(after, gradients[n]) for n, after in transform(gradients).items())
    assert metaopt.ClipNorm(1.0)({}) == {}
    torch.testing.assert_close(metaopt.ClipNorm(1.0)(gradients)["a"], torch.tensor([0.6, 0.8]))
    assert metaopt.ClipValue(3.5)(gradients)["a"].tolist() == [3.0, 3.5]


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
def test_the_adjoint_of_clipping_by_norm_can_be_differentiated_once_more(scale):
    """At gradients of 0, below the norm and above it: against central differences, and autograd's own adjoint."""
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((), (3,), (2, 2))]
    at = [(scale * x).requires_grad_() for x in drawn]

    def clipped(*gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(metaopt.ClipNorm(0.5)(dict(enumerate(gradients))).values())  # type: ignore[arg-type]

    def plainly(*gradients: Tensor) -> tuple[Tensor, ...]:
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        return tuple(g * (0.5 / (norm + 1e-6)).clamp(max=1.0) for g in gradients)

    assert torch.autograd.gradcheck(clipped, at)
    assert not scale or torch.autograd.gradgradcheck(clipped, at)
    if scale:
        for x, y in zip(*(torch.autograd.grad(f(*at), at, drawn) for f in (clipped, plainly)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("make", [lambda: metaopt.ClipNorm(0.0), lambda: metaopt.ClipValue(-1.0)])
def test_a_bound_of_nothing_is_refused(make):
    with pytest.raises(metaopt.ConfigError, match="must be above 0"):
        make()


# --- accumulation, groups, frozen parameters, dropout


def test_accumulated_micro_batches():
    recipe = Recipe(ADAM, accumulate=2)
    found = assert_proven(recipe, example_weights())
    assert relative_error(hypergradient(without(recipe, accumulate=1), example_weights()), found) > 1e-2


GROUPED = functools.partial(
    metaopt.grouped, optimizer=ADAMW, no_decay=["*.bias", "gain"], groups=[{"names": ["last.*"], "lr": 0.1}]
)


def groups_by_hand(model):
    """The parameter groups that `GROUPED` stands for."""
    return torch.optim.AdamW(
        [
            {"params": [model.gain, model.first.bias], "weight_decay": 0.0},
            {"params": [model.first.weight]},
            {"params": [model.last.weight], "lr": 0.1},
            {"params": [model.last.bias], "lr": 0.1, "weight_decay": 0.0},
        ],
        lr=0.03,
        eps=1e-3,
        weight_decay=0.3,
    )


def test_weight_decay_and_rates_by_group():
    recipe = Recipe(GROUPED, plain_optimizer=groups_by_hand)
    found = assert_proven(recipe, example_weights())
    assert relative_error(hypergradient(Recipe(ADAMW), example_weights()), found) > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_decay": ["*.bais"]}, r"no_decay: no trained parameter is called '\*\.bais'; names are such as gain"),
        ({"no_decay": "*.bias"}, r"must be a list of patterns: \['\*\.bias'\]"),
        ({"groups": [{"names": ["first.*"], "lrr": 0.1}]}, r"AdamW has no hyperparameter 'lrr'.*did you mean 'lr'"),
    ],
)
def test_groups_that_mean_nothing_are_refused(options, message):
    with pytest.raises(metaopt.ConfigError, match=message):
        Recipe(functools.partial(metaopt.grouped, optimizer=ADAMW, **options)).chain()


def test_groups_need_names():
    with pytest.raises(metaopt.ConfigError, match="without names; give it to a stage"):
        metaopt.grouped(list(Gained().parameters()), ADAMW, no_decay=["*.bias"])


def half_frozen():
    model = Gained()
    model.first.requires_grad_(False)
    return model


class Dropped(Gained):
    """The same network with dropout."""

    def forward(self, inputs):
        return self.gain * self.last(nn.functional.dropout(self.first(inputs).tanh(), 0.4, self.training))


@pytest.mark.parametrize("model", [half_frozen, Dropped], ids=["frozen", "dropout"])
def test_frozen_parameters_and_dropout(model):
    recipe = Recipe(ADAM, model=model)
    found = assert_proven(recipe, example_weights())
    assert relative_error(hypergradient(Recipe(ADAM), example_weights()), found) > 1e-2


def test_all_of_it_together():
    recipe = Recipe(
        GROUPED,
        model=Dropped,
        schedule=SCHEDULES["OneCycleLR moves betas"][1],
        clip=CLIPS["norm"][1],
        accumulate=2,
        slots={"transform": CLIPS["norm"][0]},
        plain_optimizer=groups_by_hand,
    )
    assert_proven(recipe, example_weights())


# --- autocast


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["momentum", "adam"])
def test_autocast(optimizer):
    """bfloat16 leaves no digits for a central difference: the plain run, and the estimators against each other."""
    recipe = Recipe(optimizer, autocast="bfloat16", dtype=torch.float32)
    weights = example_weights().float()
    plain = weights_of(recipe.run_plainly(weights))
    exact = weights_of(without(recipe, autocast=None).run_plainly(weights))
    assert relative_error(exact, plain) > 1e-4
    assert relative_error(weights_of(recipe.chain().train(weights)["only"]), plain) == 0.0
    assert relative_error(weights_of(recipe.chain().unroll(weights)["only"]), plain) < 1e-5
    found = hypergradient(recipe, weights)
    for store in ("states", "gradients", "recompute"):
        swept = hypergradient(recipe, weights, Checkpointed(store=store))  # pyright: ignore[reportArgumentType]
        assert relative_error(swept, found) < 1e-4
    exactly = hypergradient(without(recipe, autocast=None), weights)
    assert 1e-4 < relative_error(found, exactly) < 0.1


def test_autocast_ends_with_the_inner_loss():
    seen = []

    def loss(model, batch, meta_params, upstream):
        seen.append(torch.is_autocast_enabled("cpu"))
        return model(batch["inputs"]).float().square().mean() * meta_params.logits.mean()

    stage = metaopt.Stage(Gained().float(), MOMENTUM, loss, batches(dtype=torch.float32), 2, autocast="bfloat16")
    trained = metaopt.Chain(only=stage).unroll(example_weights().float())
    assert seen == [True, True]
    assert not torch.is_autocast_enabled("cpu")
    assert {p.dtype for p in trained["only"].params.values()} == {torch.float32}


# --- by config

DIGITS = ["experiment=digits", "debug=tiny"]


def chain_of(*overrides):
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        config = prepare(compose("config", overrides=[*DIGITS, *overrides]), overrides)
    bundle = build_data(config)
    return build_chain(with_facts(config, bundle.facts), bundle)


BY_CONFIG = {
    "a schedule": (["schedule@stages.student.schedule=cosine"], lambda s: s._schedule is not None),
    "schedules in sequence": (["schedule@stages.student.schedule=warmup_cosine"], lambda s: s._schedule.at(0)["lr"]),
    "clipping": (["transform@stages.student.transform=clip_norm"], lambda s: s.transform.max_norm == 1.0),
    "clipping a value": (["transform@stages.student.transform=clip_value"], lambda s: s.transform.value == 1.0),
    "a function": (
        ["transform@stages.student.transform=custom", "stages.student.transform._target_=small.module_state"],
        lambda s: callable(s.transform),
    ),
    "accumulation": (["stages.student.accumulate=2"], lambda s: s.accumulate == 2),
    "autocast": (["stages.student.autocast=bfloat16"], lambda s: s.autocast == torch.bfloat16),
    "groups": (["optimizer=grouped"], lambda s: [g["weight_decay"] for g in s.optimizer.param_groups] == [0.01, 0.0]),
    "learned rates": (
        ["loss=cross_entropy", "meta_params=learning_rate", "+stages.student.overrides._target_=metaopt.FromMeta"],
        lambda s: isinstance(s.overrides, metaopt.FromMeta),
    ),
    **{
        name: ([f"optimizer={name}"], lambda s, name=name: type(s.optimizer).__name__.lower() == name)
        for name in ("nadam", "radam", "adamax", "adagrad", "adadelta", "rmsprop", "asgd")
    },
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", BY_CONFIG)
def test_by_config(name):
    overrides, holds = BY_CONFIG[name]
    assert holds(chain_of(*overrides).stages["student"])


def test_a_misspelt_argument_of_a_clip_is_told_before_training():
    with pytest.raises(metaopt.ConfigError, match=r"stages\.student\.transform\.max_nrom: .*did you mean 'max_norm'"):
        chain_of("transform@stages.student.transform=clip_norm", "+stages.student.transform.max_nrom=1")


def test_the_meta_loss_of_the_plain_run_is_what_is_differentiated():
    recipe = Recipe(ADAM)
    weights = example_weights()
    plain = recipe.run_plainly(weights)
    with torch.no_grad():
        expected = float(meta_loss(plain))
        assert float(meta_loss(recipe.chain().unroll(weights)["only"])) == pytest.approx(expected, rel=1e-12)
