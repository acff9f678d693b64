"""Limits around the running mean of what came out, and schedules of how far; public in `limits`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _checks
from optaxclip._base import Context, Limit, PyTree
from optaxclip._learning import at_step, between, full, in_float32, learning

SMALL, RAISED = 2.0**-100, 2.0**64


def ema(
    slack: float | jax.Array | Callable[[Any], Any],
    decay: float | jax.Array = 0.98,
    *,
    warmup: int = 0,
    max_norm: float | jax.Array = math.inf,
    eps: float | jax.Array = 0.0,
) -> Limit:
    r"""Allows `slack` times the running mean of a group's own norm.

    $$c_t = s\,\mu_{t-1}, \qquad \mu_t = d\,\mu_{t-1} + (1 - d)\, n'_t$$

    where n' is the norm that comes out of the response, so that one spike cannot raise the next limit by
    much: with clipping a limit grows by at most a factor of 1 + (1 - d)(s - 1) a step.

    *Warm-up*: for the first `warmup` steps the whole update is clipped to `max_norm` and μ is the least norm
    that came out; without warm-up the first norm has no limit and is μ. *History*: norms after the response.
    *Non-finite and zero norms* are not learned from, so that a zero in the warm-up cannot freeze a group.

    Args:
      slack: how far above its mean a norm may go, as a ratio, usually a little above 1; or a schedule of it.
      decay: weight of the past per step, from 0 to 1. The mean forgets over about `1 / (1 - decay)` steps.
      warmup: how many steps the warm-up takes.
      max_norm: the limit on the whole update in the warm-up.
      eps: what the engine adds to norms; the same as there.

    Returns:
      A `Limit` whose state is the means, float32 of shape `(rows,)`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Wang et al., [AdaGC](https://arxiv.org/abs/2502.11034), 2025.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_global_norm(oc.limits.ema(2.0, decay=0.5))
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 9.0, 9.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    ...     print(updates["w"])
    [1.]
    [2.]
    [3.]
    """
    where = "limits.ema"
    _checks.positive(where, **_checks.unscheduled(slack=slack), max_norm=max_norm)
    _checks.within(where, 0, 1, decay=decay)
    _checks.whole_number(where, warmup=warmup)
    _checks.nonnegative(where, eps=eps)
    decay, max_norm, eps = _checks.real(decay, max_norm, eps)

    def limit(norm: jax.Array, mean: PyTree, after: Any, ctx: Context) -> jax.Array:
        del after
        # No more than one group's share: the factor is that of the whole update.
        whole = in_float32(ctx.total) + eps
        over = whole > max_norm
        # What is divided first is no quotient so small that it would be rounded to zero.
        share = jnp.where(over, norm + eps, 0) / jnp.where(over, whole, 1)
        early = jnp.where(over, max_norm * share, jnp.inf)
        known, mean = _started(mean)
        return jnp.where(ctx.step < warmup, early, jnp.where(known, _multiple(slack, mean, ctx), jnp.inf))

    def learn(norm: jax.Array, mean: PyTree, ctx: Context) -> PyTree:
        seen, later = _followed(norm, limit(norm, mean, None, ctx), mean, decay, ctx, eps)
        return jnp.where(ctx.step < warmup, jnp.fmin(mean, seen), later)

    return learning(lambda rows: full(rows, jnp.inf), learn, limit)


def ema_band(
    low: float | jax.Array | Callable[[Any], Any],
    high: float | jax.Array | Callable[[Any], Any],
    decay: float | jax.Array = 0.98,
) -> Limit:
    r"""The nearer end of a band around the running mean of a group's own norm, and infinity within it.

    $$c_t = \begin{cases} h_t\,\mu_{t-1} & n_t > h_t\,\mu_{t-1} \\ l_t\,\mu_{t-1} & n_t < l_t\,\mu_{t-1} \\
    \infty & \text{else} \end{cases} \qquad \mu_t = d\,\mu_{t-1} + (1 - d)\, n'_t$$

    where n' is the norm that comes out of the response. It is for responses that scale to the limit, up and
    down: `normalize`, or `band(1.0, most_up=..., most_down=...)`, which bounds the factor. A response sees no
    step, which is why both ends, and their schedules, stand here and not in `responses.band`.

    *Warm-up*: the first norm has no limit and is μ. *History*: norms after the response. *Non-finite and zero
    norms* are not learned from.

    Args:
      low: l, the lower end as a multiple of the mean, from 0; or a schedule of it.
      high: h, the upper end, likewise. Where a schedule or an array has `low` above it, `high` goes first.
      decay: d, the weight of the past per step, from 0 to 1.

    Returns:
      A `Limit` whose state is the means, float32 of shape `(rows,)`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range, or `low` is above `high`.

    References:
      Li et al., [AGGC](https://arxiv.org/abs/2601.11864), 2026, with a mean that the first norm starts.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> limit = oc.limits.ema_band(0.5, 2.0, decay=1.0)
    >>> tx = oc.rescale_by_norm(limit, response=oc.responses.normalize())
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 9.0, 0.1, 1.5):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    ...     print(updates["w"])
    [1.]
    [2.]
    [0.5]
    [1.5]
    """
    where = "limits.ema_band"
    _checks.nonnegative(where, **_checks.unscheduled(low=low))
    _checks.positive(where, **_checks.unscheduled(high=high))
    _checks.within(where, 0, 1, decay=decay)
    if _checks.is_number(low) and _checks.is_number(high) and low > high:
        raise ValueError(f"{where}: low is {low!r}, above high, {high!r}. Pass the lower end as low.")
    (decay,) = _checks.real(decay)

    def limit(norm: jax.Array, mean: PyTree, after: Any, ctx: Context) -> jax.Array:
        del after
        known, mean = _started(mean)
        least, most = (_multiple(end, mean, ctx) for end in (low, high))
        end = jnp.where(norm < least, least, jnp.inf)
        return jnp.where(known, jnp.where(norm <= most, end, most), jnp.inf)

    def learn(norm: jax.Array, mean: PyTree, ctx: Context) -> PyTree:
        return _followed(norm, limit(norm, mean, None, ctx), mean, decay, ctx)[1]

    return learning(lambda rows: full(rows, jnp.inf), learn, limit)


def _started(mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether there is a mean, and the mean, or 1: no multiple of 0 meets an infinity."""
    known = (mean > 0) & (mean < jnp.inf)
    return known, jnp.where(known, mean, 1)


def _multiple(of: Any, mean: jax.Array, ctx: Context) -> jax.Array:
    return jnp.maximum(at_step(of, ctx.step), 0).astype(mean.dtype) * mean


def _followed(
    norm: jax.Array, limit: jax.Array, mean: jax.Array, decay: Any, ctx: Context, eps: Any = 0.0
) -> tuple[jax.Array, jax.Array]:
    """The norms after the response, and their new running means; a limit of NaN teaches nothing."""
    # A factor that would be rounded to zero is had at a limit that is larger by a power of two.
    small = (limit < norm * SMALL) & (ctx.response.factor(norm + eps, limit) < SMALL)
    raised = jnp.where(small, RAISED, 1)
    seen = norm * ctx.response.factor(norm + eps, limit * raised) / raised
    known, old = _started(mean)
    later = jnp.where(known, between(seen, old, decay), seen)
    return seen, jnp.where(jnp.isnan(seen), mean, later)
