"""Hand-overs in the graph that feed a student with what its teacher says, as soft tokens instead of hard ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, StageError
from metaopt.core.contracts import Upstream
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.core.view import FunctionalModel
from metaopt.losses.distillation import Distillation, FromUpstream, require_same_classes
from metaopt.losses.logits import counted, logits_of, mean_over_positions, model_inputs


class ExpectedEmbeddings(Distillation):
    """Feed the student with the expected embedding of the teacher's next token, and teach it the soft labels.

    `e_t = Σ_v softmax(z_teacher,t−1 / τ)_v E_v`, E being the student's own input embeddings, in the graph of both
    models; the loss is that of `Distillation`. An encoder-decoder gets them in its decoder, behind the batch's first
    decoder token; any other model behind its first input token.

    Args:
        upstream, temperature: as in `Distillation`.
        shift: True where position t predicts token t + 1; False for masked models, which predict token t itself.
    """

    def __init__(self, upstream: str | None = None, temperature: float = 1.0, shift: bool = True) -> None:
        super().__init__(upstream, temperature)
        self.shift = shift

    def student_inputs(
        self, model: FunctionalModel, batch: Any, upstream: Upstream
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the batch with expected embeddings in place of tokens, and the teacher's logits."""
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
        upstream: the teacher's stage; None for the stage just before.
        temperature: τ > 0, or a function of the stage's inner step, such as `Annealed(...)`.
        straight_through: False feeds and teaches y itself, whose gradient is exact.
        shift: as in `ExpectedEmbeddings`.
    """

    def __init__(
        self,
        upstream: str | None = None,
        temperature: float | Callable[[int], float] = 1.0,
        straight_through: bool = True,
        shift: bool = True,
    ) -> None:
        super().__init__(upstream)
        if not callable(temperature) and not temperature > 0:
            raise ConfigError(f"GumbelSamples: temperature={temperature} must be above 0")
        self.temperature, self.straight_through, self.shift = temperature, straight_through, shift

    @property
    def biased_because(self) -> str | None:
        """Why the gradient is an estimate, which `check_hypergradient` passes on; None where it is exact."""
        reason = "GumbelSamples: the derivative of a straight-through sample is taken to be that of the soft one"
        return reason if self.straight_through else None

    def __call__(
        self, model: FunctionalModel, batch: Any, meta_params: AnyMetaParameters, upstream: Upstream
    ) -> Tensor:
        inputs, sample = self.student_inputs(model, batch, upstream)
        log_q = logits_of(model(**inputs)).log_softmax(-1)
        require_same_classes(log_q, sample)
        return mean_over_positions(-(sample * log_q).sum(-1), counted(model, batch)).mean()

    def student_inputs(
        self, model: FunctionalModel, batch: Any, upstream: Upstream
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the batch, with a sample in place of tokens where it is a sequence, and the sample."""
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
        if not (start > 0 and end > 0 and num_steps >= 1):
            raise ConfigError(
                f"Annealed: start={start} and end={end} must be above 0, num_steps={num_steps} at least 1"
            )
        self.start, self.end, self.num_steps = start, end, num_steps

    def __call__(self, step: int) -> float:
        """Return the temperature of inner step t."""
        return self.start * (self.end / self.start) ** min(step / self.num_steps, 1.0)


def with_soft_tokens(
    model: FunctionalModel, inputs: Mapping[str, Tensor], tokens: Tensor, shift: bool = True
) -> dict[str, Tensor]:
    """Return a Hugging Face model's inputs with its tokens replaced by mixtures of its own embeddings.

    Args:
        inputs: with `decoder_input_ids`, or `input_ids` for models without an encoder; the ids are taken out.
        tokens: weights over the vocabulary [B, L, V].
        shift: keep the first hard token, and move the others back by one.
    """
    inputs = dict(inputs)
    decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    ids = inputs.pop("decoder_input_ids" if decoder else "input_ids")
    with model.as_module() as module:
        matrix = token_embeddings(module)
    if matrix is None:
        raise StageError(f"{model!r} has no get_input_embeddings(): soft tokens need a Hugging Face model of tokens")
    if len(matrix) != tokens.shape[-1]:
        raise StageError(
            f"the teacher says {tokens.shape[-1]} tokens, and the student embeds {len(matrix)}: mixtures of embeddings "
            "need one vocabulary; build both models with the same tokenizer"
        )
    mixed = tokens @ matrix
    if shift:
        mixed = torch.cat([matrix[ids[:, :1]], mixed[:, :-1]], dim=1)
    return {**inputs, "decoder_inputs_embeds" if decoder else "inputs_embeds": mixed}


def token_embeddings(module: nn.Module) -> Tensor | None:
    """Return what each token becomes in a model's decoder (or in the model, if it has none) [V, H], or None."""
    part: Any = module
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        part = part.get_decoder()
    try:
        table = part.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(table, nn.Embedding):
        return None
    return table.weight * getattr(table, "embed_scale", 1.0)  # BART and Gemma scale what they look up
