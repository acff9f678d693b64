"""Adaptive limits and other published methods, against float64 readings of their equations."""

import inspect

import chex
import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from versions import enable_x64

import optaxclip as oc

DIRECTIONS = {"a": {"w": np.array([0.6, -0.8]), "b": np.array([0.0])}, "c": {"w": np.array([[1.0], [0.0]])}}


def updates(norm, direction):
    """An update of a norm: one entry carries what is not finite, and zero times it stays zero."""
    scaled = norm * jnp.asarray(direction, jnp.float32)
    return jnp.where(direction == 0, jnp.zeros_like(scaled), scaled)


def run(tx, norms):
    """The norms that come out of a transformation, step by step, and its last state."""
    params = {"x": jnp.zeros(2)}

    def step(state, norm):
        out, state = tx.update({"x": updates(norm, np.array([0.6, -0.8]))}, state)
        return state, out["x"]

    state, out = jax.lax.scan(step, tx.init(params), jnp.asarray(norms, jnp.float32))
    return np.linalg.norm(np.asarray(out, np.float64), axis=1), state


METHODS = {
    "autoclip": (lambda: oc.autoclip(window=1000), reference.autoclip),
    "autoclip, window": (
        lambda: oc.autoclip(70.0, window=16),
        lambda n: reference.autoclip(n, 70.0, 16),
    ),
    "quantile_clip": (
        lambda: oc.quantile_clip(90.0, window=40),
        lambda n: reference.autoclip(n, 90.0, 40, include_current=False),
    ),
    "zclip": (oc.zclip, reference.zclip),
    "zclip, no cap": (lambda: oc.zclip(max_norm=None), lambda n: reference.zclip(n, max_norm=None)),
    "zclip, mean": (
        lambda: oc.zclip(max_norm=None, mode="mean"),
        lambda n: reference.zclip(n, max_norm=None, mode="mean"),
    ),
    "zclip, fixed": (
        lambda: oc.zclip(max_norm=9.0, mode="fixed", z=2.0),
        lambda n: reference.zclip(n, max_norm=9.0, mode="fixed", z=2.0),
    ),
    "zclip, factor, not learning": (
        lambda: oc.zclip(max_norm=None, factor=1.2, learn_from_spikes=False),
        lambda n: reference.zclip(n, max_norm=None, factor=1.2, learn=False),
    ),
    "clip_by_historical_norm": (oc.clip_by_historical_norm, reference.historical),
    "clip_by_historical_norm, as OLMo": (
        lambda: oc.rescale_by_norm(oc.limits.mean_std(6.0, warmup=64, unbiased=True)),
        lambda n: reference.historical(n, k=6.0, unbiased=True),
    ),
    "clip_by_adaptive_quantile": (oc.clip_by_adaptive_quantile, reference.adaptive_quantile),
    "aggc": (oc.aggc, reference.aggc),
    "aggc, band": (
        lambda: oc.aggc(low=0.7, high=1.3, decay=0.9, most_up=1.2, most_down=0.5),
        lambda n: reference.aggc(n, 0.7, 1.3, 0.9, 1.2, 0.5),
    ),
    "aggc, schedules": (
        lambda: oc.aggc(
            optax.linear_schedule(0.98, 0.6, 60, 100),
            optax.linear_schedule(1.0, 1.5, 80, 40),
            decay=0.9,
            most_up=2.0,
            most_down=0.1,
        ),
        lambda n: reference.aggc(
            n,
            reference.linear(golden.STEPS, 0.98, 0.6, 100, 60),
            reference.linear(golden.STEPS, 1.0, 1.5, 40, 80),
            0.9,
            2.0,
            0.1,
        ),
    ),
    "aggc, low above high as published": (
        lambda: oc.aggc(jnp.float32(0.95), optax.linear_schedule(0.6, 0.7, 50, 50), decay=0.95),
        lambda n: reference.aggc(n, 0.95, reference.linear(golden.STEPS, 0.6, 0.7, 50, 50), 0.95),
    ),
    "ema, schedule": (
        lambda: oc.rescale_by_norm(oc.limits.ema(optax.linear_schedule(1.0, 2.0, 100, 50), 0.9)),
        lambda n: reference.aggc(
            n, 0.0, reference.linear(golden.STEPS, 1.0, 2.0, 50, 100), 0.9, most_down=0.0
        ),
    ),
    "adanorm": (oc.adanorm, reference.adanorm),
    "gradient_stabilizer": (oc.gradient_stabilizer, reference.gradient_stabilizer),
    "normalize_by_running_norm": (oc.normalize_by_running_norm, reference.running_norm),
    "automatic_clip": (oc.automatic_clip, lambda n: reference.by_formula(n, lambda n: n / (n + 0.01))),
    "psac_clip": (oc.psac_clip, lambda n: reference.by_formula(n, lambda n: n / (n + 0.1 / (n + 0.1)))),
    "delta_clip": (
        oc.delta_clip,
        lambda n: reference.by_formula(n, lambda n: n * min(1, max(1e-3, 0.1 / n)) if n else 0.0),
    ),
    "smooth_clip": (oc.smooth_clip, lambda n: reference.by_formula(n, lambda n: n / (1 + n))),
    "smooth_clip, sqrt": (
        lambda: oc.smooth_clip(2.0, kind="sqrt"),
        lambda n: reference.by_formula(n, lambda n: 2 * n / np.hypot(2, n)),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_golden_sequences_agree_with_the_equations(method):
    """240 steps with noise, spikes, a NaN, an infinity, a zero and a rise, against NumPy in float64."""
    make, expected = METHODS[method]
    norms = golden.norms(0, median=0.5)
    out, _ = run(make(), norms)
    np.testing.assert_allclose(out, expected(norms.astype(np.float64)), rtol=2e-5)


def test_the_percentile_of_a_whole_run_is_within_two_percent():
    """A histogram in fixed memory, for norms from 1e-12 to 1e12 and at every step."""
    rng = np.random.default_rng(3)
    for q, spread in ((10.0, 1.0), (50.0, 8.0), (99.0, 3.0)):
        norms = np.clip(np.exp(spread * rng.normal(size=200)), 1e-12, 1e12).astype(np.float32)
        _, limits = jax.lax.scan(
            lambda state, n, q=q: _limit(oc.limits.percentile(q), state, n),
            oc.clip_by_global_norm(oc.limits.percentile(q)).init({"x": jnp.zeros(1)}),
            norms,
        )
        exact = [np.percentile(norms[: t + 1], q) for t in range(len(norms))]
        # Between two ranks that are far apart, an error of 2 % in each end is one of 2 % in what is between.
        np.testing.assert_allclose(limits[:, 0], exact, rtol=0.021)


def _limit(limit, state, norm):
    _, state = oc.clip_by_global_norm(limit).update({"x": norm[None]}, state)
    return state, state.limit


@pytest.mark.parametrize("size", [3e-15, 2e13])
def test_the_percentile_of_a_whole_run_is_never_outside_what_was_seen(size):
    """Norms beyond the histogram, which ends at 1e-12 and 1e12, fall into its outermost bins."""
    _, state = run(oc.rescale_by_norm(oc.limits.percentile(50.0)), np.float32([size] * 3))
    np.testing.assert_allclose(state.limit, size, rtol=1e-6)
    # As documented: a checkpoint holds them.
    assert [x.shape for x in jax.tree.leaves(state.rule)] == [(1, 1410), (1,), (1,)]


@pytest.mark.parametrize("method", [oc.gradient_stabilizer, oc.normalize_by_running_norm])
def test_limits_by_moments_are_1_before_there_are_any(method):
    """A group of zeros has had no norm to learn from."""
    assert run(method(), [0.0, np.nan])[1].limit.tolist() == [1]


def test_eps_is_added_to_the_running_root_mean_square():
    """Of 3 and 1 together the first norm, 3, is three quarters."""
    tx = oc.rescale_by_norm(oc.limits.running_rms(eps=1.0), response=oc.responses.normalize())
    np.testing.assert_allclose(run(tx, [3.0])[1].limit, [0.75], rtol=1e-6)


@pytest.mark.parametrize("window", [4, None])
def test_a_percentile_without_the_current_norm_holds_from_the_second_on(window):
    """The first norm has no limit, and is the limit of the second."""
    limit = oc.limits.percentile(50.0, window, include_current=False)
    np.testing.assert_allclose(run(oc.rescale_by_norm(limit), [2.0, 9.0])[0], [2, 2], rtol=1e-6)


@pytest.mark.parametrize("scale", [2.0**-16, 2.0**16])
def test_the_limits_of_zscore_scale_with_the_norms(scale):
    """What is a spike, and what it is clipped to, does not depend on the unit that norms are measured in."""
    norms = np.exp(0.3 * np.random.default_rng(3).normal(size=40)) + np.eye(40)[30] * 20
    tx = oc.rescale_by_norm(oc.limits.zscore(eps=0.0, warmup=8))
    out, _ = run(tx, norms)
    assert out[30] < norms[30] / 2
    np.testing.assert_allclose(run(tx, scale * norms)[0], scale * out, rtol=1e-5)


def test_adagc_follows_its_equations_for_several_leaves():
    """The warm-up clips the whole update; then each leaf has a mean of its own."""
    steps = np.stack([golden.norms(1, 0.5), golden.norms(2, 0.05)], axis=1)
    tx = oc.adagc(warmup=70, max_norm=0.5)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}

    def step(state, norms):
        grads = {"a": updates(norms[0], np.array([0.6, -0.8])), "b": updates(norms[1], np.array([1.0]))}
        out, state = tx.update(grads, state)
        return state, jnp.stack([jnp.linalg.norm(out["a"]), jnp.linalg.norm(out["b"])])

    _, out = jax.lax.scan(step, tx.init(params), jnp.asarray(steps))
    np.testing.assert_allclose(out, reference.adagc(steps, warmup=70, max_norm=0.5), rtol=2e-5)


ADAPTIVE = {
    "percentile": lambda: oc.limits.percentile(50.0),
    "percentile, window": lambda: oc.limits.percentile(50.0, window=8),
    "mean_std": lambda: oc.limits.mean_std(2.0, window=8, warmup=4),
    "ema": lambda: oc.limits.ema(1.5, decay=0.8),
    "ema_band": lambda: oc.limits.ema_band(0.5, 1.5, decay=0.8),
    "ema, warm-up": lambda: oc.limits.ema(1.5, decay=0.8, warmup=4, max_norm=2.0),
    "zscore": lambda: oc.limits.zscore(2.0, warmup=4),
    "zscore, mean": lambda: oc.limits.zscore(2.0, warmup=4, mode="mean"),
    "quantile": lambda: oc.limits.quantile(),
    "running_mean": lambda: oc.limits.running_mean(),
    "running_rms": lambda: oc.limits.running_rms(),
    "moment_ratio": lambda: oc.limits.moment_ratio(),
    "after": lambda: oc.limits.after(3, oc.limits.ema(1.5), oc.limits.at_most(oc.limits.zscore(), 1.0)),
}


@pytest.mark.parametrize("limit", ADAPTIVE)
def test_nothing_is_learned_from_nan_infinity_and_zero(limit):
    """State and next limit are what they would be without such steps, for as many of them as come."""
    tx = oc.clip_by_leafwise_norm(ADAPTIVE[limit]())
    noise = np.exp(0.2 * np.random.default_rng(5).normal(size=(12, 2))).astype(np.float32)
    bad = np.array([[np.nan, 0.0], [np.inf, np.nan], [0.0, -np.inf], [0.0, 0.0]] * 5, np.float32)

    def learn(norms):
        def step(state, norms):
            _, state = tx.update({"a": norms[:1], "b": norms[1:]}, state)
            return state, state.limit

        return jax.lax.scan(step, tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)}), norms)

    state, limits = learn(noise)
    with_bad, limits_with_bad = learn(np.concatenate([noise[:6], bad, noise[6:]]))
    chex.assert_trees_all_equal(with_bad.rule, state.rule)
    np.testing.assert_array_equal(limits_with_bad[-6:], limits[-6:])
    assert np.isfinite(limits[4:]).all() or "zscore" in limit or limit in ("after", "ema_band")


