"""Norms of groups, right for finite entries from 3e-29 to 3e38, and for smaller ones where all are small.

Entries are multiplied by a power of two before they are squared, one at which neither ordinary nor zero
entries call for a second reading; only if a group overflows, or the whole update is tiny, a loop reads it
again at another scale, and keeps what comes of that for those groups. Large leaves of one group are read as
they are at first, since XLA on CPU takes half as long for a plain sum of squares; if that is zero, or too
small to be relied on, the group is read again, scaled as the others are at first.

The loop has more uses. A scale that comes out of it is a number unknown to the compiler, which would
otherwise write a broadcast constant, or a float32 copy of a 16-bit leaf, to memory. And under `vmap` it reads
ordinary updates once, where a conditional would compute both of its branches.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import _local, _mesh
from optaxclip._base import Norm
from optaxclip._mesh import Along
from optaxclip._partition import Place
from optaxclip._read import SMALL, Block, blocks_of, partials, peaks, without_nan

TINY = 2.0**-64  # what norms beyond the dtype's range are multiplied by

Arrays: TypeAlias = Sequence[jax.Array]
Combine: TypeAlias = Literal["sum", "max"]


class Measured(NamedTuple):
    """The norms of the rows, all of shape `(rows,)`.

    Attributes:
      norm: the norm, at most the largest finite number unless entries are infinite.
      small: the norm times `TINY`, which has room for norms beyond the largest number.
      fixed: the norm of the leaves that are measured only; None if there are none.
      free: the norm of the others; None likewise.
    """

    norm: jax.Array
    small: jax.Array
    fixed: jax.Array | None
    free: jax.Array | None


@functools.partial(jax.jit, static_argnames=("places", "splits", "laid", "sizes", "norm", "dtype"))
def measure(
    leaves: Sequence[jax.Array],
    *,
    places: tuple[Place, ...],
    splits: tuple[tuple[str, ...], ...],
    laid: tuple[Along, ...],
    sizes: tuple[float, ...],
    norm: Norm,
    dtype: np.dtype,
) -> Measured:
    """Measures every row of the groups.

    Args:
      leaves: the measured leaves.
      places: the place of each.
      splits: the manual mesh axes that each is split over.
      laid: for each axis of each, the automatic mesh axes that it is known to be split over; or nothing.
      sizes: entries in each row.
      norm: how.
      dtype: what to accumulate in, float32 or float64.
    """
    rows, count = len(sizes), np.asarray(sizes, dtype)
    parts = 1 + any(not place.scaled for place in places)
    # Leaves that are measured but not scaled have rows of their own, behind the others.
    firsts = [place.first + rows * (not place.scaled) for place in places]
    blocks = blocks_of(leaves, firsts, places, splits, laid, norm.shaped)

    def together(
        own: Sequence[Block], combine: Combine, of: Callable[[Sequence[Block]], jax.Array]
    ) -> jax.Array:
        return across(own, of, rows * parts, combine, norm.shaped).reshape(parts, rows)

    def at(arrays: Arrays, scales: Arrays) -> jax.Array:
        own = [b._replace(array=x, scale=s) for b, x, s in zip(blocks, arrays, scales, strict=True)]
        return together(own, norm.combine, lambda alike: partials(alike, norm, dtype))

    def at_each(arrays: Arrays, scale: jax.Array) -> jax.Array:
        return at(arrays, [scale[block.rows % rows].reshape(block.kept) for block in blocks])

    plain = _plain(blocks) if norm.degree <= 2 and not norm.shaped else [False] * len(blocks)

    def first(arrays: Arrays) -> Trial:
        middle = _levels(norm, dtype)[1]
        scales = np.full(rows, middle)
        for block in itertools.compress(blocks, plain):
            scales[block.rows % rows] = 1
        own = []
        arrays, _ = _mesh.barrier(arrays, jnp.zeros((), dtype))
        for block, x, as_is in zip(blocks, arrays, plain, strict=True):
            weight = (scales[block.rows % rows] / middle) ** norm.degree
            scale, weight = (None, None) if as_is else (middle, None if np.all(weight == 1) else weight)
            own.append(block._replace(array=x, scale=scale, weight=weight))
        partial = together(own, norm.combine, lambda alike: partials(alike, norm, dtype))
        return _judged(partial, scales, norm, count)

    @jax.custom_jvp
    def found(arrays: Arrays) -> Measured:
        if norm.degree > 2:
            own = [block._replace(array=x) for block, x in zip(blocks, arrays, strict=True)]
            peak = together(own, "max", lambda alike: peaks(alike, dtype))
            scale = _inverse(jnp.max(peak, axis=0))
            partial = at_each(arrays, scale)
        else:
            split = [block.split for block in blocks]
            typed = functools.partial(_mesh.vary_like, arrays=arrays, split=split)
            start = first(arrays) if any(plain) else _nothing(parts, rows, norm, dtype)
            partial, scale = _by_trial(arrays, norm, jax.tree.map(typed, start), at)
        return _joined(partial, norm, lambda some: _close(some, scale, norm, count))

    @found.defjvp
    def _(primals, tangents):
        # Norms are homogeneous: their derivative at an update is that at the update times any scale. At one
        # where all norms are about 1, no power and no derivative of one overflows.
        values = found(*primals)
        scale = _inverse(values.norm)

        def closed(some: jax.Array) -> tuple[jax.Array, jax.Array]:
            value = norm.close(some, count)
            return value, value

        _, change = jax.jvp(lambda x: _joined(at_each(x, scale), norm, closed), primals, tangents)
        change = jax.tree.map(lambda x: x / scale, change)
        return values, change._replace(small=change.small * dtype.type(TINY))

    return found([block.array for block in blocks])


def across(
    blocks: Sequence[Block],
    of: Callable[[Sequence[Block]], jax.Array],
    rows: int,
    combine: Combine,
    whole: bool = False,
) -> jax.Array:
    """One number by row, `(rows,)`, put together across leaves and devices.

    `of` is called with the blocks that are split over the same manual axes, and returns one number for each
    of their indices. Unless `whole`, it may be given parts of the blocks instead.
    """
    own = functools.partial(_across, rows=rows, combine=combine)
    return own(blocks, of) if whole else _local.by_device(own, blocks, of)


def _across(
    blocks: Sequence[Block], of: Callable[[Sequence[Block]], jax.Array], rows: int, combine: Combine
) -> jax.Array:
    by_axes = collections.defaultdict(list)
    for block in blocks:
        by_axes[block.split].append(block)
    reduce = lax.psum if combine == "sum" else largest
    found, found_rows = [], []
    for split, alike in by_axes.items():
        index = np.concatenate([block.rows for block in alike])
        # A set of axes is sent its own rows alone.
        own, index = np.unique(index, return_inverse=True) if len(by_axes) > 1 else (np.arange(rows), index)
        part = _segments(of(alike), index, len(own), combine)
        part = without_nan(part) if combine == "max" else part
        found.append(reduce(part, split) if split else part)
        found_rows.append(own)
    if len(found) == 1:
        return found[0]
    return _segments(jnp.concatenate(found), np.concatenate(found_rows), rows, combine)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest(values: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The largest value of all devices along some mesh axes; JAX has no derivative for that."""
    return lax.pmax(values, axes)


