"""What the state says happened, by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc

GRADS = {"a": {"w": jnp.array([3.0, 4.0])}, "b": {"w": jnp.array([0.6, 0.8])}}


def run(tx, *scales):
    """The state after steps with scaled gradients."""
    state = tx.init(GRADS)
    for scale in scales:
        _, state = tx.update(jax.tree.map(lambda g: scale * g, GRADS), state, GRADS)  # noqa: B023
    return state


def test_statistics_per_group_and_for_the_whole():
    state = run(oc.clip_by_layerwise_norm(2.0), 1.0, 0.1, np.nan, 1.0)
    found = oc.metrics(state, GRADS, oc.groups.layer())
    expected = {
        "clip/norm_before/a": 5,
        "clip/norm_after/a": 2,
        "clip/limit/a": 2,
        "clip/factor/a": 0.4,
        "clip/clipped_fraction/a": 0.5,
        "clip/nonfinite_count/a": 1,
        "clip/norm_before/b": 1,
        "clip/norm_after/b": 1,
        "clip/limit/b": 2,
        "clip/factor/b": 1,
        "clip/clipped_fraction/b": 0,
        "clip/nonfinite_count/b": 1,
        "clip/norm_before/whole": 26**0.5,
        "clip/norm_after/whole": 5**0.5,
        "clip/limit/whole": 8**0.5,
        "clip/factor/whole": (5 / 26) ** 0.5,
        "clip/clipped_fraction/whole": 0.5,
        "clip/nonfinite_count/whole": 1,
    }
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)


def test_norm_before_and_after_are_not_to_be_confused():
    """The norm before the clip is what came in, however hard it was clipped."""
    found = oc.metrics(run(oc.clip_by_global_norm(1.0), 100.0))
    np.testing.assert_allclose(found["clip/norm_before/whole"], 100 * 26**0.5, rtol=1e-6)
    np.testing.assert_allclose(found["clip/norm_after/whole"], 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("policy", "entry", "factor"),
    [
        ("propagate", 0.25, 1.0),
        ("propagate", 0.0, 1.0),
        ("propagate", np.nan, np.nan),
        ("propagate", np.inf, np.nan),
        ("zero", np.nan, 0.0),
    ],
)
def test_the_factor_of_the_whole_is_a_ratio_where_there_is_one(policy, entry, factor):
    """Of zeros it is 1; of what is not finite it says what became of that."""
    tx, grads = oc.clip_by_global_norm(1.0, nonfinite=policy), {"w": jnp.full(2, entry)}
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(oc.metrics(state)["clip/factor/whole"], factor)


@pytest.mark.parametrize(("policy", "factor"), [("propagate", np.nan), ("zero", 0.0)])
@pytest.mark.parametrize("entry", [np.nan, np.inf])
def test_the_factor_of_the_whole_with_one_group_that_is_not_finite(policy, factor, entry):
    """Nothing beside it, however large the other group is."""
    tx = oc.clip_by_leafwise_norm(5.0, nonfinite=policy)
    grads = {"bad": jnp.full(2, entry), "good": jnp.full(2, 3.0)}
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(state.whole.factor, factor)
    assert state.factor[1] == 1


def test_metrics_inside_jit_equal_those_outside():
    state = run(oc.clip_by_layerwise_norm(2.0), 1.0)
    inside = jax.jit(lambda state: oc.metrics(state, GRADS, oc.groups.layer()))(state)
    outside = oc.metrics(state, GRADS, oc.groups.layer())
    assert {k: float(v) for k, v in inside.items()} == pytest.approx(
        {k: float(v) for k, v in outside.items()}
    )


def test_several_states_are_numbered():
    tx = optax.chain(oc.clip_by_layerwise_norm(2.0), oc.clip_by_global_norm(1.0), optax.sgd(0.1))
    found = oc.metrics(
        run(tx, 1.0), GRADS, [oc.groups.layer(), oc.groups.whole()], prefix="train/clip", separator="|"
    )
    assert "train/clip_0|norm_after|a" in found
    np.testing.assert_allclose(found["train/clip_1|norm_before|whole"], 5**0.5, rtol=1e-6)


def test_groups_of_many_rows_are_put_together():
    grads = {"kernel": jnp.stack([jnp.array([3.0, 4.0])] * 100, axis=1), "bias": jnp.ones(4)}
    tx = oc.clip_by_unitwise_norm(2.5)
    _, state = tx.update(grads, tx.init(grads))
    found = oc.metrics(state, grads, oc.groups.unit())
    assert len(found) == 3 * 6
    np.testing.assert_allclose(found["clip/norm_before/kernel"], 50, rtol=1e-6)
    np.testing.assert_allclose(found["clip/norm_after/kernel"], 25, rtol=1e-6)
    np.testing.assert_allclose(found["clip/factor/kernel"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(found["clip/clipped_fraction/kernel"], 1)
    assert "clip/factor/kernel[99]" in oc.metrics(state, grads, oc.groups.unit(), expand=100)


def test_the_parts_of_a_partition_are_read_one_by_one():
    """Each part has its own state and saw the other's leaves masked."""
    clips = {"leafwise": oc.clip_by_leafwise_norm(1.0), "global": oc.clip_by_global_norm(1.0)}
    tx = optax.partition(clips, {"a": "leafwise", "b": "global"})
    grads = {
        "a": {"v": jnp.array([6.0]), "w": jnp.array([8.0])},
        "b": {"v": jnp.array([3.0]), "w": jnp.array([4.0])},
    }
    _, state = tx.update(grads, tx.init(grads))
    own = {"a": grads["a"], "b": jax.tree.map(lambda _: optax.MaskedNode(), grads["b"])}
    found = oc.metrics(state.inner_states["leafwise"], own, oc.groups.leaf())
    assert found["clip/norm_before/a/v"] == 6
    assert found["clip/norm_before/a/w"] == 8
    np.testing.assert_allclose(
        oc.metrics(state.inner_states["global"])["clip/norm_before/whole"], 5, rtol=1e-6
    )


