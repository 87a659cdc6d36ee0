"""What would make a hypergradient wrong in silence, in modules and tensors: refused, put right, or warned of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from metaopt.base.errors import ConfigError, StageError

if TYPE_CHECKING:
    from metaopt.core.view import FunctionalModel, Training


def refuse_unsupported(module: nn.Module, stage: str) -> None:
    """Raise for modules whose second derivative would be wrong in silence."""
    for name, submodule in module.named_modules():
        if problem := _problem_of_module(submodule):
            raise StageError(f"stage {stage!r}: module {name or '(top)'!r} ({type(submodule).__name__}) {problem}")
    for name, param in module.named_parameters():
        if problem := _problem_of_parameter(param):
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


_SHARDED = "is spread over processes (FSDP or DTensor), which the swap of weights does not see; give the plain module"
_HOOK = "remove it (handle.remove()), and change gradients by Stage(..., transform=...)"


def _problem_of_module(m: Any) -> str | None:
    kinds = {kind.__name__ for kind in type(m).__mro__}
    hooks = {kind.__name__ for hook in m._forward_pre_hooks.values() for kind in type(hook).__mro__}
    if isinstance(m, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "is a wrapper that runs copies of the weights in training; give the stage the module inside: `.module`"
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        return _SHARDED
    in_place = hasattr(m.__dict__.get("forward"), "_torchdynamo_orig_callable")
    if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None or in_place:
        return "was compiled, or compiled in place: no second derivative; give the stage the plain one (`._orig_mod`)"
    if isinstance(m, torch.jit.ScriptModule):
        return "was compiled by torch.jit, which no check can copy; give the Python module that it was made from"
    if getattr(m, "gradient_checkpointing", False) is True:
        return (
            "uses gradient checkpointing, which recomputes after the trained weights are swapped back; call "
            "`model.activation_checkpointing_disable()` (`gradient_checkpointing_disable()` in older transformers)"
        )
    if hooks & {"WeightNorm", "SpectralNorm", "BasePruningMethod"}:
        return (
            "keeps a computed weight as an attribute (pruning, the old weight_norm or spectral_norm), which outlives "
            "the swap of weights; use torch.nn.utils.parametrizations.weight_norm, or prune.remove(module, name)"
        )
    spectral = isinstance(m, ParametrizationList) and any(type(part).__name__ == "_SpectralNorm" for part in m)
    if spectral and any(p.requires_grad for p in m.parameters()):
        return (
            "is a spectral norm, whose power iteration has no graph, so that part of the second derivative is lost; "
            "register a parametrization `weight / torch.linalg.matrix_norm(weight, 2)`, or freeze the weight"
        )
    if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.weight.requires_grad:
        if m.sparse:
            return "makes sparse gradients, which cannot be differentiated; build it with sparse=False"
        if m.scale_grad_by_freq:
            return "divides by the counts of a batch, outside the second derivative; set scale_grad_by_freq=False"
        if m.max_norm:
            return "rescales its rows in place and without a graph; set max_norm=None, and normalise in the forward"
    if m._backward_hooks or m._backward_pre_hooks:
        return f"has a backward hook, which would run again when the gradient is differentiated; {_HOOK}"
    return None


def _problem_of_parameter(param: Tensor) -> str | None:
    if hasattr(param, "placements"):
        return _SHARDED
    if param.is_complex() and param.requires_grad:
        return "is complex; train its real and imaginary part as two parameters, joined by torch.complex in the forward"
    if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
        return f"has a gradient hook, which copies of it do not have; {_HOOK}"
    return None


class PlainWeightNorm(TorchFunctionMode):
    """Weight norm by its formula `g v / ‖v‖`: torch's kernel takes ‖v‖ as a constant in the second derivative."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:  # pyright: ignore[reportPrivateImportUsage]
            v, g, dim = args
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


# --- what a trained model is used for ---------------------------------------------------------------------------


def warn_of_other_inputs(trained: Training, now: frozenset[str], labelled: bool) -> None:
    """Warn, once for the same names, if a call lacks what every call in training had."""
    made = {"decoder_input_ids"} if labelled else set()  # by the model itself
    if not now or not trained.read or any(names <= now | made for names in trained.read):
        return
    before = " or ".join(sorted(", ".join(sorted(names)) for names in trained.read))
    trained.read.add(now)
    warnings.warn(
        f"stage {trained.stage!r} read {before} in training and reads {', '.join(sorted(now))} now: inputs that it "
        f"never saw. Feed it as in training: metaopt.PipelineLoss({trained.stage!r}), objective=pipeline (a loss of "
        "your own makes the student's inputs in student_inputs(...) of a metaopt.FromUpstream)",
        UserWarning,
        stacklevel=3,
    )


def moved_buffers(model: FunctionalModel) -> list[str]:
    """Name the floating buffers that a training has moved and that carry no graph: running statistics, averages."""
    own = model.structure.buffers
    floating = {n: b for n, b in model.buffers.items() if b.is_floating_point() and not b.requires_grad}
    return [name for name, buffer in floating.items() if not torch.equal(buffer, own[name])]


def note_moved_buffers(model: FunctionalModel) -> None:
    """Leave a warning for the first read of a trained model in eval mode, if its training moves buffers."""
    moved = moved_buffers(model)
    model.structure.unsaid = [f"stage {model.structure.stage!r} moves {left_out(moved)}"] if moved else []


def left_out(buffers: Sequence[str]) -> str:
    """Say what moved buffers, by name, mean for the hypergradient."""
    shown = ", ".join(buffers[:3]) + (", …" if len(buffers) > 3 else "")
    return (
        f"running statistics or other buffers ({shown}) that eval mode reads; they carry no graph, so the "
        "hypergradient leaves out what depends on them. Read that model in train mode (trained[...].train(), "
        "upstream[...].train()), or keep them still (a batch norm's momentum=0.0)"
    )