@largest.defjvp
def _(axes, primals, tangents):
    (own,), (change,) = primals, tangents
    peak = largest(own, axes)
    here = (own == peak).astype(own.dtype)
    # Devices that share the largest value share the derivative.
    return peak, lax.psum(here * change, axes) / jnp.maximum(lax.psum(here, axes), 1)


def _add(combine: Combine):
    return _sum if combine == "sum" else jnp.max


def _sum(values: jax.Array, **options: Any) -> jax.Array:
    """The sum in the dtype of what is summed: with 64 bits switched on, `jnp.sum` makes int64 of int32."""
    return jnp.sum(values, dtype=values.dtype, **options)


def _segments(values: jax.Array, index: np.ndarray, rows: int, combine: Combine) -> jax.Array:
    """Sums (or takes the maximum of) the entries that belong to each row: `(n,) -> (rows,)`.

    Rows with equally many entries are reduced together, so that no scatter is needed.
    """
    reduce = _add(combine)
    if rows == 1:
        return reduce(values, keepdims=True)
    if np.array_equal(index, np.arange(rows)):
        return values
    count = np.bincount(index, minlength=rows)
    order = np.argsort(index, kind="stable")
    starts = np.cumsum(count) - count
    pieces, of_rows = [], []
    for width in np.unique(count):
        same = np.flatnonzero(count == width)
        columns = order[starts[same][:, None] + np.arange(width)]
        pieces.append(reduce(values[columns], axis=1) if width else jnp.zeros(len(same), values.dtype))
        of_rows.append(same)
    together = jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    back = np.argsort(np.concatenate(of_rows))
    return together if np.array_equal(back, np.arange(rows)) else together[back]


