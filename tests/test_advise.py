"""Advice on recordings made by hand, one for each branch of the rule, and on those of real runs."""

import functools
import re
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

import optaxclip as oc

NAMES = [f"layer_{k}/{leaf}" for k in range(4) for leaf in ("kernel", "bias")]
MANY = [f"layer_{k}/kernel" for k in range(20)]
SPIKES = [50, 120, 200, 250]
ONES = np.ones(8)
NOTHING: Mapping[str, Any] = types.MappingProxyType({})


def noise(steps=300, rows=8, sigma=0.2):
    """Norms that scatter about one."""
    return np.exp(sigma * np.random.default_rng(0).standard_normal((steps, rows)))


def spiky(*rows, **shape):
    """Four steps in which these rows, or all, are a hundred times as large."""
    norms = noise(**shape)
    norms[np.ix_(SPIKES, rows or range(norms.shape[1]))] *= 100
    return norms


def by_turns(norms, *places):
    """Spikes of one after the other of these places."""
    for k, own in enumerate(places):
        norms[20 + 13 * k :: 80, own] *= 100
    return norms


def drifting(norms):
    return norms * np.geomspace(1, 20, len(norms))[:, None]


def ending(norms, growth=0, bad=5):
    """The recording of a run that fails, after its norms doubled in its last steps."""
    norms = norms.copy()
    if growth:
        norms[-growth:] *= 2.0 ** np.arange(1, growth + 1)[:, None]
    return np.concatenate([norms, np.full((bad, norms.shape[1]), np.nan)])


def passing(norms, *steps):
    norms = norms.copy()
    norms[list(steps)] = np.nan
    return norms


def clipped(norms, limit):
    return norms * np.minimum(1, limit / np.sqrt((norms**2).sum(axis=1, keepdims=True)))


class Case(NamedTuple):
    """A recording, what is asked, and what must come out."""

    norms: np.ndarray
    policy: str
    said: str
    asked: Mapping[str, Any] = NOTHING
    given: Mapping[str, Any] = NOTHING
    names: list = NAMES


START = {"start": 10 * ONES}
SGD = functools.partial(dict, optimizer="sgd")
LATE = noise()
FEW = noise(12)
HELD = by_turns(noise(rows=20), *range(20))
CASES = {
    "calm": Case(noise(), "none", "nothing would be gained"),
    "settling": Case(
        np.concatenate([50 * noise(3), noise()]), "none", "No step after the first few is beyond"
    ),
    "short steps": Case(
        spiky(), "none", r"Even the longest step is 1\.1e-06", SGD(learning_rate=1e-7), START
    ),
    "short steps, but for one small layer": Case(
        noise(),
        "none",
        r"clipping\. But ordinary steps of 'layer_3' are up to 0\.2 times as long as the weights there were",
        SGD(learning_rate=2e-3),
        {"start": np.array([1000.0] * 6 + [0.01] * 2)},
    ),
    "together": Case(spiky(), "global", "95% of the ordinary norms stay below 3.28"),
    "one row": Case(spiky()[:, :1], "global", "4 steps are spikes, of up to", names=["w"]),
    "together, drifting": Case(drifting(spiky()), "global", "since norms drift, the limit follows them"),
    "layers by turns": Case(
        by_turns(noise(), [0, 1], [2, 3], [4, 5], [6, 7]), "layerwise", "Layers spike one by one"
    ),
    "leaves by turns": Case(by_turns(noise(), *range(8)), "leafwise", "Leaves spike one by one"),
    "many by turns": Case(HELD, "layerwise", "Layers spike one by one", names=MANY),
    "one to blame": Case(spiky(2), "outliers", "Only 'layer_1/kernel' is to blame: it is held"),
    "two to blame": Case(
        spiky(2, 5), "outliers", "Only 'layer_1/kernel', 'layer_2/bias' are to blame: each is held"
    ),
    "one to blame, drifting": Case(drifting(spiky(2)), "outliers", "Only 'layer_1/kernel' is to blame"),
    "one layer too long": Case(
        noise() * np.array([1, 1, 1, 1, 1000, 1000, 1, 1]),
        "outliers",
        r"Only 'layer_2' is to blame: ordinary steps there are up to 0\.1 times as long as the weights, "
        r"those of other layers 0\.0001 in the middle and 0\.0001 at most\. They are held to",
        SGD(learning_rate=1e-3),
        START,
    ),
    "scattered steps": Case(
        noise(),
        "none",
        r"safe, and what scatters beyond it is at most 0\.0029",
        SGD(learning_rate=0.022),
        START,
    ),
    "long at first": Case(
        np.concatenate([50 * noise(3), noise()]),
        "none",
        r"safe, and the first steps are at most 0\.0",
        SGD(learning_rate=0.01),
        START,
    ),
    "too long": Case(
        noise(), "layerwise", r"0\.0025 is safe\. Each layer is held", SGD(learning_rate=0.1), START
    ),
    "spikes too long": Case(
        spiky(), "layerwise", r"The longest step is 0\.11 times as long", SGD(learning_rate=1e-2), START
    ),
    "many too long": Case(
        noise(rows=20),
        "layerwise",
        "Each layer is held to that",
        SGD(learning_rate=0.1),
        {"start": 10 * np.ones(20)},
        MANY,
    ),
    "far too long": Case(
        noise(), "layerwise", "learning rate of 3 is the real problem", SGD(learning_rate=3.0), START
    ),
    "scatter": Case(noise(sigma=2), "global", "a few steps do most of the way"),
    "scattered steps too long": Case(
        noise(sigma=2), "layerwise", "The longest step is", SGD(learning_rate=1e-3), START
    ),
    "adam, spikes": Case(spiky(), "global", "a spike stays in its second moments", {"optimizer": "adam"}),
    "adam, scatter": Case(noise(sigma=2), "global", "norms scatter so much", {"optimizer": "adam"}),
    "adam, calm": Case(noise(), "none", "nothing would be gained", {"optimizer": "adam"}),
    "adam, ended": Case(
        ending(FEW, 6), "global", "if the run ends again, the learning rate", {"optimizer": "adam"}
    ),
    "ended at once": Case(ending(FEW, 6), "global", "is the median norm before they grew"),
    "ended at once, with weights": Case(
        ending(FEW, 6), "global", "is a hundredth of the weights' norm", given={"start": ONES}
    ),
    "ended at once, with a rate": Case(
        ending(FEW, 6),
        "layerwise",
        "No finite step was longer than is safe",
        SGD(learning_rate=1e-5),
        START,
    ),
    "ended at once, too long": Case(
        ending(FEW, 6), "layerwise", "A learning rate below 1, or", SGD(learning_rate=1.0), START
    ),
    "ended late": Case(ending(LATE, 9), "global", "norms grew for 8 steps, by 1 doublings each"),
    "ended suddenly": Case(ending(LATE), "global", "Norms did not grow before the end"),
    "passed through": Case(passing(noise(), 33, 77), "none", "Training went on after 2 steps that were not"),
    "passed through, then ended": Case(
        ending(passing(spiky(), 33)), "global", "Training went on after 1 step that was not finite"
    ),
    "too short": Case(noise(30), "undecided", "The recording has 30 steps, 30 with a norm"),
    "one step": Case(noise(1), "undecided", "The recording has 1 step, 1 with a norm"),
    "empty": Case(noise(0), "undecided", "The recording is empty"),
    "no groups": Case(noise(rows=0), "undecided", "The recording has no groups", names=[]),
    "zeros": Case(np.zeros((100, 8)), "undecided", "All recorded norms are zero"),
    "clipped": Case(clipped(noise(), 2.8), "undecided", "72.7% of the steps share the largest norm, 2.8:"),
    "nothing finite": Case(
        np.full((9, 8), np.inf), "undecided", "Step 0 is the first that is not, in 'layer_0/kernel'"
    ),
    "largest entries": Case(spiky(), "global", "Rows spike together", given={"norm": "linf"}),
    "sums": Case(by_turns(noise(), *range(8)), "leafwise", "Leaves spike", given={"norm": "l1"}),
    "third powers": Case(spiky(2), "outliers", "Only 'layer_1/kernel'", given={"norm": "lp(3.0)"}),
    "root mean squares": Case(
        spiky(), "global", "Rows spike together", given={"norm": "rms", "sizes": np.arange(1.0, 9)}
    ),
}
CLIPPING = [name for name, case in CASES.items() if case.policy not in ("none", "undecided")]


