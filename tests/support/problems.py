"""Small chains of trainings on which the library and the references are compared; uses neither of the two.

A problem is a chain of trainings, a meta-objective, a validation batch and meta-parameters, all in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from closed_forms import LinearTraining, closed_form
from networks import LENGTH, VOCABULARY, Convolution, Gained, Perceptron, bert2bert
from reference import Objective, Problem, Tensors, Training
from torch import Tensor, nn

BATCH = 4
REGULARISATION = 0.02


class Values(nn.Module):
    """One vector of meta-parameters, read as `phi.values`."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


def normal(seed: int) -> Callable[..., Tensor]:
    """Standard normal draws in float64 from a generator of their own."""
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_float32(problem: Problem) -> Problem:
    """The same problem in float32, moved in place; its optimizers must be factories."""
    batches = [batch for stage in problem.chain.values() for batch in stage.batches]
    for batch in [*batches, problem.batch]:
        batch.update({key: value.float() for key, value in batch.items() if value.is_floating_point()})
    for stage in problem.chain.values():
        stage.model.float()
    problem.phi.float()
    return problem


# --- linear stages with a closed form


def linear_stages(num_stages: int, momentum: float) -> tuple[dict[str, LinearTraining], Problem]:
    """Up to three ridge stages; the third learns from both others; the first, the third and the meta-loss read φ."""
    draw = normal(num_stages)
    common: dict[str, Any] = {"lr": 0.1, "momentum": momentum, "ridge": 0.05}
    velocity = draw(3) if momentum else None
    third = {"first": -0.5, "second": 0.7}
    stages = {
        "first": LinearTraining(draw(6, 3), draw(6), draw(3), 5, weighted=True, velocity=velocity, **common),
        "second": LinearTraining(draw(7, 3), draw(7), draw(3), 4, upstream={"first": 1.5}, **common),
        "third": LinearTraining(draw(6, 3), draw(6), draw(3), 3, upstream=third, weighted=True, **common),
    }
    stages = dict(list(stages.items())[:num_stages])
    chain = {name: stage.training() for name, stage in stages.items()}
    batch = {"inputs": draw(5, 3), "labels": draw(5)}
    return stages, Problem(
        chain, regularised_error(list(stages)[-1], REGULARISATION), batch, Values(draw(6).abs() + 0.2)
    )


def regularised_error(stage: str, strength: float = 0.0) -> Objective:
    """½ mean squared error of that stage's trained model + ½ strength ‖φ‖²: a meta-loss that may read φ itself."""

    def objective(trained: Any, batch: Tensors, phi: Any) -> Tensor:
        error = trained[stage](batch["inputs"])[:, 0] - batch["labels"]
        return (error**2).mean() / 2 + strength / 2 * (phi.values**2).sum()

    return objective


def closed_hypergradient(stages: dict[str, LinearTraining], problem: Problem) -> Tensors:
    """The hypergradient of `regularised_error` by matrix algebra."""
    phi, batch = problem.phi.values.detach(), problem.batch
    theta, jacobian = list(closed_form(stages, phi).values())[-1]
    error = batch["inputs"] @ theta - batch["labels"]
    return {"values": error @ batch["inputs"] @ jacobian / len(error) + REGULARISATION * phi}


# --- one small network, for the tables over optimizers


def small_network(factory: Callable[..., torch.optim.Optimizer], warm: bool = False) -> Problem:
    """A tanh network with a dead input and a scalar gain; if `warm`, its optimizer has taken two steps already."""
    draw = normal(0)
    model = Gained()
    batches = [{"inputs": draw(4, 3), "labels": draw(4)} for _ in range(2)]
    for batch in batches:
        batch["inputs"][:, 2] = 0.0  # the gradient of its weights is exactly 0: Adam's square root at 0
    optimizer = warmed_up(model, factory, batches) if warm else factory
    stage = Training(model, optimizer, weighted_squared_error, batches, num_steps=4)
    return Problem(
        {"only": stage}, regularised_error("only"), {"inputs": draw(4, 3), "labels": draw(4)}, Values(draw(4) ** 2)
    )


