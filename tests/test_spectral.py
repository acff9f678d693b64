"""Spectral methods against float64 singular value decompositions of NumPy."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from versions import enable_x64

import optaxclip as oc

METHODS = {
    "clip_by_spectral_norm": oc.clip_by_spectral_norm,
    "soft, svd": oc.soft_clip_singular_values,
    "soft, newton_schulz": functools.partial(oc.soft_clip_singular_values, method="newton_schulz"),
    "hard": oc.clip_singular_values,
}


def once(tx, x, params=None):
    """The first update, as one compilation."""
    return jax.jit(lambda x, params: tx.update(x, tx.init(x), params))(x, params)


def svd(x):
    return np.linalg.svd(np.asarray(x).astype(complex if np.iscomplexobj(x) else float), full_matrices=False)


def largest(x):
    return svd(x)[1][..., 0]


def expected(method, x, c):
    """What a method makes of one matrix, by its equation."""
    u, s, v = svd(x)
    if c == np.inf:
        return u * s @ v
    with np.errstate(divide="ignore"):
        match method:
            case "clip_by_spectral_norm":
                new = s * min(1, c / s[0]) if s[0] else s
            case "hard":
                new = np.minimum(s, c)
            case _:
                new = c * s / np.hypot(c, s) if c else 0 * s
    return (u * new) @ v


def train(seed, shape, steps):
    """Matrices of rank 4 and noise, whose factors wander: over 50 steps they become others."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(shape[0], 4)), rng.normal(size=(4, shape[1]))
    out = []
    for _ in range(steps):
        left, right = (0.98 * y + 0.2 * rng.normal(size=y.shape) for y in (left, right))
        out.append(left * [4, 3, 2, 1] @ right / np.sqrt(shape[0]) + 0.3 * rng.normal(size=shape))
    return np.stack(out)


def noisy(seed, shape, steps):
    """The same matrix of low rank, with fresh noise."""
    rng = np.random.default_rng(seed)
    low = (rng.normal(size=(shape[0], 4)) * [4, 3, 2, 1]) @ rng.normal(size=(4, shape[1])) / np.sqrt(shape[0])
    return low + 0.3 * rng.normal(size=(steps, *shape))


def gaussian(seed, shape, steps):
    return np.random.default_rng(seed).normal(size=(steps, *shape))


KINDS = {"train": train, "noisy": noisy, "gaussian": gaussian}
# By kind and iterations: median and worst error in percent, at the first step and from the fourth on.
ACCURACY = {
    ("train", 1): (17, 40, 0.1, 11),
    ("train", 2): (0.2, 6, 0.01, 2),
    ("train", 4): (0.01, 0.3, 0.01, 0.01),
    ("noisy", 1): (18, 52, 0.02, 0.6),
    ("noisy", 2): (0.4, 7, 0.01, 0.3),
    ("noisy", 4): (0.01, 0.2, 0.01, 0.2),
    ("gaussian", 1): (25, 34, 24, 37),
    ("gaussian", 2): (12, 15, 12, 24),
    ("gaussian", 4): (4, 7, 4, 15),
}


@functools.cache
def sequences(kind):
    xs = np.stack([KINDS[kind](seed, (64, 48), 24) for seed in range(12)]).astype(np.float32)
    return xs, largest(xs)


@functools.cache
def estimates(iterations):
    tx = oc.clip_by_spectral_norm(np.inf, iterations=iterations)

    def step(state, x):
        _, state = tx.update(x, state)
        return state, state.norm[0]

    return jax.jit(jax.vmap(lambda xs: jax.lax.scan(step, tx.init(xs[0]), xs)[1]))


@pytest.mark.parametrize(("kind", "iterations"), ACCURACY)
def test_the_estimate_is_as_near_as_the_documentation_says(kind, iterations):
    """With room for other platforms; and it is never too large."""
    xs, exact = sequences(kind)
    error = 100 * (1 - np.asarray(estimates(iterations)(xs)) / exact)
    found = [f(e) for e in (error[:, 0], error[:, 3:]) for f in (np.median, np.max)]
    assert (np.array(found) <= 1.3 * np.array(ACCURACY[kind, iterations]) + 0.01).all(), found
    assert error.min() > -1e-4


