"""A small model trained through every disaster at once, for each named method; every step is checked.

`python tests/chaos.py` is the long form: 100,000 updates for each method and policy, restored from
checkpoints at random steps, and processes that are killed while they write one. `--output tests/chaos.md`
writes what came of it to the table there. `tests/test_chaos.py` is the short form.
"""

import argparse
import datetime
import functools
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from promises import (
    CASES,
    CHECKS,
    DTYPES,
    LEAVES,
    LIMITS,
    METHODS,
    PARAMS,
    ROWS,
    SPANS,
    Method,
    Seen,
    checks,
    count,
    flat,
)

import optaxclip as oc

BLOCK = 1000  # updates in one call; the last may be left out

# The run.


class Events(NamedTuple):
    """What happens to the gradients, for each step.

    Attributes:
      inputs: of the model, `(steps, 3)`.
      targets: `(steps, 2)`.
      scale: what each leaf is multiplied by, `(steps, 3)`.
      at: which entry of each leaf is replaced, `(steps, 3)`; -1 for none.
      value: by what, `(steps, 3)`.
    """

    inputs: Any
    targets: Any
    scale: Any
    at: Any
    value: Any


def drawn(seed: int, steps: int) -> Events:
    """Half of the steps are ordinary; the rest is NaN, infinite, zero, overflows, vanishes or spikes."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(7, size=steps, p=[0.5, 0.12, 0.08, 0.1, 0.1, 0.04, 0.06])
    scale = np.exp(rng.normal(size=(steps, 3)) / 2)
    factor = np.ones(steps)
    factor[kind == 3] = 0
    factor[kind == 4] = 10 ** rng.uniform(30, 38.5, (kind == 4).sum())
    factor[kind == 5] = 10 ** rng.uniform(-25, -10, (kind == 5).sum())
    factor[kind == 6] = 10 ** rng.uniform(1, 5, (kind == 6).sum())
    struck = rng.random((steps, 3)) < np.where(rng.random(steps) < 0.3, 1.0, 0.4)[:, None]
    scale = np.minimum(np.where(struck, scale * factor[:, None], scale), 3e38)
    at = np.where(struck & np.isin(kind, (1, 2))[:, None], rng.integers(0, [2, 6, 4], (steps, 3)), -1)
    large = struck[:, :2] & (kind == 4)[:, None] & (rng.random(steps) < 0.5)[:, None]
    at[:, :2] = np.where(large, rng.integers(0, [2, 6], (steps, 2)), at[:, :2])
    value = np.where(kind == 1, np.nan, np.where(kind == 2, rng.choice([-np.inf, np.inf], steps), 3e38))
    value = np.repeat(value[:, None], 3, axis=1)
    data = rng.normal(size=(steps, 3)), rng.normal(size=(steps, 2)), scale
    return Events(*map(np.float32, data), at.astype(np.int32), np.float32(value))


def gradients(params: Any, event: Events) -> Any:
    """Of a network with one hidden layer, and what happens to them."""

    def loss(wide: Any) -> jax.Array:
        hidden = jnp.tanh(event.inputs @ wide["a"]["kernel"] + wide["a"]["bias"])
        return jnp.sum((hidden @ wide["b"]["kernel"] - event.targets) ** 2)

    wide = jax.grad(loss)(jax.tree.map(lambda x: x.astype(jnp.float32), params))
    leaves, treedef = jax.tree.flatten(params)
    made = []
    for k, (grad, leaf) in enumerate(zip(jax.tree.leaves(wide), leaves, strict=True)):
        hit = jnp.arange(leaf.size).reshape(leaf.shape) == event.at[k]
        made.append(jnp.where(hit, event.value[k], grad * event.scale[k]).astype(leaf.dtype))
    return jax.tree.unflatten(treedef, made)


def _split(grads: Any, keep: jax.Array) -> Any:
    """The gradients with zeros where entries are not kept."""
    leaves, treedef = jax.tree.flatten(grads)
    zeroed = [
        jnp.where(keep[start:stop].reshape(leaf.shape), leaf, jnp.zeros_like(leaf))
        for leaf, (start, stop) in zip(leaves, SPANS, strict=True)
    ]
    return jax.tree.unflatten(treedef, zeroed)


class Tally(NamedTuple):
    """What was found.

    Attributes:
      step: how many steps there were.
      broken: how often each promise of `CHECKS` was broken.
      first: at which step first; -1 for never.
      bad: in how many steps something was not finite.
      changed: in how many steps something that was finite was changed.
    """

    step: jax.Array
    broken: jax.Array
    first: jax.Array
    bad: jax.Array
    changed: jax.Array


class Carry(NamedTuple):
    """All that a run consists of, and all that a checkpoint holds."""

    params: Any
    state: Any
    tally: Tally


def start(name: str, policy: str) -> Carry:
    zero, many = jnp.zeros((), jnp.int32), jnp.zeros(len(CHECKS), jnp.int32)
    return Carry(
        PARAMS, METHODS[name].make(1.0, policy).init(PARAMS), Tally(zero, many, many - 1, zero, zero)
    )


def step(method: Method, policy: str, dtype: str, carry: Carry, event: Events) -> Carry:
    """One update, with the same state and zeros in place of what is not finite as well, and all checks."""
    number = jnp.asarray(LIMITS)[carry.tally.step % len(LIMITS)]
    # A schedule is asked for the step; a number comes in the dtype of this part of the run.
    limit = number.astype(dtype) if dtype != "schedule" else lambda at: jnp.asarray(LIMITS)[at % len(LIMITS)]
    tx = method.make(limit, policy)
    grads = gradients(carry.params, event)
    before, ids = flat(grads), np.array(ROWS[method.rows])
    known = jnp.isfinite(before)
    member = jnp.asarray(ids == np.arange(count(method.rows))[:, None])
    rows = ~jnp.any(member & ~known, axis=1)[ids]
    good = rows & ~(method.fixed & jnp.isnan(number))
    clean = _split(grads, rows if method.clean == "row" else known)
    both = jax.tree.map(lambda *x: jnp.stack(x), grads, clean)
    if method.batch:
        ordinary = gradients(carry.params, event._replace(scale=jnp.ones(3), at=jnp.full(3, -1)))
        both = jax.tree.map(lambda x, y: jnp.stack([jnp.stack([y, z, -y / 2]) for z in x]), both, ordinary)
    # One program for both, so that nothing but numbers can make a difference.
    out, new = jax.lax.map(lambda g: tx.update(g, carry.state, carry.params), both)
    (after, other), (new, cleaned) = (
        [jax.tree.map(lambda x: x[k], tree) for k in range(2)]  # noqa: B023
        for tree in (out, new)
    )
    seen = Seen(
        method,
        policy,
        jnp.where(number < 0, 0, number),
        before,
        flat(after),
        flat(other),
        known,
        good,
        flat(carry.params),
        carry.state,
        new,
        cleaned,
    )
    tally = _counted(carry.tally, checks(seen), ~jnp.all(known), jnp.any(good & (seen.after != before)))

    def moved(first: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
        wide = jnp.where(jnp.isnan(u), 0, jnp.tanh(u.astype(jnp.float32)))
        first, p = first.astype(jnp.float32), p.astype(jnp.float32)
        return (p + 0.01 * (first - p) - 1e-3 * wide).astype(u.dtype)

    return Carry(jax.tree.map(moved, PARAMS, carry.params, after), new, tally)


def _counted(tally: Tally, found: dict[str, jax.Array], bad: jax.Array, changed: jax.Array) -> Tally:
    kept = jnp.stack([jnp.asarray(found.get(name, True)) for name in CHECKS])
    return Tally(
        tally.step + 1,
        tally.broken + (~kept).astype(jnp.int32),
        jnp.where(~kept & (tally.first < 0), tally.step, tally.first),
        tally.bad + bad.astype(jnp.int32),
        tally.changed + changed.astype(jnp.int32),
    )


def scanned(name: str, policy: str, dtype: str, carry: Carry, events: Events, stop: Any) -> Carry:
    """A scan over as many steps as there are events, of which those from `stop` on are left out."""

    def body(carry: Carry, event: Events) -> tuple[Carry, None]:
        run = functools.partial(step, METHODS[name], policy, dtype)
        return jax.lax.cond(carry.tally.step < stop, run, lambda carry, event: carry, carry, event), None

    return jax.lax.scan(body, carry, events)[0]


block = jax.jit(scanned, static_argnums=(0, 1, 2))


def advance(name: str, policy: str, dtype: str, carry: Carry, stop: int, size: int, seed: int = 0) -> Carry:
    """Goes on to a step, whichever it is."""
    at = int(carry.tally.step)
    while at < stop:
        events = _window(seed, at, size)
        carry = block(name, policy, dtype, carry, events, np.int32(stop))
        at = min(at + size, stop)
    return carry


@functools.cache
def _stretch(seed: int, number: int) -> Events:
    return drawn(seed * 1_000_003 + number, BLOCK)


def _window(seed: int, first: int, size: int) -> Events:
    """The events from a step on; they depend on the step alone, wherever a run was interrupted."""
    number, offset = divmod(first, BLOCK)
    parts = [_stretch(seed, k) for k in range(number, (first + size - 1) // BLOCK + 1)]
    return Events(*(np.concatenate(x)[offset : offset + size] for x in zip(*parts, strict=True)))


# Checkpoints.


def through_disk(folder: Path, carry: Carry) -> Carry:
    """Saved and restored by Orbax, under a new name."""
    import orbax.checkpoint as ocp  # not wanted by all runs, and slow

    path = Path(tempfile.mkdtemp(dir=folder)).absolute() / "carry"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, carry)
    with ocp.StandardCheckpointer() as checkpointer:
        return plain(checkpointer.restore(path, jax.eval_shape(lambda: carry)))


def plain(tree: Any) -> Any:
    """In NumPy, so that a restored run is the same program."""
    return jax.tree.map(np.asarray, tree)


def differing(a: Any, b: Any) -> list[str]:
    """Which arrays of two trees are not the same to the bit."""
    pairs = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return [
        jax.tree_util.keystr(path)
        for (path, x), y in pairs
        if x.dtype != y.dtype or np.asarray(x).tobytes() != np.asarray(y).tobytes()
    ]


class Result(NamedTuple):
    """What came of a run.

    Attributes:
      method: its name.
      policy: what was to become of rows that are not finite.
      steps: how many updates there were.
      bad: in how many of them something was not finite.
      changed: in how many of them something finite was changed.
      restored: from how many checkpoints it was gone on with.
      broken: what was not kept, and how often and when first.
      seconds: how long it took.
    """

    method: str
    policy: str
    steps: int
    bad: int
    changed: int
    restored: int
    broken: dict[str, tuple[int, int]]
    seconds: float

    def __str__(self) -> str:
        counts = f"{self.steps:>9,} {self.bad:>8,} {self.changed:>8,} {self.restored:>4}"
        head = f"{self.method:28} {self.policy:9} {counts} {self.seconds:6.1f} s"
        return head + "".join(
            f"\n    broken {n:,} times, first at {at:,}: {what}" for what, (n, at) in self.broken.items()
        )

    def row(self) -> str:
        """Of the table that is kept."""
        broken = "; ".join(f"{what}: {n:,} times, first at {at:,}" for what, (n, at) in self.broken.items())
        counts = f"{self.steps:,} | {self.bad:,} | {self.changed:,} | {self.restored}"
        return f"| `{self.method}` | {self.policy} | {counts} | {broken or 'none'} |"


def trial(
    name: str,
    policy: str,
    steps: int,
    cuts: int,
    folder: Path,
    size: int = BLOCK,
    tail: int = 50,
    seed: int = 0,
    dtypes: int = len(DTYPES),
) -> Result:
    """Trains a method, and after each of some random steps goes on both from memory and from checkpoints."""
    began, rng = time.perf_counter(), np.random.default_rng((seed, list(METHODS).index(name)))
    run = functools.partial(advance, name, policy, size=size, seed=seed)
    carry, lost = plain(start(name, policy)), []
    at = np.sort(rng.choice(np.arange(1, steps - tail), cuts, replace=False)) if cuts else []
    first, dtypes = int(rng.integers(len(DTYPES))), dtypes if METHODS[name].fixed else 1
    for k, cut in enumerate((*at, steps)):
        dtype = DTYPES[(first + k % dtypes) % len(DTYPES)]
        carry = run(dtype, carry, int(cut))
        if cut < steps:
            end = int(min([*at[k + 1 : k + 2], cut + tail]))
            again = run(dtype, through_disk(folder, carry), end)
            carry = run(dtype, carry, end)
            lost += differing(carry, again)
    tally = jax.device_get(carry.tally)
    counted = zip(CHECKS.values(), tally.broken.tolist(), tally.first.tolist(), strict=True)
    broken = {what: (n, at) for what, n, at in counted if n}
    if lost:
        broken[f"a restored run is the same to the bit: {sorted(set(lost))}"] = len(lost), 0
    return Result(
        name,
        policy,
        int(tally.step),
        int(tally.bad),
        int(tally.changed),
        len(at),
        broken,
        time.perf_counter() - began,
    )


# Processes that are killed.

STRIDE = 20  # updates between two checkpoints
PATIENCE = 300  # seconds
# An adaptive limit, a recording in the state, and two that hold an optimizer or a buffer.
KILLED = ("adagc", "record", "skip_updates", "carry_clipped")


def manager(folder: Path) -> Any:
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=3))


def train_and_save(name: str, folder: Path) -> None:
    """Goes on from the newest checkpoint, and writes one after the other until it is killed."""
    import orbax.checkpoint as ocp

    carry, at = plain(start(name, "propagate")), 0
    with manager(folder) as kept:
        while True:
            at += STRIDE
            carry = advance(name, "propagate", "float32", carry, at, STRIDE)
            recorded(at).save(folder / "run.npz")
            print(f"saving {at}", flush=True)
            kept.save(at, args=ocp.args.StandardSave(carry))
            print(f"writing {at}", flush=True)


def recorded(at: int) -> oc.History:
    """A recording that takes long enough to write for the process to be killed meanwhile."""
    return oc.History(LEAVES, np.full((30_000, 3), float(at)) + np.random.default_rng(at).random((30_000, 3)))


def killed(name: str, folder: Path, seed: int) -> str:
    """Kills a process while it writes, and goes on from what it left behind; what is wrong, or nothing."""
    rng = np.random.default_rng(seed)
    words = [sys.executable, __file__, "--child", str(folder), "--methods", name]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert child.stdout is not None
    stalled = threading.Timer(PATIENCE, child.terminate)  # which ends it by another signal than is expected
    stalled.start()
    # From the third checkpoint on, when the first is surely there.
    wanted = f"{rng.choice(['saving', 'writing'])} {STRIDE * int(rng.integers(3, 6))}\n"
    for line in child.stdout:
        if line == wanted:
            break
    stalled.cancel()
    time.sleep(rng.uniform(0, 0.05))
    child.send_signal(signal.SIGKILL)
    child.stdout.close()
    if child.wait() != -signal.SIGKILL:
        return f"the process ended by itself, with {child.returncode}"
    return left_behind(name, folder)


def left_behind(name: str, folder: Path) -> str:
    """Whether the newest checkpoint and the recording are what was written last or before."""
    import orbax.checkpoint as ocp

    with manager(folder) as kept:
        at = kept.latest_step()
        if at is None:
            return "there is no checkpoint"
        like = jax.eval_shape(lambda: start(name, "propagate"))
        carry = plain(kept.restore(at, args=ocp.args.StandardRestore(like)))
    run = functools.partial(advance, name, "propagate", "float32", size=STRIDE)
    expected = run(plain(start(name, "propagate")), at)
    wrong = differing(carry, expected) + differing(run(carry, at + STRIDE), run(expected, at + STRIDE))
    history = oc.History.load(folder / "run.npz")
    saved = int(history.norms[0, 0])
    if saved not in (at, at + STRIDE, at + 2 * STRIDE) or differing(history.norms, recorded(saved).norms):
        wrong.append("the recording")
    return ", ".join(wrong)


def table(words: list[str], results: list[Result], killed: list[tuple[str, str]]) -> str:
    """What came of a run, to be kept."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "orbax-checkpoint")]
    return "\n".join(
        [
            "# The long form of the chaos run",
            "",
            f"`python tests/chaos.py {' '.join(words)}`, {datetime.date.today()}: Python "
            f"{platform.python_version()}, {', '.join(versions)}, {jax.devices()[0].platform}.",
            "*Bad* are the steps in which something was not finite, *changed* those in which something that",
            "was finite was changed, *from disk* says from how many checkpoints the run was gone on with,",
            "and *broken* which promises of `tests/promises.py` were not kept.",
            "",
            "| method | policy | steps | bad | changed | from disk | broken |",
            "| --- | --- | ---: | ---: | ---: | ---: | --- |",
            *(result.row() for result in results),
            "",
            "Killed while writing:",
            "",
            "| method | what was left behind |",
            "| --- | --- |",
            *(f"| `{name}` | {wrong or 'the checkpoint before, whole'} |" for name, wrong in killed),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains a small model through every disaster at once.")
    parser.add_argument("--steps", type=int, default=100_000, help="Updates for each method and policy.")
    parser.add_argument("--cuts", type=int, default=8, help="How often to go on from checkpoints.")
    parser.add_argument("--kills", type=int, default=12, help=f"Processes to kill, of {', '.join(KILLED)}.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", type=Path, help="Where to write what came of it, as a table.")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child is not None:
        train_and_save(told.methods[0], told.child)
    print(f"{'method':28} {'policy':9} {'steps':>9} {'bad':>8} {'changed':>8} {'from disk':>4}")
    results, ends = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, policy in CASES:
            if name in told.methods:
                results.append(trial(name, policy, told.steps, told.cuts, Path(folder), seed=told.seed))
                print(results[-1], flush=True)
        of = [name for name in KILLED if name in told.methods]
        for k in range(told.kills if of else 0):
            own, name = Path(folder) / f"killed {k}", of[k % len(of)]
            own.mkdir()
            ends.append((name, killed(name, own, told.seed * 1000 + k)))
            print(
                f"{name} killed while writing, {k}: {ends[-1][1] or 'the checkpoint before is whole'}",
                flush=True,
            )
    if told.output is not None:
        told.output.write_text(table(sys.argv[1:], results, ends), encoding="utf-8")
    return int(any(result.broken for result in results) or any(wrong for _, wrong in ends))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
