"""Flax linen: a `TrainState`, and layers that are scanned over, each clipped by its own norm."""

import jax
import optax
from digits import LIMIT, batches, report
from flax import linen as nn
from flax.training.train_state import TrainState

import optaxclip as oc


class Block(nn.Module):
    """What is scanned over."""

    @nn.compact
    def __call__(self, x, _):
        """A hidden layer."""
        return nn.relu(nn.Dense(64)(x)), None


class Classifier(nn.Module):
    """Four hidden layers in one array, and a head."""

    @nn.compact
    def __call__(self, x):
        """From scans to logits."""
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 4}
        x, _ = nn.scan(Block, **axes)(name="blocks")(x, None)
        return nn.Dense(10, name="head")(x)


@jax.jit
def step(state, x, y):
    """One update."""

    def loss(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def main(steps: int = 200) -> None:
    """Trains, and prints what was clipped."""
    groups, losses = oc.groups.stacked(oc.groups.layer(), "^blocks/"), []
    model = Classifier()
    params = model.init(jax.random.key(0), next(batches(1))[0])["params"]
    tx = optax.chain(oc.clip_by_groupwise_norm(LIMIT, groups), optax.sgd(0.1, momentum=0.9))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for x, y in batches(steps):
        state, value = step(state, x, y)
        losses.append(float(value))
    report(state.opt_state, state.params, groups, losses)


if __name__ == "__main__":
    main()
