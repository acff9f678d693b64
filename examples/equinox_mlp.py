"""Equinox: adaptive gradient clipping by the outputs of its `(out, in)` weights."""

import equinox as eqx
import jax
import optax
from digits import batches, report

import optaxclip as oc

GROUPS = oc.groups.unit("equinox")
TX = optax.chain(oc.adaptive_grad_clip(0.1, groups=GROUPS), optax.sgd(0.1, momentum=0.9))


@eqx.filter_jit
def step(model, state, x, y):
    """One update."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()

    value, grads = eqx.filter_value_and_grad(loss)(model)
    updates, state = TX.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, value


def main(steps: int = 200) -> None:
    """Trains, and prints what was clipped."""
    losses = []
    model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(0))
    state = TX.init(eqx.filter(model, eqx.is_inexact_array))
    for x, y in batches(steps):
        model, state, value = step(model, state, x, y)
        losses.append(float(value))
    report(state, eqx.filter(model, eqx.is_inexact_array), GROUPS, losses)


if __name__ == "__main__":
    main()