def test_the_cold_norm_is_as_near_as_the_documentation_says():
    norm = jax.jit(jax.vmap(lambda x: oc.norms.spectral(8).measure(x, (0, 1))))
    for kind, worst in (("gaussian", 10), ("noisy", 0.1)):
        xs, exact = sequences(kind)
        error = 100 * (1 - np.asarray(norm(xs.reshape(-1, 64, 48))) / exact.ravel())
        assert -1e-4 < error.min() <= error.max() < 1.3 * worst


NAN, INF, ZERO, RISE, STEPS = 80, 130, 95, 180, 240


def golden(shape):
    """240 steps with noise, spikes, a NaN, an infinity, a zero step and a lasting rise; and the scales."""
    scales = np.exp(0.3 * np.random.default_rng(1).normal(size=STEPS))
    scales[[60, 110, 160]] *= [30, 300, 3000]
    scales[RISE:] *= 10
    scales[ZERO] = 0
    xs = (train(7, shape, STEPS) * scales[:, None, None]).astype(np.float32)
    xs[NAN, 3, 4], xs[INF, 5, 6] = np.nan, np.inf
    return xs


@pytest.mark.parametrize("method", METHODS)
def test_golden_sequences_agree_with_decompositions(method):
    """After three steps within the stated accuracy, and right away after NaN, infinity and zero."""
    shape = (64, 48) if method == "clip_by_spectral_norm" else (24, 16)
    xs, c = golden(shape), 20.0
    tx = METHODS[method](c)

    def step(state, x):
        out, state = tx.update({"w": x}, state)
        return state, (out["w"], state.norm[0])

    state, (out, norm) = jax.jit(lambda xs: jax.lax.scan(step, tx.init({"w": xs[0]}), xs))(xs)
    good = np.setdiff1d(np.arange(3, STEPS), [NAN, INF])
    out = np.asarray(out)
    assert np.isnan(out[[NAN, INF]]).all()
    assert np.isfinite(out[good]).all()
    np.testing.assert_array_equal(out[ZERO], 0)
    sigma = largest(xs[good])
    if method == "clip_by_spectral_norm":
        high = largest(out[good])
        wanted = np.minimum(sigma, c)
        assert (high >= wanted * (1 - 1e-5)).all()
        assert (high <= wanted * 1.026 + 1e-30).all()
        assert np.median(high[sigma > c] / c) < 1.0005
        within = sigma < c
        np.testing.assert_array_equal(out[good][within], xs[good][within])
    else:
        for t in good:
            exact = expected(method, xs[t], c)
            size = np.linalg.norm(exact)
            # Of large ratios to c, ten iterations are too few for small singular values.
            close = 0.2 if "newton" in method and sigma[np.searchsorted(good, t)] > 5 * c else 3e-5
            assert np.linalg.norm(out[t] - exact) <= close * size + 1e-30, t
    assert int(state.nonfinite[0]) == 2
    assert int(state.step) == STEPS
    if method != "soft, newton_schulz":
        np.testing.assert_allclose(np.asarray(norm)[good], sigma, rtol=0.026, atol=1e-30)
    if method == "hard":
        assert int(state.clipped[0]) == (sigma > c).sum() + (largest(xs[:3]) > c).sum()


def test_a_vector_is_kept_through_steps_with_nothing_to_learn():
    tx = oc.clip_by_spectral_norm(1.0)
    x, update = jnp.asarray(train(0, (6, 4), 1)[0], jnp.float32), jax.jit(tx.update)
    _, state = update(x, tx.init(x))
    for bad in (0 * x, x.at[0, 0].set(jnp.nan), x.at[1, 1].set(-jnp.inf)):
        out, after = update(bad, state)
        np.testing.assert_array_equal(after.vector, state.vector)
        assert np.isnan(out).all() or not np.any(out)


def test_nothing_hides_from_a_warm_vector():
    """A vector that has become one-hot, as in an embedding, sees a spike in another column."""
    tx = oc.clip_by_spectral_norm(1.0)
    one, other = (jnp.zeros((5, 4)).at[2, k].set(3.0) for k in (0, 3))
    state, update = tx.init(one), jax.jit(tx.update)
    for _ in range(3):
        _, state = update(one, state)
    np.testing.assert_allclose(np.abs(state.vector), [1, 0, 0, 0], atol=1e-6)
    out, state = update(100 * other, state)
    np.testing.assert_allclose(state.norm, 300, rtol=1e-6)
    np.testing.assert_allclose(out, other / 3, rtol=1e-6)


