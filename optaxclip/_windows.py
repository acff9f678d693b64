"""Limits that remember norms: percentiles, means and deviations; public in `limits`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import _checks
from optaxclip._base import Context, Limit, PyTree
from optaxclip._learning import between, full, learning

# The histogram of `percentile`: bins whose centres are at most 2 % away from all that falls into them.
LEAST, MOST, GROWTH = 1e-12, 1e12, 1.04
BINS = math.ceil(math.log(MOST / LEAST) / math.log(GROWTH))


def percentile(q: float | jax.Array, window: int | None = None, *, include_current: bool = True) -> Limit:
    r"""A percentile of the norms a group had so far.

    $$c_t = (1 - f)\,n_{(k)} + f\,n_{(k + 1)}, \qquad k + f = 1 + \tfrac{q}{100} (N - 1)$$

    with the N norms in order, k whole and f below 1: interpolation as `numpy.percentile` has it.

    *Warm-up*: the first norm is its own limit; without `include_current` it has none. *History*: raw norms.
    *Non-finite and zero norms* are not learned from: the step after one meets the limit it would have met.

    Args:
      q: the percentage, from 0 to 100.
      window: how many norms to remember. None: the whole run, in a histogram whose bins grow by 4 %, so that
        the limit is within 2 % for norms from 1e-12 to 1e12, and never outside what was seen.
      include_current: whether the norm that is held against the limit counts.

    Returns:
      A `Limit`. Its state is norms, float32 `(rows, window)`, and counts, int32 `(rows,)`; without a window a
      histogram, int32 `(rows, 1410)`, and the least and the largest norm, float32 `(rows,)`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if `q` is a number outside its range, or `window` is below 1.

    References:
      Seetharaman et al., [AutoClip](https://arxiv.org/abs/2007.14469), 2020. With a window and without the
      current norm: Merad and Gaïffas, [Robust stochastic optimization via gradient quantile
      clipping](https://arxiv.org/abs/2309.17316), 2024.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_global_norm(oc.limits.percentile(50.0, window=8))
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 3.0, 8.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(state.limit)
    [3.]
    """
    where = "limits.percentile"
    _checks.within(where, 0, 100, q=q)
    if window is not None:
        _checks.whole_number(where, least=1, window=window)
    past = _histogram() if window is None else _ring(window)
    (q,) = _checks.real(q)
    share = q / 100

    def limit(norm: jax.Array, before: PyTree, after: PyTree, ctx: Context) -> jax.Array:
        del norm, ctx
        return past.percentile(after if include_current else before, share)

    return learning(past.init, past.learn, limit)


class _Past(NamedTuple):
    """A memory of norms: as in `learning`, and from a state and a share to the percentiles."""

    init: Callable[[int], PyTree]
    learn: Callable[[jax.Array, PyTree, Context], PyTree]
    percentile: Callable[[PyTree, float | jax.Array], jax.Array]


def _ring(window: int) -> _Past:
    """The last `window` norms, and how many there were."""
    slots = np.arange(window, dtype=np.int32)[None]

    def init(rows: int) -> PyTree:
        return jnp.zeros((rows, window), jnp.float32), jnp.zeros((rows,), jnp.int32)

    def learn(norm: jax.Array, state: PyTree, ctx: Context) -> PyTree:
        del ctx
        ring, count = state
        ring = jnp.where(slots == jnp.remainder(count, window)[:, None], norm[:, None], ring)
        # Counts stop where they would overflow, at the same place of the ring.
        return ring, jnp.where(count >= 2 * window - 1, window, count + 1)

    def at_share(state: PyTree, share: float | jax.Array) -> jax.Array:
        ring, count = state
        filled = jnp.minimum(count, window)
        ordered = jnp.sort(jnp.where(slots < filled[:, None], ring, jnp.inf), axis=1)
        low, high, part = _ranks(share, filled)
        ordered = jnp.where(filled[:, None] > 0, ordered, 0)  # no difference of infinities
        low, high = (jnp.take_along_axis(ordered, rank[:, None], axis=1)[:, 0] for rank in (low, high))
        return jnp.where(filled > 0, between(low, high, part), jnp.inf)

    return _Past(init, learn, at_share)


def _histogram() -> _Past:
    """How many norms fell into each bin, the least and the largest."""
    centres = (LEAST * GROWTH ** (np.arange(BINS) + 0.5)).astype(np.float32)

    def init(rows: int) -> PyTree:
        return jnp.zeros((rows, BINS), jnp.int32), full(rows, jnp.inf), full(rows, 0)

    def learn(norm: jax.Array, state: PyTree, ctx: Context) -> PyTree:
        del ctx
        counts, least, most = state
        place = jnp.floor((jnp.log(norm) - math.log(LEAST)) / math.log(GROWTH))
        place = jnp.clip(place, 0, BINS - 1).astype(jnp.int32)
        counts = counts + (np.arange(BINS, dtype=np.int32)[None] == place[:, None]).astype(jnp.int32)
        return counts, jnp.minimum(least, norm), jnp.maximum(most, norm)

    def at_share(state: PyTree, share: float | jax.Array) -> jax.Array:
        counts, least, most = state
        upto = jnp.cumsum(counts, axis=1)
        low, high, part = _ranks(share, upto[:, -1])
        low, high = (jnp.asarray(centres)[jnp.argmax(upto > rank[:, None], axis=1)] for rank in (low, high))
        return jnp.where(upto[:, -1] > 0, jnp.clip(between(low, high, part), least, most), jnp.inf)

    return _Past(init, learn, at_share)


def _ranks(share: float | jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The two ranks, from 0, that a share of `count` norms lies between, and how far from the first."""
    last = jnp.maximum(count - 1, 0)
    place = share * last.astype(jnp.float32)
    low = jnp.minimum(jnp.floor(place).astype(jnp.int32), last)
    return low, jnp.minimum(low + 1, last), place - low.astype(jnp.float32)


def mean_std(
    k: float | jax.Array = 3.0,
    window: int = 128,
    *,
    warmup: int = 64,
    unbiased: bool = False,
    floor: float = 1e-6,
) -> Limit:
    r"""The mean of a group's last norms, and `k` standard deviations.

    $$c_t = \bar n + k \max(s, f)$$

    over the last `window` norms, without the current one.

    *Warm-up*: no limit before `warmup` norms. *History*: raw norms, so that a lasting rise becomes the rule
    after part of a window. *Non-finite and zero norms* are not learned from. After a window of equal norms
    (s = 0) the limit is their mean, and widens as soon as norms differ.

    Args:
      k: how many standard deviations.
      window: how many norms to remember.
      warmup: how many norms to wait for, at most `window`.
      unbiased: whether to divide by one less than the number of norms, as OLMo does.
      floor: the least standard deviation.

    Returns:
      A `Limit` whose state is norms, float32 `(rows, window)`, and counts, int32 `(rows,)`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is negative or NaN, or `warmup` is not from 2 to `window`.

    References:
      `clip_update_by_historical_norm` of [Levanter](https://github.com/marin-community/levanter), with k of
      3; the step skipping of [OLMo-core](https://github.com/allenai/OLMo-core) has k of 6 and `unbiased`.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_global_norm(oc.limits.mean_std(2.0, window=4, warmup=2))
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 3.0, 9.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(state.limit)
    [4.]
    """
    where = "limits.mean_std"
    _checks.nonnegative(where, k=k, floor=floor)
    _checks.whole_number(where, least=2, window=window, warmup=warmup)
    if warmup > window:
        raise ValueError(f"{where}: warmup is {warmup}, above the window of {window}. Pass {window} or less.")
    k, floor = _checks.real(k, floor)
    past = _ring(window)

    def limit(norm: jax.Array, before: PyTree, after: PyTree, ctx: Context) -> jax.Array:
        del norm, after, ctx
        ring, count = before
        filled = jnp.minimum(count, window)
        held = np.arange(window, dtype=np.int32)[None] < filled[:, None]
        some = jnp.maximum(filled, 2).astype(jnp.float32)
        ring = jnp.where(held, ring, 0)
        top = jnp.max(ring, axis=1)
        # No square leaves the range; powers of two change no digit.
        scale = jnp.where(top > 2.0**40, 2.0**-70, jnp.where(top < 2.0**-40, 2.0**70, 1))
        ring = ring * scale[:, None]
        mean = jnp.sum(ring, axis=1) / some
        off = jnp.where(held, ring - mean[:, None], 0)
        std = jnp.sqrt(jnp.sum(off * off, axis=1) / (some - int(unbiased)))
        return jnp.where(filled >= warmup, mean / scale + k * jnp.maximum(std / scale, floor), jnp.inf)

    return learning(past.init, past.learn, limit)
