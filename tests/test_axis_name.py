"""Inside shard_map and pmap: `axis_name`, `specs`, and what happens where one is forgotten or wrong.

The tables in docs/scaling.md say the same.
"""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import optaxclip as oc
from benchmarks import hlo

pytestmark = pytest.mark.skipif(jax.device_count("cpu") < 8, reason="needs eight CPU devices")

SHAPES = {
    "embed": {"table": (16, 8)},
    "head": {"kernel": (16, 8), "scale": (), "shift": (8,)},
    "layers": {"bias": (2, 16), "kernel": (2, 8, 16)},
}
# Of units, (..., out), and of the two layers nothing is split but their entries.
SPECS = {
    "embed": {"table": P("data")},
    "head": {"kernel": P("model"), "scale": P(), "shift": P()},
    "layers": {"bias": P(), "kernel": P(None, ("data", "model"))},
}
AXES = ("data", "model")
AXIS_SETS = 3  # distinct sets of mesh axes that leaves are split over
LAYERS = oc.groups.stacked(oc.groups.layer(), "layers")
METHODS = {
    "global": lambda **kw: oc.clip_by_global_norm(1.0, **kw),
    "layerwise": lambda **kw: oc.clip_by_layerwise_norm(1.0, **kw),
    "leafwise": lambda **kw: oc.clip_by_leafwise_norm(1.0, **kw),
    "unit": lambda **kw: oc.clip_by_unitwise_norm(0.5, axis={"layers/kernel": (0, 1)}, **kw),
    "stacked": lambda **kw: oc.rescale_by_norm(1.0, groups=LAYERS, **kw),
    "linf": lambda **kw: oc.rescale_by_norm(0.5, groups=oc.groups.leaf(), norm=oc.norms.linf(), **kw),
    "rms": lambda **kw: oc.clip_by_block_rms(0.1, **kw),
    "budget": lambda **kw: oc.rescale_by_norm(
        oc.limits.budget(1.0, by="size"), groups=oc.groups.leaf(), **kw
    ),
    "relative": lambda **kw: oc.adaptive_grad_clip(0.1, groups=oc.groups.leaf(), **kw),
    "adaptive": lambda **kw: oc.adagc(1.05, 0.5, 1, **kw),
    "record": lambda **kw: oc.record(capacity=2, stretches=2, params=True, **kw),
    "skip": lambda **kw: oc.skip_updates(optax.sgd(0.1, momentum=0.9), 1e3, **kw),
    "carry": lambda **kw: oc.carry_clipped(oc.clip_by_global_norm(1.0, **kw), bound=9.0, **kw),
    "stable": lambda **kw: oc.scale_by_stable_adam(**kw),
    "entries": lambda **kw: oc.adaptive_value_clip(0.5, **kw),
    "centred": lambda **kw: oc.centralize({"head/kernel|embed": 0, "layers": 1}, **kw),
}
TRACKED = ["global", "unit", "relative", "record", "entries"]  # also where JAX keeps track
SETTINGS = [(method, False) for method in METHODS] + [(method, True) for method in TRACKED]
ONE_LOOK = ["global", "layerwise", "leafwise", "unit", "stacked", "linf", "rms", "budget", "adaptive", "skip"]


def is_spec(x):
    return isinstance(x, P)


def normal(seed):
    rng = np.random.default_rng(seed)
    shape = functools.partial(jax.tree.map, is_leaf=lambda x: isinstance(x, tuple))
    return shape(lambda shape: rng.normal(size=shape).astype(np.float32), SHAPES)


GRADS, PARAMS = normal(0), normal(1)


def scaled(factor, tree=GRADS):
    return jax.tree.map(lambda x: np.float32(factor) * x, tree)


def with_nan(tree):
    new = jax.tree.map(np.copy, tree)
    new["layers"]["kernel"][1, -1, -1] = np.nan  # on the last device alone
    return new


STEPS = [GRADS, scaled(1e-2), scaled(30.0), with_nan(GRADS), scaled(1e20), scaled(1e-25)]


def mesh(sizes=(4, 2), names=AXES):
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices("cpu"))


def mapped(step, in_specs, out_specs, **options):
    options = {"mesh": mesh(), **options}
    return jax.jit(jax.shard_map(step, in_specs=in_specs, out_specs=out_specs, **options))


def states_like(tx, specs=SPECS):
    """The partition specs of a state: those of the parameters where it holds something like them."""
    return optax.tree_utils.tree_map_params(
        tx, lambda _, spec: spec, tx.init(PARAMS), specs, transform_non_params=lambda _: P()
    )


def assert_same(actual, expected, rtol=1e-6, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), actual, expected)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)))


# --- right, with leaves that are split and leaves that are not ---------------------------------------------