def history_of(name):
    case = CASES[name]
    return oc.History(case.names, case.norms, **case.given)


@functools.cache
def advice_of(name):
    return history_of(name).advise(**CASES[name].asked)


def from_code(advice):
    return eval(advice.code, {"oc": oc, "optax": optax, "jnp": jnp})


def limits_in(advice):
    """The limits that the code has by name."""
    return {name: float(limit) for name, limit in re.findall(r"'(\S+)': ([\d.]+)", advice.code)}


def tree_of(names, shape=(2,)):
    """Parameters that have these paths."""
    tree: dict[str, Any] = {}
    for name in names:
        *above, last = name.split("/") if isinstance(name, str) else name
        own = tree
        for key in above:
            own = own.setdefault(key, {})
        own[last] = jnp.ones(shape)
    return tree


@pytest.mark.parametrize("name", CASES)
def test_each_branch_says_what_it_should(name):
    """A recording leads to its policy, and the sentence that matters is there."""
    advice = advice_of(name)
    assert advice.policy == CASES[name].policy
    assert re.search(CASES[name].said, " ".join(advice.reasons))
    assert (advice.groups is None) == (advice.limit is None) == (advice.policy in ("none", "undecided"))
    assert str(advice).startswith(f"{advice.policy}: {advice.code}\n")


@pytest.mark.parametrize("name", CASES)
def test_the_code_makes_what_was_advised(name):
    """A line of code and the transformation are the same, on the tree that was recorded, step after step."""
    advice, params = advice_of(name), tree_of(CASES[name].names)
    first, second = from_code(advice), advice.transformation()

    @jax.jit
    def both(grads):
        def step(states, scale):
            now = jax.tree.map(lambda x: x * scale, grads)
            found = [tx.update(now, state, params) for tx, state in zip((first, second), states, strict=True)]
            return tuple(state for _, state in found), [updates for updates, _ in found]

        return jax.lax.scan(step, (first.init(params), second.init(params)), jnp.array([1.0, 0.1, 7.0]))[1]

    @settings(max_examples=5)
    @given(grads=trees.like(params, bound=1e3))
    def agree(grads):
        mine, advised = both(grads)
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(advised), strict=True):
            np.testing.assert_array_equal(a, b)

    agree()


