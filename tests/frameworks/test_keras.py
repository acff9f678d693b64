"""Keras 3 on JAX: a plain list of arrays, whose names are asked of the model."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from claims import advised, drops_in, is_one, is_unit, units
from peers import DRAWN, assert_same, drawn, gradients, middle, ours

import optaxclip as oc

os.environ["KERAS_BACKEND"] = "jax"
keras = pytest.importorskip("keras")
X = jax.random.normal(jax.random.key(0), (8, 3))
Z = jax.random.normal(jax.random.key(2), (2, 4, 4, 3))


@pytest.fixture(autouse=True)
def seeded():
    """Keras draws other weights in each process."""
    keras.utils.set_random_seed(0)


def stateless(model):
    """A model's parameters, its function of them, and the names of the parameters."""
    rest = [v.value for v in model.non_trainable_variables]
    params = [v.value for v in model.trainable_variables]
    names = [v.path for v in model.trainable_variables]
    return params, lambda params, x: model.stateless_call(params, rest, x)[0], names


def test_a_model_drops_in():
    """The layers are called as Keras calls them."""
    layers = [keras.layers.Dense(4, "tanh", name="hidden"), keras.layers.LayerNormalization(name="norm")]
    model = keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(1, name="head")], name="mlp")
    params, apply, names = stateless(model)
    assert names[0] == "mlp/hidden/kernel"
    found = {
        f"mlp/{name}": lambda tree, k=k: tree[k : k + 2]
        for name, k in (("head", 4), ("hidden", 0), ("norm", 2))
    }
    drops_in(params, lambda p: jnp.mean((apply(p, X) - 1) ** 2), found, oc.groups.layer(names=names))
    assert list(oc.group_norms(params, oc.groups.layer())) == ["(root)"]  # without names


def test_a_transformer_drops_in():
    """Attention is four layers, and one where a pattern says so."""
    tokens = keras.Input((3,), dtype="int32")
    x = keras.layers.Embedding(7, 4, name="embed")(tokens)
    y = keras.layers.LayerNormalization(name="norm_0")(x)
    x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(2, 2, name="attention")(y, y)])
    y = keras.layers.LayerNormalization(name="norm_1")(x)
    y = keras.layers.Dense(4, name="down")(keras.layers.Dense(8, "gelu", name="up")(y))
    model = keras.Model(tokens, keras.layers.Dense(1, name="head")(keras.layers.Add()([x, y])))
    params, apply, paths = stateless(model)
    rest = ["down", "embed", "head", "norm_0", "norm_1", "up"]
    names = [*(f"attention/{name}" for name in ("attention_output", "key", "query", "value")), *rest]

    def own(tree, name):
        return [x for x, path in zip(tree, paths, strict=True) if path.rsplit("/", 1)[0] == name]

    x = jnp.arange(12).reshape(4, 3) % 7
    layers = {name: lambda tree, name=name: own(tree, name) for name in names}
    groups = oc.groups.layer(names=paths)
    drops_in(params, lambda p: jnp.mean((apply(p, x) - 1) ** 2), layers, groups)
    one = oc.groups.regex({r"\1": ["^(attention)/", r"^(.*)/\w+$"]}, names=paths)
    assert list(oc.group_norms(params, one)) == ["attention", *rest]


def test_names_for_another_number_of_leaves_are_an_error():
    """Those of all variables, say, in place of those that are trained."""
    with pytest.raises(ValueError, match=r"names= has 1 paths for a tree of 2 leaves. Pass one per leaf"):
        oc.group_norms([jnp.ones(1), jnp.ones(2)], oc.groups.layer(names=["mlp/dense/kernel"]))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (keras.layers.Dense(5), X),
        (keras.layers.Conv1D(5, 2), Z[0]),
        (keras.layers.Conv2D(5, 2), Z),
        (keras.layers.Conv2DTranspose(5, 2), Z),
        (keras.layers.DepthwiseConv2D(2, depth_multiplier=2), Z),
        (keras.layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"), Z[0]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, keras.Layer) else "",
)
def test_units_of_layers_are_their_outputs(layer, x):
    """By the derivative of each output: a kernel has a group for each of them, a bias has one."""
    layer.build(x.shape)
    params, apply, names = stateless(layer)
    params = [x + 0.1 for x in params]
    found = units(params, lambda p: apply(p, x), oc.groups.unit("keras", names=names))
    kernel, bias = names
    assert is_unit(found, kernel)
    assert is_one(found, bias)


@pytest.mark.parametrize("name", ["query", "key", "value", "output"])
def test_units_of_projections_are_their_outputs(name):
    """By the derivative: a group for each head and feature, and for each feature that comes out."""
    attention = keras.layers.MultiHeadAttention(2, 3)
    attention.build(Z[0].shape, Z[0].shape)
    params, apply, names = stateless(getattr(attention, f"{name}_dense"))
    params = [x + 0.1 for x in params]
    x = jax.random.normal(jax.random.key(3), (4, 4, 2, 3)) if name == "output" else Z[0]
    outputs = params[-1].size
    found = units(params, lambda p: apply(p, x).reshape(-1, outputs), oc.groups.unit("keras", names=names))
    kernel, bias = names
    assert is_unit(found, kernel)
    assert found[kernel].shape[0] == (3 if name == "output" else 6)
    assert is_one(found, bias)


