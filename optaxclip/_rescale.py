"""The engine: measure each group, hold it against its limit, multiply it by what the response says."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _checks, _mesh, groups as _groups, norms as _norms, responses as _responses
from optaxclip._base import Context, Groups, Norm, PyTree, Response, Stats, Table
from optaxclip._measure import Measured, measure, merge
from optaxclip._partition import Partition, Place, matching, partition
from optaxclip._scale import Factors, factors, scale
from optaxclip.limits import LimitLike, as_limit

Nonfinite = Literal["propagate", "zero"]
AxisName = str | Sequence[str] | None


class RescaleState(NamedTuple):
    """The state of `rescale_by_norm`, and what it did at the last update.

    Vectors have one entry per row of the groups, in natural order of the groups' names; `metrics` puts
    names to them. Before the first update the norms, limits and counts are 0 and the factors 1.

    Attributes:
      step: how many updates there were, int32, `()`.
      rule: the limit's own state.
      norm: the norms that came in, float32. At most the largest float32 unless entries are not finite.
      norm_after: the norms that went out, float32.
      limit: the limits they were held against, float32.
      factor: what the groups were multiplied by, float32; NaN where a NaN or an infinity was propagated.
      clipped: how often the factor was not 1, int32; steps with a norm that is not finite do not count.
      nonfinite: how often the norm was NaN or infinite, int32.
      whole: the same for the whole update, scalars: the norm of all groups together, the norm that their
        limits add up to, the ratio of the norms, and in how many steps any group was clipped or not finite.
    """

    step: jax.Array
    rule: PyTree
    norm: jax.Array
    norm_after: jax.Array
    limit: jax.Array
    factor: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
    whole: Stats


def _blank(shape: tuple[int, ...]) -> Stats:
    """Statistics before the first update; each in a buffer of its own, so that all can be donated."""
    norms = [jnp.zeros(shape, jnp.float32) for _ in range(3)]
    counts = [jnp.zeros(shape, jnp.int32) for _ in range(2)]
    return Stats(*norms, jnp.ones(shape, jnp.float32), *counts)


class _Options(NamedTuple):
    groups: Groups
    norm: Norm
    response: Response
    eps: Any
    nonfinite: Nonfinite
    axis_name: tuple[str, ...]


def _options(where: str, groups, norm, response, eps, nonfinite, axis_name) -> _Options:
    _checks.spec(where, Groups, groups=groups)
    _checks.spec(where, Norm, norm=norm)
    _checks.spec(where, Response, response=response)
    _checks.nonnegative(where, eps=eps)
    _checks.one_of(where, ("propagate", "zero"), nonfinite=nonfinite)
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    return _Options(groups, norm, response, eps, nonfinite, names)


def rescale_by_norm(
    limit: LimitLike,
    *,
    groups: Groups = _groups.whole(),
    norm: Norm = _norms.l2(),
    response: Response = _responses.clip(),
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Splits an update into groups, measures each, and multiplies it by what the response says.

    Norms are accumulated in float32 (float64 if any leaf is), whatever the dtype of the leaves; the dtypes
    that come out are those that came in. Groups whose factor is 1 come out bit-identical. `docs/numerics.md`
    has the table of what happens at 0, infinity and NaN.

    Args:
      limit: how large a norm may be: a number, an array, a schedule of the step, or one of
        `optaxclip.limits`; not negative.
      groups: which entries share a norm, one of `optaxclip.groups`.
      norm: how a group is measured, one of `optaxclip.norms`.
      response: what a group is multiplied by, one of `optaxclip.responses`.
      eps: added to the norms before the response sees them. 1e-6 gives PyTorch's numbers.
      nonfinite: what becomes of a group with a NaN or infinite entry: `"propagate"` makes all of it NaN, so
        that it cannot be overlooked; `"zero"` makes zeros of it. Other groups are untouched either way.
      axis_name: inside `shard_map` or `pmap`, the mesh axes that leaves are split over. Under `jit` alone
        nothing is needed. Where JAX tracks which axes a leaf varies over, each leaf is summed over exactly
        those; where it does not (`pmap`, `check_vma=False`), every leaf is summed over all of them.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is negative or NaN, a choice is unknown, `init` finds the groups inconsistent,
        or `update` gets another tree than `init` or lacks parameters that the limit needs.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.rescale_by_norm(1.0, groups=oc.groups.leaf())
    >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["a"], updates["b"], state.norm, state.factor)
    [0.6 0.8] [0.5] [5.  0.5] [0.2 1. ]
    """
    where = "rescale_by_norm"
    rule = as_limit(limit, where)
    options = _options(where, groups, norm, response, eps, nonfinite, axis_name)

    def init(params: PyTree) -> RescaleState:
        table = partition(groups, params).table
        return RescaleState(
            step=jnp.zeros((), jnp.int32),
            rule=rule.init(table),
            whole=_blank(()),
            **_blank((len(table.names),))._asdict(),
        )

    def update(updates: PyTree, state: RescaleState, params: PyTree = None, **extra_args: Any):
        del extra_args
        part = partition(groups, updates)
        rows = len(part.table.names)
        if state.norm.shape != (rows,):
            raise ValueError(
                f"{where}: the tree has {rows} rows of groups, {_checks.listed(part.table.names)}; `init` saw "
                f"{len(state.norm)}. Pass updates with the structure that `init` was given."
            )
        step = optax.safe_increment(state.step)
        if not rows:
            return updates, state._replace(step=step)
        leaves, stats, whole, new_rule = _apply(rule, state.step, state.rule, part, params, options)
        # The state keeps its dtypes, whatever a limit computes in.
        new_rule = jax.tree.map(lambda new, old: new.astype(old.dtype), new_rule, state.rule)
        counts = {
            "clipped": state.clipped + stats.clipped,
            "nonfinite": state.nonfinite + stats.nonfinite,
        }
        whole = whole._replace(
            clipped=state.whole.clipped + whole.clipped, nonfinite=state.whole.nonfinite + whole.nonfinite
        )
        fields = stats._replace(**counts)._asdict()
        new = RescaleState(step=step, rule=new_rule, whole=whole, **fields)
        return jax.tree.unflatten(part.treedef, leaves), new

    return optax.GradientTransformationExtraArgs(init, update)


