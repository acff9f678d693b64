"""Trees without a framework: dicts, lists, tuples, a single array, flattened names, what is no leaf."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from claims import drops_in

import optaxclip as oc

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)


def layers_of(tree):
    return list(oc.group_norms(tree, oc.groups.layer()))


def test_nested_dicts_drop_in():
    """Layers are the innermost dicts."""
    rng = np.random.default_rng(1)
    params = {
        f"layer_{k}": {"w": np.float32(rng.normal(size=(3, 3)) / 2), "b": np.zeros(3, np.float32)}
        for k in range(3)
    }

    def loss(params):
        x = X
        for k in range(3):
            x = jnp.tanh(x @ params[f"layer_{k}"]["w"] + params[f"layer_{k}"]["b"])
        return jnp.mean((x - 1) ** 2)

    drops_in(params, loss, {f"layer_{k}": lambda tree, k=k: tree[f"layer_{k}"] for k in range(3)})


class Dense(NamedTuple):
    """A layer as a tuple."""

    w: jax.Array
    b: jax.Array


def test_a_list_of_tuples_drops_in():
    """The layers have the numbers of the list."""
    w, v = np.float32([[0.3, 0.2], [0.1, 0.0], [0.2, 0.1]]), np.float32([[0.2], [0.1]])
    params = [Dense(w, np.zeros(2, np.float32)), (v, np.zeros(1, np.float32))]

    def loss(params):
        hidden = jnp.tanh(X @ params[0].w + params[0].b)
        return jnp.mean((hidden @ params[1][0] + params[1][1] - 1) ** 2)

    drops_in(params, loss, {"0": lambda tree: tree[0], "1": lambda tree: tree[1]})


def test_a_single_array_drops_in():
    """It is the one layer at the top of the tree, and the one leaf."""
    drops_in(np.ones(3, np.float32), lambda w: jnp.mean((X @ w - 1) ** 2), {"(root)": lambda tree: tree})
    assert list(oc.group_norms(jnp.ones(3), oc.groups.leaf())) == ["(root)"]
    assert list(oc.group_norms(jnp.ones((3, 2)), oc.groups.unit())) == ["(root)"]


def test_flattened_names_have_layers_as_nested_trees_do():
    """`encoder/0/kernel` as one key is what `traverse_util.flatten_dict(sep="/")` and files hold."""
    nested = {
        "encoder": {"0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
        "head": {"kernel": jnp.ones(3)},
    }
    flat = {"encoder/0/kernel": jnp.ones((2, 3)), "encoder/0/bias": jnp.ones(3), "head/kernel": jnp.ones(3)}
    for groups in (
        oc.groups.layer(),
        oc.groups.leaf(),
        oc.groups.depth(1),
        oc.groups.regex({"k": "kernel$", "b": "bias$"}),
        oc.groups.labels({"encoder": {"0": "e"}, "head": "h"}),
        oc.groups.labels({"encoder/0": "e", "head": {"kernel": "h"}}),
    ):
        assert oc.group_norms(flat, groups) == oc.group_norms(nested, groups)
    assert layers_of(flat) == ["encoder/0", "head"]
    assert list(oc.group_norms(flat, oc.groups.depth(1))) == ["encoder", "head"]


def test_names_with_dots_are_given_with_slashes():
    """Names as PyTorch writes them are one key each; `names=` takes them apart."""
    flat = {
        "layers.0.weight": jnp.ones((2, 2)),
        "layers.0.bias": jnp.zeros(2),
        "head.weight": jnp.ones((1, 2)),
    }
    assert layers_of(flat) == ["(root)"]
    names = [name.replace(".", "/") for name in sorted(flat)]
    assert list(oc.group_norms(flat, oc.groups.layer(names=names))) == ["head", "layers/0"]


def test_what_is_no_leaf_is_in_no_group():
    """None and `MaskedNode` are absent, and stay where they are."""
    tree = {"a": {"w": jnp.ones(4), "b": None}, "c": optax.MaskedNode(), "d": [None, jnp.ones(9)]}
    assert layers_of(tree) == ["a", "d"]
    assert list(oc.group_norms(tree, oc.groups.leaf())) == ["a/w", "d/1"]
    clipped, _ = oc.rescale_tree(tree, 1.0, groups=oc.groups.layer())
    assert jax.tree.structure(clipped) == jax.tree.structure(tree)
    assert clipped["a"]["b"] is None
    assert clipped["c"] == optax.MaskedNode()


def test_keys_of_two_kinds_in_one_dict_are_an_error_of_jax():
    """It cannot sort them, with or without clipping."""
    with pytest.raises(ValueError, match=r"Comparator raised exception|sort|TypeError"):
        oc.group_norms({0: jnp.ones(1), "a": jnp.ones(1)})


@pytest.mark.parametrize("tree", [{}, [], (), None, {"a": None}], ids=str)
def test_trees_without_leaves_pass(tree):
    """Nothing to measure and nothing to scale."""
    tx = optax.chain(oc.record(), oc.clip_by_layerwise_norm(1.0))
    updates, _ = tx.update(tree, tx.init(tree))
    assert updates == tree
