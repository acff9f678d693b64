"""Bad batches, a NaN and a learning rate that is too high: every method on the same runs.

`python -m benchmarks.spikes --help`
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import optaxclip as oc
from benchmarks import char_model, environment, spikes_report, timing
from benchmarks.char_model import Params, Shape
from benchmarks.spikes_report import Row

LIMIT = 1.0
WORSE = 30.0  # what the loss of a bad batch is multiplied by
app = typer.Typer(add_completion=False)


class Setting(NamedTuple):
    """What all runs share.

    Attributes:
      steps: updates in each run.
      seeds: runs of each method.
      learning_rate: Adam's.
      every: a bad batch comes every so many steps.
      shape: the model's.
    """

    steps: int = 400
    seeds: int = 3
    learning_rate: float = 0.02
    every: int = 75
    shape: Shape = Shape()

    @property
    def bad(self) -> np.ndarray:
        """The steps with a bad batch, after the first ones and never at the NaN."""
        steps = np.arange(self.every, self.steps, self.every)
        return steps[steps != self.nan]

    @property
    def nan(self) -> int:
        """The step with a NaN."""
        return self.steps * 7 // 10

    def __str__(self) -> str:
        size = f"{self.shape.layers} layers of width {self.shape.width}, {self.shape.context} characters"
        return (
            f"transformer of {size}, batches of {self.shape.batch}; Adam with learning rate "
            f"{self.learning_rate:g}, {self.steps} steps, {self.seeds} seeds; random characters with "
            f"{WORSE:g} times the loss every {self.every} steps; a NaN at step {self.nan}"
        )


Factory = Callable[[], optax.GradientTransformation]
ZERO: Any = {"nonfinite": "zero"}
CLIPS: dict[str, Factory] = {
    "none": optax.identity,
    "clip_by_value": lambda: oc.clip_by_value(0.003),
    "clip_by_global_norm": lambda: oc.clip_by_global_norm(LIMIT, **ZERO),
    "clip_by_layerwise_norm": lambda: oc.clip_by_layerwise_norm(oc.limits.budget(LIMIT), **ZERO),
    "clip_by_leafwise_norm": lambda: oc.clip_by_leafwise_norm(oc.limits.budget(LIMIT), **ZERO),
    "clip_by_block_rms": lambda: oc.clip_by_block_rms(0.003, **ZERO),
    "adaptive_grad_clip": lambda: oc.adaptive_grad_clip(0.01, **ZERO),
    "normalize_by_global_norm": lambda: oc.normalize_by_global_norm(LIMIT, **ZERO),
    "normalize_by_layerwise_norm": lambda: oc.normalize_by_layerwise_norm(oc.limits.budget(LIMIT), **ZERO),
    "smooth_clip": lambda: oc.smooth_clip(LIMIT, **ZERO),
    "delta_clip": lambda: oc.delta_clip(**ZERO),
    "automatic_clip": lambda: oc.automatic_clip(**ZERO),
    "psac_clip": lambda: oc.psac_clip(**ZERO),
    "autoclip": lambda: oc.autoclip(**ZERO),
    "quantile_clip": lambda: oc.quantile_clip(window=100, **ZERO),
    "zclip": lambda: oc.zclip(**ZERO),
    "zclip_uncapped": lambda: oc.zclip(max_norm=None, **ZERO),
    "adagc": lambda: oc.adagc(**ZERO),
    "clip_by_historical_norm": lambda: oc.clip_by_historical_norm(**ZERO),
    "clip_by_adaptive_quantile": lambda: oc.clip_by_adaptive_quantile(**ZERO),
    "aggc": lambda: oc.aggc(**ZERO),
    "adanorm": lambda: oc.adanorm(**ZERO),
    "gradient_stabilizer": lambda: oc.gradient_stabilizer(**ZERO),
    "normalize_by_running_norm": lambda: oc.normalize_by_running_norm(**ZERO),
    "carry_clipped": lambda: oc.carry_clipped(oc.clip_by_global_norm(LIMIT, **ZERO)),
    "mask_spikes": oc.mask_spikes,
    "adaptive_value_clip": oc.adaptive_value_clip,
    "centralize": oc.centralize,
    "clip_by_spectral_norm": lambda: oc.clip_by_spectral_norm(0.2, **ZERO),
    "clip_singular_values": lambda: oc.clip_singular_values(0.2, **ZERO),
    "soft_clip_singular_values": lambda: oc.soft_clip_singular_values(0.2, **ZERO),
}
# Methods that are no clip in front of Adam: from its learning rate to the whole optimizer. Those that take
# the place of Adam have a learning rate of their own, since their steps are of another size.
WHOLE: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "optax.apply_if_finite": lambda rate: optax.apply_if_finite(optax.adam(rate), 10**6),
    "skip_updates": lambda rate: oc.skip_updates(optax.adam(rate)),
    "skip_updates_each": lambda rate: oc.skip_updates(optax.adam(rate), groups=oc.groups.layer(), each=True),
    "skip_updates_both": lambda rate: oc.skip_updates(optax.adam(rate), watch="both"),
    "stable_adamw": lambda rate: oc.stable_adamw(rate, weight_decay=0.0, **ZERO),
    "reset_momentum": lambda rate: oc.reset_momentum(
        optax.chain(oc.clip_by_global_norm(LIMIT, **ZERO), optax.adam(rate)), 200, 50
    ),
    "stable_spam": lambda rate: optax.chain(
        oc.adaptive_value_clip(), oc.gradient_stabilizer(**ZERO), oc.reset_momentum(optax.adam(rate), 200, 50)
    ),
    "lamb_trust_ratio": lambda rate: optax.chain(
        oc.clip_by_global_norm(LIMIT, **ZERO),
        optax.scale_by_adam(),
        oc.lamb_trust_ratio(),
        optax.scale(-rate),
    ),
    "larc": lambda rate: optax.chain(oc.larc(1.0, **ZERO), optax.sgd(1.0, momentum=0.9)),
    "acclip": lambda rate: optax.chain(oc.acclip(), optax.sgd(1.0)),
}
NAMES = [*CLIPS, *WHOLE]


def optimizer(name: str, learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """Adam behind or inside the method."""
    if name in WHOLE:
        return optax.with_extra_args_support(WHOLE[name](learning_rate))
    return optax.with_extra_args_support(optax.chain(CLIPS[name](), optax.adam(learning_rate)))


class Inputs(NamedTuple):
    """What happens at each step; `factor` multiplies the loss that is learned from."""

    passages: Any
    factor: Any


def inputs(setting: Setting, characters: np.ndarray, seed: int) -> Inputs:
    """Ordinary batches, random characters in the bad ones, and the NaN."""
    passages = np.array(char_model.batches(characters, setting.shape, setting.steps, seed))
    noise = np.random.default_rng([seed, 2]).integers(char_model.VOCABULARY, size=passages.shape)
    passages[setting.bad] = noise[setting.bad]
    factor = np.ones(setting.steps, np.float32)
    factor[setting.bad], factor[setting.nan] = WORSE, np.nan
    return Inputs(passages, factor)


def step(tx: optax.GradientTransformationExtraArgs, shape: Shape, carry: Any, now: Inputs) -> tuple[Any, Any]:
    """One update; returns the loss without the factor."""
    params, state = carry

    def scaled(params: Params) -> tuple[jax.Array, jax.Array]:
        value = char_model.loss(params, now.passages, shape)
        return value * now.factor, value

    (scaled_loss, value), grads = jax.value_and_grad(scaled, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, value=scaled_loss)
    return (optax.apply_updates(params, updates), state), value


def train(name: str, setting: Setting, runs: Inputs, params: Params) -> tuple[np.ndarray, Any]:
    """Losses `(seeds, steps)` and the last states of all seeds."""
    tx = optimizer(name, setting.learning_rate)

    @jax.jit
    @jax.vmap
    def run(params: Params, runs: Inputs) -> Any:
        body = functools.partial(step, tx, setting.shape)
        (_, state), losses = jax.lax.scan(body, (params, tx.init(params)), runs)
        return losses, state

    losses, state = jax.device_get(run(params, runs))
    return losses, state


def acted(state: Any, setting: Setting) -> float | None:
    """In which share of the steps the method changed or dropped an update; None where no state tells.

    Of several in a chain the last tells.
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=_tells) if _tells(x)]
    if not found:
        return None
    match found[-1]:
        case oc.SkipState(total=steps):
            pass
        case oc.RescaleState(whole=whole) | oc.SpectralState(whole=whole):
            steps = whole.clipped
        case last:
            steps = last.clipped
    return float(np.mean(steps)) / setting.steps


