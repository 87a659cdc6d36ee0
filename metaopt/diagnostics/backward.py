"""`metaopt.backward` and `metaopt.hypergradient`: the layer's, whose error names the line where a path is cut."""

from __future__ import annotations

from torch import Tensor

from metaopt.base.errors import MissingPathError
from metaopt.core import graphs as layer
from metaopt.core.meta_params import AnyMetaParameters
from metaopt.diagnostics.paths.explain import explained_by_graph


def hypergradient(meta_loss: Tensor, meta_params: AnyMetaParameters, retain_graph: bool = False) -> dict[str, Tensor]:
    """Return d meta-loss / d meta-parameters by name (nothing if there is nothing to learn); no `.grad` is touched.

    Raises:
        NonFiniteError: the meta-loss or a hypergradient is NaN or infinite.
        MissingPathError: a meta-parameter has no path to the meta-loss; the stages are run once more for a message that
            names the lines which cut it.
    """
    try:
        return layer.hypergradient(meta_loss, meta_params, retain_graph)
    except MissingPathError as error:
        raise explained_by_graph(error, meta_loss, meta_params) from None


def backward(meta_loss: Tensor, meta_params: AnyMetaParameters) -> dict[str, Tensor]:
    """Add the exact hypergradient to the `.grad` of the meta-parameters, and of nothing else; return it by name.

    `meta_loss.backward()` computes the same, but leaves `.grad = None` in silence where a path is missing. Raises what
    `hypergradient` raises, and touches no `.grad` then.
    """
    grads = hypergradient(meta_loss, meta_params)
    layer.accumulate(grads, meta_params)
    return grads
