"""Norms of groups, right for finite entries from 1e-38 to 3e38, in one read of ordinary updates.

The entries of a leaf are multiplied by a power of two before they are squared. At the first reading the scale
is one at which neither ordinary nor zero entries call for a second; only if something overflows, or the whole
update is tiny, a loop reads it again at a scale chosen leaf by leaf. The partial results of each scale are
summed apart, across leaves and then devices, and put together at the end, on vectors of one entry per group.

The loop has three more uses. Nothing inside is fused with what surrounds it, so an optimizer behind the clip
does not read the gradients twice. A scale that comes out of it is a number unknown to the compiler, which
would otherwise write a broadcast constant, or a float32 copy of a 16-bit leaf, to memory. And under `vmap`
it reads ordinary updates once, where a conditional would compute both of its branches.
"""

import collections
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import _mesh
from optaxclip._base import Norm
from optaxclip._partition import Place

SMALL = 4095  # entries; XLA on CPU has a fast reduction from about 4,096 up, and below it pays to merge
MERGED = 256  # leaves; compile time grows faster than linearly in what is concatenated at once
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


class _Block(NamedTuple):
    """Entries that are read together: a leaf, or several small leaves of equal size, one to a row."""

    array: jax.Array
    reduced: tuple[int, ...]
    rows: np.ndarray


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
    blocks = _blocks(leaves, [place.first + rows * (not place.scaled) for place in places], places)
    bins, levels = _bins(blocks, norm, rows * (1 + fixed), axis_name, dtype)
    count = jnp.asarray(sizes, dtype)
    if not fixed:
        return Measured(*_close(bins, levels, norm, count), None, None)
    free, apart = bins[:, :rows], bins[:, rows:]
    together = _add(norm)(jnp.stack([free, apart]), axis=0)
    return Measured(
        *_close(together, levels, norm, count),
        _close(apart, levels, norm, count)[0],
        _close(free, levels, norm, count)[0],
    )


def _blocks(leaves: Sequence[jax.Array], firsts: Sequence[int], places: Sequence[Place]) -> list[_Block]:
    blocks, small = [], collections.defaultdict(list)
    for leaf, first, place in zip(leaves, firsts, places, strict=True):
        if not place.axes and leaf.size <= SMALL and not _mesh.has_mesh(leaf):
            small[leaf.size, leaf.dtype].append((leaf, first))
            continue
        count = math.prod(leaf.shape[axis] for axis in place.axes)
        reduced = tuple(axis for axis in range(leaf.ndim) if axis not in place.axes)
        blocks.append(_Block(leaf, reduced, first + np.arange(count)))
    for alike in small.values():
        for start in range(0, len(alike), MERGED):
            some = alike[start : start + MERGED]
            merged = jnp.stack([leaf.reshape(-1) for leaf, _ in some])
            blocks.append(_Block(merged, (1,), np.array([first for _, first in some])))
    return blocks


def _bins(
    blocks: Sequence[_Block], norm: Norm, rows: int, axis_name: tuple[str, ...], dtype: np.dtype
) -> tuple[jax.Array, np.ndarray]:
    """Partial results by scale and row, `(levels, rows)`, summed over leaves and devices; and the scales."""
    by_axes = collections.defaultdict(list)
    for block in blocks:
        by_axes[_mesh.varying_axes(block.array)].append(block)
    reduce = lax.psum if norm.combine == "sum" else lax.pmax
    parts, levels = [], _levels(norm, dtype)
    for alike in by_axes.values():
        partials, scales = _partials(alike, norm, levels, dtype)
        values, scale = _flat(partials), _flat(scales)
        room = levels.dtype.type(2.0 ** (-_headroom(norm) * norm.degree))
        apart = jnp.where(scale[None] == levels[:, None], values[None] * room, 0)
        part = _segments(apart, np.concatenate([block.rows for block in alike]), rows, norm)
        part = _without_nan(part) if norm.combine == "max" else part
        split = _mesh.split_axes(alike[0].array, axis_name)
        if split:
            part = reduce(part, tuple(sorted(split)))
        parts.append(part)
    return parts[0] if len(parts) == 1 else _add(norm)(jnp.stack(parts), axis=0), levels


def _flat(vectors: Sequence[jax.Array]) -> jax.Array:
    flat = [vector.reshape(-1) for vector in vectors]
    return jnp.concatenate(flat) if len(flat) > 1 else flat[0]


def _add(norm: Norm):
    return jnp.sum if norm.combine == "sum" else jnp.max


def _segments(values: jax.Array, index: np.ndarray, rows: int, norm: Norm) -> jax.Array:
    """Sums (or takes the maximum of) the columns that belong to each row: `(levels, n) -> (levels, rows)`.

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


def _partials(
    blocks: Sequence[_Block], norm: Norm, levels: np.ndarray, dtype: np.dtype
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The partial results of each block and the scales they were measured at, each one of `levels`."""
    arrays = [block.array for block in blocks]
    reduced = [block.reduced for block in blocks]

    def at_scales(arrays, scales):
        partials = []
        for x, scale, axes in zip(arrays, _replicated(scales, arrays), reduced, strict=True):
            entries = times(widen(x, dtype), jnp.expand_dims(scale, axes))
            if norm.combine == "max" and _mesh.is_partitioned(x):
                entries = _without_nan(entries)
            partials.append(norm.measure(entries, axes))
        return _replicated(partials, arrays)

    @jax.custom_jvp
    def measured(arrays):
        if norm.degree > 2:
            scales = [_scale_of_peak(x, axes, levels, dtype) for x, axes in zip(arrays, reduced, strict=True)]
            return at_scales(arrays, scales), scales
        return _by_trial(arrays, reduced, levels, dtype, at_scales)

    @measured.defjvp
    def _(primals, tangents):
        partials, scales = measured(*primals)
        fixed = lax.stop_gradient(scales)
        _, change = jax.jvp(lambda arrays: at_scales(arrays, fixed), primals, tangents)
        return (partials, scales), (change, [jnp.zeros_like(scale) for scale in scales])

    return measured(arrays)