def weighted_squared_error(model: Any, batch: Tensors, phi: Any, upstream: Any) -> Tensor:
    """mean φᵢ (model(xᵢ) − yᵢ)²."""
    return (phi.values * (model(batch["inputs"])[:, 0] - batch["labels"]) ** 2).mean()


def warmed_up(
    model: nn.Module, factory: Callable[..., torch.optim.Optimizer], batches: list[Tensors]
) -> torch.optim.Optimizer:
    """An optimizer over `model` that has taken one step per batch on the plain squared error."""
    optimizer = factory(model.parameters())
    for batch in batches:
        optimizer.zero_grad()
        (model(batch["inputs"])[:, 0] - batch["labels"]).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


# --- classifiers and encoder-decoders


class ByPosition(nn.Module):
    """Weights w = σ(a), or n softmax(a), chosen by an entry of the batch: `index` or `source`."""

    def __init__(self, logits: Tensor, key: str, parametrisation: str = "softmax") -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.key, self.parametrisation = key, parametrisation

    def forward(self, batch: Tensors) -> Tensor:
        powers = self.logits.exp()
        if self.parametrisation == "sigmoid":
            return (powers / (1 + powers))[batch[self.key]]
        return len(powers) * (powers / powers.sum())[batch[self.key]]


def inputs_of(batch: Tensors) -> Tensors:
    """What a model receives."""
    return {key: value for key, value in batch.items() if key not in ("labels", "index", "source")}


def logits_of(output: Any) -> Tensor:
    """Class scores of a plain model or of a Hugging Face one."""
    return output if isinstance(output, Tensor) else output.logits


def per_example(values: Tensor) -> Tensor:
    """[B] or [B, L] → mean over positions [B]."""
    return values if values.dim() == 1 else values.mean(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits)[label], mean over positions [B]."""
    return -per_example(logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0])


def weighted_cross_entropy(model: Any, batch: Tensors, phi: Any, upstream: Any) -> Tensor:
    """mean_i w_i(φ) ℓ_i."""
    return (phi(batch) * cross_entropy(logits_of(model(**inputs_of(batch))), batch["labels"])).mean()


def soft_labels(
    model: Any, batch: Tensors, phi: Any, upstream: Any, *, teacher: str, temperature: float = 1.0
) -> Tensor:
    """τ² mean_i Σ_c p_c (log p_c − log q_c), p of the teacher and q of the student, both at temperature τ."""
    log_p = F.log_softmax(logits_of(upstream[teacher](**inputs_of(batch))) / temperature, -1)
    log_q = F.log_softmax(logits_of(model(**inputs_of(batch))) / temperature, -1)
    return temperature**2 * per_example((log_p.exp() * (log_p - log_q)).sum(-1)).mean()


def validation_loss(stage: str) -> Objective:
    """Mean cross-entropy of one trained stage."""

    def objective(trained: Any, batch: Tensors, phi: Any) -> Tensor:
        return cross_entropy(logits_of(trained[stage](**inputs_of(batch))), batch["labels"]).mean()

    return objective


def text_batch(draw: Callable[..., Tensor]) -> Tensors:
    """Random tokens in and out; the last position of the first example is masked.

    Token 0 does not occur: BERT's embeddings give their padding row no gradient, so a tied padding row that is read
    as an input makes every gradient differ from the slope of the loss.
    """
    tokens = 1 + (draw(3, BATCH, LENGTH) * 100).long() % (VOCABULARY - 1)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, -1] = 0
    return {
        "input_ids": tokens[0],
        "attention_mask": mask,
        "decoder_input_ids": tokens[1],
        "labels": tokens[2],
        "index": torch.arange(BATCH),
        "source": torch.arange(BATCH) % 3,
    }


def feature_batch(draw: Callable[..., Tensor], num_labels: int = 3) -> Tensors:
    """Random features [B, 16] and labels."""
    return {
        "inputs": draw(BATCH, 16),
        "labels": (draw(BATCH) * 100).long() % num_labels,
        "index": torch.arange(BATCH),
        "source": torch.arange(BATCH) % 3,
    }


Factory = Callable[..., torch.optim.Optimizer]
ADAM: Factory = functools.partial(torch.optim.Adam, lr=0.02, eps=1e-2)  # at 1e-8 a cold step is almost a sign
MOMENTUM: Factory = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def distilled_text(teacher: Factory = ADAM, student: Factory = ADAM, dropout: float = 0.0) -> Problem:
    """BERT2BERT → BERT2BERT: weights per source in the teacher's loss, soft labels at temperature 2 for the student."""
    torch.manual_seed(1)
    draw = normal(1)
    soft = functools.partial(soft_labels, teacher="teacher", temperature=2.0)
    chain = {
        "teacher": Training(bert2bert(dropout), teacher, weighted_cross_entropy, [text_batch(draw)] * 2, 2),
        "student": Training(bert2bert(dropout), student, soft, [text_batch(draw)], 2),
    }
    return Problem(chain, validation_loss("student"), text_batch(draw), ByPosition(draw(3), "source"))