def test_metrics_outside_jit_are_numpy_scalars():
    """Also where many rows are put together, and for the whole."""
    grads = {"kernel": jnp.ones((2, 100)), "bias": jnp.ones(4)}
    tx = oc.clip_by_unitwise_norm(1.0)
    _, state = tx.update(grads, tx.init(grads))
    assert all(isinstance(x, np.generic) for x in oc.metrics(state, grads, oc.groups.unit()).values())


def test_clipping_by_value_counts_entries_and_steps():
    tx = oc.clip_by_value(3.5)
    state = run(tx, 1.0, 0.1, np.nan)
    assert (state.step, state.clipped, state.nonfinite) == (3, 1, 1)
    _, state = tx.update(GRADS, state)
    assert state.share == 0.25


def test_metrics_read_the_states_of_spectral_methods():
    """Every matrix is a group: of the leaf, or of one layer of a stacked leaf."""
    grads = {"w": jnp.diag(jnp.array([3.0, 4.0])), "stack": jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])}
    tx = optax.chain(oc.clip_singular_values(2.5, stacked="stack"), optax.sgd(0.1))
    _, state = tx.update(grads, tx.init(grads))
    groups = oc.groups.stacked(oc.groups.leaf(), "stack")
    found = oc.metrics(state, grads, groups, norm=oc.norms.spectral())
    norms = [found[f"clip/norm_before/{name}"] for name in ("w", "stack[0]", "stack[1]", "whole")]
    np.testing.assert_allclose(norms, [4, 1, 2, 4], rtol=1e-5)
    assert found["clip/norm_after/w"] == pytest.approx(2.5)


def test_metrics_read_what_skip_updates_dropped_and_the_clip_in_it():
    """By group the norms at fault, for the whole any fault; keys of the clip inside are what they were."""
    inner = optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1))
    tx = oc.skip_updates(inner, 10.0, groups=oc.groups.layer(), watch="both")
    state = tx.init(GRADS)
    for first, loss in ((1.0, 2.0), (9.0, 3.0), (1.0, jnp.nan), (0.5, 4.0)):
        grads = {"a": {"w": first * GRADS["a"]["w"]}, "b": GRADS["b"]}
        _, state = tx.update(grads, state, GRADS, value=jnp.float32(loss))
    found = oc.metrics(state, GRADS, [oc.groups.layer(), oc.groups.whole()])
    expected = {
        "clip/skip_norm/a": 2.5,
        "clip/skip_limit/a": 10,
        "clip/skipped_fraction/a": 0.25,
        "clip/skip_norm/b": 1,
        "clip/skip_limit/b": 10,
        "clip/skipped_fraction/b": 0,
        "clip/skip_norm/whole": 2.5,
        "clip/skip_limit/whole": 10,
        "clip/skipped_fraction/whole": 0.5,
        "clip/loss/whole": 4,
        "clip/loss_limit/whole": 10,
        "clip/loss_skipped_fraction/whole": 0.25,
    }
    clip = oc.metrics(state.inner, GRADS)
    assert list(found) == [*expected, *clip]
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-6)
    assert {key: found[key] for key in clip} == clip
    # Groups that are the clip's alone, or the parameters unknown: the skip is reported as a whole.
    whole = {key: value for key, value in expected.items() if key.endswith("whole")}
    for some in (oc.metrics(state, GRADS, oc.groups.whole()), oc.metrics(state, GRADS, [oc.groups.whole()])):
        assert list(some) == [*whole, *clip]
    assert set(oc.metrics(state)) == {*whole, *(key for key in clip if key.endswith("whole"))}