def rescale_tree(
    tree: PyTree,
    limit: LimitLike,
    *,
    groups: Groups = _groups.whole(),
    norm: Norm = _norms.l2(),
    response: Response = _responses.clip(),
    params: PyTree = None,
    step: jax.typing.ArrayLike = 0,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
) -> tuple[PyTree, Stats]:
    """Rescales a tree once, without state: the core of `rescale_by_norm`, also under `vmap`.

    Args:
      tree: the tree to rescale.
      limit: as in `rescale_by_norm`, but nothing that remembers earlier norms.
      groups: as in `rescale_by_norm`.
      norm: likewise.
      response: likewise.
      params: the parameters that a relative limit is relative to.
      step: the step that a schedule is asked for.
      eps: as in `rescale_by_norm`.
      nonfinite: likewise.
      axis_name: likewise.

    Returns:
      The tree, and the `Stats` of its groups: float32 vectors with one entry per row, in the order of
      `group_norms`; `clipped` and `nonfinite` are 0 or 1.

    Raises:
      TypeError: if an argument is of the wrong type, or the limit has state.
      ValueError: as in `rescale_by_norm`.

    Per-example clipping is a `vmap` of it:

    >>> import jax, jax.numpy as jnp, optaxclip as oc
    >>> per_example = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
    >>> clipped, stats = jax.vmap(lambda tree: oc.rescale_tree(tree, 1.0))(per_example)
    >>> print(clipped["w"], stats.norm.ravel())
    [[0.6 0.8] [0.3 0.4]] [5.  0.5]
    """
    where = "rescale_tree"
    rule = as_limit(limit, where)
    options = _options(where, groups, norm, response, eps, nonfinite, axis_name)
    part = partition(groups, tree)
    state = rule.init(part.table)
    if jax.tree.leaves(state):
        raise TypeError(f"{where}: the limit remembers earlier norms. Use it in rescale_by_norm.")
    if not part.table.names:
        return tree, _blank((0,))
    leaves, stats, _, _ = _apply(rule, jnp.asarray(step, jnp.int32), state, part, params, options)
    return jax.tree.unflatten(part.treedef, leaves), stats