@functools.cache
def on_one_device(method):
    tx = METHODS[method]()
    return jax.jit(tx.update).lower(GRADS, tx.init(PARAMS), PARAMS).compile()


@functools.cache
def on_all_devices(method, check_vma):
    tx = METHODS[method](specs=SPECS)
    specs = states_like(tx)
    step = mapped(tx.update, (SPECS, specs, SPECS), (SPECS, specs), check_vma=check_vma)
    return step.lower(GRADS, tx.init(PARAMS), PARAMS).compile()


@pytest.mark.parametrize(("method", "check_vma"), SETTINGS)
def test_specs_give_the_single_device_update(method, check_vma):
    """With specs, split leaves are summed over their axes and others count once, tracked by JAX or not."""
    alone, all_devices = METHODS[method](), METHODS[method](specs=SPECS)
    one, many = alone.init(PARAMS), all_devices.init(PARAMS)
    if method == "record":  # it does not know at init whether it is inside
        one = one._replace(start=many.start)
    # Means of some hundred entries that cancel, and moments of them, are off by the order of summation.
    rtol, atol = (2e-5, 1e-6) if method in ("centred", "stable", "carry") else (2e-6, 0)
    for grads in STEPS:
        if method in ("centred", "stable") and (norm(grads) <= 1e-3 or norm(grads) >= 1e4):
            continue  # there they have no digits, or none in common
        expected, one = on_one_device(method)(grads, one, PARAMS)
        actual, many = on_all_devices(method, check_vma)(grads, many, PARAMS)
        assert_same((actual, many), (expected, one), rtol, atol)


@pytest.mark.parametrize(("method", "check_vma"), [s for s in SETTINGS if s[0] in (*ONE_LOOK, "relative")])
def test_one_all_reduce_for_each_distinct_set_of_axes(method, check_vma):
    """All groups and all leaves that are split over the same axes share one; parameters are measured too."""
    found = hlo.collectives(hlo.parse(on_all_devices(method, check_vma)))
    assert [one.kind for one in found] == ["all-reduce"] * AXIS_SETS * (2 if method == "relative" else 1)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_largest_entry_of_all_devices_has_a_derivative(check_vma):
    """It is that of the entry; of two devices that share it, each has half."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def push(x, change):
        def norm(x):
            return oc.group_norms({"w": x}, norm=oc.norms.linf(), axis_name="x")["w"]

        return jax.jvp(norm, (x,), (change,))

    mapped = jax.shard_map(push, mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=check_vma)
    change = jnp.arange(1.0, 9.0)
    for x, expected in (
        (jnp.array([1.0, -5, 2, 3, 4, 0, 0, 1]), (5.0, -2.0)),
        (jnp.full(8, 2.0), (2.0, 4.5)),
    ):
        np.testing.assert_allclose(jax.jit(mapped)(x, change), expected, rtol=1e-6)


def test_replicated_leaves_are_the_same_on_all_devices():
    """Where JAX does not check it, nothing drifts apart."""
    tx = METHODS["leafwise"](specs=SPECS)
    updates, state = on_all_devices("leafwise", False)(GRADS, tx.init(PARAMS), PARAMS)
    for x in jax.tree.leaves((updates["head"]["shift"], state)):
        copies = [np.asarray(shard.data) for shard in x.addressable_shards]
        assert all(np.array_equal(copies[0], copy) for copy in copies[1:])


def test_under_pmap():
    """The arrays' leading axis is split over the devices where specs name it, and replicated elsewhere."""
    grads = {"split": np.arange(32.0, dtype=np.float32).reshape(8, 4), "whole": np.ones(4, np.float32)}
    specs = {"split": P("devices"), "whole": P()}
    for make in (oc.clip_by_global_norm, oc.clip_by_leafwise_norm, oc.clip_by_block_rms):

        def step(grads, make=make, **kwargs):
            tx = make(1.0, **kwargs)
            return tx.update(grads, tx.init(grads))

        inside = jax.pmap(
            functools.partial(step, specs=specs),
            "devices",
            in_axes=({"split": 0, "whole": None},),
            devices=jax.devices("cpu")[:8],
        )
        updates, state = inside(grads)
        expected = jax.jit(step)(grads)
        for own in range(8):
            actual = {"split": updates["split"], "whole": updates["whole"][own]}
            assert_same((actual, jax.tree.map(lambda x, own=own: x[own], state)), expected)


