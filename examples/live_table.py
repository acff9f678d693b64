"""Training with a live table of the layers that are clipped most.

It needs rich and scikit-learn, in a checkout `pip install -e '.[examples]'`.

`python examples/live_table.py` redraws it in place; where there is no terminal, as in a log of a cluster, a
table is printed now and then.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import LIMIT, batches
from rich.console import Console
from rich.live import Live
from rich.table import Table

import optaxclip as oc

DEPTH, GROUPS = 12, oc.groups.layer()
TX = optax.chain(oc.clip_by_groupwise_norm(LIMIT, GROUPS), optax.sgd(0.02, momentum=0.9))


def initial() -> dict[str, dict[str, jax.Array]]:
    """Layers that each make what they are given larger, the first ones' gradients most."""
    rng, sizes = np.random.default_rng(0), [64] * DEPTH + [10]
    return {
        f"layer_{k + 1}": {
            "kernel": jnp.asarray(
                1.2 * rng.normal(0, (2 / sizes[k]) ** 0.5, (sizes[k], sizes[k + 1])), jnp.float32
            ),
            "bias": jnp.zeros(sizes[k + 1], jnp.float32),
        }
        for k in range(DEPTH)
    }


@jax.jit
def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
    """One update."""

    def loss(params):
        outputs = x
        for k in range(DEPTH):
            layer = params[f"layer_{k + 1}"]
            outputs = (jax.nn.relu(outputs) if k else outputs) @ layer["kernel"] + layer["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = TX.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def table(k: int, loss: float, logs: dict[str, Any], worst: int = 5) -> Table:
    """The layers with the largest norms, of what `oc.metrics` found."""
    head = "clip/norm_before/"
    names = [key.removeprefix(head) for key in logs if key.startswith(head) and not key.endswith("/whole")]
    shown = Table(
        "layer", "norm", "passed on", "clipped", title=f"step {k}, loss {loss:.2f}", title_justify="left"
    )
    for name in sorted(names, key=lambda name: -np.nan_to_num(logs[head + name], nan=np.inf))[:worst]:
        after, share = logs[f"clip/norm_after/{name}"], logs[f"clip/clipped_fraction/{name}"]
        shown.add_row(name, f"{logs[head + name]:.3g}", f"{after:.3g}", f"{share:.0%} of steps")
    return shown


def main(steps: int = 300, console: Console | None = None) -> None:
    """Trains, and reads what was measured every tenth step: more often would hold up the device."""
    console = console or Console()
    params = initial()
    state, every = TX.init(params), 10 if console.is_terminal else 100
    with Live(console=console, auto_refresh=False) as live:
        for k, (x, y) in enumerate(batches(steps), start=1):
            params, state, value = step(params, state, x, y)
            if k % every == 0 or k == steps:
                shown = table(k, float(value), oc.metrics(state, params, GROUPS))
                if console.is_terminal:
                    live.update(shown, refresh=True)
                else:
                    console.print(shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains with a live table.")
    parser.add_argument("steps", type=int, nargs="?", default=300)
    main(parser.parse_args().steps)
