"""What is refused: modules, tensors and gradients whose second derivative would be wrong in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod

from metaopt.base.errors import ConfigError, StageError
from metaopt.core.graphs import nodes
from metaopt.core.structure import RECOMPUTES
from metaopt.core.view import FunctionalModel


def refuse_unsupported(module: nn.Module, stage: str) -> None:
    """Raise for modules whose second derivative would be wrong in silence."""
    for name, submodule in module.named_modules():
        problem = next((text for applies, text in _MODULES if applies(submodule)), None)
        if problem:
            raise StageError(f"stage {stage!r}: module {name or '(top)'!r} ({type(submodule).__name__}) {problem}")
    for name, param in module.named_parameters():
        problem = next((text for applies, text in _PARAMETERS if applies(param)), None)
        if problem:
            raise StageError(f"stage {stage!r}: parameter {name!r} {problem}")


def refuse_unusable(module: nn.Module, where: str) -> None:
    """Raise for parameters and buffers that are not there yet, or that torch keeps out of any graph for good."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise ConfigError(f"{where}: {name!r} has no shape yet; run one batch through the model first")
        if tensor.is_inference():
            raise StageError(
                f"{where}: {name!r} was made under torch.inference_mode(), which keeps it out of any graph for good; "
                "use torch.no_grad() there instead, or give copy.deepcopy(module), made outside of it"
            )


def refuse_single_derivative(gradients: Mapping[Any, Tensor | None], stage: str) -> None:
    """Raise if a gradient, in its graph, was computed by something that cannot be differentiated again.

    At `@once_differentiable` torch raises in `backward()` alone: `autograd.grad` walks past, and the second derivative
    is lost.
    """
    for node in nodes(gradient for gradient in gradients.values() if gradient is not None):
        problem = _ONCE.get(node.name())
        if problem:
            raise StageError(
                f"stage {stage!r}: the inner loss has no second derivative, since it runs through "
                f"{problem}{_operation(node)}, or take "
                "estimator=metaopt.Checkpointed(product=metaopt.FiniteDifference()), which needs first ones only"
            )


def refuse_second_derivative(node: str, instead: str) -> None:
    """Raise if the running backward is to leave a graph (create_graph=True), in which `node` would be missing."""
    if torch.is_grad_enabled():
        raise StageError(
            f"{node}: create_graph=True asks for the hypergradient's own graph, and this node has none, so that a "
            f"second derivative would leave it out; {instead}"
        )


def _operation(node: Any) -> str:
    """Return which operation a node stands for that only raises: it says so when it is run."""
    try:
        return "" if node.name() != "torch::autograd::NotImplemented" else str(node(torch.zeros(())))
    except RuntimeError as error:
        return f" ({error})"


_ONCE = {
    "CdistBackwardBackward0": "torch.cdist: write (x[:, None] - y).square().sum(-1).sqrt()",
    "EmbeddingBagBackwardBackward0": "nn.EmbeddingBag: write nn.Embedding(...)(ids).mean(1)",
    "torch::autograd::NotImplemented": "an operation of which torch has the first derivative only: write it in others",
    "torch::autograd::Error": "a torch.autograd.Function whose backward is marked @once_differentiable: write it in "
    "differentiable operations",
    "CompiledFunctionBackwardBackward": "a function compiled by torch.compile: give the stage the uncompiled one",
}


def refuse_recomputation(loss: Tensor, stage: str) -> None:
    """Raise if a loss runs through reentrant checkpointing, whose weights `autograd.grad` does not see."""
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes([loss])):
        raise StageError(f"stage {stage!r}: {RECOMPUTES}")


def moved_buffers(model: FunctionalModel) -> list[str]:
    """Name the floating buffers that a training has moved and that carry no graph: running statistics, averages."""
    own = model.structure.buffers
    floating = {n: b for n, b in model.buffers.items() if b.is_floating_point() and not b.requires_grad}
    return [name for name, buffer in floating.items() if not torch.equal(buffer, own[name])]


def note_moved_buffers(model: FunctionalModel) -> None:
    """Leave a warning for the first read of a trained model in eval mode, if its training moves buffers.

    They are looked at once per stage, since an accelerator is waited for.
    """
    structure = model.structure
    if structure.unsaid is None:
        moved = moved_buffers(model)
        structure.unsaid = [f"stage {structure.stage!r} moves {left_out(moved)}"] if moved else []


def left_out(buffers: Sequence[str]) -> str:
    """Say what moved buffers, by name, mean for the hypergradient."""
    shown = ", ".join(buffers[:3]) + (", …" if len(buffers) > 3 else "")
    return (
        f"running statistics or other buffers ({shown}) that eval mode reads; they carry no graph, so the "
        "hypergradient leaves out what depends on them. Read that model in train mode (trained[...].train(), "
        "upstream[...].train()), or keep them still (a batch norm's momentum=0.0)"
    )


