"""Leaves, merged where they are small, and their partial results at a scale.

Before entries are squared they may be multiplied by a power of two, in the accumulation dtype, so that
neither large nor small ones leave its range.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import _mesh
from optaxclip._base import Norm
from optaxclip._mesh import Along
from optaxclip._partition import Place

SMALL = 4095  # entries; XLA on CPU has a fast reduction from about 4,096 up, and below it pays to merge
MERGED = 256  # leaves; compile time grows faster than linearly in what is concatenated at once


class Block(NamedTuple):
    """Entries that are read together: a leaf, or several small leaves of equal size, one to a row.

    Attributes:
      array: the entries.
      reduced: the axes that the norm runs over.
      rows: the row of the groups that each index of the other axes belongs to, `(indices,)`.
      split: the manual mesh axes that the entries are split over.
      laid: for each axis of the array, the automatic mesh axes that `specs` say it is split over; or empty.
      scale: what entries are multiplied by first, of the shape `()` or `kept`; None to read them as they are.
      weight: what partial results are multiplied by then, `(indices,)`; None for 1.
    """

    array: jax.Array
    reduced: tuple[int, ...]
    rows: np.ndarray
    split: tuple[str, ...] = ()
    laid: Along = ()
    scale: jax.Array | np.floating | None = None
    weight: np.ndarray | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The shape of the block's partial results."""
        return tuple(size for axis, size in enumerate(self.array.shape) if axis not in self.reduced)


def blocks_of(
    leaves: Sequence[jax.Array],
    firsts: Sequence[int],
    places: Sequence[Place],
    splits: Sequence[tuple[str, ...]],
    laid: Sequence[Along],
    shaped: bool,
) -> list[Block]:
    """The leaves, small ones of equal size merged unless `shaped`.

    Of each leaf `firsts` has the first row, `splits` the manual mesh axes that it is split over, and `laid`
    the automatic ones for each of its axes.
    """
    blocks = []
    for leaf, first, place, split, along in zip(leaves, firsts, places, splits, laid, strict=True):
        count = math.prod(leaf.shape[axis] for axis in place.axes)
        reduced = tuple(axis for axis in range(leaf.ndim) if axis not in place.axes)
        blocks.append(Block(leaf, reduced, first + np.arange(count), split, along))
    return merged(blocks, lambda block: not (shaped or _mesh.is_partitioned(block.array)))


def merged(blocks: Sequence[Block], may: Callable[[Block], bool]) -> list[Block]:
    """The blocks; small ones of one row and equal size, which `may` be, one to a row of an array."""
    together, small = [], collections.defaultdict(list)
    for block in blocks:
        x = block.array
        if block.kept or x.size > SMALL or not may(block):
            together.append(block)
        else:
            small[x.size, x.dtype, block.split, _mesh.varying_axes(x)].append(block)
    for alike in small.values():
        for start in range(0, len(alike), MERGED):
            some = alike[start : start + MERGED]
            x = _stacked([block.array for block in some])
            scale = None if some[0].scale is None else jnp.stack([block.scale for block in some])
            rows = np.concatenate([block.rows for block in some])
            together.append(Block(x, (1,), rows, some[0].split, scale=scale))
    return together


@jax.custom_jvp
def _stacked(arrays: list[jax.Array]) -> jax.Array:
    """Arrays of equal size and dtype, one to a row; by their bits if of 16, which XLA on CPU would widen."""
    dtype, rows = arrays[0].dtype, [x.reshape(-1) for x in arrays]
    if dtype.itemsize != 2:
        return lax.optimization_barrier(jnp.stack(rows))
    bits = jnp.stack([lax.bitcast_convert_type(x, jnp.uint16) for x in rows])
    # Behind a barrier, or all would be widened leaf by leaf.
    return lax.bitcast_convert_type(lax.optimization_barrier(bits), dtype)


@_stacked.defjvp
def _(primals, tangents):
    (arrays,), (changes,) = primals, tangents
    return _stacked(arrays), jnp.stack([x.reshape(-1) for x in changes])


