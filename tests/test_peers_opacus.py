"""Per-example clipping beside opacus 1.6, without noise: flat, by parameter, and with an adaptive limit.

It has neither AUTO-S nor DP-PSAC.
"""

import jax
import numpy as np
import pytest
from peers import DRAWN, EXAMPLES, assert_close, clipped, drawn, examples, is_shape, middle

import optaxclip as oc

torch = pytest.importorskip("torch", reason="the extra 'peers' is not installed")
peer = pytest.importorskip("opacus.optimizers", reason="the extra 'peers' is not installed")


class Private:
    """One of opacus' optimizers, without noise, on parameters like the leaves of a tree."""

    def __init__(self, make, tree, **options):
        leaves = jax.tree.leaves(tree)
        self.params = [torch.nn.Parameter(torch.zeros(x.shape[1:])) for x in leaves]
        sgd = torch.optim.SGD(self.params, lr=0.0)
        self.optimizer = make(sgd, noise_multiplier=0.0, expected_batch_size=EXAMPLES, **options)

    def step(self, tree):
        """The mean of the clipped gradients."""
        self.optimizer.zero_grad()
        leaves, treedef = jax.tree.flatten(tree)
        for parameter, x in zip(self.params, leaves, strict=True):
            parameter.grad_sample = torch.tensor(np.asarray(x))
        self.optimizer.step()
        return treedef.unflatten([parameter.grad.numpy().copy() for parameter in self.params])


@pytest.mark.parametrize("limit", [0.0, 0.3, 1.0, 4.0])
def test_flat_clipping_is_that_of_opacus(limit):
    """With opacus' eps of 1e-6, averaged over the batch."""
    grads = examples(6)
    theirs = Private(peer.DPOptimizer, grads, max_grad_norm=limit).step(grads)
    assert_close(clipped(oc.clip_per_example(limit, eps=1e-6), grads)[0], theirs)


def test_leafwise_clipping_is_per_layer_clipping_in_opacus():
    """Its layers are parameters, each with a limit of its own."""
    grads = examples(7)
    limits = {"a/b": 0.1, "a/w": 0.5, "z/w": 0.3}
    theirs = Private(peer.DPPerLayerOptimizer, grads, max_grad_norm=list(limits.values())).step(grads)
    tx = oc.clip_per_example(oc.limits.per_group(limits), groups=oc.groups.leaf(), eps=1e-6)
    ours, state = clipped(tx, grads)
    assert_close(ours, theirs)
    assert (state.clipped > 0).all()
    assert (state.clipped < 1).all()


@pytest.mark.parametrize("seed", DRAWN)
def test_any_tree_is_clipped_as_by_opacus(seed):
    """Flat, and by parameter, each to the same; it has no parameters without axes."""
    grads = examples(seed, shapes=jax.tree.map(lambda shape: shape or (1,), drawn(seed), is_leaf=is_shape))
    limit = middle(grads)
    theirs = Private(peer.DPOptimizer, grads, max_grad_norm=limit).step(grads)
    ours, state = clipped(oc.clip_per_example(limit, eps=1e-6), grads)
    assert_close(ours, theirs)
    assert state.clipped.tolist() == [0.5]
    limits = [limit / 3] * len(jax.tree.leaves(grads))
    theirs = Private(peer.DPPerLayerOptimizer, grads, max_grad_norm=limits).step(grads)
    ours, _ = clipped(oc.clip_per_example(limit / 3, groups=oc.groups.leaf(), eps=1e-6), grads)
    assert_close(ours, theirs)


@pytest.mark.parametrize(("target", "rate"), [(0.5, 0.2), (0.8, 1.0), (0.0, 0.5), (1.0, 0.5)])
def test_an_adaptive_limit_goes_the_way_of_opacus(target, rate):
    """For 60 batches without zeros, which are learned there: updates and the limits behind them."""
    quantile = oc.per_example_quantile(target, rate, initial=2.0)
    tx = oc.clip_per_example(quantile, eps=1e-6)
    update = jax.jit(tx.update)
    sizes = np.exp(np.linspace(-1, 1, 60))
    batches = [jax.tree.map(lambda x: x[:-1], examples(8 + k, size)) for k, size in enumerate(sizes)]
    theirs = Private(
        peer.AdaClipDPOptimizer,
        batches[0],
        max_grad_norm=2.0,
        target_unclipped_quantile=target,
        clipbound_learning_rate=rate,
        min_clipbound=1e-20,
        max_clipbound=1e20,
        unclipped_num_std=1e-12,  # none, but it wants a positive number
    )
    state = tx.init(jax.tree.map(lambda x: x[0], batches[0]))
    for grads in batches:
        ours, state = update(grads, state)
        assert_close(jax.tree.map(lambda x: x * (EXAMPLES - 1) / EXAMPLES, ours), theirs.step(grads), 2e-5)
        np.testing.assert_allclose(state.rule[0], float(theirs.optimizer.max_grad_norm), rtol=2e-5)
