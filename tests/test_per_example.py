"""Per-example clipping, against Optax and against float64 readings of its equations."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from versions import enable_x64

import optaxclip as oc

LAYER, LEAF = oc.groups.layer(), oc.groups.leaf()
BATCH = 6
SHAPES = {"body": {"kernel": (4, 3), "bias": (3,)}, "head": {"kernel": (3, 2)}}
PARAMS = jax.tree.map(lambda shape: jnp.ones(shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple))
GROUPS = {  # of each leaf, in tree order
    "whole": (oc.groups.whole(), ["all", "all", "all"]),
    "layer": (LAYER, ["body", "body", "head"]),
    "leaf": (LEAF, ["bias", "body", "head"]),
}


def examples(dtype=np.float32, scale=1.0, batch=BATCH, seed=0):
    """Gradients of a batch, some of their norms within a limit of 3 and some above."""
    rng = np.random.default_rng(seed)
    sizes = scale * np.array([0.1, 0.5, 1.0, 2.0, 0.0, 4.0])[np.arange(batch) % 6]

    def leaf(p):
        found = rng.normal(size=(batch, *p.shape)) * sizes.reshape((-1,) + (1,) * p.ndim)
        if np.issubdtype(dtype, np.complexfloating):
            found = found + 1j * rng.normal(size=found.shape) * sizes.reshape((-1,) + (1,) * p.ndim)
        return jnp.asarray(found, dtype)

    return jax.tree.map(leaf, PARAMS)


def clip(norm, limit):
    return min(1.0, limit / norm)


def summed(tree, names, limits, factor=clip, eps=0.0):
    """The sum over examples in NumPy float64, with the norms and the factors `(examples, groups)`."""
    leaves, treedef = jax.tree.flatten(tree)
    wide = [np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64) for x in leaves]
    out = [np.zeros(x.shape[1:], x.dtype) for x in wide]
    order = sorted(set(names))
    norms, factors = (np.ones((len(wide[0]), len(order))) for _ in range(2))
    for i in range(len(wide[0])):
        for g, group in enumerate(order):
            own = [k for k, name in enumerate(names) if name == group]
            norms[i, g] = np.sqrt(sum(np.sum(np.abs(wide[k][i]) ** 2) for k in own))
            if norms[i, g] > 0:
                factors[i, g] = factor(norms[i, g] + eps, limits[g])
            for k in own:
                out[k] += wide[k][i] * factors[i, g]
    return jax.tree.unflatten(treedef, out), norms, factors


def update(tx, grads, params=PARAMS):
    return jax.jit(tx.update)(grads, tx.init(params))


def of(batch, tree):
    """A sum over a batch as its mean."""
    return jax.tree.map(lambda x: x / batch, tree)


def narrow(tree, like):
    return jax.tree.map(lambda x, y: np.asarray(x).astype(y.dtype), tree, like)


# --- against Optax ---


def test_flat_clipping_has_the_sum_and_the_count_of_optax():
    """With `reduce="sum"` this is `optax.per_example_global_norm_clip`, whatever the limit."""
    grads = examples()
    leaves, treedef = jax.tree.flatten(grads)
    ours = jax.jit(lambda c: update(oc.clip_per_example(c, reduce="sum"), grads))
    theirs = jax.jit(lambda c: optax.per_example_global_norm_clip(leaves, c))
    for limit in (0.7, 3.0, 1e3):
        updates, state = ours(limit)
        expected, count = theirs(limit)
        chex.assert_trees_all_close(updates, treedef.unflatten(expected), rtol=1e-6, atol=1e-6)
        assert round(float(state.clipped[0]) * BATCH) == int(count)


@pytest.mark.parametrize("by", ["uniform", "size"])
def test_budgets_by_leaf_have_the_sum_and_the_counts_of_optax(by):
    """Optax takes each array for a layer: `optax.per_example_layer_norm_clip`."""
    grads = list(jax.tree.leaves(examples()))
    tx = oc.clip_per_example(oc.limits.budget(2.0, by), groups=LEAF, reduce="sum")
    updates, state = update(tx, grads, jax.tree.leaves(PARAMS))
    expected, counts = optax.per_example_layer_norm_clip(grads, 2.0, uniform=by == "uniform")
    chex.assert_trees_all_close(updates, list(expected), rtol=1e-6, atol=1e-6)
    assert np.rint(np.asarray(state.clipped) * BATCH).tolist() == [int(n) for n in counts]


def test_the_mean_is_the_aggregate_of_optax_without_noise():
    """That of `optax.contrib.differentially_private_aggregate`."""
    grads = examples()
    updates, _ = update(oc.clip_per_example(1.5), grads)
    theirs = optax.contrib.differentially_private_aggregate(1.5, noise_multiplier=0.0, key=0)
    expected, _ = jax.jit(theirs.update)(grads, theirs.init(PARAMS))
    chex.assert_trees_all_close(updates, expected, rtol=1e-6, atol=1e-6)


# --- against the equations ---


@pytest.mark.parametrize("groups", GROUPS)
def test_fixed_limits_follow_the_equation(groups):
    """The mean and the statistics, for one limit, uniform shares and shares by size."""
    grouping, names = GROUPS[groups]
    sizes = {"whole": [21], "layer": [15, 6], "leaf": [3, 12, 6]}[groups]
    limits = {
        "number": (3.0, [3.0] * len(sizes)),
        "uniform": (oc.limits.budget(3.0), [3.0 / np.sqrt(len(sizes))] * len(sizes)),
        "size": (oc.limits.budget(3.0, by="size"), [3.0 * np.sqrt(d / 21) for d in sizes]),
    }
    grads = examples()
    for limit, values in list(limits.values())[: 3 if len(sizes) > 1 else 1]:
        updates, state = update(oc.clip_per_example(limit, groups=grouping), grads)
        expected, norms, factors = summed(grads, names, values)
        chex.assert_trees_all_close(updates, narrow(of(BATCH, expected), grads), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(state.norm, norms.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(state.clipped, (factors != 1).mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(state.limit, values, rtol=1e-6)
        assert 0 < state.clipped[0] < 1
        assert state.nonfinite.tolist() == [0] * len(sizes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64"])
def test_dtypes_come_out_as_they_went_in(dtype):
    """16-bit leaves are clipped and averaged in float32, and rounded once at the end."""
    with enable_x64(dtype == "float64"):
        grads = examples(jnp.dtype(dtype))
        tx = oc.clip_per_example(3.0, groups=LAYER)
        updates, state = update(tx, grads)
        expected, _, _ = summed(grads, GROUPS["layer"][1], [3.0, 3.0])
        precision = {"float16": 2**-11, "bfloat16": 2**-8, "float64": 1e-13, "complex64": 1e-6}[dtype]
        for out, wanted in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            assert out.dtype == dtype
            wide = np.complex128 if dtype == "complex64" else np.float64
            tiny = 1e-7 if "16" in dtype else precision / 10
            np.testing.assert_allclose(
                np.asarray(out).astype(wide), wanted / BATCH, rtol=precision, atol=tiny
            )
        assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}


def test_many_16_bit_examples_add_up_in_float32():
    """Added one by one in bfloat16, a thousand ones would stop at 256."""
    ones = {"w": jnp.ones((1000, 1), jnp.bfloat16)}
    updates, _ = update(oc.clip_per_example(2.0, reduce="sum"), ones, {"w": jnp.ones(1, jnp.bfloat16)})
    assert updates["w"].tolist() == [1000]


RESPONSES = {
    "AUTO-S": ({"response": oc.responses.normalize(), "eps": 0.01}, lambda n, c: c / n, 0.01),
    "NSGD": ({"response": oc.responses.normalize(), "eps": 0.5}, lambda n, c: c / n, 0.5),
    "DP-PSAC": ({"response": oc.responses.psac(0.1)}, lambda n, c: c / (n + 0.1 / (n + 0.1)), 0.0),
    "global": ({"response": oc.responses.zero()}, lambda n, c: float(n <= c), 0.0),
    "clip, eps": ({"eps": 1e-2}, clip, 1e-2),
}


@pytest.mark.parametrize("response", RESPONSES)
def test_published_factors_per_example(response):
    """AUTO-S, NSGD, DP-PSAC and dropping what is above the limit, each by its formula."""
    options, factor, eps = RESPONSES[response]
    grads = examples()
    updates, _ = update(oc.clip_per_example(2.0, groups=LAYER, **options), grads)
    expected, _, factors = summed(grads, GROUPS["layer"][1], [2.0, 2.0], factor, eps)
    chex.assert_trees_all_close(updates, narrow(of(BATCH, expected), grads), rtol=1e-6, atol=1e-6)
    assert (factors != 1).any()


def test_schedules_and_limits_relative_to_parameters():
    """A schedule sees the number of updates before; a relative limit the norms of the parameters."""
    grads = examples()
    tx = oc.clip_per_example(optax.linear_schedule(4.0, 2.0, 2))
    step = jax.jit(tx.update)
    state, limits = tx.init(PARAMS), []
    for _ in range(4):
        _, state = step(grads, state)
        limits.append(float(state.limit[0]))
    assert limits == [4.0, 3.0, 2.0, 2.0]
    assert int(state.step) == 4
    relative = oc.clip_per_example(oc.limits.relative(0.5), groups=LAYER)
    updates, state = jax.jit(relative.update)(grads, relative.init(PARAMS), PARAMS)
    values = [0.5 * np.sqrt(15), 0.5 * np.sqrt(6)]
    np.testing.assert_allclose(state.limit, values, rtol=1e-6)
    expected, _, _ = summed(grads, GROUPS["layer"][1], values)
    chex.assert_trees_all_close(updates, narrow(of(BATCH, expected), grads), rtol=1e-6, atol=1e-6)


# --- the adaptive limit ---

STEPS, EXAMPLES = 240, 8
DIRECTIONS = {"a": np.array([0.6, -0.8]), "b": np.array([1.0])}


def golden():
    """Norms `(steps, examples, 2)`: noise, spikes, NaN, infinities, zeros and a lasting rise."""
    rng = np.random.default_rng(7)
    norms = np.array([0.5, 4.0]) * np.exp(0.4 * rng.normal(size=(STEPS, EXAMPLES, 2)))
    norms[60] *= 1e3  # a batch of spikes
    norms[70, 2] *= 1e6  # one example
    norms[80, 3] = np.nan
    norms[81, :, 0] = np.nan  # a whole batch, in one of the groups
    norms[95] = 0.0
    norms[96, :5] = 0.0
    norms[130, :2, 1], norms[131, 7] = np.inf, -np.inf
    norms[180:] *= 10
    return norms.astype(np.float32)


def adaptive(norms, target, rate, initial):
    """Andrew et al. 2021 without noise, in NumPy float64: limits, mean norm after clipping, share clipped."""
    limits, after, shares = [], [], []
    c = np.full(2, initial, np.float64)
    for batch in norms.astype(np.float64):
        limits.append(c.copy())
        kept, clipped = np.zeros(2), np.zeros(2)
        for g in range(2):
            excess = 0.0
            for n in batch[:, g]:
                if np.isfinite(n):
                    kept[g] += min(n, c[g])
                    clipped[g] += n > c[g]
                if np.isfinite(n) and n > 0:
                    excess += (n <= c[g]) - target
            c[g] *= np.exp(-rate * excess / EXAMPLES)
        after.append(kept / EXAMPLES)
        shares.append(clipped / EXAMPLES)
    return np.array(limits), np.array(after), np.array(shares)


def gradients(norms):
    """Gradients of a batch with the given norms; what is not finite is in one entry."""
    return {
        "a": jnp.where(jnp.isfinite(norms[:, :1]), norms[:, :1] * jnp.float32([[0.6, -0.8]]), norms[:, :1]),
        "b": norms[:, 1:],
    }


@jax.jit
def run(norms, target=0.5, rate=0.2, initial=1.0):
    """All updates of a sequence of batches, and the states after each."""
    tx = oc.clip_per_example(oc.per_example_quantile(target, rate, initial=initial), groups=LEAF)

    def step(state, batch):
        updates, state = tx.update(gradients(batch), state)
        return state, (updates, state)

    return jax.lax.scan(step, tx.init({"a": jnp.zeros(2), "b": jnp.zeros(1)}), norms)[1]


@pytest.mark.parametrize(("target", "rate", "initial"), [(0.5, 0.2, 1.0), (0.9, 0.05, 3.0), (0.2, 1.0, 0.1)])
def test_the_adaptive_limit_follows_its_equation(target, rate, initial):
    """240 batches with noise, spikes, NaN, infinities, zeros and a rise, against NumPy in float64."""
    norms = golden()
    updates, states = run(norms, target, rate, initial)
    limits, after, shares = adaptive(norms, target, rate, initial)
    np.testing.assert_allclose(states.limit, limits, rtol=5e-5)
    np.testing.assert_allclose(states.rule[:-1], limits[1:], rtol=5e-5)
    np.testing.assert_allclose(states.clipped, shares, atol=1e-6)
    np.testing.assert_allclose(updates["a"], after[:, :1] * DIRECTIONS["a"], rtol=5e-5)
    np.testing.assert_allclose(updates["b"], after[:, 1:], rtol=5e-5)
    bad = ~np.isfinite(norms)
    np.testing.assert_array_equal(states.nonfinite, bad.sum(axis=1).cumsum(axis=0))
    finite = np.where(bad, 0, norms.astype(np.float64)).sum(axis=1) / np.maximum((~bad).sum(axis=1), 1)
    np.testing.assert_allclose(states.norm, finite, rtol=1e-5)


def test_the_adaptive_limit_finds_the_quantile():
    """In the long run the target's share of the examples is within the limit, group by group."""
    rng = np.random.default_rng(1)
    norms = np.array([0.1, 30.0]) * np.exp(rng.normal(size=(STEPS, EXAMPLES, 2)))
    _, states = run(norms.astype(np.float32), 0.8)
    np.testing.assert_allclose(states.clipped[-120:].mean(axis=0), 0.2, atol=0.03)
    found = np.exp(np.log(states.limit[-120:]).mean(axis=0))
    np.testing.assert_allclose(found, np.quantile(norms, 0.8, axis=(0, 1)), rtol=0.15)


