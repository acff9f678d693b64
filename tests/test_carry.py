"""Error feedback: what a clip cuts off comes out later."""

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

PARAMS = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}


def entries(seed):
    """Updates of seven entries with noise, three spikes, a NaN, an infinity and a step of zeros."""
    steps = np.random.default_rng(seed).normal(0.1, 1.0, size=(golden.STEPS, 7))
    steps[list(golden.SPIKES)] *= [[3.0], [10.0], [30.0]]
    steps[golden.NAN, 2], steps[golden.INF, 5], steps[golden.ZERO] = np.nan, np.inf, 0.0
    return steps.astype(np.float32)


def clip_value(x, limit):
    return np.clip(x, -limit, limit)


def clip_norm(x, limit):
    norm = np.linalg.norm(x) if np.isfinite(x).all() else np.nan  # the whole update becomes NaN
    return x * (limit / norm) if not norm <= limit else x


def u_clip(steps, clip, bound=np.inf):
    """The equations in float64: outputs, buffers, and how much the bound took. Bad steps skip the buffer."""
    buffer, lost, outputs, buffers = np.zeros(7), 0.0, [], []
    for g in np.float64(steps):
        if np.isfinite(g).all():
            u = clip(g + buffer)
            buffer = g + buffer - u
            norm = np.linalg.norm(buffer)
            if norm > bound:
                buffer, lost = buffer * (bound / norm), lost + norm - bound
        else:
            u = clip(g)
        outputs.append(u)
        buffers.append(buffer)
    return np.array(outputs), np.array(buffers), lost


def tree(row):
    return {"a": row[:3], "b": row[3:].reshape(2, 2)}


def flat(trees):
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(trees)], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def scan(tx, steps):
    def step(state, row):
        updates, state = tx.update(tree(row), state, PARAMS)
        return state, (updates, state)

    return jax.lax.scan(step, tx.init(PARAMS), steps)


CLIPS = {
    "value": (oc.clip_by_value(0.8), lambda x: clip_value(x, 0.8)),
    "norm": (oc.clip_by_global_norm(2.5), lambda x: clip_norm(x, 2.5)),
}


