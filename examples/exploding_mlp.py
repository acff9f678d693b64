"""A deep network whose gradients explode, trained on scanned digits under six clipping policies.

All policies start from the same weights, see the same batches and may make updates of the same size: from
one limit C on the norm of the whole update follow C/√G for each of G layers or leaves, C/√D for each of D
entries, and for adaptive clipping C over the norm of the first weights. What differs is what shares a limit.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optaxclip as oc

MOMENTUM = 0.9
BATCH = 64
TRAINED = 0.9  # the test accuracy from which on a network counts as trained
CLASSES = 10
COLOURS = {  # Okabe and Ito: told apart by colour-blind readers too
    "none": "#000000",
    "value": "#E69F00",
    "global": "#0072B2",
    "layerwise": "#009E73",
    "leafwise": "#CC79A7",
    "agc": "#D55E00",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, and how; see `--help`."""

    depth: int = 20
    width: int = 64
    gain: float = 1.3
    learning_rate: float = 0.05
    steps: int = 1500
    limit: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.depth} layers of {self.width} units, ReLU, gain {self.gain:g}; SGD with learning rate "
            f"{self.learning_rate:g} and momentum {MOMENTUM:g}, {self.steps} steps on batches of {BATCH}; "
            f"limit {self.limit:g}; seed {self.seed}"
        )


class Digits(NamedTuple):
    """Scans of 8 × 8 pixels as float32 `(scans, 64)`, standardised, and what they show, int32 `(scans,)`."""

    train_x: jax.Array
    test_x: jax.Array
    train_y: jax.Array
    test_y: jax.Array


class Policy(NamedTuple):
    """A transformation to put before the optimizer, and its limit in words."""

    clip: optax.GradientTransformation
    limit: str


class Trace(NamedTuple):
    """What is measured at each step: the loss, each layer's raw gradient norm, the clipped one's cosine."""

    loss: Any
    norms: Any
    cosine: Any


class Result(NamedTuple):
    """One row of the table. Steps count from 1; a cosine is None if no step had one."""

    limit: str
    test_accuracy: float
    final_loss: float
    first_nonfinite_step: int | None
    clipped_share: float
    mean_cosine: float | None


def load(seed: int) -> Digits:
    """The digits of scikit-learn, a fifth of them kept for the test."""
    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=y)
    mean, std = train_x.mean(), train_x.std()
    scans = (jnp.asarray((part - mean) / std, jnp.float32) for part in (train_x, test_x))
    return Digits(*scans, *(jnp.asarray(part, jnp.int32) for part in (train_y, test_y)))


def initial(setting: Setting, inputs: int) -> dict[str, dict[str, jax.Array]]:
    """Weights of He's size times the gain, so that each layer multiplies what it is given by the gain."""
    sizes = [inputs] + [setting.width] * (setting.depth - 1) + [CLASSES]
    keys = jax.random.split(jax.random.key(setting.seed), setting.depth)
    params = {}
    for k, (key, rows, columns) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True), 1):
        kernel = setting.gain * math.sqrt(2 / rows) * jax.random.normal(key, (rows, columns))
        params[f"layer_{k}"] = {"kernel": kernel, "bias": jnp.zeros(columns)}
    return params