@pytest.mark.parametrize("name", CLIPPING)
def test_the_number_in_the_code_is_the_limit(name):
    """A limit that is one number stands in the code as it is."""
    advice = advice_of(name)
    if isinstance(advice.limit, float):
        assert f"({advice.limit!r}" in advice.code
    else:
        assert re.search(r"per_group\(|percentile\(95\.0, 128|relative\(", advice.code)


@pytest.mark.parametrize("name", ["together", "one row", "ended late", "largest entries"])
def test_the_budget_is_kept(name):
    """Where a global limit is said to leave 95 % of the ordinary norms, clipping touches no more of them."""
    advice, history = advice_of(name), history_of(name)
    acted = history.replay(advice.transformation()).acted
    ordinary = np.ones(len(history), bool)
    ordinary[SPIKES if name != "ended late" else slice(291, None)] = False
    # The limit is rounded to three digits, which may pass a few norms.
    assert abs(acted[ordinary].mean() - 0.05) < 0.02
    low, high = advice.interval
    assert low < advice.limit < high


@pytest.mark.parametrize("budget", [0.0, 0.2, 0.5])
def test_the_budget_sets_the_quantile(budget):
    """The limit is what all but the budget of ordinary norms stay below, to three digits."""
    history = history_of("together")
    ordinary = np.delete(history.whole, SPIKES)
    advice = history.advise(budget)
    assert advice.limit == pytest.approx(np.quantile(ordinary, 1 - budget), rel=5e-3)
    assert f"{100 * (1 - budget):g}% of the ordinary norms" in " ".join(advice.reasons)


def test_each_group_has_the_limit_of_its_own_norms():
    """Per leaf, the limit is a quantile of the leaf's ordinary norms."""
    history, advice = history_of("leaves by turns"), advice_of("leaves by turns")
    ordinary = (history.norms < 10).all(axis=1)
    limits = limits_in(advice)
    for name, norms in zip(history.names, history.norms[ordinary].T, strict=True):
        assert limits[name] == pytest.approx(np.quantile(norms, 0.95), rel=5e-3)


def test_outliers_are_few():
    """Twenty rows of eighty that spike by turns are too many for a line of code: all are held."""
    norms = by_turns(noise(rows=80), *range(20))
    advice = oc.History([f"{k}/kernel" for k in range(80)], norms).advise()
    assert advice.policy == "layerwise"
    assert "percentile(95.0, 128" in advice.code


def test_a_step_is_held_to_what_is_safe():
    """With a learning rate a layer's limit is 0.005 / √layers of its weights' norm, in steps of SGD."""
    limits = limits_in(advice_of("too long"))
    assert list(limits) == [f"layer_{k}" for k in range(4)]
    np.testing.assert_allclose(list(limits.values()), 0.005 / 2 * np.sqrt(200) / 0.1, rtol=5e-3)


def test_many_layers_are_held_in_proportion_to_their_weights():
    """More limits than fit into a line are one ratio to the weights, no less than at the start."""
    code = advice_of("many too long").code
    ratio, floor = map(float, re.findall(r"relative\(([\d.e-]+), floor=([\d.e-]+)\)", code)[0])
    assert ratio == pytest.approx(0.005 / np.sqrt(20) / 0.1, rel=5e-3)
    assert floor == 10


def test_frozen_weights_do_not_count():
    """Weights that never get a gradient leave the length of others' steps as it is."""
    norms = np.concatenate([noise(), np.zeros((300, 1))], axis=1)
    both = oc.History([*NAMES, "frozen/kernel"], norms, start=[*10 * ONES, 1e6])
    alone = oc.History(NAMES, noise(), start=10 * ONES)
    limits = limits_in(both.advise(learning_rate=0.1))
    frozen = limits.pop("frozen")
    assert limits == limits_in(alone.advise(learning_rate=0.1))
    assert frozen < 1e3


def test_weights_of_zero_have_no_length():
    """Layers that start from zero, as half of a LoRA does, are not to blame for infinite steps."""
    start = np.array([10.0, 10] * 3 + [0, 0])
    advice = oc.History(NAMES, noise(), start=start).advise(learning_rate=0.1)
    assert advice.policy == "layerwise"
    np.testing.assert_allclose(
        list(limits_in(advice).values()), 0.005 / np.sqrt(3) * np.sqrt(200) / 0.1, rtol=5e-3
    )


@pytest.mark.parametrize(
    "name", ["together", "one to blame", "leaves by turns", "adam, spikes", "ended late"]
)
def test_limits_scale_with_norms(name):
    """Norms a thousand times as large have limits a thousand times as large."""
    case, advice = CASES[name], advice_of(name)
    larger = oc.History(case.names, 1000 * case.norms, **case.given).advise(**case.asked)
    numbers = [
        [float(x) for x in re.findall(r"(?<![\w/])\d[\d.e+-]*", found.code)] for found in (advice, larger)
    ]
    assert larger.policy == advice.policy
    np.testing.assert_allclose(numbers[1], 1000 * np.array(numbers[0]), rtol=5e-3)


@pytest.mark.parametrize("name", ["together", "leaves by turns", "adam, scatter"])
def test_the_same_recording_has_the_same_advice(name):
    """Nothing is drawn anew: text, code and interval come out again."""
    again = history_of(name).advise(**CASES[name].asked)
    assert str(again) == str(advice_of(name))
    assert again.interval == advice_of(name).interval