@pytest.mark.parametrize("make", [oc.clip_by_global_norm, oc.clip_by_leafwise_norm])
def test_under_pmap_all_groups_share_one_all_reduce(make):
    """It has four bytes for each group."""
    grads = {f"layer_{k}": jnp.ones((8, 4 + k)) for k in range(5)}
    tx = make(1.0, axis_name="devices")
    inside = jax.pmap(lambda g: tx.update(g, tx.init(g)), "devices", devices=jax.devices("cpu")[:8])
    (found,) = hlo.collectives(hlo.parse(inside.lower(grads).compile()))
    groups = len(tx.init(grads).norm)
    assert (found.kind, found.operands, found.nbytes) == ("all-reduce", 1, 4 * groups)


def test_only_axes_in_both_count():
    """With axis_name beside specs, axes that it leaves out are not summed over."""
    specs = {"w": P("data", "model")}
    for check_vma in (False, True):
        step = mapped(
            lambda grads: oc.group_norms(grads, axis_name="data", specs=specs)["w"][None],
            (specs,),
            P("model"),
            check_vma=check_vma,
        )
        np.testing.assert_allclose(step({"w": jnp.ones((8, 6))}), np.sqrt([24, 24]), rtol=1e-6)


# --- prefixes ---------------------------------------------------------------------------------------------


def global_norm(tree, specs, in_specs=None):
    """The norm that a clip finds inside shard_map, where JAX keeps no track."""

    def step(grads):
        tx = oc.clip_by_global_norm(1.0, specs=specs)
        return tx.update(grads, tx.init(grads))[1].norm

    return mapped(step, (specs if in_specs is None else in_specs,), P(), check_vma=False)(tree)


@pytest.mark.parametrize(
    "specs",
    [
        P("data"),
        {"a": P("data"), "b": P("data")},
        {"a": {"w": P("data"), "v": P(("data",), None)}, "b": [P("data"), P("data")]},
    ],
    ids=["one", "of subtrees", "of leaves"],
)
def test_a_prefix_stands_for_all_below_it(specs):
    """As in the in_specs of shard_map."""
    tree = {"a": {"w": jnp.ones(4), "v": jnp.ones((4, 2))}, "b": [jnp.ones(8), jnp.ones(4)]}
    np.testing.assert_allclose(global_norm(tree, specs), [np.sqrt(24)], rtol=1e-6)


def test_none_is_replicated():
    """None in place of a specification is P(), also for a subtree."""
    tree = {"a": {"w": jnp.ones(4)}, "b": [jnp.ones(8), jnp.ones(4)]}
    in_specs = {"a": P("data"), "b": P()}
    np.testing.assert_allclose(global_norm(tree, {"a": P("data"), "b": None}, in_specs), [4.0], rtol=1e-6)


def test_leaves_that_have_no_norm_need_no_specification():
    """None, what is masked, integers and empty arrays may have one or not."""
    tree = {"w": jnp.ones(16), "n": None, "i": jnp.arange(4), "e": jnp.ones((0,)), "m": optax.MaskedNode()}
    in_specs = {"w": P("data"), "n": None, "i": P(), "e": P(), "m": None}
    for some in ({}, {"n": P(), "i": P(), "m": {"deep": P()}, "gone": P("data")}):
        np.testing.assert_allclose(global_norm(tree, {"w": P("data"), **some}, in_specs), [4.0], rtol=1e-6)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
class Box:
    """A parameter as frameworks wrap it."""

    def __init__(self, value):
        self.value = value


def test_containers_may_differ():
    """Specifications are found by path, as parameters are: nnx shows wrapped ones to init alone."""
    tree = {"w": jnp.ones(16), "b": jnp.ones(4)}
    specs = {"w": Box(P("data")), "b": Box(P())}
    np.testing.assert_allclose(global_norm(tree, specs, {"w": P("data"), "b": P()}), [np.sqrt(20)], rtol=1e-6)


