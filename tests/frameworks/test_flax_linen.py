"""Flax linen: plain, in boxes, scanned over layers, with attention."""

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
from flax import linen as nn, serialization
from flax.core import freeze
from flax.training.train_state import TrainState

X = jax.random.normal(jax.random.key(0), (8, 3))
Z = jax.random.normal(jax.random.key(2), (2, 3, 4))
FLAX = oc.groups.unit("flax")


def restored(state, like):
    return serialization.from_bytes(like, serialization.to_bytes(state))


class MLP(nn.Module):
    """Eleven layers, so that natural order, `Dense_2` before `Dense_10`, is not that of strings."""

    @nn.compact
    def __call__(self, x):
        for _ in range(10):
            x = nn.tanh(nn.Dense(3)(x))
        return nn.Dense(1)(x)


class Small(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.LayerNorm()(x))


def test_a_multi_layer_perceptron_drops_in():
    """The layers are the modules, in the order that they were called in."""
    model = MLP()
    params = jax.jit(model.init)(jax.random.key(1), X)["params"]
    layers = {f"Dense_{k}": lambda tree, k=k: tree[f"Dense_{k}"] for k in range(11)}
    drops_in(params, lambda p: jnp.mean((model.apply({"params": p}, X) - 1) ** 2), layers, restart=restored)


@pytest.mark.parametrize("container", [dict, freeze], ids=["dict", "FrozenDict"])
def test_all_variables_or_their_params_or_a_frozen_dict(container):
    """All do; the names begin with `params` where the tree does."""
    variables = container(jax.jit(Small().init)(jax.random.key(1), X))
    grads = jax.tree.map(jnp.ones_like, variables)
    assert list(oc.group_norms(grads, oc.groups.layer())) == ["params/Dense_0", "params/LayerNorm_0"]
    assert list(oc.group_norms(grads["params"], oc.groups.layer())) == ["Dense_0", "LayerNorm_0"]
    for tree in (grads, grads["params"]):
        rules = oc.groups.regex({"scales": "scale$", "rest": ".*"})
        assert list(oc.group_norms(tree, rules)) == ["rest", "scales"]
        assert isinstance(oc.rescale_tree(tree, 1.0)[0], type(tree))


@pytest.mark.parametrize(
    ("of_labels", "of_updates"), [(freeze, dict), (dict, freeze)], ids=["FrozenDict", "dict"]
)
def test_labels_may_be_in_another_container_than_updates(of_labels, of_updates):
    """What counts are the keys: a mask or `partition` of Optax would want the same containers."""
    params = of_updates({"body": {"kernel": jnp.full(4, 3.0)}, "head": {"kernel": jnp.full(4, 5.0)}})
    groups = oc.groups.labels(of_labels({"body": {"kernel": "slow"}, "head": None}))
    tx = oc.clip_by_groupwise_norm(2.0, groups)
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    assert isinstance(updates, type(params))
    np.testing.assert_allclose(updates["body"]["kernel"], 1.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["head"]["kernel"], 5.0)
    np.testing.assert_allclose(oc.metrics(state, params, groups)["clip/norm_before/slow"], 6, rtol=1e-6)


def test_depth_counts_the_key_params():
    """Of all variables the first key is `params`: one group. Pass their `params`, or one more level."""
    variables = jax.jit(Small().init)(jax.random.key(1), X)
    assert list(oc.group_norms(variables, oc.groups.depth(1))) == ["params"]
    assert list(oc.group_norms(variables["params"], oc.groups.depth(1))) == ["Dense_0", "LayerNorm_0"]


def test_boxes_of_partitioned_parameters_do_not_show():
    """Where `init` sees boxes and `update` arrays without them, the groups are the same."""
    init = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
    boxed = nn.Dense(3, kernel_init=init).init(jax.random.key(0), X)["params"]
    assert isinstance(boxed["kernel"], nn.LogicallyPartitioned)
    plain = nn.unbox(boxed)
    tx = oc.clip_by_groupwise_norm(1.0, oc.groups.regex({"w": "kernel$", "b": "bias$"}))
    updates, state = jax.jit(tx.update)(boxed, tx.init(boxed))
    bare, stats = jax.jit(tx.update)(plain, tx.init(boxed))
    chex.assert_trees_all_equal(nn.unbox(updates), bare)
    chex.assert_trees_all_equal(state, stats)
    assert isinstance(updates["kernel"], nn.LogicallyPartitioned)
    np.testing.assert_allclose(state.norm, [0, 3], rtol=1e-6)