@pytest.mark.parametrize("ask", [{}, {"optimizer": "adam"}, {"learning_rate": 0.1}], ids=str)
@pytest.mark.parametrize("size", [1e-300, 1e-42, 1e45])
def test_limits_are_numbers_of_float32(size, ask):
    """Of norms beyond its range too: a limit of zero would make zeros of all updates."""
    advice = oc.History(["w"], size * spiky(rows=1), start=[size]).advise(**ask)
    params = {"w": jnp.ones(1)}
    updates, _ = from_code(advice).update(params, from_code(advice).init(params))
    assert 0 < updates["w"][0] <= 1
    tiny, largest = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    assert all(tiny <= x <= largest for x in (advice.limit, *(advice.interval or ())))


def test_zeros_between_updates_do_not_count():
    """Updates that are zero three times of four, as gradients that are collected first, leave the limit."""
    norms = np.zeros((1200, 8))
    norms[3::4] = spiky()
    assert oc.History(NAMES, norms).advise().limit == advice_of("together").limit


def test_a_row_that_is_rarely_used_is_not_stopped():
    """A leaf with a gradient in one step of thirty is held to those it has; one without any, to no less."""
    norms = by_turns(noise(), *range(6))
    norms[np.arange(300) % 30 != 7, 6] = 0
    norms[:, 7] = 0
    limits = limits_in(oc.History(NAMES, norms).advise())
    assert len(limits) == 8
    assert min(limits.values()) > 0.5


def test_limits_of_root_mean_squares_are_of_l2_norms():
    """A recording of rms is advised on as if it had been of L2 norms, which is what clipping measures."""
    sizes = np.arange(1.0, 9)
    asked = oc.History(NAMES, spiky() * np.sqrt(sizes), sizes=sizes).advise()
    assert advice_of("root mean squares").code == asked.code


def test_other_norms_are_named_in_the_code():
    """A recording of other norms is clipped by these."""
    assert "norm=oc.norms.linf())" in advice_of("largest entries").code
    assert "groups=oc.groups.leaf(), norm=oc.norms.l1())" in advice_of("sums").code
    assert "norm=oc.norms.lp(3.0))" in advice_of("third powers").code


def test_bfloat16_updates_that_were_clipped_are_found_out():
    """Clipped norms that differ by roundings to bfloat16 are still seen to share the limit."""
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((100, 1, 16)) * np.exp(rng.standard_normal((100, 1, 1)))
    held = clipped(np.abs(grads).reshape(100, -1), 3.0)
    norms = np.linalg.norm(np.asarray(jnp.asarray(held, jnp.bfloat16), float), axis=1)
    assert len(np.unique(norms)) > 50
    advice = oc.History(["w"], norms[:, None]).advise()
    assert advice.policy == "undecided"
    assert "clipped or normalised already" in advice.reasons[0]


@pytest.mark.parametrize(
    "norms", [np.linspace(1, 1.01, 200), 1 - 0.01 * np.linspace(-1, 1, 200) ** 2], ids=["rising", "a maximum"]
)
def test_a_smooth_run_was_not_clipped(norms):
    """Norms that hardly change, as those of whole data sets, are near their largest and share none."""
    assert oc.History(["w"], norms[:, None]).advise().policy == "none"


TX = oc.record(capacity=8)


@pytest.mark.parametrize("bad", [range(20, 40), range(3, 6)], ids=["to the end", "passed"])
def test_a_ring_past_the_first_nan_still_knows_of_it(bad):
    """When a run went on beyond what is kept, the advice names the step all the same."""
    params = tree_of(["a/kernel", "a/bias"])
    scales = np.exp(0.1 * np.random.default_rng(0).standard_normal(40)).astype(np.float32)
    scales[list(bad)] = np.nan

    def step(state, scale):
        return TX.update(jax.tree.map(lambda x: x * scale, params), state)[1], None

    state, _ = jax.jit(lambda scales: jax.lax.scan(step, TX.init(params), scales))(scales)
    advice = oc.History.from_state(state, params).advise(rule=oc.Rule(least_steps=5))
    text = " ".join(advice.reasons)
    if bad[-1] == 39:
        assert advice.policy == "undecided"
        assert "Step 20 is the first that is not, in 'a/bias', 'a/kernel'. Record the steps before" in text
    else:
        assert "Step 3 is the first that is not finite" in text
        assert "went on after 3 steps that were not finite" in text


def recorded(norms, groups, tree, norm=None, **options):
    """A recording made by `record`, of leaves whose norms are these."""
    norm = norm or oc.norms.l2()
    tx = oc.record(groups, norm, capacity=len(norms), **options)
    leaves, structure = jax.tree.flatten(tree)

    def step(state, now):
        grads = [x / jnp.linalg.norm(x.ravel()) * n for x, n in zip(leaves, now, strict=True)]
        return tx.update(jax.tree.unflatten(structure, grads), state, tree)[1], None

    state, _ = jax.jit(lambda start, x: jax.lax.scan(step, start, x))(
        tx.init(tree), np.asarray(norms, np.float32)
    )
    return oc.History.from_state(state, tree, groups, norm)


def acts_on(advice, params):
    """The code's transformation on the tree that was recorded, far beyond any limit: factors by path."""
    tx = from_code(advice)
    grads = jax.tree.map(lambda x: 1e4 * x, params)
    state = tx.init(params)
    for _ in range(2):  # limits that follow norms know nothing before the first
        updates, state = tx.update(grads, state, params)
        grads = jax.tree.map(lambda x: 10 * x, grads)
    flat, _ = jax.tree_util.tree_flatten_with_path(updates)
    return {jax.tree_util.keystr(path): float(jnp.ravel(x)[0]) for path, x in flat}


