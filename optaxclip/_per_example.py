"""Per-example clipping: every example of a batch by itself, then their mean."""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks, groups as _groups, norms as _norms, responses as _responses
from optaxclip._apply import Nonfinite, apply, checked
from optaxclip._base import Groups, Leaf, Norm, PyTree, Response, Stats, Table
from optaxclip._learning import in_float32
from optaxclip._partition import named_leaves, partition
from optaxclip._split import AxisName
from optaxclip.limits import LimitLike, as_limit

Reduce: TypeAlias = Literal["mean", "sum"]

WHERE = "clip_per_example"


class PerExampleState(NamedTuple):
    """The state of the method, and what it did at the last update. See `clip_per_example`.

    Vectors have one entry per row of the groups, in natural order of the groups' names. Before the first
    update norms, limits, shares and counts are 0.

    Attributes:
      step: how many updates there were, int32, `()`.
      rule: the next limits of a `per_example_quantile`, float32, `(rows,)`; no arrays for any other limit.
      limit: the limits that the examples were held against, float32, `(rows,)`; the largest, should they
        differ.
      norm: the mean norm of the examples whose norm was finite, before clipping, float32, `(rows,)`; 0 if
        none was.
      clipped: the share of the batch whose factor was not 1, float32, `(rows,)`; examples with a norm that is
        not finite are not among them.
      nonfinite: how many examples had a norm that was NaN or infinite, in all updates so far, int32,
        `(rows,)`.
    """

    step: jax.Array
    rule: PyTree
    limit: jax.Array
    norm: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array


class PerExampleQuantile(NamedTuple):
    """What `per_example_quantile` was given, checked."""

    target: Any
    rate: Any
    initial: Any


def per_example_quantile(
    target: float | jax.Array = 0.5, rate: float | jax.Array = 0.2, *, initial: float | jax.Array = 1.0
) -> PerExampleQuantile:
    r"""Moves the limits of `clip_per_example` until a share `target` of a batch's norms is within them.

    $$c_{t+1} = c_t\,e^{-\eta\,(b_t - \gamma)}, \qquad b_t = \frac{1}{B} \sum_{i=1}^{B} [n_{t,i} \le c_t]$$

    for each group by itself. A batch moves a limit once, by its share of examples within. A batch of one
    moves it as `limits.quantile` does, which sees one norm a step and so cannot stand in for this.

    *Warm-up*: none; the limits start at `initial` and move by a factor of at most e^rate a step. *Non-finite
    and zero norms* are not learned from: such an example counts as γ in the sum and so moves nothing, and B
    stays the size of the batch. Limits stay within float32's range of positive numbers.

    The exact share is not private. The paper adds noise to it, this does not.

    Args:
      target: γ, the share of examples to leave as they are, from 0 to 1.
      rate: η, how fast the limits move.
      initial: the first limit, a number or an array of shape `()` or `(rows,)`.

    Returns:
      A limit for `clip_per_example` and for nothing else. Its state is the limits, `(rows,)`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range; in `init`, if `initial` has another number of rows.

    References:
      Andrew et al., [Differentially Private Learning with Adaptive
      Clipping](https://arxiv.org/abs/1905.03871), 2021, whose defaults these are, without its noise. For each
      layer: He et al., [Exploring the Limits of Differentially Private Deep Learning with Group-wise
      Clipping](https://arxiv.org/abs/2212.01539), 2023.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_per_example(oc.per_example_quantile(0.5, rate=2.0))
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for _ in range(3):  # the limit settles where half of the examples are within
    ...     updates, state = tx.update({"w": jnp.array([[2.0], [2.5], [8.0], [9.0]])}, state)
    ...     print(state.limit, state.clipped)
    [1.] [1.]
    [2.7182817] [0.5]
    [2.7182817] [0.5]
    """
    where = "per_example_quantile"
    _checks.within(where, 0, 1, target=target)
    _checks.nonnegative(where, rate=rate)
    _checks.positive(where, initial=initial)
    return PerExampleQuantile(target, rate, initial)