def test_a_batch_of_one_moves_it_as_one_norm_moves_limits_quantile():
    """The two rules are one where there is one example, NaN and zeros included."""
    norms = golden()[:, 3:4]
    _, states = run(norms)
    tx = oc.clip_by_leafwise_norm(oc.limits.quantile(0.5, 0.2))

    def step(state, batch):
        _, state = tx.update(jax.tree.map(lambda x: x[0], gradients(batch)), state)
        return state, state.limit

    _, limits = jax.lax.scan(step, tx.init({"a": jnp.zeros(2), "b": jnp.zeros(1)}), norms)
    np.testing.assert_allclose(states.limit, limits, rtol=1e-6)


def test_nothing_is_learned_from_batches_without_a_finite_norm():
    """After such batches, however many, the next one meets the limit that it would have met."""
    norms = golden()
    bad = np.tile(np.array([np.nan, np.inf, 0.0, -np.inf], np.float32)[:, None, None], (5, EXAMPLES, 2))
    _, without = run(norms)
    _, states = run(np.concatenate([norms[:100], bad, norms[100:-20]]))
    np.testing.assert_array_equal(states.rule[120:], without.rule[100:-20])
    assert (states.rule[119] == without.rule[99]).all()


def test_limits_stay_within_the_range_of_float32():
    """Neither 0 nor infinity, where a limit would stay for good: here it leaps from end to end."""
    norms = np.full((STEPS, EXAMPLES, 2), 1e-3, np.float32)
    norms[100:] = 3e38
    _, states = run(norms, 0.5, 1e3)
    ends = jnp.finfo(jnp.float32)
    assert set(np.ravel(states.rule).tolist()) == {float(ends.tiny), float(ends.max)}
    assert (states.rule[1:] != states.rule[:-1]).all()