TREE = {
    "conv": jnp.asarray(gaussian(1, (2, 3, 4), 2)[0] * np.ones((2, 1, 1, 1)), jnp.float32),
    "layers": {"kernel": jnp.asarray(gaussian(2, (6, 4), 3), jnp.float32), "bias": jnp.ones((3, 4))},
    "tall": jnp.asarray(gaussian(3, (7, 3), 1)[0], jnp.float32),
    "wide": jnp.asarray(gaussian(4, (3, 7), 1)[0], jnp.float32),
    "bias": jnp.array([3.0, -4.0]),
    "scale": jnp.float32(2.0),
}


@functools.cache
def stateless(method):
    """One compilation for all limits and values."""

    @jax.jit
    def run(tree, c):
        kwargs = {"iterations": 40} if method in ("clip_by_spectral_norm", "soft, newton_schulz") else {}
        tx = METHODS[method](c, stacked="^layers/", **kwargs)
        return tx.update(tree, tx.init(tree))

    return run


def by_matrix(tree):
    """The matrices of a tree like `TREE`; vectors as matrices of one column."""
    flat = {
        "conv": tree["conv"].reshape(-1, 4),
        **{name: tree[name] for name in ("tall", "wide")},
        **{name: np.reshape(tree[name], (-1, 1)) for name in ("bias", "scale")},
    }
    for k in range(3):
        flat[f"kernel {k}"] = tree["layers"]["kernel"][k]
        flat[f"bias {k}"] = tree["layers"]["bias"][k].reshape(-1, 1)
    return {name: np.asarray(x) for name, x in flat.items()}


def assert_expected(method, tree, out, c, rtol=2e-5):
    made = by_matrix(out)
    for name, x in by_matrix(tree).items():
        exact = expected(method, x, c)
        size = np.linalg.norm(exact)
        assert np.linalg.norm(made[name] - exact) <= rtol * size, (name, made[name], exact)


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_leaf_is_taken_for_the_right_matrices(method):
    """Convolution kernels, stacked layers, tall, wide, vectors and scalars, at several limits."""
    for c in (0.0, 0.01, 1.0, 3.0, 100.0, np.inf):
        out, state = stateless(method)(TREE, jnp.float32(c))
        assert_expected(method, TREE, out, c)
        chex.assert_trees_all_equal_shapes_and_dtypes(out, TREE)
    assert state.norm.shape == (11,)
    chex.assert_trees_all_equal(out, TREE)  # an infinite limit
    np.testing.assert_array_equal(state.factor, 1)


@pytest.mark.parametrize("size", [1e20, 1e-25, 3e37])
@pytest.mark.parametrize("method", METHODS)
def test_large_and_small_entries_are_right(method, size):
    """No square overflows or vanishes, whether the limit is as large or an ordinary one."""
    tree = jax.tree.map(lambda x: jnp.asarray(np.float64(x) * size, jnp.float32), TREE)
    out, state = stateless(method)(tree, jnp.float32(2 * size))
    assert_expected(method, tree, out, float(np.float32(2 * size)))
    assert (np.asarray(state.norm) > size).all()
    out, _ = stateless(method)(tree, jnp.float32(1.0))
    if size < 1:
        chex.assert_trees_all_equal(out, tree)
    elif "newton" not in method:
        for name, x in by_matrix(out).items():
            np.testing.assert_allclose(largest(x), 1, rtol=1e-5, err_msg=name)


def test_a_norm_beyond_the_largest_number_is_still_clipped_rightly():
    x = jnp.full((4, 4), 3e38)
    for method in METHODS:
        tx = METHODS[method](1e38)
        out, state = once(tx, x)
        np.testing.assert_allclose(out, expected(method, x, 1e38), rtol=1e-5)
        np.testing.assert_allclose(state.norm, np.finfo(np.float32).max)


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_entries_stay_within_their_matrix(method):
    """Of stacked layers, only the one concerned; with "zero" it is zeros, and zeros stay zeros."""
    tree = TREE | {
        "layers": {
            "kernel": TREE["layers"]["kernel"].at[1, 0, 0].set(jnp.nan),
            "bias": 0 * TREE["layers"]["bias"],
        }
    }
    tree["tall"] = tree["tall"].at[0, 0].set(jnp.inf)
    tree["bias"] = tree["bias"].at[0].set(-jnp.inf)
    out, state = stateless(method)(tree, jnp.float32(1))
    clean, _ = stateless(method)(TREE, jnp.float32(1))
    for name, x in by_matrix(out).items():
        if name in ("kernel 1", "tall", "bias"):
            assert np.isnan(x).all()
        elif name.startswith("bias "):
            assert not x.any()
        else:
            np.testing.assert_array_equal(x, by_matrix(clean)[name])
    assert int(state.nonfinite.sum()) == 3
    tx = METHODS[method](1.0, nonfinite="zero")
    x = {"w": tree["tall"], "b": tree["bias"]}
    zeros, _ = once(tx, x)
    chex.assert_trees_all_equal(zeros, jax.tree.map(jnp.zeros_like, x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "complex64"])
