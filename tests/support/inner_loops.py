"""Everything that an inner loop can do, each as a small chain with its meta-parameters and meta-objective."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import library
import plain_runs
import problems
import torch
from networks import Gained, bert2bert
from reference import Problem, Tensors, Training
from small import MOMENTUM, feature_batches, one_stage, text_batch, two_stages
from small import example_weights as of_examples
from small_models import Linear, Network, Recurrent, Tied, TwoNames
from torch import Tensor, nn
from users_losses import ASKING, LEAVES, Drawing, of_leaves

import metaopt
from metaopt.estimators import Estimator

ADAM = functools.partial(torch.optim.Adam, lr=0.05, eps=1e-2)
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 5}


@dataclass
class Work:
    """A chain, and what its hypergradient is taken of."""

    chain: metaopt.Chain
    phi: Any
    objective: Callable[[Any], Tensor]

    def meta_loss(self) -> Tensor:
        """Unroll, then the meta-objective."""
        return self.objective(self.chain.unroll(self.phi))

    def hypergradient(self) -> Tensors:
        """By name."""
        found = metaopt.hypergradient(self.meta_loss(), self.phi)
        return {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}


Make = Callable[[Estimator | None], Work]


def of_problem(make: Callable[[], Problem], losses: Mapping[str, Any] | None = None, phi: Any = None) -> Make:
    """A problem of `problems.py`; `losses` and `phi` in place of its own."""

    def made(estimator: Estimator | None) -> Work:
        problem = make()
        given = problem.phi if phi is None else randomised(phi())
        chain = library.as_chain(problem, losses, estimator)
        return Work(chain, given, lambda trained: problem.objective(trained, problem.batch, given))

    return made


def of_small(make: Callable[..., metaopt.Chain], **options: Any) -> Make:
    """A chain of `small.py` that learns example weights."""

    def made(estimator: Estimator | None) -> Work:
        chain, phi = make(estimator=estimator, **options), of_examples()
        objective = metaopt.ValidationLoss(list(chain.stages)[-1])
        return Work(chain, phi, lambda trained: objective(trained, feature_batches(1, seed=8)[0], phi))

    return made


def of_recipe(optimizer: Any, learned: Callable[[], nn.Module], slot: str = "overrides", **options: Any) -> Make:
    """One stage of `plain_runs.py` whose hyperparameters, or initial weights, are learned beside example weights."""

    def made(estimator: Estimator | None) -> Work:
        recipe = plain_runs.Recipe(optimizer, slots={slot: metaopt.FromMeta("learned"), **options})
        phi = {"weights": plain_runs.example_weights(), "learned": learned().double()}
        return Work(recipe.chain(estimator), phi, lambda trained: plain_runs.meta_loss(trained["only"]))

    return made


def randomised(module: Any) -> Any:
    """The same module in float64, its parameters moved at random, so that no two are alike."""
    draw = problems.normal(6)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.5 * draw(*parameter.shape))
    return module


# --- chains that are not to be had elsewhere


def from_the_teacher() -> Problem:
    """The student starts from the teacher's weights, all of them learned through."""
    problem = problems.distilled_features(problems.MOMENTUM, problems.MOMENTUM)
    problem = problem.with_stage("student", model=problem.chain["teacher"].private_copy()[0])
    return problem.with_stage("student", initial=lambda phi, upstream: dict(upstream["teacher"].params))


def three_networks() -> Problem:
    """The third stage learns from both before it; the second is in the graph of the first."""
    problem = problems.distilled_features(ADAM, problems.MOMENTUM)

    def both(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
        first = problems.soft_labels(model, batch, phi, upstream, teacher="teacher")
        second = problems.soft_labels(model, batch, phi, upstream, teacher="student", temperature=2.0)
        return first + second + problems.weighted_cross_entropy(model, batch, phi, upstream)

    batches = problem.chain["teacher"].batches
    torch.manual_seed(7)
    third = Training(problems.Perceptron(16, 3).double(), ADAM, both, batches, 2)
    return Problem({**problem.chain, "third": third}, problems.validation_loss("third"), problem.batch, problem.phi)


def reading_in_train_mode(model: Any, batch: Any, phi: Any, upstream: Any) -> Tensor:
    """Soft labels of a teacher that uses dropout and the batch's own statistics."""
    log_p = upstream["teacher"].train()(batch["inputs"]).log_softmax(-1)
    log_q = model(batch["inputs"]).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def train_mode_teacher(estimator: Estimator | None) -> Work:
    """A teacher with dropout and batch norm, read in train mode."""
    work = of_small(two_stages)(estimator)
    work.chain.stages["student"].loss = reading_in_train_mode
    return work


class Counting(Network):
    """Its answers grow with the calls in train mode, which it counts in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.calls.add_(1.0)
        return super().forward(inputs) * (1 + 0.3 * self.calls)


def partly_frozen() -> nn.Module:
    """A network whose first layer is not trained."""
    model = Network(0.2)
    model.first.requires_grad_(False)
    return model


def adapted() -> Problem:
    """A network trained by low-rank adapters alone: peft's LoRA around frozen linear layers."""
    from peft import LoraConfig, get_peft_model

    problem = problems.distilled_features(ADAM, ADAM)
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["layers.0", "layers.3"], init_lora_weights=False, lora_dropout=0.2)
    model: Any = get_peft_model(problem.chain["teacher"].private_copy()[0], config)  # type: ignore[arg-type]
    return problem.with_stage("teacher", model=model.double())


