"""Bad input gets a clear error at the earliest point: where, what was wrong, at which leaf, what to do."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc

PARAMS = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones((3, 2))}}
LEAF = oc.groups.leaf()


def init(groups, params=PARAMS):
    return lambda: oc.clip_by_groupwise_norm(1.0, groups).init(params)


def update(tx, updates=PARAMS, params=None, of=PARAMS):
    return lambda: tx.update(updates, tx.init(of), params)


FACTORY = [
    (
        lambda: oc.rescale_by_norm(1.0, norm=oc.norms.l1()._replace(degree=0.5)),
        "rescale_by_norm: norm has the degree 0.5, below 1. Pass a norm whose partial results grow at",
    ),
    (
        lambda: oc.clip_by_global_norm(-1),
        "clip_by_global_norm: max_norm is -1, not among the numbers from 0 to",
    ),
    (lambda: oc.rescale_by_norm(-1), "rescale_by_norm: limit is -1, not among the numbers from 0 to inf."),
    (lambda: oc.clip_by_global_norm(float("nan")), "clip_by_global_norm: max_norm is nan, not among the"),
    (
        lambda: oc.clip_by_value(-1.0),
        "clip_by_value: max_delta is -1.0, not among the numbers from 0 to inf.",
    ),
    (lambda: oc.clip_by_global_norm(1.0, eps=-1e-6), "clip_by_global_norm: eps is -1e-06"),
    (lambda: oc.limits.constant(-2.0), "limits.constant: c is -2.0"),
    (lambda: oc.limits.per_group({"a": -2.0}), "limits.per_group: 'a' is -2.0"),
    (lambda: oc.limits.budget(-2.0), "limits.budget: total is -2.0"),
    (
        lambda: oc.limits.budget(1.0, by="layer"),
        "limits.budget: by is 'layer'. Pass one of 'uniform', 'size'.",
    ),
    (lambda: oc.limits.relative(-0.1), "limits.relative: ratio is -0.1"),
    (lambda: oc.limits.relative(0.1, floor=-1), "limits.relative: floor is -1"),
    (lambda: oc.limits.after(-1, 1.0, 2.0), "limits.after: steps is -1, below 0. Pass 0 or more."),
    (lambda: oc.responses.soft("hard"), "responses.soft: kind is 'hard'. Pass one of 'rational', 'sqrt'."),
    (
        lambda: oc.norms.lp(0.5),
        "norms.lp: p is 0.5, not among the finite orders from 1. Use norms.linf() for inf",
    ),
    (lambda: oc.norms.lp(np.inf), "norms.lp: p is inf"),
    (lambda: oc.groups.depth(-1), "groups.depth: k is -1, below 0."),
    (
        lambda: oc.groups.regex({"a": "("}),
        "groups.regex: the pattern '(' does not compile: missing ), unterm",
    ),
    (
        lambda: oc.groups.regex({r"a\2": "(x)"}),
        r"groups.regex: the name 'a\\2' refers to group '2', which the pattern '(x)' lacks.",
    ),
    (
        lambda: oc.rescale_by_norm(1.0, nonfinite="skip"),
        "rescale_by_norm: nonfinite is 'skip'. Pass one of 'propagate', 'zero'.",
    ),
    (lambda: oc.adaptive_grad_clip(-0.1), "adaptive_grad_clip: clipping is -0.1"),
    (lambda: oc.adaptive_grad_clip(0.1, eps=-1), "adaptive_grad_clip: eps is -1"),
    (lambda: oc.aggc(low=2.0), "aggc: low is 2.0, above high, 1.0. Pass the lower end as low."),
    (
        lambda: oc.adaptive_grad_clip(0.1, axis=0, groups=LEAF),
        "adaptive_grad_clip: both axis and groups are given. Pass groups.unit(axis).",
    ),
]

TYPES = [
    (
        lambda: oc.clip_by_global_norm("1"),
        "clip_by_global_norm: max_norm is '1', of type str. Pass a number or an array.",
    ),
    (
        lambda: oc.clip_by_global_norm({"a": 1}),
        "clip_by_global_norm: max_norm is a dict. Pass limits.per_group({name: limit, ...}).",
    ),
    (lambda: oc.clip_by_value(None), "clip_by_value: max_delta is None, of type NoneType."),
    (
        lambda: oc.rescale_by_norm(1.0, groups=oc.groups.leaf),
        "Pass one of optaxclip.groups. Call it: groups.leaf().",
    ),
    (lambda: oc.rescale_by_norm(1.0, groups="leaf"), "rescale_by_norm: groups is 'leaf', of type str."),
    (
        lambda: oc.rescale_by_norm(1.0, norm=2),
        "rescale_by_norm: norm is 2, of type int. Pass one of optaxclip.n",
    ),
    (lambda: oc.rescale_by_norm(1.0, response=None), "rescale_by_norm: response is None, of type NoneType."),
    (lambda: oc.limits.constant(None), "limits.constant: c is None"),
    (lambda: oc.limits.schedule(1.0), "limits.schedule: fn is 1.0. Pass a function of the step."),
    (lambda: oc.limits.per_group([1.0]), "limits.per_group: limits is of type list. Pass a dict"),
    (lambda: oc.limits.budget(oc.limits.constant(1.0)), "limits.budget: total is a Limit."),
    (lambda: oc.limits.relative(oc.limits.constant(1.0)), "limits.relative: ratio is a Limit."),
    (lambda: oc.limits.after(1.5, 1.0, 2.0), "limits.after: steps is 1.5, of type float. Pass an integer."),
    (
        lambda: oc.clip_by_groupwise_norm(1.0, "leaf"),
        "clip_by_groupwise_norm: groups is 'leaf', of type str. Pass one of optaxclip.groups.",
    ),
    (
        lambda: oc.adagc(groups=oc.groups.leaf),
        "adagc: groups is of type function. Pass one of optaxclip.groups. Call it: groups.leaf().",
    ),
    (lambda: oc.clip_by_unitwise_norm(1.0, axis=0.5), "clip_by_unitwise_norm: axis is 0.5, of type float."),
    (
        lambda: oc.adaptive_grad_clip(oc.limits.constant(1.0)),
        "adaptive_grad_clip: clipping is a Limit. Pass a number, an array or a schedule.",
    ),
    (lambda: oc.clip_by_global_norm(), "missing 1 required positional argument: 'max_norm'"),
    (lambda: oc.norms.lp("2"), "norms.lp: p is '2', of type str. Pass a Python number."),
    (lambda: oc.groups.depth(1.0), "groups.depth: k is 1.0, of type float. Pass an integer."),
    (
        lambda: oc.groups.regex([("a", "b")]),
        "groups.regex: rules is of type list. Pass a dict of name: pattern.",
    ),
    (lambda: oc.groups.regex({1: "a"}), "groups.regex: a group is called 1. Pass a str that is not empty"),
    (lambda: oc.groups.regex({"a": 1}), "groups.regex: the pattern 1 is of type int. Pass a str."),
    (
        lambda: oc.groups.regex({"a": b"w"}),
        "groups.regex: the pattern b'w' is of type bytes. Pass a str.",
    ),
    (
        lambda: oc.groups.regex({"a": re.compile(b"w")}),
        "groups.regex: the pattern b'w' is of type bytes. Pass a str.",
    ),
    (lambda: oc.groups.regex({"a": [1]}), "groups.regex: the pattern 1 is of type int. Pass a str."),
    (lambda: oc.groups.measured_only(""), "groups.measured_only: a group is called ''."),
    (lambda: oc.groups.labels({"a": 1}), "groups.labels: a group is called 1."),
    (lambda: oc.groups.unit(0.5), "groups.unit: axis is 0.5, of type float. Pass an integer."),
    (
        lambda: oc.groups.unit(jnp.float32(0)),
        "Pass an integer. Under optax.inject_hyperparams, name it: static_args='axis'.",
    ),
    (lambda: oc.groups.stacked("layer", "x"), "groups.stacked: inner is 'layer', of type str."),
    (lambda: oc.groups.layer(names=[1]), "groups.layer: names holds 1. Pass one path, a str, for each leaf."),
    (lambda: oc.metrics(oc.clip_by_global_norm(1.0).init(PARAMS), norm="l2"), "metrics: norm is 'l2'"),
]

INIT = [
    (
        init(oc.groups.regex({"body": "dense"})),
        "groups.regex: no rule matches leaf 'head/kernel'. Rules, in order: 'dense'. End with '.*' to catch",
    ),
    (init(oc.groups.regex({r"\1": "(x?)"})), r"comes out empty at leaf 'dense/bias'. Add text to it."),
    (
        init(oc.groups.labels({"dense": "a"})),
        "groups.labels: no name for leaf 'head/kernel'. Names are given at 'dense'. Add one at or above",
    ),
    (
        init(oc.groups.unit(1)),
        "groups.unit: axis 1 is out of range at leaf 'dense/bias', which has shape (3,).",
    ),
    (
        init(oc.groups.unit(), {"w": jnp.ones((2,) * 7)}),
        "groups.unit: leaf 'w' has rank 7, shape (2, 2, 2, 2, 2, 2, 2); the default knows ranks 0 to 6.",
    ),
    (
        init(oc.groups.stacked(LEAF, "dense", axis=1)),
        "groups.stacked: axis 1 is out of range at leaf 'dense/bias', which has shape (3,).",
    ),
    (
        init(oc.groups.stacked(LEAF, "layers")),
        "groups.stacked: no leaf matches 'layers', among 'dense/bias', 'dense/kernel', 'head/kernel'.",
    ),
    (
        init(oc.groups.stacked(oc.groups.whole(), "head")),
        "groups: group 'whole' has rows of shape (3,) at leaf 'head/kernel' and of shape () at leaf",
    ),
    (
        init(oc.groups.labels({"dense": oc.groups.scaled_only("x"), "head": "y"})),
        "groups: group 'x', of leaf 'dense/bias', is scaled but nothing in it is measured.",
    ),
    (
        init(oc.groups.leaf(names=["a", "b"])),
        "groups: names= has 2 paths for a tree of 3 leaves. Pass one per",
    ),
    (
        lambda: oc.clip_by_layerwise_norm(oc.limits.per_group({"dense": 1.0, "haed": 1.0})).init(PARAMS),
        "limits.per_group: there is no group 'haed'. Groups: 'dense', 'head'. Mend the name.",
    ),
    (
        lambda: oc.clip_by_layerwise_norm(oc.limits.per_group({"dense": 1.0})).init(PARAMS),
        "limits.per_group: group 'head' has no limit. Groups: 'dense', 'head'. Give it one, or jnp.inf.",
    ),
    (
        lambda: oc.clip_by_layerwise_norm(jnp.ones(3)).init(PARAMS),
        "clip_by_layerwise_norm: max_norm has shape (3,) for 2 rows of groups, 'dense', 'head'. Pass one",
    ),
    (
        lambda: oc.clip_by_layerwise_norm(oc.limits.at_most(1.0, np.ones((2, 1)))).init(PARAMS),
        "limits.at_most: b has shape (2, 1) for 2 rows of groups, 'dense', 'head'. Pass one number",
    ),
    (
        lambda: oc.clip_by_layerwise_norm(
            oc.limits.per_group({"dense": jnp.ones(2), "head": oc.limits.constant(jnp.ones(1))})
        ).init(PARAMS),
        "limits.per_group: 'dense' has shape (2,) for 1 rows of groups, 'dense'. Pass one number, or one for",
    ),
    (
        lambda: oc.adaptive_grad_clip(0.1, jnp.ones(3), groups=LEAF).init({"a": PARAMS["head"]}),
        "limits.relative: floor has shape (3,) for 1 rows of groups, 'a/kernel'. Pass one number, or one for",
    ),
    (
        lambda: oc.clip_per_example(jnp.ones(3), groups=oc.groups.layer()).init(PARAMS),
        "clip_per_example: limit has shape (3,) for 2 rows of groups, 'dense', 'head'. Pass one number",
    ),
    (
        lambda: oc.clip_by_spectral_norm(jnp.ones(2)).init(PARAMS),
        "clip_by_spectral_norm: max_norm has shape (2,) for 3 rows of groups, 'dense/bias', 'dense/kernel'",
    ),
    (
        lambda: oc.skip_updates(optax.sgd(0.1), jnp.ones(3)).init(PARAMS),
        "skip_updates: limit has shape (3,) for 1 rows of groups, 'whole'. Pass one number, or one for each",
    ),
    (
        lambda: jax.eval_shape(lambda c: oc.clip_by_leafwise_norm(c).init(PARAMS), jnp.ones(2)),
        "clip_by_leafwise_norm: max_norm has shape (2,) for 3 rows of groups, 'dense/bias', 'dense/kernel',",
    ),
]

UPDATE = [
    (
        update(oc.clip_by_layerwise_norm(1.0), updates={"dense": PARAMS["dense"]}),
        "clip_by_layerwise_norm: the tree has 1 rows of groups, 'dense'; `init` saw 2. Pass updates with the",
    ),
    (
        update(oc.adaptive_grad_clip(0.1)),
        "adaptive_grad_clip: You are using a transformation that requires the current value of parameters",
    ),
    (
        update(oc.adaptive_grad_clip(0.1, groups=LEAF), params={"dense": PARAMS["dense"]}),
        "adaptive_grad_clip: the update's leaf 'head/kernel' has shape (3, 2), the parameters have none.",
    ),
    (
        update(oc.adaptive_grad_clip(0.1, groups=LEAF), params=jax.tree.map(jnp.ravel, PARAMS)),
        "adaptive_grad_clip: the update's leaf 'dense/kernel' has shape (4, 3), the parameters",
    ),
    (
        update(oc.clip_by_layerwise_norm(lambda step: jnp.ones(3))),
        "clip_by_layerwise_norm: the limit has shape (3,) for 2 rows of groups, 'dense', 'head'.",
    ),
    (
        lambda: oc.metrics(optax.sgd(0.1).init(PARAMS)),
        "metrics: no RescaleState in a state of type tuple, nor one of another method that metrics knows.",
    ),
    (
        lambda: oc.metrics(oc.clip_by_layerwise_norm(1.0).init(PARAMS), PARAMS),
        "metrics: the state has 2 rows; these groups and parameters have 1: 'whole'. Pass the groups and",
    ),
    (
        lambda: oc.metrics(oc.clip_by_global_norm(1.0).init(PARAMS), PARAMS, [LEAF, LEAF]),
        "metrics: 2 groups for 1 states. Pass one for each state.",
    ),
]


STATES = {
    "clip_by_global_norm": (oc.clip_by_global_norm(1.0), "RescaleState"),
    "zclip": (oc.zclip(), "RescaleState"),
    "record": (oc.record(), "RecordState"),
    "skip_updates": (oc.skip_updates(optax.identity()), "SkipState"),
    "carry_clipped": (oc.carry_clipped(oc.clip_by_value(1.0)), "CarryState"),
    "clip_per_example": (oc.clip_per_example(1.0), "PerExampleState"),
    "clip_by_spectral_norm": (oc.clip_by_spectral_norm(1.0), "SpectralState"),
    "clip_by_value": (oc.clip_by_value(1.0), "ClipByValueState"),
    "acclip": (oc.acclip(), "ACClipState"),
    "mask_spikes": (oc.mask_spikes(), "MaskSpikesState"),
    "adaptive_value_clip": (oc.adaptive_value_clip(), "AdaptiveValueClipState"),
    "scale_by_stable_adam": (oc.scale_by_stable_adam(), "ScaleByStableAdamState"),
    "reset_momentum": (oc.reset_momentum(optax.identity()), "ResetMomentumState"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_transformation_is_named(name):
    """Such as that of Optax's clip, in a checkpoint."""
    tx, kind = STATES[name]
    message = (
        f"{name}: the state is of type EmptyState. Pass the {kind} that `init` or the last update returned; "
        "where a checkpoint has none yet, that of `init(params)`."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        tx.update(PARAMS, optax.EmptyState(), PARAMS)


NAMED = [
    (lambda: oc.autoclip(0.9), "autoclip: percentile is 0.9, of 100. Pass 90, or for less than one in a "),
    (lambda: oc.quantile_clip(0.95), "quantile_clip: percentile is 0.95, of 100. Pass 95, or for less than "),
    (
        lambda: oc.clip_by_block_rms(-1.0),
        "clip_by_block_rms: threshold is -1.0, not among the numbers from 0",
    ),
    (lambda: oc.clip_by_unitwise_norm(-1.0), "clip_by_unitwise_norm: max_norm is -1.0"),
    (lambda: oc.clip_by_groupwise_norm(-1.0, LEAF), "clip_by_groupwise_norm: max_norm is -1.0"),
    (lambda: oc.clip_by_leafwise_norm(-1.0), "clip_by_leafwise_norm: max_norm is -1.0"),
    (
        lambda: oc.clip_by_leafwise_norm(1.0, nonfinite="skip"),
        "clip_by_leafwise_norm: nonfinite is 'skip'. Pass one of 'propagate', 'zero'.",
    ),
    (lambda: oc.normalize_by_global_norm(-1.0), "normalize_by_global_norm: norm is -1.0"),
    (lambda: oc.normalize_by_layerwise_norm(-1.0), "normalize_by_layerwise_norm: norm is -1.0"),
    (lambda: oc.automatic_clip(gamma=-1.0), "automatic_clip: gamma is -1.0"),
    (lambda: oc.psac_clip(r=0.0), "psac_clip: r is 0.0, not among the numbers above 0."),
    (lambda: oc.delta_clip(delta=2.0), "delta_clip: delta is 2.0, not among the numbers from 0 to 1."),
    (lambda: oc.smooth_clip(kind="hard"), "smooth_clip: kind is 'hard'. Pass one of 'rational', 'sqrt'."),
    (lambda: oc.autoclip(101.0), "autoclip: percentile is 101.0, not among the numbers from 0 to 100."),
    (lambda: oc.autoclip(window=0), "autoclip: window is 0, below 1."),
    (lambda: oc.quantile_clip(-1.0), "quantile_clip: percentile is -1.0"),
    (lambda: oc.zclip(max_norm=-1.0), "zclip: max_norm is -1.0"),
    (lambda: oc.zclip(z=0.0), "zclip: z is 0.0, not among the numbers above 0."),
    (lambda: oc.adagc(decay=2.0), "adagc: decay is 2.0, not among the numbers from 0 to 1."),
    (
        lambda: oc.clip_by_historical_norm(warmup=200),
        "clip_by_historical_norm: warmup is 200, above the window of 128. Pass 128 or less.",
    ),
    (lambda: oc.clip_by_adaptive_quantile(2.0), "clip_by_adaptive_quantile: target is 2.0"),
    (lambda: oc.aggc(most_up=0.5), "aggc: most_up is 0.5, not among the numbers from 1 to inf."),
    (lambda: oc.adanorm(2.0), "adanorm: decay is 2.0"),
    (lambda: oc.gradient_stabilizer(second=-1.0), "gradient_stabilizer: second is -1.0"),
    (lambda: oc.normalize_by_running_norm(eps=-1.0), "normalize_by_running_norm: eps is -1.0"),
]


@pytest.mark.parametrize(("call", "message"), NAMED)
def test_named_methods_name_themselves_and_their_own_arguments(call, message):
    """Not the limits and responses that they are made of."""
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        call()
    assert str(raised.value).startswith(message)


def test_named_methods_show_their_arguments_to_tools():
    """`optax.inject_hyperparams` reads the signature, and finds schedules by it."""
    assert next(iter(inspect.signature(oc.clip_by_block_rms).parameters)) == "threshold"
    tx = optax.inject_hyperparams(oc.clip_by_global_norm)(optax.linear_schedule(2.0, 1.0, 1))
    state = tx.init(PARAMS)
    assert float(state.hyperparams["max_norm"]) == 2


def test_arrays_of_limits_may_meet_trees_without_leaves():
    """As Optax's tools pass to `init`."""
    tx = oc.clip_by_layerwise_norm(jnp.ones(2))
    marked = optax.tree_utils.tree_map_params(tx, lambda _: 1, tx.init(PARAMS))
    assert marked.norm.shape == (2,)
    assert tx.update({}, tx.init({}))[0] == {}


@pytest.mark.parametrize(("call", "message"), FACTORY + INIT + UPDATE)
def test_values_that_are_wrong_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("call", "message"), TYPES)
def test_types_that_are_wrong_are_named(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_a_limit_with_state_is_refused_where_there_is_none():
    counter = oc.Limit(lambda table: jnp.zeros(()), lambda norm, state, ctx: (state, state + 1))
    with pytest.raises(TypeError, match=r"rescale_tree: the limit remembers earlier norms\. Use it in"):
        oc.rescale_tree(PARAMS, counter)


def test_a_group_called_whole_among_others_is_refused_in_metrics():
    groups = oc.groups.regex({"whole": "head", "rest": ".*"})
    state = oc.clip_by_groupwise_norm(1.0, groups).init(PARAMS)
    with pytest.raises(ValueError, match="a group among others is called 'whole'"):
        oc.metrics(state, PARAMS, groups)