def clip_per_example(
    limit: LimitLike | PerExampleQuantile,
    *,
    groups: Groups = _groups.whole(),
    norm: Norm = _norms.l2(),
    response: Response = _responses.clip(),
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "zero",
    reduce: Reduce = "mean",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the gradient of each example by itself, and averages over the batch.

    $$u = \frac{1}{B} \sum_{i=1}^{B} s(n_i)\,g_i, \qquad s(n) = \min(1, c / n) \text{ by default}$$

    **No noise is added, and no privacy comes of this alone.** It bounds what one example can do to the
    update, no more. DP-SGD adds noise in proportion to the limit behind it, and keeps account of what is
    spent; an adaptive limit needs noise of its own as well. `examples/private_sgd.py` adds the noise.

    The updates are gradients with a leading batch axis in every leaf, as
    `jax.vmap(jax.grad(loss), in_axes=(None, 0))` gives them; `init` is given the parameters, without it. What
    comes out has the shapes of the parameters and the dtypes of the updates, so this has to be the first of a
    chain. `optax.MultiSteps` may be put behind it, not around it. Behind `optax.masked`, leaves that are left
    out keep their batch axis; leave them out by the groups instead (`labels`, `regex`).

    Leaves that the groups leave alone are averaged without being clipped, whatever is in them. 16-bit leaves
    are clipped and averaged in float32. Of leaves that are neither floating point nor complex the first
    example's is passed on. An empty batch gives zeros, and of the state only the step moves.

    Args:
      limit: how large the norm of an example's group may be: a number, an array of shape `()` or `(rows,)`, a
        schedule of the step, `limits.budget` or another of `optaxclip.limits` that remembers nothing, or
        `per_example_quantile`.
      groups: which entries of an example share a norm, one of `optaxclip.groups`.
      norm: how a group is measured, one of `optaxclip.norms`.
      response: what a group is multiplied by, one of `optaxclip.responses`. With `normalize()` and an `eps`
        of 0.01 this is AUTO-S, with `psac()` DP-PSAC.
      eps: added to the norms before the response sees them.
      nonfinite: what becomes of an example's group with a NaN or infinite entry: `"zero"` drops it, so that
        one bad example does not spoil the batch; `"propagate"` makes the group NaN in the result. Counted in
        the state either way.
      reduce: `"mean"` or `"sum"`. The mean divides by the batch size: dropped examples count, as in DP-SGD.
      axis_name: inside `shard_map` or `pmap`, the mesh axes that the parameters are split over, so that an
        example's norm is that of all its parts; see `rescale_by_norm`. An axis that splits the batch is not
        among them. With one, update and state are those of a device's own examples: average the update over
        it with `jax.lax.pmean`; `per_example_quantile` needs the whole batch on each device. Since JAX does
        not tell an axis of the batch from one of the parameters, None is as `()`, and no error.
      specs: how the parameters are split, where JAX keeps no track of it; see `rescale_by_norm`. An axis of
        the batch is not in it either.

    Returns:
      A transformation with a `PerExampleState`.

    Raises:
      TypeError: if an argument is of the wrong type; in `init`, if the limit remembers earlier norms.
      ValueError: if a number is negative or NaN or a choice is unknown; in `update`, if a leaf lacks the
        batch axis or has a batch of another size, or the tree is another than in `init`.

    References:
      Abadi et al., [Deep Learning with Differential Privacy](https://arxiv.org/abs/1607.00133), 2016. Per
      layer, with `limits.budget`: McMahan et al., [Learning Differentially Private Recurrent Language
      Models](https://arxiv.org/abs/1710.06963), 2018. Optax's `per_example_global_norm_clip` and
      `per_example_layer_norm_clip` give the sums of these, and NaN for a batch with a NaN.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_per_example(1.0)
    >>> per_example = {"w": jnp.array([[3.0, 4.0], [0.2, 0.0], [0.0, jnp.nan], [0.0, 0.0]])}
    >>> updates, state = tx.update(per_example, tx.init({"w": jnp.zeros(2)}))
    >>> print(updates["w"], state.clipped, state.nonfinite)
    [0.2 0.2] [0.25] [1]
    """
    quantile = limit if isinstance(limit, PerExampleQuantile) else None
    rule = as_limit(1.0 if isinstance(limit, PerExampleQuantile) else limit, WHERE)
    options = checked(WHERE, groups, norm, response, eps, nonfinite, axis_name, specs)
    # JAX cannot tell an axis of the batch from one of the parameters: what is not named does not count.
    options = options._replace(split=options.split._replace(axis_name=options.split.axes))
    _checks.one_of(WHERE, ("mean", "sum"), reduce=reduce)

    def init(params: PyTree) -> PerExampleState:
        table = partition(groups, params).table
        held = _without_arrays(rule.init(table)) if quantile is None else _first(quantile, table)
        limits, norms, shares = (jnp.zeros((len(table.names),), jnp.float32) for _ in range(3))
        counts = jnp.zeros((len(table.names),), jnp.int32)
        return PerExampleState(jnp.zeros((), jnp.int32), held, limits, norms, shares, counts)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del extra_args
        _checks.state(WHERE, state, PerExampleState)
        batch = _batch_size(named_leaves(updates), params)
        leaves, treedef = jax.tree.flatten(updates)
        part = partition(groups, treedef.unflatten([_of_one(leaf) for leaf in leaves]))
        _checks.same_rows(WHERE, part.table.names, state.norm.shape)
        new = state._replace(step=jnp.asarray(optax.safe_increment(state.step)))
        wide = {k: _wide(leaf) for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)}
        if batch and part.table.names:
            now, own = (rule, state.rule) if quantile is None else (as_limit(state.rule, WHERE), ())

            def one(example: dict[int, jax.Array]) -> tuple[dict[int, jax.Array], Stats]:
                mine = part._replace(leaves=[example.get(k, x) for k, x in enumerate(part.leaves)])
                done = apply(now, state.step, own, mine, params, options)
                return {k: done.leaves[k] for k in example}, done.stats

            wide, stats = jax.vmap(one)(wide)
            new = _noted(new, stats)
            if quantile is not None:
                new = new._replace(rule=_moved(quantile, state.rule, stats.norm))
        count = max(batch, 1) if reduce == "mean" else 1
        out = [_reduced(wide[k], count, x) if k in wide else _first_of(x) for k, x in enumerate(leaves)]
        return treedef.unflatten(out), new

    return optax.GradientTransformationExtraArgs(init, update)


def _without_arrays(state: PyTree) -> PyTree:
    if jax.tree.leaves(state):
        raise TypeError(
            f"{WHERE}: the limit remembers earlier norms, one a step; here a step has one for each example. "
            "Pass a number, a schedule, limits.budget or per_example_quantile()."
        )
    return state


def _first(limit: PerExampleQuantile, table: Table) -> jax.Array:
    """The first limits of the rows."""
    rows, initial = len(table.names), jnp.asarray(limit.initial, jnp.float32)
    _checks.per_row("per_example_quantile", "initial", initial.shape, table.names)
    return jnp.full((rows,), initial.ravel()) if rows else jnp.zeros((0,), jnp.float32)


def _moved(limit: PerExampleQuantile, held: jax.Array, norms: jax.Array) -> jax.Array:
    """The next limits, from those held and the norms `(examples, rows)`."""
    target, rate = (jnp.asarray(x, jnp.float32) for x in (limit.target, limit.rate))
    known = jnp.isfinite(norms) & (norms > 0)
    within = (norms <= held[None]).astype(jnp.float32)
    excess = jnp.mean(jnp.where(known, within - target, 0), axis=0)
    return in_float32(held * jnp.exp(-rate * excess))


def _noted(state: PerExampleState, stats: Stats) -> PerExampleState:
    """The state with the statistics of a batch, each `(examples, rows)`."""
    finite = jnp.isfinite(stats.norm)
    count = jnp.maximum(jnp.sum(finite, axis=0, keepdims=True), 1).astype(jnp.float32)
    return state._replace(
        limit=jnp.max(stats.limit, axis=0),
        # Divided first, so that the sum cannot overflow.
        norm=jnp.sum(jnp.where(finite, stats.norm, 0) / count, axis=0),
        clipped=jnp.mean(stats.clipped.astype(jnp.float32), axis=0),
        nonfinite=state.nonfinite + jnp.sum(stats.nonfinite, axis=0, dtype=jnp.int32),
    )


def _batch_size(leaves: list[Leaf], params: PyTree) -> int:
    """The size that the first axes of all leaves have in common; 0 for a tree without leaves."""
    known = {} if params is None else {leaf.path: jnp.shape(leaf.value) for leaf in named_leaves(params)}
    for leaf in leaves:
        shape, first = jnp.shape(leaf.value), jnp.shape(leaves[0].value)
        if not shape or known.get(leaf.path, shape[1:]) != shape[1:]:
            of = f" for a parameter of shape {known[leaf.path]}" if leaf.path in known else ""
            raise ValueError(
                f"{WHERE}: leaf {leaf.path!r} has shape {shape}{of}, which is not one gradient per example. "
                "Pass gradients with a leading batch axis: jax.vmap(jax.grad(loss), in_axes=(None, 0))."
            )
        if shape[0] != first[0]:
            raise ValueError(
                f"{WHERE}: leaf {leaf.path!r} has shape {shape}, a batch of {shape[0]}; leaf "
                f"{leaves[0].path!r} has a batch of {first[0]}. Give all leaves the same leading batch axis."
            )
    return jnp.shape(leaves[0].value)[0] if leaves else 0


def _of_one(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


def _wide(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float32) if jnp.finfo(leaf.dtype).bits < 32 else leaf


def _reduced(examples: jax.Array, count: int, like: Any) -> jax.Array:
    return (jnp.sum(examples, axis=0) / count).astype(jax.dtypes.canonicalize_dtype(like.dtype))


def _first_of(leaf: Any) -> Any:
    # A slice, so that a float0 array does not become a scalar.
    return leaf[:1].reshape(leaf.shape[1:]) if leaf.shape[0] else jnp.zeros(leaf.shape[1:], leaf.dtype)
