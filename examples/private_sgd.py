"""A small classifier of scanned digits, trained with per-example clipping and with noise behind it.

This shows two parts of DP-SGD, clipping and noise, and how to put them together with Optax. It is NOT private
training as it stands: nothing accounts for what is spent (no ε, no δ), batches are drawn uniformly and not by
Poisson sampling, and the adaptive limits follow the exact share of examples within them: for privacy these
shares would need noise too, and their part of the account. Use a library made for it, such as jax-privacy.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optaxclip as oc

Params: TypeAlias = dict[str, dict[str, jax.Array]]

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, and how; `--help` says more."""

    width: int = 32
    batch: int = 64
    steps: int = 400
    learning_rate: float = 0.5
    limit: float = 1.0
    noise_multiplier: float = 2.0
    target: float = 0.5
    rate: float = 0.2
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"64 – {self.width} – {CLASSES} units, tanh; SGD with learning rate {self.learning_rate:g}, "
            f"{self.steps} steps on batches of {self.batch}; limit {self.limit:g}, noise multiplier "
            f"{self.noise_multiplier:g}; adaptive limits with target {self.target:g} and rate {self.rate:g}; "
            f"seed {self.seed}"
        )


class Digits(NamedTuple):
    """Scans of 8 × 8 pixels from 0 to 1, float32 `(scans, 64)`; what they show, int32 `(scans,)`."""

    train_x: jax.Array
    test_x: jax.Array
    train_y: jax.Array
    test_y: jax.Array


class Policy(NamedTuple):
    """A way to clip, and the groups that have a limit each."""

    clip: optax.GradientTransformation
    groups: oc.Groups


class Run(NamedTuple):
    """What came of training.

    Attributes:
      limits: the limits at the last step, by group.
      clipped: the share that was clipped of all examples and groups, over all steps.
      accuracy: the share of unseen scans that are read correctly.
    """

    limits: dict[str, float]
    clipped: float
    accuracy: float


def load(seed: int) -> Digits:
    """The digits of scikit-learn, a fifth of them set aside for the test."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=0.2, random_state=seed, stratify=y)
    train_x, test_x, train_y, test_y = (np.asarray(part) for part in parts)
    return Digits(
        train_x=jnp.asarray(train_x, jnp.float32),
        test_x=jnp.asarray(test_x, jnp.float32),
        train_y=jnp.asarray(train_y, jnp.int32),
        test_y=jnp.asarray(test_y, jnp.int32),
    )


def initial(setting: Setting, inputs: int) -> Params:
    """Two layers with weights of Glorot's size."""
    sizes, rng = {"hidden": (inputs, setting.width), "output": (setting.width, CLASSES)}, _rng(setting, 0)
    return {
        name: {
            "kernel": jnp.asarray(rng.standard_normal(shape) * math.sqrt(2 / sum(shape)), jnp.float32),
            "bias": jnp.zeros(shape[1], jnp.float32),
        }
        for name, shape in sizes.items()
    }


def _rng(setting: Setting, stream: int) -> np.random.Generator:
    return np.random.default_rng([setting.seed, stream])


def logits(params: Params, x: jax.Array) -> jax.Array:
    """The network, for one scan `(64,)` or many `(scans, 64)`."""
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The cross-entropy of one example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


# One gradient for each example: every leaf gets a leading batch axis.
per_example_grads = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))


def policies(setting: Setting) -> dict[str, Policy]:
    """No clipping and five ways to clip. The fixed limits all allow an example a norm of C in all."""
    c, whole, layer = setting.limit, oc.groups.whole(), oc.groups.layer()
    flat = oc.per_example_quantile(setting.target, setting.rate, initial=c)
    by_layer = oc.per_example_quantile(setting.target, setting.rate, initial=c / math.sqrt(2))
    budget = oc.limits.budget
    return {
        "none": Policy(oc.clip_per_example(math.inf, groups=whole), whole),
        "flat": Policy(oc.clip_per_example(c, groups=whole), whole),
        "per layer, uniform": Policy(oc.clip_per_example(budget(c), groups=layer), layer),
        "per layer, by size": Policy(oc.clip_per_example(budget(c, by="size"), groups=layer), layer),
        "adaptive": Policy(oc.clip_per_example(flat, groups=whole), whole),
        "adaptive per layer": Policy(oc.clip_per_example(by_layer, groups=layer), layer),
    }


def noise_scale(multiplier: jax.Array, limits: jax.Array, batch: int) -> jax.Array:
    """The standard deviation of the noise on the mean over a batch.

    One example changes the sum by no more than the norm of all its groups' limits together, so that is what
    the noise is in proportion to.
    """
    return jnp.where(multiplier > 0, multiplier * jnp.linalg.norm(limits) / batch, 0)


def trainer(setting: Setting, clip: Any, data: Digits) -> Callable:
    """A function from parameters, batches and noise multiplier to parameters, limits and share clipped."""
    # Optax's noise has a variance of eta / step**gamma. As a hyperparameter, eta can follow the limits.
    noise = optax.inject_hyperparams(lambda eta: optax.add_noise(eta, 0.0, setting.seed))(eta=0.0)
    sgd = optax.sgd(setting.learning_rate)

    @jax.jit
    def train(params: Params, batches: jax.Array, multiplier: jax.Array):
        def step(carry: Any, batch: jax.Array):
            params, clip_state, noise_state, sgd_state = carry
            grads = per_example_grads(params, data.train_x[batch], data.train_y[batch])
            updates, clip_state = clip.update(grads, clip_state, params)
            scale = noise_scale(multiplier, clip_state.limit, setting.batch)
            noise_state = optax.tree.set(noise_state, eta=scale**2)
            updates, noise_state = noise.update(updates, noise_state, params)
            updates, sgd_state = sgd.update(updates, sgd_state, params)
            params: Any = optax.apply_updates(params, updates)
            return (params, clip_state, noise_state, sgd_state), clip_state.clipped

        start = params, clip.init(params), noise.init(params), sgd.init(params)
        (params, clip_state, *_), shares = jax.lax.scan(step, start, batches)
        return params, clip_state.limit, shares.mean()

    return train