def logits(params: dict[str, dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The network: `(scans, 64)` to `(scans, 10)`."""
    for k in range(1, len(params) + 1):
        layer = params[f"layer_{k}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if k < len(params) else x
    return x


def mean_loss(params: dict[str, dict[str, jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def accuracy(params: dict[str, dict[str, jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
    """The share of scans read correctly. An output that is not finite is no answer, so it counts as wrong."""
    outputs = logits(params, x)
    return jnp.mean((outputs.argmax(1) == y) & jnp.isfinite(outputs).all(1))


def policies(setting: Setting, params: Any) -> dict[str, Policy]:
    """All six, with the same limit on the norm of the whole update."""
    c, leaves = setting.limit, jax.tree.leaves(params)
    entry = c / math.sqrt(sum(leaf.size for leaf in leaves))
    layer, leaf = c / math.sqrt(len(params)), c / math.sqrt(len(leaves))
    ratio = c / float(optax.tree.norm(params))
    share = oc.limits.budget(c)
    return {
        "none": Policy(optax.identity(), "–"),
        "value": Policy(oc.clip_by_value(entry), f"{entry:.2g} per entry"),
        "global": Policy(oc.clip_by_global_norm(c), f"{c:.2g} in all"),
        "layerwise": Policy(oc.clip_by_layerwise_norm(share), f"{layer:.2g} per layer"),
        "leafwise": Policy(oc.clip_by_leafwise_norm(share), f"{leaf:.2g} per leaf"),
        "agc": Policy(oc.adaptive_grad_clip(ratio), f"{ratio:.2g} × unit"),
    }


def cosine(a: Any, b: Any) -> jax.Array:
    """The cosine of the angle between two trees; NaN if one is zero or not finite."""

    def unit(tree):
        norm = oc.group_norms(tree, oc.groups.whole())["whole"]  # right where the squares would overflow
        return jax.tree.map(lambda leaf: leaf / norm, tree)

    return optax.tree.vdot(unit(a), unit(b))


def train(
    setting: Setting, clip: optax.GradientTransformation, params: Any, data: Digits, show: Callable
) -> tuple[Any, Any, Trace]:
    """Trains in chunks of one shape, which compile once; `show(steps, loss)` is called after each.

    Returns:
      The parameters, the optimizer's state and the `Trace`, NumPy arrays with a row for each step.
    """
    keep = optax.GradientTransformation(
        lambda params: params, lambda updates, state, params: (updates, updates)
    )
    optimizer = optax.chain(clip, keep, optax.sgd(setting.learning_rate, momentum=MOMENTUM))

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(mean_loss)(params, data.train_x[batch], data.train_y[batch])
        updates, state = optimizer.update(grads, state, params)
        norms = jnp.stack(list(oc.group_norms(grads, oc.groups.layer()).values()))
        trace = Trace(
            loss, norms, cosine(grads, state[1])
        )  # state[1] is what `keep` kept: the clipped update
        return (optax.apply_updates(params, updates), state), trace

    chunk = max(size for size in range(1, 101) if setting.steps % size == 0)
    rng = np.random.default_rng(setting.seed)
    batches = rng.integers(len(data.train_x), size=(setting.steps // chunk, chunk, BATCH))
    run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
    carry, traces = (params, optimizer.init(params)), []
    for batch in batches:
        carry, trace = run(carry, batch)
        traces.append(jax.device_get(trace))
        show(chunk, float(traces[-1].loss[-1]))
    return *carry, jax.tree.map(lambda *parts: np.concatenate(parts), *traces)


def clipped_share(state: Any) -> float:
    """In which share of the steps anything was clipped, from the optimizer's state."""
    value = optax.tree.get(state, "ClipByValueState")
    if value is not None:
        return float(value.clipped / value.step)
    if optax.tree.get(state, "RescaleState") is None:
        return 0.0
    return float(oc.metrics(state)["clip/clipped_fraction/whole"])


def summary(policy: Policy, params: Any, state: Any, trace: Trace, data: Digits) -> Result:
    """The row of the table for one run."""
    bad = np.flatnonzero(~np.isfinite(trace.loss) | ~np.isfinite(trace.norms).all(axis=1))
    cosines = trace.cosine[np.isfinite(trace.cosine)]
    return Result(
        limit=policy.limit,
        test_accuracy=float(accuracy(params, data.test_x, data.test_y)),
        final_loss=float(mean_loss(params, data.train_x, data.train_y)),
        first_nonfinite_step=int(bad[0]) + 1 if bad.size else None,
        clipped_share=clipped_share(state),
        mean_cosine=float(cosines.mean()) if cosines.size else None,
    )


def compare(setting: Setting, console: Console) -> tuple[dict[str, Result], dict[str, Trace]]:
    """Trains under each policy, with a bar for each."""
    data = load(setting.seed)
    params = initial(setting, data.train_x.shape[1])
    results, traces = {}, {}
    columns = TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        named = policies(setting, params)
        bars = {name: progress.add_task(name, False, setting.steps, note="") for name in named}
        for name, policy in named.items():
            bar = bars[name]
            progress.start_task(bar)
            progress.update(bar, note="compiling")

            def show(steps: int, loss: float, bar=bar) -> None:
                progress.update(bar, advance=steps, note=f"loss {loss:.2g}")

            trained, state, traces[name] = train(setting, policy.clip, params, data, show)
            results[name] = summary(policy, trained, state, traces[name], data)
    return results, traces


def table(results: dict[str, Result]) -> Table:
    """The results, with the best accuracy in bold and runs that died in red."""
    made = Table("policy", "limit", title="Digits read by a deep network, by clipping policy")
    for heading in (
        "test accuracy",
        "final loss",
        "first non-\nfinite step",
        "steps\nclipped",
        "mean cosine",
    ):
        made.add_column(heading, justify="right")
    best = max(result.test_accuracy for result in results.values())
    for name, result in results.items():
        died = result.first_nonfinite_step
        made.add_row(
            name,
            result.limit,
            f"{result.test_accuracy:.1%}",
            f"{result.final_loss:.2g}",
            "never" if died is None else str(died),
            f"{result.clipped_share:.0%}",
            "–" if result.mean_cosine is None else f"{result.mean_cosine:.3f}",
            style="red" if died else "bold" if result.test_accuracy == best else None,
        )
    return made


def conclusion(results: dict[str, Result]) -> str:
    """What the table says, in words."""
    without, clipped = results["none"], {name: row for name, row in results.items() if name != "none"}
    best = max(clipped, key=lambda name: clipped[name].test_accuracy)
    trained = [name for name, row in clipped.items() if row.test_accuracy > TRAINED]
    if without.test_accuracy > TRAINED:
        return (
            f"Without clipping the network trains too, to {without.test_accuracy:.1%}: nothing explodes "
            "here. Try a larger --gain or --learning-rate."
        )
    if without.first_nonfinite_step:
        first = (
            f"Without clipping, training is over at step {without.first_nonfinite_step}: no longer finite."
        )
    else:
        first = f"Without clipping, the network stays finite but reads only {without.test_accuracy:.1%}."
    if not trained:
        return f"{first} No policy gets past {TRAINED:.0%}; try a smaller --limit or more --steps."
    return (
        f"{first} {len(trained)} of {len(clipped)} policies train the same network past {TRAINED:.0%} "
        f"({', '.join(trained)}); {best} is best here with {clipped[best].test_accuracy:.1%} of unseen scans."
    )


def bins(steps: int) -> np.ndarray:
    """Where the columns of the figure begin: single steps at first, then ever more of them."""
    return np.unique(np.geomspace(1, steps + 1, 161).astype(int))


def draw_losses(axes: Axes, traces: dict[str, Trace], results: dict[str, Result]) -> None:
    """The loss under each policy, with a cross at the top where a run died."""
    start = max(float(np.nanmax(trace.loss[:1])) for trace in traces.values())
    top = 300 * max(start, math.log(CLASSES))
    axes.axhline(math.log(CLASSES), color="0.5", ls=":", lw=1)
    axes.text(1.03, 0.8 * math.log(CLASSES), "guessing", color="0.35", va="top")
    for name, trace in traces.items():
        died, steps = results[name].first_nonfinite_step, len(trace.loss)
        alive = trace.loss[: died - 1] if died else trace.loss
        starts = bins(steps)[:-1]
        starts = starts[starts <= len(alive)]
        medians = [np.median(part) for part in np.split(alive, starts[1:] - 1)] if len(alive) else []
        label = f"{name}: not finite from step {died}" if died else name
        axes.plot(starts, np.maximum(medians, 1e-9), color=COLOURS[name], lw=3 if died else 1.5, label=label)
        if died:
            axes.plot(died, top, "X", color=COLOURS[name], ms=14, mec="white", clip_on=False, zorder=9)
        axes.set(xscale="log", yscale="log", xlim=(1, steps))
    axes.set(ylim=(None, top), xlabel="step", ylabel="loss of the batch")
    axes.set_title("Training loss (median where steps share a column; ✕ no longer finite)", loc="left")
    axes.legend(loc="upper right", ncols=2)
    axes.grid(color="0.92")


def draw_norms(axes: Axes, name: str, norms: np.ndarray, scale: colors.Normalize, died: int | None) -> Any:
    """The gradient norms of `norms`, `(layers, columns)`; hatched where they are not finite."""
    edges, layers = bins(norms.shape[1]), norms.shape[0]
    largest = np.maximum.reduceat(norms, edges[:-1] - 1, axis=1)
    rows = np.arange(layers + 1) + 0.5
    axes.patch.set(facecolor="0.85", hatch="////", edgecolor="0.6")
    axes.set(xscale="log", xlim=(1, edges[-1]), ylim=(rows[-1], rows[0]))
    axes.set_title(f"{name}: not finite from step {died}" if died else name, loc="left", color=COLOURS[name])
    axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True))
    return axes.pcolormesh(edges, rows, np.ma.masked_invalid(largest), norm=scale, cmap="viridis")


