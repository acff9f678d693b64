"""Together with what else Optax has: lookahead, Muon, schedule-free, SAM, by parts and masked."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import optaxclip as oc

PARAMS = {
    "embed": {"table": np.float32(np.random.default_rng(0).normal(size=(5, 4)))},
    "head": {
        "kernel": np.float32(np.random.default_rng(1).normal(size=(4, 3))),
        "bias": np.zeros(3, np.float32),
    },
}
LAYER = oc.groups.layer()


def loss(params):
    """Of a linear model: the mean squared distance to one."""
    return jnp.mean((params["embed"]["table"] @ params["head"]["kernel"] + params["head"]["bias"] - 1) ** 2)


def clipped(limit=0.1):
    return oc.clip_by_layerwise_norm(limit)


def lookahead():
    return optax.lookahead(optax.chain(clipped(), optax.sgd(0.5)), sync_period=2, slow_step_size=0.5)


def composed():
    return {
        "muon": optax.chain(clipped(), contrib.muon(0.1)),
        "muon, clipped behind": optax.chain(contrib.muon(0.1), clipped()),
        "schedule_free": contrib.schedule_free(optax.chain(clipped(), optax.sgd(0.5)), 0.5),
        "schedule_free_adamw": optax.chain(clipped(), contrib.schedule_free_adamw(0.1)),
        "sam": contrib.sam(
            optax.chain(clipped(), optax.sgd(0.5)), optax.chain(contrib.normalize(), optax.sgd(0.01)), 2
        ),
        "adam": optax.chain(clipped(), optax.adam(0.1)),
        "lion": optax.chain(clipped(), optax.lion(0.01)),
        "flatten": optax.flatten(optax.chain(oc.clip_by_global_norm(0.1), optax.adam(0.1))),
    }


def steps(tx, params, count=4):
    """The parameters and states of some steps in one scan, which wants a state of fixed structure."""

    def body(carry, _):
        params, state = carry
        seen = params.fast if isinstance(params, optax.LookaheadParams) else params
        value, grads = jax.value_and_grad(loss)(seen)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.jit(lambda params: jax.lax.scan(body, (params, tx.init(params)), length=count))(params)


@pytest.mark.parametrize("name", composed())
def test_it_composes_under_scan_and_metrics_find_it(name):
    """The loss falls, the state keeps its structure, and what was measured is found."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    (_, state), values = steps(composed()[name], params)
    assert values[-1] < values[0]
    logs = oc.metrics(state)
    assert logs["clip/norm_before/whole"] > 0
    assert logs["clip/norm_after/whole"] <= 0.1 * 2**0.5 * (1 + 1e-6)


def test_lookahead_clips_the_fast_parameters():
    """Optax hands `init` and `update` the fast ones alone."""
    params = optax.LookaheadParams.init_synced(jax.tree.map(jnp.asarray, PARAMS))
    (params, state), values = steps(lookahead(), params)
    assert values[-1] < values[0]
    logs = oc.metrics(state, params.fast, LAYER)
    assert logs["clip/norm_after/head"] == pytest.approx(0.1, rel=1e-5)