def _tells(x: Any) -> bool:
    entries = oc.ClipByValueState | oc.AdaptiveValueClipState | oc.MaskSpikesState | oc.ACClipState
    return isinstance(x, entries | oc.SkipState | oc.RescaleState | oc.SpectralState)


def costs(names: list[str], setting: Setting, runs: Inputs, params: Params, rounds: int) -> dict[str, float]:
    """Seconds per step over those without clipping, in rounds of a random order."""
    now = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), runs)
    first = jax.tree.map(lambda x: x[0], params)
    measures = {}
    for name in dict.fromkeys(["none", *names]):
        tx = optimizer(name, setting.learning_rate)
        compiled = (
            jax.jit(functools.partial(step, tx, setting.shape)).lower((first, tx.init(first)), now).compile()
        )
        measures[name] = functools.partial(_seconds, compiled, (first, tx.init(first)), now)
    samples = timing.interleaved(measures, rounds, seed=0)
    return {name: timing.spread(samples[name], samples["none"]).median for name in names}


def _seconds(compiled: Callable[..., Any], carry: Any, now: Inputs, calls: int = 10) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        carry, _ = compiled(carry, now)
    jax.block_until_ready(carry)
    return (time.perf_counter() - start) / calls


def stacked(trees: list[Any]) -> Any:
    """Trees with one axis more, in front."""
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def compare(names: list[str], setting: Setting, rounds: int, console: Console) -> tuple[list[Row], dict]:
    """The rows of the table, and the losses of each method."""
    characters = char_model.text()
    runs = stacked([inputs(setting, characters, seed) for seed in range(setting.seeds)])
    params = stacked([char_model.initial(setting.shape, seed) for seed in range(setting.seeds)])
    columns = TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rows, losses = [], {}
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("cost per step", total=len(names) + 1)
        cost = costs(names, setting, runs, params, rounds)
        progress.advance(task)
        for name in names:
            progress.update(task, description=name)
            losses[name], state = train(name, setting, runs, params)
            ordinary = np.setdiff1d(np.arange(setting.steps), setting.bad)
            rows.append(
                spikes_report.row(
                    name, losses[name], ordinary, setting.nan, acted(state, setting), cost[name]
                )
            )
            progress.advance(task)
    return rows, losses


