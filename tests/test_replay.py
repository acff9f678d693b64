"""Replay on recorded norms is what training would have done: the same limits, responses and numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import given, settings, strategies as st

import optaxclip as oc
from optaxclip._rescale import policy_of

SHAPES = {
    "embed": {"table": (5, 3)},
    "layers": {"bias": (3, 4), "kernel": (3, 2, 4)},
    "head": {"bias": (2,), "kernel": (4, 2)},
}
STEPS = 64
SPIKE, ZERO, NAN, INF = 40, 43, 46, 49  # steps; behind the longest warm-up below
# Norms are recorded in float32, and those of groups are put together from those of leaves: training adds
# entries in another order. That makes a difference of a few units in the last place, 6e-8 each.
CLOSE = {"rtol": 2e-6}

LEAF, LAYER, UNIT = oc.groups.leaf(), oc.groups.layer(), oc.groups.unit()
STACKED = oc.groups.stacked(LAYER, "^layers/")
SOME = oc.groups.regex({None: "^head/bias", "kernels": "kernel", "rest": ".*"})
ROLES = oc.groups.regex(
    {oc.groups.measured_only("x"): "head/kernel", oc.groups.scaled_only("x"): "bias", "x": "table", "y": ""}
)
PER_GROUP = oc.limits.per_group({"embed": 1.0, "layers": oc.limits.ema(1.1, 0.9), "head": jnp.inf})
SCHEDULE = optax.linear_schedule(4.0, 0.5, STEPS)


def rescale(limit, **options):
    return functools.partial(oc.rescale_by_norm, limit, **options)


# What each method is called by in `optaxclip`, then what is special about it.
METHODS = {
    "clip_by_global_norm": lambda: oc.clip_by_global_norm(2.0),
    "clip_by_global_norm, schedule": lambda: oc.clip_by_global_norm(SCHEDULE),
    "clip_by_global_norm, eps": lambda: oc.clip_by_global_norm(2.0, eps=0.1),
    "clip_by_global_norm, zero": lambda: oc.clip_by_global_norm(2.0, nonfinite="zero"),
    "clip_by_layerwise_norm": lambda: oc.clip_by_layerwise_norm(1.0),
    "clip_by_leafwise_norm": lambda: oc.clip_by_leafwise_norm(1.0),
    "clip_by_leafwise_norm, zero": lambda: oc.clip_by_leafwise_norm(1.0, nonfinite="zero"),
    "clip_by_groupwise_norm": lambda: oc.clip_by_groupwise_norm(1.0, SOME),
    "clip_by_groupwise_norm, roles": lambda: oc.clip_by_groupwise_norm(1.0, ROLES),
    "clip_by_groupwise_norm, roles, zero": lambda: oc.clip_by_groupwise_norm(1.0, ROLES, nonfinite="zero"),
    "clip_by_groupwise_norm, stacked": lambda: oc.clip_by_groupwise_norm(1.0, STACKED),
    "clip_by_groupwise_norm, depth": lambda: oc.clip_by_groupwise_norm(1.0, oc.groups.depth(1)),
    "clip_by_unitwise_norm": lambda: oc.clip_by_unitwise_norm(0.7),
    "clip_by_block_rms": lambda: oc.clip_by_block_rms(0.3),
    "adaptive_grad_clip": lambda: oc.adaptive_grad_clip(0.3),
    "adaptive_grad_clip, layer": lambda: oc.adaptive_grad_clip(0.3, groups=LAYER),
    "normalize_by_global_norm": lambda: oc.normalize_by_global_norm(),
    "normalize_by_layerwise_norm": lambda: oc.normalize_by_layerwise_norm(),
    "autoclip": lambda: oc.autoclip(50.0),
    "autoclip, window": lambda: oc.autoclip(50.0, window=8, groups=LAYER),
    "quantile_clip": lambda: oc.quantile_clip(60.0, window=8),
    "zclip": lambda: oc.zclip(0.9, 1.0, max_norm=None, warmup=5),
    "zclip, mean": lambda: oc.zclip(0.9, 1.0, max_norm=9.0, warmup=5, mode="mean", groups=LAYER),
    "zclip, fixed": lambda: oc.zclip(0.9, 1.0, None, 5, mode="fixed", learn_from_spikes=False, groups=LEAF),
    "adagc": lambda: oc.adagc(warmup=10),
    "clip_by_historical_norm": lambda: oc.clip_by_historical_norm(0.5, window=8, warmup=4),
    "clip_by_adaptive_quantile": lambda: oc.clip_by_adaptive_quantile(groups=LAYER),
    "aggc": lambda: oc.aggc(0.8, 1.2),
    "adanorm": lambda: oc.adanorm(),
    "gradient_stabilizer": lambda: oc.gradient_stabilizer(),
    "normalize_by_running_norm": lambda: oc.normalize_by_running_norm(groups=STACKED),
    "automatic_clip": lambda: oc.automatic_clip(),
    "psac_clip": lambda: oc.psac_clip(groups=LAYER),
    "delta_clip": lambda: oc.delta_clip(0.5, 0.1),
    "smooth_clip": lambda: oc.smooth_clip(),
    "smooth_clip, sqrt": lambda: oc.smooth_clip(kind="sqrt", groups=LEAF),
    "lamb_trust_ratio": lambda: oc.lamb_trust_ratio(),
    "rescale_by_norm, budget": rescale(oc.limits.budget(1.0), groups=LEAF),
    "rescale_by_norm, budget by size": rescale(oc.limits.budget(1.0, "size"), groups=SOME),
    "rescale_by_norm, per_group": rescale(PER_GROUP, groups=LAYER),
    "rescale_by_norm, at_most": rescale(oc.limits.at_most(SCHEDULE, oc.limits.ema(1.2)), groups=LAYER),
    "rescale_by_norm, after": rescale(oc.limits.after(9, jnp.inf, oc.limits.zscore(1.0, warmup=5))),
    "rescale_by_norm, relative": rescale(oc.limits.relative(0.3), groups=ROLES),
    "rescale_by_norm, dropped": rescale(2.0, groups=LAYER, response=oc.responses.zero()),
    "rescale_by_norm, band": rescale(2.0, groups=LAYER, response=oc.responses.band(0.9, most_up=1.5)),
    "rescale_by_norm, roles, l1": rescale(4.0, groups=ROLES, norm=oc.norms.l1()),
    "rescale_by_norm, linf": rescale(0.5, groups=LAYER, norm=oc.norms.linf()),
    "rescale_by_norm, lp": rescale(1.0, groups=SOME, norm=oc.norms.lp(3)),
    "rescale_by_norm, roles, rms": rescale(0.5, groups=ROLES, norm=oc.norms.rms()),
    "rescale_by_norm, roles, rms of l2": rescale(0.5, groups=ROLES, norm=oc.norms.rms()),
    "rescale_by_norm, rms": rescale(oc.limits.ema(1.05), groups=LAYER, norm=oc.norms.rms()),
}
# Recordings other than of the L2 norms of leaves.
RECORDED = {
    "clip_by_groupwise_norm, stacked": {"groups": oc.groups.stacked(LEAF, "^layers/")},
    "normalize_by_running_norm": {"groups": oc.groups.stacked(UNIT, "^layers/")},
    "clip_by_unitwise_norm": {"groups": UNIT},
    "adaptive_grad_clip": {"groups": UNIT, "params": True},
    "adaptive_grad_clip, layer": {"params": True},
    "lamb_trust_ratio": {"params": True},
    "rescale_by_norm, relative": {"groups": UNIT, "params": True},
    "rescale_by_norm, roles, l1": {"norm": oc.norms.l1()},
    "rescale_by_norm, linf": {"norm": oc.norms.linf()},
    "rescale_by_norm, lp": {"norm": oc.norms.lp(3)},
    "rescale_by_norm, roles, rms": {"norm": oc.norms.rms()},
    "rescale_by_norm, rms": {"norm": oc.norms.rms()},
}
KINDS = {
    "rescale_by_norm, roles, l1": "l1",
    "rescale_by_norm, linf": "linf",
    "rescale_by_norm, lp": "lp",
    "rescale_by_norm, roles, rms": "rms",
    "rescale_by_norm, rms": "rms",
}


def is_shape(x):
    return isinstance(x, tuple)


def normal(rng, *leading):
    return jax.tree.map(
        lambda shape: rng.normal(size=(*leading, *shape)).astype(np.float32), SHAPES, is_leaf=is_shape
    )


def sequence(seed):
    """Updates and parameters: norms that vary, a spike, a step of zeros, a NaN, an infinity."""
    rng = np.random.default_rng(seed)
    grads, params = normal(rng, STEPS), normal(rng, STEPS)
    for leaf in jax.tree.leaves(grads):
        size = np.exp(0.5 * rng.normal(size=STEPS))
        size[SPIKE], size[ZERO] = 1e4, 0
        leaf *= size.reshape(-1, *[1] * (leaf.ndim - 1)).astype(np.float32)
    grads["layers"]["kernel"][NAN, 1, 1, 2] = np.nan
    grads["head"]["bias"][INF, 0] = np.inf
    return grads, params


@functools.cache
def training(method):
    """The method, and a compiled run of it behind `record`."""
    tx = METHODS[method]()
    chain = optax.chain(oc.record(capacity=STEPS, **RECORDED.get(method, {})), tx)

    @jax.jit
    def run(grads, params):
        def step(state, now):
            updates, state = chain.update(now[0], state, now[1])
            own = state[1]
            return state, (updates, (own.norm, own.limit, own.factor, own.norm_after))

        first = jax.tree.map(lambda x: x[0], params)
        return jax.lax.scan(step, chain.init(first), (grads, params))

    return tx, run


def flat(tree):
    return np.concatenate([np.asarray(x, float).reshape(STEPS, -1) for x in jax.tree.leaves(tree)], axis=1)


def whole(entries, kind):
    return np.array([reference.norm([now], kind, 3) for now in entries])


def cosine(before, after):
    with np.errstate(invalid="ignore", over="ignore"):
        lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        return np.sum(before * after, axis=1) / np.where(lengths > 0, lengths, np.nan)


def same(actual, expected, **close):
    """Close, and finite in the same places; a NaN and an infinity are both not finite."""
    actual, expected = (np.where(np.isfinite(x), x, np.nan) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, **(CLOSE | close))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=2)
@given(seed=st.integers(0, 2**32 - 1))
def test_replay_equals_training(method, seed):
    """Limits, factors and norms of every group, the whole norm before and after, and the angle."""
    tx, run = training(method)
    grads, params = sequence(seed)
    state, (updates, (norm, limit, factor, after)) = run(grads, params)
    recorded = RECORDED.get(method, {})
    history = oc.History.from_state(
        state, SHAPED, recorded.get("groups", LEAF), recorded.get("norm", oc.norms.l2())
    )
    found = history.replay(tx)
    same(found.norm, norm)
    np.testing.assert_allclose(found.limit, limit, **CLOSE)
    same(found.factor, factor)
    same(found.after, after)
    kind = KINDS.get(method, "l2")
    same(found.norm_before, whole(flat(grads), kind))
    same(found.norm_after, whole(flat(updates), kind), rtol=4e-6)
    if kind in ("l2", "rms"):
        same(found.cosine, cosine(flat(grads), flat(updates)), rtol=0, atol=1e-6)
    else:
        assert np.isnan(found.cosine).all()
    clipped = ((np.asarray(factor) != 1) & np.isfinite(norm)).any(axis=1).mean()
    assert found.clipped == pytest.approx(clipped)
    assert found.steps.tolist() == list(range(STEPS))


SHAPED = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, np.float32), SHAPES, is_leaf=is_shape)
ARGUMENTS = [(), (1.0,), (1.0, oc.groups.leaf())]


def made_by(factory):
    """What a public function makes of the fewest arguments that will do."""
    for arguments in ARGUMENTS:
        try:
            return factory(*arguments)
        except (TypeError, ValueError, AttributeError):
            continue
    return None


def test_every_method_made_by_rescale_by_norm_is_replayed_here():
    """The list above lacks none."""
    public = [name for name in oc.__all__ if name.islower() and callable(getattr(oc, name))]
    able = {name for name in public if policy_of(made_by(getattr(oc, name)))}
    assert able == {method.partition(",")[0] for method in METHODS}


# --- what is passed to it -----------------------------------------------------------------------------------

HISTORY = oc.History(["a/kernel", "a/bias", "b/kernel"], [[3.0, 4.0, 12.0], [0.3, 0.4, 1.2], [0, 0, 0]])


def test_a_limit_alone_is_on_the_whole_update():
    """A number stands for clipping by the global norm."""
    found, expected = HISTORY.replay(6.5), HISTORY.replay(oc.clip_by_global_norm(6.5))
    assert found.names == expected.names == ("whole",)
    assert found.factor[:, 0].tolist() == expected.factor[:, 0].tolist() == [0.5, 1, 1]
    assert found.clipped == 1 / 3


def test_all_that_rescale_by_norm_takes_can_be_passed():
    options = {"response": oc.responses.normalize(), "groups": LAYER, "eps": 0.5, "nonfinite": "zero"}
    found = HISTORY.replay(2.0, **options)
    expected = HISTORY.replay(oc.rescale_by_norm(2.0, **options))
    for field in ("norm", "limit", "factor", "after", "norm_before", "norm_after", "cosine"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))


def test_what_is_left_alone_stays_and_counts_towards_the_whole():
    found = HISTORY.replay(1.0, oc.groups.regex({None: "^a/", "b": "^b/"}))
    np.testing.assert_allclose(found.norm_before, [13, 1.3, 0])
    np.testing.assert_allclose(found.norm_after, [np.sqrt(26), np.sqrt(1.25), 0], rtol=1e-6)
    assert found.norm.shape == (3, 1)


def test_zeros_have_no_angle():
    assert np.isnan(HISTORY.replay(1.0).cosine).tolist() == [False, False, True]
    assert np.isnan(HISTORY.replay(1.0, response=oc.responses.zero()).cosine).tolist() == [True, True, True]


def test_norms_at_the_ends_of_the_range():
    """Whole norms beyond that of float32 are clipped right, as they are in training."""
    history = oc.History(["a", "b"], [[3e30, 4e30], [3e-30, 4e-30], [3e38, 4e38], [3e45, 4e45]])
    found = history.replay(1.0)
    np.testing.assert_allclose(found.factor[:, 0], [2e-31, 1, 2e-39, 2e-46], rtol=1e-6)
    np.testing.assert_allclose(found.after[:, 0], [1, 5e-30, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(found.norm_after, [1, 5e-30, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(found.cosine, 1, rtol=1e-12)


def test_nothing_recorded_gives_nothing():
    found = oc.History(["a"], np.zeros((0, 1))).replay(oc.zclip())
    assert found.factor.shape == (0, 1)
    assert found.norm_after.shape == found.cosine.shape == (0,)
    assert found.clipped == 0


def late(limit, norms):
    """Replays on the last 4 of 10 updates, and on these alone."""
    last = oc.History(["a"], norms[6:, None], steps=range(6, 10))
    return last.replay(limit), oc.History(["a"], norms[6:, None]).replay(limit)


def test_schedules_are_asked_for_the_recorded_steps():
    found, _ = late(lambda step: step.astype(jnp.float32), np.full(10, 100.0))
    assert found.limit[:, 0].tolist() == [6, 7, 8, 9]


def test_schedules_stop_where_the_counter_of_training_does():
    """A step is an int32, and stays the largest."""
    last = 2**31 - 1
    history = oc.History(["a"], np.ones((4, 1)), steps=[0, last, last + 1, 2**40])
    found = history.replay(lambda step: jnp.where(step < 0, -1.0, step.astype(jnp.float32)))
    assert found.limit[:, 0].tolist() == [0, 2.0**31, 2.0**31, 2.0**31]
    assert history.replay(oc.limits.after(5, 9.0, oc.limits.ema(2.0))).limit[:, 0].tolist() == [9, 2, 2, 2]


def test_limits_that_remember_start_with_the_first_recorded_update():
    """Their warm-up is counted from there: what came before is not known."""
    found, alone = late(oc.adagc(warmup=2, max_norm=9.0), np.arange(10.0))
    assert found.limit.tolist() == alone.limit.tolist()
    assert found.steps.tolist() == [6, 7, 8, 9]


def test_schedules_inside_such_limits_count_from_there_too():
    """A limit has one counter for all it is made of."""
    ramp = oc.limits.schedule(lambda step: step.astype(jnp.float32))
    found, alone = late(oc.limits.after(2, ramp, oc.limits.ema(2.0)), np.full(10, 100.0))
    assert found.limit.tolist() == alone.limit.tolist()
    assert found.limit[:2, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: HISTORY.replay(oc.clip_by_global_norm(1.0), oc.groups.leaf()),
        lambda: HISTORY.replay(oc.clip_by_global_norm(1.0), response=oc.responses.zero()),
        lambda: HISTORY.replay(oc.clip_by_global_norm(1.0), eps=1e-6),
        lambda: HISTORY.replay(oc.clip_by_global_norm(1.0), nonfinite="zero"),
    ],
)
def test_a_transformation_is_passed_alone(call):
    with pytest.raises(TypeError, match=r"^History\.replay: a transformation has groups and all else"):
        call()


@pytest.mark.parametrize(
    "transformation",
    [oc.clip_by_value(1.0), optax.clip_by_global_norm(1.0), optax.chain(oc.zclip(), optax.sgd(0.1)), (1.0,)],
    ids=["element-wise", "of Optax", "chain", "tuple"],
)
def test_what_is_no_policy_on_norms_cannot_be_replayed(transformation):
    with pytest.raises(TypeError, match=r"is neither a limit nor made by rescale_by_norm"):
        HISTORY.replay(transformation)


L1 = oc.History(["a", "b"], [[1.0, 2.0]], norm="l1")
SPLIT = oc.groups.unit(0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: HISTORY.replay(-1.0), ValueError, r"^History\.replay: limit is -1\.0, not among"),
        (lambda: HISTORY.replay("1"), TypeError, r"^History\.replay: limit is '1', of type str"),
        (lambda: HISTORY.replay(1.0, "leaf"), TypeError, r"^History\.replay: groups is 'leaf'"),
        (lambda: HISTORY.replay(1.0, nonfinite="x"), ValueError, r"^History\.replay: nonfinite is 'x'"),
        (lambda: HISTORY.replay(oc.limits.relative(0.1)), ValueError, r"with record\(params=True"),
        (lambda: L1.replay(oc.zclip()), ValueError, r"policy measures l2, the recording holds l1"),
        (lambda: HISTORY.replay(oc.clip_by_block_rms(1.0)), ValueError, r"rms from l2 takes the sizes"),
        (
            lambda: HISTORY.replay(oc.limits.budget(1.0, "size"), LEAF),
            ValueError,
            r"the limit depends on the sizes of the groups",
        ),
        (lambda: HISTORY.replay(1.0, SPLIT), ValueError, r"depend on the shapes of leaves"),
        (
            lambda: HISTORY.regroup(LAYER).replay(1.0, LEAF),
            ValueError,
            r"these groups divide row 'a', which was recorded as one",
        ),
    ],
)
def test_errors_of_replay(call, error, text):
    with pytest.raises(error, match=text):
        call()
