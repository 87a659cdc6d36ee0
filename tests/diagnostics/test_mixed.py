"""Mixed second derivatives against torch's own Jacobian, and against a formula."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import metaopt


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))


INPUTS = torch.arange(12, dtype=torch.float64).view(3, 4).sin()


def loss_of(weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (INPUTS @ weight + bias).tanh() ** 2).sum() + b * (weight**3).sum()


def problem() -> tuple[Scales, dict[str, Tensor], Tensor]:
    phi = Scales()
    params = {
        "weight": torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_(),
        "bias": torch.tensor(0.2, dtype=torch.float64).requires_grad_(),
        "spare": torch.zeros(2, dtype=torch.float64).requires_grad_(),
    }
    return phi, params, loss_of(params["weight"], params["bias"], phi.a, phi.b)


def exact(param: str, phi: Scales, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Torch's own Jacobian of the gradient with respect to (a, b)."""

    def gradient(a: Tensor, b: Tensor) -> Tensor:
        weight, bias = (params[name].detach().requires_grad_() for name in ("weight", "bias"))
        at = {"weight": weight, "bias": bias}
        return torch.autograd.grad(loss_of(weight, bias, a, b), at[param], create_graph=True)[0]

    found = jacobian(gradient, (phi.a.detach(), phi.b.detach()))
    assert isinstance(found, tuple)
    return found


def test_blocks_equal_torch_s_jacobian():
    phi, params, loss = problem()
    blocks = metaopt.mixed_jacobian(loss, params, phi)
    for name in ("weight", "bias"):
        for other, block in zip(("a", "b"), exact(name, phi, params), strict=True):
            torch.testing.assert_close(blocks[name, other], block, rtol=1e-13, atol=1e-15)
    assert blocks["weight", "a"].shape == (4, 3)
    assert not blocks["weight", "unused"].any()
    assert ("spare", "a") not in blocks


def test_a_product_is_the_vector_times_the_blocks():
    phi, params, loss = problem()
    blocks = metaopt.mixed_jacobian(loss, params, phi)
    vector = {"weight": torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)}
    found = metaopt.mixed_vjp(loss, params, phi, vector)
    torch.testing.assert_close(found["a"], vector["weight"] @ blocks["weight", "a"], rtol=1e-13, atol=1e-15)
    ones = metaopt.mixed_vjp(loss, params, phi)
    rows = blocks["weight", "b"].sum() + blocks["bias", "b"]
    torch.testing.assert_close(ones["b"], rows, rtol=1e-13, atol=1e-15)
    assert ones["a"].shape == phi.a.shape


def test_what_does_not_fit_is_refused():
    phi, params, loss = problem()
    with pytest.raises(metaopt.StageError, match=r"cotangent 'weight' of shape \[3\]"):
        metaopt.mixed_vjp(loss, params, phi, {"weight": torch.ones(3, dtype=torch.float64)})
    added = (params["weight"] ** 2).sum() + phi.b
    with pytest.raises(metaopt.MissingPathError, match="'a', 'b', 'unused'"):
        metaopt.mixed_vjp(added, params, phi)
    with pytest.raises(metaopt.MissingPathError, match="'a', 'b', 'unused'"):
        metaopt.mixed_jacobian(added, params, phi)