PARAMS = tree_of(NAMES)
GROUPS = {
    "layer": oc.groups.layer(),
    "depth": oc.groups.depth(1),
    "kind": oc.groups.regex({r"\1 kinds": "(kernel|bias)"}),
    "whole": oc.groups.whole(),
    "unit": oc.groups.unit(axis=0),
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    "norms", [spiky(), spiky(2, 3), by_turns(noise(), [0, 1], [2, 3], [4, 5], [6, 7])], ids=range(3)
)
def test_coarse_rows_and_rows_of_units_have_code_that_runs(norms, groups):
    """Whatever rows were recorded, the advised groups are of whole leaves and fit the tree."""
    history = recorded(norms, GROUPS[groups], PARAMS)
    advice = history.advise()
    assert advice.policy in ("global", "layerwise", "leafwise", "outliers")
    assert len(acts_on(advice, PARAMS)) == len(NAMES)
    assert advice.comparison is not None
    acts_on(history.advise(learning_rate=0.1), PARAMS)


def test_a_recording_of_the_whole_is_held_as_a_whole():
    """Steps that are too long: one limit in a line, and how to tell layers apart."""
    advice = recorded(noise(), oc.groups.whole(), PARAMS).advise(**SGD(learning_rate=1.0))
    assert advice.policy == "global"
    assert advice.code == f"oc.clip_by_global_norm({advice.limit!r})"
    text = " ".join(advice.reasons)
    assert "All together are held to that; record leaves, and each layer can be held to its own." in text
    assert "Each layer is held" not in text


@pytest.mark.parametrize(("entries", "said"), [(7e9, True), (7e4, False)])
def test_adam_is_told_of_its_eps_where_entries_come_near_it(entries, said):
    """A limit far below all norms costs nothing only while entries are far above Adam's eps."""
    sizes = np.full(len(NAMES), entries / len(NAMES))
    norms = 0.1 * spiky()
    reasons = oc.History(NAMES, norms, sizes=sizes).advise(optimizer="adam").reasons
    found = [reason for reason in reasons if "Adam's usual eps of 1e-8" in reason]
    assert len(found) == said
    assert all(f"Spread over {entries:,.0f} entries that is" in reason for reason in found)


def test_a_recording_without_weights_says_why():
    """`record` keeps them unless it was given an axis or shapes."""
    tx, tree = oc.record(), {"a": jnp.ones(3)}
    state = tx.init(jax.eval_shape(lambda: tree))
    for size in noise(60, 1)[:, 0]:
        _, state = tx.update({"a": jnp.float32(size) * tree["a"]}, state)
    reasons = oc.History.from_state(state, tree).advise(**SGD(learning_rate=0.1)).reasons
    assert reasons[0] == (
        "The learning rate was not used: the recording has no norms of the parameters, since record() had an "
        "axis_name or its init saw shapes alone; pass them to oc.History(history.names, history.norms, "
        "start=...)."
    )


def test_recorded_layers_are_blamed_as_layers():
    """A row of kernel and bias is one group of the advice, by its own name."""
    advice = recorded(spiky(2, 3), oc.groups.layer(), PARAMS).advise()
    assert "{'layer_1': ['^layer_1/bias$', '^layer_1/kernel$'], None: '.*'}" in advice.code
    factors = acts_on(advice, PARAMS)
    assert [path for path, x in factors.items() if x < 1e3] == [
        "['layer_1']['bias']",
        "['layer_1']['kernel']",
    ]


def test_recorded_depths_are_held_one_by_one():
    """Blocks of several layers that spike by turns are held as blocks."""
    names = [f"block_{k}/{layer}/kernel" for k in range(4) for layer in ("a", "b")]
    norms = by_turns(noise(), [0, 1], [2, 3], [4, 5], [6, 7])
    advice = recorded(norms, oc.groups.depth(1), tree_of(names)).advise()
    assert advice.policy == "layerwise"
    assert re.fullmatch(r"oc\.clip_by_groupwise_norm\(.*'block_3'.*, oc\.groups\.depth\(1\)\)", advice.code)
    assert "Groups spike one by one" in " ".join(advice.reasons)
    acts_on(advice, tree_of(names))


def test_stacked_layers_are_put_together():
    """Rows of one leaf, `layers/kernel[3]`, are advised on as the leaf."""
    params = {"layers": {"kernel": jnp.ones((4, 2))}, "head": {"kernel": jnp.ones(2)}, "z": jnp.ones(2)}
    groups = oc.groups.stacked(oc.groups.leaf(), "layers/")
    # In the order of the tree: head, layers, z.
    advice = recorded(by_turns(noise(rows=3), 0, 1, 2), groups, params).advise()
    assert advice.policy in ("layerwise", "leafwise")
    assert "'layers" in advice.code
    assert "[" not in advice.code
    acts_on(advice, params)


