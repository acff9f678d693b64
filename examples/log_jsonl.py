"""Logs what clipping measures to a file of JSON lines, one object for each step. It needs no other package.

After `python examples/log_jsonl.py log.jsonl`, look at it and ask: `optaxclip show log.jsonl`,
`optaxclip advise log.jsonl`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip as oc

GROUPS = oc.groups.leaf()


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error of two layers."""
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((hidden @ params["output"]["kernel"] - y) ** 2)


def train(steps: int) -> Iterator[dict[str, Any]]:
    """Trains, and yields what there is to log after each step: a flat dict of numbers."""
    rng = np.random.default_rng(0)
    hidden = {"kernel": jnp.asarray(rng.normal(size=(4, 16)), jnp.float32), "bias": jnp.zeros(16)}
    params = {"hidden": hidden, "output": {"kernel": jnp.full((16, 1), 0.1)}}
    optimizer = optax.chain(oc.clip_by_groupwise_norm(1.0, GROUPS), optax.sgd(0.1))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for k in range(steps):
        x = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
        scale = 20.0 if k % 50 == 49 else 1.0  # now and then a bad batch
        y = scale * jnp.sin(x.sum(axis=1, keepdims=True))
        params, state, value = step(params, state, x, y)
        yield {"step": k, "loss": float(value), **oc.metrics(state, params, GROUPS)}


def main(path: Path, steps: int = 200) -> None:
    """Writes a line for each step."""
    with path.open("w", encoding="utf-8") as file:
        for logs in train(steps):
            # Python writes NaN and Infinity, and `History.from_jsonl` reads them; not all other readers do.
            file.write(json.dumps({key: float(value) for key, value in logs.items()}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains, and writes a line of JSON for each step.")
    parser.add_argument("path", type=Path, nargs="?", default=Path("log.jsonl"))
    main(parser.parse_args().path)
