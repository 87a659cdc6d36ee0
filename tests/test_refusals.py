"""What is refused: one table of what a user did, the class of the error, and the one word of it that matters."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import bert2bert
from small import (
    SGD,
    assert_same,
    cross_entropy,
    example_weights,
    feature_batches,
    meta_loss,
    module_state,
    one_stage,
    two_stages,
)
from small_models import CLASSES, Linear, Network, Recomputing
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.prune import l1_unstructured
from torch.utils.checkpoint import checkpoint
from trainers import META, trainer

import metaopt
from metaopt.base.errors import ConfigError, MetaoptError, StageError
from metaopt.estimators import Checkpointed, ConjugateGradient, FiniteDifference, Neumann, Truncated, Unrolled
from metaopt.trainer import Selection

Refusal = tuple[Callable[[], Any], type[Exception], str]
BATCH = feature_batches(1)[0]
SWEPT = Checkpointed()


def unrolled(loss: Any = None, meta_params: Any = None, **options: Any) -> Callable[[], Any]:
    """An unroll of one stage."""
    return lambda: one_stage(loss, **options).unroll(example_weights() if meta_params is None else meta_params())


def differentiated(loss: Any = None, meta_params: Any = example_weights, **options: Any) -> Callable[[], Any]:
    """The same, and the backward."""

    def act() -> None:
        phi = meta_params()
        metaopt.hypergradient(meta_loss(one_stage(loss, **options), phi), phi)

    return act


def fitted(objective: Any = None, validation: Any = BATCH, **options: Any) -> Callable[[], Any]:
    """A meta-step of one stage."""
    return lambda: trainer(one_stage(**options), objective=objective, validation=[validation]).fit(1)


# --- modules whose second derivative would be wrong


def compiled_in_place() -> nn.Module:
    model = Linear()
    model.compile(backend="eager")
    return model


def checkpointing() -> nn.Module:
    model: Any = bert2bert()
    encoder = model.encoder
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(encoder, new if hasattr(encoder, new) else old)()
    return model


def old_weight_norm() -> nn.Module:
    model = Linear()
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(model.linear)
    return model


def compiled_forward() -> nn.Module:
    model = Linear()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def old_spectral_norm() -> nn.Module:
    model = Linear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(model.linear)
    return model


def pruned() -> nn.Module:
    model = Linear()
    l1_unstructured(model.linear, "weight", amount=0.3)
    return model


def normed(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    """A linear layer changed in place."""

    def build() -> nn.Module:
        model = Linear()
        change(model.linear)
        return model

    return build


def embedding(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Embedding(4, 3, **options))


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's, which cannot be built without a process group: it is known by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear()


def sharded_parameter() -> nn.Module:
    model = Linear()
    model.linear.weight.placements = ()  # type: ignore[assignment]
    return model


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gradient checkpointing": (checkpointing, "checkpointing_disable"),
    "DataParallel": (lambda: nn.DataParallel(Linear()), r"\.module"),
    "DataParallel inside": (lambda: nn.Sequential(nn.DataParallel(Linear())), r"'0'.*\.module"),
    "FSDP": (FullyShardedDataParallel, "processes"),
    "DTensor": (sharded_parameter, r"'linear\.weight'.*processes"),
    "torch.compile": (lambda: torch.compile(Linear()), "_orig_mod"),  # type: ignore[dict-item, return-value]
    "compiled in place": (compiled_in_place, "compiled"),
    "a compiled forward": (compiled_forward, "compiled"),
    "torch.jit": (lambda: torch.jit.script(Linear()), r"torch\.jit"),
    "old weight norm": (old_weight_norm, r"parametrizations\.weight_norm"),
    "old spectral norm": (old_spectral_norm, "outlives"),
    "spectral norm": (normed(nn.utils.parametrizations.spectral_norm), "matrix_norm"),
    "pruning": (pruned, r"prune\.remove"),
    "sparse gradients": (embedding(sparse=True), "sparse=False"),
    "scale_grad_by_freq": (embedding(scale_grad_by_freq=True), "scale_grad_by_freq=False"),
    "max_norm": (embedding(max_norm=1.0), "max_norm=None"),
    "a backward hook": (normed(lambda layer: layer.register_full_backward_hook(lambda *_: None)), "transform="),
    "a gradient hook": (
        normed(lambda layer: layer.weight.register_hook(lambda gradient: 2 * gradient)),  # type: ignore[operator, union-attr]
        r"'linear\.weight'.*transform=",
    ),
    "complex weights": (lambda: nn.Linear(4, 3, dtype=torch.complex128), "complex"),
}


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("run", ["unroll", "train"])
def test_modules_that_cannot_be_differentiated_twice(name: str, run: str) -> None:
    make, word = MODULES[name]
    chain = one_stage(model=make())
    with pytest.raises(StageError, match=word) as error:
        getattr(chain, run)(example_weights())
    assert "'only'" in str(error.value)


# --- losses


class Once(torch.autograd.Function):
    """A hyperbolic tangent that says it has no second derivative."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients[0] * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Bag(nn.Module):
    """Class scores of a bag of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, CLASSES, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.bag((3 * inputs).long() % 5)


def of_scores(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """An inner loss through an operation on the model's scores."""

    def loss(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return (meta_params(batch)[:, None] * change(model(batch["inputs"]))).square().mean()

    return loss


def by_ctc(scores: Tensor) -> Tensor:
    return F.ctc_loss(scores.log_softmax(-1)[:, None], torch.ones(1, 2).long(), torch.tensor([5]), torch.tensor([2]))


class Rescaling(Linear):
    """Halves its weight in place when it is read in eval mode, as RWKV does above its sixth layer."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            with torch.no_grad():
                self.linear.weight.mul_(0.5)
        return super().forward(inputs)


class Reentrant(Network):
    """Recomputes its first layer by the older checkpointing, which `autograd.grad` does not see through."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: self.first(x).tanh(), inputs.clone().requires_grad_(), use_reentrant=True)
        return self.last(hidden)


def through_once(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
    return (meta_params(batch)[:, None] * Once.apply(model(batch["inputs"]))).square().mean()


def of_own_module(model: nn.Module) -> Callable[..., Tensor]:
    return lambda fast, batch, meta_params, upstream: F.cross_entropy(model(batch["inputs"]), batch["labels"])


def of_nothing(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
    return meta_params(batch).mean()


def scaled_by(outside: Tensor) -> Callable[..., Tensor]:
    return lambda model, batch, meta_params, upstream: outside * cross_entropy(model, batch, meta_params, upstream)


def of_stale_teacher() -> None:
    teacher = Network()
    chain = two_stages(teacher=teacher)
    chain.stages["student"].loss = lambda model, batch, phi, up: (
        model(batch["inputs"]).sum() * teacher(batch["inputs"]).sum()
    )
    chain.unroll(example_weights())


def in_inference_mode(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


def reading_inference(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
    return (model(batch["inputs"]) * in_inference_mode(lambda: torch.ones(5, 3).double())).mean()


def three(model: Any, batch: Any, meta_params: Any) -> Tensor:
    return cross_entropy(model, batch, meta_params, {})


OUTSIDE = torch.ones((), dtype=torch.float64, requires_grad=True)
LOSSES: dict[str, Refusal] = {}
for _name, _estimator in {"unrolled": Unrolled(), "checkpointed": SWEPT}.items():
    LOSSES |= {
        f"EmbeddingBag, {_name}": (
            differentiated(of_scores(torch.tanh), model=Bag, estimator=_estimator),
            StageError,
            r"nn\.Embedding\b.*FiniteDifference",
        ),
        f"cdist, {_name}": (
            differentiated(of_scores(lambda z: torch.cdist(z, z + 1)), estimator=_estimator),
            StageError,
            "cdist.*FiniteDifference",
        ),
        f"CTC, {_name}": (
            differentiated(of_scores(by_ctc), estimator=_estimator),
            StageError,
            "ctc_loss.*FiniteDifference",
        ),
        f"a function of one derivative, {_name}": (
            differentiated(through_once, estimator=_estimator),
            StageError,
            "once_differentiable",
        ),
        f"a model that writes into its weights, {_name}": (
            differentiated(model=Rescaling, estimator=_estimator),
            StageError,
            "Rescaling",
        ),
        f"reentrant checkpointing, {_name}": (
            unrolled(model=Reentrant, estimator=_estimator),
            StageError,
            r"utils\.checkpoint",
        ),
        f"an inference tensor, {_name}": (
            unrolled(reading_inference, estimator=_estimator),
            StageError,
            r"'only'.*no_grad",
        ),
        f"nothing that is trained, {_name}": (
            unrolled(of_nothing, estimator=_estimator),
            StageError,
            "depends on none|without a graph",
        ),
    }
LOSSES |= {
    "a function of one derivative, Neumann": (differentiated(through_once, estimator=Neumann(2)), StageError, "once_d"),
    "finite differences of given weights": (
        differentiated(
            meta_params=lambda: metaopt.WeightNetwork(3).double(), estimator=Checkpointed(FiniteDifference())
        ),
        StageError,
        "DoubleBackward",
    ),
    "reentrant checkpointing, trained": (
        lambda: one_stage(model=Reentrant).train(example_weights()),
        StageError,
        "checkp",
    ),
    "checkpointing inside a forward": (unrolled(model=Recomputing), StageError, "checkpoint"),
    "the user's own module": (
        lambda: one_stage(of_own_module(m := Network()), model=m).unroll(example_weights()),
        StageError,
        r"only\.first\.bias",
    ),
    "the user's own module, trained": (
        lambda: one_stage(of_own_module(m := Network()), model=m).train(example_weights()),
        StageError,
        r"only\.first\.bias",
    ),
    "an upstream stage's own module": (of_stale_teacher, StageError, r"teacher\.first\.bias"),
    "a tensor from around it": (unrolled(scaled_by(OUTSIDE), estimator=SWEPT), StageError, "closes over 1"),
    "one loss per example": (unrolled(lambda model, b, meta, up: model(b["inputs"]).sum(1)), StageError, r"\.mean"),
    "a number": (unrolled(lambda model, b, meta, up: 3.0), StageError, "float"),
    "no graph": (unrolled(lambda model, b, meta, up: model(b["inputs"]).mean().detach()), StageError, "no_grad"),
    "three arguments": (unrolled(three), ConfigError, r"three takes \(model, batch, meta_params\)"),
    "torch's own loss": (unrolled(nn.CrossEntropyLoss()), ConfigError, r"\(input, target\)"),
    "a class for a loss": (unrolled(metaopt.CrossEntropy), ConfigError, "instance"),
    "the first of the chain learns from an earlier": (unrolled(metaopt.Distillation()), ConfigError, "first"),
}

# --- data


def batch_with(labels: Any) -> dict[str, Tensor]:
    return {**BATCH, "labels": labels(BATCH["labels"])}


WITHOUT = {name: value for name, value in BATCH.items() if name != "labels"}
DATA: dict[str, Refusal] = {
    "no labels": (fitted(batches=[WITHOUT]), MetaoptError, r"'labels'(.|\n)*stage 'only', inner step 0"),
    "no labels to validate on": (fitted(validation=WITHOUT), ConfigError, "'labels'"),
    "float labels": (fitted(batches=[batch_with(Tensor.double)]), StageError, r"labels\.long\(\)(.|\n)*stage 'only'"),
    "float labels to validate on": (fitted(validation=batch_with(Tensor.double)), StageError, r"labels\.long\(\)"),
    "a label too large": (fitted(batches=[batch_with(lambda x: x + 2)]), StageError, r"0 to 2(.|\n)*stage 'only'"),
    "a negative label": (fitted(validation=batch_with(lambda x: x - 1)), StageError, "Target -1"),
    "an empty stream": (unrolled(batches=[]), ConfigError, "batch"),
    "a one-shot iterator": (lambda: one_stage(batches=iter(feature_batches())), ConfigError, "once"),
    "a generator": (lambda: one_stage(batches=(b for b in feature_batches())), ConfigError, "generator"),
    "one batch": (lambda: one_stage(batches=BATCH), ConfigError, "dict"),
    "a number for batches": (lambda: one_stage(batches=3), ConfigError, "int"),
    "one-shot validation": (lambda: trainer(validation=iter(feature_batches())), ConfigError, "once"),
}

# --- a stage's other parts


def hooked() -> None:
    model = Linear()
    optimizer = SGD(model.parameters())
    optimizer.register_step_pre_hook(lambda *args: None)
    one_stage(model=model, optimizer=optimizer)


def of(**options: Any) -> Callable[[], Any]:
    return lambda: one_stage(**options)


def overridden(overrides: Any) -> Callable[[], Any]:
    return unrolled(optimizer=functools.partial(SGD, momentum=0.9), overrides=overrides)


PARTS: dict[str, Refusal] = {
    "no steps": (of(num_steps=0), ConfigError, "num_steps=0"),
    "a fraction of steps": (of(num_steps=2.5), ConfigError, r"num_steps=2\.5"),
    "no batches per step": (of(accumulate=0), ConfigError, "accumulate=0"),
    "a loss that is a tensor": (of(loss=torch.ones(())), ConfigError, "Tensor"),
    "an optimizer by name": (of(optimizer="adam"), ConfigError, "str"),
    "an optimizer that is not proven": (
        of(optimizer=functools.partial(torch.optim.Rprop, lr=0.1)),
        ConfigError,
        "Rprop",
    ),
    "a factory of something else": (of(optimizer=lambda params: 3), ConfigError, "int"),
    "another model's optimizer": (of(optimizer=SGD(Linear().parameters())), ConfigError, "SGD"),
    "an optimizer with hooks": (hooked, StageError, "hook"),
    "a model factory of something else": (of(model=lambda: 3), ConfigError, "int"),
    "a frozen model": (of(model=Linear().requires_grad_(False)), ConfigError, "frozen"),
    "a model made in inference mode": (of(model=in_inference_mode(Network)), StageError, "deepcopy"),
    "a negative seed": (of(seed=-1), ConfigError, "seed=-1"),
    "half precision that needs a scale": (of(autocast="float16"), ConfigError, "bfloat16"),
    "overrides of one argument": (of(overrides=lambda t: {}), ConfigError, "overrides"),
    "an override that is not there": (
        overridden(lambda meta, t: {"learning_rate": 0.1}),
        ConfigError,
        "'learning_rate'",
    ),
    "an override that is misspelt": (overridden(lambda meta, t: {"momentun": 0.1}), ConfigError, "'momentum'"),
    "overrides of a wrong length": (overridden(lambda meta, t: {"lr": [0.1, 0.2]}), ConfigError, "2 values for 1"),
    "an override that is not learnable": (
        overridden(lambda meta, t: {"nesterov": meta.logits.mean()}),
        ConfigError,
        "'nesterov'",
    ),
    "a learned momentum of 0": (
        overridden(lambda meta, t: {"momentum": 0 * meta.logits.mean()}),
        ConfigError,
        "momentum",
    ),
    "an override of no parameter": (
        overridden(lambda meta, t: {"lr": {"linear.weigth": 0.1}}),
        ConfigError,
        r"'linear\.weight'",
    ),
    "an override per element": (overridden(lambda meta, t: {"lr": meta.logits}), ConfigError, r"\[15\]"),
    "a schedule that needs a metric": (of(schedule=torch.optim.lr_scheduler.ReduceLROnPlateau), ConfigError, "metric"),
    "a truncation to nothing": (lambda: Truncated(0), ConfigError, "last=0"),
    "a series without terms": (lambda: Neumann(0), ConfigError, "terms=0"),
    "no iterations": (lambda: ConjugateGradient(0), ConfigError, "iterations=0"),
    "a negative damping": (lambda: ConjugateGradient(3, damping=-1.0), ConfigError, "damping=-1"),
}

# --- chains, meta-parameters, the trainer


def with_own_weights() -> None:
    chain = one_stage()
    chain.unroll(chain.stages["only"].model)


def in_inference() -> None:
    with torch.inference_mode():
        one_stage().unroll(example_weights())


def named_in_inference() -> dict[str, Any]:
    return {"w": in_inference_mode(example_weights)}


WHOLE: dict[str, Refusal] = {
    "inference mode": (in_inference, StageError, "no_grad"),
    "a model's own weights as meta-parameters": (with_own_weights, ConfigError, r"'only\.linear\.weight'"),
    "meta-parameters of inference mode": (
        unrolled(metaopt.WeightedLoss("w"), named_in_inference),
        StageError,
        "'w': 'logits'",
    ),
    **{
        f"meta-parameters: {given!r}": (unrolled(meta_params=lambda given=given: given), ConfigError, "requires grad")
        for given in (torch.ones(3).numpy(), {"a": 1.0}, None, [nn.Linear(1, 1)])
    },
    "an objective of two arguments": (fitted(lambda trained, batch: trained), ConfigError, "meta_params"),
    "no meta-optimizer": (lambda: trainer(meta_optimizer=None), ConfigError, "meta_optimizer"),
    "another's meta-optimizer": (
        lambda: trainer(meta_optimizer=META(example_weights().parameters())),
        ConfigError,
        "'logits'",
    ),
    "an unknown stage to carry": (lambda: trainer(carry={"studnet": "never"}), ConfigError, "'student'"),
    **{
        f"carry: {value!r}": (lambda value=value: trainer(carry={"student": value}), ConfigError, "always, never")
        for value in ("sometimes", 0, -1, 1.5, True, None)
    },
    "an unknown stage in the objective": (
        lambda: trainer(objective=metaopt.ValidationLoss("studnet")),
        ConfigError,
        "'student'",
    ),
    "an unknown stage to select": (
        lambda: trainer(selection=Selection(feature_batches(), "studnet")),
        ConfigError,
        "'student'",
    ),
    "no selection batches": (lambda: Selection([], "student"), ConfigError, "batch"),
    "never a look": (lambda: Selection(feature_batches(), "student", every=0), ConfigError, "every=0"),
    "no patience": (lambda: Selection(feature_batches(), "student", patience=0), ConfigError, "patience=0"),
    "an unknown metric": (
        lambda: trainer(
            selection=Selection(feature_batches(), "student", lambda *_: {"accuracy": 0.5}, "acuracy", every=1)
        ).fit(1),
        ConfigError,
        "'accuracy'",
    ),
}

REFUSED = {
    f"{part}: {name}": refusal
    for part, table in {"loss": LOSSES, "data": DATA, "stage": PARTS, "whole": WHOLE}.items()
    for name, refusal in table.items()
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    act, error, word = REFUSED[name]
    with pytest.raises(error, match=word):
        act()


# --- what is left as it was, and what looks alike and is not refused


def test_a_frozen_spectral_norm_is_not_refused():
    model = Network()
    nn.utils.parametrizations.spectral_norm(model.first)
    model.first.requires_grad_(False)
    trained = one_stage(model=model).unroll(example_weights())["only"]
    assert not torch.equal(trained.params["last.weight"], model.last.weight)


def test_a_function_of_one_derivative_is_supported_where_one_is_enough():
    def twice(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return (meta_params(batch)[:, None] * model(batch["inputs"]).tanh()).square().mean()

    weights = example_weights()
    product = Checkpointed(product=FiniteDifference())
    found, exact = (
        metaopt.hypergradient(meta_loss(one_stage(loss, estimator=estimator), weights), weights)["logits"]
        for loss, estimator in ((through_once, product), (twice, Unrolled()))
    )
    assert (found - exact).norm() < 1e-8 * exact.norm()
    one_stage(through_once).train(weights)


def test_the_users_module_is_restored_when_a_loss_is_refused():
    model = Network()
    before = module_state(model)
    with pytest.raises(metaopt.StageError, match="depends on none"):
        one_stage(lambda m, batch, meta, up: meta(batch).mean(), model=model).unroll(example_weights())
    assert_same(module_state(model), before)


def test_a_tensor_from_around_the_loss_is_in_the_graph_of_unrolled():
    trained = one_stage(scaled_by(OUTSIDE)).unroll(example_weights())["only"]
    (slope,) = torch.autograd.grad(trained.params["linear.weight"].sum(), OUTSIDE)
    assert slope != 0


def test_a_copy_of_a_model_made_in_inference_mode_is_not_refused():
    chain = one_stage(model=copy.deepcopy(in_inference_mode(lambda: Network(batch_norm=True))))
    chain.commit(chain.unroll(example_weights()))
