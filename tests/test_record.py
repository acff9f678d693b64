"""Recording changes nothing, costs no retrace and no transfer, and keeps what NumPy would have kept."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from versions import enable_x64

import optaxclip as oc
from optaxclip import _record

SHAPES = {
    "head": {"bias": (2,), "kernel": (4, 2)},
    "layers": {"bias": (3, 4), "kernel": (3, 2, 4)},
}
STACKED = oc.groups.stacked(oc.groups.layer(), "^layers/")


def is_shape(x):
    return isinstance(x, tuple)


def normal(*leading, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=(*leading, *shape)).astype(np.float32), SHAPES, is_leaf=is_shape
    )


GRADS, PARAMS = normal(), normal(seed=1)


def scaled(sizes, grads=GRADS):
    """Updates with a leading axis of steps: a tree times one number a step."""
    sizes = np.asarray(sizes, np.float32)
    with np.errstate(invalid="ignore"):  # zero times infinity
        return jax.tree.map(lambda x: np.multiply.outer(sizes, np.asarray(x)), grads)


def scan(tx, updates, loss=None, params=None):
    """The state after updates whose leaves have a leading axis of steps."""

    @jax.jit
    def run(updates, loss):
        def step(state, now):
            grads, value = now
            return tx.update(grads, state, params, value=value)[::-1]

        first = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)
        return jax.lax.scan(step, tx.init(first), (updates, loss))[0]

    return run(updates, loss)


VECTOR = {"w": np.array([0.6, 0.8], np.float32)}  # of norm 1


def scan_norms(norms, **options):
    """The state after updates of one leaf with given norms."""
    return scan(oc.record(**options), scaled(norms, VECTOR))


# --- what comes out -----------------------------------------------------------------------------------------

ODD = {
    "float16": {"a": jnp.array([1.0, 300.0, jnp.inf], jnp.float16)},
    "bfloat16": {"a": jnp.array([1.0, jnp.nan], jnp.bfloat16), "b": jnp.ones((2, 3), jnp.bfloat16)},
    "complex": {"a": jnp.array([3 + 4j, 1j])},
    "integers": {"a": jnp.array([1, 2]), "b": jnp.ones(2), "c": jnp.array([True]), "d": jax.random.key(0)},
    "only integers": {"a": jnp.array([1, 2])},
    "None": {"a": None, "b": jnp.ones(2)},
    "MaskedNode": {"a": optax.MaskedNode(), "b": jnp.ones(2)},
    "no entries": {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)},
    "empty": {},
}


@pytest.mark.parametrize("name", ODD)
def test_updates_come_out_as_the_same_arrays(name):
    """Recording hands on the very arrays it was given, whatever they are; and their bits under jit."""
    tx, grads = oc.record(capacity=2), ODD[name]
    for update in (tx.update, jax.jit(tx.update)):
        out, state = update(grads, tx.init(grads))
        assert jax.tree.structure(out) == jax.tree.structure(grads)
        for new, old in zip(jax.tree.leaves(out), jax.tree.leaves(grads), strict=True):
            assert new is old or bytes_of(new) == bytes_of(old)
        assert int(state.step) == 1
    out, _ = tx.update(grads, tx.init(grads))
    assert out is grads


def bytes_of(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x).tobytes()


def test_float64_updates_come_out_as_they_are_and_are_measured_in_float64():
    """Norms beyond the range of float32 are kept as its largest number, and are finite."""
    with enable_x64(True):
        grads = {"a": jnp.array([3e200, 4e200]), "b": jnp.array([3.0, 4.0])}
        tx = oc.record(capacity=2)
        out, state = jax.jit(tx.update)(grads, tx.init(grads), value=jnp.array(0.5))
        assert bytes_of(out["a"]) == bytes_of(grads["a"])
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(grads))
        assert state.norm[0].tolist() == [np.finfo(np.float32).max, 5.0]
        assert state.nonfinite.tolist() == [0, 0]


@pytest.mark.parametrize("groups", [oc.groups.leaf(), oc.groups.layer(), oc.groups.whole(), oc.groups.unit()])
def test_counts_are_right_where_64_bits_are_switched_on(groups):
    """Counts stay int32, however many leaves and axes they are added up over."""
    with enable_x64(True):
        grads = {f"layer_{k}": {"w": np.ones((30, 200), np.float32), "b": np.ones(5)} for k in range(11)}
        grads["layer_10"]["w"][3, :7] = np.nan
        grads["layer_2"]["b"][1] = np.inf
        grads = jax.tree.map(jnp.asarray, grads)
        tx = oc.record(groups, capacity=2)
        _, state = jax.jit(tx.update)(grads, tx.init(grads))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(grads))
        assert int(state.entries.sum()) == 8


FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e5m2fnuz"]


@pytest.mark.parametrize("dtype", [*FLOATS, "complex64", "complex128"])
def test_what_is_not_finite_is_counted_in_every_dtype(dtype):
    """As NumPy counts it: by bits, but some dtypes have no infinity, and numbers where others have it."""
    with enable_x64(True):
        values = np.array([[0.0, -0.0, 1.0, 288.0, 384.0], [np.nan, np.inf, -np.inf, 65504.0, 1e-8]])
        x = jnp.asarray(values).astype(dtype)
        if jnp.iscomplexobj(x):
            x = x.at[0, 1].set(1 + 1j * jnp.inf).at[1, 0].set(jnp.nan + 1j * jnp.nan)
        tx = oc.record(capacity=2)
        _, state = jax.jit(tx.update)({"w": x}, tx.init({"w": x}))
        assert int(state.entries[0]) == int((~jnp.isfinite(x)).sum()) > 0


# --- norms --------------------------------------------------------------------------------------------------

GROUPS = {
    "whole": oc.groups.whole(),
    "layer": oc.groups.layer(),
    "leaf": oc.groups.leaf(),
    "unit": oc.groups.unit(),
    "stacked": STACKED,
    "regex": oc.groups.regex({None: "^head/bias", "kernels": "kernel", "biases": "bias"}),
    "roles": oc.groups.regex(
        {oc.groups.measured_only("x"): "head", oc.groups.scaled_only("x"): "bias", "x": ""}
    ),
}
NORMS = {
    "l2": oc.norms.l2(),
    "l1": oc.norms.l1(),
    "linf": oc.norms.linf(),
    "rms": oc.norms.rms(),
    "lp": oc.norms.lp(3),
}
PAIRS = [(groups, "l2") for groups in GROUPS] + [("layer", norm) for norm in NORMS if norm != "l2"]


@pytest.mark.parametrize(("groups", "norm"), PAIRS)
def test_the_norms_kept_are_those_of_group_norms(groups, norm):
    """For every grouping and norm, update by update, in the same order."""
    updates = normal(4, seed=2)
    state = scan(oc.record(GROUPS[groups], NORMS[norm], capacity=4), updates)
    measure = jax.jit(lambda tree: oc.group_norms(tree, GROUPS[groups], NORMS[norm]))
    for t in range(4):
        expected = measure(jax.tree.map(lambda x: x[t], updates))  # noqa: B023
        expected = np.concatenate([np.ravel(x) for x in expected.values()])
        np.testing.assert_allclose(state.norm[t], expected, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_the_norms_kept_are_those_of_numpy(norm):
    """In float64, for leaves, in natural order of their paths."""
    updates = normal(3, seed=3)
    state = scan(oc.record(norm=NORMS[norm], capacity=3), updates)
    for t in range(3):
        leaves = jax.tree.leaves(updates)  # sorted by key, as paths are
        expected = [reference.norm([x[t]], norm, 3) for x in leaves]
        np.testing.assert_allclose(state.norm[t], expected, rtol=1e-6)


@pytest.mark.parametrize("count", [0, 3, 5, 6, 12])
def test_the_last_updates_are_kept(count):
    """Fewer updates than the capacity, as many, and more."""
    sizes = np.arange(1, count + 1)
    state = scan_norms(sizes, capacity=5) if count else oc.record(capacity=5).init(VECTOR)
    history = oc.History.from_state(state, VECTOR)
    np.testing.assert_allclose(history.norms[:, 0], sizes[-5:], rtol=1e-6)
    assert history.steps.tolist() == list(range(max(0, count - 5), count))
    assert history.run.updates == count == int(state.step)


# --- the whole run ------------------------------------------------------------------------------------------


def random_norms(count, seed=0):
    """Norms with spikes, zeros and some that are not finite."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(size=count)).astype(np.float32)
    norms[rng.random(count) < 0.02] *= 1e4
    norms[rng.random(count) < 0.02] = 0
    norms[rng.random(count) < 0.02] = np.nan
    norms[rng.random(count) < 0.02] = np.inf
    norms[128:192] = np.nan  # whole stretches
    return norms