STRANGE = {
    "haiku": [("mlp/~/linear_0", "w"), ("mlp/~/linear_0", "b"), ("mlp/~/linear_1", "w"), ("out", "w")],
    "metacharacters": ["a.b*c/(w", "a+b/[w]", "a^/$", "{2}/w|v"],
    "backslashes": [r"a\1/w", r"a\g<0>/w", r"b\\/w", "c/w"],
    "spaces and quotes": ["it's/w", 'say "w"/w', "two words/w", "é/w"],
    "top of the tree": ["w", "v", "a/w", "b/w"],
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("ask", [{}, {"learning_rate": 1e-3}], ids=["spikes", "lengths"])
def test_strange_names_are_found_again(name, ask):
    """A leaf to blame is clipped by the code, and it alone, whatever its name."""
    names = STRANGE[name]
    norms = spiky(0, rows=4)
    if ask:
        norms[:, 0] *= 300
    advice = oc.History(names, norms, start=np.ones(4)).advise(**ask)
    assert advice.policy == "outliers"
    tree = tree_of(names)
    updates, _ = from_code(advice).update(jax.tree.map(lambda x: 1e4 * x, tree), from_code(advice).init(tree))
    own, layer = functools.reduce(lambda t, key: t[key], _keys(names[0]), updates), _keys(names[0])[:-1]
    assert float(own[0]) < 1e3
    others = [functools.reduce(lambda t, key: t[key], _keys(other), updates) for other in names[1:]]
    held = [bool(x[0] < 1e3) for x in others]
    # By the length of steps whole layers are held.
    assert held == [bool(ask) and _keys(other)[:-1] == layer for other in names[1:]]


def _keys(name):
    return tuple(name.split("/")) if isinstance(name, str) else name


def test_a_single_array_is_a_tree_too():
    """An array without a path is advised on like any other."""
    params = jnp.ones(3)
    history = recorded(spiky(rows=1), oc.groups.leaf(), params, params=True)
    for ask in ({}, {"learning_rate": 0.1}, {"learning_rate": 10.0}, {"optimizer": "adam"}):
        advice = history.advise(**ask)
        assert advice.policy == ("layerwise" if "learning_rate" in ask else "global")
        assert float(from_code(advice).update(1e6 * params, from_code(advice).init(params))[0][0]) < 1e3


@pytest.mark.parametrize("norm", [oc.norms.rms(), oc.norms.linf(), oc.norms.l1(), oc.norms.spectral()])
def test_recordings_of_other_norms_run(norm):
    """What `record` measured in another norm gives code for the tree it came from."""
    params = {name: jnp.ones((2, 2)) for name in "abcd"}
    history = recorded(spiky(1, rows=4), oc.groups.leaf(), params, norm, params=True)
    acts_on(history.advise(learning_rate=0.1), params)
    advice = history.advise()
    assert acts_on(advice, params)["['a']"] == 1e5
    assert acts_on(advice, params)["['b']"] < 1e4


def test_advice_helps_the_run_it_was_recorded_in():
    """A network that met a bad batch now and then learns, with the advised clipping, what it did not."""
    key = jax.random.split(jax.random.key(0), 3)
    params = {
        "in": {"kernel": jax.random.normal(key[0], (4, 16)) / 2, "bias": jnp.zeros(16)},
        "out": {"kernel": jax.random.normal(key[1], (16, 1)) / 4, "bias": jnp.zeros(1)},
    }
    x = jax.random.normal(key[2], (120, 8, 4))
    y = jnp.sin(x.sum(axis=2, keepdims=True))
    y = y.at[30::30].multiply(1e3)

    def loss(params, x, y):
        hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
        return jnp.mean((hidden @ params["out"]["kernel"] + params["out"]["bias"] - y) ** 2)

    def train(tx):
        def step(carry, batch):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, *batch)
            updates, state = tx.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), value

        return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), (x, y)))()

    with jax.numpy_rank_promotion("allow"):
        (_, state), before = train(optax.chain(oc.record(), optax.sgd(0.02)))
        advice = oc.History.from_state(state, params).advise()
        assert advice.policy != "none"
        (_, state), after = train(optax.chain(oc.record(), advice.transformation(), optax.sgd(0.02)))
    calm = np.arange(120) % 30 > 0
    assert np.mean(after[calm][-40:]) < 0.5 * np.mean(before[calm][-40:])
    assert len(oc.History.from_state(state, params)) == 120


NORMS = st.floats(0, 1e38, width=64) | st.sampled_from([0.0, 1.0, 1.0, 1.0, 1e-30, 50.0, np.nan, np.inf])


@settings(max_examples=20)
@given(data=st.data())
def test_advice_never_raises(data):
    """On any norms, finite or not, of any number of steps and rows, there is an answer whose code runs."""
    steps, rows = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 5))
    norms = data.draw(hnp.arrays(float, (steps, rows), elements=NORMS))
    start = data.draw(st.none() | hnp.arrays(float, rows, elements=NORMS))
    names = [f"layer_{k // 2}/{k}" for k in range(rows)]
    advice = oc.History(names, norms, start=start).advise(
        budget=data.draw(st.sampled_from([0.0, 0.05, 0.5])),
        optimizer=data.draw(st.sampled_from(["sgd", "adam"])),
        learning_rate=data.draw(st.sampled_from([None, 1e-6, 0.1, 100.0])),
        rule=oc.Rule(least_steps=data.draw(st.sampled_from([1, 10, 50])), resamples=10),
    )
    assert len(str(advice).splitlines()) > 1
    from_code(advice).init(tree_of(names))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"budget": 0.6}, r"History\.advise: budget is 0\.6"),
        ({"budget": -0.1}, r"History\.advise: budget is -0\.1"),
        (
            {"optimizer": "adamw"},
            r"History\.advise: optimizer is 'adamw'\. Pass one of 'sgd', 'adam': 'adam' is for AdamW, Lion, ",
        ),
        ({"learning_rate": 0.0}, r"History\.advise: learning_rate is 0\.0"),
        ({"learning_rate": float("nan")}, r"History\.advise: learning_rate is nan"),
    ],
)
def test_what_is_asked_is_checked(asked, said):
    """Arguments outside their range are errors that name them."""
    with pytest.raises(ValueError, match=said):
        history_of("calm").advise(**asked)


