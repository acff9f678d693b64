"""Steps that are dropped: what comes out, what the optimizer inside keeps, and which steps they are."""

import functools
import re

import chex
import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from versions import enable_x64

import optaxclip as oc

PARAMS = {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "c": {"w": jnp.ones((3, 2))}}
GRADS = {
    "a": {"w": jnp.arange(1.0, 7.0).reshape(2, 3) / 10, "b": jnp.full(3, 0.2)},
    "c": {"w": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)},
}
NORM = float(np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(GRADS))))
SPIKES, RISE = (150, 170, 200), 100  # behind the warm-up
BAD = [jnp.nan, jnp.inf, -jnp.inf, 100.0]


def values_of(seed):
    """Numbers for each step, as norms or losses."""
    return golden.norms(seed, spread=0.2, spikes=SPIKES, rise=RISE)


def olmo(values, window=128, warmup=64, k=6.0, floor=1e-6):
    """Which steps are dropped, by the last finite and positive values before each, in float64."""
    history, dropped, limits = [], [], []
    for value in np.float64(values):
        last, limit = history[-window:], np.inf
        if len(last) >= warmup:
            limit = np.mean(last) + k * max(np.std(last, ddof=1), floor)
        limits.append(limit)
        dropped.append(not np.isfinite(value) or bool(value > limit))
        if np.isfinite(value) and value > 0:
            history.append(value)
    return np.array(dropped), np.array(limits)


SGD, ADAM = golden.free(optax.sgd(1.0)), golden.free(optax.adam(0.1))


def scaled(factor, tree=GRADS):
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def step(tx, state, scale_and_loss):
    """One step: the first layer is scaled by one number, the second by another."""
    first, second, loss = scale_and_loss
    grads = {"a": scaled(first, GRADS["a"]), "c": scaled(second, GRADS["c"])}
    updates, state = tx.update(grads, state, PARAMS, value=loss)
    return state, (updates, state)


@functools.partial(jax.jit, static_argnums=0)
def scan(tx, rows):
    return jax.lax.scan(functools.partial(step, tx), tx.init(PARAMS), rows)


def loop(tx, rows):
    state, seen = tx.init(PARAMS), []
    for row in np.stack(rows, axis=1):
        state, out = step(tx, state, tuple(jnp.asarray(x) for x in row))
        seen.append(out)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *seen)


def rows(first, second=None, loss=None):
    """The arguments of a run, float32: by default the layers share a scale and the loss is 1."""
    first = np.asarray(first, np.float32)
    second = first if second is None else np.asarray(second, np.float32)
    return first, second, np.ones_like(first) if loss is None else np.asarray(loss, np.float32)


def fates(state):
    return np.diff(np.asarray(state.total), prepend=0).astype(bool)


def test_what_is_dropped_follows_the_rule_of_olmo():
    """240 steps with noise, spikes, a NaN, an infinity, a zero and a rise, against NumPy in float64."""
    values = values_of(0)
    _, (updates, state) = scan(oc.skip_updates(SGD), rows(values))
    dropped, limits = olmo(values * NORM)
    np.testing.assert_array_equal(fates(state), dropped)
    np.testing.assert_array_equal(state.last, dropped)
    np.testing.assert_allclose(state.limit[:, 0], limits, rtol=2e-5)
    np.testing.assert_allclose(state.norm[:, 0], values * NORM, rtol=1e-5)
    for got, grad in zip(jax.tree.leaves(updates), jax.tree.leaves(GRADS), strict=True):
        expected = np.where(dropped, 0, values).reshape(-1, 1, 1) * -np.asarray(grad)[None].reshape(1, -1, 1)
        np.testing.assert_allclose(got.reshape(golden.STEPS, -1, 1), expected, rtol=1e-6)
    assert dropped[list(SPIKES)].all()
    assert dropped[RISE]
    assert not dropped[-20:].any(), "a lasting rise becomes the rule"


def test_a_nan_costs_one_step():
    """OLMo's rule drops all until the NaN has left the window; an infinity is no different here."""
    values = values_of(1)
    values[[*SPIKES, golden.ZERO]] = 1.0
    values[RISE:] /= 10
    _, (_, state) = scan(oc.skip_updates(SGD), rows(values))
    assert np.flatnonzero(fates(state)).tolist() == [golden.NAN, golden.INF]


