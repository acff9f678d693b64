"""Published methods with limits that follow the norms, each one return statement."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import optax

from optaxclip import _checks, groups as _groups, limits, responses
from optaxclip._apply import Nonfinite
from optaxclip._base import Groups, PyTree
from optaxclip._rescale import named, rescale_by_norm
from optaxclip._split import AxisName
from optaxclip.limits import LimitLike, as_limit

Transformation: TypeAlias = optax.GradientTransformationExtraArgs
Number: TypeAlias = float | jax.Array


def _module_type(path: str, leaf: object) -> str:
    """The last key of the layer that a leaf hangs off."""
    del leaf
    return path.rpartition("/")[0].rpartition("/")[2] or _groups.ROOT


MODULE_TYPES = _groups.labels(_module_type)


@named(q="percentile")
def autoclip(
    percentile: Number = 10.0,
    window: int | None = None,
    include_current: bool = True,
    *,
    groups: Groups = _groups.whole(),
    eps: Number = 1e-6,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Clips to a percentile of the norms seen so far.

    $$c_t = \text{the } q \text{-th percentile of } n_1, \dots, n_t$$

    With the default of 10 nine steps of ten are clipped: close to normalising. See `limits.percentile`.

    Args:
      percentile: the percentage of norms that the limit is above, 0 or from 1 to 100.
      window: how many norms to remember; None for the whole run, to within 2 %.
      include_current: whether the current norm counts.
      groups: which entries share a norm, one of `optaxclip.groups`.
      eps: added to the norm, 1e-6 as in PyTorch.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Seetharaman et al., [AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks](https://arxiv.org/abs/2007.14469), 2020.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.autoclip(50.0, window=8, eps=0.0)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 3.0, 8.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [3.]
    """
    _of_hundred("autoclip", percentile)
    return rescale_by_norm(
        limits.percentile(percentile, window, include_current=include_current),
        groups=groups,
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named(q="percentile")
def quantile_clip(
    percentile: Number = 90.0,
    window: int = 1000,
    *,
    groups: Groups = _groups.whole(),
    eps: Number = 1e-6,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Clips to a rolling quantile of the norms before the current one.

    $$c_t = \text{the } q \text{-th percentile of } n_{t-W}, \dots, n_{t-1}$$

    The first norm is not limited. See `limits.percentile`.

    Args:
      percentile: the percentage of norms that the limit is above, 0 or from 1 to 100.
      window: how many norms to remember.
      groups: which entries share a norm, one of `optaxclip.groups`.
      eps: added to the norm, 1e-6 as in PyTorch.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Merad and Gaïffas, [Robust Stochastic Optimization via Gradient Quantile
      Clipping](https://arxiv.org/abs/2309.17316), 2024.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.quantile_clip(50.0, window=8, eps=0.0)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 3.0, 8.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [2.]
    """
    _of_hundred("quantile_clip", percentile)
    return rescale_by_norm(
        limits.percentile(percentile, window, include_current=False),
        groups=groups,
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def zclip(
    decay: Number = 0.97,
    z: Number = 2.5,
    max_norm: LimitLike | None = 1.0,
    warmup: int = 25,
    eps: Number = 1e-6,
    mode: Literal["reciprocal", "mean", "fixed"] = "reciprocal",
    factor: Number = 1.0,
    learn_from_spikes: bool = True,
    *,
    groups: Groups = _groups.whole(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Clips norms more than `z` standard deviations above their running mean, and all to `max_norm`.

    $$c_t = \min\Big(c, f\,\Big(\mu + \frac{z^2}{\zeta_t} \sigma\Big)\Big)
    \quad \text{if } \zeta_t = \frac{n_t - \mu}{\sigma + \epsilon} > z, \text{ else } c$$

    With ordinary norms above `max_norm` the latter alone acts, and z-scores only where it is None or large.
    See `limits.zscore`.

    Args:
      decay: the weight of the past in mean and variance per step.
      z: how many standard deviations.
      max_norm: a limit at every step, from the first; None for none.
      warmup: how many norms to wait for.
      eps: added to the standard deviation, and to the norm.
      mode: what spikes are limited to.
      factor: multiplies the limit of `"reciprocal"`.
      learn_from_spikes: whether the limit is learned in place of a spike.
      groups: which entries share a norm, one of `optaxclip.groups`.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Kumar et al., [ZClip: Adaptive Spike Mitigation for LLM Pre-Training](https://arxiv.org/abs/2504.02507),
      2025. The authors' package learns a NaN and never clips again; this does not learn it.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.zclip(warmup=2, z=2.0, max_norm=None, mode='fixed', eps=0.0)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 3.0, 8.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [4.]
    """
    return rescale_by_norm(
        _capped(
            limits.zscore(
                z,
                decay,
                warmup=warmup,
                eps=eps,
                mode=mode,
                factor=factor,
                learn_from_spikes=learn_from_spikes,
            ),
            max_norm,
        ),
        groups=groups,
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


def _capped(limit: LimitLike, most: LimitLike | None) -> LimitLike:
    return limit if most is None else limits.at_most(limit, as_limit(most, "zclip", "max_norm"))


@named()
def adagc(
    slack: Number = 1.04,
    decay: Number = 0.99,
    warmup: int = 100,
    max_norm: Number = 1.0,
    eps: Number = 1e-6,
    *,
    groups: Groups = _groups.leaf(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Clips each leaf to `slack` times the running mean of its own norm after clipping.

    $$c_t = s\,\mu_{t-1}, \qquad \mu_t = d\,\mu_{t-1} + (1 - d)\,n'_t$$

    In the warm-up the whole update is clipped to `max_norm`, and the least norm of each leaf is noted. A
    limit can then grow by 0.04 % a step, so doubling takes 1,700 steps. See `limits.ema`.

    Args:
      slack: how far above its mean a norm may go.
      decay: the weight of the past in the mean per step.
      warmup: how many steps the warm-up takes.
      max_norm: the limit on the whole update in the warm-up.
      eps: added to the norm.
      groups: which entries share a norm, one of `optaxclip.groups`.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Wang et al., [AdaGC: Improving Training Stability for Large Language Model
      Pretraining](https://arxiv.org/abs/2502.11034), 2025. In the authors' code a zero gradient in the
      warm-up freezes a tensor for good, and a NaN ends all clipping; neither is learned here.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.adagc(slack=2.0, decay=0.5, warmup=1, eps=0.0)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (9.0, 9.0, 9.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [3.]
    """
    return rescale_by_norm(
        limits.ema(slack, decay, warmup=warmup, max_norm=max_norm, eps=eps),
        groups=groups,
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def clip_by_historical_norm(
    k: Number = 3.0,
    window: int = 128,
    warmup: int = 64,
    *,
    groups: Groups = _groups.whole(),
    eps: Number = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Clips to the mean of the last norms and `k` standard deviations. See `limits.mean_std`.

    $$c_t = \bar n + k\,s$$

    Args:
      k: how many standard deviations.
      window: how many norms to remember.
      warmup: how many norms to wait for.
      groups: which entries share a norm, one of `optaxclip.groups`.
      eps: added to the norm.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      `clip_update_by_historical_norm` of [Levanter](https://github.com/marin-community/levanter).

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_historical_norm(2.0, window=4, warmup=2)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 3.0, 8.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [4.]
    """
    return rescale_by_norm(
        limits.mean_std(k, window, warmup=warmup),
        groups=groups,
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def clip_by_adaptive_quantile(
    target: Number = 0.5,
    rate: Number = 0.2,
    initial: Number = 1.0,
    *,
    groups: Groups = _groups.whole(),
    eps: Number = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Clips to a limit that moves until a share `target` of the norms is within it. See `limits.quantile`.

    $$c_{t+1} = c_t\,e^{-\eta\,(b_t - \gamma)}, \qquad b_t = 1 \text{ if } n_t \le c_t \text{ else } 0$$

    No noise is added, and no privacy comes of it.

    Args:
      target: the share of norms to leave as they are.
      rate: how fast the limit moves.
      initial: the first limit.
      groups: which entries share a norm, one of `optaxclip.groups`.
      eps: added to the norm.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Andrew et al., [Differentially Private Learning with Adaptive
      Clipping](https://arxiv.org/abs/1905.03871), 2021.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_adaptive_quantile(0.5, rate=2.0)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (5.0, 5.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [2.7182817]
    """
    return rescale_by_norm(
        limits.quantile(target, rate, initial=initial),
        groups=groups,
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def aggc(
    low: Number | Callable[[Any], Any] = 1.0,
    high: Number | Callable[[Any], Any] = 1.0,
    decay: Number = 0.98,
    most_up: Number = 1.1,
    most_down: Number = 0.9,
    *,
    groups: Groups = MODULE_TYPES,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Keeps the norm of each kind of module between two multiples of its running mean.

    $$n'_t = \min(\max(n_t, l\,\mu_{t-1}), h\,\mu_{t-1}), \qquad \mu_t = d\,\mu_{t-1} + (1 - d)\,n'_t$$

    where the factor from n to n' is not above `most_up` and not below `most_down`.

    A group is made of all layers whose last key is the same (`q_proj`, `lm_head`). Norms above `high` times
    the mean are scaled down, those below `low` times the mean up; the mean follows what comes out. Both ends
    may be schedules: the authors move them linearly from one step to another, as
    `optax.linear_schedule(0.7, 0.999, 1000, transition_begin=500)` does. See `limits.ema_band`. Within
    the band the `limit` in the state is infinite.

    Args:
      low: the lower end of the band, as a multiple of the mean: a number, an array of shape `()` or
        `(rows,)`, or a schedule, a function from the number of updates that came before to one of these.
        Where it is above `high`, `high` acts.
      high: the upper end, likewise.
      decay: the weight of the past in the mean per step.
      most_up: the largest factor.
      most_down: the least factor.
      groups: which entries share a norm, one of `optaxclip.groups`.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range, or `low` is a number above `high`.

    References:
      Li et al., [Adaptive Group Gradient Clipping](https://arxiv.org/abs/2601.11864), 2026. The authors' mean
      starts at 0 and has the second step scaled by `most_down` and many after it; here the first norm starts
      it.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.aggc(decay=0.5)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 2.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [1.8]
    """
    return rescale_by_norm(
        limits.ema_band(low, high, decay),
        response=responses.band(1.0, most_up=most_up, most_down=most_down),
        groups=groups,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def adanorm(
    decay: Number = 0.95,
    *,
    groups: Groups = _groups.leaf(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales each leaf up to the running mean of its norm where it is below.

    $$n'_t = \max(n_t, \mu_t), \qquad \mu_t = d\,\mu_{t-1} + (1 - d)\,n_t$$

    Args:
      decay: the weight of the past in the mean per step.
      groups: which entries share a norm, one of `optaxclip.groups`.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Dubey et al., [AdaNorm: Adaptive Gradient Norm Correction based Optimizer for
      CNNs](https://arxiv.org/abs/2210.06364), 2023. The paper's mean starts at 0, and it feeds Adam's first
      moment only; put before an optimizer, this feeds both.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.adanorm(0.5)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (3.0, 1.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [2.]
    """
    return rescale_by_norm(
        limits.running_mean(decay),
        response=responses.band(1.0, most_down=1.0),
        groups=groups,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def gradient_stabilizer(
    first: Number = 0.7,
    second: Number = 0.9,
    eps: Number = 1e-8,
    *,
    groups: Groups = _groups.leaf(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Keeps the direction of each leaf, and makes its norm the ratio of two running moments of it.

    $$n'_t = \frac{\hat\mu_t}{\sqrt{\hat\nu_t} + \epsilon}$$

    The norm that comes out is about 1 or less, however large a spike is. See `limits.moment_ratio`.

    Args:
      first: the weight of the past in the mean per step.
      second: the weight of the past in the mean square per step.
      eps: added to the root mean square.
      groups: which entries share a norm, one of `optaxclip.groups`.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Huang et al., [Stable-SPAM](https://arxiv.org/abs/2502.17055), 2025, as AdaGN; since 2026
      GradientStabilizer. The authors' reset of the momentum also resets the count that takes the bias out of
      moments which go on; here both belong together.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.gradient_stabilizer()
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 1000.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(f"{updates['w'][0]:.4f}")
    0.8114
    """
    return rescale_by_norm(
        limits.moment_ratio(first, second, eps=eps),
        response=responses.normalize(),
        groups=groups,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def normalize_by_running_norm(
    decay: Number = 0.25,
    eps: Number = 1e-6,
    *,
    groups: Groups = _groups.leaf(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Divides each leaf by the running root mean square of its norm. See `limits.running_rms`.

    $$u'_t = \frac{u_t}{\sqrt{v_t} + \epsilon}, \qquad v_t = d\,v_{t-1} + (1 - d)\,n_t^2$$

    Args:
      decay: the weight of the past per step, 0.25 as in Optax's NovoGrad.
      eps: added to the root mean square.
      groups: which entries share a norm, one of `optaxclip.groups`.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range.

    References:
      Ginsburg et al., [Stochastic Gradient Methods with Layer-wise Adaptive
      Moments](https://arxiv.org/abs/1905.11286), 2019: NovoGrad's second moment.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.normalize_by_running_norm(0.5, eps=0.0)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 7.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [1.4]
    """
    return rescale_by_norm(
        limits.running_rms(decay, eps=eps),
        response=responses.normalize(),
        groups=groups,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


def _of_hundred(where: str, percentile: Number) -> None:
    """Raises where a percentile can only be meant as a fraction of 1."""
    if _checks.is_number(percentile) and 0 < percentile < 1:
        raise ValueError(
            f"{where}: percentile is {percentile!r}, of 100. Pass {100 * percentile:g}, or for less than one "
            "in a hundred limits.percentile."
        )
