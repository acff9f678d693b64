"""Policies side by side on recordings made by hand, beside their numbers in NumPy."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import optaxclip as oc

NAMES = ["a/kernel", "a/bias", "b/kernel"]
GLOBAL, LEAF = oc.clip_by_global_norm(4.0), oc.clip_by_leafwise_norm(3.0)


def recording(norms, names=NAMES, **given):
    return oc.History(names, norms, **given)


def spiky(steps=40):
    """Ordinary norms of (1, 2, 2), some a little larger, and three spikes, one of them not finite."""
    norms = np.tile([1.0, 2.0, 2.0], (steps, 1))
    norms[::4] *= 1.5
    norms[10] = 30, 40, 1
    norms[21] = 3, 60, 20
    norms[30, 1] = np.nan
    return norms


def by_hand(norms, limit, places):
    """What clipping of groups to a limit does: the factor of each row."""
    groups = np.unique(places)
    with np.errstate(invalid="ignore", divide="ignore"):
        of = {g: np.sqrt((norms[:, places == g] ** 2).sum(axis=1)) for g in groups}
        return np.stack([np.where(of[g] > limit, limit / of[g], 1 + 0 * of[g]) for g in places], axis=1)


@pytest.mark.parametrize(
    ("policy", "limit", "places"), [(GLOBAL, 4.0, [0, 0, 0]), (LEAF, 3.0, [0, 1, 2])], ids=["global", "leaf"]
)
def test_every_number_is_what_numpy_says(policy, limit, places):
    """Each figure of a policy is the one that its factors have, step by step, in float64."""
    norms = spiky()
    found = recording(norms).compare({"mine": policy})
    (row,) = found.rows
    factors = by_hand(norms, limit, np.array(places))
    before, after = (np.sqrt((x**2).sum(axis=1)) for x in (norms, norms * factors))
    bad = np.isnan(before)
    spike = np.isin(np.arange(len(norms)), [10, 21, 30])
    acted = (np.nan_to_num(factors, nan=1.0) != 1).any(axis=1)
    seen = acted & ~bad
    cosine = ((norms**2 * factors).sum(axis=1) / before / after)[seen]
    assert (found.steps, found.ordinary) == (len(norms), len(norms) - 3)
    np.testing.assert_allclose(
        row[1:],
        [
            acted.mean(),
            acted[~spike].mean(),
            np.nanmax(after),
            np.median((before / after)[spike & ~bad]),
            cosine.mean(),
            cosine.min(),
            np.median((factors.max(axis=1) / factors.min(axis=1))[seen]),
        ],
        rtol=1e-5,
    )


def test_a_policy_that_never_acts_changes_nothing():
    """Infinite limits clip no step, keep every direction, and cut no spike."""
    (row,) = recording(spiky()).compare({"none": np.inf}).rows
    assert (row.clipped, row.touched, row.cosine_mean, row.cosine_worst, row.spread) == (0, 0, 1, 1, 1)
    assert row.spike_cut == 1


def test_groups_left_alone_count_as_kept():
    """Clipping one of three rows moves it against the others by its factor."""
    only = oc.clip_by_groupwise_norm(1.0, oc.groups.regex({"b": "^b/", None: ".*"}))
    (row,) = recording([[1.0, 2.0, 4.0]] * 5).compare([only]).rows
    assert row.spread == pytest.approx(4)
    assert row.largest_after == pytest.approx(np.sqrt(6))


def test_zeroed_spikes_are_cut_infinitely():
    """A policy that replaces spikes by zeros divides them by infinity, and sets rows apart by as much."""
    history = recording(spiky())
    whole = history.replay(10.0, response=oc.responses.zero())
    leafwise = history.replay(10.0, oc.groups.leaf(), oc.responses.zero())
    first, second = history.compare({"whole": whole, "leafwise": leafwise}).rows
    assert first.spike_cut == np.inf
    assert (second.spread, first.spread) == (np.inf, 1)
    assert np.isnan(first.cosine_mean)  # of nothing there is no direction


def test_norms_without_angles_have_no_cosine():
    """Largest entries say nothing of directions: cosines are NaN, shown as a dash."""
    found = recording(spiky(), norm="linf").compare({"tight": 1.0, "none": np.inf})
    assert all(np.isnan(row.cosine_mean) and np.isnan(row.cosine_worst) for row in found.rows)
    assert str(found).splitlines()[2].split()[-3:-1] == ["–", "–"]


def test_zero_updates_are_counted_apart_and_kept():
    """A recording of zeros has no spikes, and nothing to clip; zeros are no ordinary steps, as in advice."""
    found = recording(np.zeros((6, 3))).compare([GLOBAL, LEAF])
    assert (found.ordinary, found.spikes, found.zero) == (0, 0, 6)
    assert [(row.clipped, row.largest_after, row.cosine_mean) for row in found.rows] == [(0, 0, 1)] * 2


def test_nothing_finite_leaves_nothing_to_say():
    """Where no step is finite, norms and angles are NaN."""
    found = recording(np.full((4, 3), np.nan)).compare([GLOBAL])
    (row,) = found.rows
    assert (found.ordinary, found.spikes, found.nonfinite, row.clipped, row.touched) == (0, 0, 4, 0, 0)
    assert np.isnan([row.largest_after, row.spike_cut]).all()


def test_an_empty_recording_has_an_empty_table():
    """Without steps there are rows of zeros and dashes."""
    found = recording(np.zeros((0, 3))).compare([GLOBAL])
    assert str(found).splitlines()[0] == "0 steps, 0 of them spikes"
    assert found.rows[0].clipped == 0


def test_steps_are_of_the_kinds_that_advice_sees():
    """First steps, growth towards the end, zeros and what is not finite are no spikes."""
    norms = np.concatenate([50 * np.ones(3), np.ones(90), [80.0, 0.0], np.ones(20), 2.0 ** np.arange(2, 6)])
    norms = np.concatenate([norms, np.full(30, np.nan)])[:, None]
    history = recording(norms, ["w"])
    found = history.compare([np.inf])
    counts = found.ordinary, found.spikes, found.settling, found.growing, found.zero, found.nonfinite
    assert counts == (110, 1, 3, 4, 1, 30)
    assert sum(counts) == found.steps
    assert found.title() == (
        "149 steps, 1 of them spikes, 3 before norms settled, 4 growing towards the end, 1 zero, "
        "30 not finite"
    )
    assert f"{found.ordinary} of {found.steps} recorded steps are ordinary" in str(history.advise())
    assert found.table().title == str(found).splitlines()[0] == found.title()


def test_one_row_is_enough():
    """Global and leafwise clipping of one array are the same."""
    norms = np.array([1.0] * 20 + [50.0])[:, None]
    first, second = recording(norms, ["w"]).compare([3.0, LEAF]).rows
    assert first[1:] == second[1:]
    assert first.spike_cut == pytest.approx(50 / 3)


def test_a_list_is_numbered_and_a_replay_passes_through():
    """What has no name is called by its place; a replay is taken as it is."""
    history = recording(spiky())
    found = history.compare([history.replay(GLOBAL), GLOBAL])
    assert [row.name for row in found.rows] == ["policy 1", "policy 2"]
    assert found.rows[0][1:] == found.rows[1][1:]


def test_the_table_lines_up():
    """The text has a line on the recording, a head, and a line of equal width for each policy."""
    text = str(recording(spiky()).compare({"global": GLOBAL, "leafwise, at 3": LEAF}))
    first, *lines = text.splitlines()
    assert first == "40 steps, 2 of them spikes, 1 not finite"
    assert lines[0].split()[:2] == ["policy", "clipped"]
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[1] == "30.0%"


def test_the_rich_table_has_the_same_cells():
    """The table of rich shows what the text shows."""
    found = recording(spiky()).compare({"global": GLOBAL})
    table = found.table()
    assert [[column.header, *map(str, column._cells)] for column in table.columns] == [
        list(pair) for pair in zip(*found.cells(), strict=True)
    ]


def test_names_of_policies_are_no_markup():
    """Brackets in them are shown, as everywhere else."""
    console = Console(file=io.StringIO(), width=200)
    console.print(recording(spiky()).compare({"leaf [tight]": GLOBAL, "[/]": 1.0}).table())
    assert "leaf [tight]" in console.file.getvalue()
    assert "[/]" in console.file.getvalue()


def test_rows_of_zeros_have_no_size_that_could_change():
    """Frozen leaves have a factor of 1, beside rows that are all scaled alike."""
    found = oc.History(["a", "b", "frozen"], [[4.0, 4.0, 0.0]] * 5).compare([oc.clip_by_leafwise_norm(1.0)])
    assert found.rows[0].spread == 1


@pytest.mark.parametrize("policy", [GLOBAL, 3.0, oc.limits.constant(1.0)], ids=["method", "number", "limit"])
def test_a_single_policy_is_asked_for_in_a_list(policy):
    """What is neither a dict nor a list is an error that says so, not a comparison of its parts."""
    with pytest.raises(TypeError, match=r"History\.compare: policies is of type .* Pass a dict"):
        recording(spiky()).compare(policy)


def test_a_replay_of_another_recording_is_an_error():
    """Replays of other recordings cannot stand beside each other."""
    other = recording(spiky()[:10]).replay(jnp.inf)
    with pytest.raises(ValueError, match="'it' replays 10 steps of 3 rows; this recording has 40 of 3"):
        recording(spiky()).compare({"it": other})
