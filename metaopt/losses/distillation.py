"""Losses that learn from an earlier stage's trained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    """Base of the losses that learn from an earlier stage's trained model.

    Args:
        upstream: its name; None for the stage just before.
    """

    def __init__(self, upstream: str | None = None) -> None:
        self.upstream = upstream
        self.reads = (upstream,) if upstream else ()

    def teacher(self, upstream: Upstream) -> FunctionalModel:
        """Return the upstream model that this loss learns from."""
        return find_upstream(upstream, self.upstream, type(self).__name__)

    def student_inputs(self, model: FunctionalModel, batch: Any, upstream: Upstream) -> tuple[dict[str, Tensor], Any]:
        """Return what the student reads of a batch, and the upstream model's output that it was made from, if any.

        The batch as it is, unless a subclass makes something else of it, in the graph. Training, `PipelineLoss` and
        scoring all ask here, so that the student always reads what it was trained on.

        Args:
            model: the student.
            batch: of any stream, or only the inputs in it.
            upstream: name → trained model of the earlier stages.
        """
        return model_inputs(batch, model), None

    def taught(self, upstream: Upstream, batch: Batch, **options: Any) -> Any:
        """Return what the upstream model says to a batch, in the graph."""
        teacher = self.teacher(upstream)
        inputs = model_inputs(batch, teacher)
        starts = {"decoder_input_ids", "decoder_inputs_embeds", "labels"}
        is_encoder_decoder = getattr(getattr(teacher, "config", None), "is_encoder_decoder", False)
        if is_encoder_decoder and not starts & set(inputs):
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
        teacher = upstream.get(self.upstream or list(upstream)[-1])
        needs, has = (None if module is None else num_classes(module) for module in (teacher, model))
        if needs is None or has is None or needs == has:
            return None
        return (
            f"{type(self).__name__}: the teacher tells {needs} classes (tokens) apart, and the student {has}: soft "
            "labels need the same vocabulary for both, token by token. Build both with the same tokenizer; across "
            "tokenizers nothing but text can be handed over, and text carries no gradient"
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
            raise ConfigError(f"Distillation: temperature={temperature} must be above 0")
        self.temperature = temperature

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        target = logits_of(self.taught(upstream, batch))
        output = model(**model_inputs(batch, model))
        return soft_label_loss(logits_of(output), target, aligned_labels(model, batch.get("labels")), self.temperature)


def soft_label_loss(logits: Tensor, target: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Return `τ² · mean KL(softmax(target/τ) ‖ softmax(logits/τ))` over examples and counted positions.

    Args:
        logits: of the student, [B, C] or [B, L, C].
        target: logits of the teacher, same shape.
        labels: only their −100 entries are read: positions that do not count; None counts all.
        temperature: τ.
    """
    if logits.shape != target.shape:
        raise StageError(
            f"the student's logits have shape {list(logits.shape)}, the teacher's {list(target.shape)}: soft labels "
            "need the same classes (vocabulary) and the same positions for both"
        )
    log_q, log_p = (F.log_softmax(z / temperature, dim=-1) for z in (logits, target))
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    counts = None if labels is None else labels != IGNORED
    return temperature**2 * mean_over_positions(divergence, counts).mean()


class HiddenStates(FromUpstream):
    """Feed the student with the teacher's last decoder hidden states, and teach it the teacher's soft labels.

    The student gets them as `decoder_inputs_embeds`, in the graph; both models are encoder-decoders of one hidden
    size. `L = τ² · mean KL(teacher ‖ student)`.

    Args:
        upstream: the teacher's stage; None for the stage just before.
        temperature: τ > 0.
    """

    def __init__(self, upstream: str | None = None, temperature: float = 1.0) -> None:
        super().__init__(upstream)
        if not temperature > 0:
            raise ConfigError(f"HiddenStates: temperature={temperature} must be above 0")
        self.temperature = temperature

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        inputs, taught = self.student_inputs(model, batch, upstream)
        return soft_label_loss(logits_of(model(**inputs)), logits_of(taught), batch.get("labels"), self.temperature)

    def student_inputs(self, model: FunctionalModel, batch: Any, upstream: Upstream) -> tuple[dict[str, Tensor], Any]:
        """Return the batch with the teacher's hidden states in place of the decoder's tokens."""
        taught = self.taught(upstream, batch, output_hidden_states=True)
        states = getattr(taught, "decoder_hidden_states", None)
        if states is None:
            raise StageError("HiddenStates: the upstream model returns no decoder_hidden_states; use Distillation")
        inputs = model_inputs({**batch, "decoder_inputs_embeds": states[-1]}, model)
        inputs.pop("decoder_input_ids", None)
        return inputs, taught


class HardLabels:
    """Labels by the teacher's argmax: refused, since no gradient passes through it.

    Raises:
        ConfigError: always, and says what to write instead.
    """

    def __init__(self, upstream: str | None = None) -> None:
        raise ConfigError(
            "HardLabels: argmax is piecewise constant, its derivative is zero, so the hypergradient would stop at the "
            "teacher's labels. Write Distillation(...) (soft labels) or HiddenStates(...) instead; with handover: "
            "decoded the student trains on the teacher's decoded output and its soft labels carry the gradient"
        )
