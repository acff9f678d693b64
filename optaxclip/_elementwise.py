"""What no factor per group can express: clipping entry by entry."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _checks
from optaxclip._base import PyTree
from optaxclip._learning import at_step
from optaxclip._partition import partition
from optaxclip._read import times, unit
from optaxclip.groups import whole


class ClipByValueState(NamedTuple):
    """The state of the method, and what it did at the last update. See `clip_by_value`.

    Attributes:
      step: how many updates there were, int32, `()`.
      share: which part of the entries was clipped, float32, `()`.
      clipped: in how many steps any entry was clipped, int32, `()`.
      nonfinite: in how many steps any entry was NaN or infinite, int32, `()`.
    """

    step: jax.Array
    share: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array


def clip_by_value(
    max_delta: float | jax.Array | Callable[[Any], Any],
) -> optax.GradientTransformationExtraArgs:
    r"""Clips every entry to `[-max_delta, max_delta]`, as `optax.clip` does. It changes the direction.

    $$u'_i = \min(\max(u_i, -\delta), \delta)$$

    Infinite entries become the bound, NaN stays NaN; both are counted in the state. Of complex entries the
    modulus is clipped. Dtypes are kept. Leaves that are not floating point or complex pass through.

    Args:
      max_delta: the bound: a number or an array of shape `()`, not negative, or a schedule, a function from
        the number of updates that came before to one of these.

    Returns:
      A transformation with a `ClipByValueState`.

    Raises:
      TypeError: if `max_delta` is none of these.
      ValueError: if it is a negative or NaN number.

    References:
      [optax.clip](https://optax.readthedocs.io/en/latest/api/transformations.html).
      With the schedule `lambda step: (step + 1) ** 0.25`, behind a division by the root of the second moment:
      Taniguchi et al., [ADOPT](https://arxiv.org/abs/2411.02853), 2024.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_value(1.0)
    >>> grads = {"w": jnp.array([3.0, -0.5])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["w"], state.share)
    [ 1.  -0.5] 0.5

    A bound that grows with the steps, as in ADOPT:

    >>> tx = oc.clip_by_value(lambda step: (step + 1) ** 0.25)
    >>> state = tx.init(grads)._replace(step=jnp.int32(15))
    >>> print(tx.update(grads, state)[0]["w"])
    [ 2.  -0.5]
    """
    if not callable(max_delta):
        _checks.nonnegative("clip_by_value", max_delta=max_delta)

    def init(params: PyTree) -> ClipByValueState:
        del params
        step, clipped, nonfinite = (jnp.zeros((), jnp.int32) for _ in range(3))
        return ClipByValueState(step, jnp.zeros((), jnp.float32), clipped, nonfinite)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del params, extra_args
        _checks.state("clip_by_value", state, ClipByValueState)
        part = partition(whole(), updates)
        bound = at_step(max_delta, state.step)
        bound = jnp.maximum(bound, 0)
        leaves, entries = list(part.leaves), 0
        over, bad = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.bool)
        for k, place in enumerate(part.places):
            if place is not None:
                leaf = part.leaves[k]
                leaves[k], outside = _clip(leaf, bound)
                over += jnp.sum(outside, dtype=jnp.float32)
                bad |= jnp.any(~jnp.isfinite(leaf))
                entries += leaf.size
        share = over / np.float32(max(entries, 1))  # a Python number is an int32 to JAX, and too small
        new = ClipByValueState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            share=share,
            clipped=state.clipped + (over > 0).astype(jnp.int32),
            nonfinite=state.nonfinite + bad.astype(jnp.int32),
        )
        return jax.tree.unflatten(part.treedef, leaves), new

    return optax.GradientTransformationExtraArgs(init, update)


def _clip(leaf: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The clipped leaf, and which of its entries were outside."""
    modulus = jnp.abs(leaf)
    bound = bound.astype(modulus.dtype)
    outside = modulus > bound
    if jnp.iscomplexobj(leaf):
        return jnp.where(outside | jnp.isnan(bound), times(unit(leaf), bound), leaf), outside
    return jnp.clip(leaf, -bound, bound), outside
