"""Meta-parameters: what the outer problem learns, their names, and how they are lent other tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from metaopt.base.errors import ConfigError, did_you_mean
from metaopt.core.view import ModelStructure


class MetaParameters(nn.Module):
    """Base class of what is learned; a plain `nn.Module` serves as well.

    One that weighs examples implements `forward(batch) -> weights [batch size]`, or [batch size, positions].
    `reads_losses` marks those that are called `forward(batch, losses)`, with each example's loss.
    """

    reads_losses: bool = False

    def summary(self) -> dict[str, float]:
        """Return the few numbers that tell what was learned, by name; tables of weights have reports of their own."""
        return {}

    def baseline(self) -> nn.Module:
        """Return what training without learning it would use: by default weight 1 for all."""
        return Uniform()


AnyMetaParameters = nn.Module | Tensor | Mapping[str, nn.Module | Tensor]


class Uniform(MetaParameters):
    """Weight 1 for every example: the baseline that learns nothing."""

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return ones [batch size]."""
        some = next(value for value in batch.values() if isinstance(value, Tensor))
        return torch.ones(len(some), device=some.device)


class TensorWeights(MetaParameters):
    """A user's own tensor, learned as it is; to losses that read a module, entry i is the weight of example i."""

    key = "index"

    def __init__(self, tensor: Tensor, name: str = "") -> None:
        super().__init__()
        self._name = name
        self._parameters[name] = tensor  # type: ignore[assignment]  # `register_parameter` takes nn.Parameters only

    def weights(self) -> Tensor:
        """Return the tensor [n]."""
        return self._parameters[self._name]  # type: ignore[return-value]

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the weight of each example of the batch [batch size]."""
        return look_up(self.weights(), batch, self.key, "a tensor as meta-parameters")

    def baseline(self) -> nn.Module:
        """Return ones of its shape."""
        return TensorWeights(torch.ones_like(self.weights()), self._name)


def in_bounds(index: Tensor, size: int) -> bool:
    """Whether all of `index` lies in [0, size); a tensor of a captured graph has no values yet, and passes."""
    if isinstance(index, FakeTensor) or not index.numel():
        return True
    return int(index.min()) >= 0 and int(index.max()) < size


def look_up(table: Tensor, batch: Mapping[str, Tensor], key: str, reader: str, sparse: bool = False) -> Tensor:
    """Return the row of a table [n] or [n, C] at each of `batch[key]`, after checking that there is one for each.

    `sparse` lets the table's gradient hold only the rows that are read.
    """
    if key not in batch:
        raise ConfigError(
            f"{reader} reads batch[{key!r}], which this batch lacks (it has: {', '.join(batch)}); let the data set add "
            "it, or weigh by another key"
        )
    index = batch[key]
    if not in_bounds(index, len(table)):
        raise ConfigError(
            f"{reader} has {len(table)} weights, and batch[{key!r}] runs from {int(index.min())} to "
            f"{int(index.max())}; number from 0, and build it with one weight for each"
        )
    return _SparseRows.apply(table, index) if sparse else table[index]


class _SparseRows(torch.autograd.Function):
    """`table[index]`, whose gradient is a sparse tensor that holds only the rows that were read."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return table[index]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        rows = gradients[0].reshape(index.numel(), *ctx.shape[1:])
        return torch.sparse_coo_tensor(index.reshape(1, -1), rows, ctx.shape, check_invariants=False), None


def baseline(meta_params: AnyMetaParameters) -> AnyMetaParameters:
    """Return what training without these meta-parameters uses in their place."""
    plain = {n: m.baseline() if isinstance(m, MetaParameters) else Uniform() for n, m in as_named(meta_params).items()}
    like = next(iter(named_tensors(meta_params).values()), None)
    for module in plain.values():
        module.requires_grad_(False).to(like) if like is not None else None
    return as_given(plain.get("", plain))


