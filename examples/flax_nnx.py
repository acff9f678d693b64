"""Flax NNX: `nnx.Optimizer` with each layer clipped by its own norm."""

import optax
from digits import LIMIT, batches, report
from flax import nnx

import optaxclip as oc


class Classifier(nnx.Module):
    """Two hidden layers in a list, and a head."""

    def __init__(self, rngs: nnx.Rngs):
        """Makes the layers."""
        self.blocks = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        """From scans to logits."""
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.head(x)


@nnx.jit
def step(model, optimizer, x, y):
    """One update."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def main(steps: int = 200) -> None:
    """Trains, and prints what was clipped."""
    groups = oc.groups.layer()
    model = Classifier(nnx.Rngs(0))
    tx = optax.chain(oc.clip_by_groupwise_norm(LIMIT, groups), optax.sgd(0.1, momentum=0.9))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(step(model, optimizer, x, y)) for x, y in batches(steps)]
    report(optimizer.opt_state, nnx.state(model, nnx.Param), groups, losses)


if __name__ == "__main__":
    main()
