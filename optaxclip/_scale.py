"""Multiplies leaves by the factors of their rows, in float32, and hands them back in their own dtype."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from optaxclip import _mesh
from optaxclip._base import Response
from optaxclip._measure import TINY, Measured
from optaxclip._partition import Place
from optaxclip._read import times, widen

FEW = 8  # leaves; up to this many, reading factors out of a vector costs no compile time to speak of


class Factors(NamedTuple):
    """What the rows are multiplied by, all of shape `(rows,)`.

    Attributes:
      factor: the factors; too small ones may be 0.
      code: the factors in a form that holds small ones too, for `scale`.
      after: the norms times the factors.
    """

    factor: Float[Array, "rows"]
    code: Float[Array, "rows"]
    after: Float[Array, "rows"]


def factors(
    measured: Measured, limit: Float[Array, "rows"], response: Response, eps: jax.typing.ArrayLike
) -> Factors:
    """What to multiply each row by: 1 for rows of zeros; rows that are not finite are the caller's business.

    A factor below 2^-100 cannot be relied on, since numbers below 2^-126 may be taken for zero. Its code is
    `-factor / TINY`, which tells `scale` to multiply the entries by `TINY` first.

    Args:
      measured: the norms of the rows.
      limit: the limits, not negative.
      response: what makes a factor of norm and limit.
      eps: added to the norms.
    """
    empty = measured.norm == 0
    eps = jnp.asarray(eps, measured.norm.dtype)
    largest = float(jnp.finfo(measured.norm.dtype).max)
    norm = jnp.where(empty, 1, jnp.minimum(measured.norm + eps, largest))
    small = jnp.where(empty, 1, measured.small + eps * TINY)
    # A norm beyond the largest number stands as the largest number, which is too small by this much.
    beyond = small > largest * TINY
    excess = jnp.where(beyond, largest * TINY / jnp.where(beyond, small, 1), 1)
    factor = response.factor(norm, limit)
    factor = jnp.where(factor < 1, factor * excess, factor)
    factor = jnp.where(empty, 1, jnp.minimum(factor, largest))
    tiny = ~empty & (limit < small * 2.0**-36) & (factor < 2.0**-100)
    code = jnp.where(tiny, -response.factor(jnp.where(tiny, small, norm), limit), factor)
    scaled = measured.small * jnp.abs(code)
    after = jnp.where(tiny, scaled, jnp.where(beyond, scaled / TINY, measured.norm * factor))
    return Factors(factor, code, after)


@functools.partial(jax.jit, static_argnames=("places", "drop"))
def scale(
    leaves: Sequence[jax.Array],
    codes: jax.Array,
    seed: jax.Array,
    *,
    places: tuple[Place, ...],
    drop: bool,
) -> list[jax.Array]:
    """Multiplies each leaf by the factor of its row or rows.

    Args:
      leaves: the leaves to scale.
      codes: the factors, coded by `factors`, `(rows,)`.
      seed: any number that is never -1.
      places: the place of each leaf.
      drop: whether a factor of 0 makes zeros of entries that are not finite.
    """
    single = [k for k, place in enumerate(places) if not place.axes]
    codes, indices = _apart(codes, [places[k].first for k in single], seed)
    if codes.size == 1:
        picks = dict.fromkeys(single, _decoded(codes.reshape(())))
    else:
        picks = {k: _decoded(_element(codes, index)) for k, index in zip(single, indices, strict=True)}
    scaled = []
    for k, (leaf, place) in enumerate(zip(leaves, places, strict=True)):
        if place.axes:
            shape = tuple(leaf.shape[axis] for axis in place.axes)
            code = codes[place.first : place.first + math.prod(shape)].reshape(shape)
            others = tuple(axis for axis in range(leaf.ndim) if axis not in place.axes)
            by = _decoded(jnp.expand_dims(_mesh.share(code, leaf, place.axes), others))
        else:
            by = picks[k]
        scaled.append(_times(leaf, by, drop))
    return scaled


class _By(NamedTuple):
    """A code taken apart: multiply by both numbers, unless the factor is 1."""

    first: jax.Array
    then: jax.Array
    changes: jax.Array


def _decoded(code: jax.Array) -> _By:
    return _By(jnp.where(code < 0, TINY, 1).astype(code.dtype), jnp.abs(code), code != 1)


def _times(leaf: jax.Array, by: _By, drop: bool) -> jax.Array:
    real = jnp.float64 if jnp.finfo(leaf.dtype).bits == 64 else jnp.float32
    product = times(times(widen(leaf, real), by.first.astype(real)), by.then.astype(real)).astype(leaf.dtype)
    if drop:
        product = jnp.where(by.then == 0, jnp.zeros_like(product), product)
    return jnp.where(by.changes, product, leaf)


def _apart(
    vector: jax.Array, indices: list[int], seed: jax.Array
) -> tuple[jax.Array, Sequence[int | jax.Array]]:
    """The vector and the indices, in a form that XLA on CPU knows nothing about.

    It would fuse all that makes the vector into every kernel that reads from it, and with a known index no
    two of these kernels would be the same: each would be compiled. What comes out of a conditional stays
    apart, and kernels for leaves of the same shape are compiled once.
    """
    if _mesh.has_mesh(vector):
        return _mesh.replicate(vector), indices
    few = len(indices) <= FEW or vector.size == 1

    def opaque(vector, seed):
        def as_it_is():
            return vector, [] if few else [np.int32(index) for index in indices]

        def never():
            return jnp.zeros_like(vector), [] if few else [np.int32(0)] * len(indices)

        return lax.cond(seed != -1, as_it_is, never)

    def plain(vector, seed):
        del seed
        return vector, [] if few else [jnp.int32(index) for index in indices]

    vector, opaque_indices = lax.platform_dependent(vector, seed, cpu=opaque, default=plain)
    return vector, indices if few else opaque_indices


def _element(vector: jax.Array, index: int | jax.Array) -> jax.Array:
    if isinstance(index, int):
        return vector[index]
    return vector.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