def median(values):
    finite = values[np.isfinite(values)]
    return np.median(finite) if len(finite) else np.nan


def thinned(values, slots, capacity):
    """Stretches as they are described, one after the other."""
    length, medians, largest = 32, [], []
    for end in range(1, len(values) + 1):
        if end % length:
            continue
        own = values[end - length : end]
        medians.append(median(own[-capacity:]))
        largest.append(np.where(np.isfinite(own), own, np.inf).max())
        if len(medians) == slots:
            with np.errstate(invalid="ignore"):
                pairs = zip(medians[::2], medians[1::2], strict=True)
                medians = [b if np.isnan(a) else a if np.isnan(b) else (a + b) / 2 for a, b in pairs]
            largest = [max(pair) for pair in zip(largest[::2], largest[1::2], strict=True)]
            length *= 2
    return length, medians, largest


LONG = random_norms(5000)


@pytest.fixture(scope="module")
def long_run():
    return oc.History.from_state(scan_norms(LONG, capacity=64, stretches=4), VECTOR).run


def test_a_long_run_fits_into_few_stretches(long_run):
    """Maxima, medians and lengths are those of the description, whatever the number of doublings."""
    length, medians, largest = thinned(LONG, 4, 64)
    found = long_run.stretches
    assert found.length == length == 2048
    np.testing.assert_allclose(found.median[:, 0], medians, rtol=1e-6)
    np.testing.assert_allclose(found.largest[:, 0], largest, rtol=1e-6)