def figure(traces: dict[str, Trace], results: dict[str, Result], setting: Setting) -> Figure:
    """Above, the losses; below, under each policy, the norms of the raw gradients by layer and step."""
    made = Figure(figsize=(13, 11), dpi=130, layout="constrained")
    grid = made.add_gridspec(3, 3, height_ratios=(1.25, 1, 1))
    draw_losses(made.add_subplot(grid[0, :]), traces, results)
    clipped = np.concatenate([trace.norms.ravel() for name, trace in traces.items() if name != "none"])
    clipped = clipped[np.isfinite(clipped) & (clipped > 0)]
    low, high = (np.percentile(clipped, 5), clipped.max()) if clipped.size else (1e-3, 1e3)
    scale, places, image = colors.LogNorm(low, max(high, 10 * low)), [], None
    for k, (name, trace) in enumerate(traces.items()):
        places.append(made.add_subplot(grid[1 + k // 3, k % 3]))
        image = draw_norms(places[-1], name, trace.norms.T, scale, results[name].first_nonfinite_step)
        places[-1].set(
            xlabel="step" if k >= 3 else "", ylabel="layer (the first sees the scan)" if k % 3 == 0 else ""
        )
    made.colorbar(
        image, ax=places, extend="both", label="raw gradient norm of a layer, largest in the column"
    )
    made.suptitle(f"Exploding gradients under six clipping policies\n{setting}", fontsize=12)
    return made


def positive(value: float) -> float:
    """Lets positive, finite numbers through."""
    if not (value > 0 and math.isfinite(value)):
        raise typer.BadParameter(f"{value} is not a positive, finite number.")
    return value


def save(output: Path, setting: Setting, results: dict[str, Result], traces: dict[str, Trace]) -> list[Path]:
    """Writes the figure and the table's numbers; in the JSON file null stands for what is not finite."""
    rows = {name: result._asdict() for name, result in results.items()}
    for row in rows.values():
        row["final_loss"] = row["final_loss"] if math.isfinite(row["final_loss"]) else None
    numbers = {"setting": dataclasses.asdict(setting), "policies": rows}
    picture, text = output / "exploding_mlp.png", output / "exploding_mlp.json"
    figure(traces, results, setting).savefig(picture)
    text.write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return [picture, text]


app = typer.Typer(add_completion=False)
Positive = Annotated[float, typer.Option(callback=positive)]


@app.command(epilog="Where clipping is not needed: --gain 1 --learning-rate 0.003.")
def main(
    depth: Annotated[
        int, typer.Option(min=2, help="Layers. Gradients grow with gain to the power of it.")
    ] = 20,
    width: Annotated[int, typer.Option(min=1, help="Units of each hidden layer.")] = 64,
    gain: Annotated[
        float,
        typer.Option(
            callback=positive, help="What a layer multiplies by at first; 1 is He's initialisation."
        ),
    ] = 1.3,
    learning_rate: Annotated[float, typer.Option(callback=positive, help="Of SGD with momentum 0.9.")] = 0.05,
    steps: Annotated[int, typer.Option(min=10, help="Updates under each policy.")] = 1500,
    limit: Annotated[
        float,
        typer.Option(callback=positive, help="C, the largest norm of a clipped update, the same for all."),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of the weights, batches and test set.")
    ] = 0,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the picture and the numbers.")
    ] = Path("out"),
) -> None:
    """Trains one exploding network without clipping and under five clipping policies, and compares them.

    The network is a deep multi-layer perceptron that reads handwritten digits. With a gain above 1 every layer
    multiplies what it is given, so loss and gradients grow exponentially with depth. All policies start from the
    same weights and see the same batches, and all may make updates of the same size: with C from --limit, global
    clipping allows a norm of C in all, layerwise and leafwise clipping C/√G for each of G layers or leaves,
    clipping by value C/√D for each of D entries, and adaptive clipping (agc) C/‖w‖ of each unit's weights.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{error.strerror}: {output}", param_hint="'--output'") from error
    console = Console()
    setting = Setting(depth, width, gain, learning_rate, steps, limit, seed)
    results, traces = compare(setting, console)
    paths = save(output, setting, results, traces)
    console.print(table(results), str(setting) + ".", conclusion(results), sep="\n", highlight=False)
    console.print("Written:", *paths, highlight=False)


if __name__ == "__main__":
    app()
