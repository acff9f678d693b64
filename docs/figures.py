"""Makes the figures of the documentation, and the numbers and outputs between markers in its pages.

`python docs/figures.py` makes all of them, which takes a few minutes; `python docs/figures.py spike` one. The
benchmarks make their own: `python -m benchmarks.advice`, `python -m benchmarks.spikes`.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import optaxclip as oc

DOCS = Path(__file__).resolve().parent
EXAMPLES = DOCS.parent / "examples"
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7")  # Okabe and Ito's

# Examples that print, and those that draw as well; what a page shows of the others is in it already.
PRINTING = ("private_sgd", "flax_nnx", "flax_linen", "equinox_mlp", "haiku_mlp", "keras_mlp", "live_table")
DRAWING = ("exploding_mlp", "exploding_tensor")

SIZES, DRAWS, SHARE = (4, 16, 64, 256, 1024), 400, 0.05
SPIKE, CALM, AFTER = 30.0, 200, 1000  # how large, after how many steps, and how many follow
LATER = (0, 10, 50, 500, 900)  # steps after it that the table has


def write(page: str, name: str, text: str) -> None:
    """Puts text between the markers of that name."""
    path, marks = DOCS / page, (f"<!-- {name} -->", f"<!-- end of {name} -->")
    before, rest = path.read_text(encoding="utf-8").split(marks[0])
    _, after = rest.split(marks[1])
    path.write_text(f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{after}", encoding="utf-8")


def run(name: str) -> None:
    """Runs an example; what it prints goes into the gallery, and its figure into `images`."""
    bin = str(Path(sys.executable).parent)
    env = os.environ | {"COLUMNS": "100", "PATH": f"{bin}:{os.environ['PATH']}", "KERAS_BACKEND": "jax"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(EXAMPLES / f"{name}.py")]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
        if name in DRAWING:
            shutil.copy(Path(folder) / "out" / f"{name}.png", DOCS / "images")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    lines = [line for line in lines if not re.search(r"━.* \d+:\d+:\d+", line)]  # bars of progress
    write("gallery.md", name, "```text\n{}\n```".format("\n".join(lines).strip("\n")))


def lengths(optimizer: optax.GradientTransformation, grads: np.ndarray) -> np.ndarray:
    """How long the steps of one parameter are under such gradients, over the first one's before the spike."""
    params = jnp.zeros(1)

    def step(state: Any, grad: jax.Array):
        update, state = optimizer.update(grad[None], state, params)
        return state, jnp.abs(update[0])

    _, steps = jax.lax.scan(step, optimizer.init(params), jnp.asarray(grads, jnp.float32))
    return np.asarray(steps / steps[CALM - 1])


def spiked() -> dict[str, dict[str, np.ndarray]]:
    """Steps around a spike, for each optimizer without clipping and with two limits."""
    grads = np.ones(CALM + AFTER)
    grads[CALM] = SPIKE
    optimizers = {"SGD, momentum 0.9": optax.sgd(1.0, momentum=0.9), "Adam": optax.adam(1.0)}
    clips = {
        "no clipping": optax.identity(),
        "limit 2": oc.clip_by_global_norm(2.0),
        "limit 0.1": oc.clip_by_global_norm(0.1),
    }
    return {
        name: {clip: lengths(optax.chain(tx, inner), grads) for clip, tx in clips.items()}
        for name, inner in optimizers.items()
    }


def spike_rows(curves: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """A row of the table for each of `spiked`."""
    return [
        f"| {name} | {clip} | {' | '.join(f'{steps[CALM + k]:.2f}' for k in LATER)} |"
        for name, clips in curves.items()
        for clip, steps in clips.items()
    ]


def spike() -> None:
    """What one spike does to the steps that follow it."""
    curves = spiked()
    made = Figure(figsize=(10, 3.6), dpi=130, layout="constrained")
    drawn: tuple[Axes, Axes] = tuple(made.subplots(1, 2))
    for axes, (name, clips) in zip(drawn, curves.items(), strict=True):
        for (clip, steps), colour in zip(clips.items(), COLOURS, strict=False):
            axes.plot(np.arange(len(steps)) - CALM, steps, color=colour, lw=2, label=clip)
        axes.set(xlabel="steps after the spike", ylabel="length of the step, over before", ylim=(0, None))
        axes.set_title(f"{name}: a gradient {SPIKE:g} times as large, once", loc="left", fontsize=10)
        axes.set_xlim(-20, 60 if "SGD" in name else AFTER)
        axes.grid(color="0.92")
    drawn[0].legend()
    made.savefig(DOCS / "images" / "spike.png")
    head = f"| optimizer | clipping | the step of the spike | {' | '.join(f'{k} later' for k in LATER[1:])} |"
    rule = "| --- | --- |" + " ---: |" * len(LATER)
    write("global-or-layer.md", "spike", "\n".join([head, rule, *spike_rows(curves)]))


def norms_by_size() -> dict[str, np.ndarray]:
    """Norms of gradients at two points of a run, `(sizes, draws)`."""
    sys.path.insert(0, str(EXAMPLES))
    import exploding_mlp as example

    setting = example.Setting(depth=4, gain=1.0, steps=50, learning_rate=0.01)
    data = example.load(0)
    start = example.initial(setting, 64)
    later, _, _ = example.train(setting, optax.identity(), start, data, lambda steps, loss: None)
    norm = jax.jit(lambda params, x, y: optax.tree.norm(jax.grad(example.mean_loss)(params, x, y)))
    rng, found = np.random.default_rng(0), {}
    for name, params in {"at the start": start, "after 50 steps": later}.items():
        draws = [rng.choice(len(data.train_x), (DRAWS, size)) for size in SIZES]
        found[name] = np.array(
            [[norm(params, data.train_x[b], data.train_y[b]) for b in drawn] for drawn in draws]
        )
    return found


def batch_size() -> None:
    """How the norm of a gradient depends on the size of the batch."""
    found = norms_by_size()
    made = Figure(figsize=(7, 3.8), dpi=130, layout="constrained")
    axes = made.subplots()
    for (name, norms), colour in zip(found.items(), COLOURS[1:], strict=False):
        low, middle, high = np.percentile(norms, (5, 50, 95), axis=1)
        axes.plot(SIZES, middle, "o-", color=colour, lw=2, label=name)
        axes.fill_between(SIZES, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="norm of the gradient", xticks=SIZES)
    axes.set_xticklabels(map(str, SIZES))
    axes.minorticks_off()
    axes.set_title("Median, and 5 % to 95 %, of the norm of the gradient", loc="left", fontsize=10)
    axes.grid(color="0.92")
    axes.legend()
    made.savefig(DOCS / "images" / "batch_size.png")
    start, later = found.values()
    limit = np.percentile(later[1], 100 * (1 - SHARE))
    rows = ["| batch | median at the start | median after 50 steps | above the limit after 50 steps |"]
    rows += ["| ---: | ---: | ---: | ---: |"]
    for size, first, last in zip(SIZES, start, later, strict=True):
        rows.append(
            f"| {size} | {np.median(first):.3g} | {np.median(last):.3g} | {np.mean(last > limit):.0%} |"
        )
    write("global-or-layer.md", "batch size", "\n".join(rows))


TASKS: dict[str, Callable[[], None]] = {"spike": spike, "batch_size": batch_size} | {
    name: functools.partial(run, name) for name in (*DRAWING, *PRINTING)
}

if __name__ == "__main__":
    for task in sys.argv[1:] or TASKS:
        print(task, flush=True)
        TASKS[task]()
