"""Small chains in float64 on which behaviour is tested, and bitwise comparison of what they hold."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from small_models import CLASSES, FEATURES, Linear, Network
from torch import Tensor, nn

import metaopt

SIZE = 5  # examples of a batch
Batch = dict[str, Tensor]

SGD = functools.partial(torch.optim.SGD, lr=0.1)
MOMENTUM = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = functools.partial(torch.optim.Adam, lr=0.05)


def drawing(seed: int) -> Callable[..., Tensor]:
    """Standard normal draws in float64 from a generator of their own."""
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feature_batches(count: int = 3, seed: int = 0) -> list[Batch]:
    """Batches of `SIZE` examples; `index` runs through all of them, `source` is one of two."""
    draw = drawing(seed)
    return [
        {
            "inputs": draw(SIZE, FEATURES),
            "labels": (draw(SIZE) * 100).long() % CLASSES,
            "index": torch.arange(SIZE) + SIZE * number,
            "source": torch.arange(SIZE) % 2,
        }
        for number in range(count)
    ]


def text_batch(seed: int = 0, decoder: bool = True) -> Batch:
    """Four sequences of five tokens; with `decoder`, also what an encoder-decoder's decoder reads."""
    tokens = 1 + (drawing(seed)(3, 4, 5) * 100).long() % 10
    batch = {"input_ids": tokens[0], "attention_mask": torch.ones(4, 5, dtype=torch.long), "labels": tokens[2]}
    more = {"decoder_input_ids": tokens[1]} if decoder else {}
    return {**batch, **more, "index": torch.arange(4), "source": torch.arange(4) % 2}


def inputs_of(batch: Batch) -> Batch:
    """What a model receives."""
    return {name: value for name, value in batch.items() if name not in ("labels", "index", "source")}


def example_weights(num_examples: int = 3 * SIZE, seed: int = 9) -> metaopt.ExampleWeights:
    """Example weights in float64 that are not all alike."""
    weights = metaopt.ExampleWeights(num_examples).double()
    with torch.no_grad():
        weights.logits.copy_(drawing(seed)(num_examples))
    return weights


def one_stage(loss: Any = None, batches: Any = None, **options: Any) -> metaopt.Chain:
    """A chain of one stage, `only`: always the same initial weights and seed."""
    settings: dict[str, Any] = {"model": Linear, "optimizer": SGD, "num_steps": 3, "seed": 3, **options}
    if isinstance(settings["model"], type):
        torch.manual_seed(1)
        settings["model"] = settings["model"]()
    given = feature_batches() if batches is None else batches
    return metaopt.Chain(only=metaopt.Stage(loss=loss or metaopt.WeightedLoss(), batches=given, **settings))


def two_stages(
    optimizer: Any = ADAM, teacher: Any = None, student: Any = None, *, batches: Any = None, **options: Any
) -> metaopt.Chain:
    """Teacher → student, distilled: networks with batch norm and dropout unless others are given."""
    torch.manual_seed(2)
    models = [Network(0.3, batch_norm=True) if model is None else model for model in (teacher, student)]
    given = feature_batches() if batches is None else batches
    settings: dict[str, Any] = {"num_steps": 3, **options}
    return metaopt.Chain(
        teacher=metaopt.Stage(models[0], optimizer, metaopt.WeightedLoss(), given, seed=4, **settings),
        student=metaopt.Stage(models[1], optimizer, metaopt.Distillation("teacher"), given, seed=5, **settings),
    )


def meta_loss(chain: metaopt.Chain, meta_params: Any) -> Tensor:
    """The validation loss of the chain's last stage, after one unroll."""
    objective = metaopt.ValidationLoss(list(chain.stages)[-1])
    return objective(chain.unroll(meta_params), feature_batches(1, seed=8)[0], meta_params)


