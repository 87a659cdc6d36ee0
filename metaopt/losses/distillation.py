"""Losses that learn from an earlier stage's trained model, and what of its output they feed the student with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, StageError
from metaopt.base.ranges import check_counts
from metaopt.core.contracts import InnerLoss, Upstream
from metaopt.core.view import FunctionalModel, Models
from metaopt.losses.logits import (
    IGNORED,
    Batch,
    aligned_labels,
    counted,
    is_encoder_decoder,
    logits_of,
    mean_over_positions,
    model_inputs,
    num_classes,
)
from metaopt.meta_params.tables import check_positive


def find_upstream(upstream: Upstream, name: str | None, reader: str) -> FunctionalModel:
    """Return the upstream model called `name`, or that of the stage just before; say what is wrong otherwise."""
    if not upstream:
        raise ConfigError(f"{reader} learns from an earlier stage, but its stage is the first of the chain")
    return Models(upstream)[name or list(upstream)[-1]]


class FromUpstream(InnerLoss):
    """Base of the losses that learn from the trained model of an earlier stage: `upstream`, or the one just before."""

    def __init__(self, upstream: str | None = None) -> None:
        self.upstream = upstream
        self.reads = (upstream,) if upstream else ()

    def teacher(self, upstream: Upstream) -> FunctionalModel:
        """Return the upstream model that this loss learns from."""
        return find_upstream(upstream, self.upstream, type(self).__name__)

    def student_inputs(self, model: FunctionalModel, batch: Any, upstream: Upstream) -> tuple[dict[str, Tensor], Any]:
        """Return what the student reads of a batch, and the upstream model's output that it was made from, if any.

        A subclass may make something else of the batch, in the graph. Training, `PipelineLoss` and scoring all ask
        here, so that the student always reads what it was trained on.
        """
        return model_inputs(batch, model), None

    def taught(self, upstream: Upstream, batch: Batch, **options: Any) -> Any:
        """Return what the upstream model says to a batch, in the graph."""
        teacher = self.teacher(upstream)
        inputs = model_inputs(batch, teacher)
        if is_encoder_decoder(teacher) and not {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & set(inputs):
            raise ConfigError(
                f"{type(self).__name__}: the teacher is an encoder-decoder, and the batch holds no decoder_input_ids "
                "and no labels; let it write them: metaopt.Decoded(batches, ...), handover=decoded or generated"
            )
        return teacher(**inputs, **options)

    def problem_with(self, model: nn.Module, upstream: Mapping[str, nn.Module]) -> str | None:
        """Say so where teacher and student do not have the same classes, so that soft labels mean nothing."""
        if not upstream:
            return f"{type(self).__name__} learns from an earlier stage, but its stage is the first of the chain"
        needs, has = num_classes(upstream.get(self.upstream or list(upstream)[-1])), num_classes(model)
        if needs is None or has is None or needs == has:
            return None
        found = f"the teacher tells {needs} classes (tokens) apart, and the student {has}"
        return f"{type(self).__name__}: {found}: soft labels need one vocabulary; build both with the same tokenizer"


class Distillation(FromUpstream):
    """Learn from an upstream model's soft labels (Hinton et al., 2015, arXiv:1503.02531).

    `L = τ² · mean KL(softmax(z_teacher/τ) ‖ softmax(z_student/τ))` with τ = `temperature` > 0, both models on the same
    batch. The teacher's logits stay in the graph, so the hypergradient passes through them.
    """

    def __init__(self, upstream: str | None = None, temperature: float = 1.0) -> None:
        super().__init__(upstream)
        check_positive(type(self).__name__, temperature=temperature)
        self.temperature = temperature

    def __call__(self, model: FunctionalModel, batch: Any, meta_params: Any, upstream: Upstream) -> Tensor:
        inputs, taught = self.student_inputs(model, batch, upstream)
        target = logits_of(self.taught(upstream, batch) if taught is None else taught)
        labels = aligned_labels(model, batch.get("labels"))
        return soft_label_loss(logits_of(model(**inputs)), target, labels, self.temperature)


class HiddenStates(Distillation):
    """Feed the student with the teacher's last decoder hidden states, and teach it the teacher's soft labels.

    The student gets them as `decoder_inputs_embeds`, in the graph; both models are encoder-decoders of one hidden
    size. The loss is that of `Distillation`.
    """

    def student_inputs(self, model: FunctionalModel, batch: Any, upstream: Upstream) -> tuple[dict[str, Tensor], Any]:
        taught = self.taught(upstream, batch, output_hidden_states=True)
        states = getattr(taught, "decoder_hidden_states", None)
        if states is None:
            raise StageError("HiddenStates: the upstream model returns no decoder_hidden_states; use Distillation")
        inputs = model_inputs({**batch, "decoder_inputs_embeds": states[-1]}, model)
        inputs.pop("decoder_input_ids", None)
        return inputs, taught


class ExpectedEmbeddings(Distillation):
    """Feed the student with the expected embedding of the teacher's next token, and teach it the soft labels.

    `e_t = Σ_v softmax(z_teacher,t−1 / τ)_v E_v`, E being the student's own input embeddings, in the graph of both
    models; the loss is that of `Distillation`. An encoder-decoder gets them in its decoder, behind the batch's first
    decoder token; any other model behind its first input token. `shift=False` is for masked models, whose position t
    predicts token t itself.
    """

    def __init__(self, upstream: str | None = None, temperature: float = 1.0, shift: bool = True) -> None:
        super().__init__(upstream, temperature)
        self.shift = shift

    def student_inputs(self, model: FunctionalModel, batch: Any, upstream: Upstream) -> tuple[dict[str, Tensor], Any]:
        target = logits_of(self.taught(upstream, batch))
        tokens = (target / self.temperature).softmax(-1)
        return with_soft_tokens(model, model_inputs(batch, model), tokens, self.shift), target


class GumbelSamples(FromUpstream):
    """Train the student on samples of the teacher, drawn by the Gumbel-softmax trick (Jang et al., 2017,
    arXiv:1611.01144).

    `y = softmax((log p_teacher + g) / τ)`, g drawn at each inner step from the replayed random state; the sample is the
    one-hot argmax of y, and its derivative is taken to be that of y (straight-through: a biased estimate, which central
    differences of the jumping sample cannot confirm). The sample is the student's label,
    `L = −mean Σ_v y_v log q_v`, and for sequences also its input, as in `ExpectedEmbeddings`.

    Args:
        temperature: τ > 0, or a function of the stage's inner step, such as `Annealed(...)`.
        straight_through: False feeds and teaches y itself, whose gradient is exact.
        upstream, shift: as in `ExpectedEmbeddings`.
    """

    def __init__(
        self,
        upstream: str | None = None,
        temperature: float | Callable[[int], float] = 1.0,
        straight_through: bool = True,
        shift: bool = True,
    ) -> None:
        super().__init__(upstream)
        if not callable(temperature):
            check_positive("GumbelSamples", temperature=temperature)
        self.temperature, self.straight_through, self.shift = temperature, straight_through, shift

    @property
    def biased_because(self) -> str | None:
        """Why the gradient is an estimate, which `check_hypergradient` passes on; None where it is exact."""
        reason = "GumbelSamples: the derivative of a straight-through sample is taken to be that of the soft one"
        return reason if self.straight_through else None

    def __call__(self, model: FunctionalModel, batch: Any, meta_params: Any, upstream: Upstream) -> Tensor:
        inputs, sample = self.student_inputs(model, batch, upstream)
        log_q = logits_of(model(**inputs)).log_softmax(-1)
        require_same_classes(log_q, sample)
        return mean_over_positions(-(sample * log_q).sum(-1), counted(model, batch)).mean()

    def student_inputs(self, model: FunctionalModel, batch: Any, upstream: Upstream) -> tuple[dict[str, Tensor], Any]:
        inputs = model_inputs(batch, model)
        step = model.step if callable(self.temperature) else 0  # asked only if it matters: it differs from step to step
        sample = self.sample(logits_of(self.taught(upstream, batch)), step)
        return inputs if sample.dim() == 2 else with_soft_tokens(model, inputs, sample, self.shift), sample

    def sample(self, logits: Tensor, step: int) -> Tensor:
        """Return a sample for each position [..., V], at the temperature of this inner step."""
        temperature = self.temperature(step) if callable(self.temperature) else self.temperature
        if not temperature > 0:
            raise StageError(f"GumbelSamples: temperature({step}) = {temperature} must be above 0")
        noise = -torch.empty_like(logits).exponential_().log()
        soft = ((logits.log_softmax(-1) + noise) / temperature).softmax(-1)
        if not self.straight_through:
            return soft
        return F.one_hot(soft.argmax(-1), soft.shape[-1]) + soft - soft.detach()


class Annealed:
    """A temperature that falls from `start` to `end` in n = `num_steps` steps: `start · (end/start)^min(t/n, 1)`."""

    def __init__(self, start: float, end: float, num_steps: int) -> None:
        check_positive("Annealed", start=start, end=end)
        check_counts("Annealed", num_steps=num_steps)
        self.start, self.end, self.num_steps = start, end, num_steps

    def __call__(self, step: int) -> float:
        return self.start * (self.end / self.start) ** min(step / self.num_steps, 1.0)


def HardLabels(upstream: str | None = None) -> NoReturn:  # noqa: N802  # a loss by its name, as all the others
    """Refuse labels by the teacher's argmax, through which no gradient passes, and say what to write instead."""
    instead = "write Distillation(...) or HiddenStates(...); handover=decoded writes labels and carries the gradient"
    raise ConfigError(f"HardLabels: argmax is piecewise constant, so the hypergradient would stop there; {instead}")


