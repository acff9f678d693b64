"""What is asked of every framework: the right layers and units, steps under jit, a restart."""

import io
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip as oc

LIMIT = 0.05  # low enough for the first steps of every model here to be clipped


def npz(state: Any, like: Any) -> Any:
    """A state, written to a file of NumPy and read back into the structure of another."""
    file = io.BytesIO()
    np.savez(file, *map(np.asarray, jax.tree.leaves(state)))
    file.seek(0)
    with np.load(file) as arrays:
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in arrays])


def rows(params: Any, groups: oc.groups.Groups) -> list[str]:
    """The names of the rows of groups, as logs have them: `layers[3]` where a group has several."""
    return [
        f"{name}[{k}]" if norm.ndim else name
        for name, norm in oc.group_norms(params, groups).items()
        for k in range(norm.size)
    ]


def at(k: int, tree: Any, axis: int = 0) -> list[np.ndarray]:
    """The leaves of one layer, out of arrays that hold several along an axis."""
    return [np.take(np.asarray(x), k, axis) for x in jax.tree.leaves(tree)]


def each(name: str, count: int, select: Callable[[Any], Any], axis: int = 0) -> dict[str, Callable]:
    """Stacked layers as `drops_in` wants them: from the name of each row to its leaves."""
    return {f"{name}[{k}]": lambda tree, k=k: at(k, select(tree), axis) for k in range(count)}


def drops_in(
    params: Any,
    loss: Callable[[Any], jax.Array],
    layers: dict[str, Callable[[Any], Any]],
    groups: oc.groups.Groups | None = None,
    restart: Callable[[Any, Any], Any] = npz,
) -> Any:
    """Trains for some steps, each layer clipped; checks what was measured, and a restart.

    Args:
      params: the parameters.
      loss: a function of them.
      layers: from the names expected of the layers, in order, to how the framework's users get at one.
        Stacked layers have a name for each.
      groups: a grouping in place of `layer()`.
      restart: writes a state and reads it back, given the state and a fresh one.

    Returns:
      The last state.
    """
    groups = oc.groups.layer() if groups is None else groups
    tx = optax.chain(
        oc.record(groups),
        oc.clip_by_groupwise_norm(LIMIT, groups),
        optax.sgd(1.0, momentum=0.9),
    )
    assert rows(params, groups) == list(layers)

    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value, grads

    state = jax.jit(tx.init)(params)
    started = state
    losses = []
    for _ in range(3):
        before = params, state
        params, state, value, grads = step(params, state)
        losses.append(float(value))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, started)
    assert len(traces) == 1
    assert losses[2] < losses[0]

    logs = oc.metrics(state, params, groups)
    history = oc.History.from_state(state, params, groups)
    assert history.loss.tolist() == losses
    assert list(history.names) == list(layers)
    for (name, select), recorded in zip(layers.items(), history.norms[-1], strict=True):
        norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(select(grads))))
        np.testing.assert_allclose(recorded, norm, rtol=1e-5)
        np.testing.assert_allclose(logs[f"clip/norm_before/{name}"], norm, rtol=1e-5)
        np.testing.assert_allclose(logs[f"clip/norm_after/{name}"], min(norm, LIMIT), rtol=1e-5)

    again = step(before[0], restart(before[1], started))
    chex.assert_trees_all_equal(again, (params, state, value, grads))
    return state


def units(
    params: Any, forward: Callable[[Any], jax.Array], groups: oc.groups.Groups
) -> dict[str, np.ndarray]:
    """Which rows of each leaf's groups each output depends on, by the derivative.

    Args:
      params: the parameters.
      forward: from parameters to outputs, with the output units along the last axis.
      groups: a grouping by units.

    Returns:
      From the name of each leaf to a bool array `(outputs, rows)`.
    """
    count = jax.eval_shape(forward, params).shape[-1]

    def row(output):
        grads = jax.grad(lambda params: jnp.sum(forward(params)[..., output]))(params)
        return {name: jnp.atleast_1d(norm) for name, norm in oc.group_norms(grads, groups).items()}

    return jax.tree.map(lambda norms: np.asarray(norms) > 0, jax.jit(jax.vmap(row))(jnp.arange(count)))


def is_unit(found: dict[str, np.ndarray], name: str) -> bool:
    """Whether each output has a row of its own among those of a leaf, in order."""
    return np.array_equal(found[name], np.eye(len(found[name])))


def is_one(found: dict[str, np.ndarray], name: str) -> bool:
    """Whether a leaf is one group, which every output depends on."""
    return found[name].shape[1] == 1 and found[name].all()


def advised(params: Any, spiking: int, groups: oc.groups.Groups | None = None) -> oc.Advice:
    """Advice on a recording of a tree of which one leaf spikes.

    Args:
      params: the tree, which is also every update, but for scales.
      spiking: which leaf, counted in the tree's order.
      groups: a grouping in place of `leaf()`.
    """
    leaves, structure = jax.tree.flatten(params)
    scales = np.exp(0.2 * np.random.default_rng(0).standard_normal((300, len(leaves)), np.float32))
    scales[50::50, spiking] *= 100
    groups = oc.groups.leaf() if groups is None else groups
    tx = oc.record(groups, capacity=300)

    def step(state, scale):
        updates = structure.unflatten([x * s for x, s in zip(leaves, scale, strict=True)])
        return tx.update(updates, state)[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, scales))(tx.init(params))
    return oc.History.from_state(state, params, groups).advise()