def test_the_maximum_of_a_stretch_is_exact_and_its_median_between_those_of_its_parts(long_run):
    """So no spike is lost, and ordinary norms are told from it."""
    found = long_run.stretches
    assert len(found.median) == len(LONG) // found.length == 2
    for k in range(2):
        own = LONG[k * found.length : (k + 1) * found.length]
        assert found.largest[k, 0] == (np.inf if not np.isfinite(own).all() else own.max())
        parts = [median(part) for part in own.reshape(-1, 32)]
        assert np.nanmin(parts) * (1 - 1e-6) <= found.median[k, 0] <= np.nanmax(parts) * (1 + 1e-6)


@pytest.mark.parametrize("capacity", [8, 100])
def test_stretches_are_exact_before_they_are_joined(capacity):
    """Each has the median of its norms, or of the last that the recording holds, and the maximum."""
    state = scan_norms(LONG[:250], capacity=capacity, stretches=8)
    found = oc.History.from_state(state, VECTOR).run.stretches
    assert found.length == 32
    parts = LONG[: 7 * 32].reshape(7, 32)
    np.testing.assert_allclose(found.median[:, 0], [median(x[-capacity:]) for x in parts], rtol=1e-6)
    expected = [np.where(np.isfinite(x), x, np.inf).max() for x in parts]
    np.testing.assert_allclose(found.largest[:, 0], expected, rtol=1e-6)


def test_stretches_of_the_loss():
    """The loss is thinned beside the norms, whatever its sign; without one the median is NaN."""
    loss = -np.arange(64, dtype=np.float32)
    updates = scaled(np.ones(64), VECTOR)
    found = oc.History.from_state(scan(oc.record(), updates, loss), VECTOR).run.stretches
    assert found.loss_median.tolist() == [-15.5, -47.5]
    assert found.loss_largest.tolist() == [0, -32]
    without = oc.History.from_state(scan(oc.record(), updates), VECTOR).run.stretches
    assert np.isnan(without.loss_median).all()
    assert np.isinf(without.loss_largest).all()


def test_the_size_of_the_state_is_that_of_the_documentation():
    """About 8 kB a group with the defaults, from the first update to the last."""
    small, large = (oc.record().init({str(k): jnp.ones(1) for k in range(n)}) for n in (10, 20))
    sizes = [sum(x.nbytes for x in jax.tree.leaves(state)) for state in (small, large)]
    assert 8000 <= (sizes[1] - sizes[0]) / 10 < 8500


