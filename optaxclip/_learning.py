"""What limits that follow the norms have in common.

All of them learn from norms that are finite and positive and from no others: after a NaN, an infinity or a
zero the state is what it was before, and the next ordinary step meets the limit that it would have met.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _checks
from optaxclip._base import Context, Limit, PyTree


def learning(
    init: Callable[[int], PyTree],
    learn: Callable[[jax.Array, PyTree, Context], PyTree],
    limit: Callable[[jax.Array, PyTree, PyTree, Context], jax.Array],
) -> Limit:
    """A limit with a state of arrays whose first axis is the row.

    Args:
      init: from the number of rows to the state.
      learn: from norms, state and context to the new state, kept only for rows with norms to learn from.
      limit: from norms, the state before, the state after and the context to the limits.
    """

    def update(norm: jax.Array, state: PyTree, ctx: Context) -> tuple[jax.Array, PyTree]:
        known = jnp.isfinite(norm) & (norm > 0)
        single = in_float32(jnp.where(known, norm, 1))

        def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(known.reshape((-1,) + (1,) * (old.ndim - 1)), new.astype(old.dtype), old)

        after = jax.tree.map(chosen, learn(single, state, ctx), state)
        return limit(single, state, after, ctx), after

    return Limit(lambda table: init(len(table.names)), update)


def in_float32(norm: jax.Array) -> jax.Array:
    """Norms as float32: at least its least and at most its largest number, so that none is lost."""
    kind = jnp.finfo(jnp.float32)
    return jnp.clip(norm, float(kind.tiny), float(kind.max)).astype(jnp.float32)


def full(rows: int, value: float) -> jax.Array:
    """A number for each row."""
    return jnp.full((rows,), value, jnp.float32)


def between(low: jax.Array, high: jax.Array, part: float | jax.Array) -> jax.Array:
    """The point between two at a share of the way; also a running mean, of the new, the old and its decay."""
    return low + part * (high - low)


def at_step(value: Any, step: Any) -> jax.Array:
    """A number, an array or a schedule at a step, as float32 or float64."""
    value = jnp.asarray(value(step) if callable(value) else value)
    value = jnp.real(value)  # complex under inject_hyperparams
    return value.astype(jnp.float64 if value.dtype == jnp.float64 else jnp.float32)


def power_mean(new: jax.Array, old: jax.Array, weight: float | jax.Array, power: Any) -> jax.Array:
    """The root of a running mean of powers, without a power that leaves the dtype's range.

    Args:
      new: what to learn, not negative.
      old: the root before.
      weight: how much the new one counts, of 1.
      power: the power; for 1 and 2, known now, without logarithms.
    """
    if _checks.is_number(power) and power == 1:
        return (1 - weight) * old + weight * new
    peak = jnp.maximum(new, old)
    peak = jnp.where(peak > 0, peak, 1)
    a, b = new / peak, old / peak
    if _checks.is_number(power) and power == 2:
        mean = (1 - weight) * b * b + weight * a * a
        return jnp.where(mean > 0, peak * jnp.sqrt(jnp.where(mean > 0, mean, 1)), 0)
    power = at_step(power, 0).astype(old.dtype)
    mean = (1 - weight) * _power(b, power) + weight * _power(a, power)
    return jnp.where(mean > 0, peak * jnp.where(mean > 0, mean, 1) ** (1 / power), 0)


def _power(x: jax.Array, power: jax.Array) -> jax.Array:
    """A positive power, with a derivative of 0 at 0 where it would be infinite."""
    some = x > 0
    return jnp.where(some, jnp.where(some, x, 1) ** power, 0)
