"""Error feedback: what a clip cuts off is added to the next update."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks, norms as _norms, responses as _responses
from optaxclip._apply import Options, apply, checked, measured, single, table_of
from optaxclip._base import PyTree
from optaxclip._partition import Leaf, Partition, named_leaves, partition
from optaxclip._split import AxisName
from optaxclip.groups import whole
from optaxclip.limits import as_limit

WHERE = "carry_clipped"


class CarryState(NamedTuple):
    """What is carried from update to update. See `carry_clipped`.

    Attributes:
      step: how many updates there were, int32, `()`.
      inner: the state of the clip inside.
      buffer: what was cut off and not yet passed on, with the structure of the parameters: float32 for 16-bit
        leaves, otherwise in the leaf's dtype; a scalar zero for leaves that are not clipped.
      norm: the L2 norm of the buffer, float32, `()`.
      lost: the sum of the norms of what the bound took from the buffer, float32, `()`.
    """

    step: jax.Array
    inner: PyTree
    buffer: PyTree
    norm: jax.Array
    lost: jax.Array


def carry_clipped(
    inner_clip: optax.GradientTransformation,
    *,
    bound: float | jax.Array | None = None,
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds what a clip cuts off to the next update, so that clipping has no bias in the long run.

    $$u_t = \text{clip}(g_t + \Delta_t), \qquad \Delta_{t+1} = g_t + \Delta_t - u_t, \qquad \Delta_0 = 0$$

    All updates that came out and the buffer add up to all that came in, roundings to 16 bits included: they
    are carried too. A spike is not rejected but passed on over many steps, and where the clip is below the
    mean update the buffer grows without end unless it has a bound.

    A step with a NaN or an infinity in it, or in what comes of it, leaves the buffer as it was: the clip gets
    the update alone, and what it makes of that is passed on. Leaves that are not floating point or complex go
    to the clip as they are. The state is one copy of the parameters, in float32 for 16-bit leaves, and three
    scalars.

    Args:
      inner_clip: any transformation, such as `clip_by_global_norm(1.0)` or `clip_by_value(0.1)`.
      bound: the largest L2 norm of the whole buffer, a number or an array of shape `()`. The buffer is scaled
        down to it after each step. What this takes is lost, and the clip has a bias again; `lost` in the
        state says how much. None, as in the paper: no bound.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `CarryState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if `bound` is a negative or NaN number, or `update` gets another tree than `init`.

    References:
      Elesedy and Hutter, [U-Clip: On-Average Unbiased Stochastic Gradient
      Clipping](https://arxiv.org/abs/2302.02971), 2023.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.carry_clipped(oc.clip_by_value(1.0))
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (2.5, 0.0, 0.0, 0.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    ...     print(updates["w"], state.buffer["w"])
    [1.] [1.5]
    [1.] [0.5]
    [0.5] [0.]
    [0.] [0.]
    """
    clip = transformation(WHERE, inner_clip)
    if bound is not None:
        _checks.nonnegative(WHERE, bound=bound)
        if jnp.shape(bound):
            raise ValueError(
                f"{WHERE}: bound has shape {jnp.shape(bound)}. Pass one number: it is for the whole buffer."
            )
    options = checked(WHERE, whole(), _norms.l2(), _responses.clip(), 0.0, "propagate", axis_name, specs)

    def init(params: PyTree) -> CarryState:
        part = partition(options.groups, params)
        buffer = [
            jnp.zeros((), jnp.float32) if place is None else jnp.zeros_like(leaf, _wide(leaf.dtype))
            for leaf, place in zip(part.leaves, part.places, strict=True)
        ]
        step, norm, lost = (jnp.zeros((), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32))
        return CarryState(step, clip.init(params), jax.tree.unflatten(part.treedef, buffer), norm, lost)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        _checks.state("carry_clipped", state, CarryState)
        part = partition(options.groups, updates)
        buffer, treedef = jax.tree.flatten(state.buffer)
        _check(part, named_leaves(state.buffer))
        step = jnp.asarray(optax.safe_increment(state.step))
        if not part.table.names:
            out, inner = clip.update(updates, state.inner, params, **extra_args)
            return out, state._replace(step=step, inner=inner)
        fed, rest, wanted = list(part.leaves), list(buffer), {}
        for k, place in enumerate(part.places):
            if place is not None:
                wanted[k] = fed[k].astype(buffer[k].dtype) + buffer[k]
        sums = [wanted.get(k, leaf) for k, leaf in enumerate(part.leaves)]
        finite = jnp.isfinite(_norm(part, sums, options))
        for k, both in wanted.items():
            # Without the buffer on a bad step: it is kept, and would be passed on twice.
            wanted[k] = jnp.where(finite, both, fed[k].astype(both.dtype))
            fed[k] = _narrow(wanted[k], fed[k].dtype)
        out, inner = clip.update(jax.tree.unflatten(part.treedef, fed), state.inner, params, **extra_args)
        leaves = jax.tree.leaves(out)
        for k, total in wanted.items():
            rest[k] = total - leaves[k].astype(total.dtype)
        rest, norm, lost = _bounded(part, rest, bound, options)
        good = finite & jnp.isfinite(norm)
        new = [jnp.where(good, new, old) for new, old in zip(rest, buffer, strict=True)]
        return out, CarryState(
            step=step,
            inner=inner,
            buffer=jax.tree.unflatten(treedef, new),
            norm=jnp.where(good, norm, state.norm),
            lost=state.lost + jnp.where(good, lost, 0),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def transformation(where: str, inner: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation that a wrapper is given, checked, in a form that takes extra arguments."""
    if not isinstance(inner, optax.GradientTransformation):
        hint = " Call its gradient_transformation()." if hasattr(inner, "gradient_transformation") else ""
        raise TypeError(
            f"{where}: inner is of type {type(inner).__name__}. Pass a transformation of Optax.{hint}"
        )
    return optax.with_extra_args_support(inner)


def _wide(dtype: Any) -> Any:
    """The dtype that a leaf of a dtype is added up in."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else jax.dtypes.canonicalize_dtype(dtype)


def _narrow(wide: jax.Array, dtype: Any) -> jax.Array:
    """A sum in the dtype of its leaf; what is finite stays so, and what does not fit is carried."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if wide.dtype == dtype:
        return wide
    most = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(wide), jnp.clip(wide, -most, most), wide).astype(dtype)


def _check(part: Partition, buffer: Sequence[Leaf]) -> None:
    _checks.same_rows(WHERE, part.paths, (len(buffer),), "leaves")
    for path, leaf, kept, place in zip(part.paths, part.leaves, buffer, part.places, strict=True):
        if path != kept.path:
            raise ValueError(
                f"{WHERE}: the update has leaf {path!r} where the buffer has {kept.path!r}. Pass updates "
                "with the structure that `init` was given."
            )
        if place is not None and leaf.shape != kept.shape:
            raise ValueError(
                f"{WHERE}: the update's leaf {path!r} has shape {leaf.shape}, the buffer has shape "
                f"{kept.shape} there. Pass updates with the structure that `init` was given."
            )


def _norm(part: Partition, leaves: list[Any], options: Options) -> jax.Array:
    part = part._replace(leaves=leaves)
    return measured(part, leaves, table_of(part, options), options).norm[0]


def _bounded(
    part: Partition, leaves: list[Any], bound: Any, options: Options
) -> tuple[list[Any], jax.Array, jax.Array]:
    """A buffer within its bound, its norm, and the norm of what was taken from it."""
    if bound is None:
        norm = single(_norm(part, leaves, options))
        return leaves, norm, jnp.zeros_like(norm)
    part = part._replace(leaves=leaves)
    done = apply(as_limit(bound, WHERE, "bound"), jnp.int32(0), (), part, None, options)
    before, after = done.whole.norm, done.whole.norm_after
    return done.leaves, after, before - after