def test_the_histogram_is_that_of_numpy_on_its_own_edges():
    """Every finite norm above zero is counted once; those beyond the edges in the outermost bins."""
    rng = np.random.default_rng(0)
    # Not on the edges: a logarithm in float32 does not tell on which side of one its neighbours are.
    place = rng.integers(-330, 330, 400) + rng.uniform(0.01, 0.99, 400)
    norms = (2.0 ** (place / 4)).astype(np.float32)
    norms[:5] = 0, np.nan, np.inf, 0, 2.0**60
    run = oc.History.from_state(scan_norms(norms, stretches=2, capacity=1), VECTOR).run
    counted = norms[np.isfinite(norms) & (norms > 0)]
    held = np.clip(counted, run.edges[0], run.edges[-1] * (1 - 1e-7))
    assert run.histogram[0].tolist() == np.histogram(held, run.edges)[0].tolist()
    assert run.histogram.sum() == len(counted)
    assert run.edges[[0, -1]].tolist() == [2.0**-64, 2.0**64]


def test_the_largest_norm_and_its_update(long_run):
    """The largest finite norm of the whole run, the first of equal ones; NaN and infinity do not count."""
    finite = np.where(np.isfinite(LONG), LONG, 0)
    np.testing.assert_allclose(long_run.largest, finite.max(), rtol=1e-6)
    assert long_run.largest_step.tolist() == [finite.argmax()]
    state = scan_norms([np.nan, 0, 2, 7, 7, np.inf, 1])
    assert (state.largest.tolist(), state.largest_step.tolist()) == ([7], [3])
    state = scan_norms([np.nan, np.inf])
    assert (state.largest.tolist(), state.largest_step.tolist()) == ([0], [-1])
    assert scan_norms([0.0]).largest_step.tolist() == [0]


# --- what was not finite ------------------------------------------------------------------------------------


def test_what_was_not_finite_is_counted_by_row_and_by_entry():
    """In how many updates, in which first, how many entries, and how many in the first of all."""
    updates = normal(6)
    updates["head"]["kernel"][2, 0, :2] = np.nan, np.inf
    updates["head"]["kernel"][4] = -np.inf
    updates["layers"]["bias"][3, 1, 2] = np.nan
    state = scan(oc.record(capacity=2), updates)  # rows: head/bias, head/kernel, layers/bias, layers/kernel
    assert state.nonfinite.tolist() == [0, 2, 1, 0]
    assert state.first.tolist() == [-1, 2, 3, -1]
    assert state.entries.tolist() == [0, 10, 1, 0]
    assert state.first_entries.tolist() == [0, 2, 0, 0]
    found = oc.History.from_state(state, GRADS).first_nonfinite()
    assert found == oc.history.FirstNonfinite(2, ("head/kernel",), (2,), "layers/bias")


ENTRIES = {
    "whole": {"whole": 4},
    "unit": {"layers/bias[0]": 1, **{f"layers/kernel[1,{k}]": 1 for k in (0, 2, 3)}},
    "stacked": {"layers[2]": 4},
    "roles": {"x": 3},
}


@pytest.mark.parametrize("groups", ENTRIES)
def test_entries_are_counted_in_rows_of_every_kind(groups):
    """Each in its own row; those of leaves that are not measured are not counted."""
    updates = normal(2)
    updates["layers"]["kernel"][1, 2, 1] = np.nan, 1, np.inf, -np.inf
    updates["layers"]["bias"][1, 2, 0] = np.nan
    state = scan(oc.record(GROUPS[groups]), updates)
    names = oc.History.from_state(state, GRADS, GROUPS[groups]).names
    counts = zip(names, state.entries.tolist(), strict=True)
    assert {name: count for name, count in counts if count} == ENTRIES[groups]


def test_an_overflowing_float16_entry_is_an_infinite_one():
    grads = {"a": jnp.array([1.0, jnp.inf, jnp.nan], jnp.float16), "b": jnp.array([3e38] * 4)}
    tx = oc.record()
    _, state = tx.update(grads, tx.init(grads))
    assert state.entries.tolist() == [2, 0]
    assert state.nonfinite.tolist() == [1, 0]


def test_the_count_of_entries_stops_at_its_largest_number():
    """It does not run over into negative numbers."""
    tx, most = oc.record(), np.iinfo(np.int32).max
    state = tx.init(VECTOR)._replace(entries=jnp.array([most - 3], jnp.int32))
    update = jax.jit(tx.update)
    for expected in (most - 1, most, most):
        _, state = update({"w": jnp.array([jnp.nan, jnp.inf])}, state)
        assert state.entries.tolist() == [expected]


