"""metaopt: exact gradients through a chain of trainings."""

from __future__ import annotations

from pathlib import Path

import lazy_loader

__version__ = "0.1.0"

# In a checkout the configs lie beside the package; in a wheel they are `metaopt/conf`.
_CHECKOUT = Path(__file__).resolve().parent.parent
if not (_CHECKOUT / "metaopt" / "conf").is_dir() and (_CHECKOUT / "conf" / "config.yaml").is_file():
    __path__.append(str(_CHECKOUT))

# The public names stand in `__init__.pyi`, each with its module, and are imported on first use: shell completion runs
# this package at every TAB, and torch takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