def test_units_of_attention_recurrent_layers_and_embeddings():
    """Heads and features of what goes in, features of what comes out, gates, tokens; biases are one."""
    tokens = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(10, 4, name="embed")(tokens)
    x = keras.layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = keras.layers.SeparableConv1D(5, 2, name="separable")(x)
    model = keras.Model(tokens, keras.layers.GRU(7, name="gru")(x))
    params, _, names = stateless(model)
    counts = {
        name: norm.size for name, norm in oc.group_norms(params, oc.groups.unit("keras", names=names)).items()
    }
    assert {name: count for name, count in counts.items() if count > 1} == {
        "embed/embeddings": 10,
        "attention/query/kernel": 6,
        "attention/key/kernel": 6,
        "attention/value/kernel": 6,
        "attention/attention_output/kernel": 4,
        "separable/depthwise_kernel": 4,
        "separable/pointwise_kernel": 5,
        "gru/gru_cell/kernel": 21,
        "gru/gru_cell/recurrent_kernel": 21,
    }
    assert {"attention/query/bias", "gru/gru_cell/bias"} < {
        name for name, count in counts.items() if count == 1
    }


def test_adaptive_clipping_takes_a_framework_and_names():
    """By a grouping, since names go with groupings."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="head")], name="m")
    params, apply, names = stateless(model)
    tx = optax.chain(oc.adaptive_grad_clip(1e-3, groups=oc.groups.unit("keras", names=names)), optax.sgd(1.0))
    grads = jax.grad(lambda p: jnp.mean((apply(p, X) - 1) ** 2))(params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(
        np.linalg.norm(updates[0], axis=0), 1e-3 * np.linalg.norm(params[0], axis=0), rtol=1e-5
    )


@pytest.mark.parametrize("seed", DRAWN)
def test_clipping_has_the_numbers_of_keras(seed):
    """Of `clipnorm`, `global_clipnorm` and `clipvalue`, by what SGD takes from variables of any shapes."""
    grads = jax.tree.leaves(gradients(seed, drawn(seed)))
    limit = middle(grads)
    same = {
        "clipnorm": (limit / 3, oc.clip_by_leafwise_norm(limit / 3)),
        "global_clipnorm": (limit, oc.clip_by_global_norm(limit)),
        "clipvalue": (0.2, oc.clip_by_value(0.2)),
    }
    zeros = [jnp.zeros(x.shape[1:]) for x in grads]
    for name, (value, tx) in same.items():
        sgd = keras.optimizers.SGD(1.0, **{name: value})
        sgd.build([keras.Variable(x) for x in zeros])
        state = [variable.value for variable in sgd.variables]
        moved = jax.jit(
            jax.vmap(lambda step, sgd=sgd, state=state: sgd.stateless_apply(state, step, zeros)[0])
        )
        assert_same(ours(tx, grads), [-x for x in moved(grads)], 1e-6)


def test_keras_takes_one_of_its_three_limits():
    """Two chain here, as the guide has it."""
    with pytest.raises(ValueError, match="clipnorm"):
        keras.optimizers.SGD(1.0, clipnorm=1.0, global_clipnorm=1.2)


def test_the_code_of_advice_runs_on_a_dict_and_wants_names_for_a_list():
    """In it are the names that the recording was given, and a list has others."""
    paths = [f"mlp/hidden_{k}/{own}" for k in range(3) for own in ("kernel", "bias")]
    params = [jnp.ones((2, 2)) if path.endswith("kernel") else jnp.ones(2) for path in paths]
    advice = advised(params, 2, oc.groups.leaf(names=paths))
    assert advice.code.endswith(
        "oc.groups.regex({'mlp/hidden_1/kernel': '^mlp/hidden_1/kernel$', None: '.*'}))"
    )

    def clipped(code, params):
        tx = eval(code, {"oc": oc, "names": paths})
        updates, _ = tx.update(jax.tree.map(lambda x: 100 * x, params), tx.init(params))
        return np.array([jnp.linalg.norm(x) for x in jax.tree.leaves(updates)])

    named = dict(zip(paths, params, strict=True))
    order = [sorted(paths).index(path) for path in paths]
    expected = np.array([200, 141.42136, advice.limit, 141.42136, 200, 141.42136])
    np.testing.assert_allclose(clipped(advice.code, named)[order], expected, rtol=1e-5)
    with_names = advice.code.replace("'.*'})", "'.*'}, names=names)")
    np.testing.assert_allclose(clipped(with_names, params), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="no leaf gets a name by"):  # none of a list has this path
        clipped(advice.code, params)
