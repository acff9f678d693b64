"""The table of `docs/numerics.md`, over all dtypes; `test_edges.py` says what holds which row."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from versions import enable_x64

import optaxclip as oc
from optaxclip import _measure, _scale

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64"]
EPSILON = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-12, "complex64": 1e-6}
RESPONSES = {
    "clip": oc.responses.clip(),
    "normalize": oc.responses.normalize(),
    "rational": oc.responses.soft("rational"),
    "sqrt": oc.responses.soft("sqrt"),
    "zero": oc.responses.zero(),
}
NORMS = {
    "l2": oc.norms.l2(),
    "l1": oc.norms.l1(),
    "linf": oc.norms.linf(),
    "rms": oc.norms.rms(),
    "lp": oc.norms.lp(3),
}


@pytest.fixture(params=DTYPES)
def dtype(request):
    """Each dtype, with 64-bit types switched on where it needs them."""
    with enable_x64(request.param == "float64"):
        yield request.param


def random(dtype, *shapes, scale=1.0):
    keys = np.random.default_rng(0)
    return [jnp.asarray(keys.normal(size=shape) * scale).astype(dtype) for shape in shapes]


def tree(dtype, scale=1.0):
    kernel, bias, head = random(dtype, (8, 5), (5,), (5, 3), scale=scale)
    return {"dense": {"kernel": kernel, "bias": bias}, "head": {"kernel": head}}


def flat(tree):
    return {"/".join(str(k.key) for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_a_norm_within_its_limit_comes_out_bit_identical(dtype):
    grads = tree(dtype)
    out, stats = oc.rescale_tree(grads, 1e4, groups=oc.groups.layer())
    chex.assert_trees_all_equal(out, grads)
    assert stats.factor.tolist() == [1, 1]
    assert stats.clipped.tolist() == [0, 0]


def test_a_norm_at_its_limit_comes_out_bit_identical(dtype):
    """The limit itself is allowed, though a factor of limit over norm might round."""
    grads = tree(dtype)
    with jax.numpy_dtype_promotion("standard"):
        limit = oc.group_norms(grads, oc.groups.whole())["whole"]
    out, _ = oc.rescale_tree(grads, limit)
    chex.assert_trees_all_equal(out, grads)


def test_rescaling_agrees_with_float64_in_every_dtype(dtype):
    agrees_with_float64(dtype, "l2", "clip")


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("kind", NORMS)
def test_every_norm_with_every_response_agrees_with_float64(kind, response):
    agrees_with_float64("float32", kind, response)


def agrees_with_float64(dtype, kind, response):
    """Rescales per layer, up to the rounding of the dtype."""
    grads, limit = tree(dtype), 0.7
    options = {"groups": oc.groups.layer(), "norm": NORMS[kind], "response": RESPONSES[response]}
    out, stats = jax.jit(lambda tree: oc.rescale_tree(tree, limit, **options))(grads)
    groups = {name: name.split("/")[0] for name in flat(grads)}
    expected = reference.rescale(flat(grads), groups, limit, kind, response, p=3)
    for name, leaf in flat(out).items():
        assert leaf.dtype == dtype
        wide = np.asarray(leaf).astype(expected[name].dtype)
        np.testing.assert_allclose(wide, expected[name], rtol=EPSILON[dtype], atol=1e-30)
    for k, group in enumerate(["dense", "head"]):
        members = [x for name, x in flat(grads).items() if groups[name] == group]
        np.testing.assert_allclose(stats.norm[k], reference.norm(members, kind, 3), rtol=1e-6)
        after = reference.norm([x for name, x in expected.items() if groups[name] == group], kind, 3)
        np.testing.assert_allclose(stats.norm_after[k], after, rtol=2e-6, atol=1e-30)


def test_the_norm_that_comes_out_is_the_limit(dtype):
    out, stats = oc.rescale_tree(tree(dtype), 0.5)
    np.testing.assert_allclose(reference.norm(jax.tree.leaves(out)), 0.5, rtol=EPSILON[dtype])
    np.testing.assert_allclose(stats.norm_after, 0.5, rtol=1e-6)


def test_mixed_dtypes_share_a_norm_and_keep_their_own():
    with enable_x64(True):
        grads = {name: random(name, (7, 3))[0] for name in DTYPES}
        out, stats = oc.rescale_tree(grads, 1.0)
        chex.assert_trees_all_equal_dtypes(out, grads)
        np.testing.assert_allclose(stats.norm[0], reference.norm(grads.values()), rtol=1e-6)
        for name, leaf in out.items():
            expected = np.asarray(grads[name], np.complex128) / reference.norm(grads.values())
            np.testing.assert_allclose(np.asarray(leaf, np.complex128), expected, rtol=EPSILON[name])


def test_zeros_beside_tiny_float64_entries_stay_zeros():
    """The factor of their group is beyond float32, and an infinity would make NaN of them."""
    with enable_x64(True):
        grads = {"a": jnp.array([1e-60], jnp.float64), "b": jnp.zeros(1, jnp.float32)}
        out, _ = oc.rescale_tree(grads, 1.0, response=oc.responses.normalize())
        np.testing.assert_allclose(out["a"], [1], rtol=1e-12)
        assert out["b"].tolist() == [0]


def test_numpy_leaves_of_64_bits_are_taken_as_jax_takes_them():
    """In 32 bits, where 64 are switched off, without a warning about each."""
    params = {"w": np.ones((2, 3))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tx, grads in (
            (oc.rescale_by_norm(1.0), params),
            (oc.carry_clipped(oc.clip_by_value(0.5)), params),
            (oc.carry_clipped(oc.clip_by_value(0.5), bound=1.0), params),
            (oc.clip_per_example(1.0), {"w": np.ones((4, 2, 3))}),
            (oc.scale_by_stable_adam(), params),
            (oc.larc(0.1, weight_decay=0.1), params),
            (oc.acclip(), params),
            (oc.centralize(), params),
        ):
            out, _ = tx.update(grads, tx.init(params), params)
            assert out["w"].dtype == np.float32


def test_float64_is_clipped_to_the_rounding_of_float64():
    with enable_x64(True):
        out, _ = oc.rescale_tree({"a": random("float64", (100,))[0], "b": random("float32", (3,))[0]}, 0.1)
        assert abs(np.linalg.norm(out["a"]) / 0.1 - 1) < 1e-1  # b has its share
        alone, _ = oc.rescale_tree(random("float64", (100,))[0], 0.1)
        np.testing.assert_allclose(np.linalg.norm(alone), 0.1, rtol=1e-14)


@pytest.mark.parametrize(("entry", "reported"), [(1e200, np.finfo(np.float32).max), (np.inf, np.inf)])
def test_a_float64_norm_beyond_float32_is_told_from_an_infinite_one(entry, reported):
    """Statistics are float32: what is finite is at most the largest number, and infinity stays infinite."""
    with enable_x64(True):
        _, stats = oc.rescale_tree({"a": np.array([entry, 1.0])}, 1.0)
    assert stats.norm.dtype == np.float32
    assert stats.norm.tolist() == [reported]


@pytest.mark.parametrize("limit_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_dtype_out_is_the_dtype_in_whatever_that_of_the_limit_and_of_eps(limit_dtype):
    with enable_x64(True):
        grads = {name: random(name, (3,))[0] for name in DTYPES if name != "float64"}
        limit, eps = jnp.asarray(0.5, limit_dtype), jnp.asarray(1e-3, limit_dtype)
        out, _ = jax.jit(lambda grads, limit, eps: oc.rescale_tree(grads, limit, eps=eps))(grads, limit, eps)
        chex.assert_trees_all_equal_dtypes(out, grads)


@pytest.mark.parametrize(
    ("leaves", "leaf_dtype", "kind"),
    [
        (1, "bfloat16", "l2"),
        (148, "bfloat16", "l1"),
        (148, "float16", "l2"),
        (2000, "bfloat16", "l2"),
        (2000, "float32", "l2"),
    ],
)
def test_norms_of_many_leaves_are_right_to_1e_6(leaves, leaf_dtype, kind):
    """Adding leaves up in their own dtype would be 60 % wrong for 2,000 leaves of bfloat16."""
    grads = random(leaf_dtype, *[(40 if k % 30 else 5000,) for k in range(leaves)])
    measured = jax.jit(lambda tree: oc.group_norms(tree, oc.groups.whole(), NORMS[kind]))(grads)
    np.testing.assert_allclose(measured["whole"], reference.norm(grads, kind), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "leaf_dtype"),
    [(kind, "float32") for kind in NORMS] + [("l2", "bfloat16"), ("l2", "complex64")],
)
def test_the_norm_of_tiny_and_huge_finite_entries_is_right(kind, leaf_dtype):
    """Their squares overflow or vanish; one tree holds them all, each leaf a group."""
    values = [1e-25, 1e-20, 1e-12, 1.0, 1e8, 1e20, 3e37]
    grads = {f"{k}": random(leaf_dtype, (9,), scale=value)[0] for k, value in enumerate(values)}
    measured = oc.group_norms(grads, norm=NORMS[kind])
    for name, leaf in grads.items():
        np.testing.assert_allclose(measured[name], reference.norm([leaf], kind, 3), rtol=1e-6)
    one = jax.jit(lambda x: oc.group_norms({"x": x}, norm=NORMS[kind])["x"])
    alone = {name: one(leaf) for name, leaf in grads.items()}
    chex.assert_trees_all_close(alone, measured, rtol=1e-6)


@pytest.mark.parametrize("response", ["clip", "normalize"])
def test_updates_of_extreme_entries_are_rescaled_rightly(response):
    @jax.jit
    def rescale(value, limit):
        grads = {"a": jnp.array([value]), "b": jnp.zeros(3)}
        return oc.rescale_tree(grads, limit, response=RESPONSES[response])

    for value in (1e-37, 1e-30, 1e-25, 1e20, 3e38):
        limit = value / 4 if value < 1 else 1.0
        out, stats = rescale(value, limit)
        np.testing.assert_allclose(out["a"], [limit], rtol=1e-6)
        np.testing.assert_allclose(stats.norm_after, [limit], rtol=1e-6)
        assert not out["b"].any()


def test_float16_entries_of_300_are_clipped_and_not_zeroed():
    out, stats = oc.rescale_tree(jnp.full(4, 300, jnp.float16), 1.0)
    assert stats.norm.tolist() == [600]
    np.testing.assert_allclose(out, 0.5, rtol=1e-3)


@pytest.mark.parametrize(
    ("response", "after"),
    [("clip", 1.0), ("normalize", 1.0), ("rational", 1.0), ("sqrt", 1.0), ("zero", 0.0)],
)
def test_a_norm_beyond_float32_is_reported_as_the_largest_and_clipped_rightly(response, after):
    rescale = jax.jit(lambda x, limit: oc.rescale_tree(x, limit, response=RESPONSES[response]))
    for limit in (1e-5, 1.0, 1e30):
        out, stats = rescale(jnp.full(4, 3e38), limit)
        assert stats.norm.tolist() == [np.finfo(np.float32).max]
        np.testing.assert_allclose(out, np.full(4, 0.5 * after * limit), rtol=1e-6)
        np.testing.assert_allclose(stats.norm_after, [after * limit], rtol=1e-6)


def test_a_norm_beyond_float32_that_is_let_pass_is_reported_as_the_largest_too():
    """What comes out is finite entry by entry, and so is what is said of it."""
    out, stats = oc.rescale_tree(jnp.full(4, 3e38), np.inf)
    np.testing.assert_array_equal(out, np.full(4, np.float32(3e38)))
    assert stats.norm_after.tolist() == stats.norm.tolist() == [np.finfo(np.float32).max]
    tx = oc.clip_singular_values(np.inf)
    _, state = tx.update(jnp.full((2, 2), 3e38), tx.init(jnp.zeros((2, 2))))
    assert state.norm_after.tolist() == state.norm.tolist() == [np.finfo(np.float32).max]


@pytest.mark.parametrize(
    ("response", "limit", "factor"),
    [
        (oc.responses.clip(0.9), 1.0, 0.9),
        (oc.responses.band(0.5, most_down=0.9), 1.0, 0.9),
        (oc.responses.soft(), 1e38, 1 / 7),
        (oc.responses.soft("sqrt"), 2.5e38, 5 / 13),
        (oc.responses.clip(), 3e38, 0.5),
    ],
)
def test_every_response_sees_the_true_norm_beyond_float32(response, limit, factor):
    """Four entries of 3e38 have a norm of 6e38."""
    out, _ = oc.rescale_tree(jnp.full(4, 3e38), limit, response=response)
    np.testing.assert_allclose(out, np.full(4, factor * 3e38), rtol=1e-5)


def test_a_factor_too_small_for_float32_is_right_for_every_response():
    """The entries are multiplied by what is left of it, and the response still sees the norm."""
    for response in (oc.responses.clip(), oc.responses.soft(), oc.responses.psac()):
        out, _ = oc.rescale_tree(jnp.array([1e3]), 1e-28, response=response)
        np.testing.assert_allclose(out, [1e-28], rtol=1e-5)


@pytest.mark.parametrize("floor", [1e-12, 1e-25])
@pytest.mark.parametrize(("norm", "limit"), [(1.0, 0.0), (1e32, 1.0), (1e32, 0.0), (3e38, 1e-5)])
def test_a_least_factor_holds_however_small_it_is(floor, norm, limit):
    """It does not shrink with the limit, as a factor without a floor does."""
    for response in (oc.responses.clip(floor), oc.responses.band(0.5, most_down=floor)):
        out, stats = oc.rescale_tree(jnp.array([norm]), limit, response=response)
        np.testing.assert_allclose(out, [norm * max(floor, limit / norm)], rtol=1e-5)
        np.testing.assert_allclose(stats.norm_after, np.abs(out), rtol=1e-5)


def test_the_smooth_limit_of_a_huge_norm_does_not_overflow():
    out, _ = oc.rescale_tree(jnp.array([3e38]), 3e38, response=oc.responses.soft("sqrt"))
    np.testing.assert_allclose(out, [3e38 / 2**0.5], rtol=1e-6)


def test_whole_norms_do_not_overflow_when_those_of_their_groups_are_huge():
    _, stats = oc.rescale_tree({"a": jnp.array([3e37]), "b": jnp.array([4e37])}, 1.0, groups=oc.groups.leaf())
    tx = oc.clip_by_leafwise_norm(2.0)
    grads = {"a": jnp.array([3e37]), "b": jnp.array([4e37])}
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(state.whole.norm, 5e37, rtol=1e-6)
    np.testing.assert_allclose(state.whole.norm_after, 8**0.5, rtol=1e-6)
    np.testing.assert_allclose(stats.norm_after, [1, 1], rtol=1e-6)


def test_zscores_learn_norms_above_1e18_as_1e18():
    """Their squares stay within float32; the norm that is reported is the true one."""
    tx = oc.rescale_by_norm(oc.limits.zscore(warmup=2, mode="mean"))
    update = jax.jit(tx.update)

    def after(size):
        state = tx.init(jnp.ones(1))
        for norm in (1.0, size, 2.0):
            _, state = update(jnp.full(1, norm), state)
            assert state.norm.tolist() == [np.float32(norm)]
        return state.rule

    chex.assert_trees_all_equal(after(3e38), after(1e18))
    assert any((x != y).any() for x, y in zip(after(1e18), after(5e17), strict=True))


@pytest.mark.parametrize("response", RESPONSES)
def test_zeros_and_limits_of_zero_give_zeros_and_never_nan(response):
    grads = {name: random(name, (3,))[0] for name in ("float16", "bfloat16", "float32", "complex64")}
    zeros = jax.tree.map(jnp.zeros_like, grads)
    rescale = jax.jit(lambda tree, limit: oc.rescale_tree(tree, limit, response=RESPONSES[response])[0])
    for limit in (0.0, 1.0, np.inf):
        chex.assert_trees_all_equal(rescale(zeros, limit), zeros)
    chex.assert_trees_all_equal(rescale(grads, 0.0), zeros)


EACH = [("l2", response) for response in RESPONSES] + [(kind, "clip") for kind in NORMS if kind != "l2"]


@pytest.mark.parametrize(("kind", "response"), EACH)
def test_derivatives_at_zero_are_finite(kind, response):
    def update(x, limit):
        out, _ = oc.rescale_tree({"x": x}, limit, norm=NORMS[kind], response=RESPONSES[response])
        return jnp.sum(out["x"])

    reverse, forward = jax.jit(jax.grad(update)), jax.jit(jax.jacfwd(update))
    for limit in (0.0, 1.0, np.inf):
        assert np.isfinite(reverse(jnp.zeros(3), limit)).all()
        assert np.isfinite(forward(jnp.zeros(3), limit)).all()


@pytest.mark.parametrize(
    ("kind", "response"), [case for case in EACH if "linf" not in case and "zero" not in case]
)
def test_derivatives_are_right_elsewhere(kind, response):
    """First and second, forward and reverse, against finite differences in float64."""
    with enable_x64(True):
        x, v, w = random("float64", (5,), (5,), (7,))

        def update(x):
            tree = {"a": x, "b": 2 * x[:2]}
            out, _ = oc.rescale_tree(tree, 0.7, norm=NORMS[kind], response=RESPONSES[response])
            return w @ jnp.concatenate([out["a"], out["b"]])

        value, slope = jax.jit(update), jax.jit(jax.grad(update))
        h = 1e-5
        numeric = (value(x + h * v) - value(x - h * v)) / (2 * h)
        np.testing.assert_allclose(slope(x) @ v, numeric, rtol=1e-6)
        bend = (slope(x + h * v) - slope(x - h * v)) / (2 * h)
        forward_over_reverse = jax.jit(lambda x: jax.jvp(jax.grad(update), (x,), (v,))[1])
        np.testing.assert_allclose(forward_over_reverse(x), bend, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("p", [1.5, 2, 3, 12])
def test_derivatives_are_right_at_every_magnitude(p):
    """First and second derivatives of a norm, also where powers of its entries leave float32's range."""
    (x,) = random("float32", (5,))

    def norm(x):
        return oc.group_norms({"a": x, "b": 2 * x[:2]}, oc.groups.whole(), oc.norms.lp(p))["whole"]

    with enable_x64(True):
        wide = x.astype(jnp.float64)
        slope, bend = jax.grad(norm)(wide), jax.hessian(norm)(wide)
        exact = jax.grad(lambda x: jnp.sum(jnp.abs(jnp.concatenate([x, 2 * x[:2]])) ** p) ** (1 / p))
        np.testing.assert_allclose(slope, exact(wide), rtol=1e-12)
        np.testing.assert_allclose(bend, jax.jacfwd(exact)(wide), rtol=1e-10)
    gradient, hessian = jax.jit(jax.grad(norm)), jax.jit(jax.hessian(norm))
    for scale in (1e-20, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e20):
        scale = np.float32(scale)
        np.testing.assert_allclose(gradient(x * scale), slope, rtol=1e-5)
        largest = np.abs(bend).max()
        np.testing.assert_allclose(hessian(x * scale) * scale, bend, rtol=1e-5, atol=1e-5 * largest)