def _levels(norm: Norm, dtype: np.dtype) -> np.ndarray:
    """The powers of two that entries may be multiplied by, from the largest down."""
    top = int(jnp.finfo(dtype).maxexp)
    if norm.degree > 2:
        step = max(1, int(top / 2 / norm.degree))
        return np.exp2(np.arange(top - 2, 2 - top, -step)).astype(dtype)
    # Ordinary entries are far from both ends of the range at the second scale, and so are their powers. What
    # overflows at one scale is about 1 at the next, so that many small entries do not vanish there.
    exponents = [top - 2, int(top / 2 / norm.degree)]
    enough = (top - 34) / norm.degree - top  # for 2^34 entries, all of them the largest number
    while exponents[-1] > enough:
        exponents.append(max(exponents[-1] - int(top / norm.degree), 2 - top + _headroom(norm)))
    return np.exp2(exponents).astype(dtype)


def _headroom(norm: Norm) -> int:
    """The power of two by which norms are reduced, so that 2^20 partial results can be added up."""
    return math.ceil(20 / norm.degree)


def widen(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The array in a real dtype, or in the complex one of the same precision if it is complex."""
    paired = jnp.complex128 if jnp.finfo(dtype).bits == 64 else jnp.complex64
    return x.astype(paired if jnp.iscomplexobj(x) else dtype)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """The product with a real factor, part by part if the array is complex."""
    return lax.complex(x.real * factor, x.imag * factor) if jnp.iscomplexobj(x) else x * factor


def _without_nan(x: jax.Array) -> jax.Array:
    """Infinity in place of NaN, which a maximum over devices would pass over. Both are not finite."""
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def _replicated(vectors: Sequence[jax.Array], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Partial results or scales of leaves that may be split over devices, whole on each of them."""
    return [_mesh.replicate(vector, x) for vector, x in zip(vectors, arrays, strict=True)]


def _by_trial(arrays, reduced, levels, dtype, at_scales):
    """Measures at the second scale, and again at the others only where that did not do."""
    up, middle, *down = levels
    tiny = np.exp2(-jnp.finfo(dtype).maxexp * 72 / 128).astype(dtype)
    first = [
        _mesh.vary_like(jnp.full(_kept(x, axes), middle), x) for x, axes in zip(arrays, reduced, strict=True)
    ]

    def unfinished(carry):
        attempt, again, *_ = carry
        return (attempt == 0) | again

    def attempt(carry):
        count, _, scales, _ = carry
        # The scales differ from pass to pass: nothing of a leaf can be moved out of the loop.
        entries, scales = lax.optimization_barrier((arrays, scales))
        partials = at_scales(entries, scales)
        everything = _flat(partials)
        too_small = (count == 0) & jnp.all(everything < tiny)
        too_large = (count < len(down)) & jnp.any(everything == jnp.inf)
        below = _mesh.vary_like(jnp.asarray(down[-1]), arrays[0])
        for k, level in enumerate(down[:-1]):
            below = jnp.where(count == k, level, below)
        # Those that overflow at this pass did at all before it.
        scales = [
            jnp.where(too_large & (p == jnp.inf), below, jnp.where(too_small, up, scale))
            for p, scale in zip(partials, scales, strict=True)
        ]
        return count + 1, too_small | too_large, _replicated(scales, arrays), partials

    start = *(_mesh.vary_like(x, arrays[0]) for x in (jnp.int32(0), jnp.array(False))), first, first
    _, _, scales, partials = lax.while_loop(unfinished, attempt, start)
    return _replicated(partials, arrays), _replicated(scales, arrays)


def _scale_of_peak(x, axes, levels, dtype):
    """The scale at which the largest entry is about 1, so that no power of it overflows."""
    peak = _mesh.replicate(jnp.max(jnp.abs(widen(x, dtype)), axis=axes))
    columns = levels.reshape((-1,) + (1,) * peak.ndim)
    return _mesh.replicate(jnp.max(jnp.where(peak[None] * columns <= 1, columns, levels[-1]), axis=0), x)


def _kept(x: jax.Array, reduced: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(x.shape) if axis not in reduced)


def _close(bins: jax.Array, levels: np.ndarray, norm: Norm, count: jax.Array) -> tuple[jax.Array, jax.Array]:
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
    scale = scale * scale.dtype.type(2.0 ** -_headroom(norm))
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
    nearer = jnp.where(peak > 1, 2.0**-4, 2.0**4).astype(norms.dtype)
    partial = _add(norm)(norm.open(norms * nearer / (peak * nearer), each), axis=0)
    together = norm.close(partial, jnp.asarray(total, norms.dtype)) * peak[0]
    return jnp.where((together == jnp.inf) & jnp.all(norms < jnp.inf, axis=0), largest, together)