class Transformer(nn.Module):
    """A block, an embedding before it and a head behind it."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 4)(tokens)
        x += nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x += nn.Dense(4)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
        return nn.Dense(1, name="head")(x)


TRANSFORMER = [
    "Dense_0",
    "Dense_1",
    "Embed_0",
    "LayerNorm_0",
    "LayerNorm_1",
    "MultiHeadDotProductAttention_0/key",
    "MultiHeadDotProductAttention_0/out",
    "MultiHeadDotProductAttention_0/query",
    "MultiHeadDotProductAttention_0/value",
    "head",
]


def below(name):
    """How a module is got at by its path."""
    return lambda tree: functools.reduce(lambda tree, key: tree[key], name.split("/"), tree)


def test_a_transformer_drops_in():
    """Attention is four layers, and one where a pattern or the depth says so."""
    model, tokens = Transformer(), jnp.arange(12).reshape(4, 3) % 7
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    layers = {name: below(name) for name in TRANSFORMER}
    drops_in(params, lambda p: jnp.mean((model.apply({"params": p}, tokens) - 1) ** 2), layers)
    one = [*TRANSFORMER[:5], "MultiHeadDotProductAttention_0", "head"]
    assert list(oc.group_norms(params, oc.groups.depth(1))) == one
    pattern = oc.groups.regex({r"\1": [r"^(.*MultiHeadDotProductAttention_\d+)/", r"^(.*)/\w+$"]})
    assert list(oc.group_norms({"block": params}, pattern)) == [f"block/{name}" for name in one]


class Block(nn.Module):
    """What is scanned over."""

    boxed: bool

    @nn.compact
    def __call__(self, x, _):
        init = nn.initializers.lecun_normal()
        init = nn.with_partitioning(init, ("in", "out")) if self.boxed else init
        x = nn.MultiHeadDotProductAttention(2, qkv_features=6)(x)
        return nn.tanh(nn.Dense(4, kernel_init=init)(x)), None


class Scanned(nn.Module):
    """Three layers in one array, along an axis, and a head."""

    axis: int
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}, "length": 3}
        scan = nn.scan(Block, **axes, metadata_params={nn.PARTITION_NAME: "layers"})
        return nn.Dense(1, name="head")(scan(self.boxed, name="layers")(x, None)[0])


ATTENTION = "layers/MultiHeadDotProductAttention_0"
STACKS = ["layers/Dense_0", *(f"{ATTENTION}/{name}" for name in ("key", "out", "query", "value"))]


@pytest.mark.parametrize(("axis", "boxed"), [(0, False), (1, True)], ids=["axis 0", "axis 1, in boxes"])
def test_layers_that_are_scanned_over_are_taken_apart(axis, boxed):
    """The path shows nothing of the axis that counts the layers; `stacked` is told."""
    model = Scanned(axis, boxed)
    params = jax.jit(model.init)(jax.random.key(1), Z)["params"]
    kernel = params["layers"]["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) == boxed
    assert nn.unbox(kernel).shape == ((3, 4, 4) if axis == 0 else (4, 3, 4))
    assert list(oc.group_norms(params, oc.groups.layer())) == ["head", *STACKS]
    stacked = oc.groups.stacked(oc.groups.layer(), "^layers/", axis)
    layers = {"head": below("head")}
    for name in STACKS:
        layers |= each(name, 3, below(name), axis)
    drops_in(params, lambda p: jnp.mean((model.apply({"params": p}, Z) - 1) ** 2), layers, stacked)


def like(shapes):
    """Arrays of these shapes, without zeros."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("axis", [0, 1])
def test_units_of_layers_that_are_scanned_over_are_those_of_each(axis):
    """One layer after the other, as if each stood alone."""
    params = like(jax.eval_shape(Scanned(axis).init, jax.random.key(1), Z)["params"])
    norms = oc.group_norms(params, oc.groups.stacked(FLAX, "^layers/", axis))
    apart = [jax.tree.map(lambda x: x.take(k, axis), params["layers"]) for k in range(3)]  # noqa: B023
    for name in STACKS:
        kernels = [np.asarray(below(name)({"layers": own})["kernel"]) for own in apart]
        kind = name.rsplit("/", 1)[-1]
        inputs = (0, 1) if kind == "out" else 0
        expected = [np.sqrt(np.sum(kernel**2, axis=inputs)).ravel() for kernel in kernels]
        np.testing.assert_allclose(norms[f"{name}/kernel"], np.concatenate(expected), rtol=1e-6)
        biases = [np.linalg.norm(below(name)({"layers": own})["bias"]) for own in apart]
        np.testing.assert_allclose(norms[f"{name}/bias"], biases, rtol=1e-6)


def test_a_recording_of_layers_that_are_scanned_over_reads_well():
    """Each layer has its index behind the name of its module, in natural order."""
    params = jax.eval_shape(Scanned(0).init, jax.random.key(1), Z)["params"]
    one = oc.groups.regex({r"\1": [r"^(.*MultiHeadDotProductAttention_\d+)/", r"^(.*)/\w+$"]})
    groups = oc.groups.stacked(one, "^layers/")
    tx = oc.record(groups)
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params))
    history = oc.History.from_state(state, params, groups)
    names = ["head", *(f"{name}[{k}]" for name in ("layers/Dense_0", ATTENTION) for k in range(3))]
    assert list(history.names) == names
    assert f"groups: {', '.join(names[:2])}" in str(history)
    pytest.importorskip("rich")
    table = history.table()
    assert [str(cell) for cell in table.columns[0].cells] == [*names, "whole"]
    assert [str(cell) for cell in table.columns[1].cells] == ["5", *["20"] * 3, *["118"] * 3, "419"]
    assert [str(cell) for cell in table.columns[2].cells][:2] == ["2.24", "4.47"]


