"""Keras 3 on JAX: parameters are a plain list, and the model knows their names."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import optax
from digits import LIMIT, batches, report

import optaxclip as oc


def main(steps: int = 200) -> None:
    """Trains, and prints what was clipped."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, "relu", name=f"hidden_{k}") for k in range(2)]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(10, name="head")], name="mlp")
    groups = oc.groups.layer(names=[v.path for v in model.trainable_variables])
    params = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]
    tx = optax.chain(oc.clip_by_groupwise_norm(LIMIT, groups), optax.sgd(0.1, momentum=0.9))

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits, _ = model.stateless_call(params, rest, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for x, y in batches(steps):
        params, state, value = step(params, state, x, y)
        losses.append(float(value))
    for variable, value in zip(model.trainable_variables, params, strict=True):
        variable.assign(value)
    report(state, params, groups, losses)


if __name__ == "__main__":
    main()