SMOOTH = {
    "clip": oc.responses.clip(),
    "floor": oc.responses.clip(0.2),
    "normalize": oc.responses.normalize(),
    "rational": oc.responses.soft("rational"),
    "sqrt": oc.responses.soft("sqrt"),
    "band": oc.responses.band(0.5),
}


@pytest.mark.parametrize("response", SMOOTH)
def test_the_derivative_of_an_update_is_right_at_every_magnitude(response):
    """The Jacobian does not change with the scale of norm and limit, even where squares are out of range."""
    entries, limit = np.array([3.0, 4.0, 1.0]), np.float64(3.5)

    def update(x, limit):
        return oc.rescale_tree({"w": x}, limit, response=SMOOTH[response])[0]["w"]

    with enable_x64(True):
        expected = jax.jacobian(update)(jnp.asarray(entries), limit)
    jacobian = jax.jit(jax.jacobian(update))
    for exponent in range(-25, 37, 4):
        scale = 10.0**exponent
        found = jacobian((entries * scale).astype(np.float32), np.float32(limit * scale))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for entry in (0.0, 5.0, 3e-20, 1e20):
        for bound in (0.0, 1.0, np.inf):
            assert np.isfinite(jacobian(jnp.array([entry, 0, 0]), np.float32(bound))).all()