def partials(blocks: Sequence[Block], norm: Norm, dtype: np.dtype) -> jax.Array:
    """The partial results of blocks, all in one vector."""
    plain = {
        k: _measured(widen(block.array, dtype), block, norm)
        for k, block in enumerate(blocks)
        if block.scale is None
    }
    scales = _unknown([block.scale for block in blocks], dtype, next(iter(plain.values()), None))
    found = []
    for k, (block, scale) in enumerate(zip(blocks, scales, strict=True)):
        value = plain[k] if k in plain else _scaled(block._replace(scale=scale), norm)
        found.append(value.reshape(-1) if block.weight is None else value.reshape(-1) * block.weight)
    return _flat(found)


def _unknown(scales: Sequence[Any], dtype: np.dtype, known: jax.Array | None) -> list[Any]:
    """The scales, constants as numbers of which XLA knows nothing, each a number of its own.

    It would write a constant out, as large as the block, and a number that blocks of the same shape share.

    Args:
      scales: the scales, None where entries are read as they are.
      dtype: what a constant becomes.
      known: a norm, never negative; None where there is none yet, and no constant among the scales.
    """
    constants = [k for k, scale in enumerate(scales) if isinstance(scale, np.floating)]
    if known is None or not constants:
        return list(scales)
    own = [jnp.where(known < 0, known, jnp.asarray(scales[k], dtype)) for k in constants]
    found = dict(zip(constants, lax.optimization_barrier(own), strict=True))
    return [found.get(k, scale) for k, scale in enumerate(scales)]


def _scaled(block: Block, norm: Norm) -> jax.Array:
    assert block.scale is not None
    scale = _mesh.replicate(jnp.asarray(block.scale), block.array)
    wide = jnp.expand_dims(scale, block.reduced) if scale.ndim else scale
    return _measured(times(widen(block.array, scale.dtype), wide), block, norm)


def peaks(blocks: Sequence[Block], dtype: np.dtype) -> jax.Array:
    """The largest moduli of what `partials` would measure, in the same order."""
    found = [jnp.max(jnp.abs(widen(block.array, dtype)), axis=block.reduced) for block in blocks]
    return _flat([_mesh.replicate(x, block.array) for x, block in zip(found, blocks, strict=True)])


def _measured(entries: jax.Array, block: Block, norm: Norm) -> jax.Array:
    if norm.combine == "max" and _mesh.is_partitioned(block.array):
        entries = without_nan(entries)
    return _mesh.replicate(norm.measure(entries, block.reduced), block.array)


def widen(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The array in a real dtype, or in the complex one of the same precision if it is complex."""
    paired = jnp.complex128 if jnp.finfo(dtype).bits == 64 else jnp.complex64
    return lax.convert_element_type(x, paired if jnp.iscomplexobj(x) else dtype)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """The product with a real factor, part by part if the array is complex."""
    return lax.complex(x.real * factor, x.imag * factor) if jnp.iscomplexobj(x) else x * factor


def modulus(x: jax.Array) -> jax.Array:
    """The moduli of entries, of finite ones at most the largest number."""
    size = jnp.abs(x)
    if not jnp.iscomplexobj(x):
        return size
    return jnp.where(jnp.isfinite(x), jnp.minimum(size, float(jnp.finfo(x.dtype).max)), size)


def unit(x: jax.Array) -> jax.Array:
    """The signs of real entries; the directions of complex ones, whose infinite parts alone count."""
    if not jnp.iscomplexobj(x):
        return jnp.sign(x)
    real, imag = (jnp.where(jnp.isinf(part), jnp.sign(part), part) for part in (x.real, x.imag))
    endless = jnp.isinf(x.real) | jnp.isinf(x.imag)
    real, imag = (
        jnp.where(endless & jnp.isfinite(part), 0, own) for part, own in ((x.real, real), (x.imag, imag))
    )
    # A quarter of the largest numbers, so that their modulus is one.
    scale = jnp.where(jnp.maximum(jnp.abs(real), jnp.abs(imag)) > 1, 0.25, 1).astype(real.dtype)
    scaled = jax.lax.complex(real * scale, imag * scale)
    size = jnp.abs(scaled)
    size = jnp.where(size > 0, size, 1)
    return jax.lax.complex(scaled.real / size, scaled.imag / size)


def without_nan(x: jax.Array) -> jax.Array:
    """Infinity in place of NaN, which a maximum over devices would pass over. Both are not finite."""
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def _flat(vectors: Sequence[jax.Array]) -> jax.Array:
    one = [vector.reshape(-1) for vector in vectors]
    return jnp.concatenate(one) if len(one) > 1 else one[0]
