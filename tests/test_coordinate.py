"""Rules for single entries, against float64 readings of their equations written here."""

import functools
import re

import chex
import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from versions import enable_x64

import optaxclip as oc


def acclip_reference(steps, b1=0.9, b2=0.99, alpha=1.0, eps=1e-5):
    m, tau, out = np.zeros(10), np.zeros(10), []
    for g in steps.astype(np.float64):
        u = g.copy()
        for i in np.flatnonzero(np.isfinite(g)):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            tau[i] = (b2 * tau[i] ** alpha + (1 - b2) * abs(g[i]) ** alpha) ** (1 / alpha)
            u[i] = min(tau[i] / (abs(m[i]) + eps), 1) * m[i]
        out.append(u)
    return np.array(out)


def mask_reference(steps, threshold=5000.0, period=500, grace=20, decay=0.999):
    v, out = np.zeros(10), []
    for t, g in enumerate(steps.astype(np.float64), start=1):
        if t % period == 0:
            v[:] = 0
        u = g.copy()
        for i in range(10):
            if t % period >= grace and v[i] > 0 and g[i] ** 2 > threshold * v[i]:
                u[i] = np.sign(g[i]) * np.sqrt(threshold * v[i])
            if np.isfinite(g[i]):
                v[i] = decay * v[i] + (1 - decay) * u[i] ** 2
        out.append(u)
    return np.array(out)


def value_reference(steps, decay=0.999):
    mean, count, out = {}, {}, []
    for g in steps.astype(np.float64):
        u = g.copy()
        for leaf in (slice(0, 6), slice(6, 10)):
            x, name = g[leaf], leaf.start
            finite = np.isfinite(x)
            peak = np.abs(x[finite]).max()
            if finite.all() and peak > 0:
                mean[name] = decay * mean.get(name, 0) + (1 - decay) * peak
                count[name] = count.get(name, 0) + 1
            limit = mean[name] / (1 - decay ** count[name])
            for i in range(leaf.start, leaf.stop):
                if abs(g[i]) > limit:
                    u[i] = np.sign(g[i]) * limit if np.isinf(g[i]) else g[i] / peak * limit
        out.append(u)
    return np.array(out)


METHODS = {
    "acclip": (oc.acclip, acclip_reference),
    "acclip, power 2": (lambda: oc.acclip(0.5, 0.99, 2.0), lambda g: acclip_reference(g, 0.5, 0.99, 2.0)),
    "acclip, power 1.5": (
        lambda: oc.acclip(0.0, 0.95, 1.5, 1e-3),
        lambda g: acclip_reference(g, 0.0, 0.95, 1.5, 1e-3),
    ),
    "mask_spikes": (oc.mask_spikes, mask_reference),
    "mask_spikes, short": (
        lambda: oc.mask_spikes(50.0, 40, 5, 0.9),
        lambda g: mask_reference(g, 50.0, 40, 5, 0.9),
    ),
    "adaptive_value_clip": (oc.adaptive_value_clip, value_reference),
    "adaptive_value_clip, short": (lambda: oc.adaptive_value_clip(0.8), lambda g: value_reference(g, 0.8)),
}


@pytest.mark.parametrize("method", METHODS)
def test_golden_sequences_agree_with_the_equations(method):
    """240 steps with noise, spikes, a NaN, an infinity, a zero and a rise, against NumPy in float64."""
    make, expected = METHODS[method]
    steps = golden.entries()
    out, state = golden.run(make(), steps)
    np.testing.assert_allclose(out, expected(steps), rtol=1e-4, atol=1e-5)
    assert np.asarray(state.step) == golden.STEPS
    assert np.asarray(state.nonfinite).max() == 2
    assert np.asarray(state.clipped).min() >= (2 if "mask" in method else 30)
    assert (~np.isclose(out, steps, equal_nan=True)).sum() >= 5