@pytest.mark.parametrize("limit", ADAPTIVE)
def test_equal_norms_do_not_freeze_a_limit(limit):
    """After many equal norms, where deviations are 0, ordinary ones come through again."""
    noise = 0.3 * np.exp(0.3 * np.random.default_rng(7).normal(size=80))
    out, _ = run(oc.rescale_by_norm(ADAPTIVE[limit]()), np.concatenate([np.full(60, 0.3), noise]))
    assert (np.median(out[-40:] / noise[-40:])) > 0.9
    if "zscore" in limit:
        assert np.mean(out[-40:] < noise[-40:] * 0.999) < 0.4  # 0.5 where a limit sticks to the mean


def test_zclip_is_unlimited_while_no_deviation_is_known():
    """The authors' code takes any rise after equal norms for a spike, and clips all that follow."""
    out, _ = run(oc.zclip(max_norm=None), np.concatenate([np.full(40, 0.3), np.full(40, 0.4)]))
    np.testing.assert_allclose(out[40], 0.4, rtol=1e-6)


def test_a_response_that_drops_groups_does_not_freeze_a_limit_at_zero():
    """A mean of 0, which nothing could exceed by a ratio, is no mean: the next norm starts it again."""
    limit = oc.limits.ema(2.0, decay=0.0)
    out, state = run(oc.rescale_by_norm(limit, response=oc.responses.zero()), [1.0, 9.0, 3.0, 5.0])
    np.testing.assert_allclose(out, [1, 0, 3, 5], rtol=1e-6)
    np.testing.assert_allclose(state.limit, 6, rtol=1e-6)


