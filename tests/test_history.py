"""A recording's rows, its errors, and how finer recordings become coarser ones."""

import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from hypothesis import given, settings

import optaxclip as oc

GRADS = {
    "head": {"bias": np.ones(2, np.float32), "kernel": np.ones((4, 2), np.float32)},
    "layers": {"bias": np.ones((3, 4), np.float32), "kernel": np.ones((3, 2, 4), np.float32)},
    "scale": np.ones((), np.float32),
}
LEAF, LAYER, UNIT = oc.groups.leaf(), oc.groups.layer(), oc.groups.unit()
ROLES = oc.groups.regex(
    {
        oc.groups.measured_only("x"): "head/kernel",
        oc.groups.scaled_only("x"): "head/bias",
        "x": "scale",
        None: "layers/bias",
        "y": ".*",
    }
)
COARSE = {
    "whole": oc.groups.whole(),
    "layer": LAYER,
    "leaf": LEAF,
    "depth": oc.groups.depth(1),
    "regex": oc.groups.regex({None: "^scale", "kernels": "kernel", "rest": ".*"}),
    "roles": ROLES,
    "labels": oc.groups.labels({"head": "head", "layers": {"bias": None, "kernel": "k"}, "scale": "head"}),
    "function": oc.groups.labels(lambda path, leaf: path[-1]),
}
STACKED = {
    "stacked layer": oc.groups.stacked(LAYER, "^layers/"),
    "stacked leaf": oc.groups.stacked(LEAF, "^layers/"),
}
FINE = {
    "leaf": LEAF,
    "unit": UNIT,
    "stacked leaf": STACKED["stacked leaf"],
    "stacked unit": oc.groups.stacked(UNIT, "^layers/"),
}
NORMS = {
    "l2": oc.norms.l2(),
    "l1": oc.norms.l1(),
    "linf": oc.norms.linf(),
    "lp(3.0)": oc.norms.lp(3),
    "rms": oc.norms.rms(),
}
CASES = (
    [(fine, coarse, "l2") for fine in FINE for coarse in COARSE]
    + [("stacked unit", coarse, "l2") for coarse in STACKED]
    + [("stacked leaf", "stacked layer", "l2"), ("unit", "unit", "l2")]
    + [("leaf", coarse, norm) for norm in NORMS if norm != "l2" for coarse in ("layer", "roles")]
    + [("stacked unit", "stacked layer", norm) for norm in NORMS if norm != "l2"]
)
GROUPS = COARSE | STACKED | FINE


@functools.cache
def update(groups, norm):
    tx = oc.record(GROUPS[groups], NORMS[norm], capacity=1, stretches=2, params=True)
    return tx, jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[1])


def recorded(groups, norm, grads):
    params = jax.tree.map(lambda x: 0.5 * x + 1, grads)
    return oc.History.from_state(update(groups, norm)[1](grads, params), grads, GROUPS[groups], NORMS[norm])


@pytest.mark.parametrize(("fine", "coarse", "norm"), CASES)
@settings(max_examples=5)
@given(grads=trees.like(GRADS, bound=1e4))
def test_regrouping_equals_recording_coarser_groups(fine, coarse, norm, grads):
    """Names, norms, parameters' norms and sizes are those of a recording made with the coarser groups."""
    found = recorded(fine, norm, grads).regroup(GROUPS[coarse])
    expected = recorded(coarse, norm, grads)
    assert found.names == expected.names
    assert found.norm == expected.norm == norm
    assert found.sizes.tolist() == expected.sizes.tolist()
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-5, atol=1e-35)
    np.testing.assert_allclose(found.params, expected.params, rtol=1e-5)
    np.testing.assert_allclose(found.start, expected.start, rtol=1e-5)
    assert found.steps.tolist() == expected.steps.tolist()
    assert found.run is None


@given(grads=trees.like(GRADS, special=True))
def test_regrouping_keeps_what_is_not_finite(grads):
    """A coarser group is finite where all of its leaves are, and measured where they are."""
    found, expected = recorded("leaf", "l2", grads).regroup(LAYER), recorded("layer", "l2", grads)
    assert np.isfinite(found.norms).tolist() == np.isfinite(expected.norms).tolist()
    close = np.isfinite(found.norms)
    largest = float(np.finfo(np.float32).max)  # as which float32 keeps what is larger
    np.testing.assert_allclose(np.minimum(found.norms, largest)[close], expected.norms[close], rtol=1e-5)


def test_regrouping_twice_equals_regrouping_once():
    history = recorded("stacked unit", "l2", GRADS)
    once = history.regroup(COARSE["depth"])
    twice = history.regroup(STACKED["stacked layer"]).regroup(COARSE["depth"])
    assert once.names == twice.names == ("head", "layers", "scale")
    np.testing.assert_allclose(once.norms, twice.norms, rtol=1e-12)


