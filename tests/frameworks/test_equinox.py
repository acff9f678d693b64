"""Equinox: filtered modules, weights with outputs first, layers under `filter_vmap`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from claims import drops_in, each, is_one, is_unit, units

import optaxclip as oc

eqx = pytest.importorskip("equinox")
X = jax.random.normal(jax.random.key(0), (8, 3))
KEY = jax.random.key(1)
EQUINOX = oc.groups.unit("equinox")


def written(tmp_path):
    """A restart by Equinox's own files."""

    def restart(state, like):
        eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
        return eqx.tree_deserialise_leaves(tmp_path / "state.eqx", like)

    return restart


def test_a_filtered_module_drops_in(tmp_path):
    """Layers are attributes, and those in a tuple have numbers; functions and None are no leaves."""
    model = eqx.nn.MLP(3, 1, 4, 2, activation=jnp.tanh, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(X) - 1) ** 2)

    layers = {f"layers/{k}": lambda tree, k=k: tree.layers[k] for k in range(3)}
    drops_in(params, loss, layers, restart=written(tmp_path))


def test_gradients_of_filter_grad_and_the_filtered_model_agree():
    """What `init` and `update` are shown by users of Equinox have the same groups; None stays None."""
    model = eqx.nn.Sequential([eqx.nn.Linear(3, 4, use_bias=False, key=KEY), eqx.nn.Lambda(jnp.tanh)])
    grads = eqx.filter_grad(lambda model: jnp.sum(jax.vmap(model)(X)))(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = optax.chain(oc.adaptive_grad_clip(1e-3, axis="equinox"), optax.sgd(1.0))
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates.layers[0].bias is None
    moved = eqx.apply_updates(model, updates)
    difference = moved.layers[0].weight - model.layers[0].weight
    limit = 1e-3 * np.linalg.norm(model.layers[0].weight, axis=1)
    np.testing.assert_allclose(np.linalg.norm(difference, axis=1), limit, rtol=1e-3)
    assert state[0].norm.shape == (4,)


def test_adaptive_clipping_by_rank_alone_is_by_inputs():
    """Why the framework has to be named: Optax's rule for `(out, in)` has a group for each input."""
    linear = eqx.nn.Linear(6, 2, key=KEY)
    assert oc.group_norms(linear, oc.groups.unit())["weight"].shape == (6,)
    assert oc.group_norms(linear, EQUINOX)["weight"].shape == (2,)


def test_unfiltered_modules_have_leaves_that_are_no_arrays():
    """Functions are left alone; JAX itself cannot pass them to a jitted function."""
    model = eqx.nn.MLP(3, 1, 4, 1, key=KEY)
    assert list(oc.group_norms(model, oc.groups.layer())) == ["layers/0", "layers/1"]
    assert oc.describe(oc.groups.layer(), model).endswith("  final_activation  ()  function")
    clipped, _ = oc.rescale_tree(model, 1e-3)
    assert clipped.activation is model.activation
    assert eqx.tree_equal(clipped.layers[0].use_bias, model.layers[0].use_bias)


def test_a_parameter_called_value_keeps_its_name_beside_others():
    """Only where `value` stands alone below a name is it a wrapper."""

    class Attention(eqx.Module):
        key: jax.Array
        value: jax.Array

    assert list(oc.group_norms(Attention(jnp.ones(2), jnp.ones(2)), oc.groups.leaf())) == ["key", "value"]


class Transformer(eqx.Module):
    """A block, an embedding before it and a head behind it, and dropout."""

    embed: eqx.nn.Embedding
    norms: list
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        """Makes the layers."""
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(7, 4, key=keys[0])
        self.norms = [eqx.nn.LayerNorm(4), eqx.nn.LayerNorm(4)]
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=keys[1])
        self.mlp = eqx.nn.MLP(4, 4, 8, 1, key=keys[2])
        self.dropout = eqx.nn.Dropout(0.1)
        self.head = eqx.nn.Linear(4, 1, key=keys[3])

    def __call__(self, tokens):
        """Calls them."""
        x = jax.vmap(self.embed)(tokens)
        y = jax.vmap(self.norms[0])(x)
        x += self.attention(y, y, y)
        x += self.dropout(jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x)), inference=True)
        return jax.vmap(self.head)(x)


