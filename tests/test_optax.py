"""Where Optax has the name, the numbers are Optax's wherever Optax's are right."""

import contextlib
import importlib
import importlib.util
import re
import unittest

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from versions import OLD_OPTAX

import optaxclip as oc

clipping = pytest.importorskip("optax.transforms._clipping")


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


UNITS = 4 if OLD_OPTAX else 5  # the highest rank whose units Optax knows by default
TREES = {
    "layers": {"dense": {"w": random(6, 5), "b": random(5)}, "conv": {"w": random(3, 3, 4, 2)}},
    "list": [random(7), (random(4, 1, 6), jnp.float32(2.0)), None, random(*(2, 3, 2, 2, 3)[-UNITS:])],
    "ones": {
        "row": random(1, 1, 5),
        "column": random(5, 1),
        "channel": random(1, 1, 1, 4, 1),
        "one": random(1),
    },
}
PAIRS = {
    "clip_by_global_norm": (oc.clip_by_global_norm(1.5), optax.clip_by_global_norm(1.5)),
    "clip_by_global_norm, unclipped": (oc.clip_by_global_norm(1e3), optax.clip_by_global_norm(1e3)),
    "clip_by_block_rms": (oc.clip_by_block_rms(0.5), optax.clip_by_block_rms(0.5)),
    "clip_by_value": (oc.clip_by_value(0.5), optax.clip(0.5)),
    "adaptive_grad_clip": (oc.adaptive_grad_clip(0.1), optax.adaptive_grad_clip(0.1)),
    "adaptive_grad_clip, eps": (oc.adaptive_grad_clip(0.1, 0.4), optax.adaptive_grad_clip(0.1, 0.4)),
    "normalize": (
        oc.normalize_by_global_norm(2.0, eps=1e-6),
        optax.normalize_by_update_norm(scale_factor=2.0, eps=1e-6),
    ),
    "normalize, large eps": (
        oc.normalize_by_global_norm(1.0, eps=10.0),
        optax.normalize_by_update_norm(eps=10.0),
    ),
}


def as_optax_is_written():
    """Optax mixes dtypes and ranks freely, which the tests of this library do not."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    return stack


def assert_equal_updates(ours, theirs, grads):
    params = jax.tree.map(lambda x: 0.1 * x + 0.05, grads)
    updates, _ = jax.jit(ours.update)(grads, ours.init(params), params)
    with as_optax_is_written():
        expected, _ = theirs.update(grads, theirs.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", PAIRS)
def test_updates_equal_those_of_optax(name, tree):
    """Methods that share a purpose with one of Optax give its numbers for ordinary float32 updates."""
    assert_equal_updates(*PAIRS[name], TREES[tree])


@pytest.mark.parametrize(
    ("axis", "shapes"),
    [
        (
            None,
            [(7,), (4, 6), (5, 2, 3), (3, 3, 4, 2), (2, 3, 2, 2, 3), (1, 1, 5), (5, 1), (1, 1, 1, 4), (1,)],
        ),
        (0, [(7,), (4, 6), (1, 1, 5), (5, 2, 3)]),
        (-1, [(7,), (4, 6), (1, 1, 5), (2, 3, 2, 2, 3)]),
        ((0, 1), [(4, 6), (5, 2, 3), (1, 1, 5)]),
        ((1, 2, -1), [(3, 3, 4, 2), (2, 3, 3, 2, 2, 2)]),
    ],
)
def test_adaptive_grad_clip_has_the_units_of_optax(axis, shapes):
    """Units follow from the rank as they do in Optax, ones in the shape included, or from the same axes."""
    ours, theirs = oc.adaptive_grad_clip(0.2, axis=axis), optax.adaptive_grad_clip(0.2, axis=axis)
    known = [shape for shape in shapes if axis is not None or len(shape) <= UNITS]
    assert_equal_updates(ours, theirs, [random(*shape, seed=1) for shape in known])


@pytest.mark.parametrize("by", ["uniform", "size"])
def test_budgets_under_vmap_equal_per_example_layer_norm_clip(by):
    """Optax's per-example clipping by layers is a vmap of `rescale_tree` with a budget."""
    grads = [random(4, 6, 2), random(4, 3)]
    limit = oc.limits.budget(1.5, by)
    clip = jax.vmap(lambda tree: oc.rescale_tree(tree, limit, groups=oc.groups.leaf()))
    clipped, stats = jax.jit(clip)(grads)
    summed, counts = optax.per_example_layer_norm_clip(grads, 1.5, uniform=by == "uniform")
    chex.assert_trees_all_close([x.sum(0) for x in clipped], summed, rtol=1e-6, atol=1e-6)
    assert stats.clipped.sum(0).tolist() == [int(n) for n in counts]


