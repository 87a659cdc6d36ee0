"""The command `metaopt`: one run, in the order data flows."""

from __future__ import annotations

import os
import sys
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from metaopt.config import explained, prepare, with_facts
from metaopt.errors import MetaoptError


def train(config: DictConfig, folder: str) -> float:
    """Build the parts, learn the meta-parameters, compare, report; return the selection metric.

    Args:
        config: as `metaopt.config.prepare` returns it.
        folder: where the run writes.
    """
    from metaopt import build  # torch takes seconds to import, and shell completion runs this module at every TAB
    from metaopt.run import Run

    with Run(config, folder) as run:
        data = build.build_data(config)
        config = run.config = with_facts(config, data.facts)
        chain = build.build_chain(config, data)
        meta_params = build.build_meta_params(config)
        objective = build.build_objective(config)
        meta_optimizer = build.build_meta_optimizer(config, meta_params)
        trainer = build.build_trainer(config, data, chain, objective, meta_params, meta_optimizer, [run.observe])

        run.begin(data, trainer)
        run.warm_up()
        run.check_first_step()
        result = run.learn()
        run.compare()
        run.save()
    return result.meta_loss if result.score is None else result.score


@hydra.main(version_base="1.3", config_path="pkg://metaopt.conf", config_name="config")
def _hydra_main(composed: DictConfig) -> float:
    job = HydraConfig.get()
    overrides = OmegaConf.to_container(job.overrides.task, resolve=False)  # one may hold an interpolation
    return train(prepare(composed, cast(list[str], overrides)), job.runtime.output_dir)


def main() -> None:
    """Run the command: what metaopt or Hydra refuses is one message and exit code 1; a bug keeps its traceback."""
    sys.path.append(os.getcwd())  # so that a class in the current folder can be named as a _target_
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands every exception on instead of printing it
    try:
        _hydra_main()
    except (MetaoptError, HydraException) as error:
        if wants_traceback:
            raise
        sys.exit(explained(error))


if __name__ == "__main__":
    main()