def test_keys_with_slashes_may_be_in_a_prefix():
    """As Haiku's modules have them, at the end of a prefix and before it."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tree = {"c/~/d": {"w": jnp.arange(8.0), "b": jnp.ones(8)}, "e": {"w": jnp.ones(2)}}
    layout = {"c/~/d": P("x"), "e": P()}
    for specs in (layout, {"c": {"~": {"d": P("x")}}, "e": P()}):
        tx = oc.clip_by_global_norm(1.0, specs=specs)
        mapped = jax.shard_map(
            lambda g, tx=tx: tx.update(g, tx.init(g))[0],
            mesh=mesh,
            in_specs=(layout,),
            out_specs=layout,
            check_vma=False,
        )
        out = jax.jit(mapped)(tree)
        np.testing.assert_allclose(optax.tree.norm(out), 1, rtol=1e-6)


def test_groups_may_rename_paths():
    """The names that groups give replace the paths of the tree, and specs go by the latter."""
    tree, specs = [jnp.ones(16), jnp.ones(4)], [P("data"), P()]
    groups = oc.groups.leaf()._replace(names=("dense/kernel", "dense/bias"))
    step = mapped(lambda grads: oc.group_norms(grads, groups, specs=specs), (specs,), P(), check_vma=False)
    assert step(tree) == {"dense/bias": 2.0, "dense/kernel": 4.0}


@pytest.mark.parametrize("wrap", [lambda tx: optax.masked(tx, {"w": True, "b": False}), optax.chain])
def test_wrappers_see_part_of_the_tree(wrap):
    """Specs of the whole tree serve a transformation that is shown some of its leaves."""
    specs = {"w": P("data"), "b": {"deep": P()}}
    tx = wrap(oc.clip_by_leafwise_norm(1.0, specs=specs))
    grads = {"w": jnp.ones(16), "b": {"deep": jnp.full(4, 0.1)}}
    step = mapped(lambda grads: tx.update(grads, tx.init(grads))[0], (specs,), specs, check_vma=False)
    updates = step(grads)
    np.testing.assert_allclose(updates["w"], np.full(16, 0.25), rtol=1e-6)
    np.testing.assert_array_equal(updates["b"]["deep"], grads["b"]["deep"])


# --- forgotten or wrong -----------------------------------------------------------------------------------

TWO = {"split": jnp.ones(16), "whole": jnp.ones(4)}
TWO_SPECS = {"split": P("data"), "whole": P()}


def clip(**options):
    tx = oc.clip_by_global_norm(1.0, **options)
    return lambda grads: tx.update(grads, tx.init(grads))


def test_named_it_is_right():
    """With the axis named, the update has the limit for its norm."""
    updates, state = mapped(clip(axis_name="data"), (TWO_SPECS,), (TWO_SPECS, P()))(TWO)
    assert norm(updates) == pytest.approx(1.0)
    assert state.norm == pytest.approx([np.sqrt(20)])


def update_of(tx):
    return lambda grads: tx.update(grads, tx.init(grads), grads)[0]


MATRICES = {"split": jnp.arange(32.0).reshape(16, 2), "whole": jnp.ones((4, 2))}
ARGUMENTS = {  # of the transformations that need some
    "adaptive_grad_clip": (0.1,),
    "carry_clipped": (oc.clip_by_value(1.0),),
    "clip_by_block_rms": (1.0,),
    "clip_by_global_norm": (1.0,),
    "clip_by_groupwise_norm": (1.0, oc.groups.leaf()),
    "clip_by_historical_norm": (1.0,),
    "clip_by_layerwise_norm": (1.0,),
    "clip_by_leafwise_norm": (1.0,),
    "clip_by_spectral_norm": (1.0,),
    "clip_by_unitwise_norm": (1.0,),
    "clip_by_value": (1.0,),
    "clip_singular_values": (1.0,),
    "larc": (0.1,),
    "normalize_by_global_norm": (1.0,),
    "normalize_by_layerwise_norm": (1.0,),
    "rescale_by_norm": (1.0,),
    "reset_momentum": (optax.sgd(1.0),),
    "skip_updates": (optax.sgd(1.0), 1.0),
    "soft_clip_singular_values": (1.0,),
    "stable_adamw": (0.1,),
}
WHOLE = ["clip_by_spectral_norm", "clip_singular_values", "soft_clip_singular_values"]  # of whole matrices
BY_ENTRY = ["acclip", "clip_by_value", "mask_spikes", "reset_momentum"]  # which need nothing of other devices
TRANSFORMATIONS = [
    name
    for name in oc.__all__
    if inspect.get_annotations(getattr(oc, name)).get("return") is optax.GradientTransformationExtraArgs
    and name != "clip_per_example"  # where examples vary
]
MADE_OF = {"stable_adamw": "scale_by_stable_adam"}  # the one that its errors name
FUNCTIONS = {"group_norms": oc.group_norms, "rescale_tree": lambda grads: oc.rescale_tree(grads, 1.0)[0]}


def step_of(name):
    return FUNCTIONS.get(name) or update_of(getattr(oc, name)(*ARGUMENTS.get(name, ())))


def test_every_transformation_is_looked_at():
    """A new one is in the list by itself; these are some that have to be in it."""
    assert {*ARGUMENTS, *BY_ENTRY, "adagc", "record", "zclip"} <= set(TRANSFORMATIONS)


@pytest.mark.parametrize("where", [*FUNCTIONS, *(name for name in TRANSFORMATIONS if name not in BY_ENTRY)])
def test_forgotten_it_is_an_error_where_jax_keeps_track(where):
    """Each device would take the norm of its part for that of the whole."""
    missing = r"axis_name is missing\. Pass axis_name=\('data',\) to .* or axis_name=\(\) to have each device"
    if where in WHOLE:
        missing = r"norms of matrices cannot be put together .*\. Pass axis_name=\(\) where .* else gather"
    message = (
        rf"^{MADE_OF.get(where, where)}: leaf 'split' varies .* \('data',\), as 1 of 2 leaves vary, and "
    )
    with pytest.raises(ValueError, match=message + missing):
        mapped(step_of(where), (TWO_SPECS,), P("data"))(MATRICES)


@pytest.mark.parametrize("method", BY_ENTRY)
def test_what_looks_at_single_entries_has_nothing_to_forget(method):
    """Inside shard_map it does to the parts what it does to the whole."""
    step = step_of(method)
    assert_same(mapped(step, (TWO_SPECS,), TWO_SPECS)(MATRICES), jax.jit(step)(MATRICES))


def test_forgotten_it_is_an_error_where_means_are_taken():
    """A kernel that varies may be split along its inputs; a bias is left alone and may vary."""
    tx = oc.centralize()
    with pytest.raises(ValueError, match=r"^centralize: leaf 'w' varies .* as 1 of 1 leaves vary"):
        mapped(lambda g: tx.update(g, tx.init(g))[0], P("data"), P("data"))(
            {"w": jnp.ones((8, 2)), "b": jnp.ones(4)}
        )


def test_it_lists_the_axes_that_all_leaves_vary_over():
    """The line to paste names every axis, and the sentence the first leaf's."""
    with pytest.raises(
        ValueError, match=r"'embed/table' varies .* \('data',\), as 3 of 6 .*\('data', 'model'\)"
    ):
        mapped(clip(), (SPECS,), (SPECS, P()))(GRADS)


