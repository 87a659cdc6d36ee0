"""What is refused: modules that cannot be differentiated twice, and losses that train something else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import bert2bert
from small import (
    assert_same,
    example_weights,
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

import metaopt
from metaopt.estimators import Checkpointed, FiniteDifference, Unrolled

# --- refused: modules whose second derivative would be wrong


def test_checkpointing_inside_a_forward_is_refused():
    with pytest.raises(metaopt.StageError, match="checkpoint"):
        one_stage(model=Recomputing()).unroll(example_weights())


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


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gradient checkpointing": (checkpointing, r"'encoder.*_checkpointing_disable\(\)"),
    "DataParallel": (lambda: nn.DataParallel(Linear()), r"'\(top\)' \(DataParallel\).*: `\.module`"),
    "DataParallel inside": (lambda: nn.Sequential(nn.DataParallel(Linear())), r"'0' \(DataParallel\).*: `\.module`"),
    "FSDP": (FullyShardedDataParallel, r"spread over processes.*the plain module"),
    "DTensor": (sharded_parameter, r"parameter 'linear\.weight' is spread over processes"),
    "torch.compile": (lambda: torch.compile(Linear()), r"torch\.compile.*`\._orig_mod`"),  # type: ignore[dict-item, return-value]
    "compiled in place": (compiled_in_place, "compiled in place.*an uncompiled module"),
    "a compiled forward": (compiled_forward, "compiled in place.*an uncompiled module"),
    "torch.jit": (lambda: torch.jit.script(Linear()), r"torch\.jit.*the Python module"),
    "old weight norm": (old_weight_norm, r"parametrizations\.weight_norm"),
    "old spectral norm": (old_spectral_norm, r"outlives the swap"),
    "spectral norm": (normed(nn.utils.parametrizations.spectral_norm), r"power iteration.*torch\.linalg\.matrix_norm"),
    "pruning": (pruned, r"torch\.nn\.utils\.prune\.remove\(module, name\)"),
    "sparse gradients": (embedding(sparse=True), r"'0' \(Embedding\) makes sparse gradients.*sparse=False"),
    "scale_grad_by_freq": (embedding(scale_grad_by_freq=True), "counts of a batch.*scale_grad_by_freq=False"),
    "max_norm": (embedding(max_norm=1.0), "in place and without a graph.*max_norm=None"),
    "a backward hook": (
        normed(lambda layer: layer.register_full_backward_hook(lambda *_: None)),
        r"backward hook.*Stage\(\.\.\., transform=",
    ),
    "a gradient hook": (
        normed(lambda layer: layer.weight.register_hook(lambda gradient: 2 * gradient)),  # type: ignore[operator, union-attr]
        r"'linear\.weight' has a gradient hook.*Stage\(\.\.\., transform=",
    ),
    "complex weights": (lambda: nn.Linear(4, 3, dtype=torch.complex128), r"'weight' is complex.*torch\.complex"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("run", ["unroll", "train"])
def test_modules_that_cannot_be_differentiated_twice_are_refused(name, run):
    make, message = REFUSED[name]
    chain = one_stage(model=make())
    with pytest.raises(metaopt.StageError, match=message) as error:
        getattr(chain, run)(example_weights())
    assert "stage 'only'" in str(error.value)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a frozen parameter": (lambda layer: layer.weight.requires_grad_(False), "was frozen after"),
    "a backward hook": (lambda layer: layer.register_full_backward_hook(lambda *_: None), "backward hook"),
    "a gradient hook": (lambda layer: layer.weight.register_hook(lambda gradient: gradient), "gradient hook"),
    "compiled in place": (lambda layer: layer.compile(backend="eager"), "compiled in place"),
    "pruned": (lambda layer: l1_unstructured(layer, "weight", amount=0.3), "prune"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_usable_is_refused_once_it_has_changed(name):
    change, message = CHANGES[name]
    model, weights = Linear(), example_weights()
    chain = one_stage(model=model)
    for _ in range(2):
        chain.unroll(weights)
    change(model.linear)
    with pytest.raises(metaopt.StageError, match=message):
        chain.unroll(weights)


def test_other_meta_parameters_and_slots_are_looked_at_anew():
    chain = one_stage()
    chain.unroll(example_weights())
    with pytest.raises(metaopt.ConfigError, match=r"is the parameter 'only\.linear\.weight'"):
        chain.unroll(chain.stages["only"].model)
    chain.stages["only"].estimator = metaopt.ConjugateGradient(3)
    chain.stages["only"].transform = metaopt.ClipNorm(1.0)
    with pytest.raises(metaopt.StageError, match="ConjugateGradient"):
        chain.unroll(example_weights())


def test_a_frozen_spectral_norm_is_not_refused():
    model = Network()
    nn.utils.parametrizations.spectral_norm(model.first)
    model.first.requires_grad_(False)
    trained = one_stage(model=model).unroll(example_weights())["only"]
    assert not torch.equal(trained.params["last.weight"], model.last.weight)


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


FIRST_ONLY: dict[str, tuple[Any, Any, str]] = {
    "EmbeddingBag": (Bag, of_scores(torch.tanh), r"EmbeddingBag: write nn\.Embedding"),
    "cdist": (Linear, of_scores(lambda scores: torch.cdist(scores, scores + 1)), r"torch\.cdist: write \(x\[:, None\]"),
    "others": (Linear, of_scores(by_ctc), r"derivative for aten::_ctc_loss_backward"),
}


@pytest.mark.parametrize("estimator", [Unrolled(), Checkpointed()], ids=["unrolled", "checkpointed"])
@pytest.mark.parametrize("name", FIRST_ONLY)
def test_operations_that_torch_differentiates_once_are_named(name: str, estimator: metaopt.Estimator) -> None:
    model, loss, message = FIRST_ONLY[name]
    weights = example_weights()
    with pytest.raises(metaopt.StageError, match=rf"stage 'only': .*{message}.*product=metaopt\.FiniteDifference"):
        metaopt.hypergradient(meta_loss(one_stage(loss, model=model, estimator=estimator), weights), weights)


class Rescaling(Linear):
    """Halves its weight in place when it is read in eval mode, as RWKV does above its sixth layer."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            with torch.no_grad():
                self.linear.weight.mul_(0.5)
        return super().forward(inputs)