def test_a_zero_in_the_warm_up_of_adagc_freezes_nothing():
    norms = np.ones(40, np.float32)
    norms[3] = 0
    out, _ = run(oc.adagc(warmup=10, max_norm=10.0), norms)
    np.testing.assert_allclose(out[10:], 1.0, rtol=1e-6)


@pytest.mark.parametrize("make", [oc.limits.ema, lambda c: oc.limits.ema_band(0.0, c)], ids=["ema", "band"])
def test_a_schedule_that_is_nan_negative_or_zero_does_not_spoil_the_mean(make):
    """Such a limit makes its step NaN or zeros, and no other."""
    multiples = jnp.array([2.0, jnp.nan, 2.0, -1.0, 0.0, 2.0, 2.0])
    out, state = run(oc.rescale_by_norm(make(lambda step: multiples[step])), np.ones(7))
    np.testing.assert_allclose(out, [1, np.nan, 1, 0, 0, 1, 1], rtol=1e-6)
    assert 0.9 < state.rule[0] <= 1


def test_aggc_groups_by_the_kind_of_module():
    params = {
        f"block_{k}": {"q_proj": {"kernel": jnp.ones(2)}, "out": {"kernel": jnp.ones(3)}} for k in range(2)
    }
    state = oc.aggc().init(params | {"scale": jnp.ones(1)})
    assert state.norm.shape == (3,)