def group_norms(
    tree: PyTree,
    groups: Groups = _groups.leaf(),
    norm: Norm = _norms.l2(),
    *,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    """The norm of each group by its name, in natural order, also under `vmap`.

    Args:
      tree: the tree to measure.
      groups: one of `optaxclip.groups`.
      norm: one of `optaxclip.norms`.
      axis_name: as in `rescale_by_norm`.

    Returns:
      From the group's name to its norm: float32 (float64 if any leaf is), of shape `()`, or `(rows,)` for
      groups of several rows (`unit`, `stacked`). NaN or infinite where an entry is.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if the groups are inconsistent.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> oc.group_norms({"a": jnp.array([3.0, 4.0], jnp.bfloat16)})
    {'a': Array(5., dtype=float32)}
    """
    options = _options("group_norms", groups, norm, _responses.clip(), 0.0, "propagate", axis_name)
    part = partition(groups, tree)
    if not part.table.names:
        return {}
    single = {place.first for place in part.places if place is not None and not place.axes}
    measured = _measured(part, part.leaves, _table(part, options), options).norm
    return {
        name: measured[first] if first in single else measured[first : first + count]
        for name, (first, count) in part.table.spans.items()
    }


def _apply(rule, step, rule_state, part: Partition, params: PyTree, options: _Options):
    """One update: the new leaves, the statistics of the rows and of the whole, the limit's new state."""
    table = _table(part, options)
    measured = _measured(part, part.leaves, table, options)
    norm = measured.norm
    total = merge(options.norm, norm, table.sizes)
    of_params = None
    if rule.needs_params:
        if params is None:
            raise ValueError(_checks.NO_PARAMS)
        found = matching(part, params, options.groups.names, "limits.relative")
        of_params = _measured(part, found, table, options).norm.astype(norm.dtype)
    context = Context(step, table, options.norm, total, of_params)
    limit, rule_state = rule.update(norm, rule_state, context)
    limit = jnp.maximum(_per_row(limit, part), 0).astype(norm.dtype)
    made = factors(measured, limit, options.response, options.eps)
    finite = jnp.isfinite(norm)
    bad = jnp.nan if options.nonfinite == "propagate" else 0.0
    leaves = _scaled(part, jnp.where(finite, made.code, bad), norm, options.nonfinite == "zero")
    after = jnp.where(finite, _norm_after(measured, made, table, options.norm), bad)
    factor = jnp.where(finite, made.factor, bad)
    stats = Stats(norm, after, limit, factor, finite & (factor != 1), ~finite)
    whole = _whole(stats, total, table, options)
    return leaves, _reported(stats), _reported(whole), rule_state


def _whole(stats: Stats, total: jax.Array, table: Table, options: _Options) -> Stats:
    after = merge(options.norm, stats.norm_after, table.sizes)
    some = (total > 0) & jnp.isfinite(total)
    ratio = jnp.where(some, after / jnp.where(some, total, 1), jnp.where(total == 0, 1, after))
    limit = merge(options.norm, stats.limit, table.sizes)
    return Stats(total, after, limit, ratio, jnp.any(stats.clipped), jnp.any(stats.nonfinite))


def _table(part: Partition, options: _Options) -> Table:
    """The table of the rows; sizes count the entries on all devices that a leaf is split over."""
    if not options.axis_name:
        return part.table
    sizes = np.zeros(len(part.table.names))
    for leaf, place in zip(part.leaves, part.places, strict=True):
        if place is not None and place.measured:
            count = int(np.prod([leaf.shape[axis] for axis in place.axes], dtype=int))
            devices = _mesh.axis_size(_mesh.split_axes(leaf, options.axis_name))
            sizes[place.first : place.first + count] += leaf.size // count * devices
    return part.table._replace(sizes=sizes)


def _measured(part: Partition, leaves: Sequence[Any], table: Table, options: _Options) -> Measured:
    chosen = [k for k, place in enumerate(part.places) if place is not None and place.measured]
    wide = any(jnp.finfo(part.leaves[k].dtype).bits == 64 for k in chosen)
    return measure(
        [jnp.asarray(leaves[k]) for k in chosen],
        places=tuple(part.places[k] for k in chosen),
        sizes=tuple(table.sizes.tolist()),
        norm=options.norm,
        axis_name=options.axis_name,
        dtype=np.dtype(np.float64 if wide else np.float32),
    )


def _scaled(part: Partition, code: jax.Array, norm: jax.Array, drop: bool) -> list[Any]:
    chosen = [k for k, place in enumerate(part.places) if place is not None and place.scaled]
    places: tuple[Place, ...] = tuple(part.places[k] for k in chosen)  # type: ignore[misc]
    new = scale([jnp.asarray(part.leaves[k]) for k in chosen], code, norm[0], places=places, drop=drop)
    leaves = list(part.leaves)
    for k, leaf in zip(chosen, new, strict=True):
        leaves[k] = leaf
    return leaves


def _per_row(limit: jax.Array, part: Partition) -> jax.Array:
    rows = len(part.table.names)
    if limit.size == 1:
        limit = limit.reshape(())
    elif limit.shape != (rows,):
        raise ValueError(
            f"rescale_by_norm: the limit has shape {limit.shape} for {rows} rows of groups, "
            f"{_checks.listed(part.table.names)}. Pass one number, one per row, or limits.per_group."
        )
    return jnp.broadcast_to(limit, (rows,))


def _norm_after(measured: Measured, made: Factors, table: Table, norm: Norm) -> jax.Array:
    if measured.fixed is None or measured.free is None:
        return made.after
    # What is counted and not scaled is still there afterwards.
    parts = jnp.stack([measured.free * made.factor, measured.fixed])
    return jnp.where(made.factor == 1, measured.norm, merge(norm, parts, table.sizes, table.sizes))


def _reported(stats: Stats) -> Stats:
    """In the dtypes of the state: float32, at most its largest number unless infinite; int32 for counts."""
    largest = jnp.finfo(jnp.float32).max

    def single(x):
        return jnp.where(jnp.isfinite(x), jnp.minimum(x, largest), x).astype(jnp.float32)

    counts = stats.clipped.astype(jnp.int32), stats.nonfinite.astype(jnp.int32)
    return Stats(*(single(x) for x in stats[:4]), *counts)
