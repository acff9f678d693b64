"""A run of any length in fixed memory: the maximum beside the median of each of its stretches."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import _mesh

SHORTEST = 32  # updates in the first stretches; finding a median takes sorting, which must not happen often


class Stretches(NamedTuple):
    """The whole run in fixed memory, in stretches of equal length.

    The last column is the loss. Where all stretches are full, each two become one, twice as long: of their
    maxima the larger, of their medians the mean, which lies between the two as the true one does.

    Attributes:
      length: updates in a stretch, int32, `()`.
      filled: how many stretches there are, int32, `()`.
      median: the median of the finite norms of each, float32 `(stretches, rows + 1)`; NaN if there was none.
        Of stretches longer than the recording's capacity, the median of their last norms.
      largest: the largest norm of each, float32 `(stretches, rows + 1)`; infinite where one was not finite.
      running: the largest norms so far of the next one, float32 `(rows + 1,)`.
    """

    length: jax.Array
    filled: jax.Array
    median: jax.Array
    largest: jax.Array
    running: jax.Array


def blank(slots: int, columns: int) -> Stretches:
    """No stretches yet, and room for `slots`."""
    return Stretches(
        length=jnp.full((), SHORTEST, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
        median=jnp.full((slots, columns), jnp.nan, jnp.float32),
        largest=jnp.full((slots, columns), jnp.nan, jnp.float32),
        running=jnp.full((columns,), -jnp.inf, jnp.float32),
    )


def with_latest(
    stretches: Stretches, latest: jax.Array, rings: tuple[jax.Array, ...], step: jax.Array
) -> Stretches:
    """The stretches after an update.

    Args:
      stretches: those before it.
      latest: its values, `(columns,)`.
      rings: the last values, its own among them; one array `(capacity, ...)` or several to be joined.
      step: its number.
    """
    latest = jnp.where(jnp.isfinite(latest), latest, jnp.inf)
    kept = stretches._replace(running=jnp.maximum(stretches.running, latest))
    # Both outcomes of the choice must vary over the same axes of a mesh.
    rings, kept = jax.tree.map(lambda x: _mesh.vary_like(x, (latest,)), (rings, kept))
    complete = jnp.remainder(step + 1, kept.length) == 0

    def finish(kept: Stretches) -> Stretches:
        return _finished(kept, _median(rings, step, kept.length))

    return lax.cond(complete, finish, lambda kept: kept, kept)


def _median(rings: Sequence[jax.Array], step: jax.Array, length: jax.Array) -> jax.Array:
    """The median of the finite ones of the last `length` values of rings `(capacity, columns)`."""
    capacity = len(rings[0])
    # Sorting is what costs: no more than the last values are sorted while stretches are short.
    sizes = [size for size in (SHORTEST, 8 * SHORTEST) if size < capacity] + [capacity]

    def of_last(size: int) -> jax.Array:
        age = np.arange(size, dtype=np.int32)
        slots = jnp.remainder(step - age, capacity)
        last = jnp.concatenate([ring[slots] for ring in rings], axis=1)
        return _middle(last, jnp.isfinite(last) & (age < length)[:, None])

    enough = sum((length > size).astype(jnp.int32) for size in sizes[:-1])
    return lax.switch(enough, [functools.partial(of_last, size) for size in sizes])


def _middle(values: jax.Array, known: jax.Array) -> jax.Array:
    """The medians of those values that are known: `(values, columns)` to `(columns,)`; NaN where none is."""
    count = jnp.sum(known, axis=0, dtype=jnp.int32)
    ordered = jnp.sort(jnp.where(known, values, jnp.inf), axis=0)

    def at(rank: jax.Array) -> jax.Array:
        return jnp.take_along_axis(ordered, jnp.maximum(rank, 0)[None], axis=0)[0]

    low, high = at((count - 1) // 2), at(count // 2)
    return jnp.where(count > 0, low / 2 + high / 2, jnp.nan)


def _finished(kept: Stretches, median: jax.Array) -> Stretches:
    """The stretches with one more; if that fills them, each two are made one."""
    medians = lax.dynamic_update_index_in_dim(kept.median, median, kept.filled, 0)
    largest = lax.dynamic_update_index_in_dim(kept.largest, kept.running, kept.filled, 0)
    slots = len(medians)
    full = kept.filled + 1 == slots
    first, second = medians[0::2], medians[1::2]
    between = jnp.where(jnp.isnan(first), second, jnp.where(jnp.isnan(second), first, first / 2 + second / 2))
    free = jnp.full_like(between, jnp.nan)
    return Stretches(
        length=jnp.where(full, 2 * kept.length, kept.length),
        filled=jnp.where(full, slots // 2, kept.filled + 1),
        median=jnp.where(full, jnp.concatenate([between, free]), medians),
        largest=jnp.where(full, jnp.concatenate([jnp.maximum(largest[0::2], largest[1::2]), free]), largest),
        running=jnp.full_like(kept.running, -jnp.inf),
    )