def test_several_states_of_one_kind_are_numbered_and_others_are_not():
    tx = oc.skip_updates(oc.skip_updates(oc.clip_by_global_norm(1.0), 50.0), 10.0)
    found = oc.metrics(run(tx, 1.0))
    assert found["clip_0/skip_limit/whole"] == 10
    assert found["clip_1/skip_limit/whole"] == 50
    assert found["clip/limit/whole"] == 1


def test_metrics_read_what_is_carried():
    """The buffer and what its bound took, beside the clip that cut it off."""
    tx = optax.chain(oc.carry_clipped(oc.clip_by_global_norm(1.0), bound=3.0), optax.sgd(0.1))
    found = oc.metrics(run(tx, 1.0), GRADS)
    norm = 26**0.5
    assert found["clip/carry_norm/whole"] == pytest.approx(3)
    assert found["clip/carry_lost/whole"] == pytest.approx(norm - 4)
    assert found["clip/norm_before/whole"] == pytest.approx(norm)
    assert not any(key.startswith("clip/carry") and not key.endswith("/whole") for key in found)


def test_metrics_read_what_became_of_each_example():
    tx = oc.clip_per_example(2.0, groups=oc.groups.layer())
    examples = {
        "a": {"w": jnp.array([[3.0, 4.0], [0.6, 0.8], [jnp.nan, 0.0], [0.0, 3.0]])},
        "b": {"w": jnp.array([[0.3, 0.4]] * 4)},
    }
    _, state = tx.update(examples, tx.init(GRADS))
    found = oc.metrics(state, GRADS, oc.groups.layer())
    expected = {
        "clip/example_norm/a": 3,
        "clip/example_limit/a": 2,
        "clip/example_clipped_fraction/a": 0.5,
        "clip/example_nonfinite_count/a": 1,
        "clip/example_norm/b": 0.5,
        "clip/example_limit/b": 2,
        "clip/example_clipped_fraction/b": 0,
        "clip/example_nonfinite_count/b": 0,
        "clip/example_norm/whole": 3,
        "clip/example_limit/whole": 2,
        "clip/example_clipped_fraction/whole": 0.5,
        "clip/example_nonfinite_count/whole": 1,
    }
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)
    inside = jax.jit(lambda state: oc.metrics(state, GRADS, oc.groups.layer()))(state)
    assert {k: float(v) for k, v in inside.items()} == {k: float(v) for k, v in found.items()}
    with pytest.raises(ValueError, match="metrics: the state has 2 rows; these groups and parameters have 1"):
        oc.metrics(state, GRADS)


def test_the_largest_stands_for_many_rows_of_examples_and_skips():
    grads = {"kernel": jnp.stack([jnp.array([3.0, 4.0]), jnp.array([0.3, 0.4])], axis=1)}
    tx = oc.skip_updates(oc.clip_by_value(1.0), 2.0, groups=oc.groups.unit(), each=True)
    _, state = tx.update(grads, tx.init(grads))
    found = oc.metrics(state, grads, oc.groups.unit(), expand=1)
    assert found["clip/skip_norm/kernel"] == 5
    assert found["clip/skipped_fraction/kernel"] == 1
    assert oc.metrics(state, grads, oc.groups.unit())["clip/skipped_fraction/kernel[1]"] == 0


