"""Limits that are running moments of the norms, to normalise to; public in `limits`."""

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _checks
from optaxclip._base import Context, Limit, PyTree
from optaxclip._learning import between, full, learning, power_mean


def running_mean(decay: float | jax.Array = 0.95) -> Limit:
    r"""The running mean of a group's norms, with the current one: $\mu_t = d\,\mu_{t-1} + (1 - d)\,n_t$.

    *Warm-up*: the first norm is the mean. *History*: raw norms. *Non-finite and zero norms* are not learned
    from.

    Args:
      decay: d, the weight of the past per step, from 0 to 1.

    Returns:
      A `Limit` whose state is the means, float32 of shape `(rows,)`.

    Raises:
      TypeError: if `decay` is no number.
      ValueError: if it is outside its range.

    References:
      Dubey et al., [AdaNorm](https://arxiv.org/abs/2210.06364), 2023, whose mean starts at 0.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_global_norm(oc.limits.running_mean(0.5))
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 9.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(state.limit)
    [5.]
    """
    _checks.within("limits.running_mean", 0, 1, decay=decay)
    (decay,) = _checks.real(decay)

    def learn(norm: jax.Array, mean: PyTree, ctx: Context) -> PyTree:
        del ctx
        return jnp.where(mean > 0, between(norm, mean, decay), norm)

    return learning(lambda rows: full(rows, 0), learn, lambda norm, before, after, ctx: after)


def running_rms(decay: float | jax.Array = 0.25, *, eps: float | jax.Array = 1e-6) -> Limit:
    r"""A group's norm over the running root mean square of its norms, to normalise to.

    $$c_t = \frac{n_t}{\sqrt{v_t} + \epsilon}, \qquad v_t = d\,v_{t-1} + (1 - d)\,n_t^2$$

    With `responses.normalize`, updates are divided by the running root mean square.

    *Warm-up*: the first norm is the root mean square. *History*: raw norms. *Non-finite and zero norms* are
    not learned from.

    Args:
      decay: d, the weight of the past per step, from 0 to 1.
      eps: added to the root mean square.

    Returns:
      A `Limit` whose state is the root mean squares, float32 of shape `(rows,)`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Ginsburg et al., [NovoGrad](https://arxiv.org/abs/1905.11286), 2019: its second moment.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.rescale_by_norm(oc.limits.running_rms(0.5, eps=0.0), response=oc.responses.normalize())
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 7.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [1.4]
    """
    where = "limits.running_rms"
    _checks.within(where, 0, 1, decay=decay)
    _checks.nonnegative(where, eps=eps)
    decay, eps = _checks.real(decay, eps)

    def learn(norm: jax.Array, rms: PyTree, ctx: Context) -> PyTree:
        del ctx
        return jnp.where(rms > 0, power_mean(norm, rms, 1 - decay, 2), norm)

    return learning(
        lambda rows: full(rows, 0),
        learn,
        lambda norm, before, after, ctx: norm / jnp.where(after > 0, after + eps, 1),
    )


def moment_ratio(
    first: float | jax.Array = 0.7, second: float | jax.Array = 0.9, *, eps: float | jax.Array = 1e-8
) -> Limit:
    r"""The ratio of the running mean of a group's norm to its running root mean square, both without bias.

    $$c_t = \frac{\hat\mu_t}{\sqrt{\hat\nu_t} + \epsilon}, \qquad
    \hat\mu_t = \frac{\mu_t}{1 - d_1^t}, \quad \hat\nu_t = \frac{\nu_t}{1 - d_2^t}$$

    At most about 1 however large a norm is; for `responses.normalize`.

    *Warm-up*: none, the first limit is 1, as it stays where a decay is 1. *History*: raw norms. *Non-finite
    and zero norms* are not learned from, and t counts the norms that were: a momentum reset elsewhere cannot
    part the two, as it does in the authors' code.

    Args:
      first: d1, the weight of the past in the mean.
      second: d2, the weight of the past in the mean square.
      eps: added to the root mean square, relative to the norms.

    Returns:
      A `Limit` whose state is mean, root mean square and count, float32 of shape `(rows,)` each.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Huang et al., [Stable-SPAM](https://arxiv.org/abs/2502.17055), 2025, as AdaGN; since 2026
      GradientStabilizer.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.rescale_by_norm(oc.limits.moment_ratio(), response=oc.responses.normalize())
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 1000.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(f"{updates['w'][0]:.4f}")
    0.8114
    """
    where = "limits.moment_ratio"
    _checks.within(where, 0, 1, first=first, second=second)
    _checks.nonnegative(where, eps=eps)
    first, second, eps = _checks.real(first, second, eps)

    def init(rows: int) -> PyTree:
        return full(rows, 0), full(rows, 0), full(rows, 0)

    def learn(norm: jax.Array, state: PyTree, ctx: Context) -> PyTree:
        del ctx
        mean, rms, count = state
        return between(norm, mean, first), power_mean(norm, rms, 1 - second, 2), count + 1

    def limit(norm: jax.Array, before: Any, after: PyTree, ctx: Context) -> jax.Array:
        del norm, before, ctx
        mean, rms, count = after
        weights = [1 - decay ** jnp.maximum(count, 1) for decay in (first, second)]
        known = (count > 0) & (weights[0] > 0) & (weights[1] > 0)
        own, other = (jnp.where(known, weight, 1) for weight in weights)
        return jnp.where(known, mean / own / jnp.where(known, rms / jnp.sqrt(other) + eps, 1), 1)

    return learning(init, learn, limit)
