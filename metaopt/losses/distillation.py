"""Losses that learn from an earlier stage's trained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, StageError, did_you_mean
from metaopt.core.contracts import InnerLoss, Upstream
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.view import FunctionalModel
from metaopt.losses.logits import (
    IGNORED,
    Batch,
    aligned_labels,
    logits_of,
    mean_over_positions,
    model_inputs,
    num_classes,
)


def find_upstream(upstream: Upstream, name: str | None, reader: str) -> FunctionalModel:
    """Return the upstream model called `name`, or that of the stage just before; say what is wrong otherwise."""
    if not upstream:
        raise ConfigError(f"{reader} learns from an earlier stage, but its stage is the first of the chain")
    name = name or list(upstream)[-1]
    if name not in upstream:
        raise ConfigError(f"{reader}: no earlier stage {name!r}{did_you_mean(name, upstream)}")
    return upstream[name]


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

        The batch (of any stream, or only the inputs in it) as it is, unless a subclass makes something else of it, in
        the graph. Training, `PipelineLoss` and scoring all ask here, so that the student always reads what it was
        trained on.
        """
        return model_inputs(batch, model), None

    def taught(self, upstream: Upstream, batch: Batch, **options: Any) -> Any:
        """Return what the upstream model says to a batch, in the graph."""
        teacher = self.teacher(upstream)
        inputs = model_inputs(batch, teacher)
        is_encoder_decoder = getattr(getattr(teacher, "config", None), "is_encoder_decoder", False)
        if is_encoder_decoder and not {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & set(inputs):
            raise ConfigError(
                f"{type(self).__name__}: the teacher is an encoder-decoder, and the batch holds no decoder_input_ids "
                f"and no labels (it has: {', '.join(batch)}); let the teacher write them: Stage(..., "
                "batches=handover.Decoded(...)) or Generated(...); with a config: handover=decoded or generated"
            )
        return teacher(**inputs, **options)

    def problem_with(self, model: nn.Module, upstream: Mapping[str, nn.Module]) -> str | None:
        """Say so where teacher and student do not have the same classes, so that soft labels mean nothing."""
        if not upstream:
            return f"{type(self).__name__} learns from an earlier stage, but its stage is the first of the chain"
        needs, has = num_classes(upstream.get(self.upstream or list(upstream)[-1])), num_classes(model)
        if needs is None or has is None or needs == has:
            return None
        return (
            f"{type(self).__name__}: the teacher tells {needs} classes (tokens) apart, and the student {has}: soft "
            "labels need one vocabulary; build both with the same tokenizer (across tokenizers nothing but text can be "
            "handed over, and text carries no gradient)"
        )


class Distillation(FromUpstream):
    """Learn from an upstream model's soft labels (Hinton et al., 2015, arXiv:1503.02531).

    `L = τ² · mean KL(softmax(z_teacher/τ) ‖ softmax(z_student/τ))`, both models on the same batch. The teacher's
    logits stay in the graph, so the hypergradient passes through them.

    Args:
        upstream: the teacher's stage; None for the stage just before.
        temperature: τ > 0.
    """

    def __init__(self, upstream: str | None = None, temperature: float = 1.0) -> None:
        super().__init__(upstream)
        if not temperature > 0:
            raise ConfigError(f"{type(self).__name__}: temperature={temperature} must be above 0")
        self.temperature = temperature

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
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
        """Return the batch with the teacher's hidden states in place of the decoder's tokens."""
        taught = self.taught(upstream, batch, output_hidden_states=True)
        states = getattr(taught, "decoder_hidden_states", None)
        if states is None:
            raise StageError("HiddenStates: the upstream model returns no decoder_hidden_states; use Distillation")
        inputs = model_inputs({**batch, "decoder_inputs_embeds": states[-1]}, model)
        inputs.pop("decoder_input_ids", None)
        return inputs, taught


def HardLabels(upstream: str | None = None) -> NoReturn:  # noqa: N802  # a loss by its name, as all the others
    """Refuse labels by the teacher's argmax, through which no gradient passes, and say what to write instead."""
    raise ConfigError(
        "HardLabels: argmax is piecewise constant, its derivative is zero, so the hypergradient would stop at the "
        "teacher's labels. Write Distillation(...) (soft labels) or HiddenStates(...) instead; with handover: decoded "
        "the student trains on the teacher's decoded output and its soft labels carry the gradient"
    )


def soft_label_loss(logits: Tensor, target: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Return `τ² · mean KL(softmax(target/τ) ‖ softmax(logits/τ))` over examples and counted positions.

    Both are logits [B, C] or [B, L, C]; of the labels only the −100 entries are read, which do not count (None counts
    all).
    """
    require_same_classes(logits, target)
    log_q, log_p = [F.log_softmax(z / temperature, dim=-1) for z in (logits, target)]
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    counts = None if labels is None else labels != IGNORED
    return temperature**2 * mean_over_positions(divergence, counts).mean()


def require_same_classes(logits: Tensor, target: Tensor) -> None:
    """Raise if the student's logits and what the teacher says do not have one shape."""
    if logits.shape != target.shape:
        raise StageError(
            f"the student's logits have shape {list(logits.shape)}, the teacher's {list(target.shape)}: both need the "
            "same classes (vocabulary) and the same positions"
        )
