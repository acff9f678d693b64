"""Clipping beside jax-privacy 2.0: one tree, and the gradients of a batch.

It measures 16-bit leaves in their own dtype, so that their norms are wrong: only float32 is compared. It
clips whole trees by one limit; prefix trees of limits came after 2.0.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import DRAWN, EXAMPLES, TREE, assert_close, clipped, drawn, examples, is_shape, middle

import optaxclip as oc

peer = pytest.importorskip("jax_privacy.clipping", reason="the extra 'peers' is not installed")

# It calls that itself.
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")

LIMITS = [0.0, 0.3, 1.0, 4.0, np.inf]


@pytest.mark.parametrize("limit", LIMITS)
def test_one_tree_is_clipped_as_by_clip_pytree(limit):
    """With its norm, for every example, among them one of zeros."""
    grads = examples(0)
    theirs, norms = jax.vmap(lambda tree: peer.clip_pytree(tree, limit))(grads)
    ours, stats = jax.vmap(lambda tree: oc.rescale_tree(tree, limit))(grads)
    assert_close(ours, theirs)
    assert_close(stats.norm[:, 0], norms)


def test_layers_are_clipped_as_by_clip_pytree_one_after_the_other():
    """A layer is a tree of its own."""
    grads = examples(1)
    theirs = {
        name: jax.vmap(lambda tree: peer.clip_pytree(tree, 0.5))(layer)[0] for name, layer in grads.items()
    }
    ours, _ = jax.vmap(lambda tree: oc.rescale_tree(tree, 0.5, groups=oc.groups.layer()))(grads)
    assert_close(ours, theirs)


@pytest.mark.parametrize("seed", DRAWN)
def test_any_tree_is_clipped_as_by_clip_pytree(seed):
    """Each example as a whole and by what hangs off the top of its tree, and the mean of all of them."""
    grads = examples(seed, shapes=drawn(seed))
    limit = middle(grads)

    @jax.jit
    @jax.vmap
    def theirs(tree):
        parts = {name: peer.clip_pytree(part, limit / 2)[0] for name, part in tree.items()}
        return peer.clip_pytree(tree, limit)[0], parts

    @jax.jit
    @jax.vmap
    def ours(tree):
        parts, _ = oc.rescale_tree(tree, limit / 2, groups=oc.groups.depth(1))
        return oc.rescale_tree(tree, limit)[0], parts

    expected = theirs(grads)
    assert_close(ours(grads), expected)
    mean, state = clipped(oc.clip_per_example(limit), grads)
    assert_close(mean, jax.tree.map(lambda x: x.mean(0), expected[0]))
    assert state.clipped.tolist() == [0.5]


@pytest.mark.parametrize("limit", LIMITS[1:-1])
def test_rescaling_to_unit_norm_is_clipping_divided_by_the_limit(limit):
    """As an option of `clip_pytree`, for limits that can be divided by."""
    grads = examples(2)
    theirs, _ = jax.vmap(lambda tree: peer.clip_pytree(tree, limit, rescale_to_unit_norm=True))(grads)
    ours, _ = jax.vmap(lambda tree: oc.rescale_tree(tree, limit))(grads)
    assert_close(jax.tree.map(lambda x: x / limit, ours), theirs)


def test_rescaling_to_unit_norm_at_a_limit_of_0_is_normalising():
    """Zeros stay zeros in both."""
    grads = examples(3)
    theirs, _ = jax.vmap(lambda tree: peer.clip_pytree(tree, 0.0, rescale_to_unit_norm=True))(grads)
    normalize = oc.responses.normalize()
    ours, _ = jax.vmap(lambda tree: oc.rescale_tree(tree, 1.0, response=normalize))(grads)
    assert_close(ours, theirs)


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"])
    return jnp.sum((hidden @ params["z"]["w"] - y) ** 2)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("microbatch", [None, 4])
def test_clipped_gradients_of_a_loss_are_those_of_clipped_grad(limit, microbatch):
    """The mean over the batch, the norms among it, whether or not it takes the batch in parts."""
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), "float32"), TREE, is_leaf=is_shape)
    x, y = (jnp.asarray(rng.normal(size=(EXAMPLES, n)), "float32") for n in (4, 2))
    options = {"batch_argnums": (1, 2), "keep_batch_dim": False, "return_grad_norms": True}
    options |= {"l2_clip_norm": limit, "normalize_by": EXAMPLES, "microbatch_size": microbatch}
    their_grad = peer.clipped_grad(loss, **options)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs, more = jax.jit(their_grad)(params, x, y)
    grads = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(params, x, y)
    ours, state = clipped(oc.clip_per_example(limit), grads)
    assert_close(ours, theirs)
    assert_close(state.norm[0], np.mean(more.grad_norms))


def test_an_example_of_nan_is_dropped_as_by_jax_privacy():
    """Where all of it is NaN; of one with a single bad entry jax-privacy keeps the others."""
    grads = examples(5)
    bad = jax.tree.map(lambda x: x.at[3].set(jnp.nan), grads)
    one = jax.tree.map(jnp.array, grads)
    one["a"]["b"] = one["a"]["b"].at[3, 0].set(jnp.inf)
    kept, _ = peer.clip_pytree(jax.tree.map(lambda x: x[3], one), 1.0)
    assert np.count_nonzero(kept["a"]["b"]) == 2
    theirs = jax.tree.map(lambda x: x.sum(0), jax.vmap(lambda t: peer.clip_pytree(t, 1.0))(bad)[0])
    for tree in (bad, one):
        ours, state = clipped(oc.clip_per_example(1.0, reduce="sum"), tree)
        assert_close(ours, theirs)
        assert state.nonfinite.tolist() == [1]
