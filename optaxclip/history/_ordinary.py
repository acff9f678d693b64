"""Which steps of a recording are ordinary and which are spikes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

SIGMA = 1.4826  # standard deviations in a median absolute deviation of normal numbers


class Spikes(NamedTuple):
    """What is ordinary, and what is far above it; for each column of a recording.

    Attributes:
      level: the running median of the norms around each step, `(steps, columns)`; NaN where none is known.
      spread: the standard deviation of the logarithm of ordinary norms about it, robustly, `(columns,)`.
      ratio: the norms over the level, `(steps, columns)`; infinite or NaN where the norm is.
      spike: where that is beyond what is ordinary; a norm that is not finite is one.
    """

    level: Float[np.ndarray, "steps columns"]
    spread: Float[np.ndarray, " columns"]
    ratio: Float[np.ndarray, "steps columns"]
    spike: Bool[np.ndarray, "steps columns"]


def spikes(
    norms: Float[np.ndarray, "steps columns"], sigmas: float = 4.0, factor: float = 2.0, window: int = 65
) -> Spikes:
    """Tells spikes from ordinary norms.

    A norm is a spike if it is more than `factor` times the running median of the norms around it, and its
    logarithm more than `sigmas` robust standard deviations above. Drift slower than the window is ordinary.

    Args:
      norms: the norms.
      sigmas: how many standard deviations are ordinary: the identifier of Hampel (1974), whose usual 3 finds
        a spike in about one of 700 normal numbers, 4 in one of 30,000.
      factor: how many times the median is ordinary, however little the norms scatter.
      window: how many norms the running median is of; an odd number.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        logs = np.where(np.isfinite(norms) & (norms > 0), np.log(norms), np.nan)
        level = np.empty_like(logs)
        for k, column in enumerate(logs.T):
            level[:, k] = _running_median(column, window)
        off = logs - level
        spread = np.array([SIGMA * _median(np.abs(column)) for column in off.T])
        spread = np.nan_to_num(spread)
        ratio = norms / np.exp(level)
        far = off > np.maximum(sigmas * spread, np.log(factor))
    return Spikes(np.exp(level), spread, ratio, far | ~np.isfinite(norms))


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else np.nan


def _running_median(values: np.ndarray, window: int) -> np.ndarray:
    """The median of the known values around each; at the ends, of those on both sides that there are."""
    known = np.flatnonzero(~np.isnan(values))
    found = np.full(len(values), np.nan)
    if not len(known):
        return found
    dense = values[known]
    half = min(window, len(dense) - (len(dense) + 1) % 2) // 2
    if half:
        inner = np.median(np.lib.stride_tricks.sliding_window_view(dense, 2 * half + 1), axis=1)
        medians = np.concatenate([np.full(half, inner[0]), inner, np.full(half, inner[-1])])
    else:
        medians = dense
    return np.interp(np.arange(len(values)), known, medians)