@pytest.mark.parametrize(
    ("fine", "coarse", "text"),
    [
        (
            "layer",
            LEAF,
            r"^History: these groups divide row 'head', which was recorded as one: leaf 'head/bias' to",
        ),
        (
            "leaf",
            UNIT,
            r"have a norm for each index of axis 1 of leaf 'head/kernel'; row 'head/kernel' was rec",
        ),
        (
            "leaf",
            STACKED["stacked layer"],
            r"for each index of axis 0 of leaf 'layers/bias'; row 'layers/bias'",
        ),
        ("layer", oc.groups.regex({None: "bias", "all": ""}), r"divide row 'head', .*'head/bias' to None"),
        ("layer", ROLES, r"divide row 'head', which was recorded as one"),
    ],
)
def test_what_was_recorded_as_one_cannot_be_divided(fine, coarse, text):
    with pytest.raises(ValueError, match=text):
        recorded(fine, "l2", GRADS).regroup(coarse)


def test_groups_finer_than_the_recording_are_refused_before_they_are_listed():
    """A leaf may have any number of units: the error takes no memory for each."""
    state = oc.record(capacity=1).init({"w": np.ones(1, np.float32)})
    history = oc.History.from_state(state, {"w": jax.ShapeDtypeStruct((10**5, 3), np.float32)})
    for call in (history.regroup, lambda groups: history.replay(1.0, groups)):
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="each index of axis 0 of leaf 'w'; row 'w' was recorded as"):
                call(oc.groups.unit(1))
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert most < 2**20


def test_groups_by_shape_need_shapes():
    """Norms and names alone do not tell how a leaf is divided; groups by path are made all the same."""
    history = oc.History(["a/kernel", "a/bias"], [[3.0, 4.0]])
    assert history.regroup(LAYER).norms.tolist() == [[5.0]]
    for groups in (UNIT, oc.groups.labels(lambda path, leaf: str(leaf.shape))):
        with pytest.raises(ValueError, match=r"^History: these groups depend on the shapes of leaves, which"):
            history.regroup(groups)


def test_keys_with_slashes_stay_whole():
    """Haiku's modules have slashes in their names: a tuple of keys says where a layer ends."""
    haiku = {
        "mlp/~/linear_0": {"b": jnp.ones(1), "w": jnp.ones((1, 4))},
        "mlp/~/linear_1": {"w": jnp.ones((4, 1))},
    }
    names = [(module, name) for module, own in haiku.items() for name in own]
    plain = oc.History(names, [[1.0, 2.0, 2.0]])
    tx = oc.record(capacity=1)
    state = oc.History.from_state(tx.update(haiku, tx.init(haiku))[1], haiku)
    for history in (plain, state):
        assert history.names == ("mlp/~/linear_0/b", "mlp/~/linear_0/w", "mlp/~/linear_1/w")
        coarse = history.regroup(LAYER)
        assert coarse.names == ("mlp/~/linear_0", "mlp/~/linear_1")
        np.testing.assert_allclose(coarse.norms, [[np.sqrt(5), 2]], rtol=1e-6)
        assert history.regroup(oc.groups.depth(1)).names == coarse.names


def test_rows_are_in_natural_order_of_their_groups():
    history = oc.History(["block_10/w", "block_9/w"], [[1.0, 2.0]], sizes=[4, 1])
    assert history.names == ("block_10/w", "block_9/w")
    coarse = history.regroup(LAYER)
    assert (coarse.names, coarse.norms.tolist(), coarse.sizes.tolist()) == (
        ("block_9", "block_10"),
        [[2, 1]],
        [1, 4],
    )


# --- the constructor ----------------------------------------------------------------------------------------


def test_a_history_of_arrays():
    """Lists, arrays of JAX and any real dtype will do; all becomes float64, steps int64."""
    history = oc.History(
        ["a", "b"],
        jnp.array([[3.0, 4.0], [jnp.nan, jnp.inf]], jnp.bfloat16),
        steps=[2, 7],
        loss=np.float32([-1, np.nan]),
        params=[[1, 2], [3, 4]],
        start=[1, 2],
        sizes=[10, 20],
    )
    assert len(history) == 2
    assert history.norms.dtype == history.loss.dtype == history.params.dtype == np.float64
    assert (history.steps.dtype, history.steps.tolist()) == (np.int64, [2, 7])
    assert history.whole[0] == 5
    assert not np.isfinite(history.whole[1])
    assert (history.norm, history.run, history.rows[1].sources[0].keys) == ("l2", None, ("b",))


