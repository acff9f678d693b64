"""Small training tasks on real data: where clipping should save the run, and where it should not matter.

Each is set as one would without a thought of clipping: usual weights and learning rates, but for the one
thing that is meant to go wrong, and a cosine decay of the learning rate to zero.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import advice_networks as networks, char_model
from benchmarks.advice_networks import Batch, Params

MOMENTUM = 0.9
RECORDED = 4  # the recording takes this part of a run
LEARNED = 0.75  # of the text; the rest is to judge by
HE = 2**0.5  # the gain that keeps sizes through a ReLU


class Task(NamedTuple):
    """One network, its data and its optimizer.

    Attributes:
      name: a word.
      what: what is meant to happen without clipping.
      optimizer: SGD with `MOMENTUM`, or Adam.
      learning_rate: at the first step.
      steps: updates in a run.
      init: the parameters of a seed.
      loss: of parameters on a batch.
      batches: of a seed; arrays with a leading axis of `steps`.
      evaluate: the final loss: on all examples, or on a fixed part of the text that no batch comes from.
    """

    name: str
    what: str
    optimizer: Literal["sgd", "adam"]
    learning_rate: float
    steps: int
    init: Callable[[int], Params]
    loss: Callable[[Params, Any], jax.Array]
    batches: Callable[[int], Any]
    evaluate: Callable[[Params], jax.Array]

    @property
    def recorded(self) -> int:
        """How many of the first steps are recorded for the advice."""
        return self.steps // RECORDED

    def update_rule(self) -> optax.GradientTransformation:
        """What comes behind the clipping."""
        rate = optax.cosine_decay_schedule(self.learning_rate, self.steps)
        return optax.adam(rate) if self.optimizer == "adam" else optax.sgd(rate, momentum=MOMENTUM)


def _rng(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose])


def _on_batches(
    network: Callable[[Params, Any], jax.Array],
    loss: Callable[[jax.Array, Any], jax.Array],
    data: Batch,
    steps: int,
    batch: int = 32,
) -> dict[str, Any]:
    """The parts of a task that learns from ordinary batches of some data."""
    return {
        "steps": steps,
        "loss": lambda params, batch: loss(network(params, batch.x), batch.y),
        "batches": lambda seed: data.drawn(_rng(seed, 1), steps, batch),
        "evaluate": lambda params: loss(network(params, data.x), data.y),
    }


def _perceptron(sizes: list[int], gain: float) -> Callable[[int], Params]:
    return lambda seed: networks.dense_layers(_rng(seed, 0), sizes, gain)


relu_layers = functools.partial(networks.perceptron, activation=jax.nn.relu)
tanh_layers = functools.partial(networks.perceptron, activation=jnp.tanh)


def deep(steps: int = 2000, depth: int = 12, gain: float = 1.3) -> Task:
    """Digits through 12 ReLU layers, each of which multiplies what it is given by 1.3."""
    return Task(
        name="deep",
        what="every layer's gradient explodes: 12 layers, 1.3 times the usual weights",
        optimizer="sgd",
        learning_rate=0.05,
        init=_perceptron([64, *[32] * (depth - 1), 10], gain * HE),
        **_on_batches(relu_layers, networks.cross_entropy, networks.load("digits"), steps),
    )


def recurrent(steps: int = 1600, width: int = 32, gain: float = 1.2) -> Task:
    """Digits read two pixels at a time, after Pascanu et al., 2013 (https://arxiv.org/abs/1211.5063)."""

    def init(seed: int) -> Params:
        rng = _rng(seed, 0)
        cell = networks.dense(rng, width, width, gain)
        cell["input"] = jnp.asarray(rng.standard_normal((2, width)) / HE, jnp.float32)
        return {"cell": cell, "head": networks.dense(rng, width, 10)}

    return Task(
        name="recurrent",
        what="the recurrent layer's gradient explodes through 32 steps; the head's does not",
        optimizer="sgd",
        learning_rate=0.02,
        init=init,
        **_on_batches(networks.recurrent, networks.cross_entropy, networks.load("digits"), steps),
    )


def embedding(steps: int = 1200, context: int = 8, width: int = 16, size: float = 1e-3) -> Task:
    """The next character of Python's library from the eight before (Bengio et al., 2003)."""
    passages = char_model.text()
    cut = int(LEARNED * len(passages))
    shape = char_model.Shape(context=context, batch=32)

    def init(seed: int) -> Params:
        rng = _rng(seed, 0)
        table = size * rng.standard_normal((char_model.VOCABULARY, width))
        layers = networks.dense_layers(rng, [context * width, 64, char_model.VOCABULARY], 1.0)
        return {"characters": {"embedding": jnp.asarray(table, jnp.float32)}} | layers

    def loss(params: Params, passage: Any) -> jax.Array:
        x = networks.unit(params["characters"]["embedding"][passage[:, :-1]])
        logits = tanh_layers(params, x.reshape(len(passage), -1))
        return networks.cross_entropy(logits, passage[:, -1])

    judged = char_model.batches(passages[cut:], shape._replace(batch=2000), 1, 0)[0]
    return Task(
        name="embedding",
        what="one tensor's gradient is far too large: embeddings start at a thousandth, normalised",
        optimizer="sgd",
        learning_rate=0.1,
        steps=steps,
        init=init,
        loss=loss,
        batches=lambda seed: char_model.batches(passages[:cut], shape, steps, seed),
        evaluate=lambda params: loss(params, judged),
    )


def projection(steps: int = 800) -> Task:
    """Tumours from 30 measurements in their own units, of which some are in the thousands."""

    def init(seed: int) -> Params:
        rng = _rng(seed, 0)
        first = networks.dense(rng, 30, 32, gain=1e-3)
        return {"input": {"kernel": first["kernel"]}} | networks.dense_layers(rng, [32, 32, 32, 2], 1.0)

    def network(params: Params, x: Any) -> jax.Array:
        return tanh_layers(params, networks.unit(x @ params["input"]["kernel"]))

    return Task(
        name="projection",
        what="one tensor's gradient is far too large: the input projection's, on raw units",
        optimizer="adam",
        learning_rate=2e-3,
        init=init,
        **_on_batches(network, networks.cross_entropy, networks.load("breast_cancer", raw=True), steps),
    )


def bad_batches(steps: int = 800, rarity: int = 40, worse: float = 30.0) -> Task:
    """Digits, and one batch in 40 whose pixels were not standardised and whose labels were lost."""
    data = networks.load("digits")
    parts = _on_batches(relu_layers, networks.cross_entropy, data, steps)

    def batches(seed: int) -> Batch:
        rng = _rng(seed, 1)
        x, y = data.drawn(rng, steps, 32)
        bad = rng.random(steps) < 1 / rarity
        x[bad], y[bad] = worse * x[bad], rng.integers(10, size=y[bad].shape)
        return Batch(x, y)

    return Task(
        name="bad_batches",
        what="one batch in 40 is rubbish, and 30 times as large",
        optimizer="adam",
        learning_rate=2e-3,
        init=_perceptron([64, 48, 48, 10], HE),
        **parts,
    )._replace(batches=batches)


def drift(steps: int = 800, last: float = 0.05) -> Task:
    """Digits by the cosine with a vector of each class, over a temperature that falls from 1 to 0.05."""
    data = networks.load("digits")

    def loss(params: Params, batch: tuple[Batch, Any]) -> jax.Array:
        (x, y), temperature = batch
        features = networks.unit(relu_layers(params, x))
        classes = networks.unit(params["classes"]["kernel"])
        return networks.cross_entropy(features @ classes.T / (features.shape[-1] * temperature), y)

    def init(seed: int) -> Params:
        rng = _rng(seed, 0)
        classes = {"kernel": jnp.asarray(rng.standard_normal((10, 32)), jnp.float32)}
        return networks.dense_layers(rng, [64, 48, 48, 32], HE) | {"classes": classes}

    temperatures = np.geomspace(1, last, steps).astype(np.float32)
    return Task(
        name="drift",
        what="norms grow through the run, as a temperature is annealed from 1 to 0.05",
        optimizer="sgd",
        learning_rate=0.05,
        steps=steps,
        init=init,
        loss=loss,
        batches=lambda seed: (data.drawn(_rng(seed, 1), steps, 32), temperatures),
        evaluate=lambda params: loss(params, (data, np.float32(last))),
    )


def calm(steps: int = 800) -> Task:
    """Wines by a small network; nothing goes wrong."""
    return Task(
        name="calm",
        what="nothing goes wrong",
        optimizer="sgd",
        learning_rate=0.05,
        init=_perceptron([13, 16, 3], 1.0),
        **_on_batches(tanh_layers, networks.cross_entropy, networks.load("wine"), steps, batch=16),
    )


def outliers(steps: int = 1200, width: int = 8) -> Task:
    """Diabetes from ten measurements, learned from targets with Student's noise of 1.5 degrees of freedom."""
    data = networks.load("diabetes")
    parts = _on_batches(tanh_layers, networks.squared_error, data, steps)

    def batches(seed: int) -> Batch:
        rng = _rng(seed, 1)
        x, y = data.drawn(rng, steps, 32)
        return Batch(x, y + rng.standard_t(1.5, size=y.shape).astype(np.float32))

    return Task(
        name="outliers",
        what="the noise of the gradients is heavy-tailed, as the noise of the targets is",
        optimizer="sgd",
        learning_rate=0.02,
        init=_perceptron([10, width, 1], 1.0),
        **parts,
    )._replace(batches=batches)


def high_rate(steps: int = 1600) -> Task:
    """Digits with three times the highest learning rate that trains."""
    return Task(
        name="high_rate",
        what="the learning rate is three times too high",
        optimizer="sgd",
        learning_rate=0.3,
        init=_perceptron([64, 48, 48, 48, 10], HE),
        **_on_batches(relu_layers, networks.cross_entropy, networks.load("digits"), steps),
    )


def transformer(steps: int = 400) -> Task:
    """Characters of Python's library by a transformer of one layer."""
    shape = char_model.Shape(width=32, layers=1, heads=2, context=24, batch=8)
    passages = char_model.text()
    cut = int(LEARNED * len(passages))
    judged = char_model.batches(passages[cut:], shape._replace(batch=128), 1, 0)[0]
    return Task(
        name="transformer",
        what="nothing goes wrong",
        optimizer="adam",
        learning_rate=5e-3,
        steps=steps,
        init=lambda seed: char_model.initial(shape, seed),
        loss=lambda params, passages: char_model.loss(params, passages, shape),
        batches=lambda seed: char_model.batches(passages[:cut], shape, steps, seed),
        evaluate=lambda params: char_model.loss(params, judged, shape),
    )


_MAKERS = (deep, recurrent, embedding, projection, bad_batches, drift, calm, outliers, high_rate, transformer)
TASKS: dict[str, Callable[..., Task]] = {make.__name__: make for make in _MAKERS}
