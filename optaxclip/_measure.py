"""Norms of groups, put together from the partial results of leaves and devices.

The partial results of each scale that `_read` measured at are summed apart, across leaves and then devices,
and put together at the end, on vectors of one entry per row of the groups.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import _mesh
from optaxclip._base import Norm
from optaxclip._partition import Place
from optaxclip._read import Block, at_levels, at_scales, blocks, flat, headroom, levels_of, without_nan

TINY = 2.0**-64  # what norms beyond the dtype's range are multiplied by


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


@functools.partial(jax.jit, static_argnames=("places", "sizes", "norm", "axis_name", "dtype"))
def measure(
    leaves: Sequence[jax.Array],
    *,
    places: tuple[Place, ...],
    sizes: tuple[float, ...],
    norm: Norm,
    axis_name: tuple[str, ...],
    dtype: np.dtype,
) -> Measured:
    """Measures every row of the groups.

    Args:
      leaves: the measured leaves.
      places: the place of each.
      sizes: entries in each row.
      norm: how.
      axis_name: manual mesh axes that leaves may be split over.
      dtype: what to accumulate in, float32 or float64.
    """
    rows = len(sizes)
    fixed = any(not place.scaled for place in places)
    # Leaves that are measured but not scaled get rows of their own, behind the others.
    split = blocks(leaves, [place.first + rows * (not place.scaled) for place in places], places)
    across = functools.partial(_rows, rows=rows * (1 + fixed), norm=norm, axis_name=axis_name)
    count = np.asarray(sizes, dtype)
    parts = 1 + fixed

    def read(arrays: Sequence[jax.Array]) -> list[Block]:
        return [block._replace(array=x) for block, x in zip(split, arrays, strict=True)]

    @jax.custom_jvp
    def found(arrays):
        levels = levels_of(norm, dtype)
        bins = across(read(arrays), lambda alike: _by_level(alike, norm, levels, dtype))
        return _joined(bins, parts, norm, lambda some: _close(some, levels, norm, count))

    @found.defjvp
    def _(primals, tangents):
        # Norms are homogeneous: their derivative at an update is that at the update times any scale. At one
        # where all norms are about 1, no power and no derivative of one overflows.
        values = found(*primals)
        largest = dtype.type(2.0 ** (jnp.finfo(dtype).maxexp - 3))
        scale = lax.stop_gradient(1 / jnp.clip(values.norm, 1 / largest, largest))

        def closed(some: jax.Array) -> tuple[jax.Array, jax.Array]:
            value = norm.close(some[0], count)
            return value, value

        def near_one(arrays):
            of_rows = jnp.concatenate([scale] * parts) if fixed else scale
            scaled = across(read(arrays), lambda alike: _at_rows(alike, norm, of_rows, dtype))
            return _joined(scaled, parts, norm, closed)

        _, change = jax.jvp(near_one, primals, tangents)
        change = jax.tree.map(lambda x: x / scale, change)
        return values, change._replace(small=change.small * dtype.type(TINY))

    return found([block.array for block in split])


def _joined(
    partials: jax.Array, parts: int, norm: Norm, close: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
) -> Measured:
    """The norms of partial results `(k, rows)`; if `parts` is 2, the second half is of what is not scaled."""
    if parts == 1:
        return Measured(*close(partials), None, None)
    free, fixed = jnp.split(partials, 2, axis=1)
    together = _add(norm)(jnp.stack([free, fixed]), axis=0)
    return Measured(*close(together), close(fixed)[0], close(free)[0])


def _by_level(blocks: Sequence[Block], norm: Norm, levels: np.ndarray, dtype: np.dtype) -> jax.Array:
    """The partial results of blocks, each in the bin of the scale it was measured at: `(levels, n)`."""
    partials, scales = at_levels(blocks, norm, levels, dtype)
    values, scale = flat(partials), flat(scales)
    room = levels.dtype.type(2.0 ** (-headroom(norm) * norm.degree))
    return jnp.where(scale[None] == levels[:, None], values[None] * room, 0)


def _at_rows(blocks: Sequence[Block], norm: Norm, scale: jax.Array, dtype: np.dtype) -> jax.Array:
    """The partial results of blocks, measured at the scales of their rows: `(1, n)`."""
    scales = [scale[block.rows].reshape(block.kept) for block in blocks]
    return flat(at_scales(blocks, norm, scales, dtype))[None]


def _rows(
    blocks: Sequence[Block],
    measured: Callable[[Sequence[Block]], jax.Array],
    rows: int,
    norm: Norm,
    axis_name: tuple[str, ...],
) -> jax.Array:
    """Partial results by row, `(k, rows)`, put together across leaves and devices.

    `measured` is called with the blocks that vary over the same manual axes, and returns `(k, n)`.
    """
    by_axes = collections.defaultdict(list)
    for block in blocks:
        by_axes[_mesh.varying_axes(block.array)].append(block)
    reduce = lax.psum if norm.combine == "sum" else lax.pmax
    parts = []
    for alike in by_axes.values():
        part = _segments(measured(alike), np.concatenate([block.rows for block in alike]), rows, norm)
        part = without_nan(part) if norm.combine == "max" else part
        split = _mesh.split_axes(alike[0].array, axis_name)
        if split:
            part = reduce(part, tuple(sorted(split)))
        parts.append(part)
    return parts[0] if len(parts) == 1 else _add(norm)(jnp.stack(parts), axis=0)


def _add(norm: Norm):
    return jnp.sum if norm.combine == "sum" else jnp.max


def _segments(values: jax.Array, index: np.ndarray, rows: int, norm: Norm) -> jax.Array:
    """Sums (or takes the maximum of) the columns that belong to each row: `(k, n) -> (k, rows)`.

    Rows with equally many columns are reduced together, so that no scatter is needed.
    """
    reduce = _add(norm)
    if rows == 1:
        return reduce(values, axis=1, keepdims=True)
    count = np.bincount(index, minlength=rows)
    order = np.argsort(index, kind="stable")
    starts = np.cumsum(count) - count
    pieces, of_rows = [], []
    for width in np.unique(count):
        same = np.flatnonzero(count == width)
        if width:
            pieces.append(reduce(values[:, order[starts[same][:, None] + np.arange(width)]], axis=2))
        else:
            pieces.append(jnp.zeros((len(values), len(same)), values.dtype))
        of_rows.append(same)
    together = jnp.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]
    back = np.argsort(np.concatenate(of_rows))
    return together if np.array_equal(back, np.arange(rows)) else together[:, back]


def _close(bins: jax.Array, levels: np.ndarray, norm: Norm, count: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The norms of the rows from their partial results at each scale; and the norms times `TINY`."""
    # A row is put together at the smallest scale at which something of it was measured. What takes partial
    # results there may be too small a number, and its root is not.
    exponents = np.log2(levels.astype(np.float64))
    roots = np.exp2(np.minimum(exponents - exponents[:, None], 0) * norm.degree / 2).astype(levels.dtype)
    scale = jnp.full(bins.shape[1:], levels[0])
    root = jnp.broadcast_to(roots[:, :1], bins.shape)
    for k in range(1, len(levels)):
        scale = jnp.where(bins[k] != 0, levels[k], scale)
        root = jnp.where(bins[k][None] != 0, roots[:, k, None], root)
    scaled = norm.close(_add(norm)(bins * root * root, axis=0), count)
    scale = scale * scale.dtype.type(2.0 ** -headroom(norm))
    true = scaled / scale
    beyond = (true == jnp.inf) & (scaled < jnp.inf)
    return jnp.where(beyond, float(jnp.finfo(true.dtype).max), true), scaled * (true.dtype.type(TINY) / scale)


