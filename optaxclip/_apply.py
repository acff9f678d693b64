"""One update of the engine: measure, limit, respond, scale, report."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import _checks, _mesh
from optaxclip._base import Context, Groups, Limit, Norm, PyTree, Response, Stats, Table
from optaxclip._measure import Measured, measure, merge
from optaxclip._partition import Partition, matching
from optaxclip._scale import Factors, factors, scale
from optaxclip._split import AxisName, Split, axes_and_layout, axes_of, told

Nonfinite: TypeAlias = Literal["propagate", "zero"]


class Options(NamedTuple):
    """What the public functions are given besides a tree and a limit, checked."""

    groups: Groups
    norm: Norm
    response: Response
    eps: Any
    nonfinite: Nonfinite
    split: Split
    out_dtype: np.dtype | None = None


def checked(
    where: str,
    groups: Any,
    norm: Any,
    response: Any,
    eps: Any,
    nonfinite: Any,
    axis_name: AxisName = None,
    specs: PyTree = None,
    out_dtype: Any = None,
) -> Options:
    """The options, or an error that names the one at fault."""
    _checks.spec(where, Groups, groups=groups)
    _checks.spec(where, Norm, norm=norm)
    _checks.spec(where, Response, response=response)
    _checks.nonnegative(where, eps=eps)
    _checks.one_of(where, ("propagate", "zero"), nonfinite=nonfinite)
    (eps,) = _checks.real(eps)
    dtype = None if out_dtype is None else _checks.real_dtype(where, out_dtype=out_dtype)
    split = told(where, axis_name, specs, norm.shaped)
    return Options(groups, norm, response, eps, nonfinite, split, dtype)


class Applied(NamedTuple):
    """What came of an update.

    Attributes:
      leaves: the new leaves, in tree order.
      stats: the statistics of the rows.
      whole: the statistics of the whole update.
      rule: the limit's new state.
    """

    leaves: list[Any]
    stats: Stats
    whole: Stats
    rule: PyTree


class Decided(NamedTuple):
    """What is to become of the rows.

    Attributes:
      stats: their statistics.
      first: what to multiply each by first.
      then: what to multiply each by then.
      rule: the limit's new state.
    """

    stats: Stats
    first: jax.Array
    then: jax.Array
    rule: PyTree


def apply(
    rule: Limit, step: Any, rule_state: PyTree, part: Partition, params: PyTree, options: Options
) -> Applied:
    """Rescales a tree that has been taken apart; it must have at least one row."""
    found, context = looked_at(rule, step, part, params, options)
    stats, first, then, rule_state = decide(rule, rule_state, found, context, options)
    leaves = _scaled(part, first, then, found.norm, options)
    whole = whole_of(stats, context.table, options.norm)
    return Applied(leaves, reported(stats), reported(whole), rule_state)


def decide(rule: Limit, rule_state: PyTree, found: Measured, context: Context, options: Options) -> Decided:
    """What the limit and the response make of norms: all that an update and its replay have in common."""
    norm = found.norm
    limit, rule_state = rule.update(norm, rule_state, context)
    limit = jnp.maximum(
        _per_row(options.split.where, limit, context.table).astype(norm.dtype), _mesh.zeros_like(norm)
    )
    made = factors(found, limit, options.response, options.eps)
    finite = jnp.isfinite(norm)
    usable = finite & ~jnp.isnan(limit)
    bad = jnp.nan if options.nonfinite == "propagate" else 0.0
    then = jnp.where(usable, made.then, bad)
    after = _norm_after(found, made, context.table, options.norm)
    after = jnp.where(usable, jnp.minimum(after, float(jnp.finfo(norm.dtype).max)), bad)
    factor = jnp.where(usable, made.factor, bad)
    stats = Stats(norm, after, limit, factor, usable & (factor != 1), ~finite)
    return Decided(stats, made.first, then, rule_state)


def looked_at(
    rule: Limit, step: Any, part: Partition, params: PyTree, options: Options
) -> tuple[Measured, Context]:
    """What a limit is given: the norms of the rows, and all else that it may know."""
    table = table_of(part, options)
    found = measured(part, part.leaves, table, options)
    norm = found.norm
    total = merge(options.norm, jnp.where(jnp.isfinite(norm), norm, 0), table.sizes)
    of_params = None
    if rule.needs_params:
        matched = matching(part, params, options.groups.names, options.split.where)
        of_params = measured(part, matched, table, options).norm.astype(norm.dtype)
    return found, Context(step, table, options.norm, options.response, total, of_params)


def table_of(part: Partition, options: Options) -> Table:
    """The table of the rows; sizes count the entries on all devices that a leaf is split over."""
    splits = axes_of(part, part.leaves, options.split)
    if not any(splits):
        return part.table
    sizes = np.zeros(len(part.table.names))
    for k, place in part.measured.items():
        leaf = part.leaves[k]
        count = math.prod(leaf.shape[axis] for axis in place.axes)
        sizes[place.first : place.first + count] += leaf.size // count * _mesh.axis_size(splits[k])
    return part.table._replace(sizes=sizes)


def measured(part: Partition, leaves: Sequence[Any], table: Table, options: Options) -> Measured:
    """Measures the rows of a partition, on its own leaves or on others of the same shapes."""
    chosen = part.measured
    wide = any(jnp.finfo(jax.dtypes.canonicalize_dtype(part.leaves[k].dtype)).bits == 64 for k in chosen)
    splits, laid = axes_and_layout(part, leaves, options.split)
    return measure(
        [jnp.asarray(leaves[k]) for k in chosen],
        places=tuple(chosen.values()),
        splits=tuple(splits[k] for k in chosen),
        laid=tuple(laid[k] for k in chosen),
        sizes=tuple(table.sizes.tolist()),
        norm=options.norm,
        dtype=np.dtype(np.float64 if wide else np.float32),
    )


def _scaled(
    part: Partition, first: jax.Array, then: jax.Array, norm: jax.Array, options: Options
) -> list[Any]:
    chosen = {k: place for k, place in enumerate(part.places) if place is not None and place.scaled}
    old, places = [jnp.asarray(part.leaves[k]) for k in chosen], tuple(chosen.values())
    drop, dtype = options.nonfinite == "zero", options.out_dtype
    new = scale(old, first, then, norm[0], places=places, drop=drop, dtype=dtype)
    leaves = list(part.leaves)
    for k, leaf in zip(chosen, new, strict=True):
        leaves[k] = leaf
    return leaves


def _per_row(where: str, limit: jax.Array, table: Table) -> jax.Array:
    rows = len(table.names)
    if limit.size == 1:
        limit = limit.reshape(())
    elif limit.shape != (rows,):
        raise ValueError(
            f"{where}: the limit has shape {limit.shape} for {rows} rows of groups, "
            f"{_checks.listed(table.names)}. Pass one number, one per row, or limits.per_group."
        )
    return jnp.broadcast_to(limit, (rows,))


def _norm_after(found: Measured, made: Factors, table: Table, norm: Norm) -> jax.Array:
    if found.fixed is None or found.free is None:
        return made.after
    # What is counted and not scaled is still there afterwards.
    parts = jnp.stack([found.free * made.factor, found.fixed], axis=1)
    return jnp.where(made.factor == 1, found.norm, merge(norm, parts, table.sizes[:, None], table.sizes))


def whole_of(stats: Stats, table: Table, norm: Norm) -> Stats:
    """The statistics of the whole update, from those of its rows."""
    norms = jnp.stack([stats.norm, stats.norm_after, stats.limit])
    before, after, limit = merge(norm, norms, table.sizes)
    ratio = ratio_of(before, after)
    clipped, nonfinite = jnp.any(jnp.stack([stats.clipped, stats.nonfinite]), axis=1)
    return Stats(before, after, limit, ratio, clipped, nonfinite)


def ratio_of(before: jax.Array, after: jax.Array) -> jax.Array:
    """The factor of several rows together; beside a norm that is not finite all that is left is 0, or NaN."""
    some = (before > 0) & jnp.isfinite(before)
    return jnp.where(some, after / jnp.where(some, before, 1), jnp.where(before == 0, 1, 0 * after))


def single(x: jax.Array) -> jax.Array:
    """A norm as float32: at most its largest number unless infinite."""
    if x.dtype == jnp.float32:
        return x
    largest = float(jnp.finfo(jnp.float32).max)
    return jnp.where(jnp.isfinite(x), jnp.minimum(x, largest), x).astype(jnp.float32)


def reported(stats: Stats) -> Stats:
    """In the dtypes of the state: float32, at most its largest number unless infinite; int32 for counts."""
    return Stats(
        norm=single(stats.norm),
        norm_after=single(stats.norm_after),
        limit=single(stats.limit),
        factor=single(stats.factor),
        clipped=stats.clipped.astype(jnp.int32),
        nonfinite=stats.nonfinite.astype(jnp.int32),
    )
