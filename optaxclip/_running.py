"""Limits with a few running numbers for each group; public in `limits`."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from optaxclip import _checks
from optaxclip._base import Context, Limit, PyTree
from optaxclip._learning import between, full, in_float32, learning

LARGEST = 1e18  # the largest norm that `zscore` learns: the square of its distance is within float32's range


def zscore(
    z: float | jax.Array = 2.5,
    decay: float | jax.Array = 0.97,
    *,
    warmup: int = 25,
    eps: float | jax.Array = 1e-6,
    mode: Literal["reciprocal", "mean", "fixed"] = "reciprocal",
    factor: float | jax.Array = 1.0,
    learn_from_spikes: bool = True,
) -> Limit:
    r"""Limits norms that are more than `z` standard deviations above their running mean.

    $$\zeta_t = \frac{n_t - \mu}{\sigma + \epsilon}, \qquad c_t = \begin{cases}
    f\,(\mu + z^2 \sigma / \zeta_t) & \text{reciprocal} \\ \mu & \text{mean} \\ \mu + z \sigma & \text{fixed}
    \end{cases} \quad \text{if } \zeta_t > z \text{, and no limit otherwise}$$

    and then, with x the limit where there is one and the norm elsewhere,
    $\mu' = d\mu + (1 - d)x$, $\sigma'^2 = d\sigma^2 + (1 - d)(x - \mu')^2$. The larger an outlier, the closer
    to the mean it is brought by `"reciprocal"`.

    *Warm-up*: no limit for the first `warmup` norms, whose mean and variance start the running ones.
    *History*: limits in place of spikes, or nothing with `learn_from_spikes=False`; a lasting rise is then
    followed slowly or never. *Non-finite and zero norms* are not learned from. While σ is below 1e-6 of the
    mean no spike can be told: there is no limit, and the norm is learned, as 1e18 if it is larger.

    Args:
      z: how many standard deviations.
      decay: d, the weight of the past per step, from 0 to 1.
      warmup: how many norms to wait for, at least 2.
      eps: added to the standard deviation.
      mode: what spikes are limited to.
      factor: multiplies the limit of `"reciprocal"`.
      learn_from_spikes: whether the limit is learned in place of a spike.

    Returns:
      A `Limit` whose state is mean and variance, float32, and count, int32, of shape `(rows,)` each.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range or `mode` is unknown.

    References:
      Kumar et al., [ZClip](https://arxiv.org/abs/2504.02507), 2025, without its cap; see `zclip`.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_global_norm(oc.limits.zscore(2.0, warmup=2, mode="fixed"))
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 3.0, 9.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(state.limit)
    [4.]
    """
    where = "limits.zscore"
    _checks.positive(where, z=z, factor=factor)
    _checks.nonnegative(where, eps=eps)
    _checks.within(where, 0, 1, decay=decay)
    _checks.whole_number(where, least=2, warmup=warmup)
    _checks.one_of(where, ("reciprocal", "mean", "fixed"), mode=mode)
    z, decay, eps, factor = _checks.real(z, decay, eps, factor)

    def init(rows: int) -> PyTree:
        return full(rows, 0), full(rows, 0), jnp.zeros((rows,), jnp.int32)

    def limit(norm: jax.Array, before: PyTree, after: Any, ctx: Context) -> jax.Array:
        del after, ctx
        mean, variance, count = before
        std = jnp.sqrt(variance)
        score = (norm - mean) / jnp.maximum(std + eps, jnp.finfo(jnp.float32).tiny)
        spike = norm > mean + z * std if mode == "fixed" else score > z
        spike = spike & (count >= warmup) & (std > 1e-6 * mean)
        over = jnp.where(spike, score, 1)
        to = {"reciprocal": factor * (mean + z * z * std / over), "mean": mean, "fixed": mean + z * std}
        return jnp.where(spike, to[mode], jnp.inf)

    def learn(norm: jax.Array, before: PyTree, ctx: Context) -> PyTree:
        mean, variance, count = before
        held = limit(norm, before, None, ctx)
        x = jnp.minimum(jnp.where(held < jnp.inf, held, norm), LARGEST)
        # In the warm-up all norms weigh the same.
        past = jnp.where(count < warmup, count.astype(jnp.float32) / (count + 1).astype(jnp.float32), decay)
        new_mean = between(x, mean, past)
        squared = jnp.where(count < warmup, (x - mean) * (x - new_mean), (x - new_mean) ** 2)
        new_variance = between(squared, variance, past)
        learned = new_mean, new_variance, jnp.minimum(count + 1, warmup)
        if learn_from_spikes:
            return learned
        return tuple(jnp.where(held < jnp.inf, old, new) for new, old in zip(learned, before, strict=True))

    return learning(init, learn, limit)


def quantile(
    target: float | jax.Array = 0.5, rate: float | jax.Array = 0.2, *, initial: float | jax.Array = 1.0
) -> Limit:
    r"""Moves a limit until a share `target` of a group's norms is within it.

    $$c_{t+1} = c_t\,e^{-\eta\,(b_t - \gamma)}, \qquad b_t = 1 \text{ if } n_t \le c_t \text{ else } 0$$

    *Warm-up*: none; the limit starts at `initial` and moves by a factor of up to e^rate a step. *History*:
    whether a raw norm was within the limit, so that the size of a spike does not matter. *Non-finite and zero
    norms* are not learned from.

    Args:
      target: γ, the share of norms to leave as they are, from 0 to 1.
      rate: η, how fast the limit moves.
      initial: the first limit.

    Returns:
      A `Limit` whose state is the limits, float32 of shape `(rows,)`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Andrew et al., [Differentially Private Learning with Adaptive
      Clipping](https://arxiv.org/abs/1905.03871), 2021, without its noise: this gives no privacy.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_global_norm(oc.limits.quantile(0.5, rate=2.0))
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (5.0, 5.0, 5.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    ...     print(updates["w"])
    [1.]
    [2.7182817]
    [5.]
    """
    where = "limits.quantile"
    _checks.within(where, 0, 1, target=target)
    _checks.nonnegative(where, rate=rate)
    _checks.positive(where, initial=initial)
    target, rate, initial = _checks.real(target, rate, initial)

    def learn(norm: jax.Array, held: PyTree, ctx: Context) -> PyTree:
        del ctx
        # No limit is rounded to zero, or infinite, where none could move it any more.
        return in_float32(held * jnp.exp(-rate * ((norm <= held).astype(jnp.float32) - target)))

    def init(rows: int) -> PyTree:
        return full(rows, 1) * jnp.asarray(initial, jnp.float32)

    return learning(init, learn, lambda norm, before, after, ctx: before)
