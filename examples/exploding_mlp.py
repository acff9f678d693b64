"""A deep network whose gradients explode, trained on scanned digits without and with clipping.

All policies start from the same weights and see the same batches; see `policies`. The last is what
`optaxclip` advises after it saw the run without clipping.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from exploding_mlp_report import Compared, Result, Trace, conclusion, save, table
from jax.flatten_util import ravel_pytree
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from terminal import Bars, check, in_words, show, written

import optaxclip as oc

Params: TypeAlias = dict[str, dict[str, jax.Array]]

MOMENTUM, BATCH, CLASSES = 0.9, 64, 10


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, and how; `--help` says more."""

    depth: int = 20
    width: int = 64
    gain: float = 1.3
    learning_rate: float = 0.05
    steps: int = 1200
    limit: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.depth} layers of width {self.width}, ReLU, gain {self.gain:g}; SGD with learning rate "
            f"{self.learning_rate:g} and momentum {MOMENTUM:g}, {self.steps} steps on batches of {BATCH}; "
            f"limit {self.limit:g}; seed {self.seed}"
        )


class Digits(NamedTuple):
    """Scans of 8 × 8 pixels, standardised, float32 `(scans, 64)`; what they show, int32 `(scans,)`."""

    train_x: jax.Array
    test_x: jax.Array
    train_y: jax.Array
    test_y: jax.Array


class Policy(NamedTuple):
    """A transformation to put before the optimizer, and its limit in words."""

    clip: optax.GradientTransformation
    limit: str


class Kept(NamedTuple):
    """The state of `keep`."""

    updates: Any


def load(seed: int) -> Digits:
    """The digits of scikit-learn, a fifth of them set aside for the test."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=y)
    train_x, test_x, train_y, test_y = (np.asarray(part) for part in parts)
    train_x, test_x = ((part - train_x.mean()) / train_x.std() for part in (train_x, test_x))
    return Digits(
        train_x=jnp.asarray(train_x, jnp.float32),
        test_x=jnp.asarray(test_x, jnp.float32),
        train_y=jnp.asarray(train_y, jnp.int32),
        test_y=jnp.asarray(test_y, jnp.int32),
    )


def initial(setting: Setting, inputs: int) -> Params:
    """Weights of He's size times the gain: each layer multiplies what it is given by about the gain."""
    sizes = [inputs] + [setting.width] * (setting.depth - 1) + [CLASSES]
    rng, params = np.random.default_rng(setting.seed), {}
    for k in range(setting.depth):
        kernel = setting.gain * math.sqrt(2 / sizes[k]) * rng.standard_normal((sizes[k], sizes[k + 1]))
        bias = jnp.zeros(sizes[k + 1], jnp.float32)
        params[f"layer_{k + 1}"] = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": bias}
    return params


def logits(params: Params, x: jax.Array) -> jax.Array:
    """The network: `(scans, 64)` to `(scans, 10)`."""
    for k in range(1, len(params) + 1):
        x = x @ params[f"layer_{k}"]["kernel"] + params[f"layer_{k}"]["bias"]
        x = jax.nn.relu(x) if k < len(params) else x
    return x


@jax.jit
def mean_loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