def refuse_given_weights(loss: Tensor, stage: str) -> None:
    """Raise if the first derivative of a loss takes weights as given that are computed from the losses.

    It is no function's gradient then, and its Jacobian is not symmetric.
    """
    if any(type(node).__name__ == "_GivenWeightsBackward" for node in nodes([loss])):
        raise StageError(
            f"stage {stage!r}: FiniteDifference takes the Jacobian of the inner gradient to be symmetric; with weights "
            "computed from the losses (WeightNetwork), which that gradient takes as given, it is not. Use "
            "product=metaopt.DoubleBackward()"
        )


@contextmanager
def naming_inference_tensors(stage: str) -> Iterator[None]:
    """Say which stage's loss reads a tensor that torch keeps out of any graph, and what to do."""
    try:
        yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise StageError(
            f"the loss of stage {stage!r} reads a tensor that was made under torch.inference_mode(), which keeps it "
            "out of any graph for good; make it under torch.no_grad() instead, or read tensor.clone()"
        ) from error


def _is_wrapped(module: nn.Module) -> bool:
    return isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))


def _is_sharded(module: nn.Module) -> bool:
    return bool({"FullyShardedDataParallel", "FSDPModule"} & {kind.__name__ for kind in type(module).__mro__})


def _was_compiled(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(forward, "_torchdynamo_orig_callable")


def _keeps_computed_weight(module: nn.Module) -> bool:
    return any(type(hook).__name__ in ("WeightNorm", "SpectralNorm") for hook in module._forward_pre_hooks.values())


def _is_pruned(module: nn.Module) -> bool:
    return any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())


def _has_spectral_norm(module: nn.Module) -> bool:
    if not isinstance(module, ParametrizationList) or not any(p.requires_grad for p in module.parameters()):
        return False
    return any(type(part).__name__ == "_SpectralNorm" for part in module)


def _is_embedding(option: str) -> Callable[[nn.Module], bool]:
    def applies(module: nn.Module) -> bool:
        is_table = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.weight.requires_grad
        return is_table and bool(getattr(module, option))

    return applies


def _has_backward_hooks(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _has_hooks(param: Tensor) -> bool:
    return bool(param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None))


_SHARDED = (
    "is spread over processes (FSDP or DTensor), and the swap of weights does not see its parts; give the stage the "
    "plain module"
)
_MODULES: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        _is_wrapped,
        "is a wrapper (DataParallel), which runs copies of the weights that the unroll does not train; give the stage "
        "the module inside: `.module`",
    ),
    (_is_sharded, _SHARDED),
    (
        lambda module: hasattr(module, "_orig_mod"),
        "was compiled by torch.compile, and compiled code has no second derivative; give the stage the module inside: "
        "`._orig_mod`",
    ),
    (
        _was_compiled,
        "was compiled in place, and compiled code has no second derivative; give the stage an uncompiled module",
    ),
    (
        lambda module: isinstance(module, torch.jit.ScriptModule),
        "was compiled by torch.jit, and neither its weights nor its optimizer can be copied for a check; give the "
        "stage the Python module that it was made from",
    ),
    (
        lambda module: getattr(module, "gradient_checkpointing", False) is True,
        "uses gradient checkpointing, which recomputes after the trained weights are swapped back; call "
        "`model.activation_checkpointing_disable()` (`gradient_checkpointing_disable()` in older transformers)",
    ),
    (
        _keeps_computed_weight,
        "keeps a computed weight as an attribute (the old weight_norm or spectral_norm), which outlives the swap of "
        "weights; use torch.nn.utils.parametrizations.weight_norm",
    ),
    (
        _is_pruned,
        "keeps a computed weight as an attribute (torch.nn.utils.prune), which outlives the swap of weights; make it "
        "permanent: torch.nn.utils.prune.remove(module, name)",
    ),
    (
        _has_spectral_norm,
        "is a spectral norm, whose singular vectors come from a power iteration without a graph, so that their part of "
        "the second derivative is lost; register a parametrization whose forward returns "
        "`weight / torch.linalg.matrix_norm(weight, 2)`, or freeze the weight",
    ),
    (_is_embedding("sparse"), "makes sparse gradients, which cannot be differentiated; build it with sparse=False"),
    (
        _is_embedding("scale_grad_by_freq"),
        "scales its gradient by the counts of a batch, and torch's second derivative leaves that out; build it with "
        "scale_grad_by_freq=False, and weight the tokens in the loss",
    ),
    (
        _is_embedding("max_norm"),
        "rescales its rows in place and without a graph (max_norm); build it with max_norm=None, and normalise in the "
        "forward",
    ),
    (
        _has_backward_hooks,
        "has a backward hook, which would run again when the gradient is differentiated; remove it (handle.remove()), "
        "and change gradients by Stage(..., transform=...)",
    ),
)
_PARAMETERS: tuple[tuple[Callable[[Tensor], bool], str], ...] = (
    (lambda param: hasattr(param, "placements"), _SHARDED),
    (
        lambda param: param.is_complex() and param.requires_grad,
        "is complex; train its real and imaginary part as two parameters, joined by torch.complex in the forward",
    ),
    (
        _has_hooks,
        "has a gradient hook, which copies of it do not have; remove it (handle.remove()), and change gradients by "
        "Stage(..., transform=...)",
    ),
)
