"""Models that look as if they could not be differentiated twice, and can; tensors made in inference mode."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import example_weights, feature_batches, meta_loss, one_stage
from small_models import CLASSES, FEATURES, Linear, Network
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.nn.utils.prune import l1_unstructured

import metaopt
from metaopt.core.guards import PlainWeightNorm
from metaopt.estimators import Checkpointed, Unrolled

VALIDATION = feature_batches(1, seed=8)[0]


class Quantised(nn.Parameter):
    """Whole numbers with a scale of their own, as quantised layers hold them; never trained."""

    scale: float

    def __new__(cls, data: Tensor, scale: Any) -> Quantised:
        made = torch.Tensor._make_subclass(cls, data, False)
        made.scale = scale
        return made

    def __deepcopy__(self, memo: Any) -> Quantised:
        return Quantised(self.data.clone(), self.scale)  # pyright: ignore[reportArgumentType]


class OnQuantised(nn.Module):
    """A quantised layer below a trained one."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randint(-9, 9, (FEATURES, FEATURES), generator=torch.Generator().manual_seed(0))
        self.table = Quantised(whole.to(torch.int8), 0.1)  # pyright: ignore[reportArgumentType]
        self.linear = Linear()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs @ (self.table.data.double() * self.table.scale))


def weight_normed(dim: Any) -> nn.Module:
    model = Network()
    nn.utils.parametrizations.weight_norm(model.first, dim=dim)
    return model


class Hooked(Network):
    """Hooks that change what flows forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(self._stretched)
        self.last.register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))

    @staticmethod
    def _stretched(module: nn.Module, args: Any, output: Any) -> Any:
        return 1.5 * output


class Mapped(Network):
    """Calls itself per example, by `vmap`, and its own slope, by `grad`."""

    def forward(self, inputs: Tensor) -> Tensor:
        slope = torch.func.vmap(torch.func.grad(lambda x: super(Mapped, self).forward(x).square().sum()))(inputs)
        return super().forward(inputs + slope)


def orthogonal() -> nn.Module:
    model = Network()
    nn.utils.parametrizations.orthogonal(model.first)
    return model


SUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "weight norm by rows": lambda: weight_normed(0),
    "weight norm by columns": lambda: weight_normed(1),
    "weight norm of all": lambda: weight_normed(None),
    "an orthogonal parametrization": orthogonal,
    "quantised layers": OnQuantised,
    "forward hooks": Hooked,
    "functional transforms": Mapped,
    "a weight average": lambda: torch.optim.swa_utils.AveragedModel(Network()),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_model_that_looks_hard_has_the_hypergradient_of_its_training(name: str) -> None:
    torch.manual_seed(1)
    model = SUPPORTED[name]()
    weights, objective = example_weights(), metaopt.ValidationLoss("only")
    chain = one_stage(model=model)
    check = metaopt.check_hypergradient(chain, objective, VALIDATION, weights, tolerance=1e-6)
    assert [row.verdict for row in check.rows] == ["agrees"], str(check)
    swept = one_stage(model=model, estimator=Checkpointed())
    found, expected = (metaopt.hypergradient(meta_loss(c, weights), weights)["logits"] for c in (swept, chain))
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    chain.commit(chain.unroll(weights))


def test_torch_s_weight_norm_alone_still_has_a_wrong_second_derivative() -> None:
    v, g = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.rand(4, 1, dtype=torch.float64)
    kernel = torch._weight_norm  # pyright: ignore[reportPrivateImportUsage]
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradgradcheck(lambda v: kernel(v, g, 0), (v,))
    with PlainWeightNorm():
        gradgradcheck(lambda v: kernel(v, g, 0), (v,))
        assert torch.allclose(kernel(v, g, 0), v * g / v.norm(dim=1, keepdim=True), rtol=1e-14)


def test_no_parameter_of_a_model_decides_the_dtype_of_its_batches_but_a_floating_one() -> None:
    assert one_stage(model=OnQuantised()).stages["only"].like.dtype == torch.float64


# --- inference tensors


def made_in_inference_mode(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


ESTIMATORS = pytest.mark.parametrize("estimator", [Unrolled(), Checkpointed()], ids=["unrolled", "checkpointed"])


@ESTIMATORS
def test_batches_made_in_inference_mode_serve(estimator):
    weights = example_weights()
    found, expected = (
        metaopt.hypergradient(meta_loss(one_stage(batches=batches, estimator=estimator), weights), weights)["logits"]
        for batches in (made_in_inference_mode(feature_batches), feature_batches())
    )
    assert torch.equal(found, expected)


# --- buffers that a forward moves


class Centred(Network):
    """Subtracts, in eval mode, an average of what it has seen in training, which is computed in the graph."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(CLASSES, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        scores = super().forward(inputs)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * scores.mean(0)
        return scores if self.training else scores - self.average


def normed(momentum: float = 0.1) -> nn.Module:
    model = Network(batch_norm=True)
    model.norm.momentum = momentum
    return model


def warned(chain: metaopt.Chain, train_mode: bool = False) -> list[str]:
    """What two meta-steps say about the chain's one stage, read in eval or train mode."""
    weights = example_weights()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model = chain.unroll(weights)["only"].train(train_mode)
            model(VALIDATION["inputs"])
    return [str(w.message) for w in caught if "carry no graph" in str(w.message)]


def test_buffers_that_the_hypergradient_leaves_out_are_named_once():
    chain = one_stage(model=normed())
    found = re.escape("stage 'only' moves running statistics or other buffers (norm.running_mean, norm.running_var)")
    (said,) = warned(chain)
    assert re.match(f"{found}.*train mode.*momentum=0.0", said)
    assert warned(chain) == []


@pytest.mark.parametrize(
    ("model", "estimator", "said"),
    [(lambda: normed(0.0), Unrolled(), 0), (Centred, Unrolled(), 0), (Centred, Checkpointed(), 1)],
)
def test_buffers_that_stay_or_carry_their_graph_are_not_named(model, estimator, said):
    assert len(warned(one_stage(model=model(), estimator=estimator))) == said


def test_reads_in_train_mode_and_checks_say_nothing_of_buffers():
    assert warned(one_stage(model=normed()), train_mode=True) == []
    chain, objective = one_stage(model=normed()), metaopt.ValidationLoss("only")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metaopt.check_hypergradient(chain, objective, VALIDATION, example_weights())


def test_an_average_in_the_graph_has_its_part_of_the_hypergradient():
    check = metaopt.check_hypergradient(
        one_stage(model=Centred), metaopt.ValidationLoss("only"), VALIDATION, example_weights(), tolerance=1e-6
    )
    assert check.ok, str(check)


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
    chain.stages["only"].transform = metaopt.ClipNorm(1.0)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(metaopt.StageError, match="ConjugateGradient"):
        chain.unroll(example_weights())