def test_dtypes_are_kept_and_computed_wide_enough(method, dtype):
    rtol = {"bfloat16": 4e-3, "float64": 1e-6, "complex64": 1e-5}[dtype]
    with enable_x64(dtype == "float64"):
        x = gaussian(5, (6, 4), 2)
        x = jnp.asarray(x[0] + 1j * x[1] if dtype == "complex64" else x[0]).astype(dtype)
        tx = METHODS[method](1.5, **({"iterations": 20} if method == "clip_by_spectral_norm" else {}))
        out, state = once(tx, x)
        assert out.dtype == x.dtype
        assert {x.dtype for x in jax.tree.leaves((state.norm, state.vector))} == {jnp.dtype(jnp.float32)}
        exact = expected(method, x, 1.5)
        wide = np.asarray(out).astype(exact.dtype)
        assert np.linalg.norm(wide - exact) <= rtol * np.linalg.norm(exact)


# The largest relative errors that the documentation allows, by the largest value over the limit.
SOFT = {1: (2e-6, 2e-6, 2e-6), 10: (2e-6, 1e-5, 1e-5), 30: (2e-6, 0.02, 3e-5)}
SOFT |= {100: (5e-6, 0.09, 1e-4), 1000: (5e-5, 0.2, 1e-3)}


@pytest.mark.parametrize(
    ("k", "kwargs"),
    [(0, {}), (1, {"method": "newton_schulz"}), (2, {"method": "newton_schulz", "iterations": 20})],
)
def test_soft_clipping_is_as_near_as_the_documentation_says(k, kwargs):
    tx = oc.soft_clip_singular_values(1.0, **kwargs)
    clip = jax.jit(lambda x: tx.update(x, tx.init(x))[0])
    hard = jax.jit(lambda x: oc.clip_singular_values(1.0).update(x, oc.clip_singular_values(1.0).init(x))[0])
    for ratio, bounds in SOFT.items():
        for seed in range(4):
            x = gaussian(seed, (32, 32), 1)[0]
            x = (x * ratio / largest(x)).astype(np.float32)
            exact, out = expected("soft", x, 1.0), np.float64(clip(x))
            assert np.linalg.norm(out - exact) <= bounds[k] * np.linalg.norm(exact), ratio
            assert largest(out) <= 1 + 1e-4
            if k == 0:
                exact, out = expected("hard", x, 1.0), np.float64(hard(x))
                assert np.linalg.norm(out - exact) <= 5e-5 * np.linalg.norm(exact), ratio


def test_soft_clipping_of_vectors_is_continuous_and_that_of_one_column():
    tx = oc.soft_clip_singular_values(5.0)
    clip = jax.jit(lambda x: tx.update(x, tx.init(x))[0])
    for size in (4.999, 5.0, 5.001, 50.0):
        x = size * np.array([0.6, -0.8])
        out = clip({"vector": x.astype(np.float32), "column": x.astype(np.float32)[:, None]})
        np.testing.assert_allclose(out["vector"], x / np.sqrt(1 + size**2 / 25), rtol=1e-6)
        np.testing.assert_allclose(out["column"][:, 0], out["vector"], rtol=1e-5)