def test_a_global_limit_under_vmap_equals_per_example_global_norm_clip():
    """Optax's per-example clipping by the global norm is a vmap of `rescale_tree`."""
    grads = [random(4, 6, 2), random(4, 3)]
    clipped, stats = jax.jit(jax.vmap(lambda tree: oc.rescale_tree(tree, 1.5)))(grads)
    summed, count = optax.per_example_global_norm_clip(grads, 1.5)
    chex.assert_trees_all_close([x.sum(0) for x in clipped], summed, rtol=1e-6, atol=1e-6)
    assert int(stats.clipped.sum()) == int(count)


# This test of Optax asserts a root mean square of 1 to 7 places, which is half a unit in the last place of
# float32; Optax's own function fails it on some machines. 6 places have to do, and every other test passes.
BY_A_ROUNDING = "test_clip_by_block_rms"


def suite(module, name):
    """A test case of Optax, or None where Optax was installed without it, or without what it needs."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


# In a dictionary, or pytest would run all of their tests as they are.
SUITES = {
    "clipping": suite("optax.transforms._clipping_test", "ClippingTest"),
    "monitoring": suite("optax.transforms._monitoring_test", "MonitoringTest"),
    "alias": suite("optax._src.alias_test", "AliasTest"),
    "contrib": suite("optax.contrib._common_test", "ContribTest"),
}


def names_of(which, *words):
    """The names of its tests whose name and parameters have all of some words."""
    case = SUITES[which]
    names = unittest.TestLoader().getTestCaseNames(case) if case else []
    return [name for name in names if all(word in f"{name} {getattr(case, name).__doc__}" for word in words)]


def problems(case):
    """What goes wrong in one of Optax's tests."""
    result = unittest.TestResult()
    with as_optax_is_written():
        case.run(result)
    assert result.testsRun == 1
    return [text for _, text in result.failures + result.errors]


def initialised(factory):
    """The factory, with a state in place of the None that Optax's tests pass."""

    def make(*args, **kwargs):
        tx = factory(*args, **kwargs)

        def update(updates, state, params=None):
            return tx.update(updates, tx.init(updates) if state is None else state, params)

        return optax.GradientTransformation(tx.init, update)

    return make


@pytest.mark.skipif(SUITES["clipping"] is None, reason="Optax was installed without its tests")
@pytest.mark.parametrize("name", names_of("clipping"))
def test_the_tests_of_optax_pass_with_these_functions_in_place_of_its_own(monkeypatch, name):
    """Optax's tests cannot tell these functions from its own."""
    if name == BY_A_ROUNDING:
        case = SUITES["clipping"]
        equal = case.assertAlmostEqual
        monkeypatch.setattr(case, "assertAlmostEqual", lambda self, a, b: equal(self, a, b, places=6))
    monkeypatch.setattr(clipping, "clip", initialised(oc.clip_by_value))
    for method in ("clip_by_block_rms", "clip_by_global_norm", "adaptive_grad_clip"):
        monkeypatch.setattr(clipping, method, initialised(getattr(oc, method)))
    assert not problems(SUITES["clipping"](name))


@pytest.mark.skipif(SUITES["monitoring"] is None, reason="Optax was installed without its tests")
@pytest.mark.parametrize("name", names_of("monitoring"))
def test_the_monitors_of_optax_see_the_same_in_front_of_these_functions(monkeypatch, name):
    """What `optax.snapshot` and `optax.monitor` keep is found by name beside the state of the clip."""
    monkeypatch.setattr(clipping, "clip_by_global_norm", oc.clip_by_global_norm)
    assert not problems(SUITES["monitoring"](name))