@pytest.mark.parametrize("bound", [None, 4.0])
@pytest.mark.parametrize("clip", CLIPS)
def test_golden_sequences_agree_with_the_equations(clip, bound):
    """240 steps with noise, spikes, a NaN, an infinity and zeros, against NumPy in float64."""
    ours, theirs = CLIPS[clip]
    steps = entries(0)
    state, (updates, states) = scan(oc.carry_clipped(ours, bound=bound), steps)
    outputs, buffers, lost = u_clip(steps, theirs, np.inf if bound is None else bound)
    np.testing.assert_allclose(flat(updates), outputs, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(flat(states.buffer), buffers, rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(states.norm, np.linalg.norm(buffers, axis=1), rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(state.lost, lost, rtol=1e-4)
    assert (lost > 1) == (bound is not None)
    if bound is not None:
        assert np.linalg.norm(np.float64(flat(states.buffer)), axis=1).max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("clip", CLIPS)
def test_what_came_out_and_the_buffer_add_up_to_what_came_in(clip):
    """Without a bound nothing is lost, at every step."""
    steps = entries(1)
    steps[[golden.NAN, golden.INF]] = 1.0
    _, (updates, states) = scan(oc.carry_clipped(CLIPS[clip][0]), steps)
    out = np.cumsum(np.float64(flat(updates)), axis=0) + flat(states.buffer)
    np.testing.assert_allclose(out, np.cumsum(np.float64(steps), axis=0), atol=2e-4)
    assert np.abs(flat(states.buffer)).max() > 1


def test_the_mean_of_skewed_updates_is_kept():
    """Clipping skewed entries to 0.5 takes part of their mean; with the carry, nothing."""
    rng = np.random.default_rng(0)
    steps = (0.1 + 0.4 * (rng.pareto(3.0, size=(20000, 7)) - 0.5)).astype(np.float32)
    clipped = np.clip(steps, -0.5, 0.5).mean(axis=0)
    assert (steps.mean(axis=0) - clipped > 0.02).all()
    state, (updates, _) = scan(oc.carry_clipped(oc.clip_by_value(0.5)), steps)
    out = flat(updates)
    assert np.abs(out).max() <= 0.5
    np.testing.assert_allclose(
        out.mean(axis=0, dtype=np.float64), steps.mean(axis=0, dtype=np.float64), atol=2e-3
    )
    assert float(state.norm) < 40


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_leaves_the_buffer_bit_by_bit_as_it_was(bad):
    """Steps after it are those of a run without it; the finite leaf beside it is not paid out twice."""
    steps = np.full((6, 7), 3.0, np.float32)
    with_bad = np.insert(steps, [2, 4, 4], 3.0, axis=0)
    with_bad[[2, 5, 6], 0] = bad
    groups = {"groups": oc.groups.leaf(), "nonfinite": "zero"}
    tx = oc.carry_clipped(oc.rescale_by_norm(1.0, **groups))
    state, (updates, states) = scan(tx, with_bad)
    expected, (plain, _) = scan(tx, np.concatenate([steps, np.zeros_like(steps[:3])]))
    good = np.array([0, 1, 3, 4, 7, 8])
    np.testing.assert_allclose(flat(updates)[good], flat(plain)[:6], rtol=1e-6)
    buffers = flat(states.buffer)
    np.testing.assert_array_equal(buffers[2], buffers[1])
    np.testing.assert_array_equal(buffers[[5, 6]], buffers[[4, 4]])
    np.testing.assert_array_equal(states.norm[jnp.array([2, 5, 6])], states.norm[jnp.array([1, 4, 4])])
    assert not flat(updates)[[2, 5, 6], :3].any()
    assert int(state.step) == int(expected.step) == 9
    assert np.isfinite(buffers).all()


def test_an_output_that_is_not_finite_leaves_the_buffer_too():
    """What the clip inside makes of a finite update is passed on as it is."""
    spoil = optax.stateless(
        lambda updates, _: jax.tree.map(lambda x: jnp.where(x > 9, jnp.nan, 0.5 * x), updates)
    )
    _, (updates, states) = scan(oc.carry_clipped(spoil), np.float32([[1] * 7, [1] * 6 + [10], [1] * 7]))
    buffers = flat(states.buffer)
    np.testing.assert_array_equal(buffers, [[0.5] * 7, [0.5] * 7, [0.75] * 7])
    np.testing.assert_array_equal(flat(updates)[:, 0], [0.5, 0.75, 0.75])
    assert np.isnan(flat(updates)[1, 6])


def test_a_sum_beyond_the_range_of_float32_leaves_the_buffer_too():
    """The clip gets the update alone, which is finite: no NaN comes of two finite numbers."""
    _, (updates, states) = scan(oc.carry_clipped(oc.clip_by_global_norm(1.0)), np.float32([[3e38] * 7] * 3))
    np.testing.assert_allclose(flat(updates), np.full((3, 7), 7**-0.5), rtol=1e-6)
    np.testing.assert_array_equal(flat(states.buffer), np.full((3, 7), np.float32(3e38)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_leaves_keep_their_dtype_and_carry_their_roundings(dtype):
    """The buffer is float32, and what does not fit into the leaf's dtype waits in it."""
    tx = oc.carry_clipped(golden.free(oc.clip_by_value(0.1)))
    grads = {"w": jnp.full(4, 0.0301, dtype), "c": jnp.full(2, 1 + 1j, jnp.complex64)}
    state = tx.init(grads)
    assert (state.buffer["w"].dtype, state.buffer["c"].dtype) == (jnp.float32, jnp.complex64)
    total, update = np.zeros(4), jax.jit(tx.update)
    for k in range(50):
        updates, state = update({"w": grads["w"] * (k % 7), "c": grads["c"]}, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        total += np.float64(updates["w"])
    came = np.float64(sum(np.float64(grads["w"] * (k % 7)) for k in range(50)))
    np.testing.assert_allclose(total + np.float64(state.buffer["w"]), came, rtol=1e-6)
    np.testing.assert_allclose(np.abs(updates["c"]), 0.1, rtol=1e-6)


def test_a_sum_beyond_the_range_of_float16_is_not_infinite():
    tx = oc.carry_clipped(oc.clip_by_global_norm(1e4))
    grads = {"w": jnp.full(1, 60000.0, jnp.float16)}
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(grads))
    updates, state = update(grads, state)
    assert float(updates["w"][0]) == 10000.0, "not NaN"
    assert float(state.buffer["w"][0]) == 100000.0


def test_float64_leaves_have_a_float64_buffer():
    with enable_x64(True):
        tx = oc.carry_clipped(oc.clip_by_global_norm(1.0), bound=0.5)
        grads = {"w": jnp.full(1, 1.25 + 1e-12, jnp.float64)}
        updates, state = jax.jit(tx.update)(grads, tx.init(grads))
        np.testing.assert_allclose(state.buffer["w"], 0.25 + 1e-12, rtol=1e-14)
        assert updates["w"].dtype == jnp.float64
        assert (state.norm.dtype, state.lost.dtype) == (jnp.float32, jnp.float32)


def test_a_float64_buffer_beyond_float32_is_kept():
    """Its norm in the state is the largest float32; what was cut off is not lost."""
    with enable_x64(True):
        tx = oc.carry_clipped(oc.clip_by_value(1.0))
        state = tx.init({"w": jnp.zeros(1, jnp.float64)})
        updates, state = tx.update({"w": jnp.array([1e100], jnp.float64)}, state)
        assert updates["w"].tolist() == [1]
        np.testing.assert_allclose(state.buffer["w"], [1e100])
        assert state.norm == np.finfo(np.float32).max


def test_a_clip_that_never_acts_changes_no_bit():
    steps = entries(2)
    state, (updates, _) = scan(oc.carry_clipped(oc.clip_by_value(jnp.inf)), steps)
    good = np.isfinite(steps).all(axis=1)
    np.testing.assert_array_equal(flat(updates)[good], steps[good])
    assert not any(jnp.any(x != 0) for x in jax.tree.leaves(state.buffer))


def test_a_bound_of_zero_is_the_clip_alone():
    """All that is cut off is lost, and counted."""
    steps = np.abs(entries(3))
    steps[[golden.NAN, golden.INF]] = 0
    state, (updates, _) = scan(oc.carry_clipped(oc.clip_by_value(0.8), bound=0.0), steps)
    np.testing.assert_allclose(flat(updates), np.clip(steps, -0.8, 0.8), rtol=1e-6)
    cut = np.linalg.norm(np.float64(steps) - np.clip(steps, -0.8, 0.8), axis=1).sum()
    np.testing.assert_allclose(state.lost, cut, rtol=1e-4)
    assert float(state.norm) == 0


def test_every_mode_agrees_with_the_plain_loop():
    """Updates and state do not depend on how JAX runs the wrapper."""
    tx = oc.carry_clipped(oc.clip_by_value(1.0), bound=4.0)
    steps = entries(4)[[0, 40, 80, 2]]
    state, seen = tx.init(PARAMS), []
    for row in jnp.asarray(steps):
        updates, state = tx.update(tree(row), state)
        seen.append((updates, state))
    expected = state, jax.tree.map(lambda *x: jnp.stack(x), *seen)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    close(scan(tx, steps), expected)
    both = jax.vmap(lambda x: scan(tx, x))(np.stack([steps[::-1], steps]))
    close(jax.tree.map(lambda x: x[1], both), expected)
    close(jax.tree.map(lambda x: x[0], both), scan(tx, steps[::-1]))


def test_the_state_is_fixed_and_donated_and_compiled_once():
    """The structure is that of `init`, a second call compiles nothing, and all buffers may be given away."""
    for bound in (None, 1.0):
        tx = oc.carry_clipped(oc.clip_by_global_norm(1.0), bound=bound)
        update = jax.jit(tx.update, donate_argnums=(0, 1))
        state = tx.init(PARAMS)
        for scale in (1.0, 5.0):
            before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
            _, state = update(tree(jnp.full(7, scale)), state)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
        assert update._cache_size() == 1
        chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(jax.eval_shape(lambda: PARAMS)), state)


def test_the_buffer_is_known_as_a_copy_of_the_parameters():
    """So that Optax's tools give it their sharding."""
    tx = oc.carry_clipped(oc.clip_by_global_norm(1.0))
    marked = optax.tree_utils.tree_map_params(
        tx, lambda _: "parameter", tx.init(PARAMS), transform_non_params=lambda _: "other"
    )
    assert isinstance(marked, oc.CarryState)
    assert marked.buffer == {"a": "parameter", "b": "parameter"}
    assert set(jax.tree.leaves(marked._replace(buffer=()))) == {"other"}


def test_leaves_that_are_not_floating_pass():
    """Integers, keys, empty arrays, None and what Flax stores have no buffer."""
    grads = {
        "w": jnp.full(2, 3.0),
        "int": jnp.arange(3),
        "key": jax.random.key(1),
        "empty": jnp.zeros((0, 2)),
        "none": None,
        "_overwrite_with_gradient": {"scale": jnp.full(2, 7.0)},
    }
    tx = oc.carry_clipped(oc.clip_by_global_norm(1.0), bound=1.0)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(grads))
    updates, state = update(grads, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    for name in ("int", "key", "empty", "none", "_overwrite_with_gradient"):
        same = jax.tree.map(lambda x, y: bool(jnp.all(x == y)), updates[name], grads[name])
        assert all(jax.tree.leaves(same))
        assert all(x.shape == () and x == 0 for x in jax.tree.leaves(state.buffer[name]))
    np.testing.assert_allclose(state.norm, 1.0, rtol=1e-6)


def test_an_empty_tree_passes():
    tx = oc.carry_clipped(oc.clip_by_global_norm(1.0), bound=1.0)
    updates, state = tx.update({}, tx.init({}))
    assert updates == {}
    assert (int(state.step), float(state.norm)) == (1, 0)


def test_it_works_masked_injected_and_behind_multi_steps():
    """A leaf that is masked out is not carried; `MultiSteps` passes means; the bound can be an array."""
    clip = oc.clip_by_value(1.0)
    steps = np.full((4, 7), 3.0, np.float32)
    masked = optax.masked(oc.carry_clipped(clip), {"a": True, "b": False})
    state, (updates, _) = scan(masked, steps)
    np.testing.assert_array_equal(updates["b"], np.full((4, 2, 2), 3.0))
    np.testing.assert_array_equal(state.inner_state.buffer["a"], np.full(3, 8.0))
    assert isinstance(state.inner_state.buffer["b"], optax.MaskedNode)
    bound = 2.0 * np.sqrt(7)
    injected = golden.free(optax.inject_hyperparams(oc.carry_clipped)(inner_clip=clip, bound=bound))
    state, _ = scan(injected, steps)
    np.testing.assert_allclose(state.inner_state.norm, bound, rtol=1e-6)
    np.testing.assert_allclose(state.inner_state.lost, 3 * bound, rtol=1e-6)
    behind = golden.free(optax.MultiSteps(oc.carry_clipped(clip), 2))
    state, (updates, _) = scan(behind, steps)
    np.testing.assert_array_equal(updates["a"][:, 0], [0.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(state.inner_opt_state.buffer["a"], 4.0, rtol=1e-6)


@pytest.mark.skipif(jax.device_count("cpu") < 8, reason="needs eight CPU devices")
def test_inside_shard_map_all_devices_decide_alike():
    """With `axis_name` the result on split leaves is that of one device."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    grads = {"w": jnp.arange(8.0), "b": jnp.ones(3)}
    spec = {"w": P("x"), "b": P()}
    bad = {"w": grads["w"].at[6].set(jnp.nan), "b": grads["b"]}

    def run(axis_name):
        tx = oc.carry_clipped(
            oc.clip_by_global_norm(1.0, axis_name=axis_name), bound=9.0, axis_name=axis_name
        )

        def three(grads, bad, state):
            for g in (grads, bad, grads):
                updates, state = tx.update(g, state)
            return updates, state

        return tx, three

    tx, three = run("x")
    specs = optax.tree_utils.tree_map_params(
        tx, lambda _, s: s, tx.init(grads), spec, transform_non_params=lambda _: P()
    )
    split = jax.shard_map(three, mesh=mesh, in_specs=(spec, spec, specs), out_specs=(spec, specs))
    one, alone = run(None)
    got = jax.jit(split)(grads, bad, tx.init(grads))
    chex.assert_trees_all_close(got, jax.jit(alone)(grads, bad, one.init(grads)), rtol=1e-5)
    assert float(got[1].norm) > 1


def init_and_update(updates, of=PARAMS):
    tx = oc.carry_clipped(oc.clip_by_global_norm(1.0))
    return lambda: tx.update(updates, tx.init(of))


CLIP = oc.clip_by_value(1.0)
ERRORS = [
    (
        lambda: oc.carry_clipped(CLIP, bound=-1.0),
        ValueError,
        "carry_clipped: bound is -1.0, not among the numbers",
    ),
    (
        lambda: oc.carry_clipped(CLIP, bound=float("nan")),
        ValueError,
        "carry_clipped: bound is nan, not among the",
    ),
    (
        lambda: oc.carry_clipped(CLIP, bound="1"),
        TypeError,
        "carry_clipped: bound is '1', of type str. Pass a",
    ),
    (
        lambda: oc.carry_clipped(CLIP, bound=jnp.ones(2)),
        ValueError,
        "carry_clipped: bound has shape (2,). Pass one number: it is for the whole buffer.",
    ),
    (
        lambda: oc.carry_clipped(1.0),
        TypeError,
        "carry_clipped: inner is of type float. Pass a transformation of Optax.",
    ),
    (
        init_and_update({"a": PARAMS["a"]}),
        ValueError,
        "carry_clipped: the tree has 1 leaves, 'a'; `init` saw 2. Pass updates with the structure that",
    ),
    (
        init_and_update({"a": PARAMS["a"], "b": jnp.zeros(4)}),
        ValueError,
        "carry_clipped: the update's leaf 'b' has shape (4,), the buffer has shape (2, 2) there. Pass updat",
    ),
    (
        init_and_update({"a": PARAMS["a"], "c": PARAMS["b"]}),
        ValueError,
        "carry_clipped: the update has leaf 'c' where the buffer has 'b'. Pass updates with the structure",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_what_is_wrong_is_named(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()
