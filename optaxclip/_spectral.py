"""Clipping by singular values: of whole matrices by the largest, or of each value by itself."""

import functools
from typing import Literal

import jax
import optax

from optaxclip import _checks, _singular, responses
from optaxclip._apply import Nonfinite
from optaxclip._layouts import Axes
from optaxclip._matrices import COLD, Found, Method, transformation
from optaxclip._split import alone
from optaxclip.limits import LimitLike, as_limit


def clip_by_spectral_norm(
    max_norm: LimitLike,
    *,
    iterations: int = 2,
    axes: Axes = None,
    stacked: str | None = None,
    nonfinite: Nonfinite = "propagate",
    axis_name: tuple[()] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each matrix down so that its largest singular value is at most `max_norm`.

    $$W \leftarrow W \min(1, c / \hat\sigma_1(W))$$

    The value is estimated by power iteration on two vectors, that of the step before and a fresh one, so that
    nothing can stay hidden from the first. But for roundings the estimate is never too large; what comes out
    is above `max_norm` by as much as it is too small. Measured in the tests against float64 decompositions of
    12 matrices of 64 by 48, in percent, as median / worst:

    | matrices | iterations | first step | from the fourth step on |
    | --- | --- | --- | --- |
    | of rank 4, wandering by 20 % a step, and noise | 1 | 17 / 40 | 0.1 / 11 |
    | | 2 | 0.2 / 6 | 0.01 / 2 |
    | | 4 | 0.01 / 0.3 | 0.01 / 0.01 |
    | the same one of rank 4, with fresh noise | 1 | 18 / 52 | 0.02 / 0.6 |
    | | 2 | 0.4 / 7 | 0.01 / 0.3 |
    | | 4 | 0.01 / 0.2 | 0.01 / 0.2 |
    | Gaussian, nothing in common with the step before | 1 | 25 / 34 | 24 / 37 |
    | | 2 | 12 / 15 | 12 / 24 |
    | | 4 | 4 / 7 | 4 / 15 |

    Leaves of rank 2 are matrices `(in, out)`. Those of higher ranks count as `(all but the last, last)`, as
    outputs are last in JAX's convolution kernels. Those of ranks 0 and 1 are scaled by their L2 norm. Complex
    leaves may be used; leaves that are not floating point or complex pass through.

    A matrix within the limit comes out bit-identical, zeros stay zeros. A NaN or infinite entry makes all of
    its matrix NaN, or zero, as `nonfinite` says. The vector of a matrix that is zero or not finite stays what
    it was. Entries from 1e-38 to 3e38 are measured right.

    Under `jit` matrices may be split over devices. Inside `shard_map` each device has to hold whole ones: a
    leaf that varies over a mesh axis is an error there, as `axis_name` says.

    Args:
      max_norm: c, the largest singular value to allow: a number, an array of shape `()` or with one entry
        for each matrix, a schedule, or one of `optaxclip.limits`, for which every matrix is a group.
      iterations: how often a matrix is multiplied by a vector and its transpose by another, from 1.
      axes: which axes are outputs, if not the last: an integer or several, for all leaves of rank 2 and more;
        or the name of a framework, as in `groups.unit`, whose biases and scales of any rank are scaled by
        their L2 norm; or a dict from pattern to one of these, where the first pattern found in the path wins
        and the rest gets the default. The layer axis of stacked leaves is not counted.
      stacked: a regular expression that is found in the paths of leaves whose axis 0 counts layers: each of
        these has a matrix of its own.
      nonfinite: `"propagate"` makes all of a matrix NaN, `"zero"` makes zeros of it; others are untouched.
      axis_name: pass `()` inside `shard_map` where each device has whole matrices of its own, such as
        experts. Without it a leaf that varies over a mesh axis is an error where JAX keeps track of it, since
        it may be a part of a matrix; with `check_vma=False` and under `pmap` a part is taken for a whole.

    Returns:
      A transformation with a `SpectralState`: six numbers for each matrix, one for each of its outputs, and
      the limit's own state.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is out of range, a choice is unknown, a pattern does not compile, `init` finds
        no stacked leaf or an axis out of range, or `update` gets another tree than `init` or leaves that vary
        over mesh axes.

    References:
      Miyato et al., [Spectral Normalization for Generative Adversarial
      Networks](https://arxiv.org/abs/1802.05957), 2018, which estimates the norm of parameters so, with one
      vector and one iteration a step.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_spectral_norm(1.0)
    >>> grads = {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "bias": jnp.array([0.3, 0.4])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["kernel"], state.norm)
    [[1. 0.]
     [0. 0.]] [0.5 3. ]
    """
    where = "clip_by_spectral_norm"
    _checks.whole_number(where, least=1, iterations=iterations)
    limit = as_limit(max_norm, where, "max_norm")
    method = Method(alone(where, axis_name), limit, responses.clip(), int(iterations), True, None, nonfinite)
    return transformation(method, axes, stacked)


def soft_clip_singular_values(
    max_value: LimitLike,
    *,
    method: Literal["svd", "newton_schulz"] = "svd",
    iterations: int = 10,
    axes: Axes = None,
    stacked: str | None = None,
    nonfinite: Nonfinite = "propagate",
    axis_name: tuple[()] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks every singular value smoothly to below `max_value`, and keeps the singular vectors.

    $$H_c(W) = (I + W W^\top / c^2)^{-1/2}\, W, \quad \sigma \mapsto \sigma / \sqrt{1 + \sigma^2 / c^2}$$

    `"svd"`, the default for its accuracy, decomposes. `"newton_schulz"` needs nothing but matrix products,
    which suits accelerators. Both work in float32 whatever the dtype of the leaves, with products in full
    precision (in float64 for float64 leaves). The error relative to the exact result, both in Frobenius norm,
    was at most this in the tests, against float64, for square Gaussian matrices, which are the hardest:

    | σ₁ / c | `"svd"` | 10 iterations | 20 iterations |
    | --- | --- | --- | --- |
    | 1 | 2e-6 | 2e-6 | 2e-6 |
    | 10 | 2e-6 | 1e-5 | 1e-5 |
    | 30 | 2e-6 | 2 % | 3e-5 |
    | 100 | 5e-6 | 9 % | 1e-4 |
    | 1000 | 5e-5 | 20 % | 1e-3 |

    Too few iterations leave small singular values too small. None comes out above c by more than 1e-4 c; with
    20 iterations and more, of matrices of low rank far above c, 1e-3.

    Leaves of ranks 0 and 1 are multiplied by $1 / \sqrt{1 + n^2 / c^2}$ with n their L2 norm, as a matrix of
    one column would be. Zeros stay zeros, an infinite c changes nothing and c = 0 gives zeros. Other ranks,
    dtypes and non-finite entries are treated as in `clip_by_spectral_norm`. A matrix that is split
    over devices is gathered on each of them and comes out whole.

    *Differences from the authors' code*: it recovers another optimizer's update from the parameters and clips
    that, where here the place in `optax.chain` decides; it multiplies by $\sqrt{\max(1, m/n)}$, for m by n;
    it iterates in bfloat16 unless told otherwise; it leaves higher ranks alone; and its rule for vectors
    jumps, from a factor of 1 where n = c to one of 0.71 right above.

    Args:
      max_value: c, as `max_norm` in `clip_by_spectral_norm`. Adaptive limits see the largest singular values.
      method: how to compute it.
      iterations: of `"newton_schulz"`, from 1.
      axes: as in `clip_by_spectral_norm`.
      stacked: likewise.
      nonfinite: likewise.
      axis_name: likewise.

    Returns:
      A transformation with a `SpectralState` without vectors. The norms in it are exact with `"svd"`; with
      `"newton_schulz"` they are those of 8 cold power iterations, which change nothing but what adaptive
      limits see.

    Raises:
      TypeError: as in `clip_by_spectral_norm`.
      ValueError: likewise.

    References:
      Jiang et al., [SPECTRA](https://arxiv.org/abs/2603.14315), 2026, with 10 iterations.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.soft_clip_singular_values(3.0)
    >>> grads = {"kernel": jnp.array([[4.0, 0.0], [0.0, 0.0]])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(f"{updates['kernel'][0, 0]:.3f}")
    2.400
    """
    where = "soft_clip_singular_values"
    _checks.one_of(where, ("svd", "newton_schulz"), method=method)
    _checks.whole_number(where, least=1, iterations=iterations)
    svd = method == "svd"
    change = _softened if svd else functools.partial(_iterated, iterations=int(iterations))
    limit = as_limit(max_value, where, "max_value")
    split = alone(where, axis_name)
    soft = Method(split, limit, responses.soft("sqrt"), 0 if svd else COLD, False, change, nonfinite)
    return transformation(soft, axes, stacked)


def clip_singular_values(
    max_value: LimitLike,
    *,
    axes: Axes = None,
    stacked: str | None = None,
    nonfinite: Nonfinite = "propagate",
    axis_name: tuple[()] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips every singular value to `max_value`, and keeps the singular vectors.

    $$\sigma \leftarrow \min(\sigma, c)$$

    Of all matrices without a singular value above c, the result is the nearest in the Frobenius norm. It is
    decomposed in float32 (float64 for float64 leaves): the error is at most 2e-6 σ₁ in the tests, and at most
    5e-5 of the result for σ₁ up to 1000 c.

    There is no iterative method, as min(σ, c) has a corner: polynomials round it off (published ones are
    about 4 % off there, and diverge for σ above 3.5 c), and an iteration that finds the sign of σ - c takes
    the longer the nearer σ is to c. `soft_clip_singular_values` has one.

    A matrix within the limit comes out bit-identical, so do zeros. Leaves of ranks 0 and 1 are clipped by
    their L2 norm. Other ranks, dtypes and non-finite entries are treated as in `clip_by_spectral_norm`.
    A matrix that is split over devices is gathered, decomposed on each of them, and comes out whole.

    Args:
      max_value: c, as `max_norm` in `clip_by_spectral_norm`. Adaptive limits see the largest singular values:
        with a moving average or a windowed percentile they follow the paper.
      axes: as in `clip_by_spectral_norm`.
      stacked: likewise.
      nonfinite: likewise.
      axis_name: likewise.

    Returns:
      A transformation with a `SpectralState` without vectors.

    Raises:
      TypeError: as in `clip_by_spectral_norm`.
      ValueError: likewise.

    References:
      Yukhimchuk et al., [spectral clipping of gradients](https://arxiv.org/abs/2605.11838), 2026, which finds
      the values above c by a randomised, truncated decomposition.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_singular_values(1.0)
    >>> grads = {"kernel": jnp.array([[4.0, 0.0], [0.0, 0.5]])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["kernel"])
    [[1.  0. ]
     [0.  0.5]]
    """
    where = "clip_singular_values"
    limit = as_limit(max_value, where, "max_value")
    return transformation(
        Method(alone(where, axis_name), limit, responses.clip(), 0, False, _hardened, nonfinite),
        axes,
        stacked,
    )


def _softened(found: Found, limit: jax.Array) -> jax.Array:
    assert found.factors is not None
    return _singular.by_svd(found.factors, found.scale, limit, soft=True)


def _hardened(found: Found, limit: jax.Array) -> jax.Array:
    assert found.factors is not None
    return _singular.by_svd(found.factors, found.scale, limit, soft=False)


def _iterated(found: Found, limit: jax.Array, iterations: int) -> jax.Array:
    assert found.scaled is not None
    return _singular.by_newton_schulz(found.scaled, found.scale, limit, iterations)
