"""What all named methods and all parts of the engine satisfy, in every way that JAX and Optax run them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from hypothesis import given

import optaxclip as oc

GRADS = {
    "layers": {"kernel": jnp.arange(24.0).reshape(3, 2, 4) / 10, "bias": jnp.ones((3, 4))},
    "head": {"kernel": jnp.full((4, 2), 0.3), "bias": jnp.array([0.1, -0.2])},
}
PARAMS = jax.tree.map(lambda x: 0.5 * x + 0.1, GRADS)
SCALES = jnp.array([1.0, 100.0, 0.01])  # three steps, the second a spike
STACKED = oc.groups.stacked(oc.groups.layer(), "^layers/")
METHODS = {
    "clip_by_global_norm": lambda c=0.5: oc.clip_by_global_norm(c),
    "clip_by_layerwise_norm": lambda c=0.5: oc.clip_by_layerwise_norm(c),
    "clip_by_leafwise_norm": lambda c=0.5: oc.clip_by_leafwise_norm(c),
    "clip_by_groupwise_norm": lambda c=0.5: oc.clip_by_groupwise_norm(c, STACKED),
    "clip_by_unitwise_norm": lambda c=0.5: oc.clip_by_unitwise_norm(c),
    "clip_by_value": lambda c=0.5: oc.clip_by_value(c),
    "clip_by_block_rms": lambda c=0.5: oc.clip_by_block_rms(c),
    "adaptive_grad_clip": lambda c=0.5: oc.adaptive_grad_clip(c),
    "normalize_by_global_norm": lambda c=0.5: oc.normalize_by_global_norm(c),
    "normalize_by_layerwise_norm": lambda c=0.5: oc.normalize_by_layerwise_norm(c),
}
ENGINE = {
    "schedule": lambda: oc.clip_by_global_norm(optax.linear_schedule(1.0, 0.1, 3)),
    "per_group": lambda: oc.clip_by_layerwise_norm(
        oc.limits.per_group({"layers": oc.limits.after(1, 9.0, 1.0), "head": 0.1})
    ),
    "budget": lambda: oc.clip_by_leafwise_norm(oc.limits.budget(1.0, by="size")),
    "at_most": lambda: oc.clip_by_layerwise_norm(oc.limits.at_most(oc.limits.relative(0.1), 0.2)),
    "zero": lambda: oc.rescale_by_norm(1.0, groups=STACKED, response=oc.responses.zero(), nonfinite="zero"),
    "soft": lambda: oc.rescale_by_norm(
        1.0, norm=oc.norms.linf(), response=oc.responses.soft("sqrt"), eps=1e-6
    ),
    "lp": lambda: oc.rescale_by_norm(1.0, groups=oc.groups.unit(), norm=oc.norms.lp(3)),
    "roles": lambda: oc.clip_by_groupwise_norm(
        0.5,
        oc.groups.regex({oc.groups.measured_only("x"): "head", oc.groups.scaled_only("x"): "bias", "x": ""}),
    ),
}
ADAPTIVE = {
    "autoclip": oc.autoclip,
    "quantile_clip": lambda: oc.quantile_clip(50.0, window=4),
    "zclip": lambda: oc.zclip(warmup=2, z=0.5, max_norm=None),
    "adagc": lambda: oc.adagc(warmup=1),
    "clip_by_historical_norm": lambda: oc.clip_by_historical_norm(1.0, window=4, warmup=2),
    "clip_by_adaptive_quantile": oc.clip_by_adaptive_quantile,
    "aggc": oc.aggc,
    "adanorm": oc.adanorm,
    "gradient_stabilizer": oc.gradient_stabilizer,
    "normalize_by_running_norm": lambda: oc.normalize_by_running_norm(groups=STACKED),
}
SOFT = {
    "automatic_clip": oc.automatic_clip,
    "psac_clip": oc.psac_clip,
    "delta_clip": oc.delta_clip,
    "smooth_clip": oc.smooth_clip,
}
ALL = METHODS | ENGINE | ADAPTIVE | SOFT


def step(tx, state, scale):
    updates, state = tx.update(jax.tree.map(lambda x: scale * x, GRADS), state, PARAMS)
    return state, updates


def loop(tx, scales):
    state, history = tx.init(PARAMS), []
    for scale in scales:
        state, updates = step(tx, state, scale)
        history.append(updates)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *history)


def scan(tx, scales):
    return jax.lax.scan(functools.partial(step, tx), tx.init(PARAMS), scales)


def vmap(tx, scales):
    both = jax.vmap(functools.partial(scan, tx))(jnp.stack([scales, 2 * scales]))
    return jax.tree.map(lambda x: x[0], both)


@functools.cache
def eager(method):
    return loop(ALL[method](), SCALES)


@pytest.mark.parametrize("run", [jax.jit(scan, static_argnums=0), vmap], ids=["jit and scan", "vmap"])
@pytest.mark.parametrize("method", ALL)
def test_every_mode_agrees_with_the_plain_loop(method, run):
    """Updates and state do not depend on how JAX runs the transformation."""
    chex.assert_trees_all_close(run(ALL[method](), SCALES), eager(method), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ALL)
def test_the_state_is_fixed_and_donated_and_compiled_once(method):
    """The structure is that of `init`, a second call compiles nothing, and all buffers may be given away."""
    tx = ALL[method]()
    # What is not read is given away too, as in a program that hands it on.
    update = jax.jit(
        lambda g, s, p, **extra: tx.update(g, s, p, **extra), donate_argnums=(0, 1), keep_unused=True
    )
    state = tx.init(PARAMS)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for k in range(2):
        grads = jax.tree.map(lambda x: jnp.array(x * (k + 1)), GRADS)  # noqa: B023
        updates, state = update(grads, state, PARAMS, value=jnp.array(1.0))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == expected
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, GRADS)
    assert update._cache_size() == 1
    abstract = jax.eval_shape(lambda: PARAMS)
    shapes = jax.eval_shape(tx.update, abstract, jax.eval_shape(tx.init, abstract), abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, (updates, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(abstract), state)


@pytest.mark.parametrize("method", ALL)
def test_tree_map_params_tells_the_state_from_parameters(method):
    """Optax's tools call `init` with a tree without leaves."""
    tx = ALL[method]()
    marked = optax.tree_utils.tree_map_params(
        tx, lambda _: "parameter", tx.init(PARAMS), transform_non_params=lambda _: "other"
    )
    assert set(jax.tree.leaves(marked)) == {"other"}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(method, "bfloat16") for method in METHODS]
    + [("clip_by_global_norm", "float16"), ("adaptive_grad_clip", "complex64")],
)
def test_schedules_by_inject_hyperparams_keep_dtypes(method, dtype):
    """A traced float32 limit neither promotes nor breaks leaves of another dtype."""
    grads = jax.tree.map(lambda x: x.astype(dtype), GRADS)
    factory = optax.inject_hyperparams(lambda c: METHODS[method](c))

    @jax.jit
    def run(grads):
        tx = factory(c=optax.linear_schedule(1.0, 0.5, 2))
        _, state = tx.update(grads, tx.init(grads), grads)
        return tx.update(grads, state, grads)

    updates, state = run(grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    assert float(jnp.real(state.hyperparams["c"])) == 0.75


@pytest.mark.parametrize("method", ["clip_by_global_norm", "adaptive_grad_clip", "clip_by_block_rms"])
def test_factories_themselves_can_be_injected(method):
    tx = optax.inject_hyperparams(getattr(oc, method))(0.5)
    updates, _ = tx.update(GRADS, tx.init(GRADS), PARAMS)
    expected, _ = METHODS[method]().update(GRADS, METHODS[method]().init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("factory", "numbers", "static"),
    [
        (oc.autoclip, {"percentile": 20.0}, ("window", "include_current")),
        (oc.zclip, {"z": 2.0, "decay": 0.9}, ("max_norm", "warmup", "mode", "learn_from_spikes")),
        (oc.adagc, {"slack": 1.1, "decay": 0.9}, ("warmup",)),
        (oc.aggc, {"low": 0.5, "most_up": 1.5}, ()),
        (oc.delta_clip, {"max_norm": 0.2, "delta": 0.1}, ()),
    ],
)
def test_numbers_of_adaptive_methods_can_be_injected(factory, numbers, static):
    """They become traced arrays, and the updates stay what they are."""
    static = (*static, "groups", "nonfinite", "axis_name")
    injected = optax.inject_hyperparams(factory, static_args=static)(**numbers)
    plain = factory(**numbers)
    updates, _ = jax.jit(injected.update)(GRADS, injected.init(GRADS), PARAMS)
    expected, _ = jax.jit(plain.update)(GRADS, plain.init(GRADS), PARAMS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_an_array_of_limits_can_be_injected():
    """One for each group, in their order; it is a hyperparameter, and a new one makes no new trace."""
    tx = optax.inject_hyperparams(oc.clip_by_layerwise_norm)(jnp.array([0.25, 2.0]))
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    before = oc.group_norms(GRADS, oc.groups.layer())
    for limits in ([0.25, 2.0], [9.0, 0.5]):
        state.hyperparams["max_norm"] = jnp.array(limits)
        updates, state = update(GRADS, state, PARAMS)
        after = oc.group_norms(updates, oc.groups.layer())
        assert list(after) == ["head", "layers"]
        expected = np.minimum(list(before.values()), limits)
        np.testing.assert_allclose(list(after.values()), expected, rtol=1e-6)
    assert update._cache_size() == 1
    assert oc.metrics(state, PARAMS, oc.groups.layer())["clip/limit/layers"] == 0.5


@pytest.mark.parametrize("method", ["clip_by_layerwise_norm", "autoclip", "automatic_clip"])
def test_a_transformation_may_stand_in_a_branch(method):
    """`lax.cond` wants the same structure, shapes and dtypes of a step that is taken and one that is not."""
    tx = ALL[method]()

    def clipped(grads, state):
        return tx.update(grads, state, PARAMS)

    def left_out(grads, state):
        return grads, state

    run = jax.jit(lambda take, state: jax.lax.cond(take, clipped, left_out, GRADS, state))
    state = tx.init(PARAMS)
    updates, same = run(False, state)
    chex.assert_trees_all_equal((updates, same), (GRADS, state))
    expected = tx.update(GRADS, state, PARAMS)
    chex.assert_trees_all_close(run(True, state), expected, rtol=1e-6)
    assert not np.array_equal(expected[0]["head"]["kernel"], GRADS["head"]["kernel"])


def wrappers(tx):
    """Everything that Optax can put around a transformation, each in a chain with an optimizer."""
    inner = optax.chain(tx, optax.sgd(0.1, momentum=0.9))
    labels = {"layers": "clipped", "head": "free"}
    return {
        "chain": inner,
        "named_chain": optax.named_chain(("clip", tx), ("sgd", optax.sgd(0.1))),
        "MultiSteps": optax.MultiSteps(inner, 2).gradient_transformation(),
        "masked": optax.masked(inner, {"layers": True, "head": False}),
        "partition": optax.partition({"clipped": inner, "free": optax.sgd(0.1)}, labels),
        "apply_if_finite": optax.apply_if_finite(inner, 3),
        "inject_hyperparams": optax.inject_hyperparams(lambda lr: optax.chain(tx, optax.sgd(lr)))(lr=0.1),
    }


@pytest.mark.parametrize("wrapper", wrappers(optax.identity()))
@pytest.mark.parametrize("method", ["clip_by_layerwise_norm", "adaptive_grad_clip"])
def test_methods_work_in_every_wrapper_and_metrics_find_them(method, wrapper):
    tx = wrappers(METHODS[method]())[wrapper]

    def body(state, scale):
        return step(tx, state, scale)

    with jax.numpy_dtype_promotion("standard"):  # Optax divides floats by integers
        state, updates = jax.jit(lambda state: jax.lax.scan(body, state, SCALES))(tx.init(PARAMS))
    chex.assert_tree_all_finite(updates)
    found = oc.metrics(state)
    assert list(found) == [
        f"clip/{statistic}/whole"
        for statistic in (
            "norm_before",
            "norm_after",
            "limit",
            "factor",
            "clipped_fraction",
            "nonfinite_count",
        )
    ]
    assert found["clip/norm_after/whole"] <= found["clip/norm_before/whole"]
    inside = jax.jit(oc.metrics)(state)
    chex.assert_trees_all_close(dict(inside), jax.tree.map(jnp.asarray, dict(found)), rtol=1e-6)


def test_masked_leaves_are_not_counted():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([100.0])}
    tx = optax.masked(oc.clip_by_global_norm(1.0), {"a": True, "b": False})
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=1e-6)
    chex.assert_trees_all_equal(updates["b"], grads["b"])