def cross_entropy(model: Any, batch: Batch, meta_params: Any, upstream: Any) -> Tensor:
    """Plain mean cross-entropy, as a function with an inner loss's arguments."""
    return F.cross_entropy(model(batch["inputs"]), batch["labels"])


def trained_model(model: nn.Module, batch: Any, optimizer: Any = ADAM, num_steps: int = 2) -> Any:
    """The trained model after a few steps on one batch."""
    chain = one_stage(metaopt.CrossEntropy(), [batch], model=model, optimizer=optimizer, num_steps=num_steps)
    trained = chain.unroll(example_weights())["only"]
    trained.trained = None  # what it read in training is of no matter where it is only a model to be called
    return trained


def plain_copy(model: nn.Module, fast: Any) -> nn.Module:
    """An ordinary module that holds the trained weights and buffers."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
            tensor.copy_(fast.params[name] if name in fast.params else fast.buffers[name])
    return plain


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def logits_of(output: Any) -> Tensor:
    """Class scores of a plain model or of a Hugging Face one."""
    return output if isinstance(output, Tensor) else output.logits


# --- what a chain holds


def module_state(module: nn.Module) -> dict[str, Any]:
    """Copies of weights, buffers, gradients and modes, and which tensor objects they are."""
    return {
        "params": {n: p.detach().clone() for n, p in module.named_parameters(remove_duplicate=False)},
        "buffers": {n: b.clone() for n, b in module.named_buffers(remove_duplicate=False)},
        "objects": {n: id(p) for n, p in module.named_parameters(remove_duplicate=False)},
        "types": {n: type(p).__name__ for n, p in module.named_parameters(remove_duplicate=False)},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
        "modes": {n: m.training for n, m in module.named_modules()},
    }


def chain_state(chain: metaopt.Chain) -> dict[str, Any]:
    """Copies of all that `unroll` must leave alone: the chain's state, its modules, torch's random state."""
    return {
        "state": copy.deepcopy(chain.state_dict()),
        "modules": {name: module_state(stage.model) for name, stage in chain.stages.items()},
        "random": torch.get_rng_state(),
    }


def tensors_of(trained: Any) -> dict[str, Any]:
    """Copies of all tensors of a trained chain, by stage."""
    return {
        name: copy.deepcopy(
            {
                "params": {n: p.detach() for n, p in model.params.items()},
                "buffers": dict(model.buffers),
                "optimizer": {n: {k: _plain(v) for k, v in s.items()} for n, s in model.optimizer_state.items()},
                "losses": trained.losses[name],
            }
        )
        for name, model in trained.items()
    }


def _plain(value: Any) -> Any:
    """A step counter as a number: in the graph it is kept in another dtype than in torch's own state."""
    return float(value) if isinstance(value, Tensor) and value.dim() == 0 else value


def differences(a: Any, b: Any, tolerance: float = 0.0, where: str = "") -> list[str]:
    """Where two nested structures differ: tensors in any bit (or by more than `tolerance`), all else by ==."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = list(dict.fromkeys([*a, *b]))
        missing = [f"{where}.{n}: only on one side" for n in names if (n in a) != (n in b)]
        shared = [n for n in names if n in a and n in b]
        return missing + [d for n in shared for d in differences(a[n], b[n], tolerance, f"{where}.{n}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        equal = alike and (torch.equal(a, b) or (tolerance > 0 and float((a - b).detach().abs().max()) <= tolerance))
        return [] if equal else [f"{where}: {a} != {b}"]
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        unlike = [f"{where}: {len(a)} != {len(b)} entries"] if len(a) != len(b) else []
        return unlike + [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, tolerance, f"{where}[{i}]")]  # noqa: B905
    return [] if type(a) is type(b) and a == b else [f"{where}: {a!r} != {b!r}"]


def assert_same(a: Any, b: Any, tolerance: float = 0.0) -> None:
    """Fail, and say where, unless the two are bitwise equal (or within `tolerance`)."""
    found = differences(a, b, tolerance)
    assert not found, "\n".join(found[:5])