def test_parameters_count_too():
    """A limit relative to parameters needs to know how these are split."""
    tx = oc.adaptive_grad_clip(0.1, groups=oc.groups.leaf())
    step = mapped(lambda grads, params: tx.update(grads, tx.init(grads), params)[0], (P(), P("data")), P())
    with pytest.raises(ValueError, match=r"leaf 'w' varies over the mesh axes \('data',\)"):
        step({"w": jnp.ones((4,))}, {"w": jnp.ones((16,))})


def test_no_axes_is_a_choice():
    """With axis_name=() each of four devices clips its part to the limit."""
    updates = mapped(lambda x: clip(axis_name=())(x)[0], P("data"), P("data"))(TWO["split"])
    assert norm(updates) == pytest.approx(2.0)


def test_leaves_that_are_only_scaled_may_vary():
    """What is not measured needs no sum over devices."""
    groups = oc.groups.regex({oc.groups.scaled_only("all"): "split", "all": ".*"})
    step = mapped(lambda g: oc.rescale_tree(g, 1.0, groups=groups)[0], (TWO_SPECS,), TWO_SPECS)
    np.testing.assert_allclose(step(TWO)["split"], np.full(16, 0.5), rtol=1e-6)


SPECTRAL = {  # what measures matrices that are split over `data`, each in its own way
    "rescale_by_norm": lambda **kw: update_of(oc.rescale_by_norm(1.0, norm=oc.norms.spectral(), **kw)),
    "rescale_tree": lambda **kw: lambda g: oc.rescale_tree(g, 1.0, norm=oc.norms.spectral(), **kw)[0],
    "group_norms": lambda **kw: lambda g: oc.group_norms(g, norm=oc.norms.spectral(), **kw),
    "record": lambda **kw: update_of(oc.record(norm=oc.norms.spectral(), **kw)),
}


@pytest.mark.parametrize("where", SPECTRAL)
def test_the_largest_singular_value_is_not_that_of_the_parts(where):
    """Named or not, axes that split a matrix are an error: the norm of the largest part is too small."""
    for options in ({"axis_name": "data"}, {"specs": TWO_SPECS}):
        message = (
            rf"^{where}: leaf 'split' counts as split over the mesh axes \('data',\), and norms of matrices "
            r"cannot be put together .* or none by \(\), where each device has whole matrices .* else gather"
        )
        with pytest.raises(ValueError, match=message):
            mapped(SPECTRAL[where](**options), (TWO_SPECS,), P("data"))(MATRICES)
        with pytest.raises(ValueError, match=message):
            mapped(SPECTRAL[where](**options), (TWO_SPECS,), P("data"), check_vma=False)(MATRICES)
    with pytest.raises(ValueError, match=rf"^{where}: leaf 'split' varies .*Pass axis_name=\(\) where each"):
        mapped(SPECTRAL[where](), (TWO_SPECS,), P("data"))(MATRICES)


