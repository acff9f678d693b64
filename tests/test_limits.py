"""How large a norm may be: constants, schedules, shares, parameters, combinations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from versions import enable_x64

import optaxclip as oc

GRADS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([6.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])}


def limits(limit, groups=oc.groups.leaf(), norm=oc.norms.l2(), steps=1, params=None, grads=GRADS):
    """The limits of each of some steps."""
    tx = oc.rescale_by_norm(limit, groups=groups, norm=norm)

    def step(state, _):
        _, state = tx.update(grads, state, params)
        return state, state.limit

    return jax.lax.scan(step, tx.init(grads), length=steps)[1].tolist()


@pytest.mark.parametrize(
    "limit", [2, 2.0, np.float32(2), np.array(2), jnp.array(2.0), jnp.array([2.0]), lambda step: 2.0]
)
def test_numbers_arrays_and_schedules_are_limits(limit):
    assert limits(limit) == [[2, 2]]


def test_an_array_has_one_limit_for_each_row():
    assert limits(jnp.array([1.0, 2.0])) == [[1, 2]]
    assert limits(oc.limits.constant(np.array([1.0, 2.0]))) == [[1, 2]]


def test_schedules_see_the_number_of_updates_before():
    schedule = optax.linear_schedule(8.0, 4.0, 4)
    assert limits(schedule, steps=4) == [[8, 8], [7, 7], [6, 6], [5, 5]]
    assert limits(oc.limits.schedule(schedule), steps=2) == [[8, 8], [7, 7]]


def test_per_group_limits_may_be_anything_a_limit_may_be():
    limit = oc.limits.per_group({"b": oc.limits.after(1, 5.0, 7.0), "a": optax.linear_schedule(1.0, 3.0, 2)})
    assert limits(limit, steps=2) == [[1, 5], [2, 7]]


def test_per_group_limits_apply_to_all_rows_of_a_group():
    groups = oc.groups.unit()
    grads = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}
    assert limits(oc.limits.per_group({"a": 1.0, "b": 2.0}), groups, grads=grads) == [[1, 1, 1, 2]]


def test_per_group_limits_know_the_rows_of_their_own_group_alone():
    """What they divide or remember is of these rows, wherever in the update they are."""
    groups = oc.groups.unit()
    grads = {"a": jnp.ones(4), "b": jnp.ones((2, 3))}
    limit = oc.limits.per_group({"a": oc.limits.percentile(100.0, window=2), "b": oc.limits.budget(3.0)})
    np.testing.assert_allclose(
        limits(limit, groups, steps=2, grads=grads), [[2, *[3**0.5] * 3]] * 2, rtol=1e-6
    )


@pytest.mark.parametrize("by", ["uniform", "size"])
@pytest.mark.parametrize("kind", ["l1", "l2", "linf", "rms"])
def test_a_budget_keeps_the_whole_norm_within_it(kind, by):
    norm = getattr(oc.norms, kind)()
    tree, _ = oc.rescale_tree(
        GRADS,
        oc.limits.budget(1.5, by),
        groups=oc.groups.leaf(),
        norm=norm,
        response=oc.responses.normalize(),
    )
    whole = oc.group_norms(tree, oc.groups.whole(), norm)["whole"]
    np.testing.assert_allclose(whole, 1.5, rtol=1e-6)


def test_budgets_are_divided_as_published():
    np.testing.assert_allclose(limits(oc.limits.budget(2.0)), [[2 / 2**0.5] * 2], rtol=1e-6)
    by_size = [[2 * 0.2**0.5, 2 * 0.8**0.5]]
    np.testing.assert_allclose(limits(oc.limits.budget(2.0, "size")), by_size, rtol=1e-6)
    np.testing.assert_allclose(limits(oc.limits.budget(lambda step: 2.0, by="size")), by_size, rtol=1e-6)


@pytest.mark.parametrize("by", ["uniform", "size"])
@pytest.mark.parametrize("kind", ["l1", "l2", "linf", "rms"])
def test_one_group_has_the_whole_budget(kind, by):
    """There is nothing to divide, whatever the norm."""
    limit = oc.limits.budget(1.5, by)
    assert limits(limit, oc.groups.whole(), getattr(oc.norms, kind)()) == [[1.5]]


def test_relative_limits_follow_the_parameters_and_their_floor():
    params = {"a": jnp.array([0.0, 10.0]), "b": jnp.zeros(8)}
    np.testing.assert_allclose(limits(oc.limits.relative(0.1), params=params), [[1, 1e-4]], rtol=1e-6)
    floored = limits(oc.limits.relative(lambda step: 0.1, floor=0.5), params=params)
    np.testing.assert_allclose(floored, [[1, 0.05]], rtol=1e-6)


def test_relative_limits_of_zero_and_infinity_are_no_nan():
    """A ratio of 0 allows nothing and one of infinity everything, whatever the parameters."""
    params = {"a": jnp.array([0.0, 0.0]), "b": jnp.full(8, jnp.inf)}
    assert limits(oc.limits.relative(jnp.inf, floor=0.0), params=params) == [[np.inf, np.inf]]
    assert limits(oc.limits.relative(0.0), params=params) == [[0, 0]]
    params = {"a": jnp.array([0.0, jnp.nan]), "b": jnp.ones(8)}
    for ratio in (0.0, jnp.inf):
        np.testing.assert_array_equal(limits(oc.limits.relative(ratio), params=params), [[np.nan, ratio]])


def test_relative_limits_find_parameters_by_path():
    """Parameters may hold leaves that the updates lack, and other containers."""
    params = {"a": jnp.array([0.0, 10.0]), "b": jnp.ones(8), "c": jnp.ones(3)}
    np.testing.assert_allclose(
        limits(oc.limits.relative(0.1), params=params, grads={"a": GRADS["a"]}), [[1]], rtol=1e-6
    )


def test_at_most_and_after_combine_limits():
    limit = oc.limits.at_most(oc.limits.after(2, jnp.inf, 1.0), optax.linear_schedule(5.0, 1.0, 4))
    assert limits(limit, steps=4) == [[5, 5], [4, 4], [1, 1], [1, 1]]


SINGLE = jnp.float32(2.0)
WIDE = {
    "per_group": (oc.limits.per_group({"a": SINGLE, "b": oc.limits.relative(SINGLE)}), [2, 20]),
    "budget": (oc.limits.budget(SINGLE), [2**0.5, 2**0.5]),
    "relative": (oc.limits.relative(SINGLE, floor=SINGLE), [10, 20]),
    "at_most": (oc.limits.at_most(SINGLE, oc.limits.ema(SINGLE)), [2, 2]),
    "after": (oc.limits.after(1, SINGLE, oc.limits.zscore()), [2, 2]),
    # 5 and 10, each over the whole norm, and twice that allowed.
    "ema, warm-up": (oc.limits.ema(SINGLE, warmup=1, max_norm=SINGLE), [2 / 5**0.5, 4 / 5**0.5]),
}


@pytest.mark.parametrize("limit", WIDE)
def test_limits_of_float32_hold_for_float64_updates(limit):
    """No number is mixed with one of another dtype unless the code says so."""
    rule, expected = WIDE[limit]
    with enable_x64(True):
        grads = jax.tree.map(lambda x: np.asarray(x, np.float64), GRADS)
        found = limits(rule, params=grads, grads=grads)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_combined_limits_ask_for_parameters_if_either_does():
    """On whichever side, and in `per_group`, the limit that needs them is given them."""
    params = {"a": jnp.array([0.0, 10.0]), "b": jnp.full(8, 0.0)}
    relative = oc.limits.relative(0.1, floor=1.0)
    for limit in (oc.limits.at_most(relative, 0.5), oc.limits.at_most(0.5, relative)):
        np.testing.assert_allclose(limits(limit, params=params), [[0.5, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(
        limits(oc.limits.per_group({"a": 2.0, "b": relative}), params=params), [[2, 0.1]], rtol=1e-6
    )


def test_a_limit_may_be_traced():
    clip = jax.jit(lambda limit: oc.rescale_tree(GRADS, limit)[1].norm_after)
    np.testing.assert_allclose(clip(2.0), [2], rtol=1e-6)
    np.testing.assert_allclose(clip(3.0), [3], rtol=1e-6)
    assert clip._cache_size() == 1
