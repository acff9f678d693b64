"""Partial results of leaves, right for entries from 1e-38 to 3e38, in one read of ordinary updates.

The entries of a leaf are multiplied by a power of two before they are squared. At the first reading the scale
is one at which neither ordinary nor zero entries call for a second; only if something overflows, or the whole
update is tiny, a loop reads it again at a scale chosen leaf by leaf.

The loop has three more uses. Nothing inside is fused with what surrounds it, so an optimizer behind the clip
does not read the gradients twice. A scale that comes out of it is a number unknown to the compiler, which
would otherwise write a broadcast constant, or a float32 copy of a 16-bit leaf, to memory. And under `vmap`
it reads ordinary updates once, where a conditional would compute both of its branches.
"""

import collections
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


class Block(NamedTuple):
    """Entries that are read together: a leaf, or several small leaves of equal size, one to a row.

    Attributes:
      array: the entries.
      reduced: the axes that the norm runs over.
      rows: the row of the groups that each index of the other axes belongs to, `(indices,)`.
    """

    array: jax.Array
    reduced: tuple[int, ...]
    rows: np.ndarray

    @property
    def kept(self) -> tuple[int, ...]:
        """The shape of the block's partial results."""
        return tuple(size for axis, size in enumerate(self.array.shape) if axis not in self.reduced)


def blocks(leaves: Sequence[jax.Array], firsts: Sequence[int], places: Sequence[Place]) -> list[Block]:
    """The leaves, small ones of equal size merged; `firsts` has the first row of each."""
    found, small = [], collections.defaultdict(list)
    for leaf, first, place in zip(leaves, firsts, places, strict=True):
        if not place.axes and leaf.size <= SMALL and not _mesh.has_mesh(leaf):
            small[leaf.size, leaf.dtype].append((leaf, first))
            continue
        count = math.prod(leaf.shape[axis] for axis in place.axes)
        reduced = tuple(axis for axis in range(leaf.ndim) if axis not in place.axes)
        found.append(Block(leaf, reduced, first + np.arange(count)))
    for alike in small.values():
        for start in range(0, len(alike), MERGED):
            some = alike[start : start + MERGED]
            merged = jnp.stack([leaf.reshape(-1) for leaf, _ in some])
            found.append(Block(merged, (1,), np.array([first for _, first in some])))
    return found


def at_scales(
    blocks: Sequence[Block], norm: Norm, scales: Sequence[jax.Array], dtype: np.dtype
) -> list[jax.Array]:
    """The partial results of blocks whose entries are multiplied by scales of the shapes `kept` first."""
    arrays, partials = [block.array for block in blocks], []
    for block, scale in zip(blocks, _replicated(scales, arrays), strict=True):
        entries = times(widen(block.array, dtype), jnp.expand_dims(scale, block.reduced))
        if norm.combine == "max" and _mesh.is_partitioned(block.array):
            entries = without_nan(entries)
        partials.append(norm.measure(entries, block.reduced))
    return _replicated(partials, arrays)


def at_levels(
    blocks: Sequence[Block], norm: Norm, levels: np.ndarray, dtype: np.dtype
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The partial results of each block and the scales they were measured at, each one of `levels`."""
    if norm.degree > 2:
        scales = [_scale_of_peak(block, levels, dtype) for block in blocks]
        return at_scales(blocks, norm, scales, dtype), scales
    return _by_trial(blocks, norm, levels, dtype)


def levels_of(norm: Norm, dtype: np.dtype) -> np.ndarray:
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
        exponents.append(max(exponents[-1] - int(top / norm.degree), 2 - top + headroom(norm)))
    return np.exp2(exponents).astype(dtype)


def headroom(norm: Norm) -> int:
    """The power of two by which norms are reduced, so that 2^20 partial results can be added up."""
    return math.ceil(20 / norm.degree)


def widen(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The array in a real dtype, or in the complex one of the same precision if it is complex."""
    paired = jnp.complex128 if jnp.finfo(dtype).bits == 64 else jnp.complex64
    return x.astype(paired if jnp.iscomplexobj(x) else dtype)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """The product with a real factor, part by part if the array is complex."""
    return lax.complex(x.real * factor, x.imag * factor) if jnp.iscomplexobj(x) else x * factor


def without_nan(x: jax.Array) -> jax.Array:
    """Infinity in place of NaN, which a maximum over devices would pass over. Both are not finite."""
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def _replicated(vectors: Sequence[jax.Array], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Partial results or scales of leaves that may be split over devices, whole on each of them."""
    return [_mesh.replicate(vector, x) for vector, x in zip(vectors, arrays, strict=True)]


def _by_trial(
    blocks: Sequence[Block], norm: Norm, levels: np.ndarray, dtype: np.dtype
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Measures at the second scale, and again at the others only where that did not do."""
    up, middle, *down = levels
    arrays = [block.array for block in blocks]
    tiny = np.exp2(-jnp.finfo(dtype).maxexp * 72 / 128).astype(dtype)
    first = [_mesh.vary_like(jnp.full(block.kept, middle), block.array) for block in blocks]

    def unfinished(carry):
        attempt, again, *_ = carry
        return (attempt == 0) | again

    def attempt(carry):
        count, _, scales, _ = carry
        # The scales differ from pass to pass: nothing of a leaf can be moved out of the loop.
        entries, scales = lax.optimization_barrier((arrays, scales))
        read = [block._replace(array=x) for block, x in zip(blocks, entries, strict=True)]
        partials = at_scales(read, norm, scales, dtype)
        everything = flat(partials)
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


def _scale_of_peak(block: Block, levels: np.ndarray, dtype: np.dtype) -> jax.Array:
    """The scale at which the largest entry is about 1, so that no power of it overflows."""
    x = block.array
    peak = _mesh.replicate(jnp.max(jnp.abs(widen(x, dtype)), axis=block.reduced))
    columns = levels.reshape((-1,) + (1,) * peak.ndim)
    return _mesh.replicate(jnp.max(jnp.where(peak[None] * columns <= 1, columns, levels[-1]), axis=0), x)


def flat(vectors: Sequence[jax.Array]) -> jax.Array:
    """All entries in one vector."""
    one = [vector.reshape(-1) for vector in vectors]
    return jnp.concatenate(one) if len(one) > 1 else one[0]