@pytest.mark.parametrize("watch", ["loss", "both"])
def test_a_loss_is_held_against_the_same_rule(watch):
    losses, norms = values_of(2), np.roll(values_of(3), 7)
    if watch == "loss":
        norms = np.where(np.isfinite(norms), norms, 1)
    _, (_, state) = scan(oc.skip_updates(SGD, watch=watch), rows(norms, loss=losses))
    by_loss, limits = olmo(losses)
    by_norm, _ = olmo(norms * NORM)
    expected = by_loss | by_norm if watch == "both" else by_loss
    np.testing.assert_array_equal(fates(state), expected)
    np.testing.assert_allclose(state.loss_limit, limits, rtol=2e-5)
    np.testing.assert_array_equal(state.loss, losses)
    assert int(state.loss_skipped[-1]) == by_loss.sum()
    assert int(state.skipped[-1, 0]) == (by_norm.sum() if watch == "both" else 0)


LIMITS = {
    "default": None,
    "number": 5.0,
    "ema": oc.limits.ema(2.0),
    "zscore": oc.limits.zscore(warmup=8),
    "quantile": oc.limits.quantile(initial=2.0),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_loss_that_is_not_positive_never_drops_a_step(limit):
    """Whatever the limit, and nothing is learned from it."""
    losses = np.tile(np.float32([1.0, 1.1, 0.9, 1.05]), 30)
    losses[80:100:2] = [0.0, -1.0, -1e30, -0.5, -3.0, 0.0, -1e-30, -2.0, -7.0, -0.1]
    tx = oc.skip_updates(SGD, LIMITS[limit], watch="loss")
    _, (_, state) = scan(tx, rows(np.ones(120), loss=losses))
    assert not fates(state)[losses <= 0].any()
    _, (_, without) = scan(tx, rows(np.ones(120), loss=np.where(losses > 0, losses, np.nan)))
    chex.assert_trees_all_equal(state.loss_rule, without.loss_rule)
    assert fates(without)[losses <= 0].all()


def test_a_number_drops_what_is_above_it_and_keeps_what_is_equal():
    """A norm at its limit, a zero norm and a limit of 0 on zeros pass; a limit of NaN lets nothing pass."""
    limits = jnp.array([5.0, 5.0, 5.0, 0.0, 0.0, -1.0, jnp.nan])
    tx = oc.skip_updates(SGD, lambda step: limits[step], norm=oc.norms.linf())
    _, (_, state) = scan(tx, rows([5.0, 5.0001, 0.0, 0.0, 1e-3, 0.0, 1.0]))
    np.testing.assert_array_equal(state.limit[:, 0], jnp.maximum(limits, 0))
    assert state.last.tolist() == [False, True, False, False, True, False, True]


@pytest.mark.parametrize("inner", ["adam", "adamw behind a clip", "momentum, injected"])
def test_a_dropped_step_leaves_the_optimizer_bit_by_bit_as_it_was(inner):
    """After NaN, infinity or a spike Adam's mean, mean square and count are those of a run without it."""
    make = {
        "adam": lambda: ADAM,
        "adamw behind a clip": lambda: optax.chain(
            oc.clip_by_global_norm(1.0), golden.free(optax.adamw(0.1))
        ),
        "momentum, injected": lambda: golden.free(optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9)),
    }[inner]()
    tx = oc.skip_updates(make, 10.0)
    update = jax.jit(tx.update)
    before = tx.init(PARAMS)
    _, before = update(scaled(1.0), before, PARAMS)
    assert any(jnp.any(x != 0) for x in jax.tree.leaves(before.inner))
    expected, _ = update(scaled(0.5), before, PARAMS)
    state = before
    for bad in BAD:
        updates, state = update(scaled(bad), state, PARAMS)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, GRADS))
        chex.assert_trees_all_equal(state.inner, before.inner)
    updates, state = update(scaled(0.5), state, PARAMS)
    chex.assert_trees_all_equal(updates, expected)
    assert int(state.total) == int(state.skipped[0]) == len(BAD)
    assert int(state.step) == len(BAD) + 2


