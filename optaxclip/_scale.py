"""Multiplies leaves by the factors of their rows, in float32 or float64."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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
      first: what to multiply by first, 1 or `TINY`.
      then: what to multiply by then, so that both make the factor, and 1 only where the factor is.
      after: the norms times the factors.
    """

    factor: Float[Array, " rows"]
    first: Float[Array, " rows"]
    then: Float[Array, " rows"]
    after: Float[Array, " rows"]


def factors(
    measured: Measured, limit: Float[Array, " rows"], response: Response, eps: jax.typing.ArrayLike
) -> Factors:
    """What to multiply each row by: 1 for rows of zeros; rows that are not finite are the caller's business.

    A factor below 2^-100 cannot be relied on, since numbers below 2^-126 may be taken for zero: entries are
    multiplied by `TINY` first, and then by what is left of it.

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
    # A norm beyond the largest number stands as that number: norm and limit are held against each other at a
    # scale where both have room.
    beyond = small > largest * TINY
    norm = jnp.where(beyond, small, norm)
    # So small a factor grows with the limit; one that does not, such as a floor, stays what it is.
    usual = jnp.where(beyond, limit * TINY, limit)
    tiny = ~empty & (limit < small * 2.0**-36) & (response.factor(norm, usual) < 2.0**-99)
    larger = jnp.where(beyond, limit, jnp.where(tiny, limit, 0) / TINY)
    held = jnp.where(tiny, larger, usual)
    then = jnp.where(empty, 1, jnp.minimum(response.factor(norm, held), largest))
    first = jnp.where(tiny, TINY, 1 + _mesh.zeros_like(measured.norm))
    factor, scaled = first * then, measured.small * then
    after = jnp.where(tiny, scaled, jnp.where(beyond, scaled / TINY, measured.norm * factor))
    return Factors(factor, first, then, after)


@functools.partial(jax.jit, static_argnames=("places", "drop", "dtype"))
def scale(
    leaves: Sequence[jax.Array],
    first: Float[Array, " rows"],
    then: Float[Array, " rows"],
    seed: jax.Array,
    *,
    places: tuple[Place, ...],
    drop: bool,
    dtype: np.dtype | None = None,
) -> list[jax.Array]:
    """Multiplies each leaf by the factor of its row or rows.

    Args:
      leaves: the leaves to scale.
      first: what to multiply by first, by row; see `Factors`.
      then: what to multiply by then.
      seed: any number that is never -1.
      places: the place of each leaf.
      drop: whether a factor of 0 makes zeros of entries that are not finite.
      dtype: what comes out, complex where a leaf is; by default the leaf's own.
    """
    counts = {
        place.first: math.prod(leaf.shape[axis] for axis in place.axes)
        for leaf, place in zip(leaves, places, strict=True)
        if place.axes
    }
    single = list(dict.fromkeys(place.first for place in places if not place.axes))
    pairs, rows, several = _apart(jnp.stack([first, then]), single, counts, seed)
    # All are traced once for leaves that are alike.
    times_pair = jax.jit(functools.partial(_times, drop=drop, dtype=dtype))
    times_row = jax.jit(functools.partial(_times_row, drop=drop, dtype=dtype))
    times_rows = jax.jit(functools.partial(_times_rows, drop=drop, dtype=dtype), static_argnames="axes")
    known = {row: (pairs[0, row], pairs[1, row]) for row in rows.values() if isinstance(row, int)}
    scaled = []
    for leaf, place in zip(leaves, places, strict=True):
        if place.axes:
            scaled.append(times_rows(leaf, several[place.first], axes=place.axes))
            continue
        row = rows[place.first]
        by_row = times_pair(leaf, *known[row]) if isinstance(row, int) else times_row(leaf, pairs, row)
        scaled.append(by_row)
    return scaled


def _times_row(
    leaf: jax.Array, pairs: jax.Array, row: jax.Array, drop: bool, dtype: np.dtype | None
) -> jax.Array:
    own = lax.dynamic_slice(pairs, (np.int32(0), row), (2, 1), allow_negative_indices=False)
    return _times(leaf, own[0, 0], own[1, 0], drop, dtype)


def _times_rows(
    leaf: jax.Array, own: jax.Array, axes: tuple[int, ...], drop: bool, dtype: np.dtype | None
) -> jax.Array:
    """A leaf times a pair of factors for each index of some of its axes, `(2, indices)`."""
    shape = tuple(leaf.shape[axis] for axis in axes)
    others = tuple(axis for axis in range(leaf.ndim) if axis not in axes)
    by_rows = (_mesh.share(x.reshape(shape), leaf, axes) for x in own)
    by_first, by_then = (jnp.expand_dims(x, others) for x in by_rows)
    return _times(leaf, by_first, by_then, drop, dtype)


def _times(
    leaf: jax.Array, first: jax.Array, then: jax.Array, drop: bool, dtype: np.dtype | None
) -> jax.Array:
    real = jnp.float64 if jnp.finfo(leaf.dtype).bits == 64 else jnp.float32
    if then.dtype == jnp.float64 and real == jnp.float32:
        # Beside float64 leaves a factor may be beyond float32, and an infinity would make NaN of zeros.
        then = jnp.minimum(then, float(jnp.finfo(real).max))
    product = times(times(widen(leaf, real), first.astype(real)), then.astype(real))
    if drop:
        product = jnp.where(then == 0, jnp.zeros_like(product), product)
    if leaf.dtype == jnp.bfloat16 and dtype in (None, jnp.bfloat16):
        return _bfloat16(product, leaf, then != 1)
    product, leaf = (x.astype(leaf.dtype) if dtype is None else widen(x, dtype) for x in (product, leaf))
    return _picked(then != 1, product, leaf)


def _picked(changed: jax.Array, product: jax.Array, leaf: jax.Array) -> jax.Array:
    """The product where it is changed. Where nothing is, a single choice lets XLA leave out the writing."""
    picked = jnp.where(changed, product, leaf)
    if changed.size == 1 or _mesh.has_mesh(leaf):
        return picked
    return jnp.where(jnp.any(changed), picked, leaf)


@jax.custom_jvp
def _bfloat16(product: jax.Array, leaf: jax.Array, changed: jax.Array) -> jax.Array:
    """The float32 product rounded to bfloat16, or the leaf where nothing is changed.

    On CPU by their bits: XLA writes out what it converts to bfloat16, and does not leave out the writing of
    what has not changed.
    """

    def by_bits(product, leaf, changed):
        bits = lax.bitcast_convert_type(product, jnp.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to the nearest, ties to even
        rounded = jnp.where(jnp.isnan(product), np.uint32(0x7FC00000), bits + half) >> np.uint32(16)
        kept = lax.bitcast_convert_type(leaf, jnp.uint16)
        return lax.bitcast_convert_type(_picked(changed, rounded.astype(jnp.uint16), kept), jnp.bfloat16)

    def converted(product, leaf, changed):
        return jnp.where(changed, product.astype(jnp.bfloat16), leaf)

    return lax.platform_dependent(product, leaf, changed, cpu=by_bits, default=converted)


@_bfloat16.defjvp
def _(primals, tangents):
    product, leaf, changed = tangents
    _, _, where = primals
    del changed
    return _bfloat16(*primals), jnp.where(where, product.astype(jnp.bfloat16), leaf)


def _apart(
    pairs: jax.Array, rows: Sequence[int], counts: Mapping[int, int], seed: jax.Array
) -> tuple[jax.Array, dict[int, int | jax.Array], dict[int, jax.Array]]:
    """The factors, the indices of rows, and some factors by themselves, of which XLA on CPU knows nothing.

    It would fuse all that makes the factors into every kernel that reads from them, and with a known index no
    two of these kernels would be the same: each would be compiled. What comes out of a conditional stays
    apart, and kernels for leaves of the same shape are compiled once.

    Args:
      pairs: the factors, `(2, rows)`.
      rows: the rows that are read one at a time.
      counts: how many factors are to stand by themselves, from each of some rows on.
      seed: any number that is never -1.
    """
    pairs = _mesh.replicate(pairs)
    few = len(rows) <= FEW
    hidden = [] if few else rows

    def cut(pairs: jax.Array, starts: Iterable[Any]) -> list[jax.Array]:
        at = zip(starts, counts.values(), strict=True)
        return [
            lax.dynamic_slice(pairs, (np.int32(0), k), (2, n), allow_negative_indices=False) for k, n in at
        ]

    def opaque(pairs, seed):
        number = functools.partial(_mesh.typed_like, like=pairs)

        def known() -> tuple[jax.Array, list[Any], list[Any]]:
            return pairs, [number(np.int32(row)) for row in hidden], [number(np.int32(row)) for row in counts]

        def never() -> tuple[jax.Array, list[Any], list[Any]]:
            none = number(np.int32(0))
            return number(jnp.zeros_like(pairs)), [none] * len(hidden), [none] * len(counts)

        pairs, indices, starts = lax.cond(seed != -1, known, never)
        # In a conditional of their own, or kernels that scale would look factors up entry by entry.
        own = lax.cond(
            seed != -1,
            lambda: cut(pairs, starts),
            lambda: jax.tree.map(jnp.zeros_like, cut(pairs, starts)),
        )
        return pairs, indices, own

    def plain(pairs, seed):
        del seed
        return pairs, [jnp.int32(row) for row in hidden], cut(pairs, counts)

    pairs, indices, own = lax.platform_dependent(pairs, seed, cpu=opaque, default=plain)
    return pairs, dict(zip(rows, rows if few else indices, strict=True)), dict(zip(counts, own, strict=True))
