"""Clip, normalise or skip JAX updates by the norm of any group of the tree.

Split an update into groups (`groups`), measure a norm of each (`norms`), compare it with a limit (`limits`),
and multiply each group by what the response (`responses`) says.
"""

from optaxclip import groups, limits, norms, responses
from optaxclip._base import Context, Groups, Leaf, Limit, Member, Norm, Response, Stats, Table
from optaxclip._describe import describe
from optaxclip._elementwise import ClipByValueState, clip_by_value
from optaxclip._metrics import metrics
from optaxclip._named import (
    adaptive_grad_clip,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_groupwise_norm,
    clip_by_layerwise_norm,
    clip_by_leafwise_norm,
    clip_by_unitwise_norm,
    normalize_by_global_norm,
    normalize_by_layerwise_norm,
)
from optaxclip._named_adaptive import (
    adagc,
    adanorm,
    aggc,
    autoclip,
    clip_by_adaptive_quantile,
    clip_by_historical_norm,
    gradient_stabilizer,
    normalize_by_running_norm,
    quantile_clip,
    zclip,
)
from optaxclip._named_soft import automatic_clip, delta_clip, psac_clip, smooth_clip
from optaxclip._per_example import PerExampleState, clip_per_example, per_example_quantile
from optaxclip._rescale import RescaleState, group_norms, rescale_by_norm, rescale_tree

__version__ = "0.1.0"

__all__ = [
    "ClipByValueState",
    "Context",
    "Groups",
    "Leaf",
    "Limit",
    "Member",
    "Norm",
    "PerExampleState",
    "RescaleState",
    "Response",
    "Stats",
    "Table",
    "adagc",
    "adanorm",
    "adaptive_grad_clip",
    "aggc",
    "autoclip",
    "automatic_clip",
    "clip_by_adaptive_quantile",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_groupwise_norm",
    "clip_by_historical_norm",
    "clip_by_layerwise_norm",
    "clip_by_leafwise_norm",
    "clip_by_unitwise_norm",
    "clip_by_value",
    "clip_per_example",
    "delta_clip",
    "describe",
    "gradient_stabilizer",
    "group_norms",
    "groups",
    "limits",
    "metrics",
    "normalize_by_global_norm",
    "normalize_by_layerwise_norm",
    "normalize_by_running_norm",
    "norms",
    "per_example_quantile",
    "psac_clip",
    "quantile_clip",
    "rescale_by_norm",
    "rescale_tree",
    "responses",
    "smooth_clip",
    "zclip",
]
