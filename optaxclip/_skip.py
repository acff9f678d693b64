"""Skipping: the optimizer inside does not see a step whose norm or loss stands out."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _checks, _mesh, groups as _groups, norms as _norms, responses as _responses
from optaxclip._apply import Options, checked, looked_at
from optaxclip._base import Context, Groups, Limit, Norm, PyTree, Table
from optaxclip._carry import transformation
from optaxclip._partition import Partition, is_grouped, named_leaves, partition
from optaxclip._split import AxisName
from optaxclip.limits import LimitLike, as_limit, mean_std

WHERE, LOSS = "skip_updates", Table(("loss",), np.ones(1), {"loss": (0, 1)})
NOBODY = -1  # the owner of what belongs to no leaf


class SkipState(NamedTuple):
    """The state of the wrapper, and what it saw at the last update. See `skip_updates`.

    Vectors have one entry per row of the groups, in natural order of the groups' names. What is not watched
    has a limit of infinity. Before the first update norms, limits, losses and counts are 0.

    Attributes:
      step: how many updates there were, dropped ones included, int32, `()`.
      inner: the state of the optimizer inside.
      rule: the state of the limit on the norms.
      loss_rule: the state of the limit on the loss.
      norm: the norms that came in, float32, `(rows,)`.
      limit: the limits they were held against, float32, `(rows,)`.
      skipped: how often a group's own norm was above its limit or not finite, int32, `(rows,)`.
      loss: the loss that came in, float32, `()`; 0 if it is not watched.
      loss_limit: the limit it was held against, float32, `()`.
      loss_skipped: how often the loss was above its limit or not finite, int32, `()`.
      total: in how many steps anything was dropped, int32, `()`.
      last: whether the last step was one of them, bool, `()`.
    """

    step: jax.Array
    inner: PyTree
    rule: PyTree
    loss_rule: PyTree
    norm: jax.Array
    limit: jax.Array
    skipped: jax.Array
    loss: jax.Array
    loss_limit: jax.Array
    loss_skipped: jax.Array
    total: jax.Array
    last: jax.Array


class _Held(NamedTuple):
    """Norms or a loss held against limits; vectors of the rows, and the limit's new state."""

    value: jax.Array
    limit: jax.Array
    over: jax.Array
    rule: PyTree


