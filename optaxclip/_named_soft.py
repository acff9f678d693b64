"""Published methods with responses of their own, each one return statement."""

from typing import Literal, TypeAlias

import jax
import optax

from optaxclip import groups as _groups, responses
from optaxclip._apply import Nonfinite
from optaxclip._base import Groups, PyTree
from optaxclip._rescale import named, rescale_by_norm
from optaxclip._split import AxisName
from optaxclip.limits import LimitLike, as_limit

Transformation: TypeAlias = optax.GradientTransformationExtraArgs
Number: TypeAlias = float | jax.Array


@named(eps="gamma")
def automatic_clip(
    max_norm: LimitLike = 1.0,
    gamma: Number = 0.01,
    *,
    groups: Groups = _groups.whole(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales to `max_norm` times n / (n + gamma): nearly normalises, and leaves small norms small.

    $$u' = \frac{c\,u}{n + \gamma}$$

    Args:
      max_norm: what large norms come to.
      gamma: the norm that is scaled to half of `max_norm`.
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
      Bu et al., [Automatic Clipping: Differentially Private Deep Learning Made Easier and
      Stronger](https://arxiv.org/abs/2206.07136), 2022, as AUTO-S. No noise is added here.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.automatic_clip(2.0, gamma=1.0)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (3.0,):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [1.5]
    """
    return rescale_by_norm(
        as_limit(max_norm, "automatic_clip", "max_norm"),
        response=responses.normalize(),
        groups=groups,
        eps=gamma,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def psac_clip(
    max_norm: LimitLike = 1.0,
    r: Number = 0.1,
    *,
    groups: Groups = _groups.whole(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales by c / (n + r / (n + r)). See `responses.psac`.

    $$u' = \frac{c\,u}{n + r / (n + r)}$$

    Args:
      max_norm: c, what large norms come to.
      r: how much small norms are spared; the factor is largest at n = √r - r.
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
      Xia et al., [Differentially Private Learning with Per-Sample Adaptive
      Clipping](https://arxiv.org/abs/2212.00328), 2023. No noise is added here.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.psac_clip()
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (0.4,):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [0.6666667]
    """
    return rescale_by_norm(
        as_limit(max_norm, "psac_clip", "max_norm"),
        response=responses.psac(r),
        groups=groups,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named(floor="delta")
def delta_clip(
    max_norm: LimitLike = 0.1,
    delta: Number = 1e-3,
    *,
    groups: Groups = _groups.whole(),
    eps: Number = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Clips to `max_norm`, but by no factor less than `delta`, so that large gradients still count as such.

    $$u' = u \min(1, \max(\delta, c / n))$$

    Args:
      max_norm: the limit.
      delta: the least factor.
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
      Tucat et al., [Regularized Gradient Clipping Provably Trains Wide and Deep Neural
      Networks](https://arxiv.org/abs/2404.08624), 2024, as δ-GClip.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.delta_clip(1.0, delta=0.5)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (4.0,):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [2.]
    """
    return rescale_by_norm(
        as_limit(max_norm, "delta_clip", "max_norm"),
        response=responses.clip(delta),
        groups=groups,
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def smooth_clip(
    max_norm: LimitLike = 1.0,
    kind: Literal["rational", "sqrt"] = "rational",
    *,
    groups: Groups = _groups.whole(),
    eps: Number = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales every norm smoothly to below `max_norm`. See `responses.soft`.

    $$\text{rational: } n' = \frac{c\,n}{c + n}, \qquad \text{sqrt: } n' = \frac{c\,n}{\sqrt{c^2 + n^2}}$$

    Args:
      max_norm: what the norm never passes.
      kind: `"rational"`, c / (c + n), or `"sqrt"`, c / √(c² + n²).
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
      Zhang et al., [Why gradient clipping accelerates training](https://arxiv.org/abs/1905.11881), 2020.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.smooth_clip(1.0)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (3.0,):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [0.75]
    """
    return rescale_by_norm(
        as_limit(max_norm, "smooth_clip", "max_norm"),
        response=responses.soft(kind),
        groups=groups,
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )
