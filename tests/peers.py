"""What the tests beside other packages share: gradients, and what a transformation makes of them."""

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = {"a": (3, 2), "b": (4,)}
STEPS = 200
DRAWN = range(4)  # seeds of trees


def is_shape(x):
    return isinstance(x, tuple)


def drawn(seed):
    """A tree of shapes: dictionaries and lists, up to three keys deep, of arrays of rank 0 to 4."""
    rng = np.random.default_rng(seed)

    def node(depth):
        if depth == 3 or (depth > 0 and rng.random() < 0.5):
            return tuple(map(int, rng.integers(1, 5, size=rng.integers(5))))
        children = [node(depth + 1) for _ in range(rng.integers(2, 4))]
        return children if depth > 0 and rng.random() < 0.5 else {f"k{k}": x for k, x in enumerate(children)}

    return node(0)


def gradients(seed, shapes=SHAPES):
    """200 updates with ordinary noise and three spikes, finite and never zero, float32."""
    rng = np.random.default_rng(seed)
    sizes = 0.3 * np.exp(0.3 * rng.normal(size=STEPS))
    sizes[[60, 90, 150]] *= [20.0, 200.0, 5.0]
    sizes[170:] *= 1.5

    def leaf(shape):
        entries = rng.normal(size=(STEPS, *shape))
        return (sizes.reshape((-1,) + (1,) * len(shape)) * entries).astype(np.float32)

    return jax.tree.map(leaf, shapes, is_leaf=is_shape)


def middle(grads):
    """The median of the norms of updates: as a limit it clips every other one."""
    return float(
        np.median(np.sqrt(sum(np.square(x).reshape(len(x), -1).sum(1) for x in jax.tree.leaves(grads))))
    )


def ours(tx, grads, params=None):
    """The updates of every step, the parameters staying as they are, zeros by default."""
    params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), grads) if params is None else params

    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, updates

    return jax.device_get(jax.jit(lambda grads: jax.lax.scan(step, tx.init(params), grads)[1])(grads))


def walked(tx, grads, params):
    """The parameters after every step of an optimizer."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), params

    start = (params, tx.init(params))
    return jax.device_get(jax.jit(lambda grads: jax.lax.scan(step, start, grads)[1])(grads))


def assert_same(ours, theirs, rtol):
    """The same to a share of each number."""

    def leaf(path, x, y):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=0, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(leaf, ours, theirs)


EXAMPLES = 16
TREE = {"a": {"b": (3,), "w": (4, 3)}, "z": {"w": (3, 2)}}


def examples(seed, size=1.0, shapes=TREE):
    """Gradients of 16 examples whose norms lie around `size`, the last one zeros, float32."""
    rng = np.random.default_rng(seed)
    sizes = 0.25 * size * np.exp(rng.normal(size=EXAMPLES))
    sizes[-1] = 0.0

    def leaf(shape):
        entries = rng.normal(size=(EXAMPLES, *shape))
        return jnp.asarray(entries * sizes.reshape((-1,) + (1,) * len(shape)), jnp.float32)

    return jax.tree.map(leaf, shapes, is_leaf=is_shape)


def clipped(tx, grads):
    """The update and the state after the gradients of one batch."""
    return jax.jit(tx.update)(grads, tx.init(jax.tree.map(lambda x: x[0], grads)))


def assert_close(ours, theirs, rtol=2e-6):
    """The same to a share of the largest entry of each leaf."""

    def leaf(x, y):
        y = np.asarray(y)
        np.testing.assert_allclose(np.asarray(x), y, rtol=rtol, atol=rtol * np.abs(y).max())

    jax.tree.map(leaf, ours, theirs)