def test_first_limits_may_differ_by_row():
    tx = oc.clip_per_example(oc.per_example_quantile(initial=jnp.array([1.0, 5.0])), groups=LAYER)
    assert tx.init(PARAMS).rule.tolist() == [1.0, 5.0]
    _, state = update(tx, examples())
    assert state.limit.tolist() == [1.0, 5.0]


# --- edges ---


def test_one_bad_example_is_dropped_and_counted():
    """By default its group is zero in the mean, which still divides by all examples; others are untouched."""
    grads = examples()
    names = GROUPS["layer"][1]
    without = jax.tree.map(lambda x: x, grads)
    grads["body"]["bias"] = grads["body"]["bias"].at[2, 0].set(jnp.nan)
    grads["head"]["kernel"] = grads["head"]["kernel"].at[3, 1, 1].set(-jnp.inf)
    without["body"] = jax.tree.map(lambda x: x.at[2].set(0), without["body"])
    without["head"] = jax.tree.map(lambda x: x.at[3].set(0), without["head"])
    tx = oc.clip_per_example(3.0, groups=LAYER)
    updates, state = update(tx, grads)
    expected, norms, _ = summed(without, names, [3.0, 3.0])
    chex.assert_trees_all_close(updates, narrow(of(BATCH, expected), grads), rtol=1e-6, atol=1e-6)
    assert state.nonfinite.tolist() == [1, 1]
    np.testing.assert_allclose(state.norm, norms.sum(axis=0) / (BATCH - 1), rtol=1e-6)
    _, state = jax.jit(tx.update)(grads, state)
    assert state.nonfinite.tolist() == [2, 2]


