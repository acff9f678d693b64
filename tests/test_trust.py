"""StableAdamW, LARC and LAMB's ratio, against float64 readings of their equations written here."""

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

LEAVES = {"a": slice(0, 6), "b": slice(6, 10)}
WEIGHTS = np.float32([0.5, -1, 2, 0.1, -0.3, 1, 3, -2, 0.7, 8])


def run(tx, steps, params=WEIGHTS, promotion="strict"):
    """As `golden.run`, with parameters."""
    return golden.run(tx, steps, params, promotion)


def stable_reference(steps, b1=0.9, b2=0.99, eps=1e-6, threshold=1.0, decay=0.0):
    """Wortsman 2023. A leaf with an entry that is not finite is NaN, and the other entries are learned."""
    m, v, out = np.zeros(10), np.zeros(10), []
    for t, g in enumerate(steps.astype(np.float64), start=1):
        first, second = ((b**t - b) / (b**t - 1) for b in (b1, b2))
        known = np.isfinite(g)
        m[known] = first * m[known] + (1 - first) * g[known]
        v[known] = second * v[known] + (1 - second) * g[known] ** 2
        u = np.full(10, np.nan)
        for leaf in LEAVES.values():
            if known[leaf].all():
                rms = np.sqrt(np.mean(g[leaf] ** 2 / np.maximum(v[leaf], eps**2)))
                step = m[leaf] / (np.sqrt(v[leaf]) + eps) + decay * np.float64(WEIGHTS[leaf])
                u[leaf] = step / max(1, rms / threshold)
        out.append(u)
    return np.array(out)


def larc_reference(steps, lr, trust=0.02, clip=True, decay=0.0, eps=1e-8, weights=WEIGHTS):
    """Apex, and 1 in place of the ratio where a norm is 0."""
    p, out = weights.astype(np.float64), []
    for t, g in enumerate(steps.astype(np.float64)):
        u = np.full(10, np.nan)
        for leaf in LEAVES.values():
            n, w = np.sqrt(np.sum(g[leaf] ** 2)), np.sqrt(np.sum(p[leaf] ** 2))
            if not np.isfinite(n):
                continue
            ratio = 1.0
            if n and w:
                ratio = trust * w / (n + decay * w + eps)
                ratio = min(ratio / (lr(t) if callable(lr) else lr), 1) if clip else ratio
            u[leaf] = ratio * (g[leaf] + decay * p[leaf])
        out.append(u)
    return np.array(out)


def lamb_reference(steps, most=10.0, low=0.0, high=np.inf, eps=0.0, weights=WEIGHTS):
    p, out = weights.astype(np.float64), []
    for g in steps.astype(np.float64):
        u = np.full(10, np.nan)
        for leaf in LEAVES.values():
            n, w = np.sqrt(np.sum(g[leaf] ** 2)), np.sqrt(np.sum(p[leaf] ** 2))
            if np.isfinite(n):
                u[leaf] = g[leaf] * (np.clip(min(w, most) / (n + eps), low, high) if n and w else 1.0)
        out.append(u)
    return np.array(out)


def rate(step):
    return 0.002 * jnp.minimum(step.astype(jnp.float32) + 1, 50.0)


