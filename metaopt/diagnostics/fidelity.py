"""How far each estimator's hypergradient is from the exact one, and what it costs: on the user's own chain."""

from __future__ import annotations