def test_the_derivative_where_nothing_is_clipped_is_the_identity():
    """Within the limit, at an infinite one, and beside groups of another size."""
    jacobian = jax.jit(jax.jacobian(lambda x, limit: oc.rescale_tree(x, limit, groups=oc.groups.leaf())[0]))
    for entry in (3.0, 3e-20, 1e-30):
        tree = {"a": jnp.array([entry]), "b": jnp.array([0.5])}
        for limit in (10.0, np.inf):
            found = jacobian(tree, np.float32(limit))
            assert (found["a"]["a"], found["b"]["b"], found["a"]["b"]) == (1, 1, 0)


def test_derivatives_reach_through_an_optimizer_chain():
    """The gradient of an update's loss by the learning of a scale, as in meta-learning."""
    tx = oc.clip_by_leafwise_norm(1.0)
    grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.1])}

    def after(scale):
        scaled = jax.tree.map(lambda g: scale * g, grads)
        updates, _ = tx.update(scaled, tx.init(scaled))
        return updates["w"][0] + updates["b"][0]

    # The clipped leaf does not change with its scale; the other one does.
    np.testing.assert_allclose(jax.grad(after)(1.0), 0.1, atol=1e-6)
    np.testing.assert_allclose(jax.grad(after)(0.1), 3.1, rtol=1e-6)