def soft_label_loss(logits: Tensor, target: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Return `τ² · mean KL(softmax(target/τ) ‖ softmax(logits/τ))` over examples and counted positions.

    Both are logits [B, C] or [B, L, C]; of the labels only the −100 entries are read, which do not count.
    """
    require_same_classes(logits, target)
    log_q, log_p = [F.log_softmax(z / temperature, dim=-1) for z in (logits, target)]
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    counts = None if labels is None else labels != IGNORED
    return temperature**2 * mean_over_positions(divergence, counts).mean()


def require_same_classes(logits: Tensor, target: Tensor) -> None:
    """Raise if the student's logits and what the teacher says do not have one shape."""
    if logits.shape != target.shape:
        shapes = f"logits have shape {list(logits.shape)}, the teacher's {list(target.shape)}"
        raise StageError(f"the student's {shapes}: both need the same classes (vocabulary) and positions")


def with_soft_tokens(
    model: FunctionalModel, inputs: Mapping[str, Tensor], tokens: Tensor, shift: bool = True
) -> dict[str, Tensor]:
    """Return a Hugging Face model's inputs with its tokens replaced by mixtures of its own embeddings.

    The ids (`decoder_input_ids`, or `input_ids` for models without an encoder) are taken out; `tokens` are weights over
    the vocabulary [B, L, V], all moved on by one behind the first hard token with `shift`.
    """
    inputs = dict(inputs)
    decoder = is_encoder_decoder(model)
    ids = inputs.pop("decoder_input_ids" if decoder else "input_ids")
    with model.as_module() as module:
        matrix = token_embeddings(module)
    if matrix is None:
        raise StageError(f"{model!r} has no get_input_embeddings(): soft tokens need a Hugging Face model of tokens")
    mixed = tokens @ matrix
    if shift:
        mixed = torch.cat([matrix[ids[:, :1]], mixed[:, :-1]], dim=1)
    return {**inputs, "decoder_inputs_embeds" if decoder else "inputs_embeds": mixed}


def token_embeddings(module: nn.Module) -> Tensor | None:
    """Return what each token becomes in a model's decoder (or in the model, if it has none) [V, H], or None."""
    whole: Any = module
    part = whole.get_decoder() if is_encoder_decoder(module) else whole
    try:
        table = part.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    # BART and Gemma scale what they look up
    return table.weight * getattr(table, "embed_scale", 1.0) if isinstance(table, nn.Embedding) else None
