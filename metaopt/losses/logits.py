"""From a batch to a model's logits, and from logits to losses per example."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.base.errors import ConfigError, StageError
from metaopt.core.view import FunctionalModel

Batch = Mapping[str, Tensor]

NOT_FOR_MODELS = ("index", "source", "labels")  # entries of a batch that models never receive
IGNORED = -100  # label of a position that counts in no loss


# Of a module: which entries of a batch its forward takes (None: any), and whether its own loss shifts the labels.
_forwards: WeakKeyDictionary[nn.Module, tuple[frozenset[str] | None, bool]] = WeakKeyDictionary()


def _forward_of(model: Any) -> tuple[frozenset[str] | None, bool]:
    module = model.structure.module if isinstance(model, FunctionalModel) else model
    if not isinstance(module, nn.Module):
        return None, False
    if module not in _forwards:
        _forwards[module] = _taken(module), _shifts(module)
    return _forwards[module]


def _hugging_face(model: Any) -> Any:
    """Return the outermost Hugging Face model in a model, whatever wraps it, or None."""
    module = model.structure.module if isinstance(model, FunctionalModel) else model
    parts = module.modules() if isinstance(module, nn.Module) else ()
    return next((part for part in parts if hasattr(type(part), "main_input_name")), None)


def _taken(module: nn.Module) -> frozenset[str] | None:
    inner = _hugging_face(module)
    parameters = [*inspect.signature(module.forward).parameters.values()]
    if module is not inner and any(p.kind is p.VAR_KEYWORD for p in parameters):  # what it takes so it hands on
        if inner is None:
            return None
        parameters += inspect.signature(inner.forward).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


def _shifts(module: nn.Module) -> bool:
    part = _hugging_face(module)
    if part is None:
        return any(inspect.getattr_static(m, "loss_type", None) == "ForCausalLM" for m in module.modules())
    if is_encoder_decoder(part):
        return False
    codes = [inspect.unwrap(vars(kind)["forward"]).__code__ for kind in type(part).__mro__ if "forward" in vars(kind)]
    names = {name for code in codes for name in (*code.co_names, *code.co_varnames)}
    if "loss_function" not in names:  # a loss of its own: as it stands (masked models, BartForCausalLM), or shifted
        return bool(names & {"shift_logits", "shift_labels"})
    if part.loss_type is None and "_loss_function" not in vars(part):
        return True  # transformers' own default, which it would log a warning about
    return "shift_labels" in inspect.signature(part.loss_function).parameters


def model_inputs(batch: Batch, model: Any = None) -> dict[str, Tensor]:
    """Return the entries of a batch that a model receives: all but `index`, `source` and `labels`.

    With `model`, those that its forward names, as in Hugging Face's Trainer (a plain module with `**kwargs` gets all);
    an encoder-decoder without decoder inputs gets the ones that it makes of the labels itself.
    """
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"a batch is a {type(batch).__name__}; metaopt's own losses need a mapping of names to tensors "
            "({'input_ids': ..., 'labels': ...}); for other batches write an InnerLoss of your own"
        )
    inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_MODELS}
    if model is None:
        return inputs
    takes, labels = _forward_of(model)[0], batch.get("labels")
    if labels is not None and labels.dim() > 1 and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
        inputs |= _decoder_inputs(_hugging_face(model), labels)
    taken = {name: value for name, value in inputs.items() if takes is None or name in takes}
    return taken or inputs  # where it takes none of them, Python's own error shall name them


def _decoder_inputs(module: Any, labels: Tensor) -> dict[str, Tensor]:
    """Return what an encoder-decoder's decoder reads, made of the labels as the model itself does."""
    if not is_encoder_decoder(module):
        return {}
    shift = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        return {"labels": labels}  # it has no method for that: its forward does it
    ids = shift(labels)
    if module.config.model_type != "encoder-decoder":
        return {"decoder_input_ids": ids}
    return {"decoder_input_ids": ids, "decoder_attention_mask": (ids != module.config.pad_token_id).to(ids.dtype)}


def is_encoder_decoder(model: Any) -> bool:
    """Return whether a Hugging Face model's own config says so."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def logits_of(output: Any) -> Tensor:
    """Return a model's logits: the output itself, or its `.logits`."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        got = f"a {type(output).__name__} without .logits"
        raise StageError(f"the model returned {got}; return a tensor of logits, or write an InnerLoss of your own")
    return logits