METHODS = {
    "scale_by_stable_adam": (oc.scale_by_stable_adam, stable_reference),
    "scale_by_stable_adam, other numbers": (
        lambda: oc.scale_by_stable_adam(0.8, 0.95, 1e-2, 2.0),
        lambda g: stable_reference(g, 0.8, 0.95, 1e-2, 2.0),
    ),
    "stable_adamw": (lambda: oc.stable_adamw(0.1), lambda g: -0.1 * stable_reference(g, decay=1e-2)),
    "larc": (lambda: oc.larc(0.01), lambda g: larc_reference(g, 0.01)),
    "larc, decay": (
        lambda: oc.larc(0.05, 0.01, weight_decay=0.3),
        lambda g: larc_reference(g, 0.05, 0.01, decay=0.3),
    ),
    "larc, schedule": (
        lambda: oc.larc(rate, weight_decay=1e-2),
        lambda g: larc_reference(g, lambda t: 0.002 * min(t + 1, 50), decay=1e-2),
    ),
    "larc, not clipped": (
        lambda: oc.larc(0.1, clip=False, weight_decay=0.1, eps=0.5),
        lambda g: larc_reference(g, 0.1, clip=False, decay=0.1, eps=0.5),
    ),
    "lamb_trust_ratio": (oc.lamb_trust_ratio, lamb_reference),
    "lamb_trust_ratio, bound": (lambda: oc.lamb_trust_ratio(2.0), lambda g: lamb_reference(g, 2.0)),
    "lamb_trust_ratio, LAMBC": (
        lambda: oc.lamb_trust_ratio(np.inf, max_ratio=1.0),
        lambda g: lamb_reference(g, np.inf, high=1.0),
    ),
    "lamb_trust_ratio, both": (
        lambda: oc.lamb_trust_ratio(9.0, 0.3, 0.8, 1e-2),
        lambda g: lamb_reference(g, 9.0, 0.3, 0.8, 1e-2),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_golden_sequences_agree_with_the_equations(method):
    """240 steps with noise, spikes, a NaN, an infinity, a zero and a rise, against NumPy in float64."""
    make, expected = METHODS[method]
    steps = golden.entries()
    out, state = run(make(), steps)
    np.testing.assert_allclose(out, expected(steps), rtol=1e-4, atol=1e-6)
    state = state[0] if method == "stable_adamw" else state
    assert state.nonfinite.tolist() == [2, 1]
    assert (state.clipped >= 2).all()


def test_the_moments_are_those_of_adam_and_spikes_are_divided():
    """Without its division by the ratio the direction is Adam's, with the same epsilon."""
    steps = golden.entries(1)[:60]
    ours, state = run(oc.scale_by_stable_adam(b2=0.999, eps=1e-8, threshold=1e9), steps)
    theirs, adam = run(optax.scale_by_adam(), steps, promotion="standard")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert state.clipped.tolist() == [0, 0]
    np.testing.assert_allclose(golden.flat(state.rms) ** 2, golden.flat(adam.nu) / (1 - 0.999**60), rtol=1e-4)
    spike = np.concatenate([steps, 1000 * steps[:1]])
    _, state = run(oc.scale_by_stable_adam(), spike)
    assert (state.ratio > 5).all()


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_entries_that_are_not_finite_are_not_learned(nonfinite):
    """Their leaf is NaN or zero for that step; the moments of all other entries are what they would be."""
    steps = golden.entries(2)[:40]
    bad = steps.copy()
    bad[30, 7] = np.nan
    bad[31, 8] = np.inf
    tx = oc.scale_by_stable_adam(nonfinite=nonfinite)
    out, clean = run(tx, steps)
    with_bad, state = run(tx, bad)
    expected = np.nan if nonfinite == "propagate" else 0
    np.testing.assert_array_equal(with_bad[30:32, 6:], np.full((2, 4), expected))
    np.testing.assert_array_equal(with_bad[:, :6], out[:, :6])
    assert np.isfinite(with_bad[32:]).all()
    assert state.nonfinite.tolist() == [0, 2]
    for held, expected in ((state.mean, clean.mean), (state.rms, clean.rms)):
        np.testing.assert_array_equal(held["b"][jnp.array([0, 3])], expected["b"][jnp.array([0, 3])])
        assert (held["b"][jnp.array([1, 2])] != expected["b"][jnp.array([1, 2])]).all()


def test_large_gradients_neither_overflow_nor_vanish():
    """1e30 and 1e-30, whose squares leave float32, have the direction of 1."""
    steps = golden.entries(3)[:20]
    expected, _ = run(oc.scale_by_stable_adam(eps=0.0), steps)
    tx = oc.scale_by_stable_adam(eps=0.0)
    for scale in (2.0**100, 2.0**-90):
        out, _ = run(tx, steps * np.float32(scale))
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)
    zeros, state = run(tx, np.zeros_like(steps))
    np.testing.assert_array_equal(zeros, 0)
    assert state.ratio.tolist() == [0, 0]


def test_weight_decay_spares_what_the_mask_says():
    """As in Optax: a tree of booleans, a prefix of it, or a function of the parameters."""
    steps = golden.entries(4)[:5]
    free, _ = run(oc.stable_adamw(0.1, weight_decay=0.0), steps)
    full, _ = run(oc.stable_adamw(0.1, weight_decay=0.5), steps)
    masks = ({"a": True, "b": False}, lambda params: jax.tree.map(lambda x: x.ndim > 1, params))
    for mask in masks:
        tx = oc.stable_adamw(0.1, weight_decay=0.5, mask=mask)
        out = golden.flat(
            jax.jit(functools.partial(golden.scan, tx))(
                *(golden.tree(jnp.asarray(x)) for x in (steps, WEIGHTS))
            )[1]
        )
        np.testing.assert_array_equal(out[:, :6], full[:, :6])
        np.testing.assert_array_equal(out[:, 6:], free[:, 6:])
        assert not (out == full).all()
    with pytest.raises(ValueError, match="requires the current value of parameters"):
        oc.stable_adamw(0.1).update({"w": jnp.ones(1)}, oc.stable_adamw(0.1).init({"w": jnp.ones(1)}))


def test_stable_adamw_shortens_the_step_of_a_spike():
    """Without momentum Adam's is many times as long where the second moment is out of date."""

    def longest(tx):
        def step(state, t):
            updates, state = tx.update(jnp.where(t % 50 == 49, 1e4, 1.0) * jnp.ones(4), state, jnp.ones(4))
            return state, jnp.abs(updates)

        return float(jax.lax.scan(step, tx.init(jnp.ones(4)), jnp.arange(150))[1].max())

    with jax.numpy_dtype_promotion("standard"):
        stable = longest(oc.stable_adamw(0.05, b1=0.0, weight_decay=0.0))
        adam = longest(optax.chain(oc.scale_by_stable_adam(b1=0.0, threshold=1e9), optax.scale(-0.05)))
    np.testing.assert_allclose(stable, 0.05, rtol=1e-3)
    assert adam > 5 * stable


PAIRS = {
    "trust ratio": (oc.lamb_trust_ratio(np.inf), optax.scale_by_trust_ratio()),
    "trust ratio, eps": (oc.lamb_trust_ratio(np.inf, eps=0.5), optax.scale_by_trust_ratio(eps=0.5)),
    "LARC without clip": (
        oc.larc(1.0, 0.02, clip=False, eps=1e-3),
        optax.scale_by_trust_ratio(trust_coefficient=0.02, eps=1e-3),
    ),
    "LAMB": (
        optax.chain(
            optax.scale_by_adam(eps=1e-6),
            optax.add_decayed_weights(0.1),
            oc.lamb_trust_ratio(np.inf),
            optax.scale_by_learning_rate(0.1),
        ),
        optax.lamb(0.1, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_updates_equal_those_of_optax(name):
    """For ordinary float32 updates, of which one is zero, and for parameters of zero."""
    ours, theirs = PAIRS[name]
    steps = golden.entries(5)[90:100]
    for params in (WEIGHTS, np.where(np.arange(10) < 6, 0, WEIGHTS)):
        out, _ = run(ours, steps, params, "standard")
        expected, _ = run(theirs, steps, params, "standard")
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-7)


def test_norms_of_float16_do_not_overflow():
    """Optax measures nine entries of 100 as inf and makes zeros of the update."""
    params, grads = jnp.full((3, 3), 100.0, jnp.float16), jnp.full((3, 3), 200.0, jnp.float16)
    tx = oc.lamb_trust_ratio(np.inf)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates.dtype == jnp.float16
    np.testing.assert_array_equal(updates, 100)
    tx = oc.larc(0.1, weight_decay=0.01)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(np.float64(updates), 0.02 * 300 / (603 * 0.1) * 201, rtol=1e-3)


def test_what_has_no_norm_is_not_scaled_and_decays():
    """Zero parameters move, and parameters without gradients decay as without LARC; Apex lets them stay."""
    params = {"new": jnp.zeros(2), "unused": jnp.array([3.0, 4.0])}
    grads = {"new": jnp.array([6.0, 8.0]), "unused": jnp.zeros(2)}
    tx = oc.larc(0.1, weight_decay=0.5)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["new"], [6, 8])
    np.testing.assert_array_equal(updates["unused"], [1.5, 2])
    tx = oc.lamb_trust_ratio(min_ratio=0.5, max_ratio=0.5)
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["new"], [6, 8])
    assert state.factor.tolist() == [1, 1]


def test_a_learning_rate_of_zero_scales_nothing_and_bad_parameters_are_not_hidden():
    grads, params = {"w": jnp.array([6.0, 8.0])}, {"w": jnp.array([3.0, 4.0])}
    tx = oc.larc(optax.linear_schedule(0.0, 0.1, 10))
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal(updates, grads)
    for tx in (oc.larc(0.1), oc.lamb_trust_ratio()):
        updates, _ = tx.update(grads, tx.init(params), {"w": jnp.array([jnp.nan, 1.0])})
        assert np.isnan(updates["w"]).all()


def test_larc_takes_groups_with_rows():
    """One ratio per output unit, and the decay of each by its own; metrics find the state."""
    params = {"w": jnp.array([[3.0, 0.6], [4.0, 0.8]])}
    grads = {"w": jnp.array([[6.0, 6.0], [8.0, 8.0]])}
    tx = oc.larc(0.1, weight_decay=0.5, groups=oc.groups.unit())
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    ratio = np.array([0.02 * 5 / 12.5, 0.02 * 1 / 10.5]) / 0.1
    whole = np.float64(grads["w"]) + 0.5 * np.float64(params["w"])
    np.testing.assert_allclose(updates["w"], ratio * whole, rtol=1e-6)
    np.testing.assert_allclose(
        oc.metrics(state, params, oc.groups.unit())["clip/factor/w[1]"], ratio[1], 1e-6
    )


ALL = {
    "scale_by_stable_adam": lambda c=0.5: oc.scale_by_stable_adam(threshold=c, weight_decay=0.1),
    "larc": lambda c=0.5: oc.larc(c, weight_decay=0.1),
    "lamb_trust_ratio": lambda c=0.5: oc.lamb_trust_ratio(c),
}
SCALES = jnp.array([1.0, 50.0, 0.1])


@pytest.mark.parametrize("method", ALL)
def test_every_mode_agrees_with_the_plain_loop_and_dtypes_are_kept(method):
    """Eager, jit and scan give the same updates and states; what is not floating passes through."""
    tx = ALL[method]()
    state, history = tx.init(golden.MIXED), []
    shapes = jax.eval_shape(lambda: state)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(jax.eval_shape(lambda: golden.MIXED)), shapes)
    for scale in SCALES:
        state, updates = golden.scaled_step(tx, state, scale)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, golden.MIXED)
        history.append(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)
    looped = jax.tree.map(lambda *x: jnp.stack(x), *history)
    last, scanned = jax.jit(
        lambda state: jax.lax.scan(functools.partial(golden.scaled_step, tx), state, SCALES)
    )(tx.init(golden.MIXED))
    chex.assert_trees_all_close(scanned, looped, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(last, state, rtol=1e-5, atol=1e-7)
    for name in ("count", "flag", "empty"):
        chex.assert_trees_all_equal(updates[name], golden.MIXED[name])


@pytest.mark.parametrize("method", ALL)
def test_methods_work_in_the_wrappers_of_optax(method):
    """A chain with an optimizer, a mask, accumulation, a traced hyperparameter, vmap, and an empty tree."""
    params, make = golden.tree(jnp.asarray(WEIGHTS)), ALL[method]
    grads = golden.tree(jnp.asarray(golden.entries()[:6]))
    for tx in (
        optax.MultiSteps(optax.chain(make(), optax.sgd(0.1)), 2).gradient_transformation(),
        optax.masked(make(), {"a": True, "b": False}),
        optax.inject_hyperparams(lambda c: make(c))(c=optax.linear_schedule(0.9, 0.5, 3)),
    ):
        with jax.numpy_dtype_promotion("standard"):
            state, out = jax.jit(functools.partial(golden.scan, tx))(grads, params)
        chex.assert_tree_all_finite(out)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    doubled = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), grads)
    both = jax.vmap(lambda grads: golden.scan(make(), grads, params))(doubled)
    expected = golden.scan(make(), grads, params)[1]
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], both[1]), expected, rtol=1e-5, atol=1e-7)
    marked = optax.tree_utils.tree_map_params(
        make(), lambda _: "parameter", make().init(params), transform_non_params=lambda _: "other"
    )
    assert jax.tree.leaves(marked).count("parameter") == (4 if "adam" in method else 0)
    chex.assert_trees_all_equal(make().update({}, make().init({}), {})[0], {})


