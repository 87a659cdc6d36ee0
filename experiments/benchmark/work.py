"""The work that all contestants do: the same models, initial weights, batches, losses and meta-parameters."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

Batch = dict[str, Tensor]
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    # eps: at 1e-8 a cold step is almost the gradient's sign, whose derivative magnifies rounding
    "adam": (torch.optim.Adam, {"lr": 1e-3, "eps": 1e-5}),
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
}


@dataclass(frozen=True)
class Spec:
    """Which work: everything that it is built from."""

    workload: str
    num_steps: int
    optimizer: str
    dtype: str = "float32"
    device: str = "cpu"
    hidden: int = 64
    layers: int = 2
    autocast: bool = False
    small: bool = False


@dataclass
class Work:
    """Two trainings in a row, a meta-loss, and the meta-parameters A that weigh the first one's examples.

    Args:
        teacher, student: the models, at the weights that every run starts from.
        train, unlabelled: a batch for every inner step; each example of `train` has an `index` into A.
        validation: the batch of the meta-loss.
        logits: A before its sigmoid.
    """

    spec: Spec
    teacher: nn.Module
    student: nn.Module
    train: Sequence[Batch]
    unlabelled: Sequence[Batch]
    validation: Batch
    logits: Tensor

    def models(self) -> tuple[nn.Module, nn.Module]:
        """Return copies of both models."""
        return copy.deepcopy(self.teacher), copy.deepcopy(self.student)

    @property
    def optimizer(self) -> Callable[[Any], torch.optim.Optimizer]:
        """The inner optimizer, without its parameters."""
        kind, options = OPTIMIZERS[self.spec.optimizer]
        return functools.partial(kind, **options)

    def casting(self) -> Any:
        """Return the context in which every contestant runs a forward."""
        if not self.spec.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.spec.device, torch.bfloat16, cache_enabled=False)


def logits_of(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Return the class scores [..., classes] that a model gives to a batch."""
    out = model(**{name: x for name, x in batch.items() if name not in ("labels", "index")})
    return out if isinstance(out, Tensor) else out.logits


def weighted_loss(model: Callable[..., Any], batch: Batch, weights: Tensor) -> Tensor:
    """The teacher's: `1/B Σ_i w_i ℓ_i`, each ℓ_i a mean over the example's positions."""
    return (weights * _losses(model, batch)).mean()


def distillation(model: Callable[..., Any], batch: Batch, teacher: Callable[..., Any]) -> Tensor:
    """The student's: cross-entropy against the trained teacher's soft labels, in the graph of the teacher's weights."""
    soft = logits_of(teacher, batch).softmax(-1)
    return -(soft * logits_of(model, batch).log_softmax(-1)).sum(-1).mean()


def validation_loss(model: Callable[..., Any], batch: Batch) -> Tensor:
    """The meta-loss: mean cross-entropy of the trained student."""
    return _losses(model, batch).mean()


def _losses(model: Callable[..., Any], batch: Batch) -> Tensor:
    losses = F.cross_entropy(logits_of(model, batch).movedim(-1, 1), batch["labels"], reduction="none")
    return losses if losses.dim() == 1 else losses.flatten(1).mean(1)


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by the kernel that has a second derivative, for all alike."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


# --- the two workloads


def build(spec: Spec) -> Work:
    """Return the work of a spec; the same numbers at every call, rounded to the dtype."""
    torch.manual_seed(0)
    make, data = WORKLOADS[spec.workload]
    teacher, student = make(spec), make(spec)
    train, unlabelled, validation = data(spec)
    examples = 1 + max(int(batch["index"].max()) for batch in train)
    work = Work(spec, teacher, student, train, unlabelled, validation, torch.randn(examples))
    return _moved(work)


def _moved(work: Work) -> Work:
    spec = work.spec
    dtype = getattr(torch, spec.dtype)

    def move(x: Tensor) -> Tensor:
        return x.to(spec.device, dtype if x.is_floating_point() else None)

    moved = {
        name: [{k: move(x) for k, x in b.items()} for b in getattr(work, name)] for name in ("train", "unlabelled")
    }
    return replace(
        work,
        teacher=work.teacher.to(spec.device, dtype),
        student=work.student.to(spec.device, dtype),
        validation={k: move(x) for k, x in work.validation.items()},
        logits=move(work.logits).requires_grad_(),
        **moved,
    )


class Perceptron(nn.Module):
    """Two hidden layers with tanh."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        sizes = (features, hidden, hidden)
        self.body = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())))
        self.head = nn.Linear(hidden, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


def perceptron(spec: Spec) -> nn.Module:
    return Perceptron(64, 16 if spec.small else spec.hidden, 10)


def digits(spec: Spec) -> tuple[list[Batch], list[Batch], Batch]:
    """scikit-learn's 8×8 images, drawn anew for every batch; four in ten of the teacher's labels are random."""
    size, count = (16, 64) if spec.small else (64, 512)
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes))
    inputs = torch.as_tensor(images / 16.0, dtype=torch.float32)[order]
    labels = torch.as_tensor(classes, dtype=torch.long)[order]
    noisy = torch.where(torch.rand(len(labels)) < 0.4, torch.randint(10, labels.shape), labels)

    def batches(start: int, shown: Tensor) -> list[Batch]:
        drawn = [torch.randperm(count)[:size] for _ in range(spec.num_steps)]
        return [{"inputs": inputs[start + i], "labels": shown[start + i], "index": i} for i in drawn]

    validation = slice(2 * count, 2 * count + size)
    return batches(0, noisy), batches(count, labels), {"inputs": inputs[validation], "labels": labels[validation]}


def bert2bert(spec: Spec) -> nn.Module:
    """Two BERTs with tied embeddings and unused poolers, as transformers builds them; without dropout."""
    half = functools.partial(
        BertConfig,
        vocab_size=40 if spec.hidden < 768 else 30522,
        max_position_embeddings=_length(spec),
        hidden_size=16 if spec.small else spec.hidden,
        num_hidden_layers=1 if spec.small else spec.layers,
        num_attention_heads=max(4, spec.hidden // 64),
        intermediate_size=32 if spec.small else (4 if spec.hidden >= 768 else 2) * spec.hidden,
        hidden_dropout_prob=0.0,  # everybody then computes the same numbers
        attention_probs_dropout_prob=0.0,
    )
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(half(), half()))


def tokens(spec: Spec) -> tuple[list[Batch], list[Batch], Batch]:
    """Random sequences: 8 of 16 tokens a batch; 2 of 4 if small, 8 of 128 for a model of BERT-base's size."""
    size = 2 if spec.small else 8
    draw = functools.partial(torch.randint, 1, 40, (size, _length(spec)))  # 0 is padding, whose row has no gradient

    def batch() -> Batch:
        return {name: draw() for name in ("input_ids", "decoder_input_ids", "labels")}

    train = [{**batch(), "index": torch.arange(size) + size * i} for i in range(spec.num_steps)]
    return train, [batch() for _ in range(spec.num_steps)], batch()


def _length(spec: Spec) -> int:
    return 4 if spec.small else 128 if spec.hidden >= 768 else 16


Data = Callable[[Spec], tuple[list[Batch], list[Batch], Batch]]
WORKLOADS: dict[str, tuple[Callable[[Spec], nn.Module], Data]] = {
    "mlp": (perceptron, digits),
    "bert2bert": (bert2bert, tokens),
}
STEPS = {"mlp": (10, 50, 200), "bert2bert": (10, 50)}
OPTIMIZERS_OF = {"mlp": ("momentum", "adam"), "bert2bert": ("adam",)}