def test_propagated_it_makes_its_group_nan_and_no_other():
    grads = examples()
    grads["body"]["bias"] = grads["body"]["bias"].at[2, 0].set(jnp.inf)
    updates, state = update(oc.clip_per_example(3.0, groups=LAYER, nonfinite="propagate"), grads)
    assert np.isnan(updates["body"]["kernel"]).all()
    assert np.isnan(updates["body"]["bias"]).all()
    assert np.isfinite(updates["head"]["kernel"]).all()
    assert state.nonfinite.tolist() == [1, 0]
    chex.assert_tree_all_finite(state)


def test_zeros_infinite_limits_and_limits_of_zero():
    """Zeros stay zeros, an infinite limit changes nothing, 0 and a traced negative one give zeros."""
    grads, tx = examples(), jax.jit(lambda grads, c: update(oc.clip_per_example(c), grads)[0])
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    chex.assert_trees_all_equal(tx(jax.tree.map(jnp.zeros_like, grads), jnp.float32(0)), zeros)
    chex.assert_trees_all_equal(tx(grads, jnp.float32(0)), zeros)
    chex.assert_trees_all_equal(tx(grads, jnp.float32(-1)), zeros)
    mean = jax.tree.map(lambda x: np.asarray(x, np.float64).mean(axis=0).astype(np.float32), grads)
    chex.assert_trees_all_close(tx(grads, jnp.float32(jnp.inf)), mean, rtol=1e-6, atol=1e-6)


