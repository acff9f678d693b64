"""Which entries share a norm, and what `describe` says of it."""

import re

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import optaxclip as oc

PARAMS = {
    "Dense_10": {"kernel": jnp.ones((2, 8)), "bias": jnp.zeros(8)},
    "Dense_2": {"kernel": jnp.full((3, 3), 2.0), "bias": jnp.zeros(3)},
    "scale": jnp.array(5.0),
}


def norms(groups, params=PARAMS, **options):
    return {
        name: np.asarray(norm).tolist() for name, norm in oc.group_norms(params, groups, **options).items()
    }


def test_whole_is_one_group():
    assert norms(oc.groups.whole()) == {"whole": pytest.approx((16 + 36 + 25) ** 0.5)}


def test_layer_joins_the_arrays_of_a_module_and_sorts_naturally():
    found = norms(oc.groups.layer())
    assert list(found) == ["(root)", "Dense_2", "Dense_10"]
    assert found == {"(root)": 5, "Dense_2": 6, "Dense_10": 4}


def test_leaf_is_one_group_for_each_array():
    assert list(norms(oc.groups.leaf())) == [
        "Dense_2/bias",
        "Dense_2/kernel",
        "Dense_10/bias",
        "Dense_10/kernel",
        "scale",
    ]


@pytest.mark.parametrize(("k", "names"), [(0, ["(root)"]), (1, ["a", "b"]), (2, ["a/b", "a/c", "b"])])
def test_depth_groups_by_the_first_keys(k, names):
    params = {"a": {"b": {"w": jnp.ones(1)}, "c": {"w": jnp.ones(1)}}, "b": jnp.ones(1)}
    assert list(norms(oc.groups.depth(k), params)) == names


def test_regex_takes_the_first_match_and_fills_in_what_matched():
    rules = {None: "bias", r"dense\1": r"^Dense_(\d+)/", "rest": ".*"}
    assert norms(oc.groups.regex(rules)) == {"dense2": 6, "dense10": 4, "rest": 5}


def test_regex_with_named_references_lists_and_default():
    groups = oc.groups.regex({r"\g<kind>": [r"/(?P<kind>kernel)$", "/(?P<kind>bias)$"]}, default="others")
    assert norms(groups) == {"bias": 0, "kernel": pytest.approx(52**0.5), "others": 5}
    assert norms(oc.groups.regex({"k": "kernel"}, default=None)) == {"k": pytest.approx(52**0.5)}


def test_leaves_named_none_are_left_alone():
    grads = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([300.0])}
    for groups in (
        oc.groups.regex({None: "head", "rest": ".*"}),
        oc.groups.labels({"body": "x", "head": None}),
    ):
        out, stats = oc.rescale_tree(grads, 1.0, groups=groups)
        chex.assert_trees_all_equal(out["head"], grads["head"])
        assert stats.norm.tolist() == [5]


def test_labels_by_function_see_path_and_leaf():
    assert norms(oc.groups.labels(lambda path, leaf: f"rank{leaf.ndim}")) == {
        "rank0": 5,
        "rank1": 0,
        "rank2": pytest.approx(52**0.5),
    }


def test_labels_by_prefix_tree_may_use_other_containers():
    """A tree of names stands for what is below it, whatever the containers are."""
    assert norms(
        oc.groups.labels({"Dense_10": "a", "Dense_2": {"kernel": "b", "bias": None}, "scale": "a"})
    ) == {
        "a": pytest.approx(41**0.5),
        "b": 6,
    }
    assert norms(oc.groups.labels("all")) == {"all": pytest.approx(77**0.5)}