def test_sam_clips_the_gradient_of_the_ascended_point_only():
    """Inside the optimizer of SAM, clipping sees every second gradient; in front of SAM it sees all."""
    inside = composed()["sam"]
    front = optax.chain(
        clipped(), contrib.sam(optax.sgd(0.5), optax.chain(contrib.normalize(), optax.sgd(0.01)), 2)
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    assert optax.tree.get(steps(inside, params)[0][1], "RescaleState").step == 2
    assert optax.tree.get(steps(front, params)[0][1], "RescaleState").step == 4


def test_clipping_behind_muon_bounds_what_is_applied():
    """The update of orthogonal matrices has a norm of its own, whatever the gradient's."""
    tx = optax.chain(contrib.muon(10.0), clipped(0.1))
    params = jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    for norm in oc.group_norms(updates, LAYER).values():
        assert norm <= 0.1 * (1 + 1e-6)


def test_what_stands_in_front_of_the_clip_is_clipped_with_it():
    """Moments and decay of weights in front of it, neither behind it."""
    decay, params = optax.add_decayed_weights(10.0), jax.tree.map(jnp.asarray, PARAMS)

    def norms(*parts):
        tx = optax.chain(*parts)
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        return list(oc.group_norms(updates, LAYER).values())

    for front in (decay, optax.adam(0.1)):
        np.testing.assert_allclose(norms(front, clipped(0.01)), [0.01, 0.01], rtol=1e-5)
        assert min(norms(clipped(0.01), front)) > 0.1


def test_each_part_of_a_partition_has_its_own_global_norm():
    """Optax's parts do not see each other: name groups in one clip to have one norm for all of them."""
    grads = {
        "embed": {"table": jnp.full((5, 4), 1.0)},
        "head": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)},
    }
    labels = {"embed": "embed", "head": "head"}
    parts = optax.partition({label: oc.clip_by_global_norm(1.0) for label in ("embed", "head")}, labels)
    updates, _ = jax.jit(parts.update)(grads, parts.init(grads))
    assert float(optax.tree.norm(updates)) == pytest.approx(2**0.5, rel=1e-5)
    together = optax.chain(
        oc.clip_by_global_norm(1.0),
        optax.partition({"embed": optax.sgd(1.0), "head": optax.sgd(1.0)}, labels),
    )
    updates, _ = jax.jit(together.update)(grads, together.init(grads))
    assert float(optax.tree.norm(updates)) == pytest.approx(1, rel=1e-5)


def test_multi_steps_clips_the_mean_and_apply_if_finite_counts_what_it_drops():
    """Around the whole optimizer, in either order."""
    tx = optax.apply_if_finite(
        optax.MultiSteps(optax.chain(clipped(), optax.sgd(1.0)), 2).gradient_transformation(), 3
    )
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for scale in (1.0, np.nan, 1.0):
        updates, state = update(jax.tree.map(lambda g: scale * g, grads), state, PARAMS)  # noqa: B023
    assert state.total_notfinite == 1
    for norm in oc.group_norms(updates, LAYER).values():
        np.testing.assert_allclose(norm, 0.1, rtol=1e-5)
    assert oc.metrics(state)["clip/nonfinite_count/whole"] == 0


def test_a_chain_by_name_gives_the_state_by_name():
    """`optax.named_chain` keeps a dict, and `optax.tree.get` finds the state by its class."""
    tx = optax.named_chain(("clip", clipped()), ("adam", optax.adam(0.1)))
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert oc.metrics(state["clip"], PARAMS, LAYER) == oc.metrics(state, PARAMS, LAYER)
    chex.assert_trees_all_equal(optax.tree.get(state, "RescaleState"), state["clip"])


def test_a_parameter_called_as_a_field_of_the_state_hides_nothing():
    """`optax.tree.get` by the name of a field would find both; the name of the class finds one."""
    params = {"norm": jnp.ones(2), "limit": jnp.ones(2)}
    tx = optax.chain(clipped(), optax.adam(0.1))
    state = tx.init(params)
    with pytest.raises(KeyError):
        optax.tree.get(state, "norm")
    assert optax.tree.get(state, "RescaleState").norm.shape == (1,)


def test_partition_specs_of_parameters_do_not_reach_the_statistics():
    """`tree_map_params` gives moments the specs of their parameters, and every statistic the other one."""
    from jax.sharding import PartitionSpec as P

    tx = optax.chain(
        oc.clip_by_leafwise_norm(1.0), oc.record(), oc.carry_clipped(oc.adagc()), optax.adam(0.1)
    )
    specs = {"embed": {"table": P("x", None)}, "head": {"kernel": P(None, "x"), "bias": P("x")}}
    state = jax.eval_shape(tx.init, PARAMS)
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )
    assert mapped[3][0].mu == specs
    assert mapped[2].buffer == specs
    assert set(jax.tree.leaves((mapped[:2], mapped[2].inner), is_leaf=lambda x: isinstance(x, P))) == {P()}