def test_one_example_within_the_limit_comes_out_bit_identical():
    grads = examples(batch=1)
    updates, _ = update(oc.clip_per_example(1e3), grads)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: x[0], grads))


def test_entries_whose_squares_overflow_are_clipped_rightly():
    grads = {"w": jnp.float32([[3e30, 4e30], [3e-30, 4e-30]])}
    updates, state = update(oc.clip_per_example(1.0), grads, {"w": jnp.zeros(2)})
    np.testing.assert_allclose(updates["w"], [0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(state.norm, [2.5e30], rtol=1e-6)
    assert state.clipped.tolist() == [0.5]


def test_an_empty_batch_gives_zeros_and_moves_only_the_step():
    """As with Poisson sampling: no example, no update."""
    tx = oc.clip_per_example(oc.per_example_quantile(initial=2.0), groups=LAYER)
    _, state = update(tx, examples())
    none = jax.tree.map(lambda p: jnp.zeros((0, *p.shape), p.dtype), PARAMS)
    updates, after = tx.update(none, state, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(after, state._replace(step=jnp.int32(2)))


def test_leaves_that_are_not_floating_pass_their_first_example():
    """Integers, bools, keys and float0 have no mean; None and zero-size arrays stay what they are."""
    keys = jax.random.split(jax.random.key(0), 2)
    grads = {
        "w": np.float32([[3.0, 4.0], [0.0, 1.0]]),
        "int": jnp.int32([[1, 2], [3, 4]]),
        "bool": jnp.array([True, False]),
        "key": keys,
        "float0": np.zeros((2, 3), jax.dtypes.float0),
        "none": None,
        "empty": jnp.zeros((2, 0)),
    }
    params = jax.tree.map(lambda x: x[0] if x.dtype != jax.dtypes.float0 else x[:1].reshape(3), grads)
    tx = oc.clip_per_example(1.0, groups=LEAF)
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [0.3, 0.9], rtol=1e-6)
    assert updates["int"].tolist() == [1, 2]
    assert updates["bool"].tolist() is True
    assert updates["key"] == keys[0]
    assert updates["float0"].shape == (3,)
    assert updates["float0"].dtype == jax.dtypes.float0
    assert updates["none"] is None
    assert updates["empty"].shape == (0,)
    assert state.norm.shape == (1,)


def test_leaves_left_alone_by_the_groups_are_averaged_without_a_limit():
    """Also where no leaf is left: `None` as a name is the place of `optax.masked`."""
    grads = {"a": jnp.float32([[3.0, 4.0], [0.0, 1.0]]), "b": jnp.float32([[100.0], [200.0]])}
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    for names, a in (({"a": "a", None: "b"}, [0.3, 0.9]), ({None: ".*"}, [1.5, 2.5])):
        tx = oc.clip_per_example(1.0, groups=oc.groups.regex(names))
        updates, state = update(tx, grads, params)
        np.testing.assert_allclose(updates["a"], a, rtol=1e-6)
        assert updates["b"].tolist() == [150.0]
        assert state.norm.shape == (len(names) - 1,)


def test_groups_of_several_rows_belong_to_one_example_each():
    """Units and stacked layers are those of a parameter, whose axes the batch axis comes before."""
    grads = {"w": jnp.float32([[[3.0, 0.3], [4.0, 0.4]], [[0.0, 6.0], [0.0, 8.0]]])}
    params = {"w": jnp.zeros((2, 2))}
    updates, state = update(oc.clip_per_example(1.0, groups=oc.groups.unit()), grads, params)
    np.testing.assert_allclose(updates["w"], [[0.3, 0.45], [0.4, 0.6]], rtol=1e-6)
    np.testing.assert_allclose(state.norm, [2.5, 5.25], rtol=1e-6)
    stacked = oc.clip_per_example(5.0, groups=oc.groups.stacked(LEAF, "w"))
    _, state = update(stacked, grads, params)
    np.testing.assert_allclose(
        state.norm, [(np.hypot(3, 0.3) + 6) / 2, (np.hypot(4, 0.4) + 8) / 2], rtol=1e-6
    )
    assert state.clipped.tolist() == [0.5, 0.5]


# --- JAX and Optax ---

METHODS = {
    "flat": lambda: oc.clip_per_example(1.0),
    "budget": lambda: oc.clip_per_example(oc.limits.budget(1.0, by="size"), groups=LAYER),
    "per_group": lambda: oc.clip_per_example(oc.limits.per_group({"body": 1.0, "head": 2.0}), groups=LAYER),
    "quantile": lambda: oc.clip_per_example(oc.per_example_quantile(), groups=LAYER),
}


@pytest.mark.parametrize("method", ["budget", "quantile"])
def test_every_mode_agrees_with_the_plain_loop(method):
    """jit, scan, vmap and donation; the state keeps its shapes and dtypes; one compilation."""
    tx, grads, scales = METHODS[method](), examples(), jnp.float32([1.0, 100.0, 0.01])

    def step(state, scale):
        updates, state = tx.update(jax.tree.map(lambda x: scale * x, grads), state, PARAMS, value=1.0)
        return state, updates

    state, history = tx.init(PARAMS), []
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    one = jax.jit(step, donate_argnums=0)
    for scale in scales:
        state, updates = one(state, scale)
        history.append(updates)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert one._cache_size() == 1
    loop = state, jax.tree.map(lambda *x: jnp.stack(x), *history)
    both = jax.jit(jax.vmap(lambda s: jax.lax.scan(step, tx.init(PARAMS), s)))(
        jnp.stack([scales, 2 * scales])
    )
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], both), loop, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_init_takes_shapes_and_trees_without_leaves(method):
    """Optax's tools call `init` with a tree without leaves; it is updated to itself."""
    tx = METHODS[method]()
    abstract = jax.eval_shape(lambda: PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(abstract), tx.init(PARAMS))
    assert tx.update({}, tx.init({}))[0] == {}
    marked = optax.tree_utils.tree_map_params(
        tx, lambda _: "parameter", tx.init(PARAMS), transform_non_params=lambda _: "other"
    )
    assert set(jax.tree.leaves(marked)) == {"other"}


