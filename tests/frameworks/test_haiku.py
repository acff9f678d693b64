"""Haiku: modules whose names hold slashes, `layer_stack`, transposed convolutions."""

import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from claims import advised, drops_in, each, is_one, is_unit, units

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


def attention(x, **options):
    """Two heads of two features."""
    return hk.MultiHeadAttention(2, 2, w_init=hk.initializers.VarianceScaling(), **options)(x, x, x)


def test_a_transformer_drops_in():
    """Attention is four layers, and one where a pattern says so."""

    def forward(tokens):
        x = hk.Embed(7, 4)(tokens)
        x += attention(hk.LayerNorm(-1, True, True)(x), name="attention")
        x += hk.nets.MLP([8, 4])(hk.LayerNorm(-1, True, True)(x))
        return hk.Linear(1, name="head")(x)

    model, tokens = hk.without_apply_rng(hk.transform(forward)), jnp.arange(12).reshape(4, 3) % 7
    params = jax.jit(model.init)(jax.random.key(1), tokens)
    rest = ["embed", "head", "layer_norm", "layer_norm_1", "mlp/~/linear_0", "mlp/~/linear_1"]
    names = [*(f"attention/{name}" for name in ("key", "linear", "query", "value")), *rest]
    layers = {name: lambda tree, name=name: tree[name] for name in names}
    drops_in(params, lambda p: jnp.mean((model.apply(p, tokens) - 1) ** 2), layers)
    one = oc.groups.regex({r"\1": ["^(attention)/", r"^(.*)/\w+$"]})
    assert list(oc.group_norms(params, one)) == ["attention", *rest]


def test_layers_of_a_layer_stack_are_taken_apart():
    """They are one array, with the layers along its first axis; units too, those of attention with them."""

    def block(x):
        return jnp.tanh(hk.Linear(4, name="dense")(x + attention(x, name="attention")))

    def forward(x):
        return hk.Linear(1)(hk.experimental.layer_stack(5)(block)(x))

    model, x = hk.without_apply_rng(hk.transform(forward)), Z[0]
    params = jax.jit(model.init)(jax.random.key(1), x)
    stack = "__layer_stack_no_per_layer"
    names = [
        f"{stack}/{n}" for n in ("attention/key", "attention/linear", "attention/query", "attention/value")
    ]
    names.append(f"{stack}/dense")
    assert params[names[-1]]["w"].shape == (5, 4, 4)
    layers = {}
    for name in names:
        layers |= each(name, 5, lambda tree, name=name: tree[name])
    layers["linear"] = lambda tree: tree["linear"]
    stacked = oc.groups.stacked(oc.groups.layer(), "^__layer_stack")
    drops_in(params, lambda p: jnp.mean((model.apply(p, x) - 1) ** 2), layers, stacked)
    found = oc.group_norms(params, oc.groups.stacked(HAIKU, "^__layer_stack"))
    for name in names:
        w, b = params[name]["w"], params[name]["b"]
        np.testing.assert_allclose(found[f"{name}/w"], np.linalg.norm(w, axis=1).ravel(), rtol=1e-6)
        np.testing.assert_allclose(found[f"{name}/b"], np.linalg.norm(b, axis=1), rtol=1e-6)


def test_the_code_of_advice_runs_as_it_is_pasted():
    """Slashes and tildes of names stand in its patterns, and it clips the module that they name."""
    names = ("linear", "mlp/~/linear_0", "mlp/~/linear_1")
    params = {name: {"w": jnp.ones((2, 2)), "b": jnp.ones(2)} for name in names}
    advice = advised(params, 5)
    assert re.search(r"groupwise_norm\([\d.]+, oc.groups.regex\(\{'mlp/~/linear_1/w': ", advice.code)
    tx = eval(advice.code, {"oc": oc})
    updates, state = jax.jit(tx.update)(jax.tree.map(lambda x: 100 * x, params), tx.init(params))
    np.testing.assert_allclose(jnp.linalg.norm(updates["mlp/~/linear_1"]["w"]), advice.limit, rtol=1e-5)
    del updates["mlp/~/linear_1"]["w"]
    assert {float(x) for leaf in jax.tree.leaves(updates) for x in leaf.ravel()} == {100}
    assert state.norm.tolist() == [200]


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


@pytest.mark.parametrize("name", ["query", "key", "value", "linear"])
def test_units_of_projections_are_their_outputs(name):
    """By the derivative of what the module itself computes: heads and features along one axis."""

    def forward(x):
        seen = {}

        def look(call, args, kwargs, context):
            seen[context.module.name] = call(*args, **kwargs)
            return seen[context.module.name]

        with hk.intercept_methods(look):
            attention(x)
        return seen[name]

    model = hk.without_apply_rng(hk.transform(forward))
    params = jax.tree.map(lambda x: x + 0.1, jax.jit(model.init)(jax.random.key(1), Z[0]))
    found = units(params, lambda p: model.apply(p, Z[0]), HAIKU)
    assert is_unit(found, f"multi_head_attention/{name}/w")
    assert is_one(found, f"multi_head_attention/{name}/b")


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