def test_the_entries_of_a_row_do_not_run_over_within_an_update(monkeypatch):
    """Of a model with more than 2^31 parameters in one group, all NaN; leaves stand for billions here."""
    monkeypatch.setattr(_record, "_not_finite", lambda block: jnp.full(block.kept, 2**30, jnp.int32))
    grads = {"a": jnp.full(3, jnp.nan), "b": jnp.full(5, jnp.nan), "c": jnp.full(3, jnp.nan)}
    for groups, expected in ((oc.groups.whole(), [2**31 - 1]), (oc.groups.leaf(), [2**30] * 3)):
        tx = oc.record(groups)
        _, state = tx.update(grads, tx.init(grads))
        assert state.entries.tolist() == expected
        assert state.first_entries.tolist() == expected


# --- loss, parameters, start --------------------------------------------------------------------------------


def test_the_loss_is_kept_where_it_is_passed():
    """NaN stands for updates without one; any real dtype will do."""
    tx = oc.record(capacity=4)
    state = tx.init(VECTOR)
    for loss in ({"value": 2}, {}, {"value": jnp.array(0.5, jnp.bfloat16)}, {"value": np.float64(0.25)}):
        _, state = tx.update(VECTOR, state, **loss)
    np.testing.assert_array_equal(state.loss, np.float32([2, np.nan, 0.5, 0.25]))
    assert oc.History.from_state(state, VECTOR).loss.dtype == np.float64
    _, state = tx.update(VECTOR, tx.init(VECTOR))
    assert oc.History.from_state(state, VECTOR).loss is None


def test_a_loss_for_each_example_is_an_error():
    tx = oc.record()
    with pytest.raises(ValueError, match=r"^record: value has shape \(3,\)\. Pass the loss of the update"):
        tx.update(VECTOR, tx.init(VECTOR), value=jnp.ones(3))


def test_the_norms_of_parameters_are_kept_if_asked_for():
    """Beside those of the updates, row by row; the ones at the start always are."""
    tx = oc.record(oc.groups.layer(), capacity=3, params=True)

    @jax.jit
    def run(updates, params):
        def step(state, now):
            return tx.update(now[0], state, now[1])[::-1]

        return jax.lax.scan(step, tx.init(jax.tree.map(lambda x: x[0], params)), (updates, params))[0]

    params = normal(3, seed=4)
    history = oc.History.from_state(run(normal(3), params), GRADS, oc.groups.layer())
    expected = [
        [reference.norm([x[t] for x in layer.values()]) for layer in params.values()] for t in range(3)
    ]
    np.testing.assert_allclose(history.params, expected, rtol=1e-6)
    np.testing.assert_allclose(history.start, expected[0], rtol=1e-6)
    without = oc.record().init(PARAMS)
    assert without.params == ()
    assert oc.History.from_state(without, PARAMS).params is None


def test_missing_or_foreign_parameters_are_an_error():
    tx = oc.record(params=True)
    state = tx.init(GRADS)
    with pytest.raises(ValueError, match="requires the current value of parameters"):
        tx.update(GRADS, state)
    with pytest.raises(
        ValueError, match=r"^record: the update's leaf 'head/bias' .*, the parameters have none"
    ):
        tx.update(GRADS, state, {"layers": GRADS["layers"]})


def test_the_start_is_nan_where_init_saw_no_arrays():
    """Shapes alone have no norms; the history has none then."""
    abstract = jax.eval_shape(lambda: GRADS)
    for state in (oc.record().init(abstract), oc.record(axis_name="data").init(GRADS)):
        assert np.isnan(state.start).all()
        assert oc.History.from_state(state, abstract).start is None
    chex.assert_trees_all_equal_shapes_and_dtypes(oc.record().init(abstract), oc.record().init(GRADS))


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"capacity": 0}, ValueError, "^record: capacity is 0, below 1. Pass 1 or more."),
        ({"capacity": 2.0}, TypeError, "^record: capacity is 2.0, of type float. Pass an integer."),
        ({"stretches": 0}, ValueError, "^record: stretches is 0, below 2."),
        ({"stretches": 3}, ValueError, "^record: stretches is 3, which is odd. Pass an even number."),
        ({"groups": oc.groups.leaf}, TypeError, r"^record: groups is .* Call it: groups\.leaf\(\)\."),
        ({"norm": "l2"}, TypeError, "^record: norm is 'l2', of type str."),
    ],
)
def test_errors_of_the_factory(options, error, text):
    with pytest.raises(error, match=text):
        oc.record(**options)