def test_the_first_of_a_chain_with_accumulation_and_an_optimizer_behind():
    """`MultiSteps` goes behind it; hyperparameters may be injected."""
    grads = examples()
    inner = optax.MultiSteps(optax.sgd(0.5), 2).gradient_transformation()
    tx = optax.chain(optax.inject_hyperparams(oc.clip_per_example)(optax.constant_schedule(3.0)), inner)
    with jax.numpy_dtype_promotion("standard"):  # Optax divides floats by integers
        step = jax.jit(tx.update)
        first, state = step(grads, tx.init(PARAMS), PARAMS)
        second, _ = step(examples(scale=2.0), state, PARAMS)
    chex.assert_trees_all_equal(first, jax.tree.map(jnp.zeros_like, PARAMS))
    names = GROUPS["whole"][1]
    sums = [summed(g, names, [3.0])[0] for g in (grads, examples(scale=2.0))]
    expected = jax.tree.map(lambda a, b: -0.5 * (a + b) / 2 / BATCH, *sums)
    chex.assert_trees_all_close(second, narrow(expected, PARAMS), rtol=1e-5, atol=1e-6)


def test_gradients_of_a_model_per_example():
    """What `jax.vmap(jax.grad(loss), in_axes=(None, 0))` gives is what is asked for."""
    params = {"w": jnp.float32([1.0, -1.0])}
    inputs = jnp.float32([[3.0, 4.0], [0.1, 0.2], [5.0, 12.0]])

    def loss(params, x):
        return params["w"] @ x

    updates, state = update(
        oc.clip_per_example(1.0), jax.vmap(jax.grad(loss), (None, 0))(params, inputs), params
    )
    expected = (np.array([0.6, 0.8]) + np.array([0.1, 0.2]) + np.array([5, 12]) / 13) / 3
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(state.norm, (5 + np.hypot(0.1, 0.2) + 13) / 3, rtol=1e-6)