@app.command()
def main(
    methods: Annotated[str, typer.Option(help="Names with commas between, or all.")] = "all",
    steps: Annotated[int, typer.Option(min=40, help="Updates in each run.")] = Setting().steps,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = Setting().seeds,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of Adam.")] = Setting().learning_rate,
    every: Annotated[
        int, typer.Option(min=2, help="Steps from one bad batch to the next.")
    ] = Setting().every,
    width: Annotated[int, typer.Option(min=8, help="Of the model; a multiple of 4.")] = Shape().width,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of the cost per step.")] = 9,
    figure: Annotated[Path | None, typer.Option(help="Write the figure to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
) -> None:
    """Trains a small language model on Python's sources under every method, with bad batches and a NaN."""
    names = NAMES if methods == "all" else [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in NAMES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(NAMES)}.", param_hint="'--methods'")
    setting = Setting(steps, seeds, learning_rate, every, Shape(width=width))
    console = Console()
    where = environment.describe() | {"text": f"standard library of Python {sys.version.split()[0]}"}
    rows, losses = compare(names, setting, rounds, console)
    console.print(spikes_report.table(rows), f"Setting: {setting}.", sep="\n", highlight=False)
    if figure is not None:
        spikes_report.figure(losses, setting.bad, setting.nan, str(setting)).savefig(figure)
    if markdown is not None:
        spikes_report.write(markdown, rows, str(setting), where)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.spikes")