@pytest.mark.parametrize(
    ("role", "norm", "a", "b"),
    [
        (oc.groups.measured_only, 5.0, [0.6], [4.0]),  # counted: the norm is of both; b stays
        (oc.groups.scaled_only, 3.0, [1.0], [4 / 3]),  # not counted: the norm is of a; b follows
    ],
)
def test_a_leaf_may_be_counted_or_scaled_alone(role, norm, a, b):
    """The norm that comes out is the limit only where everything counted is scaled."""
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    for groups in (
        oc.groups.regex({"all": "a", role("all"): "b"}),
        oc.groups.labels({"a": "all", "b": role("all")}),
        oc.groups.labels(lambda path, leaf: "all" if path == "a" else role("all")),
    ):
        out, stats = oc.rescale_tree(grads, 1.0, groups=groups)
        np.testing.assert_allclose(stats.norm, [norm], rtol=1e-6)
        np.testing.assert_allclose(out["a"], a, rtol=1e-6)
        np.testing.assert_allclose(out["b"], b, rtol=1e-6)
        counted = [out["a"], out["b"]] if norm == 5 else [out["a"]]
        np.testing.assert_allclose(stats.norm_after, [np.linalg.norm(counted)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["l1", "linf", "rms"])
def test_the_norm_after_of_unscaled_leaves_is_right_for_other_norms(kind):
    grads = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([4.0])}
    groups = oc.groups.regex({"all": "a", oc.groups.measured_only("all"): "b"})
    norm = getattr(oc.norms, kind)()
    out, stats = oc.rescale_tree(grads, 1.0, groups=groups, norm=norm)
    after = oc.group_norms(out, oc.groups.whole(), norm)["whole"]
    np.testing.assert_allclose(stats.norm_after[0], after, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "norms_shape"),
    [
        ((), ()),
        ((7,), ()),
        ((4, 6), (6,)),
        ((1, 6), ()),
        ((5, 2, 3), (6,)),
        ((1, 1, 5), ()),
        ((3, 3, 4, 6), (6,)),
        ((2, 3, 3, 4, 6), (6,)),
        ((2, 2, 3, 3, 4, 6), (6,)),
    ],
)
def test_units_by_rank(shape, norms_shape):
    """Ranks 0 to 6: outputs are last; an array with one long axis is a vector."""
    assert oc.group_norms({"w": jnp.ones(shape)}, oc.groups.unit())["w"].shape == norms_shape


def test_unit_axes_are_those_the_norm_runs_over():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    for axis in (0, -1, (0, 2), (1,), (0, 1, 2)):
        found = oc.group_norms({"w": x}, oc.groups.unit(axis))["w"]
        np.testing.assert_allclose(
            found,
            np.linalg.norm(x[None], axis=None)
            if axis == (0, 1, 2)
            else np.sqrt(np.sum(np.square(x), axis=axis)).ravel(),
            rtol=1e-6,
        )


def test_unit_axes_by_pattern_with_the_default_for_the_rest():
    params = {"conv1d": jnp.ones((3, 4, 5)), "dense": jnp.ones((4, 6))}
    found = oc.group_norms(params, oc.groups.unit({"conv1d": (0, 1)}))
    np.testing.assert_allclose(found["conv1d"], np.full(5, 12**0.5), rtol=1e-6)
    np.testing.assert_allclose(found["dense"], np.full(6, 2.0), rtol=1e-6)


UNITS = {
    "flax": {
        "dense/kernel": ((4, 6), 6),
        "conv/kernel": ((3, 4, 6), 6),  # of one dimension; attention by rank alone
        "attention/query/kernel": ((4, 2, 3), 6),
        "attention/query/bias": ((2, 3), 1),
        "attention/out/kernel": ((2, 3, 4), 4),
        "query/kernel": ((4, 6), 6),  # a dense layer that is called so
        "embed/embedding": ((7, 4), 7),
        "norm/scale": ((4, 4), 1),
        "fused/kernel": ((4, 3, 2, 2, 2, 2, 5), 5),
        "wide/kernel": ((1, 6), 1),
    },
    "equinox": {
        "linear/weight": ((6, 4), 6),
        "conv/weight": ((6, 4, 3, 3), 6),
        "conv/bias": ((6, 1, 1), 1),
        "norm/bias": ((2, 3), 1),
        "embedding/weight": ((7, 4), 7),
    },
    "haiku": {
        "mlp/~/linear_0/w": ((4, 6), 6),
        "conv1_d/w": ((3, 4, 6), 6),
        "conv2_d_transpose_1/w": ((3, 3, 6, 4), 6),
        "embed/embeddings": ((7, 4), 7),
        "norm/offset": ((2, 3), 1),
    },
    "keras": {
        "sequential/dense/kernel": ((4, 6), 6),
        "conv1d/kernel": ((3, 4, 6), 6),
        "conv2d_transpose/kernel": ((3, 3, 6, 4), 6),
        "depthwise_conv2d_3/kernel": ((3, 3, 4, 2), 8),
        "separable/depthwise_kernel": ((3, 3, 4, 2), 8),
        "attention/key/kernel": ((4, 2, 3), 6),
        "attention/attention_output/kernel": ((2, 3, 4), 4),
        "gru/gru_cell/recurrent_kernel": ((4, 12), 12),
        "gru/gru_cell/bias": ((2, 12), 1),
        "batch_norm/gamma": ((2, 3), 1),
    },
}


@pytest.mark.parametrize("framework", UNITS)
def test_units_by_the_names_of_a_framework(framework):
    """Names tell what ranks do not: which axes count outputs, and what is a bias of rank 2."""
    shapes = {path: jnp.ones(shape) for path, (shape, _) in UNITS[framework].items()}
    found = oc.group_norms(shapes, oc.groups.unit(framework))
    assert {path: norm.size for path, norm in found.items()} == {
        path: count for path, (_, count) in UNITS[framework].items()
    }
    for path, norm in found.items():
        np.testing.assert_allclose(norm, (shapes[path].size / norm.size) ** 0.5, rtol=1e-6)


