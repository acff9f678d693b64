"""How large a norm may be.

Wherever a limit is asked for, a number, an array (traced or not, of any floating dtype), a schedule (any
callable of the step, int32) or one of these will do. An infinite limit changes nothing. A negative or NaN
limit is an error where it is a Python number; as an array a negative one counts as 0, and NaN does to a group
what a NaN entry does.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import _checks
from optaxclip._base import Context, Limit, Table
from optaxclip._ema import ema, ema_band
from optaxclip._learning import at_step
from optaxclip._moments import moment_ratio, running_mean, running_rms
from optaxclip._running import quantile, zscore
from optaxclip._windows import mean_std, percentile

__all__ = [
    "after",
    "at_most",
    "budget",
    "constant",
    "ema",
    "ema_band",
    "mean_std",
    "moment_ratio",
    "per_group",
    "percentile",
    "quantile",
    "relative",
    "running_mean",
    "running_rms",
    "schedule",
    "zscore",
]

LimitLike: TypeAlias = float | jax.Array | np.ndarray | Callable[[Any], Any] | Limit


def as_limit(limit: LimitLike, where: str, name: str = "limit") -> Limit:
    """The `Limit` that a number, an array or a schedule stands for."""
    if isinstance(limit, Limit):
        return limit
    if isinstance(limit, Mapping):
        raise TypeError(f"{where}: {name} is a dict. Pass limits.per_group({{name: limit, ...}}).")
    return _stateless(lambda norm, ctx, value: value, limit, where, name)


def _stateless(
    rule: Callable, value: Any, where: str, name: str, needs_params: bool = False, **others: Any
) -> Limit:
    """A limit without state: `rule(norm, ctx, value)`, where `value` may be a schedule.

    It and `others` may be arrays, whose length is checked where the rows are first known.
    """
    if not callable(value):
        _checks.nonnegative(where, **{name: value})

    def init(table: Table) -> tuple[()]:
        for argument, array in _checks.unscheduled(**{name: value}, **others).items():
            _checks.per_row(where, argument, jnp.shape(array), table.names)
        return ()

    return Limit(
        init, lambda norm, state, ctx: (rule(norm, ctx, at_step(value, ctx.step)), state), needs_params
    )


def constant(c: float | jax.Array) -> Limit:
    """The same limit at every step: a number for all groups, or an array with one for each row.

    $$c_t = c$$

    Args:
      c: the limit, in the units of the norm, from 0 to inf: a number, or an array of shape `()` or `(rows,)`.

    Returns:
      A `Limit` without state.

    Raises:
      TypeError: if `c` is no number and no array.
      ValueError: if `c` is negative or NaN.

    References:
      Pascanu et al., [On the difficulty of training recurrent neural
      networks](https://arxiv.org/abs/1211.5063), 2013.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tree, stats = oc.rescale_tree({"w": jnp.array([3.0, 4.0])}, oc.limits.constant(2.5))
    >>> print(tree["w"])
    [1.5 2. ]
    """
    _checks.nonnegative("limits.constant", c=c)
    return as_limit(c, "limits.constant", "c")


def schedule(fn: Callable[[Any], Any]) -> Limit:
    """A limit that depends on the step, such as any schedule of Optax.

    $$c_t = f(t)$$

    Args:
      fn: from the number of updates that came before, int32 of shape `()`, to the limit, `()` or `(rows,)`.

    Returns:
      A `Limit` without state.

    Raises:
      TypeError: if `fn` is not callable.

    References:
      [Optax's schedules](https://optax.readthedocs.io/en/latest/api/optimizer_schedules.html).

    >>> import jax.numpy as jnp, optax, optaxclip as oc
    >>> tx = oc.clip_by_global_norm(oc.limits.schedule(optax.linear_schedule(50.0, 10.0, 2)))
    >>> grads = {"w": jnp.array([30.0, 40.0])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> updates, state = tx.update(grads, state)
    >>> print(updates["w"])
    [18. 24.]
    """
    if not callable(fn):
        raise TypeError(f"limits.schedule: fn is {fn!r}. Pass a function of the step.")
    return as_limit(fn, "limits.schedule")


def per_group(limits: Mapping[str, LimitLike]) -> Limit:
    r"""A limit of its own for each group, by the group's name.

    $$c_{t,g} = c^{(g)}_t \quad \text{for each group } g$$

    Args:
      limits: from the name of every group to its limit: a number, an array of shape `()` or with one entry
        for each row of the group, a schedule or a `Limit`. Numbers apply to all rows of a group of several
        (`stacked`, `unit`).

    Returns:
      A `Limit` whose state is a tuple of theirs.

    Raises:
      TypeError: if `limits` is not a dict.
      ValueError: if a limit is negative or NaN; in `init`, if a group is missing or unknown.

    References:
      `clip_pytree` of [jax-privacy](https://github.com/google-deepmind/jax_privacy), which takes a tree of
      norms.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> grads = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([3.0, 4.0])}
    >>> limit = oc.limits.per_group({"body": 1.0, "head": jnp.inf})
    >>> tree, stats = oc.rescale_tree(grads, limit, groups=oc.groups.leaf())
    >>> print(tree["body"], tree["head"])
    [0.6 0.8] [3. 4.]
    """
    where = "limits.per_group"
    if not isinstance(limits, Mapping):
        raise TypeError(f"{where}: limits is of type {type(limits).__name__}. Pass a dict of name: limit.")
    rules = {name: as_limit(limit, where, repr(name)) for name, limit in limits.items()}

    def check(table: Table) -> None:
        if not table.spans:  # a tree without leaves, as Optax's tree_map_params passes
            return
        groups = f"Groups: {_checks.listed(table.spans)}."
        for name in rules:
            if name not in table.spans:
                raise ValueError(f"{where}: there is no group {name!r}. {groups} Mend the name.")
        for name in table.spans:
            if name not in rules:
                raise ValueError(f"{where}: group {name!r} has no limit. {groups} Give it one, or jnp.inf.")

    def init(table):
        check(table)
        # A tuple in the order of the rules has the same structure for every tree.
        return tuple(rule.init(_part(table, name)) for name, rule in rules.items())

    def update(norm, state, ctx):
        check(ctx.table)
        found, new = {}, []
        for (name, rule), own_state in zip(rules.items(), state, strict=True):
            first, count = ctx.table.spans[name]
            own = slice(first, first + count)
            params = None if ctx.params is None else ctx.params[own]
            part = ctx._replace(table=_part(ctx.table, name), params=params)
            limit, own_state = rule.update(norm[own], own_state, part)
            found[name] = jnp.broadcast_to(limit, (count,)).astype(norm.dtype)
            new.append(own_state)
        return jnp.concatenate([found[name] for name in ctx.table.spans]), tuple(new)

    return Limit(init, update, any(rule.needs_params for rule in rules.values()))


def _part(table: Table, name: str) -> Table:
    first, count = table.spans.get(name, (0, 0))
    own = slice(first, first + count)
    return Table(table.names[own], table.sizes[own], {name: (0, count)})


def budget(total: LimitLike, by: Literal["uniform", "size"] = "uniform") -> Limit:
    r"""Divides a limit on the whole update among the groups, so that the whole norm stays within it.

    $$c_g = \frac{C}{\sqrt G} \text{ (uniform)}, \qquad c_g = C \sqrt{d_g / D} \text{ (size)}$$

    for the L2 norm, with G groups (rows) of d of all D entries. For other norms the shares are those that
    keep the whole norm within C: C/G for L1, C for the maximum.

    Args:
      total: C: a number, an array of shape `()` or a schedule.
      by: `"uniform"` for equal shares, `"size"` for shares that grow with the entries of a group.

    Returns:
      A `Limit` without state.

    Raises:
      TypeError: if `total` is none of these.
      ValueError: if `total` is negative or NaN, or `by` is unknown.

    References:
      McMahan et al., [Learning Differentially Private Recurrent Language
      Models](https://arxiv.org/abs/1710.06963), 2018, as flat and per-layer clipping.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> grads = {"a": jnp.array([6.0, 8.0]), "b": jnp.array([0.3, 0.4])}
    >>> tree, stats = oc.rescale_tree(grads, oc.limits.budget(2.0), groups=oc.groups.leaf())
    >>> print(stats.limit)
    [1.4142135 1.4142135]
    """
    where = "limits.budget"
    _checks.one_of(where, ("uniform", "size"), by=by)
    if isinstance(total, Limit):
        raise TypeError(f"{where}: total is a Limit. Pass a number, an array or a schedule.")

    def rule(norm, ctx, value):
        sizes = ctx.table.sizes
        share = np.full(len(sizes), 1 / max(len(sizes), 1)) if by == "uniform" else sizes / sizes.sum()
        if ctx.norm.combine == "max":
            return value
        # The norm is homogeneous: with its inverse at 1, shares of partial results become shares of norms.
        whole = ctx.norm.open(np.float64(1), sizes.sum())
        parts = jnp.asarray(whole * share, norm.dtype)
        return value.astype(norm.dtype) * ctx.norm.close(parts, jnp.asarray(sizes, norm.dtype))

    return _stateless(rule, total, where, "total")


def relative(ratio: LimitLike, floor: float | jax.Array = 1e-3) -> Limit:
    r"""A ratio of the norm of the same group's parameters.

    $$c_g = r \max(\|w_g\|, f)$$

    Args:
      ratio: r, a number, an array of shape `()` or `(rows,)`, or a schedule.
      floor: f, the least that a group's parameters count as, so that groups initialised at zero can move.

    Returns:
      A `Limit` without state, which needs parameters.

    Raises:
      TypeError: if an argument is none of these.
      ValueError: if an argument is negative or NaN; in `update`, if `params` is missing.

    References:
      Brock et al., [High-Performance Large-Scale Image Recognition Without
      Normalization](https://arxiv.org/abs/2102.06171), 2021, with `groups.unit`.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> grads, params = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.0, 10.0])}
    >>> tree, stats = oc.rescale_tree(grads, oc.limits.relative(0.1), params=params)
    >>> print(tree["w"])
    [0.6 0.8]
    """
    where = "limits.relative"
    _checks.nonnegative(where, floor=floor)
    if isinstance(ratio, Limit):
        raise TypeError(f"{where}: ratio is a Limit. Pass a number, an array or a schedule.")

    def rule(norm, ctx, value):
        size = jnp.maximum(ctx.params, at_step(floor, ctx.step).astype(norm.dtype))
        ratio = value.astype(norm.dtype)
        # No limit of 0 times infinity: a ratio of 0 or infinity stands for itself. NaN is not hidden.
        own = ((ratio == 0) | (ratio == jnp.inf)) & ~jnp.isnan(size)
        return ratio * jnp.where(own, 1, size)

    return _stateless(rule, ratio, where, "ratio", needs_params=True, floor=floor)


def at_most(a: LimitLike, b: LimitLike) -> Limit:
    r"""The smaller of two limits, group by group. Both see every norm.

    $$c_g = \min(a_g, b_g)$$

    Args:
      a: a number, an array of shape `()` or `(rows,)`, a schedule or a `Limit`.
      b: likewise.

    Returns:
      A `Limit` whose state is a pair of theirs.

    Raises:
      TypeError: if one of them is none of these.
      ValueError: if one is negative or NaN.

    References:
      Kumar et al., [ZClip](https://arxiv.org/abs/2504.02507), 2025: its cap beside the adaptive limit.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> limit = oc.limits.at_most(oc.limits.per_group({"a": 1.0, "b": 9.0}), 2.0)
    >>> grads = {"a": jnp.array([4.0]), "b": jnp.array([4.0])}
    >>> print(oc.rescale_tree(grads, limit, groups=oc.groups.leaf())[1].limit)
    [1. 2.]
    """
    return _both(
        as_limit(a, "limits.at_most", "a"),
        as_limit(b, "limits.at_most", "b"),
        lambda first, second, ctx: jnp.minimum(first, second),
    )


def after(steps: int, first: LimitLike, then: LimitLike) -> Limit:
    r"""One limit for the first `steps` updates and another from then on.

    $$c_t = a_t \text{ for } t < s \text{, then } b_t$$

    Both see every norm from the start, so that an adaptive one behind is warm when its turn comes.

    Args:
      steps: how many updates `first` is for, an integer from 0.
      first: the limit for these.
      then: the limit for the rest.

    Returns:
      A `Limit` whose state is a pair of theirs.

    Raises:
      TypeError: if `steps` is not an integer.
      ValueError: if `steps` is negative.

    References:
      Wang et al., [AdaGC](https://arxiv.org/abs/2502.11034), 2025: a fixed limit before the adaptive one.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_global_norm(oc.limits.after(1, jnp.inf, 1.0))
    >>> grads = {"w": jnp.array([3.0, 4.0])}
    >>> first, state = tx.update(grads, tx.init(grads))
    >>> second, state = tx.update(grads, state)
    >>> print(first["w"], second["w"])
    [3. 4.] [0.6 0.8]
    """
    _checks.whole_number("limits.after", steps=steps)
    return _both(
        as_limit(first, "limits.after", "first"),
        as_limit(then, "limits.after", "then"),
        lambda early, late, ctx: jnp.where(ctx.step < steps, early, late),
    )


def _both(a: Limit, b: Limit, choose: Callable[[jax.Array, jax.Array, Context], jax.Array]) -> Limit:
    def update(norm, state, ctx):
        first, state_a = a.update(norm, state[0], ctx)
        second, state_b = b.update(norm, state[1], ctx)
        return choose(first.astype(norm.dtype), second.astype(norm.dtype), ctx), (state_a, state_b)

    return Limit(lambda table: (a.init(table), b.init(table)), update, a.needs_params or b.needs_params)
