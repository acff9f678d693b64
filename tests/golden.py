"""Sequences that every method meets, and ways to run them: 240 steps with all that goes wrong in training."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Three spikes, a NaN, an infinity, a zero step, and the step from which everything is ten times as large.
SPIKES, NAN, INF, ZERO, RISE, STEPS = (60, 110, 160), 80, 130, 95, 180, 240
# Leaves of many kinds: only those that are floating point or complex are measured.
MIXED = {
    "layer": {"kernel": jnp.arange(6.0).reshape(2, 3) - 2, "half": jnp.ones((2, 2), jnp.bfloat16)},
    "complex": jnp.array([1 + 2j, 3 - 1j], jnp.complex64),
    "count": jnp.array([1, 2]),
    "flag": jnp.array(True),
    "none": None,
    "empty": jnp.zeros((0, 3)),
}


def norms(seed, median=1.0, spread=0.3, spikes=SPIKES, rise=RISE):
    """One number for each step."""
    values = median * np.exp(spread * np.random.default_rng(seed).normal(size=STEPS))
    values[list(spikes)] *= [30.0, 300.0, 3000.0]
    values[NAN], values[INF], values[ZERO] = np.nan, np.inf, 0.0
    values[rise:] *= 10
    return values.astype(np.float32)


def entries(seed=0, zero=True):
    """Ten entries for each step: spikes are in some or all of them, and what is not finite in one or two."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(STEPS, 10)) * np.exp(rng.normal(size=10))
    for k, step in enumerate(SPIKES):
        steps[step, : 4 + 3 * k] *= [30.0, 300.0, 3000.0][k]
    steps[RISE:] *= 10
    steps[NAN, 2], steps[NAN, 8], steps[INF, 5] = np.nan, np.nan, -np.inf
    if zero:
        steps[ZERO] = 0
    return steps.astype(np.float32)


def tree(flat):
    """Ten entries as a tree of two leaves; leading axes are kept."""
    lead = flat.shape[:-1]
    return {"a": flat[..., :6].reshape(*lead, 2, 3), "b": flat[..., 6:]}


def flat(tree):
    """The ten entries of such a tree."""
    lead = tree["b"].shape[:-1]
    return np.concatenate([np.reshape(tree["a"], (*lead, 6)), tree["b"]], axis=-1)


def scan(tx, grads, params=None):
    """The last state and all updates; parameters are zeros if none are given."""
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), grads) if params is None else params

    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, updates

    return jax.lax.scan(step, tx.init(params), grads)


@functools.cache
def _compiled(tx):
    return jax.jit(functools.partial(scan, tx))


def run(tx, steps, params=None, promotion: Any = "strict"):
    """What comes out of a transformation, step by step, and its last state; Optax mixes dtypes freely."""
    with jax.numpy_dtype_promotion(promotion):
        params = None if params is None else tree(jnp.asarray(params))
        state, out = _compiled(tx)(tree(jnp.asarray(steps)), params)
    return flat(out), state


def scaled_step(tx, state, scale):
    """One step with a multiple of `MIXED`."""

    def scaled(x):
        return x * scale.astype(x.real.dtype).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    updates, state = tx.update(jax.tree.map(scaled, MIXED), state, MIXED)
    return state, updates


def free(tx):
    """A transformation of Optax, which mixes dtypes and ranks freely; this library's code does not."""

    def as_optax_is_written(call):
        def called(*args, **kwargs):
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                return call(*args, **kwargs)

        return called

    tx = optax.with_extra_args_support(tx) if isinstance(tx, optax.GradientTransformation) else tx
    return optax.GradientTransformationExtraArgs(*map(as_optax_is_written, (tx.init, tx.update)))