def test_a_schedule_is_no_learning_rate():
    """The error says which of its values is wanted."""
    with pytest.raises(TypeError, match=r"learning_rate is .*, of type function\. .* its highest value\."):
        history_of("calm").advise(learning_rate=optax.cosine_decay_schedule(0.1, 10))


JUDGED = "so how long steps are was not judged. Pass"
ADAM = "optimizer 'adam' for Adam and its kin"
UNUSED = "The learning rate was not used: "
LACKING = "the recording has no norms of the parameters; record them with oc.record()."


@pytest.mark.parametrize(
    ("asked", "given", "said"),
    [
        (
            {},
            START,
            [f"Taken: SGD, with a learning rate that is not known, {JUDGED} {ADAM}, or the learning rate."],
        ),
        (
            {},
            {},
            [
                f"Taken: SGD, with a learning rate that is not known, {JUDGED} {ADAM}, or the learning rate, "
                "of a recording with the norms of the parameters, by oc.record()."
            ],
        ),
        (SGD(), START, [f"The learning rate is not known, {JUDGED} the learning rate."]),
        ({"learning_rate": 0.1}, START, [f"Taken: SGD. Pass {ADAM}."]),
        ({"learning_rate": 0.1}, {}, [f"Taken: SGD. Pass {ADAM}.", UNUSED + LACKING]),
        (SGD(learning_rate=0.1), {}, [UNUSED + LACKING]),
        (
            SGD(learning_rate=0.1),
            START | {"norm": "linf"},
            [f"{UNUSED}the norms are linf, and lengths are l2; record these."],
        ),
        (
            SGD(learning_rate=0.1),
            {"start": 0 * ONES},
            [f"{UNUSED}no norm of parameters that get gradients is finite and above zero."],
        ),
        (SGD(learning_rate=0.1), START, []),
        ({"optimizer": "adam"}, {}, []),
        ({"optimizer": "adam", "learning_rate": 0.1}, {}, []),
    ],
)
def test_what_was_assumed_is_said_first(asked, given, said):
    """The optimizer, if none was given; that lengths were not judged; that the learning rate was not used."""
    reasons = oc.History(NAMES, noise(), **given).advise(**asked).reasons
    assert list(reasons[: len(said)]) == said
    assert "recorded steps are ordinary" in reasons[len(said)]


def test_the_default_optimizer_is_sgd():
    """With a learning rate too: only what is said differs."""
    for rate in (None, 0.1):
        history = history_of("too long")
        first, second = (
            history.advise(learning_rate=rate),
            history.advise(learning_rate=rate, optimizer="sgd"),
        )
        assert (first.policy, first.code) == (second.policy, second.code)


def test_it_is_said_if_most_steps_would_be_clipped():
    """Clipping then does what a lower learning rate does."""
    said = " ".join(advice_of("too long").reasons)
    assert "What is advised clips 100% of the ordinary steps: it sets how long steps are" in said
    acted = advice_of("too long").replay(history_of("too long")).acted
    assert acted[np.isfinite(history_of("too long").whole)].all()
    some = " ".join(advice_of("one layer too long").reasons)
    assert "it sets how long steps of these rows are, rather than holding a few; so would" in some


@pytest.mark.parametrize("name", ["together", "one to blame", "spikes too long", "calm", "adam, spikes"])
def test_nothing_is_said_of_the_share_where_it_is_small_or_meant(name):
    """Of spikes alone, or with Adam, whose limit is below all norms on purpose."""
    assert "What is advised clips" not in " ".join(advice_of(name).reasons)


def test_norms_that_are_all_alike_are_said_to_be():
    """Of each, or of one."""
    assert "100 of 100 recorded steps are ordinary: each of norm 1." in str(
        oc.History(["w"], np.ones((100, 1))).advise()
    )
    one = ending(np.array([[2.0], [2e5]]))
    assert "1 of 7 recorded steps is ordinary: its norm is 2." in str(oc.History(["w"], one).advise())


def test_the_rest_is_one_layer():
    """Two layers of which one is to blame."""
    advice = oc.History(["a/w", "b/w", "c/w"], noise(rows=3) * [300, 1, 0], start=10 * np.ones(3)).advise(
        learning_rate=0.01
    )
    assert re.search(
        r"as the weights, those of the other layer 0\.001\. They are held", " ".join(advice.reasons)
    )


def test_the_floor_in_the_code_is_explained():
    """It is the least norm of a layer's weights."""
    floor = re.findall(r"floor=([\d.]+)\)", advice_of("many too long").code)[0]
    said = f"No layer counts as less than {float(floor):g}, the least norm of a layer's weights at the start."
    assert said in advice_of("many too long").reasons[-1]