def distilled_features(
    teacher: Factory = ADAM, student: Factory = ADAM, *, batch_norm: bool = False, dropout: float = 0.0
) -> Problem:
    """Perceptron → convolution: weights per example in the teacher's loss, soft labels for the student."""
    torch.manual_seed(2)
    draw = normal(2)
    soft = functools.partial(soft_labels, teacher="teacher")
    first, second = Perceptron(16, 3, dropout), Convolution(3, batch_norm, dropout)
    chain = {
        "teacher": Training(
            first.double(), teacher, weighted_cross_entropy, [feature_batch(draw), feature_batch(draw)], 3
        ),
        "student": Training(second.double(), student, soft, [feature_batch(draw), feature_batch(draw)], 3),
    }
    return Problem(chain, validation_loss("student"), feature_batch(draw), ByPosition(draw(BATCH), "index", "sigmoid"))


def fed_with_hidden_states() -> Problem:
    """BERT2BERT → BERT2BERT whose decoder reads the teacher's last hidden states instead of tokens, in training and on
    validation data."""
    problem = distilled_text(MOMENTUM, ADAM)

    def answers(model: Any, batch: Tensors, teacher: Any) -> tuple[Tensor, Tensor]:
        inputs = inputs_of(batch)
        taught = teacher(**inputs, output_hidden_states=True)
        del inputs["decoder_input_ids"]
        return model(**inputs, decoder_inputs_embeds=taught.decoder_hidden_states[-1]).logits, taught.logits

    def fed(model: Any, batch: Tensors, phi: Any, upstream: Any) -> Tensor:
        log_q, log_p = (z.log_softmax(-1) for z in answers(model, batch, upstream["teacher"]))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def objective(trained: Any, batch: Tensors, phi: Any) -> Tensor:
        logits, _ = answers(trained["student"], batch, trained["teacher"])
        return cross_entropy(logits, batch["labels"]).mean()

    return replace(problem.with_stage("student", loss=fed), objective=objective)


def probed_text() -> Problem:
    """BERT2BERT → perceptron, a student that reads the teacher's last hidden states and learns its soft labels."""
    torch.manual_seed(3)
    draw = normal(3)

    def probe(model: Any, batch: Tensors, phi: Any, upstream: Any) -> Tensor:
        taught = upstream["teacher"](**inputs_of(batch), output_hidden_states=True)
        log_q = model(taught.decoder_hidden_states[-1]).log_softmax(-1)
        return -(taught.logits.softmax(-1) * log_q).sum(-1).mean()

    def objective(trained: Any, batch: Tensors, phi: Any) -> Tensor:
        taught = trained["teacher"](**inputs_of(batch), output_hidden_states=True)
        return cross_entropy(trained["student"](taught.decoder_hidden_states[-1]), batch["labels"]).mean()

    chain = {
        "teacher": Training(bert2bert(), MOMENTUM, weighted_cross_entropy, [text_batch(draw)], 2),
        "student": Training(Perceptron(8, VOCABULARY).double(), ADAM, probe, [text_batch(draw)], 2),
    }
    return Problem(chain, objective, text_batch(draw), ByPosition(draw(BATCH), "index", "sigmoid"))
