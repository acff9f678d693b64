"""A transformation that changes nothing and remembers the norm of every group."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip import _checks, _mesh, groups as _groups, norms as _norms, responses as _responses
from optaxclip._apply import Options, checked, measured, single, table_of
from optaxclip._base import Groups, Norm, PyTree
from optaxclip._measure import across
from optaxclip._partition import Partition, matching, partition
from optaxclip._read import Block, blocks_of
from optaxclip._split import AxisName, axes_and_layout
from optaxclip._stretches import Stretches, blank, with_latest

# The histogram of the whole run: four bins for each doubling, from 2^-64 to 2^64. Centres of bins are at most
# 9.1 % away from all that falls into them.
BINS, PER_DOUBLING, LEAST = 512, 4, -64
MOST = np.iinfo(np.int32).max


class RecordState(NamedTuple):
    """The state of `record`. `History.from_state` reads it, and puts names to the rows.

    Attributes:
      step: how many updates there were, int32, `()`.
      norm: the last norms, float32 `(capacity, rows)`; update t is in row t modulo the capacity.
      loss: the last losses likewise, float32 `(capacity,)`; NaN where none was given.
      params: the last norms of the parameters, float32 `(capacity, rows)`, or `()` if not asked for: Orbax
        refuses to save an array without entries.
      start: the norms of what `init` was given, float32 `(rows,)`; NaN where that was no array.
      histogram: in how many updates the norm fell into each of the bins, int32 `(rows, 512)`: four bins for
        each doubling, from 2^-64 to 2^64; the outermost hold what is beyond. Norms of zero and those that are
        not finite are in none.
      largest: the largest finite norm of the run, float32 `(rows,)`.
      largest_step: the update it belongs to, int32 `(rows,)`; -1 before there is one.
      nonfinite: how often the norm was NaN or infinite, int32 `(rows,)`.
      entries: how many entries were NaN or infinite, all updates together, int32 `(rows,)`; at most 2^31 - 1,
        and rounded to float32 above 2^24.
      first: the first update in which each row was not finite, int32 `(rows,)`; -1 if none was.
      first_entries: how many entries were not finite in the first update in which any was, int32 `(rows,)`.
      stretches: the whole run, thinned.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.record(capacity=4)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for size in (1.0, jnp.inf):
    ...     updates, state = tx.update({"w": jnp.array([3.0, 4.0]) * size}, state)
    >>> print(state.norm.ravel(), state.largest, state.nonfinite)
    [ 5. inf  0.  0.] [5.] [1]
    """

    step: jax.Array
    norm: jax.Array
    loss: jax.Array
    params: jax.Array | tuple[()]
    start: jax.Array
    histogram: jax.Array
    largest: jax.Array
    largest_step: jax.Array
    nonfinite: jax.Array
    entries: jax.Array
    first: jax.Array
    first_entries: jax.Array
    stretches: Stretches


def record(
    groups: Groups = _groups.leaf(),
    norm: Norm = _norms.l2(),
    capacity: int = 1024,
    *,
    stretches: int = 256,
    params: bool = False,
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """Passes updates through as they are, and remembers the norms of their groups.

    Put it before clipping, first in the chain, to record gradients; `History.from_state` reads the
    recording, replays other policies on it and advises. Kept are the last `capacity` norms of each group, and
    of the whole run a histogram, the largest norm and its update, what was not finite, and the maximum beside
    the median of each stretch. If the training step passes its loss on, `update(..., value=loss)`, that too.

    The state has a fixed size, about 8 kB a group with the defaults. An update reads the gradients once; one
    that holds a NaN or an infinity reads them again, to count the entries.

    Args:
      groups: which entries share a norm, one of `optaxclip.groups`. From leaves all coarser groupings can be
        had afterwards.
      norm: how a group is measured, one of `optaxclip.norms`. Angles and policies of whole updates can be
        had of `l2` and `rms`.
      capacity: how many of the last updates to keep.
      stretches: how many stretches to divide the whole run into, at most; an even number.
      params: whether to keep the norms of the parameters too, for limits relative to them. That reads the
        parameters once at each update.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`. With them `start` is NaN,
        since `init` may be called outside.
      specs: how leaves are split over them, where JAX keeps no track of it; see there.

    Returns:
      A transformation with a `RecordState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is too small or `stretches` odd; in `update`, if the tree has another number of
        rows than `init` saw, `value` is no scalar, or parameters are wanted and not passed.

    >>> import jax.numpy as jnp, optax, optaxclip as oc
    >>> tx = optax.chain(oc.record(), optax.sgd(0.1))
    >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
    >>> state = tx.init(params)
    >>> for size in (1.0, 2.0):
    ...     grads = {"w": jnp.array([3.0, 4.0]) * size, "b": jnp.array([size])}
    ...     updates, state = tx.update(grads, state, params, value=size)
    >>> history = oc.History.from_state(state, params)
    >>> print(history.names, history.norms.tolist(), history.loss)
    ('b', 'w') [[1.0, 5.0], [2.0, 10.0]] [1. 2.]
    """
    where = "record"
    options = checked(where, groups, norm, _responses.clip(), 0.0, "propagate", axis_name, specs)
    _checks.whole_number(where, least=1, capacity=capacity)
    _checks.whole_number(where, least=2, stretches=stretches)
    if stretches % 2:
        raise ValueError(f"{where}: stretches is {stretches}, which is odd. Pass an even number.")

    kept = capacity if params else 0

    def init(params: PyTree) -> RecordState:
        return _start(partition(groups, params), options, capacity, stretches, kept)

    def update(updates: PyTree, state: Any, params: PyTree = None, *, value: Any = None, **extra_args: Any):
        del extra_args
        _checks.state(where, state, RecordState)
        part = partition(groups, updates)
        _checks.same_rows(where, part.table.names, state.start.shape)
        if part.table.names:
            state = _recorded(state, part, options, params, _loss(value))
        return updates, state._replace(step=jnp.asarray(optax.safe_increment(state.step)))

    return optax.GradientTransformationExtraArgs(init, update)


def _start(part: Partition, options: Options, capacity: int, stretches: int, kept: int) -> RecordState:
    """The state before the first update; each array in a buffer of its own, so that all can be donated."""
    rows = len(part.table.names)
    arrays = rows and not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in part.leaves)
    arrays = arrays and not options.split.manual(part.leaves)
    found = single(measured(part, part.leaves, part.table, options).norm) if arrays else None

    def none(*shape: int) -> jax.Array:
        return jnp.full(shape, jnp.nan, jnp.float32)

    def counts(*shape: int, value: int = 0) -> jax.Array:
        return jnp.full(shape, value, jnp.int32)

    return RecordState(
        step=counts(),
        norm=jnp.zeros((capacity, rows), jnp.float32),
        loss=none(capacity),
        params=jnp.zeros((kept, rows), jnp.float32) if kept else (),
        start=none(rows) if found is None else found,
        histogram=counts(rows, BINS),
        largest=jnp.zeros((rows,), jnp.float32),
        largest_step=counts(rows, value=-1),
        nonfinite=counts(rows),
        entries=counts(rows),
        first=counts(rows, value=-1),
        first_entries=counts(rows),
        stretches=blank(stretches, rows + 1),
    )


def _loss(value: Any) -> jax.Array:
    loss = jnp.asarray(jnp.nan if value is None else value)
    if loss.shape != ():
        raise ValueError(f"record: value has shape {loss.shape}. Pass the loss of the update, a scalar.")
    return loss.astype(jnp.float32)


def _recorded(
    state: RecordState, part: Partition, options: Options, params: PyTree, loss: jax.Array
) -> RecordState:
    """The state after an update, but for its step."""
    table = table_of(part, options)
    norm = single(measured(part, part.leaves, table, options).norm)
    if not isinstance(state.params, tuple):
        matched = matching(part, params, options.groups.names, "record")
        of_params = single(measured(part, matched, table, options).norm)
        state = state._replace(params=_put(state.params, of_params, state.step))
    finite = jnp.isfinite(norm)
    larger = finite & ((norm > state.largest) | (state.largest_step < 0))
    bad = _entries(part, options, ~finite)
    met = jnp.any(state.first >= 0)
    state = state._replace(
        norm=_put(state.norm, norm, state.step),
        loss=_put(state.loss, _mesh.replicate(loss, norm), state.step),
        histogram=_counted(state.histogram, norm),
        largest=jnp.where(larger, norm, state.largest),
        largest_step=jnp.where(larger, state.step, state.largest_step),
        nonfinite=state.nonfinite + (~finite).astype(jnp.int32),
        # Counts stop at the largest number.
        entries=state.entries + jnp.minimum(bad, MOST - state.entries),
        first=jnp.where(~finite & (state.first < 0), state.step, state.first),
        first_entries=jnp.where(met, state.first_entries, bad),
    )
    latest = jnp.concatenate([norm, loss[None]])
    rings = state.norm, state.loss[:, None]
    return state._replace(stretches=with_latest(state.stretches, latest, rings, state.step))


def _put(ring: jax.Array, value: jax.Array, step: jax.Array) -> jax.Array:
    value = value.astype(ring.dtype)
    # Where the mesh is explicit, only one of them may know it: the ring from `init` does not.
    ring, value = (_mesh.vary_like(x, (ring, value)) for x in (ring, value))
    return lax.dynamic_update_index_in_dim(ring, value, jnp.remainder(step, len(ring)), 0)


def _counted(histogram: jax.Array, norm: jax.Array) -> jax.Array:
    known = jnp.isfinite(norm) & (norm > 0)
    place = jnp.floor((jnp.log2(jnp.where(known, norm, 1)) - LEAST) * PER_DOUBLING).astype(jnp.int32)
    place = jnp.where(known, jnp.clip(place, 0, BINS - 1), -1)
    return histogram + (np.arange(BINS, dtype=np.int32)[None] == place[:, None]).astype(jnp.int32)


def _entries(part: Partition, options: Options, bad: jax.Array) -> jax.Array:
    """How many entries of each row are NaN or infinite, int32; nothing is read where none is.

    Leaves and devices are added up in float32, which has no end that a count could wrap at.
    """
    chosen = part.measured
    arrays, places = [jnp.asarray(part.leaves[k]) for k in chosen], list(chosen.values())
    # Small leaves are merged: every array that a loop is handed takes time, whether it is read or not.
    splits, laid = axes_and_layout(part, part.leaves, options.split)
    splits, laid = [splits[k] for k in chosen], [laid[k] for k in chosen]
    firsts = [place.first for place in places]
    blocks = blocks_of(arrays, firsts, places, splits, laid, options.norm.shaped)

    def count(alike: Sequence[Block]) -> jax.Array:
        return jnp.concatenate([_not_finite(block).reshape(-1).astype(jnp.float32) for block in alike])

    def once(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        wanted, none = carry
        # What depends on the carry cannot be moved out of the loop.
        passed, _ = _mesh.barrier([block.array for block in blocks], wanted)
        own = [block._replace(array=x) for block, x in zip(blocks, passed, strict=True)]
        return ~wanted, none + across(own, count, len(bad), "sum")

    none = _mesh.vary_like(jnp.zeros(bad.shape, jnp.float32), arrays, splits)
    wanted = _mesh.vary_like(jnp.any(bad), arrays, splits)
    # A loop of one pass or none, since of a conditional both branches are run under vmap.
    found = lax.while_loop(lambda carry: carry[0], once, (wanted, none))[1]
    return jnp.where(found < 2.0**31, jnp.minimum(found, 2.0**31 - 2.0**7).astype(jnp.int32), MOST)


def _not_finite(block: Block) -> jax.Array:
    """How many entries are not finite, of the block's kept shape."""
    x = block.array
    bad = _flags(x.real) | _flags(x.imag) if jnp.iscomplexobj(x) else _flags(x)
    if _mesh.has_mesh(x):
        return _mesh.replicate(jnp.sum(bad, axis=block.reduced, dtype=bad.dtype), x)

    def both(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]):
        return one[0] + other[0], one[1] | other[1]

    # XLA on CPU would write out what a sum alone is of, and takes two things together as they come.
    none = np.int32(0)
    count, some = lax.reduce((bad, bad), (none, none), both, block.reduced)
    return jnp.where(some < 0, some, count)  # never so, which XLA does not know: both are needed


def _flags(x: jax.Array) -> jax.Array:
    """1 where a real entry is not finite, else 0; by its bits, since XLA on CPU would widen those of 16."""
    kind = jnp.finfo(x.dtype)
    if kind.bits < 16:  # not all of them have infinities
        return (~jnp.isfinite(x)).astype(jnp.int32)
    uint = jnp.dtype(f"uint{kind.bits}").type
    exponent = lax.bitcast_convert_type(x, uint) & uint((2**kind.nexp - 1) << kind.nmant)
    return ((exponent + uint(1 << kind.nmant)) >> uint(kind.bits - 1)).astype(jnp.int32)