@pytest.mark.parametrize("method", METHODS)
def test_entries_that_are_not_finite_are_not_learned(method):
    """The state of such an entry, or of its leaf where that shares a limit, is held; others do not notice."""
    tx = METHODS[method][0]()
    steps = golden.entries(3, zero=False)[:40]
    bad = steps.copy()
    bad[30, 7] = np.nan
    bad[31, 8] = np.inf
    out, clean = golden.run(tx, steps)
    with_bad, state = golden.run(tx, bad)
    shared = "adaptive" in method
    untouched = [0, 1, 2, 3, 4, 5] if shared else [0, 1, 2, 3, 4, 5, 6, 9]
    np.testing.assert_array_equal(with_bad[:, untouched], out[:, untouched])
    assert np.isnan(with_bad[30, 7])
    assert np.isfinite(with_bad[32:]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    if shared:
        after, _ = golden.run(tx, np.delete(bad, [30, 31], axis=0))
        np.testing.assert_array_equal(after[30:, 6:], with_bad[32:, 6:])
    elif "short" not in method:  # where a period is over, all is forgotten
        _, without = golden.run(tx, np.delete(steps, 30, axis=0))
        for held, of_clean, expected in zip(*map(trees_of, (state, clean, without)), strict=True):
            np.testing.assert_array_equal(held["b"][1], expected["b"][1])
            np.testing.assert_array_equal(held["b"][jnp.array([0, 3])], of_clean["b"][jnp.array([0, 3])])


def trees_of(state):
    return [x for x in state if isinstance(x, dict)]


def test_only_non_finite_steps_leave_no_trace():
    """Forty steps of NaN, infinity or zero, after which the first ordinary one comes through whole."""
    for tx in (oc.mask_spikes(), oc.adaptive_value_clip()):
        for value in (np.nan, np.inf, 0.0):
            steps = np.full((42, 10), value, np.float32)
            steps[-2:] = golden.entries()[:2]
            out, _ = golden.run(tx, steps)
            np.testing.assert_array_equal(out[-2], steps[-2])


def test_an_entry_without_second_moment_is_no_spike():
    """A row that was never used gets its first gradient after the grace; the reference sets it to zero."""
    steps = np.zeros((60, 10), np.float32)
    steps[:, :5] = 1
    steps[50:, 5:] = 3
    out, state = golden.run(oc.mask_spikes(4.0, grace=10, decay=0.9), steps)
    np.testing.assert_array_equal(out[50], steps[50])
    assert int(state.clipped) > 0  # its second moment is that of one gradient, with its bias


def test_a_spike_of_any_size_is_brought_to_the_limit():
    """Nothing overflows or vanishes on the way: not squares of 3e38, nor the ratio of 1e-3 to it."""
    steps = np.full((30, 10), 1e-3, np.float32)
    steps[25, :] = np.linspace(-3e38, 3e38, 10)
    out, state = golden.run(oc.mask_spikes(100.0, 500, 2, 0.9), steps)
    np.testing.assert_allclose(np.abs(out[25]), 1e-2 * np.sqrt(1 - 0.9**25), rtol=1e-5)
    assert np.isfinite(out).all()
    tx = oc.adaptive_value_clip(1.0)  # which learns nothing
    state = tx.init({"w": jnp.zeros(3)})._replace(limit=jnp.full(1, 1e-3), weight=jnp.ones(1))
    updates, _ = tx.update({"w": jnp.array([3e38, -1.5e38, 1e-4])}, state)
    np.testing.assert_allclose(updates["w"], [1e-3, -5e-4, 1e-4], rtol=1e-6)
    out, state = golden.run(oc.acclip(alpha=3.0), steps)
    assert np.isfinite(out).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def adam_reference(steps, period, warmup, b1=0.9, b2=0.999, eps=1e-8):
    """SPAM's reset, with the count that takes Adam's bias out put back with the moments."""
    m, v, count, out = np.zeros(10), np.zeros(10), 0, []
    for t, g in enumerate(steps.astype(np.float64), start=1):
        if t % period == 0:
            m, v, count = np.zeros(10), np.zeros(10), 0
        count += 1
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        k = t % period if t >= period else warmup
        by = 1 - 0.99 * (1 + np.cos(np.pi * k / warmup)) / 2 if k < warmup else 1.0
        out.append(by * (m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + eps))
    return np.array(out)


def test_adam_with_resets_agrees_with_the_equations():
    """240 steps, five of them resets, each followed by a warm-up; a NaN and an infinity last till then."""
    steps = golden.entries()
    out, state = golden.run(oc.reset_momentum(optax.scale_by_adam(), 41, 15), steps, promotion="standard")
    with np.errstate(invalid="ignore"):
        expected = adam_reference(steps, 41, 15)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert int(state.resets) == 5
    assert int(state.since) == 240 % 41
    poisoned = np.isnan(out)
    assert poisoned[golden.NAN : 81, 2].all()
    assert not poisoned[81:, 2].any()  # the reset at update 82
    assert not poisoned[163:].any()


def test_a_reset_starts_adam_anew():
    """From the reset, updates are those of a new optimizer, but for the warm-up."""
    steps = golden.entries(5)[:60]
    out, _ = golden.run(oc.reset_momentum(optax.adam(0.1), 30, 0), steps, promotion="standard")
    anew, _ = golden.run(optax.adam(0.1), steps[29:58], promotion="standard")
    np.testing.assert_allclose(out[29:58], anew, rtol=1e-6)


def test_counts_of_schedules_go_on_and_those_of_moments_do_not():
    schedule = optax.linear_schedule(1.0, 0.0, 100)
    inner = optax.chain(
        optax.masked(optax.trace(0.9), {"a": True, "b": False}),
        optax.inject_hyperparams(optax.adamw)(learning_rate=schedule),
        optax.scale_by_schedule(schedule),
    )
    _, state = golden.run(oc.reset_momentum(inner, 20, 5), golden.entries(6)[:50], promotion="standard")
    trace, injected, scheduled = state.inner
    assert int(injected.count) == 50
    assert int(scheduled.count) == 50
    assert int(optax.tree_utils.tree_get(injected.inner_state, "count", filtering=_of_adam)) == 11
    fresh, _ = golden.run(optax.trace(0.9), golden.entries(6)[39:50])
    np.testing.assert_allclose(trace.inner_state.trace["a"], golden.tree(fresh[-1])["a"], rtol=1e-6)


def _of_adam(path, value):
    del value
    return any(getattr(key, "tuple_name", "") == "ScaleByAdamState" for key in path)


def test_an_optimizer_that_holds_parameters_is_given_those_of_the_reset():
    """Schedule-free optimizers keep a copy of the parameters, which `init` reads."""
    tx = oc.reset_momentum(optax.contrib.schedule_free_sgd(0.1), 2, 0)
    params = {"w": jnp.array([1.0])}
    state = tx.init(params)
    _, state = tx.update({"w": jnp.array([1.0])}, state, params)
    _, state = tx.update({"w": jnp.array([0.0])}, state, {"w": jnp.array([5.0])})
    np.testing.assert_allclose(state.inner.z["w"], [5.0], rtol=1e-6)


def test_a_schedule_bounds_values():
    """The bound of ADOPT: the fourth root of the number of the step."""
    tx = oc.clip_by_value(lambda step: (step + 1).astype(jnp.float32) ** 0.25)
    steps = golden.entries()
    out, state = golden.run(tx, steps)
    bound = (np.arange(golden.STEPS) + 1.0)[:, None] ** 0.25
    np.testing.assert_allclose(out, np.clip(steps.astype(np.float64), -bound, bound), rtol=1e-6)
    assert int(state.nonfinite) == 2
    updates, _ = oc.clip_by_value(lambda step: -1.0).update({"w": jnp.ones(2)}, tx.init({}))
    np.testing.assert_array_equal(updates["w"], 0)


def test_a_schedule_of_values_gives_the_numbers_of_adopt():
    """Without momentum Optax's ADOPT is a division by the old second moment, and this."""
    steps = golden.entries(7)[:50]
    theirs, _ = golden.run(optax.contrib.adopt(1.0, b1=0.0, b2=0.9), steps, promotion="standard")
    nu, divided = np.zeros(10), []
    for k, g in enumerate(steps.astype(np.float64)):
        divided.append(g / np.maximum(np.sqrt(nu), 1e-6))
        nu = (0.9 * nu + 0.1 * g * g) if k else g * g
    ours, _ = golden.run(oc.clip_by_value(lambda step: step**0.25), np.float32(divided), promotion="standard")
    np.testing.assert_allclose(-ours[1:], theirs[1:], rtol=1e-4)


KERNELS = {
    "bias": (5,),
    "scale": (),
    "dense": (4, 3),
    "heads": (4, 2, 3),
    "conv": (3, 3, 4, 2),
    "conv3d": (2, 2, 2, 3, 4),
    "any": (2, 1, 2, 1, 2, 3),
}


def kernels(dtype=np.float32):
    rng = np.random.default_rng(8)
    return {name: jnp.asarray(rng.normal(size=shape) + 1, dtype) for name, shape in KERNELS.items()}


def test_centralize_subtracts_the_mean_of_each_unit():
    """By default over the axes of the inputs, in JAX's layouts."""
    grads = kernels()
    tx = oc.centralize()
    out, _ = jax.jit(tx.update)(grads, tx.init(grads))
    over = {"dense": (0,), "heads": (0,), "conv": (0, 1, 2), "conv3d": (0, 1, 2, 3), "any": (0, 1, 2, 3, 4)}
    for name, x in grads.items():
        x = np.float64(x)
        expected = x - x.mean(axis=over[name], keepdims=True) if name in over else x
        np.testing.assert_allclose(out[name], expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(out["bias"], grads["bias"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_centralize_makes_a_unit_with_what_is_not_finite_nan(bad):
    """All of it: a number less an infinity would be an infinity, and would look like a large gradient."""
    grads = {"w": jnp.array([[bad, 1.0], [2.0, 3.0], [4.0, 8.0]])}
    out, _ = oc.centralize().update(grads, optax.EmptyState())
    assert np.isnan(out["w"][:, 0]).all()
    np.testing.assert_array_equal(out["w"][:, 1], [-3, -1, 4])


@pytest.mark.parametrize("name", ["dense", "conv", "conv3d", "any", "bias"])
def test_centralize_equals_optax_on_transposed_kernels(name):
    """Optax has outputs first."""
    grads = kernels()[name]
    turned = jnp.moveaxis(grads, -1, 0)
    ours, _ = oc.centralize().update(grads, optax.EmptyState())
    theirs, _ = optax.centralize().update(turned, optax.EmptyState())
    np.testing.assert_allclose(np.moveaxis(np.asarray(ours), -1, 0), theirs, rtol=1e-5, atol=1e-6)
    rest = tuple(range(1, grads.ndim))
    first, _ = oc.centralize({"": rest}).update(grads, optax.EmptyState())
    theirs, _ = optax.centralize().update(grads, optax.EmptyState())
    np.testing.assert_allclose(first, theirs, rtol=1e-5, atol=1e-6)


def test_centralize_takes_axes_by_pattern():
    grads = {"torch": kernels()["dense"], "alone": kernels()["dense"], "other": kernels()["dense"]}
    tx = oc.centralize({"torch": -1, "alone": (), "nothing": (0, 1)})
    out, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(out["torch"].mean(1), 0, atol=1e-6)
    chex.assert_trees_all_equal(out["alone"], grads["alone"])
    np.testing.assert_allclose(out["other"].mean(0), 0, atol=1e-6)
    both, _ = oc.centralize((0, -1)).update(grads, optax.EmptyState())
    np.testing.assert_allclose(both["other"].mean(), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("framework", "path", "shape", "over"),
    [
        ("equinox", "linear/weight", (6, 4), (1,)),
        ("equinox", "conv/weight", (6, 4, 3, 3), (1, 2, 3)),
        ("equinox", "conv/bias", (6, 1, 1), ()),
        ("equinox", "linear/weight", (6, 1), ()),  # each a mean of one
        ("flax", "attention/query/kernel", (4, 2, 3), (0,)),
        ("flax", "attention/query/bias", (2, 3), ()),
        ("flax", "attention/out/kernel", (2, 3, 4), (0, 1)),
        ("flax", "embed/embedding", (7, 4), (1,)),
        ("flax", "mlp/kernel", (2, 2, 2, 2, 2, 2, 3), (0, 1, 2, 3, 4, 5)),
        ("haiku", "conv2_d_transpose_1/w", (3, 3, 6, 4), (0, 1, 3)),
        ("keras", "depthwise_conv2d_3/kernel", (3, 3, 4, 2), (0, 1)),
    ],
)
def test_centralize_takes_the_name_of_a_framework(framework, path, shape, over):
    grads = {path: np.float32(np.random.default_rng(1).normal(size=shape))}
    for axis in (framework, {"nothing": (), "": framework}):
        tx = oc.centralize(axis)
        out, _ = tx.update(grads, tx.init(grads))
        wide = np.float64(grads[path])
        expected = wide - wide.mean(over, keepdims=True) if over else wide
        np.testing.assert_allclose(out[path], expected, rtol=1e-5, atol=1e-6)


def test_a_mean_of_one_entry_is_not_subtracted():
    """Optax makes zeros of such a leaf for ever."""
    grads = {"one_input": jnp.ones((1, 5)), "one_output": jnp.array([[1.0], [3.0]])}
    out, _ = oc.centralize().update(grads, optax.EmptyState())
    chex.assert_trees_all_equal(out["one_input"], grads["one_input"])
    np.testing.assert_array_equal(out["one_output"], [[-1], [1]])


def test_means_are_taken_in_float32_and_do_not_overflow():
    """For sums beyond float16 and beyond float32; a NaN makes its unit NaN."""
    half = jnp.full((4096, 2), 60.0, jnp.float16).at[0, 1].set(61)
    large = jnp.full((8, 2), 2e38).at[0, 0].set(-1e38)
    bad = jnp.ones((3, 3)).at[0, 0].set(jnp.nan).at[0, 1].set(jnp.inf)
    grads = {"half": half, "large": large, "bad": bad}
    out, _ = jax.jit(oc.centralize().update)(grads, optax.EmptyState())
    assert out["half"].dtype == jnp.float16
    exact = np.float64(half) - np.float64(half).mean(0)
    np.testing.assert_allclose(np.float64(out["half"]), exact, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        out["large"], np.float64(large) - np.float64(large).mean(0), rtol=1e-5, atol=1e32
    )
    assert np.isnan(out["bad"][:, 0]).all()
    assert not np.isfinite(out["bad"][:, 1]).any()
    np.testing.assert_array_equal(out["bad"][:, 2], 0)


ALL = {
    "acclip": lambda c=0.9: oc.acclip(c),
    "mask_spikes": lambda c=0.9: oc.mask_spikes(9.0, 4, 1, c),
    "adaptive_value_clip": lambda c=0.9: oc.adaptive_value_clip(c),
    "centralize": lambda c=0.9: oc.centralize(),
    "reset_momentum": lambda c=0.9: oc.reset_momentum(optax.trace(c), 3, 2),
}
SCALES = jnp.array([1.0, 50.0, 0.1, 2.0, 100.0])


@pytest.mark.parametrize("method", ALL)
def test_every_mode_agrees_with_the_plain_loop_and_dtypes_are_kept(method):
    """Eager, jit and scan give the same updates and states; what is not floating passes through."""
    # Optax's momentum mixes dtypes, which the tests of this library do not.
    tx = ALL[method]() if method != "reset_momentum" else oc.reset_momentum(oc.adaptive_value_clip(0.9), 3, 2)
    state, history = tx.init(golden.MIXED), []
    shapes = jax.eval_shape(lambda: state)
    for scale in SCALES:
        state, updates = golden.scaled_step(tx, state, scale)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, golden.MIXED)
        history.append(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(lambda: state), shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, jax.eval_shape(lambda: golden.MIXED)), shapes
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(jax.eval_shape(lambda: golden.MIXED)), shapes)
    looped = jax.tree.map(lambda *x: jnp.stack(x), *history)
    last, scanned = jax.jit(
        lambda state: jax.lax.scan(functools.partial(golden.scaled_step, tx), state, SCALES)
    )(tx.init(golden.MIXED))
    chex.assert_trees_all_close(scanned, looped, rtol=1e-5)
    chex.assert_trees_all_close(last, state, rtol=1e-5)
    for name in ("count", "flag", "empty"):
        chex.assert_trees_all_equal(updates[name], golden.MIXED[name])


@pytest.mark.parametrize("method", ALL)
def test_methods_work_in_the_wrappers_of_optax(method):
    """A chain with an optimizer, a mask, accumulation, a traced hyperparameter, and vmap."""
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    make = ALL[method]
    for tx in (
        optax.MultiSteps(optax.chain(make(), optax.sgd(0.1)), 2).gradient_transformation(),
        optax.masked(make(), {"a": True, "b": False}),
        optax.inject_hyperparams(lambda c: make(c))(c=optax.linear_schedule(0.9, 0.5, 3)),
    ):
        with jax.numpy_dtype_promotion("standard"):
            state, out = jax.jit(functools.partial(golden.scan, tx))(
                golden.tree(jnp.asarray(golden.entries()[:6])), params
            )
        chex.assert_tree_all_finite(out)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    grads = golden.tree(jnp.asarray(golden.entries()[:4]))
    both = jax.vmap(functools.partial(golden.scan, make()))(
        jax.tree.map(lambda x: jnp.stack([x, 2 * x]), grads)
    )
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[0], both[1]), golden.scan(make(), grads)[1], rtol=1e-5, atol=1e-7
    )