def test_axes_say_which_are_the_outputs():
    """Of a query kernel (model, heads, head) all but the first; by pattern, and counted from the end."""
    x = jnp.asarray(gaussian(6, (5, 2, 3), 1)[0], jnp.float32)
    exact = {"first": largest(x.reshape(5, 6)), "last": largest(x.reshape(10, 3))}
    choices = [((1, 2), "first"), ((-1, -2), "first"), (None, "last"), ({"q": (1, 2)}, "first")]
    for axes, name in [*choices, ({"k": 0}, "last")]:
        _, state = once(oc.clip_singular_values(1.0, axes=axes), {"q": x})
        np.testing.assert_allclose(state.norm, [exact[name]], rtol=1e-5)
    _, state = once(oc.clip_by_spectral_norm(1.0, iterations=30, axes=(1, 2)), {"q": x})
    np.testing.assert_allclose(state.norm, [exact["first"]], rtol=1e-5)
    stacked = oc.clip_singular_values(1.0, axes=(1, 2), stacked="q")
    layers = {"q": jnp.stack([x, 2 * x])}
    out, state = once(stacked, layers)
    np.testing.assert_allclose(state.norm, exact["first"] * np.array([1, 2]), rtol=1e-5)
    np.testing.assert_allclose(largest(out["q"].reshape(2, 5, 6)), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("framework", "path", "shape", "matrix"),
    [
        ("flax", "attention/query/kernel", (5, 2, 3), (5, 6)),
        ("flax", "attention/out/kernel", (2, 3, 5), (6, 5)),
        ("flax", "attention/query/bias", (2, 3), None),
        ("equinox", "conv/weight", (6, 4, 3), (6, 12)),
        ("equinox", "conv/bias", (6, 2, 2), None),
        ("keras", "conv1d_transpose/kernel", (3, 5, 4), None),
    ],
)
def test_matrices_by_the_names_of_a_framework(framework, path, shape, matrix):
    """What is a bias there has the L2 norm, whatever its rank; so have the layers of a stack."""
    x = np.float32(np.random.default_rng(2).normal(size=shape))
    exact = largest(x.reshape(matrix)) if matrix else np.linalg.norm(x)
    if path.startswith("conv1d_transpose"):
        exact = largest(np.moveaxis(x, 1, 2).reshape(12, 5))
    for axes in (framework, {"nothing": 0, "": framework}):
        _, state = once(oc.clip_singular_values(1.0, axes=axes), {path: x})
        np.testing.assert_allclose(state.norm, [exact], rtol=1e-5)
    stacked = oc.clip_by_spectral_norm(1.0, iterations=30, axes=framework, stacked="")
    _, state = once(stacked, {path: np.stack([x, 2 * x])})
    np.testing.assert_allclose(state.norm, exact * np.array([1, 2]), rtol=1e-5)


def test_limits_of_any_kind_hold_for_spectral_norms():
    """A schedule, one for each group, relative to the parameters, and adaptive ones."""
    x = {"a": jnp.diag(jnp.array([4.0, 1.0])), "b": jnp.diag(jnp.array([8.0, 3.0]))}

    def run(limit, make=oc.clip_singular_values, params=None):
        tx = make(limit)

        def step(state, scale):
            return tx.update(jax.tree.map(lambda y: scale * y, x), state, params)[::-1]

        state, out = jax.jit(lambda: jax.lax.scan(step, tx.init(x), jnp.array([1.0, 10.0])))()
        return [float(out[name][1, 0, 0]) for name in x], state

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(run(lambda step: 1.0 + step.astype(jnp.float32))[0], [2, 2])
    close(run(jnp.array([1.0, 2.0]))[0], [1, 2])
    close(run(oc.limits.per_group({"a": 2.0, "b": 3.0}))[0], [2, 3])
    close(run(oc.limits.budget(3.0))[0], [3, 3])
    found, state = run(oc.limits.percentile(0.0, window=4))
    close(found, [4, 8])
    close(state.whole.norm, 80)
    for make in (oc.clip_singular_values, functools.partial(oc.clip_by_spectral_norm, iterations=9)):
        close(run(oc.limits.ema(2.0), make)[0], [8, 16])
        close(run(oc.limits.relative(0.5), make, x)[0], [2, 4])


PLAIN = {"w": TREE["tall"], "b": TREE["bias"], "n": jnp.arange(3), "none": None, "empty": jnp.zeros((0, 3))}
SCALES = jnp.array([1.0, 100.0, 0.01])


FLOATING = {"w": PLAIN["w"], "b": PLAIN["b"]}


def step(tx, state, scale):
    return tx.update(PLAIN | jax.tree.map(lambda x: scale * x, FLOATING), state, PLAIN)[::-1]