def test_norms_are_those_before_the_clip_inside():
    """A clip at 1 in the optimizer does not hide a spike of 100 from the rule."""
    tx = oc.skip_updates(optax.chain(oc.clip_by_global_norm(1.0), SGD), 10.0)
    _, (_, state) = scan(tx, rows([1.0, 100.0]))
    np.testing.assert_allclose(state.norm[:, 0], [NORM, 100 * NORM], rtol=1e-6)
    assert state.last.tolist() == [False, True]


def test_an_infinite_limit_equals_apply_if_finite():
    """Updates and inner state are Optax's, for NaN and infinities among ordinary steps."""
    scales = rows([1.0, np.nan, 0.5, np.inf, -np.inf, 2.0], [1.0, 1.0, 0.5, 1.0, np.nan, 2.0])
    theirs = golden.free(optax.apply_if_finite(ADAM, 10))
    state, (updates, _) = scan(oc.skip_updates(ADAM, jnp.inf), scales)
    expected_state, (expected, _) = scan(theirs, scales)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-6)  # compiled apart, rounded apart
    close(updates, expected)
    close(state.inner, expected_state.inner_state)
    assert int(state.total) == int(expected_state.total_notfinite) == 3


def layer_alone(scales, key):
    """Adam on one layer, with the numbers of the whole run."""

    def step(state, scale):
        updates, state = ADAM.update(scaled(scale, GRADS[key]), state)
        return state, updates

    return jax.lax.scan(step, ADAM.init(PARAMS[key]), scales)


def test_each_quarantines_the_layer_at_fault():
    """The other layer's run is that of the layer alone; the layer's own mean and square do not move."""
    first = np.float32([1.0, np.nan, 100.0, np.inf, 0.5])
    second = np.float32([1.0, 0.7, 0.2, 1.0, 0.3])
    tx = oc.skip_updates(ADAM, 10.0, groups=oc.groups.layer(), each=True)
    state, (updates, states) = scan(tx, rows(first, second))
    alone, expected = layer_alone(second, "c")
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-6)  # compiled apart, rounded apart
    close(updates["c"], expected)
    adam = state.inner[0]
    close((adam.mu["c"], adam.nu["c"]), (alone[0].mu, alone[0].nu))
    assert int(adam.count) == 5
    own, _ = layer_alone(np.float32([1.0, 0.5]), "a")
    close((adam.mu["a"], adam.nu["a"]), (own[0].mu, own[0].nu))
    for kept in (states.inner[0].mu["a"]["w"], states.inner[0].nu["a"]["w"]):
        np.testing.assert_array_equal(kept[1:4], np.stack([kept[0]] * 3))
    np.testing.assert_array_equal(updates["a"]["w"][1:4], np.zeros((3, 2, 3)))
    assert state.skipped.tolist() == [3, 0]
    assert int(state.total) == 3
    assert states.last.tolist() == [False, True, True, True, False]


def test_each_drops_the_whole_step_if_all_groups_or_the_loss_are_at_fault():
    """Then the count stands still too, as it does without `each`."""
    tx = oc.skip_updates(ADAM, 10.0, groups=oc.groups.layer(), each=True, watch="both")
    scales = rows([1.0, np.nan, 1.0, 0.5], [1.0, 100.0, 1.0, 0.5], [1.0, 1.0, np.nan, 1.0])
    state, (updates, _) = scan(tx, scales)
    expected, (short, _) = scan(oc.skip_updates(ADAM, 10.0), rows([1.0, np.nan, np.nan, 0.5]))
    chex.assert_trees_all_close(state.inner, expected.inner, rtol=1e-6)
    chex.assert_trees_all_close(updates, short, rtol=1e-6)
    assert int(state.inner[0].count) == 2
    assert (int(state.total), int(state.loss_skipped), state.skipped.tolist()) == (2, 1, [1, 1])


def test_a_group_that_is_dropped_is_not_felt_by_a_global_clip_inside():
    """The clip inside sees zeros in place of a NaN or a spike."""
    inner = optax.chain(oc.clip_by_global_norm(0.5), SGD)
    tx = oc.skip_updates(inner, 10.0, groups=oc.groups.layer(), each=True)
    _, (updates, _) = scan(tx, rows([np.nan, 1e3], [1.0, 1.0]))
    entries = np.asarray(GRADS["c"]["w"], np.float64)
    expected = -entries * 0.5 / np.linalg.norm(entries)
    np.testing.assert_allclose(updates["c"]["w"], np.stack([expected] * 2), rtol=1e-6)


