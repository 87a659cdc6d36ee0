"""Any Hugging Face model: from a config or pretrained, parts of it frozen, or with LoRA adapters."""

from __future__ import annotations

import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError

import torch
import transformers
from huggingface_hub import constants
from torch import nn

from metaopt.base.errors import ConfigError, did_you_mean, first_line
from metaopt.base.ranges import matching

Options = Mapping[str, Any]
Kind = Literal["seq2seq", "causal", "masked", "classification", "image_classification"]

# Kind → the class that builds it, and what peft calls it
KINDS: dict[str, tuple[Any, str | None]] = {
    "seq2seq": (transformers.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "causal": (transformers.AutoModelForCausalLM, "CAUSAL_LM"),
    "masked": (transformers.AutoModelForMaskedLM, None),
    "classification": (transformers.AutoModelForSequenceClassification, "SEQ_CLS"),
    "image_classification": (transformers.AutoModelForImageClassification, None),
}
# Families whose first position is numbered pad_token_id + 1.
POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "ibert")

FAMILIES = transformers.CONFIG_MAPPING  # name → class of config
HUB_SECONDS = 10
FOLDER_OR_NAME = "give a folder written by save_pretrained, or a name on the Hugging Face hub"


def from_config(
    kind: Kind,
    model_type: str,
    config: Options | None = None,
    *,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    max_length: int | None = None,
    max_target_length: int | None = None,
    num_labels: int | None = None,
    freeze: Sequence[str] = (),
    unfreeze: Sequence[str] = (),
    lora: Options | None = None,
) -> nn.Module:
    """Return a freshly initialised Hugging Face model.

    Args:
        kind: what it does; each stands for one `AutoModelFor…`.
        model_type: family, such as `t5`, `bart`, `gpt2`, `llama`, `bert`, `vit`.
        config: options of that family's own config by its own names, such as `d_model` or `hidden_size`.
        bos_token_id: with which a sequence-to-sequence model's answers begin, too.
        max_length, max_target_length: tokens of the longest input and answer; models with learned positions get as many
            as the longer one, unless `config` says otherwise.
        freeze, unfreeze, lora: as in `adapt`.

    Raises:
        ConfigError: an unknown kind, family or option, or sizes that do not fit each other.
    """
    auto = _auto_class("from_config", kind)
    if model_type not in FAMILIES:
        hint = did_you_mean(model_type, list(FAMILIES), others=False)
        raise ConfigError(f"from_config: no model_type {model_type!r}{hint}")
    known = FAMILIES[model_type]()
    for name in config or {}:
        if not hasattr(known, name):
            hint = did_you_mean(name, [*known.to_dict(), *getattr(known, "attribute_map", {})], others=False)
            raise ConfigError(f"from_config: a {model_type} config has no option {name!r}{hint}")
    starts = bos_token_id if kind == "seq2seq" else None
    given: dict[str, Any] = {"vocab_size": vocab_size, "num_labels": num_labels, "decoder_start_token_id": starts}
    given |= {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    offset = 1 + (pad_token_id or 0) if model_type in POSITIONS_AFTER_PADDING else 0
    longest = max(max_length or 0, max_target_length or 0)
    of_some = {
        "forced_eos_token_id": eos_token_id if kind == "seq2seq" else None,
        "max_position_embeddings": longest + offset if longest else None,
        "use_cache": False,  # not in a training step; generate() asks for one by itself
    }
    given |= {name: value for name, value in of_some.items() if hasattr(known, name)}
    options = {**{name: value for name, value in given.items() if value is not None}, **(config or {})}
    with refusing(f"from_config: no {kind} model of type {model_type!r} with {options}"):
        model = auto.from_config(FAMILIES[model_type](**options))
    return adapt(model, kind, freeze, unfreeze, lora)


def from_pretrained(
    kind: Kind,
    name: str,
    *,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    num_labels: int | None = None,
    freeze: Sequence[str] = (),
    unfreeze: Sequence[str] = (),
    lora: Options | None = None,
) -> nn.Module:
    """Return a pretrained Hugging Face model, in float32; what `kind` needs and the checkpoint lacks is new.

    Args:
        name: a folder written by `save_pretrained`, or a name on the Hugging Face hub.
        pad_token_id: of the data; taken where the model names none (GPT-2, say).
        bos_token_id: with which the data begin an answer; must be what the sequence-to-sequence model was trained with.
        num_labels: classes; None keeps those of the checkpoint.
        kind, freeze, unfreeze, lora: as in `from_config`.

    Raises:
        ConfigError: it cannot be loaded, or was trained with another first token.
    """
    auto = _auto_class("from_pretrained", kind)
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    with refusing(f"from_pretrained: cannot load a {kind} model from {name!r}: {FOLDER_OR_NAME}"):
        model = local_first(auto.from_pretrained, name, dtype=torch.float32, **options)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_token_id
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # not in a training step; generate() asks for one by itself
    start = getattr(model.config, "decoder_start_token_id", None)
    if kind == "seq2seq" and bos_token_id is not None and start not in (None, bos_token_id):
        raise ConfigError(
            f"from_pretrained: {name!r} begins its answers with token {start}, and the data begin theirs with token "
            f"{bos_token_id}; set data.decoder_start_token_id={start}"
        )
    return adapt(model, kind, freeze, unfreeze, lora)


def adapt(
    model: nn.Module, kind: Kind, freeze: Sequence[str] = (), unfreeze: Sequence[str] = (), lora: Options | None = None
) -> nn.Module:
    """Say, in place, which parameters of a model are trained: all but the frozen ones, or LoRA adapters alone.

    Args:
        freeze, unfreeze: patterns of parameter names, and exceptions: `freeze=["*"], unfreeze=["classifier.*"]` trains
            the head alone.
        lora: options of `peft.LoraConfig`, such as `{"r": 8, "target_modules": ["q", "v"]}`; a new head of a classifier
            is trained beside the adapters.

    Raises:
        ConfigError: a pattern that names no parameter, nothing left to train, or options that peft does not take.
    """
    if lora is not None:
        if freeze or unfreeze:
            raise ConfigError("lora trains the adapters alone: name what else to train in lora.modules_to_save")
        return _with_lora(model, kind, lora)
    names = [name for name, _ in model.named_parameters()]
    frozen = matching("adapt: freeze", freeze, names) - matching("adapt: unfreeze", unfreeze, names)
    if unfreeze and not freeze:
        raise ConfigError("adapt: unfreeze makes exceptions from freeze, which is empty; add freeze=['*']")
    if frozen.issuperset(names):
        raise ConfigError(f"adapt: freeze={list(freeze)} leaves no parameter to train; name less, or use unfreeze")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return model


def _with_lora(model: nn.Module, kind: Kind, options: Options) -> nn.Module:
    """Return the model with low-rank adapters (Hu et al., 2021, arXiv:2106.09685); all else is frozen.

    A weight W becomes `W + (lora_alpha / r) B A`; a stage trains and carries A and B alone.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("lora needs the package peft: pip install 'metaopt-chain[lora]'") from error
    defaults: dict[str, Any] = {"task_type": KINDS[kind][1]}
    if kind == "image_classification":
        defaults["modules_to_save"] = ["classifier"]  # a new head must be trained; peft sees to that for text alone
    with warnings.catch_warnings(), refusing("lora"):
        # peft reads an attribute that transformers 5 renames, and corrects this option of GPT-2's layers by itself.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set", category=UserWarning)
        return peft.get_peft_model(model, peft.LoraConfig(**{**defaults, **options}))  # type: ignore[arg-type]


def _auto_class(where: str, kind: str) -> Any:
    if kind not in KINDS:
        raise ConfigError(f"{where}: no kind of model {kind!r}{did_you_mean(kind, KINDS)}")
    return KINDS[kind][0]


def local_first(load: Callable[..., Any], name: str, *names: str, **options: Any) -> Any:
    """Load from a folder or from what was downloaded before; else, if the hub answers within 10 s, from there."""
    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = True  # local_files_only is not heeded by all that transformers looks for
        return load(name, *names, **options)
    except Exception as error:
        if offline or all(Path(one).exists() for one in (name, *names)):
            raise
        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_SECONDS).close()
        except HTTPError:
            pass  # it is there
        except (OSError, ValueError):
            raise ConfigError(
                f"it is neither a folder here nor downloaded, and {constants.ENDPOINT} does not answer; download it "
                "where there is a network, or give the folder"
            ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline
    return load(name, *names, **options)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever a library makes of sizes, names and options into a ConfigError."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{what}: {first_line(error)}") from error
