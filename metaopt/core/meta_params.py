"""Meta-parameters: what the outer problem learns, their names, and how they are lent other tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from metaopt.base.errors import ConfigError
from metaopt.core.view import ModelStructure, held

AnyMetaParameters = nn.Module | Tensor | Mapping[str, nn.Module | Tensor]


class TensorWeights(nn.Module):
    """A module around a user's own tensor, which is learned as it is."""

    def __init__(self, tensor: Tensor, name: str = "") -> None:
        super().__init__()
        self.name = name
        self._parameters[name] = tensor  # type: ignore[assignment]  # `register_parameter` takes nn.Parameters only

    def weights(self) -> Tensor:
        """Return the tensor [n]."""
        return self._parameters[self.name]  # type: ignore[return-value]


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


class Lending:
    """Meta-parameters that are lent other tensors, again and again: `with lending(tensors): ...`."""

    def __init__(self, meta_params: AnyMetaParameters) -> None:
        self.meta_params = meta_params
        structures = {prefix: ModelStructure(module) for prefix, module in as_named(meta_params).items()}
        self._lent = [(prefix, structure, structure.params) for prefix, structure in structures.items()]

    @contextmanager
    def __call__(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let them have other tensors inside the block, by the names of `named_tensors`."""
        with ExitStack() as stack:
            for prefix, structure, own in self._lent:
                given = {name: tensors.get(_joined(prefix, name), p) for name, p in own.items()}
                stack.enter_context(held(structure.modules))
                stack.enter_context(structure.swap(given, structure.buffers))
            yield