def test_matrices_that_are_not_split_are_measured_beside_those_of_other_axes():
    """The axes that are named may split none of the matrices: then they are whole, and so is the norm."""
    step = SPECTRAL["group_norms"](axis_name="model")
    found = mapped(lambda g: step(g)["w"][None], (P("data"),), P("data"))({"w": EXPERTS["kernel"][:4]})
    expected = [np.linalg.norm(np.float64(x), 2) for x in EXPERTS["kernel"][:4]]
    np.testing.assert_allclose(found, expected, rtol=1e-2)


def test_matrices_of_a_gathered_leaf_are_whole():
    """What the error says to do: gathered, a leaf has the singular values that it has on one device."""
    tx = oc.clip_singular_values(1.0)

    def step(part):
        # Zeros but for the own part, summed: the same on all devices, as JAX can tell.
        whole = jnp.zeros((16, 2)).at[jax.lax.axis_index("data") * 4 + jnp.arange(4)].set(part)
        return update_of(tx)({"w": jax.lax.psum(whole, "data")})["w"]

    found = mapped(step, (P("data"),), P())(MATRICES["split"])
    assert_same(found, update_of(tx)({"w": MATRICES["split"]})["w"], rtol=1e-5)


EXPERTS = {
    "kernel": np.random.default_rng(5).normal(size=(8, 6, 4)).astype(np.float32),
    "bias": np.random.default_rng(6).normal(size=(8, 4)).astype(np.float32),
}
BY_MATRIX = {
    "clip_by_spectral_norm": functools.partial(oc.clip_by_spectral_norm, iterations=20),
    "clip_singular_values": oc.clip_singular_values,
    "soft_clip_singular_values": oc.soft_clip_singular_values,
    "soft, newton_schulz": functools.partial(oc.soft_clip_singular_values, method="newton_schulz"),
    "rescale_by_norm": lambda limit, stacked, **kw: oc.rescale_by_norm(
        limit, groups=oc.groups.stacked(oc.groups.leaf(), stacked), norm=oc.norms.spectral(20), **kw
    ),
}


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("method", BY_MATRIX)
def test_each_device_may_have_whole_matrices_of_its_own(method, check_vma):
    """Experts are clipped where they are, with axis_name=(), as on one device; so are their statistics."""
    make = functools.partial(BY_MATRIX[method], 2.0, stacked="")

    def two(grads, **options):
        tx = make(**options)
        _, state = tx.update(grads, tx.init(grads))
        updates, state = tx.update(grads, state)
        return updates, state.norm.reshape(2, -1).mT  # by leaf, of which each has a row per expert

    step = mapped(functools.partial(two, axis_name=()), (P("data"),), P("data"), check_vma=check_vma)
    assert_same(step(EXPERTS), jax.jit(two)(EXPERTS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [getattr(oc, name) for name in WHOLE])
def test_the_axes_of_matrices_are_an_error_of_the_factory(make):
    """Nothing that they could be told would help."""
    message = (
        rf"^{make.__name__}: axis_name is 'data', and norms of matrices cannot be put together from those of "
        r"their parts\. Pass \(\) where each device has whole matrices of its own, such as experts; else "
    )
    with pytest.raises(ValueError, match=message):
        make(1.0, axis_name="data")


def test_parameters_of_matrices_must_be_whole_too():
    """A limit relative to parameters that vary is an error, though the gradients do not."""
    tx = oc.clip_by_spectral_norm(oc.limits.relative(0.1))
    step = mapped(lambda g, p: tx.update({"w": g}, tx.init({"w": g}), {"w": p})[0], (P(), P("data")), P())
    with pytest.raises(
        ValueError, match=r"^clip_by_spectral_norm: leaf 'w' varies .* cannot be put together"
    ):
        step(jnp.ones((4, 2)), MATRICES["split"])


def test_examples_vary_over_the_axis_of_the_batch():
    """Per-example clipping in data parallelism needs no axis_name: each device has examples of its own."""
    grads = {"w": np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)}
    tx = oc.clip_per_example(1.0)

    def step(grads):
        return jax.lax.pmean(tx.update(grads, tx.init({"w": jnp.zeros(5)}))[0], "data")

    expected, _ = tx.update(grads, tx.init({"w": jnp.zeros(5)}))
    assert_same(mapped(step, (P("data"),), P())(grads), expected)


@pytest.mark.parametrize("check_vma", [False, True])
def test_examples_of_split_parameters(check_vma):
    """The specs are those of the parameters; an axis of the batch is not in them."""
    grads = {"w": np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32), "b": np.ones((8, 2), "f4")}
    params = {"w": jnp.zeros(6), "b": jnp.zeros(2)}
    tx, alone = oc.clip_per_example(1.0, specs={"w": P("model"), "b": P()}), oc.clip_per_example(1.0)

    def step(grads):
        return jax.lax.pmean(tx.update(grads, tx.init(params))[0], "data")

    split, out = {"w": P("data", "model"), "b": P("data")}, {"w": P("model"), "b": P()}
    expected, _ = alone.update(grads, alone.init(params))
    assert_same(mapped(step, (split,), out, check_vma=check_vma)(grads), expected, rtol=1e-5)


