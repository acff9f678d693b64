"""Flax NNX: `nnx.Optimizer`, layers in lists, under vmap and scan, with attention."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from claims import drops_in, each, is_one, is_unit, units

import optaxclip as oc

pytest.importorskip("flax")
from flax import nnx

X = jax.random.normal(jax.random.key(0), (8, 3))
FLAX, LAYER = oc.groups.unit("flax"), oc.groups.layer()


class MLP(nnx.Module):
    """Two blocks in a list, with a normalisation that keeps statistics and a dropout that keeps a key."""

    def __init__(self, rngs):
        """Makes the layers."""
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        """Calls them."""
        for block in self.blocks:
            x = nnx.tanh(block(x))
        return self.head(self.dropout(self.norm(x)))


LAYERS = {
    "blocks/0": lambda tree: tree["blocks"][0],
    "blocks/1": lambda tree: tree["blocks"][1],
    "head": lambda tree: tree["head"],
    "norm": lambda tree: tree["norm"],
}


def test_a_split_model_drops_in():
    """The functional way: layers are attributes, and those in a list have numbers."""
    graph, params, rest = nnx.split(MLP(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params):
        return jnp.mean((nnx.merge(graph, params, rest, copy=True)(X) - 1) ** 2)

    drops_in(params, loss, LAYERS)


@nnx.jit
def train(model, optimizer):
    """A step as NNX's users write it."""
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - 1) ** 2))(model)
    optimizer.update(model, grads, value=loss)
    return loss, grads


def test_an_optimizer_sees_the_same_groups_in_init_and_update(tmp_path):
    """`init` sees `kernel/value` and `update` sees `kernel`; the pattern `kernel$` finds both."""
    ocp = pytest.importorskip("orbax.checkpoint")
    rules = oc.groups.regex({"kernels": "kernel$", r"\1": "^([a-z]+)"})
    tx = optax.chain(
        oc.record(),
        oc.clip_by_groupwise_norm(0.01, LAYER),
        oc.clip_by_groupwise_norm(9.0, rules),
        optax.sgd(0.1),
    )
    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(train(model, optimizer)[0]) for _ in range(2)]

    saved = nnx.state((model, optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", nnx.to_pure_dict(saved))
    other = MLP(nnx.Rngs(1))
    again = other, nnx.Optimizer(other, tx, wrt=nnx.Param)
    state = nnx.state(again)
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / "saved", nnx.to_pure_dict(state)))
    nnx.update(again, state)

    loss, grads = train(model, optimizer)
    assert train(*again)[0] == loss
    chex.assert_trees_all_equal(
        nnx.to_pure_dict(nnx.state(again)), nnx.to_pure_dict(nnx.state((model, optimizer)))
    )

    params = nnx.state(model, nnx.Param)
    assert list(oc.group_norms(params, rules)) == ["blocks", "head", "kernels", "norm"]
    logs = oc.metrics(optimizer.opt_state, params, [LAYER, rules])
    for name, select in LAYERS.items():
        norm = np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(select(grads))]))
        np.testing.assert_allclose(logs[f"clip_0/norm_before/{name}"], norm, rtol=1e-5)
    assert logs["clip_0/norm_after/head"] == pytest.approx(0.01, rel=1e-5)
    assert logs["clip_1/clipped_fraction/kernels"] == 0
    history = oc.History.from_state(optimizer.opt_state, params)
    assert history.loss.tolist() == [*losses, float(loss)]
    assert "blocks/0/kernel" in history.names


