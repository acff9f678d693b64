"""A small causal transformer over characters of Python's own library."""

import math
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Params: TypeAlias = dict[str, dict[str, Any]]

VOCABULARY = 128  # ASCII; everything else counts as the last
CHARACTERS = 2_000_000


class Shape(NamedTuple):
    """How large the model and its batches are."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 48
    batch: int = 16
    vocabulary: int = VOCABULARY


def text() -> np.ndarray:
    """The first two million characters of the standard library, modules in the order of their names."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        raw = np.frombuffer(path.read_bytes(), np.uint8)
        found.append(np.minimum(raw, VOCABULARY - 1))
        size += len(raw)
        if size >= CHARACTERS:
            break
    return np.concatenate(found)[:CHARACTERS]


def batches(characters: np.ndarray, shape: Shape, steps: int, seed: int) -> np.ndarray:
    """Passages drawn at random, `(steps, batch, context + 1)`, uint8."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(len(characters) - shape.context - 1, size=(steps, shape.batch, 1))
    return characters[starts + np.arange(shape.context + 1)]


def initial(shape: Shape, seed: int) -> Params:
    """Normal weights of the usual sizes."""
    rng = np.random.default_rng([seed, 1])

    def dense(inner: int, outer: int, gain: float = 1.0) -> dict[str, jax.Array]:
        kernel = gain / math.sqrt(inner) * rng.standard_normal((inner, outer))
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(outer, jnp.float32)}

    def table(rows: int) -> dict[str, jax.Array]:
        return {"embedding": jnp.asarray(0.1 * rng.standard_normal((rows, shape.width)), jnp.float32)}

    def scale() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(shape.width, jnp.float32)}

    params: Params = {"characters": table(shape.vocabulary), "places": table(shape.context)}
    for k in range(shape.layers):
        params |= {
            f"block_{k}/norm_1": scale(),
            f"block_{k}/qkv": dense(shape.width, 3 * shape.width),
            f"block_{k}/out": dense(shape.width, shape.width, gain=0.5),
            f"block_{k}/norm_2": scale(),
            f"block_{k}/up": dense(shape.width, 4 * shape.width),
            f"block_{k}/down": dense(4 * shape.width, shape.width, gain=0.5),
        }
    return params | {"norm": scale(), "head": dense(shape.width, shape.vocabulary)}


def loss(params: Params, passages: jax.Array, shape: Shape) -> jax.Array:
    """The mean cross-entropy of each next character, in nats; `passages` has shape `(batch, context + 1)`."""
    known, following = passages[:, :-1], passages[:, 1:].astype(jnp.int32)
    x = params["characters"]["embedding"][known] + params["places"]["embedding"]
    for k in range(shape.layers):
        x = x + _attention(params, f"block_{k}", _normal(x, params[f"block_{k}/norm_1"]), shape)
        hidden = jax.nn.gelu(_dense(_normal(x, params[f"block_{k}/norm_2"]), params[f"block_{k}/up"]))
        x = x + _dense(hidden, params[f"block_{k}/down"])
    logits = jax.nn.log_softmax(_dense(_normal(x, params["norm"]), params["head"]))
    return -jnp.mean(jnp.take_along_axis(logits, following[..., None], axis=-1))


def _dense(x: jax.Array, layer: dict[str, Any]) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _normal(x: jax.Array, layer: dict[str, Any]) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * layer["scale"]


def _attention(params: Params, block: str, x: jax.Array, shape: Shape) -> jax.Array:
    batch, context, width = x.shape
    parts = _dense(x, params[f"{block}/qkv"]).reshape(batch, context, 3, shape.heads, -1)
    query, key, value = jnp.moveaxis(parts, 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(width // shape.heads)
    scores = jnp.where(jnp.tril(jnp.ones((context, context), bool)), scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    return _dense(mixed.reshape(batch, context, width), params[f"{block}/out"])
