"""Is learning A worth it? Fresh models trained with frozen weights, several seeds, paired.

    python experiments/default/compare.py                                  # dates: one weight per source
    python experiments/default/compare.py --out digits experiment=digits   # digits: one weight per image

For each seed: A is learned; then fresh models go through the whole chain by plain training with the learned
weights, with uniform weights, with the oracle mask (which nobody has in practice), and on the clean validation data
alone. All take the same number of steps from the same initial weights. The learning rate of each is chosen on the
selection stream; the test stream is read once per training, with that choice.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import metaopt
from metaopt.app import build
from metaopt.app.config import prepare, with_facts
from metaopt.app.final import auc, weight_quality, weights_of
from metaopt.core.chain import Chain
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.losses.logits import cross_entropy_per_example, logits_of, model_inputs

LEARNED, UNIFORM, ORACLE, CLEAN = "learned", "uniform", "oracle mask", "validation data alone"


def compose_config(overrides: Sequence[str], seed: int) -> tuple[DictConfig, metaopt.DataBundle]:
    """Return the composed config of one seed, and its data."""
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        config = prepare(compose("config", [*overrides, f"trainer.seed={seed}"]))
    bundle = build.build_data(config)
    return with_facts(config, bundle.facts), bundle


def scaled_chain(config: DictConfig, bundle: metaopt.DataBundle, factor: float, first_data: str | None) -> Chain:
    """Return a fresh chain whose learning rates are multiplied by `factor`; its first stage may read other data."""
    config = copy.deepcopy(config)
    for name in config.chain:
        config.stages[name].optimizer.lr *= factor
    if first_data is not None:
        config.stages[config.chain[0]].data = first_data
    return build.build_chain(config, bundle)


def learn(config: DictConfig, bundle: metaopt.DataBundle) -> tuple[AnyMetaParameters, float, float]:
    """Learn A; return it with the flops of meta-training and of the same inner steps by plain training."""
    chain = build.build_chain(config, bundle)
    meta_params = build.build_meta_params(config)
    trainer = metaopt.MetaTrainer(
        chain,
        build.build("objective", config.objective),
        meta_params,
        build.build_meta_optimizer(config, meta_params),
        bundle.validation,
        carry={name: config.stages[name].carry for name in config.chain},
        selection=build.build_selection(config, bundle),
        seed=config.trainer.seed,
    )
    steps, state = config.trainer.meta_steps, trainer.state_dict()
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        chain.unroll(meta_params)
    with FlopCounterMode(display=False) as meta:
        trainer.meta_step()
    trainer.load_state_dict(state)
    chain.train(meta_params, num_steps={name: config.stages[name].warmup_steps for name in config.chain})
    trainer.fit(steps)
    return meta_params, meta.get_total_flops() * steps, plain.get_total_flops() * steps


def frozen(weights: Tensor, key: str) -> AnyMetaParameters:
    """Return given weights as frozen meta-parameters, scaled to mean 1, so that one learning rate means the same."""
    return metaopt.FixedWeights(weights / weights.mean(), key)


def candidates(meta_params: AnyMetaParameters, bundle: metaopt.DataBundle) -> dict[str, AnyMetaParameters]:
    """Return the weights to train with, by name."""
    found = weights_of(meta_params)
    if found is None:
        raise SystemExit("the comparison needs meta-parameters that are a table of weights per source or example")
    key, weights = found
    mask = bundle.good_sources if key == "source" else bundle.is_clean
    rows: dict[str, AnyMetaParameters] = {LEARNED: frozen(weights, key), UNIFORM: metaopt.Uniform()}
    if mask is not None:
        rows[ORACLE] = frozen(mask.float(), key)
    return {**rows, CLEAN: metaopt.Uniform()}


def best_of_rates(
    config: DictConfig,
    bundle: metaopt.DataBundle,
    weights: AnyMetaParameters,
    first_data: str | None,
    factors: Sequence[float],
) -> tuple[dict[str, float], float, Chain]:
    """Train with each learning rate, choose on selection, read test once; return its metrics, the factor, the chain."""
    assert bundle.score is not None
    assert bundle.selection_metric is not None
    steps = build.stage_steps(config, config.trainer.meta_steps)
    best: tuple[float, float, Chain, Any] | None = None
    for factor in factors:
        chain = scaled_chain(config, bundle, factor, first_data)
        try:
            model = chain.train(weights, num_steps=steps)[config.chain[-1]]
        except metaopt.NonFiniteError:  # this rate diverges, which is an answer too
            continue
        score = bundle.score(model, bundle.selection)[bundle.selection_metric]
        if best is None or score > best[0]:
            best = (score, factor, chain, model)
    if best is None:
        raise SystemExit(f"every learning rate diverged: factors {list(factors)}")
    return dict(bundle.score(best[3], bundle.test)), best[1], best[2]


@torch.no_grad()
def loss_ranking(chain: Chain, config: DictConfig, bundle: metaopt.DataBundle) -> float | None:
    """Return the AUC of telling clean from corrupted examples by the plain training loss alone."""
    if bundle.is_clean is None:
        return None
    model = chain.stages[config.chain[0]].model.eval()
    losses = torch.full((len(bundle.is_clean),), math.nan)
    for batch in bundle.train:
        losses[batch["index"]] = cross_entropy_per_example(logits_of(model(**model_inputs(batch))), batch["labels"])
    seen = losses.isfinite()
    return auc(-losses[seen], bundle.is_clean[seen])


def run_seed(overrides: Sequence[str], seed: int, factors: Sequence[float]) -> dict[str, Any]:
    config, bundle = compose_config(overrides, seed)
    meta_params, meta_flops, plain_flops = learn(config, bundle)
    rows: dict[str, Any] = {}
    by_loss = None
    for name, weights in candidates(meta_params, bundle).items():
        first_data = "validation" if name == CLEAN else None
        metrics, factor, chain = best_of_rates(config, bundle, weights, first_data, factors)
        rows[name] = {**metrics, "learning_rate_factor": factor}
        if name == UNIFORM:
            by_loss = loss_ranking(chain, config, bundle)
    quality = weight_quality(meta_params, bundle.good_sources, bundle.is_clean)
    if "noise_auc" in quality and by_loss is not None:
        quality["noise_auc_by_plain_loss"] = by_loss
    flops = {"meta_training": meta_flops, "same_inner_steps_plain": plain_flops}
    return {"seed": seed, "trainings": rows, "weights": quality, "flops": flops, "metric": bundle.selection_metric}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def show(console: Console, runs: Sequence[Mapping[str, Any]]) -> None:
    metric = runs[0]["metric"]
    table = Table(
        title=f"test {metric.replace('_', ' ')}, {len(runs)} seeds; gain over uniform weights", title_justify="left"
    )
    for column in ("weights", "mean ± std. error", "paired gain", "verdict", "learning rates (×)"):
        table.add_column(column)
    base = [run["trainings"][UNIFORM][metric] for run in runs]
    for name in runs[0]["trainings"]:
        values = [run["trainings"][name][metric] for run in runs]
        mean, error = mean_and_error(values)
        gain, gain_error = mean_and_error([v - b for v, b in zip(values, base, strict=True)])
        verdict = "better" if gain > 2 * gain_error else "worse" if -gain > 2 * gain_error else "no difference shown"
        rates = " ".join(f"{run['trainings'][name]['learning_rate_factor']:g}" for run in runs)
        paired = ("—", "—") if name == UNIFORM else (f"{gain:+.3f} ± {gain_error:.3f}", verdict)
        table.add_row(name, f"{mean:.3f} ± {error:.3f}", *paired, rates)
    console.print(table)
    for key in runs[0]["weights"]:
        mean, error = mean_and_error([run["weights"][key] for run in runs])
        console.print(f"{key.replace('_', ' ')}: {mean:.3f} ± {error:.3f}")
    flops = [statistics.fmean(run["flops"][key] for run in runs) for key in ("meta_training", "same_inner_steps_plain")]
    console.print(
        f"flops of meta-training: {flops[0]:.2e}, {flops[0] / flops[1]:.2f} × the same inner steps by plain training"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", default="0.03,0.1,0.3,1,3,10", help="factors on the learning rates, to choose among")
    parser.add_argument("--out", default="dates", help="name of the JSON file beside this script")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as experiment=digits")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    seeds = track(range(arguments.seeds), description="seeds")
    factors = [float(factor) for factor in arguments.rates.split(",")]
    runs = [run_seed(arguments.overrides, seed, factors) for seed in seeds]
    path = Path(__file__).with_name(f"{arguments.out}.json")
    path.write_text(json.dumps(runs, indent=1) + "\n")
    show(Console(), runs)


if __name__ == "__main__":
    main()