def test_each_holds_back_the_rows_of_stacked_layers():
    """Of three layers in one array the second is dropped, in the update and in Adam's state."""
    params = {"layers": jnp.ones((3, 4)), "head": jnp.ones(2)}
    grads = {"layers": jnp.full((3, 4), 0.1).at[1, 2].set(jnp.nan), "head": jnp.full(2, 0.1)}
    groups = oc.groups.stacked(oc.groups.leaf(), "layers")
    tx = oc.skip_updates(ADAM, 10.0, groups=groups, each=True)
    updates, state = jax.jit(tx.update)(grads, tx.init(params))
    plain, adam = jax.jit(ADAM.update)(jax.tree.map(jnp.nan_to_num, grads), ADAM.init(params))
    kept = np.array([True, False, True])[:, None]
    np.testing.assert_allclose(updates["layers"], np.where(kept, plain["layers"], 0), rtol=1e-6)
    np.testing.assert_allclose(updates["head"], plain["head"], rtol=1e-6)
    np.testing.assert_allclose(
        state.inner[0].nu["layers"], np.where(kept, adam[0].nu["layers"], 0), rtol=1e-6
    )
    assert state.skipped.tolist() == [0, 0, 1, 0]


def test_what_is_kept_in_another_shape_advances_until_all_rows_of_a_leaf_are_dropped():
    """Adafactor's row means see zeros for one unit at fault, and stay if all units are."""
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(2)}
    tx = oc.skip_updates(golden.free(optax.scale_by_factored_rms(min_dim_size_to_factor=2)), 10.0,
                      groups=oc.groups.unit(), each=True)  # fmt: skip
    update = jax.jit(tx.update)
    _, before = update(params, tx.init(params), params)
    updates, one = update(params | {"w": params["w"].at[0, 1].set(jnp.nan)}, before, params)
    assert np.isfinite(updates["w"]).all()
    np.testing.assert_array_equal(np.asarray(updates["w"] != 0), np.tile([True, False, True], (4, 1)))
    assert (one.inner.v_row["w"] != before.inner.v_row["w"]).tolist() == [False, True, False]
    _, whole = update(params | {"w": jnp.full((4, 3), jnp.inf)}, before, params)
    np.testing.assert_array_equal(whole.inner.v_row["w"], before.inner.v_row["w"])
    np.testing.assert_array_equal(whole.inner.v_col["w"], before.inner.v_col["w"])
    assert int(whole.inner.count) == 2


INNER = {
    "adafactor": lambda: optax.adafactor(0.1),
    "sm3": lambda: optax.sm3(0.1),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(0.1),
    "partition": lambda: optax.partition(
        {"x": optax.adam(0.1), "y": optax.sgd(0.1, momentum=0.9)}, {"a": "x", "c": "y"}
    ),
    "every two steps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "noise with a key": lambda: optax.add_noise(0.1, 0.5, jax.random.key(0)),
}


@pytest.mark.parametrize(("inner", "each"), [(name, True) for name in INNER] + [("noise with a key", False)])
def test_any_optimizer_can_be_inside(inner, each):
    """What is kept for the layer at fault stays, whatever the optimizer; without `each` all of it does."""
    tx = oc.skip_updates(golden.free(INNER[inner]()), 10.0, groups=oc.groups.layer(), each=each)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    _, first = update(GRADS, state, PARAMS)
    updates, second = update({"a": scaled(jnp.nan, GRADS["a"]), "c": GRADS["c"]}, first, PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    chex.assert_trees_all_equal(updates["a"], zeros["a"])
    own = jax.tree_util.tree_flatten_with_path(first.inner)[0]
    own = [(path, x) for path, x in own if jax.tree_util.DictKey("a") in path or not each]
    kept = dict(jax.tree_util.tree_flatten_with_path(second.inner)[0])
    assert own or inner == "noise with a key"
    for path, x in own:
        x, y = (jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v
                for v in (x, kept[path]))  # fmt: skip
        np.testing.assert_array_equal(x, y)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, second)
    if not each:
        chex.assert_trees_all_equal(updates, zeros)
    elif inner != "every two steps":
        assert jnp.any(updates["c"]["w"] != 0)


