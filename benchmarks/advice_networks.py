"""Small networks, and real data that ships with scikit-learn and Python, for the tasks of `advice.py`."""

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

Params: TypeAlias = dict[str, dict[str, Any]]

SMOOTHING = 0.1  # of labels; it keeps the lowest loss away from zero, where 2 % of a loss would mean nothing


class Batch(NamedTuple):
    """Examples `(..., batch, features)`, and a class or a target for each, `(..., batch)`."""

    x: Any
    y: Any

    def drawn(self, rng: np.random.Generator, steps: int, batch: int) -> "Batch":
        """A batch for each step, of examples drawn at random."""
        chosen = rng.integers(len(self.x), size=(steps, batch))
        return Batch(self.x[chosen], self.y[chosen])


@functools.cache
def load(name: str, raw: bool = False) -> Batch:
    """`digits`, `wine`, `breast_cancer` or `diabetes` of scikit-learn, all examples.

    Every feature is standardised, or all pixels together. `raw` leaves the units of the source.
    """
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    if not raw:
        axis = None if name == "digits" else 0
        x = (x - x.mean(axis)) / x.std(axis)
    y = ((y - y.mean()) / y.std()).astype(np.float32) if name == "diabetes" else y.astype(np.int32)
    return Batch(x.astype(np.float32), y)


def dense(rng: np.random.Generator, inner: int, outer: int, gain: float = 1.0) -> dict[str, Any]:
    """Normal weights that multiply the size of what they are given by about `gain`."""
    kernel = gain / math.sqrt(inner) * rng.standard_normal((inner, outer))
    return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(outer, jnp.float32)}


def dense_layers(rng: np.random.Generator, sizes: list[int], gain: float) -> Params:
    """`layer_1`, `layer_2` and so on, from each size to the next."""
    return {f"layer_{k}": dense(rng, sizes[k - 1], sizes[k], gain) for k in range(1, len(sizes))}


def apply(layer: dict[str, Any], x: jax.Array) -> jax.Array:
    """`x @ kernel + bias`."""
    return x @ layer["kernel"] + layer["bias"]


def perceptron(params: Params, x: jax.Array, activation: Any) -> jax.Array:
    """The `dense_layers` of the parameters one after the other, the activation between them."""
    last = sum(name.startswith("layer_") for name in params)
    for k in range(1, last):
        x = activation(apply(params[f"layer_{k}"], x))
    return apply(params[f"layer_{last}"], x)


def recurrent(params: Params, x: jax.Array) -> jax.Array:
    """A tanh network that reads `(batch, length)` two numbers at a time, to logits from its last state."""
    cell = params["cell"]

    def read(hidden: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(pair @ cell["input"] + hidden @ cell["kernel"] + cell["bias"]), None

    start = jnp.zeros((len(x), len(cell["bias"])), jnp.float32)
    return apply(params["head"], jax.lax.scan(read, start, jnp.moveaxis(x.reshape(len(x), -1, 2), 1, 0))[0])


def unit(x: jax.Array) -> jax.Array:
    """Rows of root mean square 1."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over the batch, with `SMOOTHING`."""
    labels = optax.smooth_labels(jax.nn.one_hot(y, logits.shape[-1], dtype=jnp.float32), SMOOTHING)
    return jnp.mean(optax.softmax_cross_entropy(logits, labels))


def squared_error(predicted: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over the batch of `(batch, 1)` beside `(batch,)`."""
    return jnp.mean((predicted[:, 0] - y) ** 2)
