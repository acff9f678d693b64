"""Which steps are spikes, beside a plain reading in NumPy."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from optaxclip.history._ordinary import SIGMA, spikes


def plainly(norms, sigmas=4.0, factor=2.0, window=65):
    """The running median, its spread and the spikes of one column, step by step."""
    at = [k for k, x in enumerate(norms) if np.isfinite(x) and x > 0]
    logs = [np.log(norms[k]) for k in at]
    half = min(window // 2, (len(at) - 1) // 2)
    middle = [min(max(k, half), len(at) - 1 - half) for k in range(len(at))]
    medians = [np.median(logs[m - half : m + half + 1]) for m in middle] if half else logs
    level = np.interp(np.arange(len(norms)), at, medians) if at else np.full(len(norms), np.nan)
    off = np.array([logs[i] - level[k] for i, k in enumerate(at)])
    spread = SIGMA * np.median(np.abs(off)) if at else 0.0
    spike = ~np.isfinite(norms)
    for i, k in enumerate(at):
        spike[k] = off[i] > max(sigmas * spread, np.log(factor))
    return np.exp(level), spread, spike


NORMS = st.floats(0, 1e6, allow_subnormal=False) | st.sampled_from([0.0, np.nan, np.inf])


@given(norms=hnp.arrays(float, st.tuples(st.integers(0, 40), st.integers(0, 2)), elements=NORMS))
def test_spikes_are_those_of_a_plain_reading(norms):
    """Level, spread and spikes of any column are what the definition says, whatever is not finite or zero."""
    found = spikes(norms, window=9)
    for k, column in enumerate(norms.T):
        level, spread, spike = plainly(column, window=9)
        np.testing.assert_allclose(found.level[:, k], level, rtol=1e-12)
        np.testing.assert_allclose(found.spread[k], spread, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(found.spike[:, k], spike)


def test_the_default_window_is_read_in_full():
    """The same with 65 norms in the median and 300 steps."""
    norms = np.exp(0.3 * np.random.default_rng(1).standard_normal(300))
    norms[[40, 41, 200]] *= 30
    level, spread, spike = plainly(norms)
    found = spikes(norms[:, None])
    np.testing.assert_allclose(found.level[:, 0], level)
    assert found.spread[0] == pytest.approx(spread)
    assert np.flatnonzero(found.spike[:, 0]).tolist() == np.flatnonzero(spike).tolist() == [40, 41, 200]
    np.testing.assert_allclose(found.ratio[:, 0], norms / level)


def test_slow_drift_is_ordinary():
    """Norms that grow a millionfold over 1,000 steps hold no spike; a jump against their level is one."""
    norms = np.geomspace(1, 1e6, 1000)[:, None]
    assert not spikes(norms).spike.any()
    norms[500] *= 5
    assert np.flatnonzero(spikes(norms).spike).tolist() == [500]


def test_what_hardly_scatters_may_still_double():
    """Of constant norms only what is more than twice the median is a spike."""
    norms = np.full((100, 1), 3.0)
    norms[20], norms[50] = 5.9, 6.1
    found = spikes(norms)
    assert found.spread[0] == 0
    assert np.flatnonzero(found.spike).tolist() == [50]


def test_a_fall_is_no_spike():
    """Norms far below the median, and zeros, are ordinary."""
    norms = np.full((100, 1), 3.0)
    norms[20], norms[50] = 1e-6, 0
    assert not spikes(norms).spike.any()


def test_zeros_have_no_level():
    """Of zeros alone nothing is known, and none is a spike."""
    found = spikes(np.zeros((10, 2)))
    assert np.isnan(found.level).all()
    assert not found.spike.any()


def test_what_is_not_finite_is_a_spike():
    """Of NaN alone nothing is known, and each is a spike."""
    found = spikes(np.full((10, 2), np.nan))
    assert np.isnan(found.level).all()
    assert found.spike.all()


@pytest.mark.parametrize(("norms", "spike"), [([5], []), ([1, 9], []), ([1, 1, 9], [2]), ([9, 1, 1], [0])])
def test_a_few_steps_are_read_as_far_as_they_go(norms, spike):
    """One or two norms are their own level; of three the median is known."""
    found = spikes(np.array(norms, float)[:, None])
    assert np.flatnonzero(found.spike).tolist() == spike


def test_one_normal_number_in_thirty_thousand_is_called_a_spike():
    """With 4 sigmas, and a scatter that makes the factor idle, that is the rate of false alarms."""
    norms = np.exp(np.random.default_rng(0).standard_normal((30_000, 10)))
    rate = spikes(norms).spike.mean() * 30_000
    assert (
        0.3 < rate < 5
    )  # the running median and the spread are estimates, which makes tails a little heavier


def test_usual_scatter_raises_no_alarm():
    """Norms that scatter by a fifth never double."""
    norms = np.exp(0.2 * np.random.default_rng(0).standard_normal((5_000, 10)))
    assert spikes(norms).spike.mean() < 3e-4


def test_memory_goes_by_a_column():
    """A long recording takes some times its own size, not the window's 65."""
    norms = np.exp(0.2 * np.random.default_rng(0).standard_normal((20_000, 20)))
    tracemalloc.start()
    spikes(norms)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15 * norms.nbytes