def test_every_mode_agrees_with_the_plain_loop():
    """Updates and state do not depend on how JAX runs the wrapper."""
    limit = oc.limits.mean_std(3.0, 8, warmup=4)
    tx = oc.skip_updates(SGD, limit, watch="both", groups=oc.groups.layer(), each=True)
    first = [1.0, 1.1, 0.9, np.nan, 1.0, 50.0, 1.0, 1.0]
    args = rows(first, [1.0, 0.9, 1.1, 1.0, 1.0, 1.0, 70.0, 1.0], [1, 2, 1, 2, 1, 2, 1, np.inf])
    expected = loop(tx, args)
    assert expected[1][1].last.tolist() == [False, False, False, True, False, True, True, True]
    chex.assert_trees_all_close(scan(tx, args), expected, rtol=1e-5, atol=1e-7)
    rolled = tuple(np.roll(x, 1) for x in args)
    both = jax.vmap(lambda *x: scan(tx, x))(*(np.stack(pair) for pair in zip(args, rolled, strict=True)))
    for k, one in enumerate((args, rolled)):
        alone = scan(tx, one)
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[k], both), alone, rtol=1e-5, atol=1e-7)  # noqa: B023


def test_multi_steps_drops_the_mean_with_a_nan_in_it():
    """Behind `MultiSteps` the wrapper sees one mean in two steps, and the loss passed with its last."""
    tx = golden.free(optax.MultiSteps(oc.skip_updates(ADAM, 10.0, watch="both"), 2))
    _, (updates, state) = scan(tx, rows([1.0, 1.0, np.nan, 1.0, 1.0, 1.0], loss=[1, 1, 1, 1, 1, 99]))
    moved = [bool(jnp.any(u != 0)) for u in updates["c"]["w"]]
    assert moved == [False, True, False, False, False, False]
    assert state.inner_opt_state.total[-1] == 2


def test_a_limit_can_be_injected_and_scheduled():
    """`inject_hyperparams` passes the limit as an array; the step counts dropped steps too."""

    def limit(step):
        return jnp.where(step < 2, 3.0, 6.0)

    injected = golden.free(optax.inject_hyperparams(oc.skip_updates)(inner=SGD, limit=limit))
    scales = rows(np.array([1.0, 5.0, 5.0, 7.0]) / NORM)
    for tx in (injected, oc.skip_updates(SGD, limit)):
        _, (updates, _) = scan(tx, scales)
        assert [bool(jnp.any(u != 0)) for u in updates["c"]["w"]] == [True, False, True, False]


def test_masked_leaves_are_neither_measured_nor_dropped():
    mask = {"a": True, "c": False}
    tx = optax.masked(oc.skip_updates(SGD, 10.0, groups=oc.groups.layer()), mask)
    _, (updates, state) = scan(tx, rows([1.0, np.nan], [100.0, 100.0]))
    np.testing.assert_array_equal(updates["a"]["b"][1], np.zeros(3))
    np.testing.assert_array_equal(updates["c"]["w"], np.stack([100 * GRADS["c"]["w"]] * 2))
    assert state.inner_state.norm.shape == (2, 1)


def test_a_limit_relative_to_parameters_holds_each_group_by_its_own():
    limits = oc.limits.relative(0.5)
    tx = oc.skip_updates(SGD, limits, groups=oc.groups.layer(), each=True)
    _, (updates, state) = scan(tx, rows([0.1, 10.0], [0.1, 0.1]))
    norms = [np.linalg.norm(np.ones(9)), np.linalg.norm(np.ones(6))]
    np.testing.assert_allclose(state.limit, 0.5 * np.array([norms] * 2), rtol=1e-6)
    assert state.skipped[-1].tolist() == [1, 0]
    assert not jnp.any(updates["a"]["w"][1])


@pytest.mark.parametrize("each", [False, True])
def test_leaves_that_are_not_floating_pass_and_dtypes_are_kept(each):
    """Also in a dropped step: integers, keys, empty arrays, None, and what Flax stores."""
    grads = {
        "half": jnp.full(3, jnp.nan, jnp.float16),
        "brain": jnp.ones(2, jnp.bfloat16),
        "complex": jnp.ones(2, jnp.complex64),
        "int": jnp.arange(3),
        "key": jax.random.key(1),
        "empty": jnp.zeros((0, 2)),
        "none": None,
        "_overwrite_with_gradient": {"scale": jnp.ones(2)},
    }
    tx = oc.skip_updates(optax.identity(), 10.0, groups=oc.groups.leaf(), each=each)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    for name in ("int", "key", "empty", "none", "_overwrite_with_gradient"):
        same = jax.tree.map(lambda x, y: bool(jnp.all(x == y)), updates[name], grads[name])
        assert all(jax.tree.leaves(same))
    assert not jnp.any(updates["half"])
    assert bool(jnp.any(updates["brain"])) == each
    assert int(state.total) == 1


