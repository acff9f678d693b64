"""Clip, normalise or skip JAX updates by the norm of any group of the tree.

Split an update into groups (`groups`), measure a norm of each (`norms`), compare it with a limit (`limits`),
and multiply each group by what the response (`responses`) says.
"""

from optaxclip import groups, limits, norms, responses
from optaxclip._base import Context, Groups, Leaf, Limit, Member, Norm, Response, Stats, Table
from optaxclip._carry import CarryState, carry_clipped
from optaxclip._centralize import centralize
from optaxclip._coordinate import (
    ACClipState,
    AdaptiveValueClipState,
    MaskSpikesState,
    acclip,
    adaptive_value_clip,
    mask_spikes,
)
from optaxclip._describe import describe
from optaxclip._elementwise import ClipByValueState, clip_by_value
from optaxclip._matrices import SpectralState
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
from optaxclip._record import RecordState, record
from optaxclip._rescale import RescaleState, group_norms, rescale_by_norm, rescale_tree
from optaxclip._reset import ResetMomentumState, reset_momentum
from optaxclip._skip import SkipState, skip_updates
from optaxclip._spectral import clip_by_spectral_norm, clip_singular_values, soft_clip_singular_values
from optaxclip._trust import (
    ScaleByStableAdamState,
    lamb_trust_ratio,
    larc,
    scale_by_stable_adam,
    stable_adamw,
)
from optaxclip.history import Advice, Comparison, History, Replay, Rule

__version__ = "0.1.0"

__all__ = [
    "ACClipState",
    "AdaptiveValueClipState",
    "Advice",
    "CarryState",
    "ClipByValueState",
    "Comparison",
    "Context",
    "Groups",
    "History",
    "Leaf",
    "Limit",
    "MaskSpikesState",
    "Member",
    "Norm",
    "PerExampleState",
    "RecordState",
    "Replay",
    "RescaleState",
    "ResetMomentumState",
    "Response",
    "Rule",
    "ScaleByStableAdamState",
    "SkipState",
    "SpectralState",
    "Stats",
    "Table",
    "acclip",
    "adagc",
    "adanorm",
    "adaptive_grad_clip",
    "adaptive_value_clip",
    "aggc",
    "autoclip",
    "automatic_clip",
    "carry_clipped",
    "centralize",
    "clip_by_adaptive_quantile",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_groupwise_norm",
    "clip_by_historical_norm",
    "clip_by_layerwise_norm",
    "clip_by_leafwise_norm",
    "clip_by_spectral_norm",
    "clip_by_unitwise_norm",
    "clip_by_value",
    "clip_per_example",
    "clip_singular_values",
    "delta_clip",
    "describe",
    "gradient_stabilizer",
    "group_norms",
    "groups",
    "lamb_trust_ratio",
    "larc",
    "limits",
    "mask_spikes",
    "metrics",
    "normalize_by_global_norm",
    "normalize_by_layerwise_norm",
    "normalize_by_running_norm",
    "norms",
    "per_example_quantile",
    "psac_clip",
    "quantile_clip",
    "record",
    "rescale_by_norm",
    "rescale_tree",
    "reset_momentum",
    "responses",
    "scale_by_stable_adam",
    "skip_updates",
    "smooth_clip",
    "soft_clip_singular_values",
    "stable_adamw",
    "zclip",
]