def test_a_framework_for_the_rest_behind_patterns():
    params = {"fused/kernel": jnp.ones((4, 3, 2)), "query/kernel": jnp.ones((4, 3, 2)), "w": jnp.ones((3, 4))}
    rules = {"fused": 1, "/kernel": "flax", "w": "equinox"}
    found = oc.group_norms(params, oc.groups.unit(rules))
    assert {path: norm.size for path, norm in found.items()} == {"fused/kernel": 8, "query/kernel": 6, "w": 3}


def test_a_method_takes_the_name_of_a_framework():
    """Adaptive clipping of `(out, in)`, by output."""
    params = {"weight": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
    tx = oc.adaptive_grad_clip(0.1, axis="equinox")
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["weight"], 0.1 * params["weight"], rtol=1e-6)


@pytest.mark.parametrize("axis", ["torch", {"weight$": 1, "": "torch"}])
def test_a_framework_that_is_not_known(axis):
    message = "groups.unit: axis is 'torch'. Pass one of 'equinox', 'flax', 'haiku', 'keras'."
    with pytest.raises(ValueError, match=f"^{message}$"):
        oc.groups.unit(axis)


def test_names_that_no_leaf_gets_are_an_error():
    """A typo would switch clipping off; without leaves, as behind `optax.partition`, it is none."""
    params = {"head": {"w": jnp.ones(2)}, "body": jnp.ones(2)}
    message = (
        "groups.regex: no leaf gets a name by '^haed/', 'tail', among 'body', 'head/w': nothing would be "
        "scaled. Mend the patterns."
    )
    for groups in (
        oc.groups.regex({"head": "^haed/", "tail": "tail", None: ".*"}),
        oc.groups.regex({"head": ["^haed/", "tail"]}, default=None),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            oc.clip_by_groupwise_norm(1.0, groups).init(params)
        assert norms(groups, {}) == {}
    assert norms(oc.groups.regex({"head": "^head/", "tail": "tail", None: ".*"}), params).keys() == {"head"}
    assert norms(oc.groups.regex({None: ".*"}), params) == {}


def test_a_last_key_with_slashes_is_several_keys():
    """As in flattened trees; the keys above are taken as they are."""
    flat = {"a/b/kernel": jnp.full(1, 3.0), "a/b/bias": jnp.full(1, 4.0), "c/~/d": {"w": jnp.ones(1)}}
    assert norms(oc.groups.layer(), flat) == {"a/b": 5, "c/~/d": 1}
    assert norms(oc.groups.depth(1), flat) == {"a": 5, "c/~/d": 1}
    for tree in ({"a/b": "x", "c/~/d": "y"}, {"a": "x", "c/~/d": {"w": "y"}}):
        assert norms(oc.groups.labels(tree), flat) == {"x": 5, "y": 1}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "inner", [oc.groups.layer(), oc.groups.leaf(), oc.groups.unit()], ids=["layer", "leaf", "unit"]
)
def test_stacked_equals_the_unstacked_layers_one_by_one(inner, axis):
    rng = np.random.default_rng(0)
    layers = [{"kernel": rng.normal(size=(4, 6)) * 3**k, "bias": rng.normal(size=6)} for k in range(3)]
    layers = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), layers)
    stacked = {"layers": jax.tree.map(lambda *x: jnp.stack(x, axis), *layers), "head": jnp.ones((6, 2))}
    out, _ = oc.rescale_tree(stacked, 2.0, groups=oc.groups.stacked(inner, "^layers/", axis))
    for k, layer in enumerate(layers):
        alone, _ = oc.rescale_tree({"layers": layer}, 2.0, groups=inner)
        own = jax.tree.map(lambda x: jnp.take(x, k, axis), out["layers"])  # noqa: B023
        chex.assert_trees_all_close(own, alone["layers"], rtol=1e-6)
    head, _ = oc.rescale_tree({"head": stacked["head"]}, 2.0, groups=inner)
    chex.assert_trees_all_close(out["head"], head["head"], rtol=1e-6)


def test_rows_of_stacked_groups_have_names():
    params = {"layers": {"w": jnp.ones((2, 3, 4))}}
    tx = oc.clip_by_groupwise_norm(1.0, oc.groups.stacked(oc.groups.unit(), "layers"))
    _, state = tx.update(params, tx.init(params))
    names = [
        key
        for key in oc.metrics(state, params, oc.groups.stacked(oc.groups.unit(), "layers"))
        if "/factor/" in key
    ]
    assert names == [f"clip/factor/layers/w[{i},{j}]" for i in range(2) for j in range(4)] + [
        "clip/factor/whole"
    ]


