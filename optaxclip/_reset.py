"""Momentum that is forgotten from time to time."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks, groups as _groups
from optaxclip._base import PyTree
from optaxclip._read import times
from optaxclip._walk import (
    real_dtype,
    together,
    walk,
)


class ResetMomentumState(NamedTuple):
    """What is counted, and the state of the optimizer. See `reset_momentum`.

    Attributes:
      step: how many updates there were, int32, `()`.
      since: how many updates there were in this period, int32, `()`.
      resets: how many resets there were, int32, `()`.
      inner: the state of the optimizer.
    """

    step: jax.Array
    since: jax.Array
    resets: jax.Array
    inner: PyTree


def reset_momentum(
    inner: optax.GradientTransformation, period: int = 500, warmup: int = 150
) -> optax.GradientTransformationExtraArgs:
    r"""Lets an optimizer forget its moments every `period` updates, and start again with small steps.

    At update `period`, and every `period` after, those parts of the optimizer's state that hold trees like
    the parameters are put back to what its `init` gives, and so are the counts that stand in one tuple with
    them: Adam takes the bias out of its new moments, not of its old ones. Counts that stand elsewhere, such
    as those of schedules, go on. From the reset the updates are multiplied by

    $$1 - 0.99\,\frac{1 + \cos(\pi k / W)}{2}, \qquad k = 0, 1, \dots, W - 1$$

    for the `warmup` W updates from the reset; there is no warm-up before the first reset. A NaN that an
    optimizer has learned is forgotten too. The state is that of the optimizer and three counts. Put
    `optax.MultiSteps` around it, not inside.

    Args:
      inner: the optimizer.
      period: how many updates there are from one reset to the next.
      warmup: how many updates are scaled down after a reset, at most `period`; 0 for none.

    Returns:
      A transformation with a `ResetMomentumState`. Where `init` of the optimizer reads the values of
      parameters, pass `params` to `update`.

    Raises:
      TypeError: if a number is not an integer.
      ValueError: if a number is outside its range.

    References:
      Huang et al., [SPAM: Spike-Aware Adam with Momentum Reset](https://arxiv.org/abs/2501.06842), 2025. The
      authors' code leaves Adam's count as it is, and the cosine ends one step later.

    >>> import jax.numpy as jnp, optax, optaxclip as oc
    >>> tx = oc.reset_momentum(optax.trace(0.5), period=3, warmup=0)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for _ in range(4):
    ...     updates, state = tx.update({"w": jnp.ones(1)}, state)
    ...     print(updates["w"])
    [1.]
    [1.5]
    [1.]
    [1.5]
    """
    where = "reset_momentum"
    _checks.whole_number(where, least=1, period=period)
    _checks.whole_number(where, warmup=warmup)
    if warmup > period:
        raise ValueError(f"{where}: warmup is {warmup}, above the period of {period}. Pass {period} or less.")
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> ResetMomentumState:
        step, since, resets = (jnp.zeros((), jnp.int32) for _ in range(3))
        return ResetMomentumState(step, since, resets, inner.init(params))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        _checks.state(where, state, ResetMomentumState)
        due = state.since >= period - 1
        since = jnp.where(due, 0, state.since + 1)
        resets = jnp.where(due, optax.safe_increment(state.resets), state.resets)
        fresh = inner.init(updates if params is None else params)
        held = _reset(inner, due, fresh, state.inner)
        updates, held = inner.update(updates, held, params, **extra_args)
        by = 1 - 0.99 * (1 + jnp.cos(math.pi * since.astype(jnp.float32) / max(warmup, 1))) / 2
        by = jnp.where((resets > 0) & (since < warmup), by, 1)
        if warmup:
            walked = walk(where, _groups.whole(), updates, (), lambda x, k: (_scaled(x, by), (), None))
            updates = together(walked.part, walked.made)
        step = jnp.asarray(optax.safe_increment(state.step))
        return updates, ResetMomentumState(step, since, resets, held)

    return optax.GradientTransformationExtraArgs(init, update)


def _scaled(leaf: jax.Array, by: jax.Array) -> jax.Array:
    return times(leaf, by.astype(real_dtype(leaf)))


_MOMENTS, _OTHER = "moments", "other"


def _reset(inner: optax.GradientTransformation, due: jax.Array, fresh: PyTree, state: PyTree) -> PyTree:
    """The state with its moments, and counts next to them, as in `fresh` where that is due."""
    kinds = optax.tree_utils.tree_map_params(
        inner,
        lambda _: _MOMENTS,
        state,
        transform_non_params=lambda _: _OTHER,
        is_leaf=lambda _: True,  # one mark for a whole tree
    )
    marks, structure = jax.tree_util.tree_flatten_with_path(kinds)
    owners = {path[:-1] for path, kind in marks if kind == _MOMENTS}
    chosen = jax.tree.unflatten(structure, [path[:-1] in owners for path, _ in marks])

    def select(choose: bool, old: PyTree, new: PyTree) -> PyTree:
        if not choose:
            return old
        return jax.tree.map(lambda a, b: jnp.where(due, jnp.asarray(b).astype(a.dtype), a), old, new)

    return jax.tree.map(select, chosen, state, fresh)
