"""A language model of which one tensor's gradient explodes, trained without and with clipping.

The embeddings are badly scaled: they start 100 times too small, and what is read from them is multiplied
by 100. The network computes what it would have computed, but their gradient is 100 times larger and their
weights are 100 times smaller, so beside them a step of SGD is 10,000 times longer. In large models it was a
projection whose gradient of 5e7 made global clipping starve all else:
https://github.com/NVIDIA/Megatron-LM/pull/5431.
"""

import dataclasses
import math
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from exploding_mlp import MOMENTUM, Policy, keep
from exploding_tensor_report import Result, conclusion, figure, lengths, table
from rich.console import Console
from terminal import Bars, check, in_words, show, written

import optaxclip as oc

Params: TypeAlias = dict[str, dict[str, jax.Array]]

CHARACTERS, VOCABULARY = 1_000_000, 128  # ASCII; everything else counts as the last
LEARNED = 0.75  # of the text; the rest is to judge by
CONTEXT, EMBEDDED, WIDTH, BATCH = 12, 24, 128, 32
TENSORS = oc.groups.regex({"embedding": "^embedding/", "others": ".*"})


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, and how; `--help` says more."""

    scale: float = 100.0
    learning_rate: float = 0.02
    steps: int = 1000
    limit: float = 1.0
    seeds: int = 3

    def __str__(self) -> str:
        return (
            f"the next character of Python {sys.version_info.major}.{sys.version_info.minor}'s library from "
            f"{CONTEXT} before, embeddings times {self.scale:g}, two tanh layers of width {WIDTH}; "
            f"SGD with learning rate {self.learning_rate:g} and momentum {MOMENTUM:g}, {self.steps} steps on "
            f"batches of {BATCH}; limit {self.limit:g}; {self.seeds} {'seed' if self.seeds == 1 else 'seeds'}"
        )


class Trace(NamedTuple):
    """One run, step by step: the loss, and which part of the gradients passed the clipping.

    Attributes:
      loss: of the batch, `(steps,)`.
      kept: norm behind over norm before clipping, of the embeddings and of all else, `(steps, 2)`.
    """

    loss: Any
    kept: Any


def text() -> np.ndarray:
    """The first million characters of the standard library, modules in the order of their names, uint8."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found.append(np.minimum(np.frombuffer(path.read_bytes(), np.uint8), VOCABULARY - 1))
        size += len(found[-1])
        if size >= CHARACTERS:
            break
    return np.concatenate(found)[:CHARACTERS]


