"""What a group is multiplied by, once its norm and its limit are known.

A factor that is exactly 1 leaves every bit of the group as it was. Whatever the response, an infinite limit
changes nothing, a limit of 0 gives zeros, but for a least factor that was asked for, and a group of zeros
stays zeros.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from optaxclip import _checks
from optaxclip._base import Response

__all__ = ["band", "clip", "normalize", "psac", "soft", "zero"]


@jax.custom_jvp
def _ratio(limit, norm):
    return limit / norm


@_ratio.defjvp
def _(primals, tangents):
    # The derivative of a quotient in quotients: a square of the norm would overflow, or vanish.
    ratio = _ratio(*primals)
    return ratio, _ratio(tangents[0] - ratio * tangents[1], primals[1])


def _unless(same, limit, norm):
    """The ratio of limit to norm, and 1 where nothing changes; so is the derivative there."""
    return jnp.where(same, 1, _ratio(jnp.where(same, 1, limit), jnp.where(same, 1, norm)))


def _clip(norm, limit):
    return _unless(norm <= limit, limit, norm)


def _normalize(norm, limit):
    return _unless(limit == jnp.inf, limit, norm)


def _zero(norm, limit):
    return jnp.where(norm > limit, 0, jnp.ones_like(norm))


def _rational(norm, limit):
    # Halves, so that the sum cannot overflow.
    return _unless(limit == jnp.inf, limit / 2, limit / 2 + norm / 2)


def _sqrt(norm, limit):
    unlimited = limit == jnp.inf
    bound = jnp.where(unlimited, 1, limit)
    large, small = jnp.maximum(bound, norm), jnp.minimum(bound, norm)
    # The norm over hypot(bound, norm), in a form that neither overflows nor divides by zero.
    return jnp.where(unlimited, 1, _ratio(bound, large) / jnp.sqrt(1 + _ratio(small, large) ** 2))


_CLIP, _NORMALIZE, _ZERO = Response(_clip), Response(_normalize), Response(_zero)
_SOFT = {"rational": Response(_rational), "sqrt": Response(_sqrt)}


def clip(floor: float | jax.Array = 0.0) -> Response:
    r"""Scales a group down to its limit if its norm is above it.

    $$\text{factor} = \min(1, \max(\delta, c / n))$$

    Args:
      floor: δ, the least factor, from 0 to 1. Above 0, large norms may stay above the limit.

    Returns:
      A `Response`; its factors are float32 (float64 if any leaf is), `(rows,)`.

    Raises:
      TypeError: if `floor` is neither a number nor an array.
      ValueError: if it is a number outside its range.

    References:
      Pascanu et al., [On the difficulty of training recurrent neural
      networks](https://arxiv.org/abs/1211.5063), 2013. With a floor: Tucat et al.,
      [δ-GClip](https://arxiv.org/abs/2404.08624), 2024.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tree, stats = oc.rescale_tree({"w": jnp.array([3.0, 4.0])}, 1.0, response=oc.responses.clip())
    >>> print(tree["w"])
    [0.6 0.8]
    """
    _checks.within("responses.clip", 0, 1, floor=floor)
    if _checks.is_number(floor) and floor == 0:
        return _CLIP
    (floor,) = _checks.real(floor)
    return Response(lambda norm, limit: jnp.maximum(_clip(norm, limit), floor))


def band(
    low: float | jax.Array, *, most_up: float | jax.Array = math.inf, most_down: float | jax.Array = 0.0
) -> Response:
    r"""Scales a group down to its limit if its norm is above it, and up if it is below a share of the limit.

    $$\text{factor} = \begin{cases}
    \max(c / n, d) & n > c \\ \min(l c / n, u) & n < l c \\ 1 & \text{else}
    \end{cases}$$

    An infinite limit changes nothing; a group of zeros stays zeros.

    Args:
      low: l, the share of the limit that norms are raised to, from 0 to 1.
      most_up: u, the largest factor, at least 1.
      most_down: d, the least factor, from 0 to 1. At 1 nothing is scaled down.

    Returns:
      A `Response`; its factors are float32 (float64 if any leaf is), `(rows,)`.

    Raises:
      TypeError: if an argument is neither a number nor an array.
      ValueError: if a number is outside its range.

    References:
      Li et al., [AGGC](https://arxiv.org/abs/2601.11864), 2026. Only upwards: Dubey et al.,
      [AdaNorm](https://arxiv.org/abs/2210.06364), 2023.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> grads = {"a": jnp.array([0.3, 0.4]), "b": jnp.array([3.0, 4.0])}
    >>> band = oc.responses.band(0.5)
    >>> tree, stats = oc.rescale_tree(grads, 2.0, groups=oc.groups.leaf(), response=band)
    >>> print(stats.norm_after)
    [1. 2.]
    """
    where = "responses.band"
    _checks.within(where, 0, 1, low=low, most_down=most_down)
    _checks.within(where, 1, math.inf, most_up=most_up)

    low, most_up, most_down = _checks.real(low, most_up, most_down)

    def factor(norm, limit):
        limited = limit < jnp.inf
        least = low * jnp.where(limited, limit, 0)
        down = jnp.maximum(_unless(norm <= limit, limit, norm), most_down)
        up = jnp.minimum(_unless(norm >= least, least, norm), most_up)
        return jnp.where(norm > limit, down, jnp.where(norm < least, up, 1))

    return Response(factor)


def psac(r: float | jax.Array = 0.1) -> Response:
    r"""Scales every group nearly to its limit, small ones less so: $c / (n + r / (n + r))$.

    Args:
      r: how much small norms are spared, positive; the factor is largest at n = √r - r.

    Returns:
      A `Response`; its factors are float32 (float64 if any leaf is), `(rows,)`.

    Raises:
      TypeError: if `r` is neither a number nor an array.
      ValueError: if it is a number that is not positive.

    References:
      Xia et al., [DP-PSAC](https://arxiv.org/abs/2212.00328), 2023. No noise is added here.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tree, stats = oc.rescale_tree({"w": jnp.array([0.4])}, 1.0, response=oc.responses.psac(0.1))
    >>> print(tree["w"])
    [0.6666667]
    """
    _checks.positive("responses.psac", r=r)

    (r,) = _checks.real(r)

    def factor(norm, limit):
        return _unless(limit == jnp.inf, limit, norm + _ratio(r, norm + r))

    return Response(factor)


def normalize() -> Response:
    r"""Scales every group to its limit, up or down; a group of zeros stays zeros.

    $$\text{factor} = c / n$$

    An infinite limit changes nothing. A norm so small that the factor would leave float32's range is scaled
    up by the largest float32.

    Returns:
      A `Response`; its factors are float32 (float64 if any leaf is), `(rows,)`.

    References:
      Yu et al., [Block-Normalized Gradient Method](https://arxiv.org/abs/1707.04822), 2017.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tree, stats = oc.rescale_tree({"w": jnp.array([3.0, 4.0])}, 10.0, response=oc.responses.normalize())
    >>> print(tree["w"])
    [6. 8.]
    """
    return _NORMALIZE


def soft(kind: Literal["rational", "sqrt"] = "rational") -> Response:
    r"""Scales smoothly, so that the norm that comes out rises towards the limit and never passes it.

    $$\text{rational: } \frac{c}{c + n}, \qquad \text{sqrt: } \frac{c}{\sqrt{c^2 + n^2}}$$

    Every norm is reduced: by half (rational) or to 71 % (sqrt) where it equals the limit.

    Args:
      kind: `"rational"` or `"sqrt"`.

    Returns:
      A `Response`; its factors are float32 (float64 if any leaf is), `(rows,)`.

    Raises:
      ValueError: if `kind` is neither.

    References:
      Rational: Zhang et al., [Why gradient clipping accelerates training](https://arxiv.org/abs/1905.11881),
      2020, as smoothed clipping. Sqrt: the vector form of soft spectral clipping.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tree, stats = oc.rescale_tree({"w": jnp.array([3.0, 4.0])}, 5.0, response=oc.responses.soft())
    >>> print(tree["w"])
    [1.5 2. ]
    """
    _checks.one_of("responses.soft", _SOFT, kind=kind)
    return _SOFT[kind]


def zero() -> Response:
    r"""Drops a group whose norm is above its limit.

    $$\text{factor} = 1 \text{ if } n \le c \text{ else } 0$$

    The optimizer behind it still takes its step: momentum goes on moving the parameters.

    Returns:
      A `Response`; its factors are float32 (float64 if any leaf is), `(rows,)`.

    References:
      `clipping_fn="global"` of [fast-differential-privacy](https://github.com/awslabs/fast-differential-privacy),
      there for each example.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tree, stats = oc.rescale_tree({"w": jnp.array([3.0, 4.0])}, 1.0, response=oc.responses.zero())
    >>> print(tree["w"])
    [0. 0.]
    """
    return _ZERO