def test_names_replace_paths():
    keras = [jnp.ones((2, 3)), jnp.ones(3), jnp.full((3, 1), 2.0)]
    names = ["dense/kernel", "dense/bias", "head/kernel"]
    assert norms(oc.groups.layer(names=names), keras) == {"dense": 3, "head": pytest.approx(12**0.5)}
    tx = oc.adaptive_grad_clip(0.1, groups=oc.groups.leaf(names=names))
    updates, state = tx.update(keras, tx.init(keras), keras)
    np.testing.assert_allclose(state.limit, [0.1 * 3**0.5, 0.1 * 6**0.5, 0.1 * 12**0.5], rtol=1e-6)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: 0.1 * x, keras), rtol=1e-6)


def test_paths_are_the_same_in_every_framework():
    """Wrappers at the end of a path are dropped, so that `init` and `update` agree."""
    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert list(norms(oc.groups.leaf(), nnx.state(linear, nnx.Param))) == ["bias", "kernel"]
    boxed = linen.Dense(3, kernel_init=linen.with_partitioning(linen.initializers.ones, (None, "x")))
    params = boxed.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert list(norms(oc.groups.leaf(), params)) == ["bias", "kernel"]
    module = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    assert list(norms(oc.groups.leaf(), eqx.filter(module, eqx.is_array))) == ["bias", "weight"]
    haiku = {"mlp/~/linear_0": {"w": jnp.ones(1)}, "mlp/~/linear_1": {"w": jnp.ones(1)}}
    assert list(norms(oc.groups.layer(), haiku)) == ["mlp/~/linear_0", "mlp/~/linear_1"]
    assert list(norms(oc.groups.leaf(), jnp.ones(2))) == ["(root)"]


def test_a_parameter_called_value_keeps_its_name_beside_others():
    class Attention(eqx.Module):
        key: jax.Array
        value: jax.Array

    assert list(norms(oc.groups.leaf(), Attention(jnp.ones(2), jnp.ones(2)))) == ["key", "value"]


def test_nnx_optimizers_see_the_same_groups_in_init_and_update():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    import optax

    tx = optax.chain(
        oc.clip_by_groupwise_norm(1.0, oc.groups.regex({"w": "kernel$", "b": "bias$"})), optax.sgd(0.1)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model)
    optimizer.update(model, grads)
    assert np.isfinite(model.kernel[...]).all()


def test_leaves_with_the_same_joined_path_stay_apart():
    params = {"a/b": jnp.ones(1), "a": {"b": jnp.ones(4)}}
    assert sorted(norms(oc.groups.leaf(), params).values()) == [1, 2]


def test_describe_lists_groups_leaves_and_what_is_left_alone():
    params = {
        "layers": {"kernel": jnp.ones((12, 2, 3)), "bias": jnp.ones((12, 3), jnp.bfloat16)},
        "Dense_10": {"w": jnp.ones(4)},
        "Dense_2": {"w": jnp.ones(4)},
        "step": jnp.array(0),
    }
    text = oc.describe(oc.groups.stacked(oc.groups.layer(), "layers"), params)
    assert text == "\n".join(
        [
            "3 groups, 4 leaves, 116 entries",
            "Dense_2: 1 leaf, 4 entries",
            "  Dense_2/w  (4,)  float32",
            "Dense_10: 1 leaf, 4 entries",
            "  Dense_10/w  (4,)  float32",
            "layers: 2 leaves, 108 entries, 12 norms",
            "  layers/bias    (12, 3)     bfloat16  one norm per index of axis 0",
            "  layers/kernel  (12, 2, 3)  float32   one norm per index of axis 0",
            "left alone: 1 leaf",
            "  step  ()  int32",
        ]
    )
    rules = {oc.groups.measured_only("x"): "Dense_2/", oc.groups.scaled_only("x"): "Dense_10/", "x": "layers"}
    text = oc.describe(oc.groups.regex(rules), jax.eval_shape(lambda: params))
    assert "  Dense_2/w      (4,)        float32   measured only" in text.splitlines()
    assert "  Dense_10/w     (4,)        float32   scaled only" in text.splitlines()


def test_a_doubled_backslash_in_a_name_stands_for_one():
    """What follows it is no reference, even where it is a number."""
    names = oc.group_norms({"a\\1": jnp.ones(4)}, oc.groups.regex({r"a\\1": "^a"}))
    assert list(names) == ["a\\1"]