class Zoo(nn.Module):
    """A layer of each kind, for the layouts."""

    def setup(self):
        """Names them."""
        self.embed = nn.Embed(7, 4)
        self.conv1 = nn.Conv(5, (3,))
        self.conv2 = nn.Conv(5, (3, 2))
        self.up = nn.ConvTranspose(5, (3,))
        self.attention = nn.MultiHeadDotProductAttention(2, qkv_features=6)
        self.dense = nn.Dense(5)
        self.query = nn.Dense(5)  # what ranks tell from the attention's

    def __call__(self, x):
        """Calls each on `(batch, length, 4)`."""
        attended = self.attention(x + self.embed(jnp.arange(3)))
        for layer in (self.conv1, self.up, self.dense, self.query):
            layer(x)
        return attended, self.conv2(x[:, None])


@pytest.fixture(scope="module")
def zoo():
    """Parameters of a layer of each kind, without zeros."""
    params = jax.jit(Zoo().init)(jax.random.key(1), Z)["params"]
    return jax.tree.map(lambda x: x + 0.1, params)


@pytest.mark.parametrize(
    ("name", "x"),
    [("conv1", Z), ("conv2", Z[:, None]), ("up", Z), ("dense", Z), ("query", Z)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_units_of_layers_are_their_outputs(zoo, name, x):
    """By the derivative of each output: a kernel has a group for each of them, a bias has one."""
    own = {name: zoo[name]}
    found = units(own, lambda p: Zoo().apply({"params": p}, x, method=lambda m, x: getattr(m, name)(x)), FLAX)
    assert is_unit(found, f"{name}/kernel")
    assert is_one(found, f"{name}/bias")


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_units_of_attention_are_those_of_its_heads(zoo, name):
    """A group for each head and feature; the bias `(heads, head)` is one and not a matrix."""
    layer, own = nn.DenseGeneral((2, 3)), {name: zoo["attention"][name]}
    found = units(own, lambda p: layer.apply({"params": p[name]}, Z).reshape(2, 3, 6), FLAX)
    assert is_unit(found, f"{name}/kernel")
    assert is_one(found, f"{name}/bias")


def test_units_of_an_attention_output_run_over_heads_and_features(zoo):
    """`(heads, head, model)`, which by rank alone would be taken for `(model, heads, head)`."""
    layer, own = nn.DenseGeneral(4, axis=(-2, -1)), {"out": zoo["attention"]["out"]}
    x = jax.random.normal(jax.random.key(3), (5, 2, 3))
    found = units(own, lambda p: layer.apply({"params": p["out"]}, x), FLAX)
    assert is_unit(found, "out/kernel")
    assert found["out/kernel"].shape == (4, 4)
    assert oc.group_norms(own, oc.groups.unit())["out/kernel"].shape == (3 * 4,)


def test_units_of_an_embedding_are_its_rows(zoo):
    """One for each token, which are the outputs where the embedding is also the last layer."""
    own = {"embed": zoo["embed"]}
    found = units(own, lambda p: nn.Embed(7, 4).apply({"params": p["embed"]}, Z, method="attend"), FLAX)
    assert is_unit(found, "embed/embedding")


def test_a_train_state_goes_on_from_a_checkpoint():
    """Clipping sits in its `tx`, and what it measured in its `opt_state`."""
    model, groups = Small(), oc.groups.layer()
    tx = optax.chain(oc.adagc(groups=groups), optax.adam(0.1))
    params = jax.jit(model.init)(jax.random.key(1), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        grads = jax.grad(lambda p: jnp.mean((state.apply_fn({"params": p}, X) - 1) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    fresh, state = state, step(state)
    chex.assert_trees_all_equal(step(restored(state, fresh)), step(state))
    logs = oc.metrics(state.opt_state, state.params, groups)
    assert logs["clip/norm_before/Dense_0"] > 0


def test_values_to_be_overwritten_are_left_alone():
    """Flax keeps the scales of FP8 under `_overwrite_with_gradient`: neither measured nor scaled."""
    grads = {
        "params": {"Dense_0": {"kernel": jnp.full((2, 2), 5.0)}},
        "_overwrite_with_gradient": {"Dense_0": {"kernel_scale": jnp.full(1, 300.0)}},
    }
    clipped, stats = oc.rescale_tree(grads, 1.0)
    chex.assert_trees_all_equal(clipped["_overwrite_with_gradient"], grads["_overwrite_with_gradient"])
    np.testing.assert_allclose(stats.norm, [10.0], rtol=1e-6)