@pytest.mark.parametrize("response", RESPONSES)
def test_an_infinite_limit_changes_nothing(response):
    grads = tree("bfloat16")
    out, _ = oc.rescale_tree(grads, jnp.inf, response=RESPONSES[response])
    chex.assert_trees_all_equal(out, grads)


CASES = [("float32", response) for response in RESPONSES] + [
    (name, "clip") for name in ("float16", "bfloat16", "complex64")
]


@pytest.mark.parametrize("policy", ["propagate", "zero"])
@pytest.mark.parametrize(("leaf_dtype", "response"), CASES)
def test_a_non_finite_entry_takes_its_whole_group_and_no_other(leaf_dtype, response, policy):
    """The group becomes NaN, or zeros on request; the other comes out as it would alone."""
    options = {"groups": oc.groups.layer(), "response": RESPONSES[response], "nonfinite": policy}
    rescale = jax.jit(lambda tree: oc.rescale_tree(tree, 0.5, **options))
    grads = tree(leaf_dtype)
    clean, _ = rescale(grads)
    for bad in (np.nan, np.inf, -np.inf):
        grads["dense"]["bias"] = grads["dense"]["bias"].at[2].set(bad)
        out, stats = rescale(grads)
        lost = np.concatenate([np.ravel(x) for x in jax.tree.leaves(out["dense"])])
        assert np.isnan(lost).all() if policy == "propagate" else not lost.any()
        chex.assert_trees_all_equal(out["head"], clean["head"])
        assert stats.nonfinite.tolist() == [1, 0]
        assert stats.clipped[0] == 0
        assert not np.isfinite(stats.norm[0])