LAYERS = ["blocks/0", "blocks/1", "(root)"]
MADE = {
    "arrays": lambda path, norms: oc.History(LAYERS, norms, rows="layer"),
    "metrics": lambda path, norms: oc.History.from_metrics(
        [{f"clip/norm_before/{k}": x for k, x in zip(LAYERS, row, strict=True)} for row in norms],
        rows="layer",
    ),
    "csv": lambda path, norms: oc.History.from_csv(path, rows="layer"),
    "jsonl": lambda path, norms: oc.History.from_jsonl(path, rows="layer"),
}


@pytest.mark.parametrize("kind", MADE)
def test_names_may_be_of_layers(tmp_path, kind):
    """Then groups by layer leave the rows as they are, and finer ones are refused."""
    path, norms = tmp_path / "log", np.array([[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]])
    if kind == "csv":
        head = ",".join(f"norm_before/{name}" for name in LAYERS)
        path.write_text("\n".join([head, *(",".join(map(str, row)) for row in norms)]))
    if kind == "jsonl":
        lines = [
            json.dumps({f"norm_before/{k}": x for k, x in zip(LAYERS, row, strict=True)}) for row in norms
        ]
        path.write_text("\n".join(lines))
    history = MADE[kind](path, norms)
    assert history.names == tuple(LAYERS)
    layers = history.regroup(LAYER)
    assert sorted(layers.names) == sorted(LAYERS)
    assert history.replay(1.0, LAYER).norm.shape == (2, 3)
    assert history.regroup(oc.groups.whole()).norms[:, 0].tolist() == [5, 3]
    blocks = history.regroup(oc.groups.regex({"blocks": "^blocks/", None: ".*"}))
    np.testing.assert_allclose(blocks.norms[:, 0], [5, np.sqrt(5)])
    for finer in (LEAF, oc.groups.depth(3)):
        with pytest.raises(ValueError, match=r"divide row '.*', a layer whose leaves were not logged\. Pass"):
            history.regroup(finer)
    with pytest.raises(ValueError, match="depend on the shapes of leaves"):
        history.regroup(UNIT)


WHOLE = {"l2": 5, "l1": 7, "linf": 4, "lp(3.0)": 91 ** (1 / 3), "rms": np.sqrt((9 * 45 + 16 * 5) / 50)}


@pytest.mark.parametrize("norm", WHOLE)
def test_the_whole_norm_is_that_of_the_rows_together(norm):
    history = oc.History(["a", "b"], [[3.0, 4.0], [0.0, 0.0]], norm=norm, sizes=[45, 5])
    np.testing.assert_allclose(history.whole, [WHOLE[norm], 0], rtol=1e-12)


