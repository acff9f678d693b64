"""The engine: measure each group, hold it against its limit, multiply it by what the response says."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks, groups as _groups, norms as _norms, responses as _responses
from optaxclip._apply import Nonfinite, Options, apply, checked, measured, table_of
from optaxclip._base import Groups, Limit, Norm, PyTree, Response, Stats
from optaxclip._partition import partition
from optaxclip._split import AxisName
from optaxclip.limits import LimitLike, as_limit

P = ParamSpec("P")

# How errors begin in what a named method is made of: where, and the argument at fault.
INSIDE = re.compile(r"(?:rescale_by_norm|groups\.\w+|limits\.\w+|responses\.\w+): (\w+)")


class RescaleState(NamedTuple):
    """The state of the engine, and what it did at the last update. See `rescale_by_norm`.

    Vectors have one entry per row of the groups, in natural order of the groups' names; `metrics` puts
    names to them. Before the first update the norms, limits and counts are 0 and the factors 1.

    Attributes:
      step: how many updates there were, int32, `()`.
      rule: the limit's own state.
      norm: the norms that came in, float32, `(rows,)`. At most the largest float32 unless entries are not
        finite.
      norm_after: the norms that went out, float32, `(rows,)`.
      limit: the limits they were held against, float32, `(rows,)`.
      factor: what the groups were multiplied by, float32, `(rows,)`; NaN where a NaN or an infinity was
        propagated.
      clipped: how often the factor was not 1, int32, `(rows,)`; steps with a norm that is not finite do not
        count.
      nonfinite: how often the norm was NaN or infinite, int32, `(rows,)`.
      whole: the same for the whole update, `()` each: the norm of all groups together, the norm that their
        limits add up to, the ratio of the norms, and in how many steps any group was clipped or not finite.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_leafwise_norm(1.0)
    >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(state.norm, state.norm_after, state.clipped, state.whole.norm)
    [5.  0.5] [1.  0.5] [1 0] 5.024938
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


def blank(shape: tuple[int, ...]) -> Stats:
    """Statistics before the first update; each in a buffer of its own, so that all can be donated."""
    norms = [jnp.zeros(shape, jnp.float32) for _ in range(3)]
    counts = [jnp.zeros(shape, jnp.int32) for _ in range(2)]
    return Stats(norms[0], norms[1], norms[2], jnp.ones(shape, jnp.float32), counts[0], counts[1])