def test_a_traced_negative_limit_counts_as_zero():
    out, stats = jax.jit(lambda limit: oc.rescale_tree(jnp.ones(3), limit))(-1.0)
    assert not out.any()
    assert stats.limit.tolist() == [0]


def test_a_traced_nan_limit_is_loud():
    out, _ = jax.jit(lambda limit: oc.rescale_tree(jnp.ones(3), limit))(jnp.nan)
    assert np.isnan(out).all()


def test_leaves_without_a_norm_pass_through():
    """Integers, booleans, float0, PRNG keys, empty arrays, None and FP8 statistics."""
    grads = {
        "w": jnp.array([3.0, 4.0]),
        "int": jnp.arange(3),
        "bool": jnp.array([True]),
        "float0": np.zeros(2, jax.dtypes.float0),
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "_overwrite_with_gradient": {"scale": jnp.array([1e9])},
    }
    out, stats = oc.rescale_tree(grads, 1.0)
    assert stats.norm.tolist() == [5]
    np.testing.assert_allclose(out["w"], [0.6, 0.8], rtol=1e-6)
    assert out["float0"].dtype == jax.dtypes.float0
    for name in set(grads) - {"w", "float0", "none"}:
        chex.assert_trees_all_equal(out[name], grads[name])
    assert out["none"] is None