@pytest.mark.parametrize(("steps", "said"), [(12, "only 12 steps are"), (1, "only 1 step is")])
def test_it_is_said_why_there_is_no_comparison(steps, said):
    """In the last line of the text; an advice that is undecided says why anyway."""
    advice = oc.History(NAMES, ending(noise(steps))).advise()
    assert advice.comparison is None
    assert str(advice).endswith(f"\n\nNo comparison: {said} ordinary.")
    assert "No comparison" not in str(advice_of("too short"))
    assert "No comparison" not in str(advice_of("together"))


LOGGED = ["blocks/0", "blocks/1", "head", "(root)"]
LEAVES = ["blocks/0/w", "blocks/0/b", "blocks/1/w", "head/w", "scale"]


@pytest.mark.parametrize("ask", [{}, {"learning_rate": 0.1}, {"optimizer": "adam"}], ids=str)
@pytest.mark.parametrize("norms", [by_turns(noise(rows=4), *range(4)), spiky(0, rows=4), spiky(rows=4)])
def test_rows_of_layers_have_code_for_layers(norms, ask):
    """Where no leaves are known the code fits the tree all the same, and the advice is never leafwise."""
    given = {"start": np.ones(4)} if ask else {}
    advice = oc.History(LOGGED, norms, rows="layer", **given).advise(**ask)
    assert advice.policy in ("global", "layerwise", "outliers")
    acts_on(advice, tree_of(LEAVES))
    assert not any("leafwise" in row.name for row in advice.comparison.rows)


@pytest.mark.parametrize(("row", "own"), [(0, LEAVES[:2]), (3, LEAVES[4:])])
def test_a_layer_to_blame_is_found_among_the_leaves(row, own):
    """All of its leaves are clipped and no others, whether it has a name or is the top of the tree."""
    advice = oc.History(LOGGED, spiky(row, rows=4), rows="layer").advise()
    assert advice.policy == "outliers"
    held = [path for path, x in acts_on(advice, tree_of(LEAVES)).items() if x < 1e3]
    assert held == ["".join(f"['{key}']" for key in name.split("/")) for name in sorted(own)]


NAMED = {
    "parts, by depth": (
        {r"part \1": r"^block_(\d)/"},
        [f"block_{k}/{x}/kernel" for k in range(4) for x in "ab"],
    ),
    "swapped": (
        {"z": "^a/", "y": "^b/", "x": "^c/", "w": "^d/"},
        [f"{k}/{x}/kernel" for k in "abcd" for x in "ab"],
    ),
    "leaves": ({r"own \1 \2": r"^(\w+)/(\w+)$"}, NAMES),
}


@pytest.mark.parametrize("named", NAMED)
def test_groups_with_names_of_their_own_have_code_that_runs(named):
    """As many groups as a depth or the leaves give, under other names: limits are given by name."""
    rules, names = NAMED[named]
    groups, tree = oc.groups.regex(rules), tree_of(names)
    rows = len(rules) if named == "swapped" else 4 if named.startswith("parts") else 8
    norms = by_turns(noise(), *np.split(np.arange(8), rows))
    history = recorded(norms, groups, tree)
    for asked in ({}, SGD(learning_rate=1.0)):
        advice = history.advise(**asked)
        assert len(acts_on(advice, tree)) == len(names)
        by_code = history.replay(from_code(advice))
        own = advice.replay(history)
        np.testing.assert_allclose(own.limit, by_code.limit, rtol=1e-6)
        assert own.names == by_code.names


def test_what_a_relative_limit_stands_at_is_what_the_code_holds():
    """A layer that starts at zero is held to the floor in the code."""
    weights = np.append(np.geomspace(1, 100, 19), 0)
    norms = noise(rows=20) * np.where(weights > 0, weights, 1)
    history = oc.History(MANY, norms, start=weights, params=np.tile(weights, (len(norms), 1)))
    advice = history.advise(**SGD(learning_rate=0.01))
    assert "oc.limits.relative(" in advice.code
    by_code = history.replay(from_code(advice))
    np.testing.assert_allclose(advice.replay(history).limit, by_code.limit, rtol=1e-5)


def test_singular_values_of_parts_are_not_put_together():
    """The largest of a kernel's columns is not that of the kernel."""
    tree = {"w": jnp.ones((4, 4))}
    tx = oc.record(oc.groups.unit(), oc.norms.spectral())
    _, state = tx.update(tree, tx.init(tree))
    history = oc.History.from_state(state, tree, oc.groups.unit(), oc.norms.spectral())
    assert history.regroup(oc.groups.unit()).names == history.names
    for make in (lambda: history.regroup(oc.groups.leaf()), lambda: history.replay(1.0)):
        with pytest.raises(ValueError, match=r"History: these groups put 'w\[0\]' together with other parts"):
            make()
    with pytest.raises(ValueError, match=r"History\.advise: the rows are singular values of parts of leaves"):
        history.advise()


def test_what_was_not_finite_before_the_recording_is_known_of_rows_put_together():
    """Of units too, whose rows are put together to leaves."""
    tree = {"w": jnp.ones((3, 2))}
    tx = oc.record(oc.groups.unit(), capacity=60)
    state = tx.init(tree)
    update = jax.jit(tx.update)
    for k, size in enumerate(noise(90, 1)[:, 0]):
        _, state = update({"w": jnp.float32(np.nan if k == 3 else size) * tree["w"]}, state)
    reasons = " ".join(oc.History.from_state(state, tree, oc.groups.unit()).advise().reasons)
    assert "Step 3 is the first that is not finite, in 'w[0]', 'w[1]'." in reasons
    assert "Training went on after 1 step that was not finite." in reasons
