"""metaopt's config groups; importable as `metaopt.conf`, so that `hydra.searchpath: [pkg://metaopt.conf]` finds them.

The option `shared` of a group stands for the part of the same name at the top of the config. It is registered here and
not a YAML file because its node must stay open: `stages.student.optimizer.lr=1e-3` adds to it.
"""

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from metaopt.app import help as config_help
from metaopt.app.config import SHARED


def _shared(source: str) -> DictConfig:
    return DictConfig({SHARED: source}, flags={"struct": False})


def _register() -> None:
    store = ConfigStore.instance()
    for group in ("model", "optimizer", "schedule", "transform", "estimator", "product", "loss"):
        store.store(group=group, name="shared", node=_shared(group), provider="metaopt")
    handover = DictConfig({part: _shared(f"handover.{part}") for part in ("generate", "loss")})
    store.store(group="handover", name="shared", node=handover, provider="metaopt")

    config_help.register()


_register()
