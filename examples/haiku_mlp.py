"""Haiku: each module clipped by its own norm, under the names that Haiku gives."""

import haiku as hk
import jax
import optax
from digits import LIMIT, batches, report

import optaxclip as oc

GROUPS = oc.groups.layer()
MODEL = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([64, 64, 10])(x)))
TX = optax.chain(oc.clip_by_groupwise_norm(LIMIT, GROUPS), optax.sgd(0.1, momentum=0.9))


@jax.jit
def step(params, state, x, y):
    """One update."""

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(MODEL.apply(params, x), y).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = TX.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def main(steps: int = 200) -> None:
    """Trains, and prints what was clipped."""
    losses = []
    params = MODEL.init(jax.random.key(0), next(batches(1))[0])
    state = TX.init(params)
    for x, y in batches(steps):
        params, state, value = step(params, state, x, y)
        losses.append(float(value))
    report(state, params, GROUPS, losses)


if __name__ == "__main__":
    main()