CLIPS = {
    name: (groups, jax.jit(lambda tree, c, groups=groups: oc.rescale_tree(tree, c, groups=groups)[0]))
    for name, groups in {
        "whole": oc.groups.whole(),
        "layer": oc.groups.layer(),
        "leaf": oc.groups.leaf(),
        "unit": oc.groups.unit(),
        "stacked": STACKED,
    }.items()
}


MEASURES = {
    name: jax.jit(lambda tree, groups=groups: oc.group_norms(tree, groups))
    for name, (groups, _) in CLIPS.items()
}


def norms(tree, name):
    return np.concatenate([np.ravel(x) for x in MEASURES[name](tree).values()])


@pytest.mark.parametrize("name", CLIPS)
@given(grads=trees.like(GRADS, bound=1e4), limit=trees.limits())
def test_no_group_exceeds_its_limit_and_those_within_are_untouched(name, grads, limit):
    """Whatever the values; and a second clip changes nothing but roundings."""
    _, clip = CLIPS[name]
    once = clip(grads, limit)
    before, after = norms(grads, name), norms(once, name)
    assert (after <= limit * (1 + 1e-5)).all()
    np.testing.assert_allclose(after, np.minimum(before, limit), rtol=1e-5, atol=1e-30)
    if (before <= limit).all():
        chex.assert_trees_all_equal(once, grads)
    chex.assert_trees_all_close(clip(once, limit), once, rtol=1e-5)


@given(grads=trees.like(GRADS, bound=1e4), limit=trees.limits(), scale=trees.powers_of_two())
def test_clipping_scales_with_its_input_and_limit(grads, limit, scale):
    """Powers of two round nothing, so nothing may change."""
    _, clip = CLIPS["layer"]
    scaled = clip(jax.tree.map(lambda x: x * scale, grads), limit * scale)
    chex.assert_trees_all_close(
        scaled, jax.tree.map(lambda x: x * scale, clip(grads, limit)), rtol=1e-6, atol=1e-25
    )


@given(grads=trees.like(GRADS, special=True))
def test_non_finite_entries_stay_within_their_group(grads):
    """A group with one becomes NaN; every other group comes out finite."""
    out = CLIPS["layer"][1](grads, np.float32(1))
    for layer, leaves in grads.items():
        finite = all(np.isfinite(x).all() for x in jax.tree.leaves(leaves))
        result = np.concatenate([np.ravel(x) for x in jax.tree.leaves(out[layer])])
        assert np.isfinite(result).all() if finite else np.isnan(result).all()