def test_forgotten_it_is_wrong_where_jax_does_not_look():
    """With check_vma=False, and under pmap, every device clips its part, and no error says so."""
    updates, _ = mapped(clip(), (TWO_SPECS,), (TWO_SPECS, P()), check_vma=False)(TWO)
    assert norm(updates) > 1.4
    devices = jax.devices("cpu")[:8]
    updates = jax.pmap(lambda x: clip()(x)[0], "data", devices=devices)(jnp.ones((8, 4)))
    assert norm(updates) == pytest.approx(np.sqrt(8))


def test_without_specs_every_leaf_counts_as_split_where_jax_does_not_look():
    """A replicated leaf then counts once for each device: 16 and 4 times 4 ones."""
    _, state = mapped(clip(axis_name="data"), (TWO_SPECS,), (TWO_SPECS, P()), check_vma=False)(TWO)
    assert state.norm == pytest.approx([np.sqrt(32)])


def test_an_unknown_axis_is_an_error():
    """JAX names an axis that the mesh does not have, or that stands outside of shard_map."""
    with pytest.raises(NameError, match="unbound axis name: modle"):
        mapped(clip(axis_name="modle"), (TWO_SPECS,), (TWO_SPECS, P()))(TWO)
    for options in ({"axis_name": "data"}, {"specs": TWO_SPECS}):
        with pytest.raises(NameError, match="unbound axis name: data"):
            jax.jit(clip(**options))(TWO)


def test_gradients_that_are_not_averaged_are_an_error():
    """A leaf that varies over an axis that its specification does not name is found, where JAX tracks it."""
    message = (
        r"^clip_by_global_norm: leaf 'whole' varies over the mesh axes \('data',\), and its "
        r"specification, .*\(\), names \(\)\. Correct specs, or average gradients first"
    )
    for options in ({}, {"axis_name": ("data", "model")}):
        with pytest.raises(ValueError, match=message):
            mapped(clip(specs=TWO_SPECS, **options), (P("data"),), P("data"))(TWO)
    # An axis that none of them names is found too, unless axis_name says which count.
    with pytest.raises(ValueError, match=r"'split' varies over the mesh axes \('data', 'model'\)"):
        mapped(clip(specs=TWO_SPECS), (P(("data", "model")),), P("data"))(TWO | {"whole": jnp.ones(8)})


def test_a_leaf_that_is_not_split_as_specs_say_is_an_error():
    """So is one that is the same on all devices."""
    message = (
        r"leaf 'split' varies over the mesh axes \(\), and its specification, .*'data'.*, names \('data',\)"
    )
    with pytest.raises(ValueError, match=message):
        mapped(clip(specs=TWO_SPECS), (P(),), (P(), P()))(TWO)


@pytest.mark.parametrize("make", [functools.partial(oc.clip_by_unitwise_norm, 1.0), oc.centralize])
def test_axes_that_split_the_groups_of_a_leaf_must_not_count(make):
    """Units of one device are not those of another: an error where JAX keeps track, or left out by name."""
    specs, kernel = P("data", "model"), jnp.asarray(PARAMS["embed"]["table"])

    def update(x, **options):
        tx = make(**options)
        return tx.update({"w": x}, tx.init({"w": x}))[0]["w"]

    with pytest.raises(ValueError, match=r"leaf 'w' has a group .* dimension 1, .* over \('model',\): those"):
        mapped(functools.partial(update, specs=specs), specs, specs)(kernel)
    for check_vma in (False, True):
        step = functools.partial(update, specs=specs, axis_name="data")
        assert_same(mapped(step, specs, specs, check_vma=check_vma)(kernel), update(kernel), 1e-5, 1e-6)


MISFITS = [
    (
        {"split": P("data")},
        "clip_by_global_norm: specs has none for leaf 'whole', among 'split'. Pass a tree prefix",
    ),
    ({"split": {"deep": P("data")}, "whole": P()}, "none for leaf 'split', among 'split/deep', 'whole'."),
    ([P("data"), P()], "none for leaf 'split', among '0', '1'."),
    ({}, "none for leaf 'split', among nothing."),
]


@pytest.mark.parametrize(("specs", "text"), MISFITS, ids=str)
def test_a_prefix_that_does_not_fit_is_an_error(specs, text):
    """It names the leaf that has no specification, and those that have."""
    with pytest.raises(ValueError, match=re.escape(text)):
        mapped(clip(specs=specs), (TWO_SPECS,), (TWO_SPECS, P()))(TWO)