def skip_updates(
    inner: optax.GradientTransformation,
    limit: LimitLike | None = None,
    *,
    groups: Groups = _groups.whole(),
    norm: Norm = _norms.l2(),
    watch: Literal["norm", "loss", "both"] = "norm",
    each: bool = False,
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Drops a step whose norm or loss is above its limit or not finite, as if it had never come.

    $$u'_t, s_t = \begin{cases}
    \text{inner}(u_t, s_{t-1}) & n_t \le c_t \\ 0, s_{t-1} & \text{else}
    \end{cases}$$

    The update is zero and the state of the optimizer inside stays as it was, bit by bit. Norms are those of
    the updates that come in: with a clip inside, those before the clip. One NaN costs one step, since limits
    never learn from what is not finite. Spikes that are finite are learned from as the limit has it: raw by
    `mean_std` and `percentile`, so that a lasting rise becomes the rule; the limit in their place by `ema`.

    A norm of 0 is never above a limit, and a limit of infinity drops only what is not finite. A loss has to
    be positive to be learned from; one of 0 or below, if finite, never drops a step. With `watch="loss"` a
    NaN gradient beside a finite loss passes. Leaves that are not floating point or complex pass through.
    The state has what the limit remembers, by default 129 numbers per group, and three per group besides.

    Args:
      inner: the optimizer, or all of a chain, to hold back.
      limit: how large a norm or a loss may be: a number, an array of shape `()` or `(rows,)`, a schedule of
        the step, or one of `optaxclip.limits`. None: as OLMo-core,
        `limits.mean_std(6.0, 128, warmup=64, unbiased=True)`.
      groups: which entries share a norm, one of `optaxclip.groups`. Leaves in none go when all others do.
      norm: how a group is measured, one of `optaxclip.norms`.
      watch: `"norm"` for the norm of any group, `"loss"` for the scalar passed to `update` as `value=`, the
        same on all devices, or `"both"` by the same rule. For two rules, put one `skip_updates` in another.
      each: drop only the groups at fault, and all for a loss. Their updates are zero, the optimizer inside
        sees zeros, and what it keeps for their leaves stays as it was. What belongs to no leaf, such as
        Adam's count, stays only if all groups are dropped; what is kept for a leaf of several groups in
        another shape, such as Adafactor's means, only if all of these are.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `SkipState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is negative or NaN, a choice is unknown, a loss is to be held against a limit
        that needs parameters; in `update`, if `value=` is missing or no scalar, the tree is another than
        `init` was given, or parameters are missing that the limit needs.

    References:
      The step skipping of [OLMo-core](https://github.com/allenai/OLMo-core). There the warm-up is one norm
      shorter, one NaN drops 129 steps until it has left the window, and a NaN gradient times 0 stays NaN.

    >>> import jax.numpy as jnp, optax, optaxclip as oc
    >>> tx = oc.skip_updates(optax.sgd(1.0, momentum=0.5), 10.0)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, jnp.nan, 99.0, 1.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    ...     print(updates["w"])
    [-1.]
    [0.]
    [0.]
    [-1.5]
    """
    inner = transformation(WHERE, inner)
    rule = as_limit(mean_std(6.0, 128, warmup=64, unbiased=True) if limit is None else limit, WHERE)
    _checks.one_of(WHERE, ("norm", "loss", "both"), watch=watch)
    if not isinstance(each, bool):
        raise TypeError(f"{WHERE}: each is {each!r}, of type {type(each).__name__}. Pass True or False.")
    if rule.needs_params and watch != "norm":
        raise ValueError(f"{WHERE}: the limit is relative to parameters and a loss has none. Watch the norm.")
    options = checked(WHERE, groups, norm, _responses.clip(), 0.0, "propagate", axis_name, specs)
    unlimited = as_limit(np.inf, WHERE)
    norm_rule, loss_rule = (rule if watch in (kind, "both") else unlimited for kind in ("norm", "loss"))

    def init(params: PyTree) -> SkipState:
        table = partition(groups, params).table
        held = inner.init(params)
        if each and table.names:
            _owners(inner, held, params)  # an error now rather than at the first update
        return _blank(len(table.names), held, norm_rule.init(table), loss_rule.init(LOSS))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        _checks.state("skip_updates", state, SkipState)
        part = partition(groups, updates)
        norms = _held_norms(norm_rule, part, state, params, options)
        loss = state.loss[None] if watch == "norm" else _loss(extra_args)
        known = jnp.where(jnp.isfinite(loss[0]), loss[0], 0)
        context = Context(state.step, LOSS, norm, options.response, known, None)
        losses = _held(loss_rule, loss, state.loss_rule, context)
        over = norms.over if watch != "loss" else jnp.zeros_like(norms.over)
        bad, some = losses.over[0], jnp.any(over) | losses.over[0]
        owners, gone, masks = None, some, [some] * len(part.leaves)
        if each:
            owners = _owners(inner, state.inner, updates)
            gone = (jnp.all(over) if over.size else False) | bad
            masks = _masks(part, over | bad, gone)
        own = [is_grouped(leaf) for leaf in named_leaves(updates)]
        # The optimizer sees zeros where its work is thrown away: a NaN would be found in its derivatives.
        fed = jax.tree.unflatten(part.treedef, _zeroed(masks, own, part.leaves))
        out, after = inner.update(fed, state.inner, params, **extra_args)
        leaves, treedef = jax.tree.flatten(out)
        after = _kept(state.inner, after, owners, masks, gone, part)
        new = _noted(state, norms, losses, over, bad, some)._replace(inner=after)
        return jax.tree.unflatten(treedef, _zeroed(masks, own, leaves)), new

    return optax.GradientTransformationExtraArgs(init, update)


def _blank(rows: int, inner: PyTree, rule: PyTree, loss_rule: PyTree) -> SkipState:
    """The state before the first update; each array in a buffer of its own, so that all can be donated."""
    norm, limit, loss, most = (jnp.zeros(shape, jnp.float32) for shape in ((rows,), (rows,), (), ()))
    step, skipped, by_loss, total = (jnp.zeros(shape, jnp.int32) for shape in ((), (rows,), (), ()))
    last = jnp.zeros((), jnp.bool)
    return SkipState(step, inner, rule, loss_rule, norm, limit, skipped, loss, most, by_loss, total, last)


def _loss(extra_args: dict[str, Any]) -> jax.Array:
    value = extra_args.get("value")
    if value is None:
        raise ValueError(f"{WHERE}: the loss is watched and missing. Pass it to update as value=.")
    if jnp.ndim(value):
        raise ValueError(f"{WHERE}: value has shape {jnp.shape(value)}. Pass the loss as a scalar.")
    return jnp.asarray(value).astype(jnp.float32)[None]


def _held_norms(rule: Limit, part: Partition, state: SkipState, params: PyTree, options: Options) -> _Held:
    """Measures the groups and holds them against their limits."""
    _checks.same_rows(WHERE, part.table.names, state.norm.shape)
    if not part.table.names:
        return _Held(state.norm, state.limit, jnp.zeros((0,), jnp.bool), state.rule)
    found, context = looked_at(rule, state.step, part, params, options)
    return _held(rule, found.norm, state.rule, context)


def _held(rule: Limit, value: jax.Array, state: PyTree, context: Context) -> _Held:
    limit, new = rule.update(value, state, context)
    limit = limit.reshape(()) if limit.size == 1 else limit
    if limit.shape not in ((), value.shape):
        raise ValueError(
            f"{WHERE}: the limit has shape {limit.shape} for {len(value)} rows of groups, "
            f"{_checks.listed(context.table.names)}. Pass one number, one per row, or limits.per_group."
        )
    limit = jnp.maximum(jnp.broadcast_to(limit, value.shape).astype(value.dtype), 0)
    over = ~jnp.isfinite(value) | ~(value <= limit)
    # The state keeps its dtypes, whatever a limit computes in.
    new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)
    return _Held(_single(value), _single(limit), over, new)


def _single(x: jax.Array) -> jax.Array:
    """As float32, where what is finite stays so."""
    most = float(jnp.finfo(jnp.float32).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x).astype(jnp.float32)


def _noted(
    state: SkipState, norms: _Held, losses: _Held, over: jax.Array, bad: jax.Array, some: jax.Array
) -> SkipState:
    return state._replace(
        step=jnp.asarray(optax.safe_increment(state.step)),
        rule=norms.rule,
        loss_rule=losses.rule,
        norm=norms.value,
        limit=norms.limit,
        skipped=state.skipped + over.astype(jnp.int32),
        loss=losses.value[0],
        loss_limit=losses.limit[0],
        loss_skipped=state.loss_skipped + bad.astype(jnp.int32),
        total=state.total + some.astype(jnp.int32),
        last=some,
    )


def _masks(part: Partition, over: jax.Array, gone: jax.Array) -> list[jax.Array]:
    """Which entries of each leaf are dropped: `()`, or with the leaf's rank and its rows along their axes."""
    masks = []
    for leaf, place in zip(part.leaves, part.places, strict=True):
        if place is None or not place.scaled:
            masks.append(gone)
        elif not place.axes:
            masks.append(over[place.first])
        else:
            shape = tuple(leaf.shape[axis] for axis in place.axes)
            own = over[place.first : place.first + int(np.prod(shape))].reshape(shape)
            others = tuple(axis for axis in range(leaf.ndim) if axis not in place.axes)
            masks.append(jnp.expand_dims(_mesh.share(own, leaf, place.axes), others))
    return masks


def _zeroed(masks: list[jax.Array], own: list[bool], leaves: list[Any]) -> list[Any]:
    """The leaves, with zeros where they can be dropped and are."""
    each = zip(masks, own, leaves, strict=True)
    return [jnp.where(mask, jnp.zeros_like(x), x) if some else x for mask, some, x in each]


def _kept(
    old: PyTree, new: PyTree, owners: PyTree, masks: list[jax.Array], gone: jax.Array, part: Partition
) -> PyTree:
    """The new inner state with the old values of what is dropped; without owners, of all or nothing."""

    def kept(old: Any, new: Any, owner: int = NOBODY) -> jax.Array:
        old, new = jnp.asarray(old), jnp.asarray(new)
        mask = gone if owner == NOBODY else masks[owner]
        mask = jnp.all(mask) if mask.ndim and old.shape != part.leaves[owner].shape else mask
        return jnp.where(mask, old, new if new.dtype == old.dtype else new.astype(old.dtype))

    return jax.tree.map(kept, old, new, *(() if owners is None else (owners,)))


def _owners(inner: optax.GradientTransformation, state: PyTree, updates: PyTree) -> PyTree:
    """For each array of an inner state, which leaf of the updates it belongs to, by the leaf's path."""
    index = {leaf.keys: k for k, leaf in enumerate(named_leaves(updates))}

    def owner(keys: tuple[str, ...]) -> int:
        # What is kept for a leaf may itself be a tree, below the leaf's path.
        above = (keys[:n] for n in range(len(keys), -1, -1))
        return next((index[some] for some in above if some in index), NOBODY)

    def owned(tree: PyTree) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(tree), [owner(leaf.keys) for leaf in named_leaves(tree)])

    others = {"transform_non_params": lambda _: NOBODY, "is_leaf": lambda _: True}
    return optax.tree_utils.tree_map_params(inner, owned, state, **others)