@pytest.mark.parametrize("bad", [jnp.nan, 1e3])
def test_the_derivative_through_a_dropped_step_is_zero(bad):
    """Not NaN, though Adam's square root has no derivative at zero."""
    tx = oc.skip_updates(ADAM, 10.0)

    def moved(scale):
        updates, _ = tx.update(scaled(scale), tx.init(PARAMS))
        return sum(jnp.sum(x) for x in jax.tree.leaves(updates))

    assert float(jax.jit(jax.grad(moved))(jnp.float32(bad))) == 0
    assert float(jax.jit(jax.jacfwd(moved))(jnp.float32(bad))) == 0


def test_the_optimizer_inside_is_shown_nothing_that_is_not_finite():
    seen = []

    def look(updates, params=None):
        jax.debug.callback(lambda *x: seen.extend(x), *jax.tree.leaves(updates))
        return updates

    for options in ({}, {"groups": oc.groups.leaf(), "each": True}):
        tx = oc.skip_updates(optax.stateless(look), 10.0, **options)
        jax.block_until_ready(jax.jit(tx.update)(scaled(jnp.nan), tx.init(PARAMS)))
    jax.effects_barrier()
    assert len(seen) == 6
    assert all(np.isfinite(x).all() for x in seen)


def test_the_state_is_fixed_and_donated_and_compiled_once():
    """The structure is that of `init`, a second call compiles nothing, and all buffers may be given away."""
    for options in ({}, {"groups": oc.groups.leaf(), "each": True, "watch": "both"}):
        tx = oc.skip_updates(ADAM, **options)
        update = jax.jit(lambda g, s, p, **extra: tx.update(g, s, p, **extra), donate_argnums=(0, 1))  # noqa: B023
        state = tx.init(PARAMS)
        for scale in (1.0, jnp.nan):
            before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
            _, state = update(scaled(scale), state, PARAMS, value=jnp.float32(1))
            assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
        assert update._cache_size() == 1
        chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(jax.eval_shape(lambda: PARAMS)), state)


def test_tree_map_params_finds_the_parameters_in_the_optimizer_inside():
    """Adam's two copies are found, and nothing else."""
    tx = oc.skip_updates(ADAM, groups=oc.groups.layer(), each=True)
    marked = optax.tree_utils.tree_map_params(
        tx, lambda _: "parameter", tx.init(PARAMS), transform_non_params=lambda _: "other"
    )
    assert isinstance(marked, oc.SkipState)
    assert jax.tree.leaves(marked).count("parameter") == 2 * 3
    assert set(jax.tree.leaves(marked.inner[0].mu)) == {"parameter"}


@pytest.mark.parametrize("each", [False, True])
def test_an_empty_tree_passes(each):
    tx = oc.skip_updates(ADAM, watch="both", each=each)
    updates, state = tx.update({}, tx.init({}), {}, value=jnp.float32(jnp.nan))
    assert updates == {}
    assert (int(state.total), int(state.step), int(state.inner[0].count)) == (1, 1, 0)
    _, state = tx.update({}, state, {}, value=jnp.float32(1))
    assert (int(state.total), int(state.inner[0].count)) == (1, 1)


def test_float64_norms_beyond_float32_are_kept_finite_in_the_state():
    with enable_x64(True):
        tx = oc.skip_updates(SGD, 1e200)
        grads = {"w": jnp.full(1, 1e100, jnp.float64)}
        updates, state = jax.jit(tx.update)(grads, tx.init(grads))
        assert updates["w"].dtype == jnp.float64
        assert float(updates["w"][0]) == -1e100
        assert state.norm.dtype == jnp.float32
        assert np.isfinite(state.norm).all()
        assert not state.last