BAD_SPECS = [
    ({"w": "data"}, TypeError, "clip_by_global_norm: specs has 'data' at 'w', of type str. Pass a tree of"),
    ([P(P.UNCONSTRAINED)], ValueError, r"clip_by_global_norm: specs has .* at '0', which does not say how"),
]


@pytest.mark.parametrize(("specs", "error", "text"), BAD_SPECS, ids=["no specification", "unconstrained"])
def test_what_is_no_specification_is_an_error_of_the_factory(specs, error, text):
    """It is known before any tree is."""
    with pytest.raises(error, match=text):
        oc.clip_by_global_norm(1.0, specs=specs)


# --- experts, stages, and what other libraries had wrong ---------------------------------------------------

GLOBAL = {
    # Two experts on two ranks, of norms 10 and sqrt(20): 10.954 together; the mean of the ranks is 7.236
    # (DeepSpeed#8475).
    "experts": (("data", "expert"), (4, 2), {"experts": P("expert")}, {"experts": [[10.0, 0], [4.0, 2.0]]}),
    # Weights that are not split count once, not once for each rank (LBANN#2376).
    "unsharded": (("data",), (8,), {"split": P("data"), "whole": P()}, {"split": [1.0] * 8, "whole": [3.0]}),
    # All shards count: no sqrt(shards) too small (miles_diffusion#35).
    "shards": (("data",), (8,), {"w": P("data")}, {"w": [2.0] * 8}),
    # Leaves on meshes of their own (pytorch#180346).
    "meshes": (
        ("data", "expert"),
        (2, 4),
        {"router": P("data"), "experts": P("expert", "data"), "norm": P()},
        {"router": [1.0, 2.0], "experts": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], "norm": [1.5]},
    ),
    "stages": (
        ("stage", "data"),
        (4, 2),
        {"embed": P("data"), "stages": P("stage"), "head": P()},
        {"embed": [1.0, 5.0], "stages": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], "head": [2.5]},
    ),
    "stages of experts": (
        ("stage", "expert", "data"),
        (2, 2, 2),
        {
            "embed": P("data"),
            "experts": P("stage", "expert", "data"),
            "head": P(),
            "norms": P("stage"),
            "routers": P("stage", None, "data"),
        },
        {
            "embed": [1.0, 5.0],
            "experts": [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]],
            "head": [2.5],
            "norms": [9.0, 10.0],
            "routers": [[[3.0, 1.0]], [[4.0, 1.0]]],
        },
    ),
}


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("case", GLOBAL)
def test_the_global_norm_is_that_of_all_parameters(case, check_vma):
    """Experts, stages, leaves on several axes and replicated ones, each counted once and whole."""
    names, sizes, specs, grads = GLOBAL[case]
    grads = {name: jnp.array(x) for name, x in grads.items()}
    tx = oc.clip_by_global_norm(1.0, specs=specs)
    step = mapped(
        lambda grads: tx.update(grads, tx.init(grads)),
        (specs,),
        (specs, P()),
        mesh=mesh(sizes, names),
        check_vma=check_vma,
    )
    compiled = step.lower(grads).compile()
    updates, state = compiled(grads)
    assert state.norm == pytest.approx([norm(grads)], rel=1e-6)
    assert_same(updates, jax.tree.map(lambda x: x / norm(grads), grads), rtol=2e-6)
    distinct = {axes for spec in specs.values() if (axes := frozenset(spec) - {None})}
    assert len(hlo.collectives(hlo.parse(compiled))) == len(distinct)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("axes", [("expert", "data"), ("stage", "data"), ("stage", "expert", "data")])
def test_a_norm_for_each_expert_or_stage(axes, check_vma):
    """Leave their axis out of axis_name: the norms are those of a device's own, one after the other.

    On three axes those of a stage are over all of its experts.
    """
    axis, *others = axes
    specs = {"blocks": {"b": P(axis), "w": P(axis, *others)}}
    rng = np.random.default_rng(3)
    grads = {"blocks": {"b": rng.normal(size=(8, 3)), "w": rng.normal(size=(8, 6, 2))}}
    grads = jax.tree.map(np.float32, grads)
    clip = functools.partial(
        oc.rescale_tree, limit=1.0, groups=oc.groups.stacked(oc.groups.layer(), "blocks")
    )

    def step(grads):
        updates, stats = clip(grads, axis_name=others, specs=specs)
        return updates, stats.norm

    on = mesh((4, 2) if len(axes) == 2 else (2, 2, 2), axes)
    inside = mapped(step, (specs,), (specs, P(axis)), mesh=on, check_vma=check_vma)
    expected, stats = clip(grads)
    assert stats.norm.shape == (8,)
    assert_same(inside(grads), (expected, stats.norm))