ERRORS = [
    (
        lambda: oc.limits.percentile(101.0),
        "limits.percentile: q is 101.0, not among the numbers from 0 to 100.",
    ),
    (lambda: oc.limits.percentile(50.0, window=0), "limits.percentile: window is 0, below 1."),
    (lambda: oc.limits.mean_std(warmup=200), "limits.mean_std: warmup is 200, above the window of 128."),
    (lambda: oc.limits.mean_std(warmup=1), "limits.mean_std: warmup is 1, below 2."),
    (lambda: oc.limits.mean_std(-1.0), "limits.mean_std: k is -1.0"),
    (lambda: oc.limits.ema(0.0), "limits.ema: slack is 0.0, not among the numbers above 0."),
    (lambda: oc.limits.ema(1.0, decay=1.5), "limits.ema: decay is 1.5, not among the numbers from 0 to 1."),
    (lambda: oc.limits.ema(1.0, warmup=-1), "limits.ema: warmup is -1, below 0."),
    (lambda: oc.limits.ema(1.0, max_norm=0.0), "limits.ema: max_norm is 0.0, not among the numbers above 0."),
    (lambda: oc.limits.ema(1.0, eps=-1.0), "limits.ema: eps is -1.0, not among the numbers from 0 to inf."),
    (lambda: oc.limits.ema_band(2.0, 1.0), "limits.ema_band: low is 2.0, above high, 1.0. Pass the lower"),
    (
        lambda: oc.limits.ema_band(-1.0, 1.0),
        "limits.ema_band: low is -1.0, not among the numbers from 0 to inf.",
    ),
    (lambda: oc.limits.ema_band(0.0, 0.0), "limits.ema_band: high is 0.0, not among the numbers above 0."),
    (lambda: oc.limits.zscore(mode="median"), "limits.zscore: mode is 'median'. Pass one of 'reciprocal'"),
    (lambda: oc.limits.zscore(warmup=1), "limits.zscore: warmup is 1, below 2."),
    (lambda: oc.limits.quantile(2.0), "limits.quantile: target is 2.0"),
    (lambda: oc.limits.running_mean(float("nan")), "limits.running_mean: decay is nan"),
    (lambda: oc.limits.running_rms(eps=-1.0), "limits.running_rms: eps is -1.0"),
    (lambda: oc.limits.moment_ratio(second=-0.1), "limits.moment_ratio: second is -0.1"),
    (
        lambda: oc.limits.moment_ratio(first=1.5),
        "limits.moment_ratio: first is 1.5, not among the numbers from 0",
    ),
    (lambda: oc.limits.moment_ratio(eps=-1.0), "limits.moment_ratio: eps is -1.0"),
    (lambda: oc.responses.clip(2.0), "responses.clip: floor is 2.0, not among the numbers from 0 to 1."),
    (
        lambda: oc.responses.band(0.5, most_up=0.5),
        "responses.band: most_up is 0.5, not among the numbers from 1",
    ),
    (lambda: oc.responses.psac(0.0), "responses.psac: r is 0.0, not among the numbers above 0."),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_numbers_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace("(", r"\(")):
        call()