def test_a_transformer_drops_in():
    """Attention is four layers; dropout, whose `p` is filtered out, is none."""
    params, static = eqx.partition(Transformer(KEY), eqx.is_inexact_array)
    tokens = jnp.arange(12).reshape(4, 3) % 7
    projections = ("key", "output", "query", "value")
    layers = {
        **{f"attention/{n}_proj": lambda t, n=n: getattr(t.attention, f"{n}_proj") for n in projections},
        "embed": lambda tree: tree.embed,
        "head": lambda tree: tree.head,
        **{f"mlp/layers/{k}": lambda tree, k=k: tree.mlp.layers[k] for k in range(2)},
        **{f"norms/{k}": lambda tree, k=k: tree.norms[k] for k in range(2)},
    }
    drops_in(params, lambda p: jnp.mean((jax.vmap(eqx.combine(p, static))(tokens) - 1) ** 2), layers)
    one = oc.groups.regex({r"\1": [r"^(attention)/", r"^(.*)/\w+$"]})
    assert list(oc.group_norms(params, one)) == ["attention", *list(layers)[4:]]


def test_metrics_want_the_filtered_model_too():
    """The `p` of dropout is a Python float: a layer where it is not filtered out."""
    model = [eqx.nn.Linear(3, 1, key=KEY), eqx.nn.Dropout(0.5)]
    params, layer = eqx.filter(model, eqx.is_inexact_array), oc.groups.layer()
    assert list(oc.group_norms(model, layer)) == ["0", "1"]
    assert list(oc.group_norms(params, layer)) == ["0"]
    tx = optax.chain(oc.record(layer), oc.clip_by_layerwise_norm(1.0))
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert oc.metrics(state, params, layer)["clip/norm_before/0"] == 2
    assert oc.History.from_state(state, params, layer).norms.tolist() == [[2]]
    with pytest.raises(ValueError, match=r"metrics: the state has 1 rows; these .* have 2: '0', '1'"):
        oc.metrics(state, model, layer)
    with pytest.raises(ValueError, match=r"Pass the groups and the tree"):
        oc.History.from_state(state, model, layer)


class Block(eqx.Module):
    """What is stacked."""

    attention: eqx.nn.MultiheadAttention
    dense: eqx.nn.Linear

    def __init__(self, key):
        """Makes the layers."""
        self.attention = eqx.nn.MultiheadAttention(2, 3, qk_size=2, vo_size=2, key=key)
        self.dense = eqx.nn.Linear(3, 3, key=key)

    def __call__(self, x):
        """Calls them."""
        return jnp.tanh(jax.vmap(self.dense)(x + self.attention(x, x, x)))


def test_layers_made_by_vmap_are_taken_apart():
    """Each index of the first axis has a norm of its own, and its own units."""
    blocks = eqx.filter_vmap(Block)(jax.random.split(KEY, 5))
    model = {"layers": blocks, "head": eqx.nn.Linear(3, 1, key=KEY)}
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params):
        def through(x, layer):
            return eqx.combine(layer, static["layers"])(x), None

        x, _ = jax.lax.scan(through, X, params["layers"])
        return jnp.mean((jax.vmap(eqx.combine(params["head"], static["head"]))(x) - 1) ** 2)

    projections = [f"{name}_proj" for name in ("key", "output", "query", "value")]
    layers = {"head": lambda tree: tree["head"]}
    for name in projections:
        select = lambda tree, name=name: getattr(tree["layers"].attention, name)  # noqa: E731
        layers |= each(f"layers/attention/{name}", 5, select)
    layers |= each("layers/dense", 5, lambda tree: tree["layers"].dense)
    drops_in(params, loss, layers, oc.groups.stacked(oc.groups.layer(), "^layers/"))

    found = oc.group_norms(params, oc.groups.stacked(EQUINOX, "^layers/"))
    own = {f"attention/{name}": getattr(blocks.attention, name) for name in projections}
    for name, linear in (own | {"dense": blocks.dense}).items():
        expected = np.linalg.norm(linear.weight, axis=2).ravel()
        np.testing.assert_allclose(found[f"layers/{name}/weight"], expected, rtol=1e-6)
    np.testing.assert_allclose(
        found["layers/dense/bias"], np.linalg.norm(blocks.dense.bias, axis=1), rtol=1e-6
    )
    assert found["head/weight"].shape == ()