@pytest.mark.skipif(jax.device_count("cpu") < 8, reason="needs eight CPU devices")
def test_inside_shard_map_all_devices_decide_alike():
    """With `axis_name` the result on split leaves is that of one device."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    grads = {"w": jnp.arange(8.0), "b": jnp.ones(3)}
    spec = {"w": P("x"), "b": P()}
    bad = {"w": grads["w"].at[6].set(jnp.nan), "b": grads["b"]}

    def run(each, axis_name):
        options = {"each": each, "groups": oc.groups.leaf(), "axis_name": axis_name}
        tx = oc.skip_updates(golden.free(optax.sgd(0.1, momentum=0.9)), 13.0, **options)

        def four(grads, bad, state):
            for g in (grads, bad, scaled(2.0, grads), grads):
                updates, state = tx.update(g, state)
            return updates, state

        return tx, four

    for each in (False, True):
        tx, four = run(each, "x")
        specs = optax.tree_utils.tree_map_params(
            tx, lambda _, s: s, tx.init(grads), spec, transform_non_params=lambda _: P()
        )
        split = jax.shard_map(four, mesh=mesh, in_specs=(spec, spec, specs), out_specs=(spec, specs))
        one, alone = run(each, None)
        got = jax.jit(split)(grads, bad, tx.init(grads))
        chex.assert_trees_all_close(got, jax.jit(alone)(grads, bad, one.init(grads)), rtol=1e-5)
        assert got[1].skipped.tolist() == [0, 2]


ERRORS = [
    (
        lambda: oc.skip_updates(SGD, -1.0),
        ValueError,
        "skip_updates: limit is -1.0, not among the numbers from 0",
    ),
    (lambda: oc.skip_updates(SGD, "1"), TypeError, "skip_updates: limit is '1', of type str."),
    (
        lambda: oc.skip_updates(SGD, watch="norms"),
        ValueError,
        "skip_updates: watch is 'norms'. Pass one of 'norm', 'loss', 'both'.",
    ),
    (
        lambda: oc.skip_updates(SGD, each=1),
        TypeError,
        "skip_updates: each is 1, of type int. Pass True or False.",
    ),
    (
        lambda: oc.skip_updates(SGD, groups=oc.groups.layer),
        TypeError,
        "skip_updates: groups is of type function",
    ),
    (
        lambda: oc.skip_updates(1.0),
        TypeError,
        "skip_updates: inner is of type float. Pass a transformation of Optax.",
    ),
    (
        lambda: oc.skip_updates(optax.MultiSteps(SGD, 2)),
        TypeError,
        "skip_updates: inner is of type MultiSteps. Pass a transformation of Optax. Call its gradient_tran",
    ),
    (
        lambda: oc.skip_updates(SGD, oc.limits.relative(0.1), watch="both"),
        ValueError,
        "skip_updates: the limit is relative to parameters and a loss has none. Watch the norm.",
    ),
    (
        lambda: oc.skip_updates(SGD, watch="loss").update(
            GRADS, oc.skip_updates(SGD, watch="loss").init(GRADS)
        ),
        ValueError,
        "skip_updates: the loss is watched and missing. Pass it to update as value=.",
    ),
    (
        lambda: oc.skip_updates(SGD, watch="both").update(
            GRADS, oc.skip_updates(SGD, watch="both").init(GRADS), value=jnp.ones(3)
        ),
        ValueError,
        "skip_updates: value has shape (3,). Pass the loss as a scalar.",
    ),
    (
        lambda: oc.skip_updates(SGD, groups=oc.groups.layer()).update(
            {"a": GRADS["a"]}, oc.skip_updates(SGD, groups=oc.groups.layer()).init(GRADS)
        ),
        ValueError,
        "skip_updates: the tree has 1 rows of groups, 'a'; `init` saw 2. Pass updates with the structure",
    ),
    (
        lambda: oc.skip_updates(SGD, jnp.ones(3)).update(
            GRADS, oc.skip_updates(SGD, jnp.ones(3)).init(GRADS)
        ),
        ValueError,
        "skip_updates: limit has shape (3,) for 1 rows of groups, 'whole'. Pass one number, or one for each",
    ),
    (
        lambda: oc.skip_updates(SGD, oc.limits.relative(0.1)).update(
            GRADS, oc.skip_updates(SGD, oc.limits.relative(0.1)).init(GRADS)
        ),
        ValueError,
        "skip_updates: You are using a transformation that requires the current value of parameters",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_what_is_wrong_is_named(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()