@pytest.mark.parametrize("method", ["autoclip", "quantile_clip", "zclip", "adagc", "gradient_stabilizer"])
def test_first_steps_raise_no_false_alarm_under_debug_nans(method):
    """No NaN is made on the way, which people with exploding gradients switch JAX to look for."""
    tx = getattr(oc, method)()
    state = tx.init({"w": jnp.zeros(2)})
    with jax.debug_nans(True):
        for size in (1.0, 2.0):
            out, state = tx.update({"w": jnp.array([0.6 * size, 0.8 * size])}, state)
    assert np.isfinite(out["w"]).all()


@pytest.mark.parametrize("method", ["aggc", "quantile_clip", "clip_by_historical_norm", "zclip", "adagc"])
def test_derivatives_through_the_first_step_are_finite(method):
    """Before there is a limit it is infinite, and the update is the identity."""
    tx = {"zclip": lambda: oc.zclip(max_norm=None), "adagc": lambda: oc.adagc(warmup=0)}.get(
        method, getattr(oc, method)
    )()
    state = tx.init({"w": jnp.zeros(2)})
    slope = jax.grad(lambda x: tx.update({"w": x}, state)[0]["w"].sum())(jnp.array([3.0, 4.0]))
    np.testing.assert_array_equal(slope, [1, 1])


@pytest.mark.parametrize(
    "method", ["autoclip", "zclip", "adagc", "adanorm", "aggc", "gradient_stabilizer", "psac_clip"]
)
def test_numbers_may_be_injected_where_parameters_are_complex(method):
    """Optax makes every injected number of the parameters' dtype."""
    factory = getattr(oc, method)
    numbers = {"percentile", "decay", "z", "eps", "factor", "slack", "low", "high", "most_up", "most_down"}
    numbers |= {"first", "second", "max_norm", "r"} - ({"max_norm"} if method == "zclip" else set())
    static = [name for name in inspect.signature(factory).parameters if name not in numbers]
    tx = optax.inject_hyperparams(factory, static_args=static)()
    grads = {"w": jnp.array([3 + 4j, 1j], jnp.complex64)}
    out, _ = tx.update(grads, tx.init(grads))
    assert np.isfinite(out["w"]).all()


@pytest.mark.parametrize("at", [3, 40], ids=["in the warm-up", "after it, all norms having been equal"])
@pytest.mark.parametrize("spike", [1e20, 3e38])
def test_zscores_survive_a_norm_whose_square_overflows(at, spike):
    """The variance stays a number, and spikes are told again once the mean has come down."""
    norms = 1 + 0.1 * np.cos(np.arange(3000.0)) * (at < 20)
    norms[at], norms[-1] = spike, 1e6
    out, state = run(oc.zclip(max_norm=None, decay=0.9), norms)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.rule))
    assert out[-1] < 10 if at < 20 else np.isfinite(out[-1])


BEYOND = {
    "gradient_stabilizer": oc.gradient_stabilizer,
    "clip_by_historical_norm": lambda: oc.clip_by_historical_norm(3.0, 4, 2),
    "adagc, warm-up": lambda: oc.adagc(warmup=9),
    "adagc": lambda: oc.adagc(warmup=0),
    "autoclip, window": lambda: oc.autoclip(50.0, window=8),
    "autoclip": oc.autoclip,
    "quantile_clip": lambda: oc.quantile_clip(90.0, window=4),
    "zclip": lambda: oc.zclip(warmup=2),
    "adanorm": oc.adanorm,
    "normalize_by_running_norm": oc.normalize_by_running_norm,
    "clip_by_adaptive_quantile": oc.clip_by_adaptive_quantile,
    "aggc": oc.aggc,
}