def test_patterns_that_end_with_the_name_of_a_parameter_find_it_in_init_and_update():
    """`init` is shown `kernel/value` and `update` `kernel`; a function of the path sees `kernel` in both."""
    model, seen = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), []

    def raw(tree):
        seen.append([jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths(tree)])
        return tree

    def by_path(path, leaf):
        seen.append(path)
        return "k" if path.endswith("kernel") else "b"

    paths = jax.tree_util.tree_leaves_with_path
    look = optax.GradientTransformation(
        lambda p: raw(p) and optax.EmptyState(), lambda u, s, p=None: (raw(u), s)
    )
    tx = optax.chain(look, oc.clip_by_groupwise_norm(1e-3, oc.groups.labels(by_path)), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = model.kernel[...]
    train(model, optimizer)
    lists = [names for names in seen if isinstance(names, list)]
    assert lists[0] == ["bias/value", "kernel/value"]
    assert lists[-1] == ["bias", "kernel"]
    assert {name for name in seen if isinstance(name, str)} == {"bias", "kernel"}
    np.testing.assert_allclose(jnp.linalg.norm(model.kernel[...] - before), 1e-3, rtol=1e-3)


def test_statistics_and_keys_of_a_whole_state():
    """Keys and counts pass; statistics of batches are floats too, which `nnx.Param` leaves out."""
    state = nnx.state(MLP(nnx.Rngs(0)))
    text = oc.describe(LAYER, state)
    assert "left alone: 2 leaves\n  dropout/rngs/count" in text
    assert "norm: 4 leaves" in text
    assert "norm: 2 leaves" in oc.describe(LAYER, nnx.state(MLP(nnx.Rngs(0)), nnx.Param))


def test_all_views_of_a_model_have_the_same_names():
    """The module itself, its state, and pure dicts."""
    model = MLP(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    views = [params, nnx.to_pure_dict(params), getattr(nnx, "as_pure", nnx.to_pure_dict)(params)]
    assert len({tuple(oc.group_norms(view, oc.groups.leaf())) for view in views}) == 1
    assert set(oc.group_norms(params, oc.groups.leaf())) < set(oc.group_norms(model, oc.groups.leaf()))


class Deep(nnx.Module):
    """Five layers made by vmap and scanned over, and a head."""

    def __init__(self, rngs):
        """Makes the layers at once."""

        @nnx.split_rngs(splits=5)
        @functools.partial(nnx.vmap, in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(3, 3, rngs=rngs)

        self.layers = make(rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        """Scans over them."""

        @functools.partial(nnx.scan, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(layer, x):
            return nnx.tanh(layer(x))

        return self.head(through(self.layers, x))


def test_layers_made_by_vmap_and_scanned_over_are_taken_apart():
    """Each index of the first axis has a norm of its own, and its own units."""
    graph, params = nnx.split(Deep(nnx.Rngs(0)), nnx.Param)
    kernel, bias = (params["layers"][name][...] for name in ("kernel", "bias"))
    assert kernel.shape == (5, 3, 3)
    layers = {"head": lambda tree: tree["head"]} | each("layers", 5, lambda tree: tree["layers"])
    stacked = oc.groups.stacked(LAYER, "^layers/")
    drops_in(params, lambda p: jnp.mean((nnx.merge(graph, p)(X) - 1) ** 2), layers, stacked)
    found = oc.group_norms(params, oc.groups.stacked(FLAX, "^layers/"))
    np.testing.assert_allclose(found["layers/kernel"], np.linalg.norm(kernel, axis=1).ravel(), rtol=1e-6)
    np.testing.assert_allclose(found["layers/bias"], np.linalg.norm(bias, axis=1), rtol=1e-6)


def test_an_optimizer_clips_each_of_the_layers_that_are_scanned_over():
    """As NNX's users train them; pure arrays, as `update` sees them, are taken apart in the same way."""
    model, stacked = Deep(nnx.Rngs(0)), oc.groups.stacked(LAYER, "^layers/")
    tx = optax.chain(oc.clip_by_groupwise_norm(1e-4, stacked), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    _, grads = train(model, optimizer)
    logs = oc.metrics(optimizer.opt_state, nnx.state(model, nnx.Param), stacked)
    for k in range(5):
        parts = [np.ravel(grads["layers"][name][...][k]) for name in ("kernel", "bias")]
        norm = np.linalg.norm(np.concatenate(parts))
        np.testing.assert_allclose(logs[f"clip/norm_before/layers[{k}]"], norm, rtol=1e-5)
        np.testing.assert_allclose(logs[f"clip/norm_after/layers[{k}]"], min(norm, 1e-4), rtol=1e-5)


class Transformer(nnx.Module):
    """A block, an embedding before it and a head behind it."""

    def __init__(self, rngs):
        """Makes the layers."""
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(4, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, tokens):
        """Calls them."""
        x = self.embed(tokens)
        x += self.attention(self.norms[0](x))
        x += self.down(nnx.gelu(self.up(self.norms[1](x))))
        return self.head(x)


class CNN(nnx.Module):
    """Two convolutions, one with a normalisation that keeps statistics."""

    def __init__(self, rngs):
        """Makes the layers."""
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        """Calls them."""
        x = nnx.relu(self.norm(self.stem(x)))
        return self.head(jnp.mean(nnx.relu(self.conv(x)), (1, 2)))


PROJECTIONS = [f"attention/{name}" for name in ("key", "out", "query", "value")]


@pytest.mark.parametrize(
    ("kind", "x", "names"),
    [
        (
            Transformer,
            jnp.arange(12).reshape(4, 3) % 7,
            [*PROJECTIONS, "down", "embed", "head", "norms/0", "norms/1", "up"],
        ),
        (CNN, jax.random.normal(jax.random.key(2), (4, 6, 6, 3)), ["conv", "head", "norm", "stem"]),
    ],
    ids=["Transformer", "CNN"],
)
def test_a_larger_model_drops_in(kind, x, names):
    """The layers are called as the attributes; attention is four, and one where a pattern says so."""
    graph, params, rest = nnx.split(kind(nnx.Rngs(0)), nnx.Param, ...)

    def at(name):
        keys = [int(key) if key.isdigit() else key for key in name.split("/")]
        return lambda tree: functools.reduce(lambda tree, key: tree[key], keys, tree)

    def loss(params):
        return jnp.mean((nnx.merge(graph, params, rest, copy=True)(x) - 1) ** 2)

    drops_in(params, loss, {name: at(name) for name in names})
    one = oc.groups.regex({r"\1": ["^(.*attention)/", r"^(.*)/\w+$"]})
    expected = [name for name in names if not name.startswith("attention/")]
    assert list(oc.group_norms(params, one)) == (["attention"] if kind is Transformer else []) + expected


@pytest.mark.parametrize("container", [dict, nnx.State], ids=["dict", "State"])
def test_labels_under_an_optimizer_may_be_a_dict_or_a_state(container):
    """Whichever `nnx.Optimizer` shows: a state with `value` below each name in `init`, then pure arrays."""
    model = nnx.Dict(body=nnx.Linear(3, 3, rngs=nnx.Rngs(0)), head=nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    names = {"body": {"kernel": "kernels", "bias": None}, "head": {"kernel": "kernels", "bias": None}}
    groups = oc.groups.labels(container(names))
    tx = optax.chain(oc.clip_by_groupwise_norm(1e-3, groups), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grads = nnx.grad(lambda model: jnp.mean((model["head"](model["body"](X)) - 1) ** 2))(model)
    optimizer.update(model, grads)
    moved = jax.tree.map(jnp.subtract, nnx.to_pure_dict(nnx.state(model, nnx.Param)), before)
    kernels = [np.ravel(moved[name]["kernel"]) for name in ("body", "head")]
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(kernels)), 1e-3, rtol=1e-3)
    np.testing.assert_allclose(moved["head"]["bias"], -grads["head"]["bias"][...], rtol=1e-5)
    logs = oc.metrics(optimizer.opt_state, nnx.state(model, nnx.Param), groups)
    assert logs["clip/norm_before/kernels"] > 1e-3


def shifted(module):
    """A module's graph and parameters, none of them zero."""
    graph, params = nnx.split(module, nnx.Param)
    return graph, jax.tree.map(lambda x: x + 0.1, params)


RNGS = nnx.Rngs(0)
Z = jax.random.normal(jax.random.key(2), (2, 3, 4))


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nnx.Linear(4, 5, rngs=RNGS), Z),
        (nnx.Conv(4, 5, (3,), rngs=RNGS), Z),
        (nnx.Conv(4, 5, (3, 2), rngs=RNGS), Z[:, None]),
        (nnx.ConvTranspose(4, 5, (3,), rngs=RNGS), Z),
        (nnx.LinearGeneral((3, 4), 5, axis=(-2, -1), rngs=RNGS), Z),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nnx.Module) else "",
)
def test_units_of_layers_are_their_outputs(module, x):
    """By the derivative of each output: a kernel has a group for each of them, a bias has one."""
    graph, params = shifted(module)
    found = units(params, lambda p: nnx.merge(graph, p)(x), FLAX)
    assert is_unit(found, "kernel")
    assert is_one(found, "bias")


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_units_of_attention_are_those_of_its_heads(name):
    """A group for each head and feature; the bias `(heads, head)` is one and not a matrix."""
    attention = nnx.MultiHeadAttention(2, 4, 6, rngs=RNGS)
    graph, params = shifted(getattr(attention, name))
    found = units({name: params}, lambda p: nnx.merge(graph, p[name])(Z).reshape(2, 3, 6), FLAX)
    assert is_unit(found, f"{name}/kernel")
    assert is_one(found, f"{name}/bias")
    whole = oc.group_norms(nnx.state(attention, nnx.Param), FLAX)
    assert whole[f"{name}/kernel"].shape == (2 * 3,)
    assert whole["out/kernel"].shape == (4,)


def test_units_of_an_embedding_are_its_rows():
    """One for each token."""
    graph, params = shifted(nnx.Embed(7, 4, rngs=RNGS))
    assert is_unit(units(params, lambda p: nnx.merge(graph, p).attend(Z), FLAX), "embedding")