@jax.jit
def accuracy(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The share of scans read correctly; an output that is not finite is no answer, and counts as wrong."""
    outputs = logits(params, x)
    return jnp.mean((outputs.argmax(1) == y) & jnp.isfinite(outputs).all(1))


def run(setting: Setting, policy: Policy, params: Params, data: Digits) -> list[Run]:
    """Trains without and with noise, from the same weights and on the same batches."""
    size = setting.steps, setting.batch
    batches = jnp.asarray(_rng(setting, 1).integers(len(data.train_x), size=size), jnp.int32)
    train = trainer(setting, policy.clip, data)
    names, found = oc.group_norms(params, policy.groups), []
    for multiplier in (0.0, setting.noise_multiplier):
        trained, limits, clipped = train(params, batches, jnp.float32(multiplier))
        found.append(
            Run(
                limits=dict(zip(names, limits.tolist(), strict=True)),
                clipped=float(clipped),
                accuracy=float(accuracy(trained, data.test_x, data.test_y)),
            )
        )
    return found


def table(results: dict[str, list[Run]], setting: Setting) -> Table:
    """The results. Where there is no limit, there is nothing for the noise to be in proportion to."""
    made = Table("clipping", "limit", title="Handwritten digits, clipped per example", pad_edge=False)
    noise = f"{setting.noise_multiplier:g} C / B"
    for heading in "clipped", "test accuracy,\nno noise", f"test accuracy,\nnoise {noise}":
        made.add_column(heading, justify="right")
    for name, (plain, noisy) in results.items():
        limited = all(map(math.isfinite, plain.limits.values()))
        limits = (f"{c:.2g}" if group == "whole" else f"{group} {c:.2g}" for group, c in plain.limits.items())
        made.add_row(
            name,
            ", ".join(limits) if limited else "–",
            f"{plain.clipped:.0%}",
            f"{plain.accuracy:.1%}",
            f"{noisy.accuracy:.1%}" if limited else "–",
        )
    return made


NOTES = (
    "C is the norm of all limits of a policy together, B the batch size. Limits are those of the last step, "
    "and shares are of all examples and groups, both without noise.",
    "No privacy is claimed: nothing accounts for what is spent, and the adaptive limits follow exact shares "
    "of examples, which would need noise too.",
)


def check(setting: Setting) -> None:
    """Refuses what the options' types let through, before any training."""
    for name in ("learning_rate", "limit", "noise_multiplier", "rate"):
        value = getattr(setting, name)
        if not (value > 0 and math.isfinite(value)):
            hint = f"'--{name.replace('_', '-')}'"
            raise typer.BadParameter(f"{value} is not a positive, finite number.", param_hint=hint)
    if not 0 <= setting.target <= 1:
        raise typer.BadParameter(f"{setting.target} is not from 0 to 1.", param_hint="'--target'")


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Where the noise drowns the gradients: --batch 16 --noise-multiplier 4.")
def main(
    width: Annotated[int, typer.Option(min=1, help="Hidden units.")] = Setting.width,
    batch: Annotated[int, typer.Option(min=1, help="B, examples in a batch.")] = Setting.batch,
    steps: Annotated[int, typer.Option(min=1, help="Updates under each policy.")] = Setting.steps,
    learning_rate: Annotated[float, typer.Option(help="Of SGD.")] = Setting.learning_rate,
    limit: Annotated[float, typer.Option(help="C, the largest norm of an example.")] = Setting.limit,
    noise_multiplier: Annotated[
        float, typer.Option(help="Noise on a sum, over C.")
    ] = Setting.noise_multiplier,
    target: Annotated[float, typer.Option(help="Share that adaptive limits leave.")] = Setting.target,
    rate: Annotated[float, typer.Option(help="How fast adaptive limits move.")] = Setting.rate,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of everything drawn.")] = Setting.seed,
) -> None:
    """Trains a small network with per-example clipping, without and with noise, and compares limits.

    Each example's gradient is clipped by itself before the mean over the batch is taken, so that no example
    can do more than its share. The noise behind it is Gaussian, with a standard deviation of the noise
    multiplier times C / B.

    **This is not private training**: it does no accounting (no ε, no δ), and adaptive limits would need noise
    on the shares they follow.
    """
    setting = Setting(width, batch, steps, learning_rate, limit, noise_multiplier, target, rate, seed)
    check(setting)
    console, data = Console(), load(setting.seed)
    params = initial(setting, data.train_x.shape[1])
    named = policies(setting)
    results = {
        name: run(setting, policy, params, data)
        for name, policy in track(named.items(), "Training", console=console, total=len(named))
    }
    console.print(table(results, setting), f"Setting: {setting}.", *NOTES, sep="\n", highlight=False)


if __name__ == "__main__":
    app()