def test_metrics_read_methods_that_go_by_entry():
    """Of the whole, but for the one that has a bound for each leaf; beside a clip by norm."""
    grads = {"a": jnp.array([3.0, 0.5]), "b": jnp.array([0.2, jnp.nan])}
    counts = {"entry_clipped_fraction": 1, "entry_nonfinite_count": 1, "entry_clipped_share": 0.25}
    tx = optax.chain(oc.clip_by_value(1.0), oc.clip_by_leafwise_norm(9.0), optax.sgd(0.1))
    _, state = tx.update(grads, tx.init(grads))
    found = oc.metrics(state, grads, oc.groups.leaf())
    assert {name: found.pop(f"clip/{name}/whole") for name in counts} == counts
    assert found.keys() == oc.metrics(state[1], grads, oc.groups.leaf()).keys()
    assert found["clip/norm_before/a"] == pytest.approx(1.25**0.5)
    inside = jax.jit(oc.metrics)(state)
    assert {name: inside[f"clip/{name}/whole"] for name in counts} == counts
    for tx in (oc.acclip(), oc.mask_spikes()):
        _, state = tx.update(grads, tx.init(grads))
        assert list(oc.metrics(state, grads)) == [f"clip/{name}/whole" for name in counts]
    tx = oc.adaptive_value_clip(0.5)
    _, state = tx.update(grads, tx.init(grads))
    found = oc.metrics(state, grads)
    assert found["clip/entry_limit/a"] == found["clip/entry_limit/whole"] == 3
    assert (found["clip/entry_nonfinite_count/a"], found["clip/entry_nonfinite_count/b"]) == (0, 1)
    assert found["clip/entry_clipped_share/whole"] == state.share
    two = oc.metrics((state, oc.clip_by_value(1.0).init(grads)))
    assert {"clip_0/entry_limit/whole", "clip_1/entry_clipped_share/whole"} < two.keys()


def test_metrics_read_stable_adam_by_leaf():
    """Whatever the groups are, its rows are the leaves."""
    grads = {"dense": {"kernel": jnp.array([3.0, 0.5]), "bias": jnp.array([jnp.inf])}}
    tx = oc.stable_adamw(1e-3)
    state = tx.init(grads)
    for k in (1, 1, 100):
        _, state = tx.update(jax.tree.map(lambda x: k * x, grads), state, grads)  # noqa: B023
    found = oc.metrics(state, grads)
    assert found["clip/rms_ratio/dense/kernel"] > 1
    assert found["clip/rms_clipped_fraction/dense/kernel"] == pytest.approx(1 / 3)
    assert found["clip/rms_nonfinite_count/dense/bias"] == 3


def test_metrics_read_resets_and_the_clip_inside():
    tx = oc.reset_momentum(optax.chain(oc.clip_by_global_norm(1.0), optax.trace(0.9)), period=2, warmup=1)
    state = tx.init(GRADS)
    for _ in range(5):
        _, state = tx.update(GRADS, state, GRADS)
    found = oc.metrics(state)
    assert found["clip/reset_count/whole"] == 2
    assert found["clip/norm_before/whole"] == pytest.approx(float(optax.tree.norm(GRADS)))


def test_trees_without_leaves_have_nothing_to_report_but_counts():
    tx = oc.skip_updates(oc.clip_by_value(1.0))
    found = oc.metrics(tx.init({}), {})
    names = ["skipped_fraction", "loss", "loss_limit", "loss_skipped_fraction"]
    names += ["entry_clipped_fraction", "entry_nonfinite_count", "entry_clipped_share"]
    assert set(found) == {f"clip/{name}/whole" for name in names}
    assert set(oc.metrics(oc.scale_by_stable_adam().init({}), {})) == set()


def test_rows_with_a_nan_have_no_factor_of_1_together():
    """Units that came out NaN, or zero, are not said to be untouched."""
    grads = {"kernel": jnp.ones((2, 100)).at[0, 3].set(jnp.nan)}
    for nonfinite, expected in (("propagate", np.nan), ("zero", 0.0)):
        tx = oc.rescale_by_norm(1.0, groups=oc.groups.unit(), nonfinite=nonfinite)
        _, state = tx.update(grads, tx.init(grads))
        found = oc.metrics(state, grads, oc.groups.unit())
        np.testing.assert_array_equal(found["clip/factor/kernel"], expected)
        np.testing.assert_array_equal(found["clip/factor/whole"], expected)


def test_many_matrices_together_have_the_largest_singular_value():
    """As the whole has, whatever norm the other states are of."""
    grads = {"s": jnp.tile(jnp.eye(2), (100, 1, 1))}
    tx = oc.clip_singular_values(2.5, stacked="s")
    _, state = tx.update(grads, tx.init(grads))
    found = oc.metrics(state, grads, oc.groups.stacked(oc.groups.leaf(), "s"))
    for statistic in ("norm_before", "norm_after", "limit"):
        np.testing.assert_allclose(found[f"clip/{statistic}/s"], found[f"clip/{statistic}/whole"], rtol=1e-6)
    np.testing.assert_allclose(found["clip/norm_before/s"], 1, rtol=1e-6)