def counted(stats: Stats, before: "Stats | RescaleState") -> Stats:
    """The statistics, with counts that go on from those before."""
    return stats._replace(
        clipped=before.clipped + stats.clipped, nonfinite=before.nonfinite + stats.nonfinite
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """What `rescale_by_norm` was given, and what it makes of that.

    Attributes:
      limit: how large a norm may be.
      options: all else.
    """

    limit: Limit
    options: Options

    def init(self, params: PyTree) -> RescaleState:
        """The state before the first update."""
        table = partition(self.options.groups, params).table
        return RescaleState(
            step=jnp.zeros((), jnp.int32),
            rule=self.limit.init(table),
            whole=blank(()),
            **blank((len(table.names),))._asdict(),
        )

    def update(self, updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        """The rescaled updates, and the new state."""
        del extra_args
        where = self.options.split.where
        _checks.state(where, state, RescaleState)
        part = partition(self.options.groups, updates)
        _checks.same_rows(where, part.table.names, state.norm.shape)
        step = jnp.asarray(optax.safe_increment(state.step))
        if not part.table.names:
            return updates, state._replace(step=step)
        done = apply(self.limit, state.step, state.rule, part, params, self.options)
        new = RescaleState(
            step=step,
            # The state keeps its dtypes, whatever a limit computes in.
            rule=jax.tree.map(lambda new, old: new.astype(old.dtype), done.rule, state.rule),
            whole=counted(done.whole, state.whole),
            **counted(done.stats, state)._asdict(),
        )
        return jax.tree.unflatten(part.treedef, done.leaves), new

    def called(self, where: str) -> optax.GradientTransformationExtraArgs:
        """The transformation of this policy, whose errors say that they are of `where`."""
        split = self.options.split._replace(where=where)
        policy = dataclasses.replace(self, options=self.options._replace(split=split))
        return optax.GradientTransformationExtraArgs(policy.init, policy.update)


def policy_of(transformation: Any) -> Policy | None:
    """The policy that a transformation was made of, if `rescale_by_norm` made it."""
    owner = getattr(getattr(transformation, "update", None), "__self__", None)
    return owner if isinstance(owner, Policy) else None


def renamed(where: str, made: Any) -> Any:
    """A transformation whose errors say that they are of `where`, if `rescale_by_norm` made it."""
    policy = policy_of(made)
    return made if policy is None else policy.called(where)


def named(**own: str) -> Callable[[Callable[P, Any]], Callable[P, optax.GradientTransformationExtraArgs]]:
    """Lets a method's errors name the method and its own arguments, not what it is made of.

    Args:
      own: from the name of an argument inside to the method's name for it, where they differ.
    """

    def wrap(method: Callable[P, Any]) -> Callable[P, optax.GradientTransformationExtraArgs]:
        @functools.wraps(method)
        def called(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
            try:
                made = method(*args, **kwargs)
            except (TypeError, ValueError) as error:
                text = str(error)
                found = INSIDE.match(text)
                if found is None:
                    raise
                name = own.get(found[1], found[1])
                raise type(error)(f"{method.__name__}: {name}{text[found.end() :]}") from None
            return renamed(method.__name__, made)

        return called

    return wrap


def rescale_by_norm(
    limit: LimitLike,
    *,
    groups: Groups = _groups.whole(),
    norm: Norm = _norms.l2(),
    response: Response = _responses.clip(),
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Splits an update into groups, measures each, and multiplies it by what the response says.

    $$u'_g = f(n_g, c_g)\,u_g, \qquad
    n_g = \|u_g\| \quad \text{for each group } g \text{ with limit } c_g \text{ and response } f$$

    Norms are accumulated in float32 (float64 if any leaf is), whatever the dtype of the leaves; the dtypes
    that come out are those that came in, unless `out_dtype` is given. Groups whose factor is 1 come out
    bit-identical. `docs/numerics.md` has the table of what happens at 0, infinity and NaN.

    Args:
      limit: how large a norm may be: a number, an array of shape `()` or `(rows,)`, a schedule of the step,
        or one of `optaxclip.limits`; not negative.
      groups: which entries share a norm, one of `optaxclip.groups`.
      norm: how a group is measured, one of `optaxclip.norms`.
      response: what a group is multiplied by, one of `optaxclip.responses`.
      eps: added to the norms before the response sees them. 1e-6 gives PyTorch's numbers.
      nonfinite: what becomes of a group with a NaN or infinite entry: `"propagate"` makes all of it NaN, so
        that it cannot be overlooked; `"zero"` makes zeros of it. Other groups are untouched either way.
      axis_name: inside `shard_map` or `pmap`, the mesh axes that leaves are split over. Under `jit` nothing
        is needed. Where JAX tracks which axes a leaf varies over, each leaf is summed over exactly
        those; where it does not (`pmap`, `check_vma=False`), every leaf is summed over all of them, or over
        those that `specs` names for it. None is an error where JAX knows of a measured leaf that varies;
        `()` lets each device measure its own part by itself.
      specs: how leaves are split, where JAX does not track it: a tree prefix of the updates, matched by path,
        of `jax.sharding.PartitionSpec`, as `in_specs` of `shard_map`; None in it is `P()`. Of manual axes
        only which ones a leaf is split over counts, not along which dimensions. Without `axis_name` all
        that it names count, with it only those in both. Where JAX does track, the two must agree. Under
        `jit`, with automatic mesh axes, it changes no number and saves communication: one all-reduce for
        each distinct set of axes, and no all-gather.
      out_dtype: the dtype that scaled leaves come out in, a real one; complex leaves come out in the complex
        one of the same precision, and what belongs to no group as it is. By default each leaf keeps its own.
        `jnp.float32` in front of an optimizer with moments in float32 saves bfloat16 gradients from being
        rounded again.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is negative or NaN, a choice is unknown, `init` finds the groups inconsistent,
        or `update` gets a tree with another number of rows than `init` or lacks parameters that the limit
        needs. A state holds arrays and no names: trees with equally many rows cannot be told apart. Inside
        `shard_map`, if a leaf varies over mesh axes and `axis_name` is missing, or `specs` does not fit.

    References:
      With the defaults: [optax.clip_by_global_norm](https://optax.readthedocs.io/en/latest/api/transformations.html).
      Named methods have those of their papers.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.rescale_by_norm(1.0, groups=oc.groups.leaf())
    >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["a"], updates["b"], state.norm, state.factor)
    [0.6 0.8] [0.5] [5.  0.5] [0.2 1. ]
    """
    where = "rescale_by_norm"
    options = checked(where, groups, norm, response, eps, nonfinite, axis_name, specs, out_dtype)
    return Policy(as_limit(limit, where), options).called(where)


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
    specs: PyTree = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[PyTree, Stats]:
    r"""Rescales a tree once, without state: the core of `rescale_by_norm`, also under `vmap`.

    $$u'_g = f(n_g, c_g)\,u_g, \qquad n_g = \|u_g\|$$

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
      specs: likewise.
      out_dtype: likewise.

    Returns:
      The tree, and the `Stats` of its groups: float32 vectors with one entry per row, in the order of
      `group_norms`; `clipped` and `nonfinite` are 0 or 1.

    Raises:
      TypeError: if an argument is of the wrong type, or the limit has state.
      ValueError: as in `rescale_by_norm`.

    References:
      `clip_pytree` of [jax-privacy](https://github.com/google-deepmind/jax_privacy).

    Per-example clipping is a `vmap` of it:

    >>> import jax, jax.numpy as jnp, optaxclip as oc
    >>> per_example = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
    >>> clipped, stats = jax.vmap(lambda tree: oc.rescale_tree(tree, 1.0))(per_example)
    >>> print(clipped["w"], stats.norm.ravel())
    [[0.6 0.8] [0.3 0.4]] [5.  0.5]
    """
    where = "rescale_tree"
    rule = as_limit(limit, where)
    options = checked(where, groups, norm, response, eps, nonfinite, axis_name, specs, out_dtype)
    part = partition(groups, tree)
    state = rule.init(part.table)
    if jax.tree.leaves(state):
        raise TypeError(f"{where}: the limit remembers earlier norms. Use it in rescale_by_norm.")
    if not part.table.names:
        return tree, blank((0,))
    done = apply(rule, jnp.asarray(step, jnp.int32), state, part, params, options)
    return jax.tree.unflatten(part.treedef, done.leaves), done.stats


def group_norms(
    tree: PyTree,
    groups: Groups = _groups.leaf(),
    norm: Norm = _norms.l2(),
    *,
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> dict[str, jax.Array]:
    r"""The norm of each group by its name, in natural order, also under `vmap`.

    $$n_g = \|u_g\|, \qquad \text{by default } \sqrt{\textstyle\sum_{i \in g} |u_i|^2}$$

    Args:
      tree: the tree to measure.
      groups: one of `optaxclip.groups`.
      norm: one of `optaxclip.norms`.
      axis_name: as in `rescale_by_norm`.
      specs: likewise.

    Returns:
      From the group's name to its norm: float32 (float64 if any leaf is), of shape `()`, or `(rows,)` for
      groups of several rows (`unit`, `stacked`). NaN or infinite where an entry is.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if the groups are inconsistent.

    References:
      Of the whole tree: [optax.global_norm](https://optax.readthedocs.io/en/latest/api/transformations.html).

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> oc.group_norms({"a": jnp.array([3.0, 4.0], jnp.bfloat16)})
    {'a': Array(5., dtype=float32)}
    """
    options = checked("group_norms", groups, norm, _responses.clip(), 0.0, "propagate", axis_name, specs)
    part = partition(groups, tree)
    if not part.table.names:
        return {}
    single = {place.first for place in part.places if place is not None and not place.axes}
    found = measured(part, part.leaves, table_of(part, options), options).norm
    return {
        name: found[first] if first in single else found[first : first + count]
        for name, (first, count) in part.table.spans.items()
    }