def _levels(norm: Norm, dtype: np.dtype) -> np.ndarray:
    """The powers of two that entries may be multiplied by, from the largest down."""
    top = int(jnp.finfo(dtype).maxexp)
    # Ordinary entries are far from both ends of the range at the second scale, and so are their powers. What
    # overflows at one scale is about 1 at the next, so that many small entries do not vanish there.
    exponents = [top - 2, int(top / 2 / norm.degree)]
    enough = (top - 34) / norm.degree - top  # for 2^34 entries, all of them the largest number
    while exponents[-1] > enough:
        exponents.append(max(exponents[-1] - int(top / norm.degree), 2 - top))
    return np.exp2(exponents).astype(dtype)


class Trial(NamedTuple):
    """What is known of the rows after some readings.

    Attributes:
      level: of the next reading: 0 for the second scale, then down.
      scale: what entries are to be multiplied by at it.
      again: the rows to be read again, `(rows,)`.
      partial: the partial results, `(parts, rows)`.
      scales: the scales that they were measured at, `(rows,)`.
    """

    level: jax.Array
    scale: jax.Array
    again: jax.Array
    partial: jax.Array
    scales: jax.Array


def _nothing(parts: int, rows: int, norm: Norm, dtype: np.dtype) -> Trial:
    """Before any reading."""
    middle = jnp.asarray(_levels(norm, dtype)[1])
    again, scales = jnp.full((rows,), True), jnp.full((rows,), middle)
    return Trial(jnp.int32(0), middle, again, jnp.zeros((parts, rows), dtype), scales)


def _plain(blocks: Sequence[Block]) -> list[bool]:
    """Which blocks to read as they are at first: large leaves of one row, that no mesh is known of."""
    if any(_mesh.has_mesh(block.array) for block in blocks):
        return [False] * len(blocks)
    return [not block.kept and block.array.size > SMALL for block in blocks]


def _judged(partial: jax.Array, scales: np.ndarray, norm: Norm, count: np.ndarray) -> Trial:
    """After the first reading: rows at scale 1 that are small, or zero, and what overflowed, come again."""
    dtype, plain = partial.dtype, scales == 1
    _, middle, *down = _levels(norm, dtype)
    kind = jnp.finfo(dtype)
    # So large, a sum cannot have lost more than a rounding to powers that vanished.
    enough = np.where(
        plain, np.asarray(count, np.float64) * float(kind.tiny) / float(kind.eps), _least(dtype)
    )
    whole = _parts(partial, norm)
    small, large = whole < enough.astype(dtype), whole == jnp.inf
    small = jnp.where(jnp.all(small), True, small & plain)
    only_large = jnp.any(large) & ~jnp.any(small)
    scale = jnp.where(only_large, down[0], middle)
    return Trial(only_large.astype(jnp.int32), scale, small | large, partial, jnp.asarray(scales))