def test_tree_map_params_finds_the_trees_like_parameters():
    """And no other part of a state: that is how their sharding is told."""
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    trees = {"acclip": 2, "mask_spikes": 1, "adaptive_value_clip": 0, "centralize": 0, "reset_momentum": 1}
    for method, count in trees.items():
        tx = ALL[method]()
        marked = optax.tree_utils.tree_map_params(
            tx, lambda _: "parameter", tx.init(params), transform_non_params=lambda _: "other"
        )
        assert jax.tree.leaves(marked).count("parameter") == 2 * count
        chex.assert_trees_all_equal(tx.update({}, tx.init({}))[0], {})


def test_float64_is_reckoned_in_float64():
    with enable_x64(True):
        steps = golden.entries()[:20].astype(np.float64)
        for make, reference in (METHODS["acclip"], METHODS["mask_spikes, short"]):
            _, out = golden.scan(make(), {"a": jnp.asarray(steps)})
            assert out["a"].dtype == jnp.float64
            np.testing.assert_allclose(out["a"], reference(steps), rtol=1e-12)


def test_derivatives_at_zero_are_finite():
    zeros = {"w": jnp.zeros((2, 2))}
    for tx in (
        oc.acclip(alpha=2.0),
        oc.acclip(alpha=1.5),
        oc.acclip(alpha=0.5),
        oc.mask_spikes(grace=0),
        oc.adaptive_value_clip(),
        oc.centralize(),
    ):
        out = jax.jit(jax.grad(lambda g, tx=tx: jnp.sum(tx.update(g, tx.init(g))[0]["w"])))(zeros)
        assert np.isfinite(out["w"]).all()