# --- errors ---


def updated(updates, params=None, of=PARAMS, **options):
    tx = oc.clip_per_example(1.0, **options)
    return lambda: tx.update(updates, tx.init(of), params)


VALUES = [
    (
        lambda: oc.clip_per_example(-1.0),
        "clip_per_example: limit is -1.0, not among the numbers from 0 to inf.",
    ),
    (lambda: oc.clip_per_example(1.0, eps=-1.0), "clip_per_example: eps is -1.0"),
    (
        lambda: oc.clip_per_example(1.0, nonfinite="skip"),
        "clip_per_example: nonfinite is 'skip'. Pass one of 'propagate', 'zero'.",
    ),
    (
        lambda: oc.clip_per_example(1.0, reduce="max"),
        "clip_per_example: reduce is 'max'. Pass one of 'mean', 'sum'.",
    ),
    (
        lambda: oc.per_example_quantile(1.5),
        "per_example_quantile: target is 1.5, not among the numbers from 0 to 1.",
    ),
    (lambda: oc.per_example_quantile(rate=-1.0), "per_example_quantile: rate is -1.0"),
    (lambda: oc.per_example_quantile(initial=0.0), "per_example_quantile: initial is 0.0"),
    (
        lambda: oc.clip_per_example(oc.per_example_quantile(initial=jnp.ones(3)), groups=LAYER).init(PARAMS),
        "per_example_quantile: initial has shape (3,) for 2 rows of groups, 'body', 'head'. Pass one number",
    ),
    (
        updated({"a": jnp.ones((3, 2)), "b": jnp.float32(1.0)}, of={"a": jnp.ones(2), "b": jnp.float32(1)}),
        "clip_per_example: leaf 'b' has shape (), which is not one gradient per example. Pass gradients with "
        "a leading batch axis: jax.vmap(jax.grad(loss), in_axes=(None, 0)).",
    ),
    (
        updated(PARAMS, PARAMS),
        "clip_per_example: leaf 'body/bias' has shape (3,) for a parameter of shape (3,), which is not one",
    ),
    (
        updated({"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))}),
        "clip_per_example: leaf 'b' has shape (4, 2), a batch of 4; leaf 'a' has a batch of 3. Give all",
    ),
    (
        updated({"body": examples()["body"]}, groups=LAYER),
        "clip_per_example: the tree has 1 rows of groups, 'body'; `init` saw 2. Pass updates with the",
    ),
]
STATEFUL = {
    "quantile": lambda: oc.limits.quantile(),
    "ema": lambda: oc.limits.ema(1.1),
    "per_group": lambda: oc.limits.per_group({"body": 1.0, "head": oc.limits.running_mean()}),
}
TYPES = [
    (
        lambda: oc.clip_per_example("1"),
        "clip_per_example: limit is '1', of type str. Pass a number or an array.",
    ),
    (
        lambda: oc.clip_per_example({"a": 1.0}),
        "clip_per_example: limit is a dict. Pass limits.per_group({name",
    ),
    (lambda: oc.clip_per_example(1.0, groups=oc.groups.leaf), "clip_per_example: groups is of type function"),
    (lambda: oc.clip_per_example(1.0, norm=2), "clip_per_example: norm is 2, of type int."),
    (
        lambda: oc.clip_per_example(1.0, response=None),
        "clip_per_example: response is None, of type NoneType.",
    ),
    (lambda: oc.per_example_quantile("half"), "per_example_quantile: target is 'half', of type str."),
    *(
        (
            lambda make=make: oc.clip_per_example(make(), groups=LAYER).init(PARAMS),
            "clip_per_example: the limit remembers earlier norms, one a step; here a step has one for each "
            "example. Pass a number, a schedule, limits.budget or per_example_quantile().",
        )
        for make in STATEFUL.values()
    ),
]


@pytest.mark.parametrize(("call", "message"), VALUES)
def test_values_that_are_wrong_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("call", "message"), TYPES)
def test_types_that_are_wrong_are_named(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()