# What Optax demands of each of its optimizers, of SGD behind these. The limit is a number to be injected.
CHAINS = {
    "record and leaves": lambda max_norm, sgd: optax.chain(
        oc.record(capacity=8), oc.clip_by_leafwise_norm(max_norm), sgd
    ),
    "adaptive": lambda max_norm, sgd: optax.chain(oc.adagc(max_norm=max_norm), sgd),
    "skip": lambda max_norm, sgd: oc.skip_updates(optax.chain(oc.zclip(max_norm=max_norm), sgd), 1e3),
}


def clips_sgd(monkeypatch, chain):
    """Puts a clipped SGD in the place of SGD, where Optax's tests look for it; the calls of it."""
    calls = []

    def sgd(learning_rate, momentum=None, max_norm=1.0):
        calls.append(learning_rate)
        return CHAINS[chain](max_norm, optax.sgd(learning_rate, momentum))

    monkeypatch.setattr(importlib.import_module("optax._src.alias"), "sgd", sgd)
    return calls


# All of them for the first; of the others the narrow and the complex dtypes, and the 10,000 steps until they
# converge, would say the same again.
OF_SGD = [
    (chain, name)
    for chain in CHAINS
    for name in names_of("alias", "opt_name='sgd'")
    if chain == "record and leaves"
    or not re.search("test_optimization|float16|complex", getattr(SUITES["alias"], name).__doc__)
]


@pytest.mark.skipif(
    SUITES["alias"] is None, reason="Optax was installed without its tests, or without what they need"
)
@pytest.mark.parametrize(("chain", "name"), OF_SGD)
def test_clipped_optimizers_keep_the_contract_of_optax(monkeypatch, chain, name):
    """They converge, keep dtypes and state, accumulate, and let themselves be injected."""
    calls = clips_sgd(monkeypatch, chain)
    assert not problems(SUITES["alias"](name))
    assert calls


WRAPPERS = ("mechanize", "schedule_free", "reduce_on_plateau")
# Of their tests those that the plain optimizers above have not passed already.
WRAPPED = [
    name
    for wrapper in WRAPPERS
    for rate in (0.1, 0.01, 0.001)
    for words in (
        ["test_optimizers(", "_setup_matrix_parabola"],
        ["test_optimizers(", "_setup_mixed_tensor_target"],
        ["test_gradient_accumulation", "bfloat16"],
        ["test_preserve_dtype", "bfloat16"],
        ["test_optimizers_can_be_wrapped"],
    )
    if wrapper != "reduce_on_plateau" or "test_optimizers_can_be_wrapped" not in words  # Optax skips it
    for name in names_of(
        "contrib", f"opt_name='sgd', opt_kwargs={{'learning_rate': {rate}}}, wrapper_name='{wrapper}'", *words
    )
]


@pytest.mark.skipif(SUITES["contrib"] is None, reason="Optax was installed without its tests")
@pytest.mark.parametrize("name", WRAPPED)
def test_the_wrappers_of_optax_take_clipped_optimizers(monkeypatch, name):
    """Mechanic, schedule-free and the reduction on plateaus, around SGD behind a clip by leaf."""
    calls = clips_sgd(monkeypatch, "record and leaves")
    assert not problems(SUITES["contrib"](name))
    assert calls


INSTALLED = importlib.util.find_spec("optax.transforms._clipping_test") is not None


@pytest.mark.skipif(OLD_OPTAX or not INSTALLED, reason="Optax was installed without its tests, or lacks some")
def test_the_suites_of_optax_are_found():
    """A later Optax may name its tests otherwise; then these lists must follow."""
    assert None not in SUITES.values()
    assert len(names_of("monitoring")) >= 2
    assert len(names_of("clipping")) >= 8
    assert len(OF_SGD) >= 24
    assert len(WRAPPED) >= 12