def merge(norm: Norm, norms: jax.Array, sizes: np.ndarray, total: np.ndarray | None = None) -> jax.Array:
    """The norm of groups together from their norms along axis 0, without overflow on the way.

    Args:
      norm: how they were measured.
      norms: the norms.
      sizes: how many entries each is the norm of.
      total: how many entries they have together; by default the sum.
    """
    if len(norms) == 1 and total is None:
        return norms[0]
    total = np.sum(sizes, axis=0) if total is None else total
    each = jnp.broadcast_to(jnp.asarray(sizes, norms.dtype), norms.shape)
    largest = float(jnp.finfo(norms.dtype).max)
    peak = lax.stop_gradient(jnp.max(jnp.where(jnp.isfinite(norms), norms, 0), axis=0, keepdims=True))
    peak = jnp.where(peak > 0, peak, 1)
    # Both sides of the division stay away from where a reciprocal is rounded to zero.
    nearer, of_peak = (jnp.where(peak > 1, x * 2.0**-4, x * 2.0**4) for x in (norms, peak))
    partial = _add(norm)(norm.open(nearer / of_peak, each), axis=0)
    together = norm.close(partial, jnp.asarray(total, norms.dtype)) * peak[0]
    return jnp.where((together == jnp.inf) & jnp.all(norms < jnp.inf, axis=0), largest, together)