@pytest.mark.parametrize("empty", [{}, [], None, {"a": None}, {"a": jnp.zeros((0,))}])
def test_trees_without_anything_to_measure_pass_through(empty):
    tx = oc.clip_by_leafwise_norm(1.0)
    out, state = tx.update(empty, tx.init(empty))
    chex.assert_trees_all_equal(out, empty)
    assert state.norm.shape == (0,)
    assert oc.group_norms(empty) == {}


def test_python_numbers_are_leaves_too():
    out, _ = oc.rescale_tree({"a": 3.0, "b": 4.0}, 1.0)
    np.testing.assert_allclose([out["a"], out["b"]], [0.6, 0.8], rtol=1e-6)


def test_the_modulus_of_complex_entries_is_measured():
    out, stats = oc.rescale_tree(jnp.array([3 + 4j, 0]), 1.0)
    assert stats.norm.tolist() == [5]
    np.testing.assert_allclose(out, [0.6 + 0.8j, 0], rtol=1e-6)


def test_clipping_by_value_clips_the_modulus_of_complex_entries():
    """The angle stays, and the dtype."""
    tx = oc.clip_by_value(2.5)
    grads = jnp.array([3 + 4j, 0.3 - 0.4j], jnp.complex64)
    out, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(out, [1.5 + 2j, 0.3 - 0.4j], rtol=1e-6)
    assert out.dtype == jnp.complex64
    assert state.share == 0.5