def last(forward):
    """A function with its outputs, which Equinox keeps first, along the last axis."""
    return lambda *args: jnp.moveaxis(forward(*args), 0, -1)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (eqx.nn.Linear(4, 5, key=KEY), (4,)),
        (eqx.nn.Conv1d(4, 6, 3, key=KEY), (4, 3)),
        (eqx.nn.Conv2d(4, 6, 3, groups=2, key=KEY), (4, 3, 3)),
        (eqx.nn.ConvTranspose2d(4, 5, 2, key=KEY), (4, 2, 2)),
    ],
    ids=["Linear", "Conv1d", "Conv2d", "ConvTranspose2d"],
)
def test_units_of_layers_are_their_outputs(module, shape):
    """By the derivative of each output: a weight has a group for each of them, a bias of any rank has one."""
    params, static = eqx.partition(jax.tree.map(lambda x: x + 0.1, module), eqx.is_inexact_array)
    x = jax.random.normal(KEY, shape)
    found = units(params, last(lambda p: eqx.combine(p, static)(x)), EQUINOX)
    assert is_unit(found, "weight")
    assert is_one(found, "bias")


@pytest.mark.parametrize("name", ["query_proj", "key_proj", "value_proj", "output_proj"])
def test_units_of_projections_are_their_outputs(name):
    """By the derivative: `(out, in)`, heads and features along one axis."""
    attention = eqx.nn.MultiheadAttention(2, 4, qk_size=3, vo_size=5, use_query_bias=True, key=KEY)
    own = {name: getattr(attention, name)}
    x = jax.random.normal(KEY, (3, own[name].in_features))
    found = units(own, lambda p: jax.vmap(p[name])(x), EQUINOX)
    assert is_unit(found, f"{name}/weight")
    assert found[f"{name}/weight"].shape[0] == {"query_proj": 6, "key_proj": 6, "value_proj": 10}.get(name, 4)


def test_units_of_attention_and_recurrent_cells_are_rows():
    """All are matrices `(out, in)`."""
    params = {
        "attention": eqx.nn.MultiheadAttention(2, 4, qk_size=3, vo_size=5, key=KEY),
        "gru": eqx.nn.GRUCell(3, 4, key=KEY),
    }
    norms = oc.group_norms(params, EQUINOX)
    assert {name: norms[f"attention/{name}_proj/weight"].size for name in ("query", "value", "output")} == {
        "query": 6,
        "value": 10,
        "output": 4,
    }
    assert norms["gru/weight_ih"].shape == norms["gru/weight_hh"].shape == (12,)


def test_units_of_an_embedding_are_its_rows():
    """One for each token: the only entries that its derivative is not zero in."""
    embedding = eqx.nn.Embedding(7, 4, key=KEY)
    assert is_unit(units(embedding, lambda e: jax.vmap(e)(jnp.arange(7)).T, EQUINOX), "weight")


def test_a_state_goes_through_filter_jit():
    """Arrays only, so that no part of it is static."""
    model = eqx.nn.Linear(3, 1, key=KEY)
    tx = optax.chain(oc.zclip(warmup=2), optax.sgd(0.1))
    state = tx.init(eqx.filter(model, eqx.is_array))
    assert all(eqx.is_array(x) for x in jax.tree.leaves(state))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: jnp.mean(jax.vmap(model)(X) ** 2))(model)
        updates, state = tx.update(grads, state, model)
        return eqx.apply_updates(model, updates), state

    once, after = step(model, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert oc.metrics(step(once, after)[1])["clip/norm_before/whole"] > 0