def summary(meta_params: AnyMetaParameters) -> dict[str, float]:
    """Return the few numbers that tell what was learned, by name."""
    parts = {name: m.summary() for name, m in as_named(meta_params).items() if isinstance(m, MetaParameters)}
    return {": ".join(filter(None, (name, key))): value for name, s in parts.items() for key, value in s.items()}


def as_named(meta_params: AnyMetaParameters) -> dict[str, nn.Module]:
    """Return meta-parameters as a mapping of modules; a single one goes under the empty name."""
    modules = as_modules(meta_params)
    return {"": modules} if isinstance(modules, nn.Module) else dict(modules)


def as_modules(meta_params: AnyMetaParameters) -> nn.Module | Mapping[str, nn.Module]:
    """Return meta-parameters with a module around each tensor, so that it can be lent another; `as_given` undoes it."""
    if isinstance(meta_params, nn.Module):
        return meta_params
    if isinstance(meta_params, Tensor):
        return _around(meta_params, "meta_params", "meta_params")
    if isinstance(meta_params, Mapping) and all(isinstance(m, (nn.Module, Tensor)) for m in meta_params.values()):
        named = meta_params.items()
        return {n: _around(m, "", f"meta_params[{n!r}]") if isinstance(m, Tensor) else m for n, m in named}
    raise ConfigError(
        f"meta-parameters: a {type(meta_params).__name__}; give a tensor that requires grad, an nn.Module "
        "(metaopt.ExampleWeights(...), or your own with nn.Parameters), or a mapping of names to such"
    )


def _around(tensor: Tensor, name: str, where: str) -> TensorWeights:
    if not tensor.is_leaf:
        raise ConfigError(
            f"meta-parameters: the tensor is computed from others ({tensor.grad_fn}), so no optimizer can move it; "
            f"give the one that it is computed from, and compute it in the loss: {where}.sigmoid()"
        )
    return TensorWeights(tensor, name)


def as_given(meta_params: AnyMetaParameters) -> AnyMetaParameters:
    """Return meta-parameters as user code gets them: a tensor where a tensor was given, the lent one while it is."""
    if isinstance(meta_params, Mapping) and any(isinstance(m, TensorWeights) for m in meta_params.values()):
        return {name: m.weights() if isinstance(m, TensorWeights) else m for name, m in meta_params.items()}
    return meta_params.weights() if isinstance(meta_params, TensorWeights) else meta_params


def named_tensors(meta_params: AnyMetaParameters) -> dict[str, Tensor]:
    """Return every tensor to be learned, once each, by name: parameters that require grad."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in as_named(meta_params).items():
        for name, tensor in module.named_parameters():
            if tensor.requires_grad:
                found.setdefault(id(tensor), (_joined(prefix, name), tensor))
    return dict(found.values())


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


@contextmanager
def rebound(meta_params: AnyMetaParameters, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let meta-parameters, of modules only, have other tensors inside the block, by the names of `named_tensors`."""
    with ExitStack() as stack:
        for prefix, module in as_named(meta_params).items():
            structure = ModelStructure(module)
            given = {name: tensors.get(_joined(prefix, name), p) for name, p in structure.params.items()}
            stack.enter_context(structure.swap(given, structure.buffers))
        yield


def select(meta_params: AnyMetaParameters, name: str | None, reader: str) -> Any:
    """Return the module that the class `reader` reads: the one called `name`, or the only one there is."""
    alone = isinstance(meta_params, (Tensor, nn.Module)) and not isinstance(meta_params, nn.ModuleDict)
    if alone and name is not None:
        raise ConfigError(f"{reader} reads meta-parameters {name!r}, but they are one module without a name")
    modules: Any = {"": meta_params} if alone else meta_params
    if name is None and len(modules) == 1:
        (found,) = modules.values()
    elif name in modules:
        found = modules[name]
    else:
        hint = did_you_mean(name or "", modules)
        raise ConfigError(f"{reader} must say which meta-parameters it reads: {reader}(weights=...){hint}")
    return TensorWeights(found) if isinstance(found, Tensor) else found
