"""Haiku: modules whose names hold slashes, `layer_stack`, transposed convolutions."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from claims import drops_in, is_one, is_unit, units

import optaxclip as oc

hk = pytest.importorskip("haiku")
X = jax.random.normal(jax.random.key(0), (8, 3))
Z = jax.random.normal(jax.random.key(2), (2, 3, 4, 4))
HAIKU = oc.groups.unit("haiku")


def pickled(state, like):
    """A restart by pickle, as Haiku's own examples have it."""
    assert jax.tree.structure(like) == jax.tree.structure(state)
    return pickle.loads(pickle.dumps(jax.device_get(state)))


def test_a_multi_layer_perceptron_drops_in():
    """A layer is a module, called as Haiku calls it; slashes and tildes in its name are no levels."""
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1)(jnp.tanh(hk.nets.MLP([4, 4])(x)))))
    params = jax.jit(model.init)(jax.random.key(1), X)
    layers = {
        name: lambda tree, name=name: tree[name] for name in ("linear", "mlp/~/linear_0", "mlp/~/linear_1")
    }
    drops_in(params, lambda p: jnp.mean((model.apply(p, X) - 1) ** 2), layers, restart=pickled)
    assert list(oc.group_norms(params, oc.groups.depth(1))) == list(layers)
    assert list(oc.group_norms(params, oc.groups.regex({"mlp": "^mlp/", "rest": ""}))) == ["mlp", "rest"]


def test_names_by_module_may_be_a_tree():
    """A prefix of the parameters' own dict, or levels for the slashes in its names."""
    params = {"mlp/~/linear_0": {"w": jnp.ones(4)}, "mlp/~/linear_1": {"w": jnp.ones(9)}}
    for rule in (
        {"mlp/~/linear_0": "a", "mlp/~/linear_1": "b"},
        {"mlp": {"~": {"linear_0": "a", "linear_1": "b"}}},
    ):
        assert oc.group_norms(params, oc.groups.labels(rule)) == {"a": 2, "b": 3}


def test_layers_of_a_layer_stack_are_taken_apart():
    """They are one array, with the layers along its first axis."""
    model = hk.without_apply_rng(
        hk.transform(
            lambda x: hk.Linear(1)(
                hk.experimental.layer_stack(5)(lambda x: jnp.tanh(hk.Linear(3, name="dense")(x)))(x)
            )
        )
    )
    params = jax.jit(model.init)(jax.random.key(1), X)
    name = "__layer_stack_no_per_layer/dense"
    assert params[name]["w"].shape == (5, 3, 3)
    stacked = oc.groups.stacked(oc.groups.layer(), "^__layer_stack")
    tx = optax.chain(oc.clip_by_groupwise_norm(1e-4, stacked), optax.sgd(1.0))
    grads = jax.jit(jax.grad(lambda p: jnp.mean((model.apply(p, X) - 1) ** 2)))(params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    logs = oc.metrics(state, params, stacked)
    for k in range(5):
        norm = np.linalg.norm(np.append(grads[name]["w"][k], grads[name]["b"][k]))
        np.testing.assert_allclose(logs[f"clip/norm_before/{name}[{k}]"], norm, rtol=1e-5)
    np.testing.assert_allclose(oc.group_norms(updates, stacked)[name], np.full(5, 1e-4), rtol=1e-5)
    assert oc.group_norms(params, oc.groups.stacked(HAIKU, "^__layer_stack"))[f"{name}/w"].shape == (5 * 3,)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (functools.partial(hk.Linear, 5), Z),
        (functools.partial(hk.Conv1D, 5, 3), Z[0]),
        (functools.partial(hk.Conv2D, 5, 3), Z),
        (functools.partial(hk.Conv2DTranspose, 5, 3), Z),
        (functools.partial(hk.DepthwiseConv2D, 2, 3), Z),
    ],
    ids=lambda value: value.func.__name__ if isinstance(value, functools.partial) else "",
)
def test_units_of_layers_are_their_outputs(module, x):
    """By the derivative of each output: `w` has a group for each of them, `b` has one."""
    model = hk.without_apply_rng(hk.transform(lambda x: module()(x)))
    params = jax.tree.map(lambda x: x + 0.1, jax.jit(model.init)(jax.random.key(1), x))
    (name,) = params
    found = units(params, lambda p: model.apply(p, x), HAIKU)
    assert is_unit(found, f"{name}/w")
    assert is_one(found, f"{name}/b")


def test_units_of_an_embedding_are_its_rows():
    """One for each token: the only entries that its derivative is not zero in."""
    model = hk.without_apply_rng(hk.transform(lambda: hk.Embed(7, 4)(jnp.arange(7))))
    params = model.init(jax.random.key(1))
    assert is_unit(units(params, lambda p: model.apply(p).T, HAIKU), "embed/embeddings")


def test_units_of_attention_are_outputs_of_its_linear_layers():
    """All are matrices `(in, out)`; normalisations are one group each."""
    model = hk.transform(
        lambda x: hk.LayerNorm(-1, True, True)(
            hk.MultiHeadAttention(2, 3, w_init=hk.initializers.VarianceScaling())(x, x, x)
        )
    )
    norms = oc.group_norms(jax.jit(model.init)(jax.random.key(1), Z[0]), HAIKU)
    assert norms["multi_head_attention/query/w"].shape == (6,)
    assert norms["multi_head_attention/query/b"].shape == norms["layer_norm/scale"].shape == ()