def passages(characters: np.ndarray, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Passages drawn at random, `(*shape, CONTEXT + 1)`, int32."""
    starts = rng.integers(len(characters) - CONTEXT, size=(*shape, 1))
    return characters[starts + np.arange(CONTEXT + 1)].astype(np.int32)


def initial(scale: float, seed: int) -> Params:
    """Normal weights of the usual sizes, embeddings smaller by `scale`."""
    rng = np.random.default_rng([seed, 0])

    def normal(*shape: int, size: float) -> jax.Array:
        return jnp.asarray(size * rng.standard_normal(shape), jnp.float32)

    def dense(inner: int, outer: int) -> dict[str, jax.Array]:
        kernel = normal(inner, outer, size=1 / math.sqrt(inner))
        return {"kernel": kernel, "bias": jnp.zeros(outer, jnp.float32)}

    return {
        "embedding": {"table": normal(VOCABULARY, EMBEDDED, size=1 / scale)},
        "hidden_1": dense(CONTEXT * EMBEDDED, WIDTH),
        "hidden_2": dense(WIDTH, WIDTH),
        "head": dense(WIDTH, VOCABULARY),
    }


@jax.jit
def mean_loss(params: Params, batch: jax.Array, scale: jax.Array) -> jax.Array:
    """The mean cross-entropy of the last character given those before it, in nats (Bengio et al., 2003)."""
    known, following = batch[:, :-1], batch[:, -1]
    x = (scale * params["embedding"]["table"][known]).reshape(len(batch), -1)
    for name in ("hidden_1", "hidden_2"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()


def policies(setting: Setting, layers: int) -> dict[str, Policy]:
    """No clipping but a recording; and C for all, or C/√G for each of G layers.

    Of 0.2, 0.4, 1 and 2, a C of 1 ends at the lowest loss for both in the default setting.
    """
    c = setting.limit
    each = f"{c / math.sqrt(layers):.2g}/layer"
    return {
        "none": Policy(oc.record(capacity=setting.steps), "–"),
        "global": Policy(oc.clip_by_global_norm(c), f"{c:g} in all"),
        "layerwise": Policy(oc.clip_by_layerwise_norm(oc.limits.budget(c)), each),
    }


def trainer(setting: Setting, clip: optax.GradientTransformation) -> Callable[..., Any]:
    """A function from parameters and batches to trained parameters, optimizer state and `Trace`."""
    optimizer = optax.chain(clip, keep(), optax.sgd(setting.learning_rate, momentum=MOMENTUM))

    def norms(tree: Any) -> jax.Array:
        return jnp.stack(list(oc.group_norms(tree, TENSORS).values()))

    def step(carry: Any, batch: jax.Array):
        params, state = carry
        loss, grads = jax.value_and_grad(mean_loss)(params, batch, setting.scale)
        updates, state = optimizer.update(grads, state, params, value=loss)
        kept = norms(optax.tree.get(state, "Kept").updates) / norms(grads)
        return (optax.apply_updates(params, updates), state), Trace(loss, kept)

    @jax.jit
    def train(params: Params, batches: jax.Array):
        (trained, state), trace = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return trained, state, trace

    return train


class Compared(NamedTuple):
    """All runs by their policies; the recording of the one without clipping, and what it says."""

    results: dict[str, Result]
    losses: dict[str, np.ndarray]
    recording: oc.History
    advice: oc.Advice


def compare(setting: Setting, console: Console) -> Compared:
    """Trains under each policy and then as advised from the first seed, and shows how far it is."""
    characters = text()
    cut = int(LEARNED * len(characters))
    unseen = passages(characters[cut:], np.random.default_rng(0), 4000)
    starts = [initial(setting.scale, seed) for seed in range(setting.seeds)]
    named, results, losses, first = policies(setting, len(starts[0])), {}, {}, {}
    with Bars([*named, "advised"], setting.steps * setting.seeds, console) as bars:

        def run(name: str) -> None:
            report, train = bars.begin(name), trainer(setting, named[name].clip)
            found, traces = [], []
            for seed, start in enumerate(starts):
                rng = np.random.default_rng([seed, 1])
                params, state, trace = train(start, passages(characters[:cut], rng, setting.steps, BATCH))
                first.setdefault(name, state)
                found.append(float(mean_loss(params, unseen, setting.scale)))
                traces.append(jax.device_get(trace))
                report(setting.steps, found[-1])
            losses[name] = np.stack([trace.loss for trace in traces])
            kept = np.median(np.concatenate([trace.kept for trace in traces]), axis=0)
            results[name] = Result(named[name].limit, tuple(found), *map(float, kept))

        for name in named:
            run(name)
        recording = oc.History.from_state(first["none"], starts[0])
        advice = recording.advise(optimizer="sgd", learning_rate=setting.learning_rate)
        named["advised"] = Policy(advice.transformation(), in_words(advice))
        run("advised")
    return Compared(results, losses, recording, advice)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="A setting in which no tensor stands out: --scale 1.")
def main(
    scale: Annotated[float, typer.Option(help="What embeddings are multiplied by.")] = Setting.scale,
    learning_rate: Annotated[float, typer.Option(help="Of SGD.")] = Setting.learning_rate,
    steps: Annotated[int, typer.Option(min=10, help="Updates in each run.")] = Setting.steps,
    limit: Annotated[float, typer.Option(help="C, the norm of the largest update.")] = Setting.limit,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each policy.")] = Setting.seeds,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the recording.")] = Path("out"),
) -> None:
    """Trains a language model with one exploding tensor without clipping and under three policies.

    The network guesses the next character of Python's own library, by SGD with momentum. Its embeddings
    start too small by --scale and are multiplied by it: the function is the usual one, but
    the embeddings' gradient is larger by the scale, and a step beside their weights by its square.

    All policies start from the same weights and see the same batches. Global clipping allows C in all, one
    limit for tensors that need it and for those that do not; layerwise clipping allows C/√G for each of G
    layers. The third is what optaxclip advises from a recording of the run without clipping: to clip the one
    tensor alone.
    """
    setting, console = Setting(scale, learning_rate, steps, limit, seeds), Console()
    check(output, scale=scale, learning_rate=learning_rate, limit=limit)
    found = compare(setting, console)
    picture, recording = (output / f"exploding_tensor.{kind}" for kind in ("png", "npz"))
    drawn = found.losses, found.recording, learning_rate, found.advice
    figure(f"One exploding tensor\n{setting}", *drawn).savefig(picture)
    found.recording.save(recording)
    said = f"Setting: {setting}.", conclusion(found.results, found.advice)
    console.print(table(found.results), *said, sep="\n", highlight=False)
    console.print(lengths(found.recording, learning_rate))
    show(found.advice, console)
    written([picture, recording], learning_rate, console)


if __name__ == "__main__":
    app()