def _by_trial(
    arrays: Arrays, norm: Norm, start: Trial, at: Callable[[Arrays, Arrays], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Measures at the second scale, and at the others only those rows for which that did not do.

    Args:
      arrays: what to measure.
      norm: how.
      start: what is known already.
      at: measures arrays at scales of shape `()`, one for each.

    Returns:
      The partial results and the scales they were measured at, `(rows,)`.
    """
    dtype = start.partial.dtype
    up, _, *down = _levels(norm, dtype)

    def unfinished(trial: Trial) -> jax.Array:
        return jnp.any(trial.again) & (trial.level <= len(down))

    def attempt(trial: Trial) -> Trial:
        level, scale, again, partial, scales = trial
        # The scale differs from pass to pass: nothing of a leaf can be moved out of the loop.
        partial = jnp.where(again, at(*_mesh.barrier(arrays, scale)), partial)
        scales = jnp.where(again, scale, scales)
        whole = _parts(partial, norm)
        too_small = (level == 0) & jnp.all(again & (whole < _least(dtype)))
        for k, lower in enumerate(down):
            scale = jnp.where(level == k, lower, scale)
        scale = jnp.where(too_small, up, scale)
        return Trial(level + 1, scale, too_small | (whole == jnp.inf), partial, scales)

    last = lax.while_loop(unfinished, attempt, start)
    return last.partial, last.scales


def _least(dtype: np.dtype) -> np.floating:
    """Partial results at the second scale below which all powers may have vanished."""
    return np.exp2(-jnp.finfo(dtype).maxexp * 72 / 128).astype(dtype)


def _inverse(norm: jax.Array) -> jax.Array:
    """A scale at which a norm is about 1, and which is neither infinite nor rounded to zero."""
    largest = float(jnp.finfo(norm.dtype).max) / 8
    return lax.stop_gradient(1 / jnp.clip(norm, 1 / largest, largest))


def _parts(partial: jax.Array, norm: Norm) -> jax.Array:
    """Partial results of what is scaled and what is not, `(parts, rows)`, put together."""
    return partial[0] if len(partial) == 1 else _add(norm.combine)(partial, axis=0)


def _joined(
    partial: jax.Array, norm: Norm, close: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
) -> Measured:
    """The norms of partial results `(parts, rows)`."""
    together = close(_parts(partial, norm))
    if len(partial) == 1:
        return Measured(*together, None, None)
    free, fixed = partial
    return Measured(*together, close(fixed)[0], close(free)[0])


def _close(
    partial: jax.Array, scale: jax.Array, norm: Norm, count: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """The norms of rows from their partial results and scales; and the norms times `TINY`."""
    scaled = norm.close(partial, count)
    true = scaled / scale
    beyond = (true == jnp.inf) & (scaled < jnp.inf)
    return jnp.where(beyond, float(jnp.finfo(true.dtype).max), true), scaled * (true.dtype.type(TINY) / scale)


def merge(
    norm: Norm, norms: jax.Array, sizes: np.ndarray, total: float | np.ndarray | None = None
) -> jax.Array:
    """The norm of groups together from their norms along the last axis, without overflow on the way.

    Args:
      norm: how they were measured.
      norms: the norms, `(..., groups)`.
      sizes: how many entries each is the norm of, `(groups,)`.
      total: how many entries they have together; by default the sum.
    """
    if norms.shape[-1] == 1 and total is None:
        return norms[..., 0]
    total = np.sum(sizes) if total is None else total
    scale = _inverse(jnp.max(norms, axis=-1))
    scaled = norms * jnp.expand_dims(scale, -1)
    each = jnp.broadcast_to(jnp.asarray(sizes, norms.dtype), norms.shape)
    partial = _add(norm.combine)(norm.open(scaled, each), axis=-1)
    return _close(partial, scale, norm, np.asarray(total, norms.dtype))[0]