def test_a_tree_with_other_rows_is_an_error():
    tx = oc.record()
    text = r"^record: the tree has 2 rows of groups, 'bias', 'kernel'; `init` saw 1\. Pass updates"
    with pytest.raises(ValueError, match=text):
        tx.update(GRADS["head"], tx.init(VECTOR))


# --- how JAX and Optax run it -------------------------------------------------------------------------------

SIZES = np.float32([1, 100, 0.01])


def chains(tx):
    """Everywhere that a transformation can stand, and whether it sees all leaves and all updates."""
    sgd = optax.sgd(0.1, momentum=0.9)
    clip = oc.clip_by_global_norm(1.0)
    labels = {"layers": "own", "head": "free"}
    return {
        "first": optax.chain(tx, clip, sgd),
        "middle": optax.chain(clip, tx, sgd),
        "last": optax.chain(clip, sgd, tx),
        "named_chain": optax.named_chain(("record", tx), ("sgd", sgd)),
        "masked": optax.masked(optax.chain(tx, sgd), {"layers": True, "head": False}),
        "partition": optax.partition({"own": optax.chain(tx, sgd), "free": optax.sgd(0.1)}, labels),
        "MultiSteps": optax.MultiSteps(optax.chain(tx, sgd), 2).gradient_transformation(),
        "apply_if_finite": optax.apply_if_finite(optax.chain(tx, sgd), 3),
        "inject_hyperparams": optax.inject_hyperparams(lambda lr: optax.chain(tx, optax.sgd(lr)))(lr=0.1),
    }


def expected_norms(place):
    """The norms of the leaves that reach it, by NumPy and Optax."""
    leaves = jax.tree.leaves(GRADS)
    if place in ("masked", "partition"):
        leaves = jax.tree.leaves(GRADS["layers"])
    own = np.array([reference.norm([x]) for x in leaves])
    raw = np.multiply.outer(SIZES, own)
    clipped = raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1)
    if place == "middle":
        return clipped
    if place == "last":
        factor = SIZES / np.maximum(np.linalg.norm(raw, axis=1), 1)
        trace = 0.0
        momentum = [trace := 0.9 * trace + f for f in factor]
        return 0.1 * np.multiply.outer(np.array(momentum), own)
    if place == "MultiSteps":
        return raw[:2].mean(axis=0, keepdims=True)
    return raw


def step(tx, state, size):
    grads = jax.tree.map(lambda x: size * x, GRADS)
    updates, state = tx.update(grads, state, PARAMS, value=size)
    return state, updates


@pytest.mark.parametrize("place", chains(optax.identity()))
def test_it_stands_anywhere_and_changes_nothing(place):
    """Updates are those without it, in every place; what it kept are the norms that got there."""

    def run(tx):
        def body(state, size):
            return step(tx, state, size)

        with jax.numpy_dtype_promotion("standard"):  # Optax divides floats by integers
            return jax.jit(lambda state: jax.lax.scan(body, state, SIZES))(tx.init(PARAMS))

    state, updates = run(chains(oc.record())[place])
    _, plain = run(chains(optax.identity())[place])
    chex.assert_trees_all_close(updates, plain, rtol=1e-6)
    seen = {"layers": PARAMS["layers"]} if place in ("masked", "partition") else PARAMS
    history = oc.History.from_state(state, seen)
    np.testing.assert_allclose(history.norms, expected_norms(place), rtol=1e-5)
    if place not in ("MultiSteps",):
        np.testing.assert_array_equal(history.loss, SIZES.astype(float))


def test_the_numbers_of_the_factory_need_static_args():
    """Under inject_hyperparams sizes of arrays stay numbers."""
    names = ("groups", "norm", "capacity", "stretches", "params", "axis_name")
    tx = optax.inject_hyperparams(oc.record, static_args=names)(capacity=3)
    _, state = jax.jit(tx.update)(GRADS, tx.init(GRADS))
    assert len(oc.History.from_state(state, GRADS)) == 1
    with pytest.raises(TypeError, match="static_args='capacity'"):
        optax.inject_hyperparams(oc.record)(capacity=3).init(GRADS)