def decoded(estimator: Estimator | None) -> Work:
    """A student on the answers that its teacher has written."""
    torch.manual_seed(0)
    batches, weights = [text_batch(0), text_batch(1)], of_examples(4)
    options: dict[str, Any] = {"estimator": estimator, "seed": 3}
    written, distilled = metaopt.Decoded(batches, **TOKENS), metaopt.Distillation()
    chain = metaopt.Chain(
        teacher=metaopt.Stage(bert2bert(), MOMENTUM, metaopt.WeightedLoss(), batches, 2, **options),
        student=metaopt.Stage(bert2bert(), ADAM, distilled, written, 2, **options),
    )
    objective = metaopt.ValidationLoss("student")
    return Work(chain, weights, lambda trained: objective(trained, text_batch(2), weights))


def through_the_teacher() -> Problem:
    """BERT2BERT → BERT2BERT, the student reading what the teacher makes of the validation batch."""
    return replace(problems.distilled_text(), objective=metaopt.PipelineLoss("student"))


def asking(loss: Callable[..., Tensor], draws: Any = None) -> Make:
    """A student of this loss, and a teacher that draws in eval mode if it is given what: five steps on two batches."""

    def made(estimator: Estimator | None) -> Work:
        torch.manual_seed(2)
        options: dict[str, Any] = {"teacher": Drawing(draws), "student": Network(0.2), "num_steps": 5}
        work = of_small(two_stages, optimizer=ADAM, batches=feature_batches(2), **options)(estimator)
        work.chain.stages["student"].loss = loss
        return work

    return made


def warm(kind: str | type, **options: Any) -> Make:
    """An optimizer with state that earlier steps have left."""
    steps = 5 if kind == "RAdam" or not isinstance(kind, str) else 3
    factory = functools.partial(getattr(torch.optim, kind) if isinstance(kind, str) else kind, **options)
    return of_problem(lambda: problems.small_network(factory, warm=True).with_stage("only", num_steps=steps))


OPTIMIZERS: dict[str, Make] = {
    "SGD": warm("SGD", lr=0.1, momentum=0.9, dampening=0.4, weight_decay=0.2),
    "SGD, Nesterov": warm("SGD", lr=0.01, momentum=0.9, nesterov=True, maximize=True),
    "Adam, amsgrad": warm("Adam", lr=0.03, betas=(0.5, 0.5), amsgrad=True, weight_decay=0.2),
    "AdamW": warm("AdamW", lr=0.03, weight_decay=0.5, eps=1e-2),
    "NAdam": warm("NAdam", lr=0.03, momentum_decay=0.1, weight_decay=0.3, decoupled_weight_decay=True),
    "RAdam": warm("RAdam", lr=0.03, betas=(0.5, 0.8), eps=1e-2, weight_decay=0.2),
    "Adamax": warm("Adamax", lr=0.03, betas=(0.5, 0.8), eps=1e-2, weight_decay=0.2),
    "Adagrad": warm("Adagrad", lr=0.1, lr_decay=0.2, weight_decay=0.2),
    "Adadelta": warm("Adadelta", lr=0.7, rho=0.5, eps=1e-2, weight_decay=0.2),
    "RMSprop": warm("RMSprop", lr=0.01, centered=True, momentum=0.9, weight_decay=0.2, eps=1e-2),
    "ASGD": warm("ASGD", lr=0.1, lambd=0.1, alpha=0.5, t0=1, weight_decay=0.2),
    "Muon": warm(metaopt.Muon, lr=0.03, adamw_eps=1e-3),
    "Adafactor": warm(metaopt.Adafactor, lr=0.03, relative_step=False, beta1=0.7),
}

SCHEDULE = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.7)
PLAIN: dict[str, Any] = {"optimizer": MOMENTUM, "teacher": Network(), "student": Network()}
BY_NAME = {"gain": 0.2, "first.weight": 0.01, "last.bias": 0.05}
features = problems.distilled_features