@jax.jit
def accuracy(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The share of scans read correctly; an output that is not finite is no answer, and counts as wrong."""
    outputs = logits(params, x)
    return jnp.mean((outputs.argmax(1) == y) & jnp.isfinite(outputs).all(1))


def policies(setting: Setting, params: Params) -> dict[str, Policy]:
    """No clipping but a recording, and five policies that allow the whole update a norm of C.

    That is C/√G for each of G layers or leaves and C/√D for each of D entries. Adaptive clipping, whose
    limits follow the weights, allows C in all for the weights at the start.
    """
    c, leaves = setting.limit, jax.tree.leaves(params)
    layer, leaf = c / math.sqrt(len(params)), c / math.sqrt(len(leaves))
    entry = c / math.sqrt(sum(leaf.size for leaf in leaves))
    ratio = c / float(optax.tree.norm(params))
    return {
        "none": Policy(oc.record(capacity=setting.steps), "–"),
        "value": Policy(oc.clip_by_value(entry), f"{entry:.2g}/entry"),
        "global": Policy(oc.clip_by_global_norm(c), f"{c:g} in all"),
        "layerwise": Policy(oc.clip_by_layerwise_norm(oc.limits.budget(c)), f"{layer:.2g}/layer"),
        "leafwise": Policy(oc.clip_by_leafwise_norm(oc.limits.budget(c)), f"{leaf:.2g}/leaf"),
        "agc": Policy(oc.adaptive_grad_clip(ratio), f"{ratio:.2g}×unit"),
    }


def keep() -> optax.GradientTransformation:
    """Changes nothing, and keeps in its state what passes: behind clipping, the clipped update."""

    def update(updates, state, params=None):
        del state, params
        return updates, Kept(updates)

    return optax.GradientTransformation(lambda params: Kept(params), update)


def cosine(a: Any, b: Any) -> jax.Array:
    """The cosine of the angle between two trees; NaN if one is zero or not finite."""

    def unit(tree):
        entries, _ = ravel_pytree(tree)
        entries /= jnp.max(jnp.abs(entries))  # so that no square overflows
        return entries / jnp.linalg.norm(entries)

    return jnp.vdot(unit(a), unit(b))


def train(
    setting: Setting, clip: optax.GradientTransformation, params: Params, data: Digits, report: Callable
) -> tuple[Params, Any, Trace]:
    """Trains in chunks of one size, so that they compile once; calls `report(steps, loss)` after each.

    Returns:
      The parameters, the optimizer's state, and the `Trace` as NumPy arrays with a row for each step.
    """
    optimizer = optax.chain(clip, keep(), optax.sgd(setting.learning_rate, momentum=MOMENTUM))

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(mean_loss)(params, data.train_x[batch], data.train_y[batch])
        updates, state = optimizer.update(grads, state, params, value=loss)
        norms = jnp.stack(list(oc.group_norms(grads, oc.groups.layer()).values()))
        clipped = optax.tree.get(state, "Kept").updates
        return (optax.apply_updates(params, updates), state), Trace(loss, norms, cosine(grads, clipped))

    chunk = max(size for size in range(1, 101) if setting.steps % size == 0)
    rng = np.random.default_rng([setting.seed, 1])
    batches = rng.integers(len(data.train_x), size=(setting.steps // chunk, chunk, BATCH))
    run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
    state: Any = optimizer.init(params)
    traces = []
    for batch in batches:
        (params, state), trace = run((params, state), batch)
        traces.append(jax.device_get(trace))
        report(chunk, float(traces[-1].loss[-1]))
    return params, state, Trace(*map(np.concatenate, zip(*traces, strict=True)))


def clipped_share(state: Any) -> float:
    """In which share of the steps anything was clipped, by the optimizer's state."""
    if (value := optax.tree.get(state, "ClipByValueState")) is not None:
        return float(value.clipped / value.step)
    if optax.tree.get(state, "RescaleState") is None:
        return 0.0
    return float(oc.metrics(state)["clip/clipped_fraction/whole"])


def summary(policy: Policy, params: Params, state: Any, trace: Trace, data: Digits) -> Result:
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


def compare(setting: Setting, console: Console) -> Compared:
    """Trains under each policy and then as advised, and shows how far it is."""
    data = load(setting.seed)
    params = initial(setting, data.train_x.shape[1])
    named, states, results, traces = policies(setting, params), {}, {}, {}
    with Bars([*named, "advised"], setting.steps, console) as bars:

        def run(name: str) -> None:
            report = bars.begin(name)
            trained, states[name], traces[name] = train(setting, named[name].clip, params, data, report)
            results[name] = summary(named[name], trained, states[name], traces[name], data)

        for name in named:
            run(name)
        recording = oc.History.from_state(states["none"], params)
        advice = recording.advise(optimizer="sgd", learning_rate=setting.learning_rate)
        named["advised"] = Policy(advice.transformation(), in_words(advice))
        run("advised")
    return Compared(results, traces, recording, advice)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="A setting that needs no clipping: --gain 1 --learning-rate 0.003.")
def main(
    depth: Annotated[int, typer.Option(min=2, help="Layers, from scan to answer.")] = Setting.depth,
    width: Annotated[int, typer.Option(min=1, help="Units of each hidden layer.")] = Setting.width,
    gain: Annotated[float, typer.Option(help="What a layer multiplies by at first.")] = Setting.gain,
    learning_rate: Annotated[float, typer.Option(help="Of SGD.")] = Setting.learning_rate,
    steps: Annotated[int, typer.Option(min=10, help="Updates under each policy.")] = Setting.steps,
    limit: Annotated[float, typer.Option(help="C, the norm of the largest update.")] = Setting.limit,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of weights and batches.")] = Setting.seed,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the numbers.")] = Path("out"),
) -> None:
    """Trains one exploding network without clipping and under six clipping policies, and compares them.

    The network is a deep multi-layer perceptron that learns to read handwritten digits by SGD with momentum.
    With a gain of 1 layers keep the size of what they are given; above 1, loss and gradients grow
    with the gain to the power of the depth.

    All start from the same weights and see the same batches. Five policies allow the whole update a norm of
    C:
    global clipping C in all, layerwise and leafwise clipping C/√G for each of G layers or leaves, clipping by
    value C/√D for each of D entries. Adaptive clipping (agc) allows each unit a share of its weights' norm.

    The sixth is not told C. The run without clipping is recorded, and what optaxclip advises from that
    recording is printed with its reasons, and tried. `optaxclip` shows, plots and advises on the recording.
    """
    setting, console = Setting(depth, width, gain, learning_rate, steps, limit, seed), Console()
    check(output, gain=gain, learning_rate=learning_rate, limit=limit)
    found = compare(setting, console)
    paths = save(output, setting, found, guessing=math.log(CLASSES))
    said = f"Setting: {setting}.", conclusion(found.results)
    console.print(table(found.results), *said, sep="\n", highlight=False)
    show(found.advice, console)
    written(paths, learning_rate, console)


if __name__ == "__main__":
    app()
