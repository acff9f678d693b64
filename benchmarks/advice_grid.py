"""Trains the tasks of `advice.py` under every grouping and limit, and remembers what came out."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip as oc
from benchmarks.advice_networks import Params
from benchmarks.advice_tasks import MOMENTUM, Task

# All groupings allow the whole update the same norm, so that a limit means the same in each.
GROUPINGS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "none": lambda limit: optax.identity(),
    "global": oc.clip_by_global_norm,
    "layerwise": lambda limit: oc.clip_by_layerwise_norm(oc.limits.budget(limit)),
    "leafwise": lambda limit: oc.clip_by_leafwise_norm(oc.limits.budget(limit)),
}
# Two a decade, for every task: with usual learning rates the lowest hardly train; the highest hardly clip.
LIMITS = tuple(float(f"{10 ** (k / 2):.2g}") for k in range(-4, 7))


class Cell(NamedTuple):
    """What a policy of the grid came to.

    Attributes:
      grouping: one of `GROUPINGS`.
      limit: on the norm of the whole update; None without clipping.
      finals: the final loss of each seed; infinite where it is not finite.
    """

    grouping: str
    limit: float | None
    finals: list[float]

    @property
    def median(self) -> float:
        """Of the seeds."""
        return float(np.median(self.finals))

    def __str__(self) -> str:
        return self.grouping if self.limit is None else f"{self.grouping} {self.limit:g}"


def train(
    task: Task, tx: optax.GradientTransformation, params: Params, batches: Any
) -> tuple[Params, Any, jax.Array]:
    """One update for each batch; returns parameters, state and losses."""
    optimizer = optax.with_extra_args_support(tx)

    def step(carry: tuple[Params, Any], batch: Any) -> tuple[tuple[Params, Any], jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss  # type: ignore[return-value]

    (params, state), losses = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return params, state, losses


def stacked(trees: Sequence[Any]) -> Any:
    """Trees with one axis more, in front."""
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def finals(
    task: Task, grouping: str, limits: Sequence[float | None], params: Any, batches: Any
) -> np.ndarray:
    """The final losses, `(limits, seeds)`, of parameters and batches stacked by seed; compiles once."""

    def final(limit: Any, params: Params, batches: Any) -> jax.Array:
        tx = optax.chain(GROUPINGS[grouping](limit), task.update_rule())
        return task.evaluate(train(task, tx, params, batches)[0])

    over_seeds = jax.vmap(final, in_axes=(None, 0, 0))
    over_limits = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None)))
    values = jnp.asarray([np.inf if limit is None else limit for limit in limits], jnp.float32)
    return finite_or_inf(over_limits(values, params, batches))


def finite_or_inf(losses: Any) -> np.ndarray:
    """Float64, with infinity for what is not a number."""
    losses = np.asarray(losses, np.float64)
    return np.where(np.isfinite(losses), losses, np.inf)


def fingerprint(task: Task) -> str:
    """A hash of all that a task's results depend on: programs, data and settings."""
    params, batches = task.init(0), task.batches(0)
    first = jax.tree.map(lambda x: x[0], batches)
    programs = [str(jax.make_jaxpr(task.loss)(params, first)), str(jax.make_jaxpr(task.evaluate)(params))]
    judged = f"{float(task.evaluate(params)):.3g}"
    said = [task.optimizer, task.learning_rate, MOMENTUM, task.steps, judged, *programs]
    made = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", repr(said)).encode())
    for leaf in jax.tree.leaves((params, batches)):
        made.update(np.asarray(leaf).tobytes())
    return made.hexdigest()[:16]


class Cache:
    """Final losses by task, grouping, limit and seed, in a JSON file; in memory only without a path."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}

    def _of(self, task: str, settings: str) -> dict[str, float | None]:
        if self.known.get(task, {}).get("settings") != settings:
            self.known[task] = {"settings": settings, "finals": {}}
        return self.known[task]["finals"]

    def get(self, task: str, settings: str, grouping: str, limits: Sequence, seeds: int) -> np.ndarray | None:
        """The losses `(limits, seeds)`, if all are there and of the same settings."""
        known = self._of(task, settings)
        keys = [[f"{grouping}/{limit}/{seed}" for seed in range(seeds)] for limit in limits]
        if not all(key in known for row in keys for key in row):
            return None
        return np.array([[np.inf if known[key] is None else known[key] for key in row] for row in keys])

    def put(self, task: str, settings: str, grouping: str, limits: Sequence, losses: np.ndarray) -> None:
        """Keeps losses `(limits, seeds)`."""
        known = self._of(task, settings)
        for limit, row in zip(limits, losses, strict=True):
            for seed, loss in enumerate(row):
                known[f"{grouping}/{limit}/{seed}"] = float(loss) if np.isfinite(loss) else None
        if self.path is not None:
            new = self.path.with_name(self.path.name + ".new")
            new.write_text(json.dumps(self.known, indent=1))
            new.replace(self.path)


def cells(
    task: Task, limits: Sequence[float], params: Any, batches: Any, cache: Cache, pool: ThreadPoolExecutor
) -> Iterator[list[Cell]]:
    """The grid of a task, a list for each grouping; parameters and batches are stacked by seed."""
    settings, seeds = fingerprint(task), len(jax.tree.leaves(params)[0])

    def row(grouping: str) -> tuple[Sequence[float | None], np.ndarray]:
        some = [None] if grouping == "none" else limits
        known = cache.get(task.name, settings, grouping, some, seeds)
        return some, finals(task, grouping, some, params, batches) if known is None else known

    for grouping, (some, losses) in zip(GROUPINGS, pool.map(row, GROUPINGS), strict=True):
        cache.put(task.name, settings, grouping, some, losses)
        yield [Cell(grouping, limit, list(found)) for limit, found in zip(some, losses, strict=True)]