OPTIONS: dict[str, Make] = {
    "dropout and batch norm": of_small(two_stages, optimizer=ADAM),
    "clipping by norm": of_small(two_stages, **PLAIN, transform=metaopt.ClipNorm(0.05)),
    "clipping by value": of_small(two_stages, **PLAIN, transform=metaopt.ClipValue(0.02)),
    "schedule": of_small(two_stages, **PLAIN, schedule=SCHEDULE),
    "accumulation": of_small(two_stages, optimizer=ADAM, teacher=Network(0.2), student=Network(), accumulate=2),
    "rate per parameter": of_recipe(ADAM, lambda: metaopt.LearnedHyperparameters(lr=BY_NAME)),
    "decay, momentum": of_recipe(MOMENTUM, lambda: metaopt.LearnedHyperparameters(momentum=0.8, weight_decay=0.1)),
    "rate and betas, clipped": of_recipe(
        ADAM, lambda: metaopt.LearnedHyperparameters(lr=0.05, betas=(0.8, 0.95)), transform=metaopt.ClipNorm(0.3)
    ),
    "initial weights": of_recipe(ADAM, lambda: metaopt.InitialWeights(Gained(), ("first.*", "gain")), "initial"),
    "initial weights of the teacher": of_problem(from_the_teacher),
    "tied weights": of_small(two_stages, optimizer=ADAM, teacher=Tied(), student=TwoNames()),
    "LSTM": of_small(one_stage, model=Recurrent, optimizer=ADAM),
    "a buffer that is read": of_small(one_stage, model=Counting, optimizer=ADAM, num_steps=6),
    "frozen parameters": of_small(two_stages, optimizer=ADAM, teacher=partly_frozen(), student=Linear()),
    "LoRA": of_problem(adapted),
    "three stages": of_problem(three_networks),
    "three linear stages": of_problem(lambda: problems.linear_stages(3, 0.9)[1]),
    "teacher in train mode": train_mode_teacher,
}

TERMS = {"labels": metaopt.CrossEntropy(), "smoothing": metaopt.LabelSmoothing()}
noise = metaopt.AugmentedLoss(metaopt.CrossEntropy())

LOSSES: dict[str, Make] = {
    "soft labels": of_problem(features, {"student": metaopt.Distillation(temperature=2.0)}),
    "hidden states": of_problem(problems.fed_with_hidden_states, {"student": metaopt.HiddenStates()}),
    "probed hidden states": of_problem(problems.probed_text),
    "decoded": decoded,
    "expected embeddings": of_problem(through_the_teacher, {"student": metaopt.ExpectedEmbeddings()}),
    "Gumbel samples": of_problem(features, {"student": metaopt.GumbelSamples(temperature=0.7, straight_through=False)}),
    "straight-through samples": of_problem(features, {"student": metaopt.GumbelSamples()}),
    "augmentation": of_problem(features, {"teacher": noise}, metaopt.GaussianNoise),
    "weight network": of_problem(
        lambda: replace(features(problems.MOMENTUM, ADAM)),
        {"teacher": metaopt.WeightedLoss()},
        lambda: metaopt.WeightNetwork(4, features="inputs", num_features=16, normalise=True),
    ),
    "soft targets": of_problem(features, {"teacher": metaopt.SoftTargetLoss()}, lambda: metaopt.SoftTargets(4, 3)),
    "sparse tables": of_problem(
        features, {"teacher": metaopt.WeightedLoss()}, lambda: metaopt.ExampleWeights(9, sparse=True)
    ),
    "sparse soft targets": of_problem(
        features, {"teacher": metaopt.SoftTargetLoss()}, lambda: metaopt.SoftTargets(9, 3, sparse=True)
    ),
    "terms": of_problem(features, {"teacher": metaopt.SumOfLosses(TERMS)}, lambda: metaopt.TermWeights(list(TERMS))),
}

OF_USERS: dict[str, Make] = {
    **{name: asking(loss, draws) for name, (loss, draws, _) in ASKING.items()},
    **{name: of_problem(functools.partial(of_leaves, loss)) for name, loss in LEAVES.items()},
}


def annealed(estimator: Estimator | None) -> Work:
    """Samples whose temperature falls with the inner step."""
    loss = metaopt.GumbelSamples(temperature=metaopt.Annealed(2.0, 0.5, 3), straight_through=False)
    return of_problem(features, {"student": loss})(estimator)


def in_bfloat16(estimator: Estimator | None) -> Work:
    """Two networks in float32 whose losses are evaluated in bfloat16."""
    torch.manual_seed(2)
    batches, phi = feature_batches(), of_examples().float()
    options: dict[str, Any] = {"autocast": "bfloat16", "estimator": estimator, "seed": 4}
    chain = metaopt.Chain(
        teacher=metaopt.Stage(Network().float(), MOMENTUM, metaopt.WeightedLoss(), batches, 3, **options),
        student=metaopt.Stage(Network().float(), ADAM, metaopt.Distillation(), batches, 3, **options),
    )
    objective, batch = metaopt.ValidationLoss("student"), chain.move(feature_batches(1, seed=8)[0])
    return Work(chain, phi, lambda trained: objective(trained, batch, phi))
