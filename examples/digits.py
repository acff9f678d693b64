"""What the examples with frameworks share: scanned digits, batches, and what to print in the end.

It needs scikit-learn: `pip install scikit-learn`.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import optaxclip as oc

LIMIT, BATCH = 0.5, 64


def batches(steps: int, seed: int = 0) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Scans of 8 × 8 pixels, float32 `(64, 64)`, and what they show, int32 `(64,)`."""
    x, y = load_digits(return_X_y=True)
    x = (x - x.mean()) / x.std()
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.integers(len(x), size=BATCH)
        yield jnp.asarray(x[chosen], jnp.float32), jnp.asarray(y[chosen], jnp.int32)


def report(state: Any, params: Any, groups: oc.groups.Groups, losses: list[float], worst: int = 3) -> None:
    """Prints the groups, the loss, and the groups that were clipped most."""
    print(oc.describe(groups, params))
    print(f"loss: {losses[0]:.2f} at first, {np.mean(losses[-10:]):.2f} in the end")
    logs, head = oc.metrics(state, params, groups), "clip/clipped_fraction/"
    shares = {key.removeprefix(head): float(share) for key, share in logs.items() if key.startswith(head)}
    del shares["whole"]
    for name in sorted(shares, key=shares.__getitem__, reverse=True)[:worst]:
        norm = float(logs[f"clip/norm_before/{name}"])
        print(f"{name}: clipped in {shares[name]:.0%} of all steps, last norm {norm:.2g}")