def cross_entropy_per_example(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each example's cross-entropy in nats [B], mean over its positions.

    Labels [B] or [B, L] are those of the logits' places (`aligned_labels`); −100 marks positions that do not count.
    """
    return mean_over_positions(*cross_entropies(logits, labels))


def cross_entropies(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each label, and which ones count; both of the labels' shape."""
    if labels.is_floating_point():
        hint = "give labels.long(), or for probabilities of classes a loss of your own"
        raise StageError(f"labels are {labels.dtype}, and classes are numbered: {hint}")
    if labels.shape != logits.shape[:-1]:
        wanted = f"labels must have the shape {list(logits.shape[:-1])}"
        raise StageError(f"logits {list(logits.shape)} do not fit labels {list(labels.shape)}: {wanted}")
    try:
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), reduction="none", ignore_index=IGNORED)
    except IndexError as error:  # on an accelerator it is an assertion, long after
        known = f"0 to {logits.shape[-1] - 1}, or {IGNORED} where they do not count"
        raise StageError(f"labels must be one of the model's classes, {known}: {error}") from error
    return losses.view(labels.shape), labels != IGNORED


def aligned_labels(model: Any, labels: Any) -> Any:
    """Return the label that each of a model's logits is compared with, [B] or [B, L]; None where there are no labels.

    At position t a causal language model of Hugging Face, whatever wraps it, or a module with the attribute
    `loss_type = "ForCausalLM"` predicts label t + 1; every other model label t.
    """
    if labels is None or labels.dim() < 2 or not _forward_of(model)[1]:
        return labels
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def counted(model: Any, batch: Batch) -> Tensor | None:
    """Return which of a model's logits are compared with a label that counts; None (all) for a batch without labels."""
    labels = aligned_labels(model, batch.get("labels"))
    return None if labels is None else labels != IGNORED


def logits_and_labels(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return a model's logits for a labelled batch, and the label that each is compared with."""
    inputs = model_inputs(batch, model)
    if "labels" not in batch:
        raise ConfigError(f"the loss reads batch['labels'], which this batch lacks (it has: {', '.join(batch)})")
    return logits_of(model(**inputs)), aligned_labels(model, batch["labels"])


def label_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each label of a batch, and which ones count; both [B] or [B, L], as the labels.

    Also where a causal model predicts label t at position t − 1, its loss stands at t: so does the weight of a label.
    """
    logits, labels = logits_and_labels(model, batch)
    losses, counts = cross_entropies(logits, labels)
    return (losses, counts) if labels is batch["labels"] else (losses.roll(1, -1), counts.roll(1, -1))


def mean_over_positions(values: Tensor, counts: Tensor | None) -> Tensor:
    """Return the mean over all but the first axis [B], over the positions that `counts` marks."""
    if values.dim() == 1:
        return values
    if counts is None:
        return values.flatten(1).mean(1)
    counts = counts.to(values.dtype)
    return (values * counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)


def num_classes(module: nn.Module | None) -> int | None:
    """Return how many classes or tokens a model's logits tell apart, where it says so."""
    try:
        head = getattr(module, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):
        head = None
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor):
        return len(weight)
    labels = getattr(module, "num_labels", None)
    return labels if isinstance(labels, int) else None


def weighted_mean(losses: Tensor, counts: Tensor, modules: Sequence[Any], batch: Batch) -> Tensor:
    """Return the mean of losses [B] or [B, L] over examples and counted positions, each weighted by all modules."""
    plain = mean_over_positions(losses, counts)
    per_example: Tensor | None = None
    given = False
    for module in modules:
        reads_losses = getattr(module, "reads_losses", False)
        weights = (module(batch, plain) if reads_losses else module(batch)).to(losses.dtype)
        if weights.shape == losses.shape and losses.dim() > 1:
            losses = weights * losses
        elif weights.shape == plain.shape:
            per_example = weights if per_example is None else per_example * weights
        else:
            shapes = f"weights of shape {list(weights.shape)} for losses of shape {list(losses.shape)}"
            raise StageError(f"{type(module).__name__} gives {shapes}; give one per example, or one per position")
        given = given or reads_losses
    found = mean_over_positions(losses, counts)
    if per_example is None:
        return found.mean()
    return (_GivenWeights.apply(per_example, found) if given else per_example * found).mean()


class _GivenWeights(torch.autograd.Function):
    """`w · ℓ`, whose first derivative takes w as given; w stays in the graph of that derivative.

    `w.detach()` would do the former and lose the latter: from the second inner step on, w moves with the weights in
    training, and the hypergradient would miss it.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, losses: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return weights * losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (weights,) = ctx.saved_tensors
        return None, gradients[0] * weights