def test_larc_clips_a_huge_gradient_rather_than_drop_it():
    """The ratio of the limit and its norm is below float32's least number."""
    params = {"w": jnp.array([5.0])}
    tx = oc.larc(0.1)
    updates, _ = tx.update({"w": jnp.array([3e38])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [1], rtol=1e-6)


def test_float64_is_reckoned_in_float64():
    with enable_x64(True):
        steps, params = (
            golden.entries()[:20].astype(np.float64),
            golden.tree(jnp.asarray(np.float64(WEIGHTS))),
        )
        for make, reference, rtol in (
            (oc.scale_by_stable_adam, stable_reference, 1e-5),  # weights of the past are float32
            *((*METHODS[name], 1e-12) for name in ("larc, decay", "lamb_trust_ratio, both")),
        ):
            _, out = golden.scan(make(), golden.tree(jnp.asarray(steps)), params)
            assert out["b"].dtype == jnp.float64
            np.testing.assert_allclose(golden.flat(out), reference(steps), rtol=rtol, atol=1e-7)


def test_derivatives_at_zero_are_finite():
    zeros = {"w": jnp.zeros((2, 2))}
    for tx in (oc.scale_by_stable_adam(), oc.larc(0.1, weight_decay=0.1), oc.lamb_trust_ratio()):
        out = jax.jit(jax.grad(lambda g, tx=tx: jnp.sum(tx.update(g, tx.init(g), zeros)[0]["w"])))(zeros)
        assert np.isfinite(out["w"]).all()


def test_sharded_arrays_give_what_single_ones_do_and_keep_their_sharding():
    """Norms run over devices, under `jit` by themselves and inside `shard_map` by `axis_name`."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    by = NamedSharding(mesh, P("x"))
    params = jnp.asarray(np.random.default_rng(9).normal(size=(8, 4)), jnp.float32)
    split = jax.device_put(params, by)
    for make in (oc.scale_by_stable_adam, functools.partial(oc.larc, 0.1, weight_decay=0.1)):
        tx = make()
        state = tx.init(params)._replace(step=jnp.int32(3))
        expected, after = jax.jit(tx.update)(9 * params, state, params)
        out, _ = jax.jit(tx.update)(9 * split, tx.init(split), split)
        np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-5)
        assert out.sharding.is_equivalent_to(by, 2)
        specs = jax.tree.map(lambda x: P("x") if x.shape == (8, 4) else P(), state)
        inside = jax.jit(
            jax.shard_map(
                make(axis_name="x").update,
                mesh=mesh,
                in_specs=(P("x"), specs, P("x")),
                out_specs=(P("x"), specs),
            )
        )
        out, held = inside(9 * params, state, params)
        np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-5)
        chex.assert_trees_all_close(jax.device_get(held), after, rtol=1e-5)


ERRORS = [
    (
        lambda: oc.scale_by_stable_adam(1.5),
        "scale_by_stable_adam: b1 is 1.5, not among the numbers from 0 to 1.",
    ),
    (lambda: oc.scale_by_stable_adam(b2=-1.0), "scale_by_stable_adam: b2 is -1.0"),
    (lambda: oc.scale_by_stable_adam(eps=-1.0), "scale_by_stable_adam: eps is -1.0"),
    (
        lambda: oc.scale_by_stable_adam(threshold=0.0),
        "scale_by_stable_adam: threshold is 0.0, not among the numbers",
    ),
    (lambda: oc.stable_adamw(0.1, weight_decay=-1.0), "scale_by_stable_adam: weight_decay is -1.0"),
    (
        lambda: oc.scale_by_stable_adam(nonfinite="skip"),
        "nonfinite is 'skip'. Pass one of 'propagate'",
    ),
    (
        lambda: oc.scale_by_stable_adam().update({"w": jnp.ones(2)}, oc.scale_by_stable_adam().init({})),
        "scale_by_stable_adam: the update's leaf 'w' has shape (2,); `init` saw nothing there.",
    ),
    (lambda: oc.larc(-0.1), "larc: learning_rate is -0.1, not among the numbers from 0 to inf."),
    (lambda: oc.larc(0.1, -0.02), "larc: trust_coefficient is -0.02"),
    (lambda: oc.larc(0.1, weight_decay=-1.0), "larc: weight_decay is -1.0"),
    (lambda: oc.larc(0.1, eps=float("nan")), "larc: eps is nan"),
    (
        lambda: oc.larc(0.1).update({"w": jnp.ones(2)}, oc.larc(0.1).init({"w": jnp.ones(2)})),
        "larc: You are using a transformation that requires the current value of parameters",
    ),
    (lambda: oc.lamb_trust_ratio(-1.0), "lamb_trust_ratio: max_norm is -1.0"),
    (lambda: oc.lamb_trust_ratio(eps=-1.0), "lamb_trust_ratio: eps is -1.0"),
    (
        lambda: oc.lamb_trust_ratio(min_ratio=2.0, max_ratio=1.0),
        "lamb_trust_ratio: min_ratio is 2.0, above max_ratio, 1.0. Pass one that is not.",
    ),
]
TYPES = [
    (lambda: oc.scale_by_stable_adam("0.9"), "scale_by_stable_adam: b1 is '0.9', of type str."),
    (lambda: oc.larc("0.1"), "larc: learning_rate is '0.1', of type str. Pass a number or an array."),
    (
        lambda: oc.larc(oc.limits.constant(0.1)),
        "larc: learning_rate is a Limit. Pass a number, an array or a sch",
    ),
    (lambda: oc.larc(0.1, clip=1), "larc: clip is 1, of type int. Pass True or False."),
    (lambda: oc.lamb_trust_ratio(None), "lamb_trust_ratio: max_norm is None"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_values_that_are_wrong_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("call", "message"), TYPES)
def test_types_that_are_wrong_are_named(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()