def states_of(tx, sizes):
    one, state = jax.jit(lambda state, size: step(tx, state, size)[0]), tx.init(PARAMS)
    for size in sizes:
        state = one(state, jnp.float32(size))
    return state


def test_every_mode_agrees_with_the_plain_loop():
    """jit, scan and vmap fill the same state."""
    tx, sizes = oc.record(capacity=2, params=True), np.float32([1, np.nan, 2, 0])
    expected = states_of(tx, sizes)

    def scanned(sizes):
        return jax.lax.scan(lambda state, size: step(tx, state, size), tx.init(PARAMS), sizes)[0]

    chex.assert_trees_all_close(jax.jit(scanned)(sizes), expected, rtol=1e-6)
    both = jax.jit(jax.vmap(scanned))(np.stack([sizes, 2 * sizes]))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], both), expected, rtol=1e-6)
    np.testing.assert_allclose(both.norm[1, 0], 2 * np.asarray(expected.norm[0]), rtol=1e-6)


def test_the_state_is_fixed_and_donated_and_traced_once():
    """Structure and dtypes are those of `init`, every array has a buffer of its own, nothing is retraced."""
    tx, traced = oc.record(params=True), []

    def update(grads, state, params, value):
        traced.append(1)
        return tx.update(grads, state, params, value=value)

    run = jax.jit(update, donate_argnums=1)
    state = tx.init(jax.tree.map(jnp.asarray, PARAMS))
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(buffers)) == len(buffers)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for k in range(3):
        grads = jax.tree.map(lambda x: jnp.asarray(x * (k + 1)), GRADS)  # noqa: B023
        old = state
        _, state = run(grads, state, PARAMS, jnp.float32(k))
        assert all(x.is_deleted() for x in jax.tree.leaves(old) if x.size)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == expected
    assert len(traced) == 1


def test_no_value_is_read_on_the_host():
    """An update of arrays on their device transfers nothing and calls nothing, not even with a NaN in it."""
    tx, update = oc.record(), jax.jit(oc.record().update)
    grads = jax.device_put(
        jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), jax.tree.map(jnp.asarray, GRADS))
    )
    state = tx.init(grads)
    assert "callback" not in update.lower(grads, state).as_text()
    with jax.transfer_guard("disallow"):
        _, state = jax.block_until_ready(update(grads, state))
    assert state.entries.tolist() == [1] * 4


def test_tree_map_params_finds_no_parameters_in_the_state():
    """Optax's tools call `init` with a tree without leaves."""
    tx = oc.record(params=True)
    marked = optax.tree_utils.tree_map_params(
        tx, lambda _: "parameter", tx.init(PARAMS), transform_non_params=lambda _: "other"
    )
    assert set(jax.tree.leaves(marked)) == {"other"}


def test_a_state_passes_through_flax_serialization():
    """A recording goes on from a checkpoint as if nothing had been."""
    serialization = pytest.importorskip("flax.serialization")
    tx = optax.chain(oc.record(capacity=2), optax.sgd(0.1))
    expected, state = states_of(tx, [1, 2, 3]), states_of(tx, [1, 2])
    restored = serialization.from_bytes(tx.init(PARAMS), serialization.to_bytes(state))
    chex.assert_trees_all_equal(jax.jit(lambda state: step(tx, state, jnp.float32(3))[0])(restored), expected)


def test_an_nnx_optimizer_records_and_history_reads_it():
    """Flax shows `kernel/value` to `init` and `kernel` to `update`: rows and names stay the same."""
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(oc.record(params=True), optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda model: jnp.sum(model(x) ** 2))(model)
        optimizer.update(model, grads, value=loss)
        return loss

    losses = [float(train(model, optimizer, jnp.ones((4, 2)))) for _ in range(2)]
    history = oc.History.from_state(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert history.names == ("bias", "kernel")
    assert history.loss.tolist() == losses
    assert (history.norms > 0).all()
    assert history.params.shape == (2, 2)


def test_bins_are_as_wide_as_documented():
    assert 2 ** (1 / _record.PER_DOUBLING / 2) - 1 < 0.091
    assert _record.BINS == -2 * _record.LEAST * _record.PER_DOUBLING
