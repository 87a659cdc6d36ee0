"""What can be known of the data before any time is lost: the first batch of each stream is looked at and scored."""

from __future__ import annotations

import itertools
from collections.abc import Sized
from typing import Any

from metaopt.app.final import num_classes, weights_of
from metaopt.base.errors import ConfigError, NonFiniteError, did_you_mean, tell
from metaopt.base.streams import BatchStream, seeded
from metaopt.core.contracts import described, telling
from metaopt.data.bundle import DataBundle
from metaopt.data.checks import checked
from metaopt.losses import logits
from metaopt.losses.objectives import as_trained
from metaopt.trainer import MetaTrainer

PASSES = 10  # through the validation stream, in which each may have other batches
MOST = 1000  # batches of a stream in which a number that is not finite is looked for


def rehearse(trainer: MetaTrainer, data: DataBundle) -> None:
    """Look at the first batch of each stream, and score the untrained models on those that are scored.

    Raises:
        ConfigError: data that the run would stop at, or that it would silently use as something else.
    """
    _check_weights(trainer, data)
    size = len(data.validation) if isinstance(data.validation, Sized) else trainer.validation_batches
    if trainer.validation_batches > PASSES * size:
        raise ConfigError(
            f"trainer.validation_batches={trainer.validation_batches} is more than {PASSES} passes through the "
            f"validation stream at each meta-step, which has {size} batches; ask for {size}"
        )
    last = list(trainer.chain.stages.values())[-1].model
    if data.facts.get("is_causal") and logits.is_encoder_decoder(last):
        raise ConfigError("data.task=causal needs a causal model, and this is an encoder-decoder; model=gpt2, say")
    vocabulary = data.facts.get("vocab_size")
    sizes = {"labels": num_classes(trainer, data) or logits.num_classes(last), "inputs": data.facts.get("num_features")}
    sizes |= dict.fromkeys(("input_ids", "decoder_input_ids"), vocabulary)
    firsts: dict[str, Any] = {}
    for name in data.stream_names:
        sizes["index"] = data.facts.get("num_examples") if name == "train" else None
        sizes["source"] = data.facts.get("num_sources")
        found = trainer.selection.batches if name == "selection" and trainer.selection else _first(name, data)
        firsts[name], *_ = checked(name, found, sizes)
    with seeded(0, trainer.chain.device):
        trained = trainer.chain.train(trainer.meta_params, num_steps=0)
        trainer.mean_loss(trained, [firsts["validation"]])
        for name in ("selection", "test"):
            _score(name, firsts[name], trained, trainer, data)


def tell_where(error: BaseException | None, data: DataBundle) -> None:
    """Note on an error about a number that is not finite in which batch of the data there is one."""
    if isinstance(error, NonFiniteError):
        try:
            for name in data.stream_names:
                for _ in checked(name, itertools.islice(data.stream(name), MOST)):
                    pass
        except ConfigError as found:
            tell(error, str(found))


def _first(name: str, data: DataBundle) -> Any:
    """Return the first batch of a stream in a list, as little of it moved as can be."""
    if name == "test":  # may be what no training takes, such as a loader whose workers persist
        with seeded(0):
            return list(itertools.islice(data.test, 1))
    try:
        return BatchStream(data.stream(name), 0).peek(1)
    except ConfigError as error:
        raise ConfigError(f"data: {name}: {error}") from error


def _score(name: str, batch: Any, trained: Any, trainer: MetaTrainer, data: DataBundle) -> None:
    if data.score is None:
        trainer.mean_loss(trained, [batch])
        return
    model = as_trained(trained, list(trained)[-1])
    with telling(lambda: f"the data's score, on the first batch of {name}: {described(batch)}"):
        metrics = data.score(model, [trainer.chain.move(batch)])
    if data.selection_metric is not None and data.selection_metric not in metrics:
        there = did_you_mean(data.selection_metric, metrics)
        raise ConfigError(f"data: selection_metric={data.selection_metric!r} is none that score returns{there}")


def _check_weights(trainer: MetaTrainer, data: DataBundle) -> None:
    """Refuse a table of weights that is not as long as the data say they are."""
    key, weights = weights_of(trainer.meta_params) or ("", ())
    fact = {"index": "num_examples", "source": "num_sources"}.get(key, "")
    count = data.facts.get(fact)
    if count is not None and len(weights) != count:
        raise ConfigError(
            f"meta_params: there are {len(weights)} weights, and the data have {fact}={count}; give ${{facts.{fact}}}"
        )