@pytest.mark.parametrize("method", BEYOND)
@pytest.mark.parametrize("odd", [1e39, 1e-50, 1e300])
@pytest.mark.parametrize("at", [0, 3])
def test_float64_norms_beyond_float32_are_learned_as_its_ends(method, odd, at):
    """Neither as infinity nor as zero: the state stays finite, and ordinary updates go on."""
    norms = np.ones(12)
    norms[at] = odd
    with enable_x64(True):
        tx = BEYOND[method]()
        state, out = tx.init({"w": jnp.zeros(1, jnp.float64)}), []
        update = jax.jit(tx.update)
        for norm in norms:
            updates, state = update({"w": jnp.array([norm], jnp.float64)}, state)
            out.append(float(updates["w"][0]))
    assert np.isfinite(out).all()
    ordinary = np.delete(out, at)
    # What is divided by the mean square of 1e39 is too small for float32 for a while.
    assert (ordinary[-1:] if method == "normalize_by_running_norm" else ordinary > 0).all()
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(state.rule))


def test_a_huge_gradient_in_the_warm_up_of_adagc_is_clipped_not_dropped():
    """The ratio of the limit and its norm is below float32's least number; the mean learns what came out."""
    out, state = run(oc.adagc(), [3e38, 3e38])
    np.testing.assert_allclose(out, [1, 1], rtol=1e-6)
    np.testing.assert_allclose(jax.tree.leaves(state.rule)[0], [1], rtol=1e-6)
    out, state = run(oc.adagc(warmup=1, decay=0.5), [1.0, 3e38])
    np.testing.assert_allclose(out, [1, 1.04], rtol=1e-6)
    np.testing.assert_allclose(jax.tree.leaves(state.rule)[0], [1.02], rtol=1e-6)


@pytest.mark.parametrize("huge", [1e20, 3e38, 1e-30])
def test_means_and_deviations_survive_norms_whose_squares_leave_the_range(huge):
    """The limit is what NumPy makes of the norms in float64; powers of two change no digit of others."""
    norms = np.array([1.0, 2.0, huge, 2.0, 1.0]) if huge > 1 else huge * np.array([1.0, 2.0, 3.0, 2.0, 1.0])
    _, state = run(oc.clip_by_global_norm(oc.limits.mean_std(1.5, window=8, warmup=2, floor=0.0)), norms)
    seen = np.float32(norms[:4]).astype(float)
    np.testing.assert_allclose(state.limit, [seen.mean() + 1.5 * seen.std()], rtol=1e-5)
    _, state = run(oc.clip_by_global_norm(oc.limits.mean_std(0.0, window=8, warmup=2)), norms)
    np.testing.assert_allclose(state.limit, [seen.mean()], rtol=1e-6)


def test_a_decay_of_1_learns_nothing_and_makes_no_nan():
    for decays in ((1.0, 0.9), (0.7, 1.0), (jnp.float32(1), jnp.float32(1))):
        limit = oc.limits.moment_ratio(*decays)
        out, state = run(oc.rescale_by_norm(limit, response=oc.responses.normalize()), [2.0, 5.0])
        np.testing.assert_allclose(out, [1, 1], rtol=1e-6)
        assert state.limit.tolist() == [1]


def test_a_quantile_does_not_stick_at_zero_or_infinity():
    """Steps as large as these would take the limit out of float32's range, whence it never comes back."""
    out, _ = run(oc.clip_by_adaptive_quantile(rate=400.0), [0.5, 5.0, 5.0, 5.0, 5.0])
    assert out[-1] > 0
    tx = oc.clip_by_global_norm(oc.limits.quantile(initial=jnp.inf, rate=1.0))
    _, state = run(tx, [1.0] * 400)
    assert 0 < state.limit[0] < 10


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_percentage_of_16_bits_is_reckoned_in_float32(dtype):
    """So `optax.inject_hyperparams` hands it over where all parameters are of 16 bits."""
    tx = oc.clip_by_global_norm(oc.limits.percentile(dtype(90), window=1001))
    _, state = run(tx, np.arange(1.0, 1002.0))
    np.testing.assert_allclose(state.limit, [901], rtol=1e-6)
