"""`metaopt resume=FOLDER`: the run in a folder is gone on with, by its own `config.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from metaopt.app.config import prepare
from metaopt.app.folder import read_config
from metaopt.app.run import HOW, train
from metaopt.base.errors import ConfigError, did_you_mean, first_line


def go_on(folder: str, options: Sequence[str] = ()) -> float:
    """Go on with the run in a folder; options that change what it computes need `resume_force=true`.

    Raises:
        ConfigError: there is no run, or an option is none of its config.
    """
    saved: Any = OmegaConf.create(read_config(Path(folder)))
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or (key not in HOW and OmegaConf.select(saved, key, default=_ABSENT) is _ABSENT):
            near = did_you_mean(key.split(".")[-1], OmegaConf.select(saved, key.rpartition(".")[0], default=saved))
            raise ConfigError(
                f"resume={folder} takes that run's own config, in which there is no {key}{near}; for another choice of "
                f"parts give the whole command again, with resume=auto hydra.run.dir={folder}"
            )
    try:
        config = OmegaConf.merge(saved, OmegaConf.from_dotlist(list(options)), {"resume": folder})
    except ValueError as error:
        raise ConfigError(f"resume={folder}: {first_line(error)}") from error
    return train(prepare(cast(DictConfig, config)), folder, options)


_ABSENT = object()