def test_sharded_arrays_give_what_single_ones_do_and_keep_their_sharding():
    """Largest moduli and means run over devices; state trees are sharded as the parameters are."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    by = NamedSharding(mesh, P("x", "y"))
    grads = jnp.asarray(np.random.default_rng(9).normal(size=(8, 4)), jnp.float32)
    split = jax.device_put(grads, by)
    for tx in (oc.acclip(), oc.mask_spikes(9.0, 4, 1), oc.adaptive_value_clip(0.5), oc.centralize()):
        update, state, held = jax.jit(tx.update), tx.init(grads), tx.init(split)
        for scale in (1.0, 30.0):
            expected, state = update(scale * grads, state)
            out, held = update(scale * split, held)
            chex.assert_trees_all_close(jax.device_get(out), expected, rtol=1e-5, atol=1e-5)
            assert out.sharding.is_equivalent_to(by, 2)
        for x in jax.tree.leaves(held):
            assert x.ndim < 2 or x.sharding.is_equivalent_to(by, 2)


def update(tx, updates, of):
    return lambda: tx.update(updates, tx.init(of))


ERRORS = [
    (lambda: oc.acclip(1.5), "acclip: b1 is 1.5, not among the numbers from 0 to 1."),
    (lambda: oc.acclip(b2=-0.1), "acclip: b2 is -0.1"),
    (lambda: oc.acclip(alpha=0.0), "acclip: alpha is 0.0, not among the numbers above 0."),
    (lambda: oc.acclip(eps=-1.0), "acclip: eps is -1.0"),
    (lambda: oc.mask_spikes(0.0), "mask_spikes: threshold is 0.0, not among the numbers above 0."),
    (lambda: oc.mask_spikes(period=0), "mask_spikes: period is 0, below 1."),
    (lambda: oc.mask_spikes(grace=-1), "mask_spikes: grace is -1, below 0."),
    (
        lambda: oc.mask_spikes(grace=500),
        "mask_spikes: grace is 500, for a period of 500. Pass less",
    ),
    (lambda: oc.mask_spikes(decay=2.0), "mask_spikes: decay is 2.0"),
    (lambda: oc.reset_momentum(optax.identity(), 0), "reset_momentum: period is 0, below 1."),
    (
        lambda: oc.reset_momentum(optax.identity(), 10, 11),
        "reset_momentum: warmup is 11, above the period of 10. Pass 10 or less.",
    ),
    (lambda: oc.adaptive_value_clip(float("nan")), "adaptive_value_clip: decay is nan"),
    (lambda: oc.centralize({"(": 0}), "centralize: the pattern '(' does not compile"),
    (
        lambda: oc.centralize(2).init({"w": jnp.ones((2, 2))}),
        "centralize: axis 2 is out of range at leaf 'w', which has shape (2, 2). Pass axes by pattern.",
    ),
    (
        lambda: oc.centralize().init({"a": 5.0, "w": jnp.ones((1,) * 7)}),
        "centralize: leaf 'w' has rank 7, shape (1, 1, 1, 1, 1, 1, 1); the default knows ranks 0 to 6.",
    ),
    (
        update(oc.acclip(), {"w": jnp.ones(2)}, {"v": jnp.ones(2)}),
        "acclip: the update's leaf 'w' has shape (2,); `init` saw nothing there. Pass updates with",
    ),
    (
        update(oc.mask_spikes(), {"w": jnp.ones(2)}, {"w": jnp.ones(3)}),
        "mask_spikes: the update's leaf 'w' has shape (2,); `init` saw shape (3,) there.",
    ),
    (
        update(oc.adaptive_value_clip(), {"w": jnp.ones(2)}, {}),
        "adaptive_value_clip: the tree has 1 leaves, 'w'; `init` saw 0. Pass updates with the structure",
    ),
]
TYPES = [
    (lambda: oc.acclip("0.9"), "acclip: b1 is '0.9', of type str. Pass a number"),
    (lambda: oc.mask_spikes(period=1.5), "mask_spikes: period is 1.5, of type float. Pass an integer."),
    (lambda: oc.reset_momentum(optax.identity(), 5.0), "reset_momentum: period is 5.0, of type float."),
    (lambda: oc.adaptive_value_clip(None), "adaptive_value_clip: decay is None"),
    (lambda: oc.centralize(0.5), "centralize: axis is 0.5, of type float. Pass an integer."),
    (
        lambda: oc.clip_by_value("1"),
        "clip_by_value: max_delta is '1', of type str. Pass a number or an array.",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_values_that_are_wrong_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("call", "message"), TYPES)
def test_types_that_are_wrong_are_named(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_the_bound_of_an_entry_that_was_always_zero_is_zero():
    """Whatever the power whose mean is taken."""
    tx = oc.acclip(alpha=1.5)
    _, state = tx.update({"w": jnp.array([0.0, 1.0])}, tx.init({"w": jnp.zeros(2)}))
    assert state.bound["w"][0] == 0
    assert state.bound["w"][1] > 0


LARGE = 3e38
COMPLEX = {  # an entry, and its direction
    "infinite": (complex(np.inf, 0), 1),
    "infinite, downwards": (complex(-7, -np.inf), -1j),
    "infinite in both": (complex(np.inf, -np.inf), (1 - 1j) / 2**0.5),
    "large": (LARGE + 0j, 1),
    "its modulus is infinite": (LARGE - LARGE * 1j, (1 - 1j) / 2**0.5),
    "ordinary": (-3 + 4j, -0.6 + 0.8j),
}


@pytest.mark.parametrize("entry", COMPLEX)
def test_complex_entries_of_any_size_are_brought_to_the_bound(entry):
    """Along their direction, by each method that goes by entry; infinite ones by those that say so."""
    value, direction = COMPLEX[entry]
    first = {"w": jnp.array([1, 1j], jnp.complex64)}
    grads = {"w": jnp.array([value, 0.5j], jnp.complex64)}
    for tx, bound in (
        (oc.clip_by_value(2.0), 2.0),
        (oc.mask_spikes(threshold=4.0, grace=0, decay=0.0), 2.0),
        (oc.adaptive_value_clip(1.0), 0.0),  # which learns nothing, and has no bound
        (oc.adaptive_value_clip(0.5), None),
    ):
        _, state = tx.update(first, tx.init(first))
        updates, state = tx.update(grads, state)
        out = np.asarray(updates["w"], np.complex128)
        if bound == 0.0:
            np.testing.assert_array_equal(updates["w"], grads["w"])
            continue
        expected = 2 * direction
        if bound is None:
            # A third of the first peak and two thirds of the second, at most float32's largest; or the first.
            peak = min(abs(complex(np.complex64(value))), float(np.finfo(np.float32).max))
            expected = direction if np.isinf(value) else (1 + 2 * peak) / 3 * (value / peak)
        np.testing.assert_allclose(out[0], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(out[1], 0.5j, rtol=1e-6)


def test_a_traced_bound_of_nan_is_not_hidden_from_complex_entries():
    tx = oc.clip_by_value(jnp.float32(jnp.nan))
    for dtype in (jnp.float32, jnp.complex64):
        updates, _ = tx.update({"w": jnp.ones(2, dtype)}, tx.init({}))
        assert np.isnan(updates["w"]).all()


def test_the_bound_of_values_may_be_injected_where_parameters_are_complex():
    tx = optax.inject_hyperparams(oc.clip_by_value)(max_delta=1.0)
    grads = {"w": jnp.array([3 + 4j, 0.1j], jnp.complex64)}
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["w"], [0.6 + 0.8j, 0.1j], rtol=1e-6)


@pytest.mark.parametrize("method", ["clip_by_value", "acclip", "mask_spikes", "adaptive_value_clip"])
def test_models_may_have_more_entries_than_an_int32(method):
    """Two billion and more in one leaf; nothing is made, only traced."""
    tx = oc.clip_by_value(1.0) if method == "clip_by_value" else ALL[method]()
    tree = {"w": jax.ShapeDtypeStruct((2**16, 2**15 + 1), jnp.float32)}
    updates, state = jax.eval_shape(lambda g: tx.update(g, tx.init(g)), tree)
    assert updates["w"].shape == tree["w"].shape
    assert state.share.dtype == jnp.float32


def test_a_float64_peak_beyond_float32_does_not_stay():
    """It is learned as the largest float32, and what follows has a bound."""
    with enable_x64(True):
        tx = oc.adaptive_value_clip(0.5)
        state, out = tx.init({"w": jnp.zeros(1, jnp.float64)}), []
        for size in (1.0, 1e300, 1e-60, *[1.0] * 200):
            updates, state = tx.update({"w": jnp.array([size], jnp.float64)}, state)
            out.append(float(updates["w"][0]))
        assert np.isfinite(out).all()
        assert 1e38 < out[1] < 3.5e38
        assert out[2] == 1e-60
        np.testing.assert_allclose(state.limit, [1], rtol=1e-5)


def test_a_float64_peak_is_not_outside_of_itself():
    """The bound is that peak, rounded to float32: nothing is clipped at the first step."""
    with enable_x64(True):
        for value in (0.7, 0.1, 1 / 3):
            tx = oc.adaptive_value_clip()
            grads = {"w": jnp.array([value, -value / 2], jnp.float64)}
            updates, state = tx.update(grads, tx.init(grads))
            np.testing.assert_array_equal(updates["w"], grads["w"])
            assert state.clipped.tolist() == [0]


@pytest.mark.parametrize("sizes", [(1e4, 1e-5), (1000.0, 0.1), (1e-5, 1e4)])
def test_a_bound_that_forgets_all_is_the_peak(sizes):
    """With a decay of 0 nothing is clipped, however far peaks are apart."""
    tx = oc.adaptive_value_clip(0.0)
    state = tx.init({"w": jnp.zeros(1)})
    for size in sizes:
        updates, state = tx.update({"w": jnp.array([size], jnp.float32)}, state)
        assert updates["w"].tolist() == [np.float32(size)]
        assert state.clipped.tolist() == [0]


def test_a_bound_far_below_its_momentum_is_reached():
    """Their ratio is below float32's least number."""
    tx = oc.acclip(b1=0.9, b2=0.0, eps=0.0)
    state = tx.init({"w": jnp.zeros(1)})
    for size in (3e38, 1e-3):
        updates, state = tx.update({"w": jnp.array([size])}, state)
    np.testing.assert_allclose(updates["w"], [1e-3], rtol=1e-6)


@pytest.mark.skipif(jax.device_count("cpu") < 8, reason="needs eight CPU devices")
def test_a_peak_of_all_devices_has_a_derivative():
    """Inside shard_map it is that of one device."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    first, grads = jnp.full(8, 2.0), jnp.array([1.0, -9.0, 2.0, 7.0, 0.0, 3.0, 1.0, 1.0])

    def pushed(first, grads, change, **options):
        tx = oc.adaptive_value_clip(0.5, **options)
        _, state = tx.update({"w": first}, tx.init({"w": first}))
        return jax.jvp(lambda g: tx.update({"w": g}, state)[0]["w"], (grads,), (change,))

    change = jnp.arange(1.0, 9.0)
    mapped = jax.shard_map(
        functools.partial(pushed, axis_name="x"), mesh=mesh, in_specs=(P("x"),) * 3, out_specs=(P("x"),) * 2
    )
    for own, expected in zip(
        jax.jit(mapped)(first, grads, change), pushed(first, grads, change), strict=True
    ):
        np.testing.assert_allclose(own, expected, rtol=1e-5)