@pytest.mark.parametrize("estimator", [Unrolled(), Checkpointed()], ids=["unrolled", "checkpointed"])
def test_a_model_that_writes_into_its_weights_is_refused(estimator: metaopt.Estimator) -> None:
    with pytest.raises(metaopt.StageError, match=r"stage 'only': the model \(Rescaling\) writes into its weights"):
        meta_loss(one_stage(model=Rescaling, estimator=estimator), example_weights())


def through_once(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
    return (meta_params(batch)[:, None] * Once.apply(model(batch["inputs"]))).square().mean()


@pytest.mark.parametrize("estimator", [Unrolled(), Checkpointed(), metaopt.Neumann(2)], ids=repr)
def test_a_function_of_one_derivative_is_refused(estimator: metaopt.Estimator):
    """`autograd.grad` walks past it in silence."""
    weights = example_weights()
    with pytest.raises(metaopt.StageError, match=r"stage 'only': .*@once_differentiable.*FiniteDifference\(\)"):
        metaopt.hypergradient(meta_loss(one_stage(through_once, estimator=estimator), weights), weights)


def test_finite_differences_of_weights_taken_as_given_are_refused():
    network = metaopt.WeightNetwork(3).double()
    chain = one_stage(estimator=Checkpointed(FiniteDifference()))
    with pytest.raises(metaopt.StageError, match=r"stage 'only': FiniteDifference takes the Jacobian.*DoubleBackward"):
        metaopt.hypergradient(meta_loss(chain, network), network)


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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_a_compiled_loss_is_refused():
    error = torch.compile(lambda scores: scores.square().mean(1), backend="aot_eager")

    def compiled(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return (meta_params(batch) * error(model(batch["inputs"]))).mean()

    with pytest.raises(metaopt.StageError, match=r"torch\.compile: give the stage the uncompiled one"):
        one_stage(compiled).unroll(example_weights())


class Reentrant(Network):
    """Recomputes its first layer by the older checkpointing, which `autograd.grad` does not see through."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: self.first(x).tanh(), inputs.clone().requires_grad_(), use_reentrant=True)
        return self.last(hidden)


@pytest.mark.parametrize("estimator", [Unrolled(), Checkpointed()], ids=["unrolled", "checkpointed"])
@pytest.mark.parametrize("run", ["unroll", "train"])
def test_reentrant_checkpointing_is_refused(run, estimator):
    with pytest.raises(metaopt.StageError, match=r"stage 'only': .*torch\.utils\.checkpoint"):
        getattr(one_stage(model=Reentrant(), estimator=estimator), run)(example_weights())


# --- refused: losses that train something else


@pytest.mark.parametrize("run", ["unroll", "train"])
def test_a_loss_that_calls_the_users_own_module_is_refused(run):
    model = Network()

    def closes_over(fast: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return F.cross_entropy(model(batch["inputs"]), batch["labels"])

    chain = one_stage(closes_over, model=model)
    with pytest.raises(metaopt.StageError, match=r"stage 'only' reaches .* \(only\.first\.bias, .*, …\)"):
        getattr(chain, run)(example_weights())


def test_a_loss_that_calls_the_upstream_stages_own_module_is_refused():
    teacher = Network()

    def stale(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return (model(batch["inputs"]) - teacher(batch["inputs"])).square().mean()

    chain = two_stages(teacher=teacher)
    chain.stages["student"].loss = stale
    with pytest.raises(metaopt.StageError, match=r"'student' reaches .*teacher\.first\.bias"):
        chain.unroll(example_weights())


@pytest.mark.parametrize(
    ("estimator", "message"),
    [(Unrolled(), "depends on none of the 2 parameters"), (Checkpointed(), "returned a tensor without a graph")],
    ids=["unrolled", "checkpointed"],
)
def test_a_loss_that_depends_on_nothing_it_trains_is_refused(estimator, message):
    chain = one_stage(lambda model, batch, meta, upstream: meta(batch).mean(), estimator=estimator)
    with pytest.raises(metaopt.StageError, match=message):
        chain.unroll(example_weights())


def test_a_checkpointed_loss_that_closes_over_a_tensor_in_training_is_refused():
    temperature = torch.ones((), dtype=torch.float64, requires_grad=True)

    def closes_over(model: Any, batch: Any, meta_params: Any, upstream: Any) -> Tensor:
        return F.cross_entropy(model(batch["inputs"]) * temperature, batch["labels"])

    with pytest.raises(metaopt.StageError, match=r"closes over 1 tensor\(s\) that require grad.*Unrolled\(\)"):
        one_stage(closes_over, estimator=Checkpointed()).unroll(example_weights())
    outcome = one_stage(closes_over).unroll(example_weights())
    (slope,) = torch.autograd.grad(outcome["only"].params["linear.weight"].sum(), temperature)
    assert slope != 0


def test_the_users_module_is_restored_when_a_loss_is_refused():
    model = Network()
    before = module_state(model)
    with pytest.raises(metaopt.StageError, match="depends on none"):
        one_stage(lambda m, batch, meta, up: meta(batch).mean(), model=model).unroll(example_weights())
    assert_same(module_state(model), before)