TWO = ["a", "b"]
STEPS = "^History: steps must be whole numbers from 0 to 9007199254740991, each larger than the one before"
ONE_STEP = [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: oc.History(TWO, [1.0, 2.0]),
            ValueError,
            r"^History: norms has shape \(2,\); 2 names, 'a', 'b', ask for \(steps, 2\)\.$",
        ),
        (lambda: oc.History(TWO, [[1.0]]), ValueError, r"^History: norms has shape \(1, 1\); 2 names"),
        (lambda: oc.History(TWO, ONE_STEP, loss=[1, 2]), ValueError, r"^History: loss has shape \(2,\)"),
        (lambda: oc.History(TWO, ONE_STEP, params=[1, 2]), ValueError, r"^History: params has shape \(2,\)"),
        (lambda: oc.History(TWO, ONE_STEP, start=[1]), ValueError, r"^History: start has shape \(1,\)"),
        (
            lambda: oc.History(TWO, ONE_STEP, sizes=[[1, 2]]),
            ValueError,
            r"^History: sizes has shape \(1, 2\)",
        ),
        (lambda: oc.History(TWO, ONE_STEP, steps=[1, 2]), ValueError, r"^History: steps has shape \(2,\)"),
        (lambda: oc.History(TWO, [["x", "y"]]), TypeError, r"^History: norms is no array of numbers: .*Pass"),
        (lambda: oc.History(TWO, [[1.0], [1.0, 2.0]]), TypeError, r"^History: norms is no array of numbers"),
        (
            lambda: oc.History(TWO, [[1.0, -2.0]]),
            ValueError,
            r"^History: norms holds -2, for 'b'\. Norms are",
        ),
        (lambda: oc.History(TWO, ONE_STEP, start=[-1, 1]), ValueError, r"^History: start holds -1, for 'a'"),
        (lambda: oc.History(TWO, ONE_STEP * 2, steps=[3, 3]), ValueError, STEPS),
        (lambda: oc.History(TWO, ONE_STEP, steps=[-1]), ValueError, STEPS),
        (lambda: oc.History(TWO, ONE_STEP, steps=[0.5]), ValueError, STEPS),
        (lambda: oc.History(TWO, ONE_STEP, steps=[np.nan]), ValueError, STEPS),
        (lambda: oc.History(TWO, ONE_STEP * 2, steps=[np.inf, np.inf]), ValueError, STEPS),
        (lambda: oc.History(TWO, ONE_STEP, steps=[1e30]), ValueError, STEPS),
        (lambda: oc.History(TWO, ONE_STEP, steps=[2**53]), ValueError, STEPS),
        (lambda: oc.History(TWO, ONE_STEP, steps=[2**53 + 1]), ValueError, STEPS),
        (lambda: oc.History(["a", "a"], ONE_STEP), ValueError, r"^History: 'a' is the name of several rows"),
        (
            lambda: oc.History(TWO, ONE_STEP, rows="module"),
            ValueError,
            r"^History: rows is 'module'\. Pass one of 'leaf', 'layer'\.$",
        ),
        (
            lambda: oc.History(TWO, ONE_STEP, norm="l3"),
            ValueError,
            r"^History: there is no norm 'l3'\. Pass l2",
        ),
        (lambda: oc.History(TWO, ONE_STEP, norm="rms"), ValueError, r"^History: to put rms norms together"),
    ],
)
def test_errors_of_the_constructor(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- from a state -------------------------------------------------------------------------------------------

STATE = oc.record(capacity=1).init(GRADS)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: oc.History.from_state((), GRADS),
            ValueError,
            r"^History\.from_state: no RecordState in a state of type tuple\. Pass the state",
        ),
        (lambda: oc.History.from_state((STATE, STATE), GRADS), ValueError, r"from_state: 2 RecordState in a"),
        (
            lambda: oc.History.from_state(STATE, GRADS, LAYER),
            ValueError,
            r"the state has 5 rows; these groups and parameters have 3: .*'head', 'layers'",
        ),
        (lambda: oc.History.from_state(STATE, GRADS["head"]), ValueError, r"has 5 rows; .* have 2"),
        (
            lambda: oc.History.from_state(STATE, GRADS, "leaf"),
            TypeError,
            r"^History\.from_state: groups is 'leaf'",
        ),
        (
            lambda: oc.History.from_state(STATE, GRADS, LEAF, "l2"),
            TypeError,
            r"^History\.from_state: norm is 'l2'",
        ),
    ],
)
def test_errors_of_from_state(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("norm", [3, 3.0, np.float64(3), 2.5, 1, 2])
def test_every_order_has_a_name(norm):
    """The name leads back to the norm, whether the order was an integer or not."""
    measured = oc.norms.lp(norm)
    tx = oc.record(norm=measured, capacity=1)
    state = tx.update(GRADS, tx.init(GRADS))[1]
    history = oc.History.from_state(state, GRADS, norm=measured)
    assert history.norm == {1: "l1", 2: "l2"}.get(norm, f"lp({float(norm)})")
    assert history.replay(oc.rescale_by_norm(1.0, norm=measured)).norm.shape == (1, 1)


def test_a_norm_of_ones_own_has_no_name():
    own = oc.norms.l2()._replace(degree=2.5)
    with pytest.raises(ValueError, match=r"^History: the norm is none of optaxclip\.norms, and has no name"):
        oc.History.from_state(STATE, GRADS, norm=own)


def test_shapes_in_place_of_parameters_will_do():
    shapes = jax.eval_shape(lambda: GRADS)
    history = oc.History.from_state(STATE, shapes)
    assert history.names == ("head/bias", "head/kernel", "layers/bias", "layers/kernel", "scale")
    assert history.sizes.tolist() == [2, 8, 12, 24, 1]
    assert len(history) == 0
    assert history.whole.shape == (0,)


# --- the first that was not finite --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([[1, 1, 1], [2, 2, 2]], None),
        ([[1, 1, 1], [np.nan, 1, 1]], (11, ("a",), None, "b")),
        ([[1, np.inf, 1], [np.nan, 1, 1]], (10, ("b",), None, "c")),
        ([[np.nan, 1, np.inf]], (10, ("a", "c"), None, "b")),
        ([[np.nan, np.nan, np.nan]], (10, ("a", "b", "c"), None, None)),
        (np.zeros((0, 3)), None),
    ],
)
def test_the_first_that_was_not_finite(norms, expected):
    """Its step and names; and behind these, in order, the next one that was still finite."""
    found = oc.History(["a", "b", "c"], norms, steps=np.arange(10, 10 + len(norms))).first_nonfinite()
    assert found == (None if expected is None else oc.history.FirstNonfinite(*expected))


def test_the_first_of_the_run_is_known_after_the_ring_has_lost_it():
    tx = oc.record(capacity=1)
    bad = jax.tree.map(np.copy, GRADS)
    bad["head"]["kernel"][0] = np.nan
    state = tx.update(bad, tx.update(GRADS, tx.init(GRADS))[1])[1]
    state = tx.update(GRADS, state)[1]
    found = oc.History.from_state(state, GRADS).first_nonfinite()
    assert found == oc.history.FirstNonfinite(1, ("head/kernel",), (2,), "layers/bias")