@pytest.mark.parametrize("norm", [0.5, 0.9999995, 1.0, 2.0, 1e6])
def test_eps_gives_the_numbers_of_pytorch(norm):
    """`clip_grad_norm_` multiplies by min(1, max_norm / (norm + 1e-6))."""
    out, _ = oc.rescale_tree(jnp.array([norm]), 1.0, eps=1e-6)
    np.testing.assert_allclose(out, [norm * min(1, 1 / (norm + 1e-6))], rtol=1e-7)


def test_vmap_measures_each_example_alone():
    """Also where some examples need another scale than the rest."""
    examples = jnp.array([[3.0, 4.0], [1e20, 0], [1e-25, 0], [np.nan, 1], [0, 0]])
    out, stats = jax.vmap(lambda x: oc.rescale_tree({"x": x}, 1.0))(examples)
    np.testing.assert_allclose(stats.norm[:, 0], [5, 1e20, 1e-25, np.nan, 0], rtol=1e-6)
    np.testing.assert_allclose(out["x"][:3], [[0.6, 0.8], [1, 0], [1e-25, 0]], rtol=1e-6)
    assert np.isnan(out["x"][3]).all()
    assert not out["x"][4].any()


READINGS = {  # how often gradients are read
    "ordinary": ({"a": jnp.ones(3), "b": jnp.linspace(-1, 1, 300)}, 1),
    "ordinary, large leaves": ({"a": jnp.ones(3), "b": jnp.linspace(-1, 1, 5000)}, 1),
    "ordinary, bfloat16": ({"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(5000, jnp.bfloat16)}, 1),
    "from 1e-25 to 1e8": ({"a": jnp.full(3, 1e-25), "b": jnp.full(300, 1e8)}, 1),
    "small leaves of zeros": ({"a": jnp.ones(3), "b": jnp.zeros(300)}, 1),
    "a large leaf of zeros": ({"a": jnp.ones(3), "b": jnp.zeros(5000)}, 2),
    "entries whose squares overflow": ({"a": jnp.ones(3), "b": jnp.full(5000, 1e20)}, 2),
    "entries whose squares vanish": ({"a": jnp.full(3, 1e-30), "b": jnp.full(5000, 1e-30)}, 3),
}


@pytest.mark.parametrize("kind", READINGS)
def test_ordinary_updates_are_read_once(monkeypatch, kind):
    """Once for ordinary entries and zeros, twice for a large leaf of zeros, again for extreme ones only."""
    grads, expected = READINGS[kind]
    partials, readings = _measure.partials, []

    def counted(blocks, norm, dtype):
        readings.append(len(blocks))
        return partials(blocks, norm, dtype)

    monkeypatch.setattr(_measure, "partials", counted)
    with jax.disable_jit():  # loops are Python's
        oc.group_norms(grads)
    assert len(readings) == expected


# Large leaves are read as they are at first; what that cannot do for them, a second reading does.
SIZES = [1.0, 0.0, 1e-9, 1e-15, 1e-18, 1e-22, 1e-26, 1e19, 1e25, 1e33]


@pytest.mark.parametrize("kind", ["l2", "l1", "linf", "rms"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_leaves_of_any_size_beside_each_other_are_measured_rightly(dtype, kind):
    """Groups of 5,000 entries from 1e-26 to 1e33, a zero one and an ordinary one, all in one update."""
    leaves = random(dtype, *[(50, 100)] * len(SIZES))
    grads = {
        f"{k}": leaf * jnp.asarray(size, dtype)
        for k, (leaf, size) in enumerate(zip(leaves, SIZES, strict=True))
    }
    found = jax.jit(lambda tree: oc.group_norms(tree, oc.groups.leaf(), NORMS[kind]))(grads)
    for name, leaf in grads.items():
        np.testing.assert_allclose(found[name], reference.norm([leaf], kind), rtol=2e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("other", [1.0, 0.0, 1e-22, 1e25])
def test_large_and_small_leaves_share_a_norm_at_any_size(size, other):
    """A kernel and its bias, each of any size, in one group beside an ordinary one."""
    kernel, bias, head = random("float32", (50, 100), (100,), (70, 100))
    grads = {"dense": {"kernel": kernel * size, "bias": bias * other}, "head": {"kernel": head}}
    found = measured_by_layer(grads)
    norm = reference.norm([grads["dense"]["kernel"], grads["dense"]["bias"]])
    np.testing.assert_allclose(found["dense"], norm, rtol=2e-6)
    np.testing.assert_allclose(found["head"], reference.norm([head]), rtol=2e-6)


@jax.jit
def measured_by_layer(tree):
    return oc.group_norms(tree, oc.groups.layer())


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_large_leaf_that_is_not_finite_is_reported_beside_tiny_and_huge_ones(bad):
    """Other groups have their norms nevertheless."""
    leaves = random("float32", *[(50, 100)] * 3)
    grads = {"a": leaves[0].at[3, 4].set(bad), "b": leaves[1] * 1e-25, "c": leaves[2] * 1e25}
    found = jax.jit(oc.group_norms)(grads)
    np.testing.assert_equal(np.asarray(found["a"]), np.float32(bad))
    for name in "bc":
        np.testing.assert_allclose(found[name], reference.norm([grads[name]]), rtol=2e-6)


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_large_leaves_are_measured_rightly_under_vmap_and_in_scan(size):
    """Each example by itself, whatever the size of the others."""
    batch = random("float32", (3, 50, 100))[0] * jnp.array([1.0, size, 1e-9])[:, None, None]
    expected = [reference.norm([x]) for x in batch]
    norm = lambda x: oc.group_norms({"w": x})["w"]  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.vmap(norm))(batch), expected, rtol=2e-6)
    np.testing.assert_allclose(jax.lax.map(norm, batch), expected, rtol=2e-6)


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
def test_norms_of_large_leaves_have_their_derivatives(size):
    """That of the norm is the unit vector, at any size."""
    (leaf,) = random("float32", (50, 100))
    grads = jax.jit(jax.grad(lambda x: oc.group_norms({"w": x})["w"]))(leaf * size)
    np.testing.assert_allclose(grads, leaf / reference.norm([leaf]), rtol=1e-5, atol=1e-8)


def test_bfloat16_is_rounded_to_nearest_ties_to_even():
    """As NumPy rounds it: over random bit patterns of float32, with those at and beside every tie."""
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 18, dtype=np.uint32)
    ties = (bits[: 1 << 16] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    bits = np.concatenate([bits, ties, ties + np.uint32(1), ties - np.uint32(1)])
    product = bits.view(np.float32)
    ours = jax.jit(_scale._bfloat16)(product, jnp.zeros(len(bits), jnp.bfloat16), jnp.bool_(True))
    with np.errstate(invalid="ignore"):
        expected = product.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.isnan(np.asarray(ours, np.float32)), np.isnan(product))
    finite = ~np.isnan(product)
    np.testing.assert_array_equal(np.asarray(ours).view(np.uint16)[finite], expected.view(np.uint16)[finite])


@pytest.mark.parametrize("leaves", [1, 3])
def test_derivatives_of_clipped_bfloat16_are_those_of_float32(leaves):
    """With respect to the update and to the limit, below the limit and above; small leaves are merged."""

    def total(leaf, limit):
        tree = {f"w{k}": (1 + k) * leaf for k in range(leaves)}
        return sum(jnp.sum(x.astype(jnp.float32) * weights) for x in oc.rescale_tree(tree, limit)[0].values())

    weights = jnp.array([1.0, -2.0, 0.5])
    for limit in (1.0, 100.0):
        leaf = jnp.array([3.0, -1.5, 0.25])
        by_leaf, by_limit = jax.grad(total, (0, 1))(leaf, limit)
        half_leaf, half_limit = jax.grad(total, (0, 1))(leaf.astype(jnp.bfloat16), limit)
        np.testing.assert_allclose(np.asarray(half_leaf, np.float32), by_leaf, rtol=2e-2, atol=2e-2)
        np.testing.assert_allclose(half_limit, by_limit, rtol=2e-2)