def scan(tx, scales=SCALES):
    return jax.lax.scan(functools.partial(step, tx), tx.init(PLAIN), scales)


@functools.cache
def loop(method):
    tx = METHODS[method](0.5)
    state, outs, update = tx.init(PLAIN), [], jax.jit(functools.partial(step, tx))
    for scale in SCALES:
        state, out = update(state, scale)
        outs.append(out)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *outs)


@pytest.mark.parametrize("method", METHODS)
def test_every_mode_agrees_with_the_plain_loop(method):
    """vmap of a scan under jit; the state is fixed from init on, and other leaves pass through."""
    tx = METHODS[method](0.5)
    state, outs = loop(method)
    found = jax.jit(jax.vmap(functools.partial(scan, tx)))(jnp.stack([SCALES, 2 * SCALES]))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], found), (state, outs), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(outs["n"][0], PLAIN["n"])
    abstract = jax.eval_shape(lambda: PLAIN)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(abstract), state)


def test_a_second_call_compiles_nothing():
    tx = oc.clip_by_spectral_norm(1.0)
    update = jax.jit(tx.update, donate_argnums=1)
    update(FLOATING, update(FLOATING, tx.init(FLOATING))[1])
    assert update._cache_size() == 1


WRAPPERS = {
    "chain": lambda tx: optax.chain(tx, optax.identity()),
    "masked": lambda tx: optax.masked(tx, dict.fromkeys(PLAIN, True)),
    "inject": lambda tx: optax.inject_hyperparams(oc.clip_by_spectral_norm, static_args="iterations")(0.5),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_of_optax_change_nothing(wrapper):
    with jax.numpy_dtype_promotion("standard"):
        _, found = jax.jit(lambda: scan(WRAPPERS[wrapper](oc.clip_by_spectral_norm(0.5))))()
    chex.assert_trees_all_close(found, loop("clip_by_spectral_norm")[1], rtol=1e-4, atol=1e-6)


def test_accumulated_steps_are_clipped_once():
    tx = optax.MultiSteps(oc.clip_by_spectral_norm(0.5), 2).gradient_transformation()

    @jax.jit
    def run(grads):
        _, state = tx.update(grads, tx.init(grads), grads)
        return tx.update(grads, state, grads)[0]

    with jax.numpy_dtype_promotion("standard"):
        out = run({"w": TREE["tall"]})
    np.testing.assert_allclose(largest(out["w"]), 0.5, rtol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_trees_without_matrices_are_fine(method):
    """An empty tree, as Optax's tools pass to init, and one of vectors alone."""
    tx = METHODS[method](1.0)
    marked = optax.tree_utils.tree_map_params(
        tx, lambda _: "parameter", tx.init(TREE), transform_non_params=lambda _: "other"
    )
    assert set(jax.tree.leaves(marked)) == {"other"}
    assert int(tx.update({}, tx.init({}))[1].step) == 1
    out, _ = tx.update({"b": jnp.array([0.3, 0.4])}, tx.init({"b": jnp.zeros(2)}))
    assert np.isfinite(out["b"]).all()


def test_matrices_may_be_split_over_devices():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jnp.asarray(gaussian(8, (16, 8), 1)[0], jnp.float32)
    for method in ("clip_by_spectral_norm", "hard"):
        tx = METHODS[method](1.0)
        whole, state = once(tx, x)
        split = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
        update = jax.jit(tx.update)
        found, found_state = update(split, tx.init(x))
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found_state.norm, state.norm, rtol=1e-5)
        bad = jax.device_put(x.at[15, 7].set(jnp.nan), split.sharding)
        assert np.isnan(update(bad, tx.init(x))[0]).all()


# Leaves of more than 4,095 entries, which the engine reads one by one.
LARGE = {
    "w": jnp.asarray(noisy(0, (80, 64), 1)[0], jnp.float32),
    "conv": jnp.asarray(noisy(1, (72, 64), 1)[0].reshape(3, 3, 8, 64), jnp.float32),
    "bias": jnp.array([3.0, 4.0]),
}


def test_the_norm_works_in_the_engine():
    """By leaf and by the whole tree, for ordinary, large and small entries, NaN and infinity."""
    exact = {"w": largest(LARGE["w"]), "conv": largest(LARGE["conv"].reshape(72, 64)), "bias": 5.0}
    measure = jax.jit(lambda tree: oc.group_norms(tree, oc.groups.leaf(), oc.norms.spectral(16)))
    for size in (1.0, 1e20, 1e-25, 1e37):
        found = measure(jax.tree.map(lambda x: x * np.float32(size), LARGE))  # noqa: B023
        for name in exact:
            np.testing.assert_allclose(float(found[name]) / size, exact[name], rtol=1e-4)
    bad = measure(LARGE | {"w": LARGE["w"].at[0, 0].set(jnp.nan), "conv": LARGE["conv"].at[0].set(jnp.inf)})
    assert not np.isfinite([bad["w"], bad["conv"]]).any()
    tx = oc.rescale_by_norm(1.0, groups=oc.groups.leaf(), norm=oc.norms.spectral(16))
    out, state = jax.jit(lambda tree: tx.update(tree, tx.init(tree)))(LARGE)
    np.testing.assert_allclose(largest(out["w"]), 1, rtol=1e-4)
    np.testing.assert_allclose(largest(out["conv"].reshape(72, 64)), 1, rtol=1e-4)
    np.testing.assert_allclose(state.whole.norm, max(exact.values()), rtol=1e-4)


def test_the_derivative_of_the_norm_is_that_of_a_simple_singular_value():
    """The outer product of the singular vectors; zero at zero; through a clip, orthogonal to the matrix."""
    u, _, v = svd(LARGE["w"])
    norm = jax.jit(jax.grad(lambda x: oc.group_norms(x, oc.groups.leaf(), oc.norms.spectral(40))["(root)"]))
    np.testing.assert_allclose(norm(LARGE["w"]), np.outer(u[:, 0], v[0]), atol=1e-4)
    assert not np.any(norm(0 * LARGE["w"]))
    for make in (
        lambda: oc.clip_by_spectral_norm(1.0, iterations=40),
        lambda: oc.rescale_by_norm(1.0, norm=oc.norms.spectral(40)),
    ):
        tx = make()
        clipped = lambda x: jnp.sum(jnp.cos(tx.update(x, tx.init(x))[0]))  # noqa: B023, E731
        grad = jax.jit(jax.grad(clipped))
        slope = grad(LARGE["w"])
        assert abs(float(jnp.sum(slope * LARGE["w"]))) < 1e-3 * float(
            jnp.linalg.norm(slope) * jnp.linalg.norm(LARGE["w"])
        )
        assert np.isfinite(grad(0 * LARGE["w"])).all()


def test_fewer_than_two_axes_are_measured_by_the_l2_norm():
    x = jnp.asarray(gaussian(9, (70, 64), 1)[0], jnp.float32)
    found = oc.group_norms({"w": x}, oc.groups.unit(), oc.norms.spectral())["w"]
    np.testing.assert_allclose(found, np.linalg.norm(np.float64(x), axis=0), rtol=1e-5)


CLIP = oc.clip_by_spectral_norm
VALUES = [
    (lambda: CLIP(-1.0), "clip_by_spectral_norm: max_norm is -1.0, not among the numbers from 0 to inf."),
    (lambda: CLIP(1.0, iterations=0), "clip_by_spectral_norm: iterations is 0, below 1. Pass 1 or more."),
    (lambda: CLIP(1.0, nonfinite="skip"), "clip_by_spectral_norm: nonfinite is 'skip'. Pass one of"),
    (
        lambda: CLIP(1.0, axes="torch"),
        "clip_by_spectral_norm: axes is 'torch'. Pass one of 'equinox', 'flax', 'haiku', 'keras'.",
    ),
    (lambda: CLIP(1.0, axes={"(": 0}), "clip_by_spectral_norm: the pattern '(' does not compile"),
    (lambda: CLIP(1.0, stacked="("), "groups.stacked: the pattern '(' does not compile"),
    (lambda: CLIP(1.0, stacked="x").init(PLAIN), "groups.stacked: no leaf matches 'x', among 'b', 'w'."),
    (
        lambda: CLIP(1.0, axes=2).init(PLAIN),
        "clip_by_spectral_norm: axis 2 is out of range at leaf 'w', which has shape (7, 3).",
    ),
    (
        lambda: CLIP(1.0, axes=(0, 1)).init(PLAIN),
        "clip_by_spectral_norm: all axes of leaf 'w', of shape (7, 3), are outputs. Leave one of them for",
    ),
    (
        lambda: CLIP(1.0, axes=()).init(PLAIN),
        "clip_by_spectral_norm: no axis of leaf 'w', of shape (7, 3), is an output. Name one at least.",
    ),
    (
        lambda: CLIP(1.0).update(TREE, CLIP(1.0).init(PLAIN)),
        "clip_by_spectral_norm: the tree has 7 matrices, 'bias', 'conv', 'layers/bias', 'layers/kernel', "
        "'scale', 'tall', 'wide'; `init` saw 2. Pass updates with the structure that `init` was given.",
    ),
    (
        lambda: CLIP(jnp.ones(3)).update(PLAIN, CLIP(1.0).init(PLAIN)),
        "clip_by_spectral_norm: the limit has shape (3,) for 2 matrices, 'b', 'w'. Pass one number, one per",
    ),
    (
        lambda: CLIP(oc.limits.relative(1.0)).update(PLAIN, CLIP(1.0).init(PLAIN)),
        "clip_by_spectral_norm: You are using a transformation that requires the current value of parameters",
    ),
    (lambda: oc.clip_singular_values(float("nan")), "clip_singular_values: max_value is nan"),
    (lambda: oc.soft_clip_singular_values(-2), "soft_clip_singular_values: max_value is -2"),
    (
        lambda: oc.soft_clip_singular_values(1.0, method="eigh"),
        "soft_clip_singular_values: method is 'eigh'. Pass one of 'svd', 'newton_schulz'.",
    ),
    (lambda: oc.soft_clip_singular_values(1.0, iterations=0), "soft_clip_singular_values: iterations is 0"),
    (lambda: oc.norms.spectral(0), "norms.spectral: iterations is 0, below 1."),
]
TYPES = [
    (lambda: CLIP("1"), "clip_by_spectral_norm: max_norm is '1', of type str."),
    (lambda: CLIP(1.0, iterations=1.5), "clip_by_spectral_norm: iterations is 1.5, of type float."),
    (lambda: CLIP(1.0, axes=0.5), "clip_by_spectral_norm: axis is 0.5, of type float. Pass an integer."),
    (lambda: CLIP(1.0, stacked=1), "groups.stacked: the pattern 1 is of type int. Pass a str."),
    (
        lambda: oc.clip_singular_values({"a": 1.0}),
        "clip_singular_values: max_value is a dict. Pass limits.per",
    ),
    (lambda: oc.norms.spectral(jnp.int32(1)), "norms.spectral: iterations is Array(1, dtype=int32)"),
]


@pytest.mark.parametrize(("call", "message"), VALUES)
def test_values_that_are_wrong_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("call", "message"), TYPES)
def test_types_that_are_wrong_are_named(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("groups", [oc.groups.leaf(), oc.groups.layer()], ids=["leaf", "layer"])
def test_small_matrices_keep_their_shape_when_they_are_measured(groups):
    """Leaves of equal size are merged for other norms; for this one each stays a matrix."""
    grads = {"a": {"w": jnp.diag(jnp.array([3.0, 4.0]))}, "b": {"w": jnp.diag(jnp.array([5.0, 12.0]))}}
    out, stats = oc.rescale_tree(grads, 1.0, groups=groups, norm=oc.norms.spectral(12))
    np.testing.assert_allclose(stats.norm, [4.0, 12.0], rtol=1e-4)
    np.testing.assert_allclose(out["b"]["w"], grads["b"]["w"] / 12, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("iterations", [10, 20, 30, 60])
def test_many_iterations_do_not_spoil_matrices_of_low_rank(rank, iterations):
    """Their Gram matrix has eigenvalues that rounding makes negative, which grow if they are let."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, rank)) @ rng.standard_normal((rank, 64))
    x *= 1e5 / np.linalg.svd(x, compute_uv=False)[0]
    tx = oc.soft_clip_singular_values(1.0, method="newton_schulz", iterations=iterations)
    grads = {"w": jnp.asarray(x, jnp.float32)}
    updates, _ = tx.update(grads, tx.init(grads))
    found = np.linalg.svd(np.asarray(updates["w"], np.float64), compute_uv=False)
    assert np.isfinite(updates["w"]).all()
    assert found[0] <= 1 + (1e-4 if iterations <= 10 else 1e-3)
    if iterations >= 30:
        np.testing.assert_allclose(found[:rank], 1, rtol=0.05)
