"""Many devices: eight of the CPU's, in a mesh of four by two."""

import collections
import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from versions import OLD_JAX

import optaxclip as oc

pytestmark = pytest.mark.skipif(jax.device_count("cpu") < 8, reason="needs eight CPU devices")

SHAPES = {
    "embed": {"table": (16, 8)},
    "layers": {"kernel": (4, 8, 16), "bias": (4, 16)},
    "head": {"kernel": (16, 8), "scale": ()},
}
LAYOUTS = {
    "fsdp": {
        "embed": {"table": P("data")},
        "layers": {"kernel": P(None, "data"), "bias": P(None, "data")},
        "head": {"kernel": P("data"), "scale": P()},
    },
    "tensor": {
        "embed": {"table": P(None, "model")},
        "layers": {"kernel": P(None, None, "model"), "bias": P(None, "model")},
        "head": {"kernel": P("model"), "scale": P()},
    },
    "mixed": {
        "embed": {"table": P("data", "model")},
        "layers": {"kernel": P("data", "model"), "bias": P("data")},
        "head": {"kernel": P(None, "model"), "scale": P()},
    },
}
AXIS_SETS = {"fsdp": 1, "tensor": 1, "mixed": 3}  # distinct sets of mesh axes that leaves are split over
METHODS = {
    "whole": lambda **kw: oc.clip_by_global_norm(1.0, **kw),
    "layer": lambda **kw: oc.clip_by_layerwise_norm(1.0, **kw),
    "leaf": lambda **kw: oc.clip_by_leafwise_norm(1.0, **kw),
    "leaf, linf": lambda **kw: oc.rescale_by_norm(0.1, groups=oc.groups.leaf(), norm=oc.norms.linf(), **kw),
    "leaf, rms": lambda **kw: oc.clip_by_block_rms(0.1, **kw),
    "leaf, budget": lambda **kw: oc.rescale_by_norm(
        oc.limits.budget(1.0, by="size"), groups=oc.groups.leaf(), **kw
    ),
    "leaf, relative": lambda **kw: oc.adaptive_grad_clip(0.1, groups=oc.groups.leaf(), **kw),
    "leaf, lp(3)": lambda **kw: oc.rescale_by_norm(0.1, groups=oc.groups.leaf(), norm=oc.norms.lp(3), **kw),
    "unit": lambda **kw: oc.clip_by_unitwise_norm(0.1, **kw),
    "unit, relative": lambda **kw: oc.adaptive_grad_clip(0.1, **kw),
    "stacked": lambda **kw: oc.rescale_by_norm(
        1.0, groups=oc.groups.stacked(oc.groups.layer(), "layers"), **kw
    ),
}
ONE_ROW = ["whole", "layer", "leaf, linf", "leaf, rms", "leaf, relative"]  # per leaf
MANY_ROWS = ["unit", "unit, relative", "stacked"]
EVERYWHERE = ["whole", "unit"]  # also with the simpler layouts
MESHES = {"auto": (AxisType.Auto,) * 2, "explicit": (AxisType.Explicit,) * 2}
KNOWN = {"explicit": "explicit", "told": "auto"}  # how it may be known what is split: by type, or by `specs`
SETTINGS = [
    pytest.param(kind, layout, method, id=f"{kind}-{layout}-{method}")
    for kind in ("auto", *KNOWN)
    for layout in LAYOUTS
    for method in (EVERYWHERE if layout != "mixed" else ONE_ROW + MANY_ROWS)
]


def is_shape(x):
    return isinstance(x, tuple)


def is_spec(x):
    return isinstance(x, P)


def normal(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), SHAPES, is_leaf=is_shape)


GRADS, PARAMS = normal(0), normal(1)


def spiked(tree, leaf, value):
    """The tree with one entry of a leaf replaced, in the shard of the last device."""
    group, name = leaf.split("/")
    new = jax.tree.map(np.copy, tree)
    new[group][name][(-1,) * new[group][name].ndim] = value
    return new


VALUES = {
    "ordinary": GRADS,
    "small enough": jax.tree.map(lambda x: 1e-4 * x, GRADS),
    "all 1e20": jax.tree.map(lambda x: np.float32(1e20) * x, GRADS),
    "all 3e38": jax.tree.map(lambda x: np.full_like(x, 3e38), GRADS),
    "all 1e-25": jax.tree.map(lambda x: np.float32(1e-25) * x, GRADS),
    "one 3e38": spiked(GRADS, "layers/kernel", 3e38),
    "one NaN": spiked(GRADS, "embed/table", np.nan),
    "one inf": spiked(GRADS, "layers/bias", np.inf),
    "zeros": jax.tree.map(np.zeros_like, GRADS),
}


def mesh_of(kind):
    types = MESHES[KNOWN.get(kind, kind)]
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=types, devices=jax.devices("cpu"))


def telling(kind, layout="mixed"):
    """The arguments that say how leaves are split."""
    return {"specs": LAYOUTS[layout]} if kind == "told" else {}


def put(tree, mesh, layout):
    return jax.tree.map(
        lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)), layout, tree, is_leaf=is_spec
    )


@functools.cache
def on_one_device(method):
    tx = METHODS[method]()
    return jax.jit(tx.update).lower(GRADS, tx.init(PARAMS), PARAMS).compile()


@functools.cache
def on_all_devices(kind, layout, method):
    tx, mesh = METHODS[method](**telling(kind, layout)), mesh_of(kind)
    grads, params = (put(tree, mesh, LAYOUTS[layout]) for tree in (GRADS, PARAMS))
    return jax.jit(tx.update).lower(grads, tx.init(params), params).compile()


def collectives(compiled):
    """How many elements each collective operation brings to a device, by kind of operation."""
    found = collections.defaultdict(list)
    for line in compiled.as_text().splitlines():
        match = re.search(r" = (.*?) (all-\w+|collective-\w+|reduce-scatter|ragged-[\w-]+)(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = (math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)
            found[match[2]].append(sum(sizes))
    return found


def assert_same(actual, expected, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), actual, expected)


@pytest.mark.parametrize(("kind", "layout", "method"), SETTINGS)
def test_sharded_update_equals_the_single_device_one(kind, layout, method):
    """Under jit, updates and state do not depend on how leaves are split, whatever their magnitude."""
    tx, mesh = METHODS[method](), mesh_of(kind)
    params = put(PARAMS, mesh, LAYOUTS[layout])
    for grads in VALUES.values():
        expected = on_one_device(method)(grads, tx.init(PARAMS), PARAMS)
        sharded = put(grads, mesh, LAYOUTS[layout])
        actual = on_all_devices(kind, layout, method)(sharded, tx.init(params), params)
        assert_same(actual, expected)


@pytest.mark.parametrize(("kind", "layout", "method"), SETTINGS)
def test_output_keeps_its_sharding(kind, layout, method):
    """Every leaf comes out split over the same devices as it came in."""
    outputs = on_all_devices(kind, layout, method).output_shardings[0]
    mesh = mesh_of(kind)

    def same(spec, actual, x):
        return actual.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)

    assert jax.tree.all(jax.tree.map(same, LAYOUTS[layout], outputs, GRADS, is_leaf=is_spec))


@pytest.mark.parametrize(("kind", "layout", "method"), [p for p in SETTINGS if p.values[0] in KNOWN])
def test_known_axes_cost_one_all_reduce_for_each_set(kind, layout, method):
    """Where types or specs say what is split, each set of axes costs one all-reduce, and nothing is gathered.

    It has a number for each row that is measured there, whatever the number of leaves.
    """
    found = collectives(on_all_devices(kind, layout, method))
    measured = 2 if "relative" in method else 1
    assert set(found) == {"all-reduce"}
    assert len(found["all-reduce"]) == measured * AXIS_SETS[layout]
    assert max(found["all-reduce"]) <= len(METHODS[method]().init(GRADS).norm)


@pytest.mark.parametrize("kind", KNOWN)
def test_norms_of_split_units_come_out_whole(kind):
    """Each unit that is split costs one number in the all-reduce, and all devices hold the norms of all.

    In the layout of tensor parallelism that is each unit but `head/scale`.
    """
    compiled = on_all_devices(kind, "tensor", "unit")
    state = METHODS["unit"]().init(GRADS)
    assert collectives(compiled) == {"all-reduce": [len(state.norm) - 1]}
    _, shardings = compiled.output_shardings
    assert jax.tree.all(jax.tree.map(lambda sharding: sharding.is_fully_replicated, shardings))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["auto", *KNOWN, "shard_map"])
def test_sixteen_bits_are_summed_in_float32_over_all_devices(kind, dtype):
    """Norms are right to float32's digits where squares overflow too, and leaves keep dtype and sharding."""
    layout, mesh = LAYOUTS["mixed"], mesh_of("auto" if kind == "shard_map" else kind)
    inside = {"axis_name": ("data", "model")} if kind == "shard_map" else telling(kind)
    tx, alone = METHODS["layer"](**inside), METHODS["layer"]()
    step, one = (lambda grads, tx=tx: tx.update(grads, tx.init(grads)) for tx in (tx, alone))
    if kind == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(layout,), out_specs=(layout, P()))
    short = jax.tree.map(lambda x: x.astype(dtype), GRADS)
    compiled = jax.jit(step).lower(put(short, mesh, layout)).compile()
    one = jax.jit(one).lower(short).compile()
    largest = {"bfloat16": 1e20, "float16": 1e4}[dtype]
    for factor in (1.0, largest, 1e-3):
        grads = jax.tree.map(lambda x, factor=factor: (factor * np.float64(x)).astype(dtype), GRADS)
        updates, state = compiled(put(grads, mesh, layout))
        exact = [
            np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in grads[name].values()))
            for name in sorted(grads)
        ]
        np.testing.assert_allclose(state.norm, exact, rtol=1e-6)
        expected, _ = one(grads)
        for found, value, spec in zip(*map(jax.tree.leaves, (updates, expected, layout)), strict=True):
            assert found.dtype == value.dtype == dtype
            assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), found.ndim)
            # Factors may differ in the last digit of float32, and then products in that of 16 bits.
            np.testing.assert_allclose(*map(np.float64, (found, value)), rtol=float(jnp.finfo(dtype).eps))
    assert set(collectives(compiled)) == {"all-reduce"}
    assert len(collectives(compiled)["all-reduce"]) <= AXIS_SETS["mixed"]


COUNT_ON_64 = """
import json, jax
jax.config.update("jax_num_cpu_devices", 64)
from benchmarks import hlo, scaling
from benchmarks.scaling import Case
for case in json.loads(input()):
    counts = []
    for wide in (False, True):
        found = hlo.collectives(hlo.parse(scaling.compiled(Case(*case, wide=wide))))
        counts.append(sorted((one.kind, one.operands, one.nbytes) for one in found))
    print(json.dumps(counts))
"""


def test_what_is_exchanged_does_not_depend_on_the_number_of_devices():
    """On 64 devices an update has the collectives, and the bytes in them, that it has on eight."""
    cases = [
        ("jit", "fsdp", "leaf", "clip", 8),
        ("specs", "mixed", "stacked", "clip", 64),
        ("specs", "tensor", "unit", "clip", 10_000),
        ("jit", "tensor", "unit", "clip", 10_000),
        ("explicit", "fsdp", "unit", "clip", 100_000),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", COUNT_ON_64],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    counts = dict(zip(cases, map(json.loads, found.stdout.splitlines()), strict=True))
    for eight, sixty_four in counts.values():
        assert eight == sixty_four
    # Four bytes for each group, which are the units of the kernel and the bias.
    assert counts[cases[-1]][1] == [["all-reduce", 1, 4 * 100_001]]
    assert [kind for kind, *_ in counts[cases[-2]][1]] == ["all-gather", "all-reduce"]


@pytest.mark.parametrize(("kind", "layout", "method"), [p for p in SETTINGS if p.values[2] in ONE_ROW])
def test_one_all_reduce_for_each_set_of_axes(kind, layout, method):
    """Groups of whole leaves cost one all-reduce for each set of axes leaves are split over, and no gather.

    Sometimes the compiler needs fewer. A limit relative to the parameters measures these as well, and
    costs as much again.
    """
    found = collectives(on_all_devices(kind, layout, method))
    measured = 2 if "relative" in method else 1
    assert set(found) == {"all-reduce"}
    assert measured <= len(found["all-reduce"]) <= measured * AXIS_SETS[layout]


@pytest.mark.parametrize(("kind", "layout", "method"), [p for p in SETTINGS if p.values[2] in MANY_ROWS])
def test_only_row_norms_are_gathered(kind, layout, method):
    """Groups with a row per index of a split axis gather one number per row, and never a leaf."""
    found = collectives(on_all_devices(kind, layout, method))
    rows = len(METHODS[method]().init(GRADS).norm)
    measured = 2 if "relative" in method else 1
    assert set(found) <= {"all-reduce", "all-gather"}
    assert len(found["all-reduce"]) <= measured * AXIS_SETS[layout]
    assert sum(found["all-gather"]) <= 2 * measured * rows


def test_orders_above_two_cost_two_all_reduces():
    """The norm of order 3 reads the update twice: once for the largest entries, once for the powers."""
    assert len(collectives(on_all_devices("auto", "fsdp", "leaf, lp(3)"))["all-reduce"]) == 2


def in_shard_map(method, layout, axis_name, check_vma=True):
    """The updates and the state of one step, compiled, with the mesh's axes manual."""
    layout = LAYOUTS[layout]

    def step(grads, params):
        tx = METHODS[method](axis_name=axis_name)
        return tx.update(grads, tx.init(params), params)

    mapped = jax.shard_map(
        step, mesh=mesh_of("auto"), in_specs=(layout, layout), out_specs=(layout, P()), check_vma=check_vma
    )
    return jax.jit(mapped).lower(GRADS, PARAMS).compile()


@pytest.mark.parametrize(
    ("method", "layout"),
    [(method, "mixed") for method in [*ONE_ROW, "leaf, budget", "leaf, lp(3)"]] + [("stacked", "fsdp")],
)
def test_axis_name_in_shard_map_gives_the_single_device_update(method, layout):
    """Inside shard_map each leaf is summed over the axes it is split over, and a replicated one counts once.

    The state is the same on all devices, which the out_specs of `P()` make JAX check.
    """
    compiled, tx = in_shard_map(method, layout, ("data", "model")), METHODS[method]()
    for grads in VALUES.values():
        expected = on_one_device(method)(grads, tx.init(PARAMS), PARAMS)
        updates, state = compiled(grads, PARAMS)
        assert_same((updates, state), expected)
        copies = [shard.data for shard in updates["head"]["scale"].addressable_shards]
        assert_same(copies, [copies[0]] * 8, rtol=0)
    measured = 2 if "relative" in method or "lp" in method else 1
    assert len(collectives(compiled)["all-reduce"]) <= measured * AXIS_SETS[layout]
    assert "all-gather" not in collectives(compiled)


def test_unchecked_shard_map_sums_every_leaf_over_all_axes():
    """With check_vma=False JAX does not track what is split: every leaf is summed over all of axis_name.

    So a leaf that is split over the axis is counted right, and a replicated one once for each device.
    """
    tx = oc.clip_by_leafwise_norm(1.0, axis_name="data")
    split = {"a": P("data"), "b": P()}
    mapped = jax.shard_map(
        lambda grads: tx.update(grads, tx.init(grads)),
        mesh=mesh_of("auto"),
        in_specs=(split,),
        out_specs=(split, P()),
        check_vma=False,
    )
    _, state = jax.jit(mapped)({"a": jnp.ones(16), "b": jnp.ones(16)})
    np.testing.assert_allclose(state.norm, [4.0, 8.0])


def test_without_axes_each_device_clips_its_own_part():
    """Inside shard_map nothing is summed over devices where axis_name says that nothing is to be."""
    tx = oc.clip_by_global_norm(1.0, axis_name=())
    mapped = jax.shard_map(
        lambda x: tx.update(x, tx.init(x))[0], mesh=mesh_of("auto"), in_specs=P("data"), out_specs=P("data")
    )
    np.testing.assert_allclose(jnp.linalg.norm(jax.jit(mapped)(jnp.ones(16))), 2.0, rtol=1e-6)


def test_axes_that_split_the_rows_stay_out_of_axis_name():
    """Units are measured where they lie: axis_name names the axes that a unit is split over, no others."""
    tx = oc.clip_by_unitwise_norm(0.1, axis_name="data")
    mapped = jax.shard_map(
        lambda x: tx.update(x, tx.init(x))[0],
        mesh=mesh_of("auto"),
        in_specs=P("data", "model"),
        out_specs=P("data", "model"),
    )
    expected, _ = on_one_device("unit")(GRADS, METHODS["unit"]().init(PARAMS), PARAMS)
    assert_same(jax.jit(mapped)(GRADS["head"]["kernel"]), expected["head"]["kernel"])


PER_EXAMPLE = {
    "whole": lambda **kw: oc.clip_per_example(3.0, **kw),
    "leaf, quantile": lambda **kw: oc.clip_per_example(
        oc.per_example_quantile(0.5, rate=2.0), groups=oc.groups.leaf(), **kw
    ),
    "layer, budget": lambda **kw: oc.clip_per_example(
        oc.limits.budget(3.0, by="size"), groups=oc.groups.layer(), **kw
    ),
}
SCALES = np.float32([0.01, 0.1, 1.0, 0.0, 3.0, 10.0, 1e30, 1e-30])


def batch_of(tree, axis=None):
    """Eight examples, multiples of a tree; or the partition specs of such, for specs of the tree."""
    if axis is None:
        return jax.tree.map(lambda x: np.multiply.outer(SCALES, x), tree)
    return jax.tree.map(lambda spec: P(*axis, *spec), tree, is_leaf=is_spec)


@pytest.mark.parametrize("method", PER_EXAMPLE)
def test_examples_whose_parts_are_on_several_devices_have_one_norm(method):
    """Inside shard_map, with axis_name, per-example clipping gives the single-device update and state."""
    layout, examples = LAYOUTS["mixed"], batch_of(GRADS)
    examples["embed"]["table"][2, -1, -1] = np.nan

    def two(tx, grads):
        _, state = tx.update(grads, tx.init(PARAMS))
        return tx.update(grads, state)

    mapped = jax.shard_map(
        functools.partial(two, PER_EXAMPLE[method](axis_name=("data", "model"))),
        mesh=mesh_of("auto"),
        in_specs=(batch_of(layout, [None]),),
        out_specs=(layout, P()),
    )
    expected = jax.jit(functools.partial(two, PER_EXAMPLE[method]()))(examples)
    assert expected[1].nonfinite.max() == 2
    assert_same(jax.jit(mapped)(examples), expected, rtol=1e-5)


def test_a_batch_over_one_axis_and_parameters_over_another():
    """The mean over the axis of the batch is the user's; axis_name names that of the parameters alone."""
    tx, layout = oc.clip_per_example(3.0, axis_name="model"), LAYOUTS["tensor"]

    def step(grads):
        updates, _ = tx.update(grads, tx.init(PARAMS))
        return jax.lax.pmean(updates, "data")

    mapped = jax.shard_map(
        step, mesh=mesh_of("auto"), in_specs=(batch_of(layout, ["data"]),), out_specs=layout
    )
    alone = oc.clip_per_example(3.0)
    expected, _ = jax.jit(alone.update)(batch_of(GRADS), alone.init(PARAMS))
    assert_same(jax.jit(mapped)(batch_of(GRADS)), expected, rtol=1e-5)


def three(tx, grads, value):
    """What becomes of an ordinary update, one with other values, and one thirty times as large."""
    state, out = tx.init(grads), []
    for updates in (grads, value, jax.tree.map(lambda x: 30 * x, grads)):
        updates, state = tx.update(updates, state)
        out.append(updates)
    return out, state


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_largest_entry_of_a_leaf_is_that_of_all_devices(layout):
    """Inside shard_map, with axis_name, adaptive_value_clip gives the single-device updates and state."""
    spec, alone = LAYOUTS[layout], jax.jit(functools.partial(three, oc.adaptive_value_clip(0.5)))
    mapped = jax.shard_map(
        functools.partial(three, oc.adaptive_value_clip(0.5, axis_name=("data", "model"))),
        mesh=mesh_of("auto"),
        in_specs=(spec, spec),
        out_specs=([spec] * 3, P()),
    )
    compiled = jax.jit(mapped).lower(GRADS, GRADS).compile()
    for value in VALUES.values():
        expected = alone(GRADS, value)
        assert_same(compiled(GRADS, value), expected, rtol=1e-5)
        assert expected[1].clipped.max() > 0
    found = collectives(compiled)  # of three updates: largest moduli, and how many entries were clipped
    assert set(found) == {"all-reduce"}
    assert len(found["all-reduce"]) <= 3 * 2 * AXIS_SETS[layout]


def test_means_of_units_run_over_the_devices_that_inputs_are_split_over():
    """Inside shard_map, with axis_name, centralize gives the single-device update.

    A device may hold one input of several, all of them, or one output.
    """
    shapes = {"dense": (8, 4), "one": (4, 2), "whole": (6, 2), "outputs": (3, 2), "alone": (1, 4), "b": (8,)}
    specs = {"dense": P("data", "model"), "one": P("data"), "whole": P(), "outputs": P(None, "model")}
    specs |= {"alone": P(None, "model"), "b": P("data")}
    rng = np.random.default_rng(4)
    grads = {name: rng.normal(1, 1, size=shape).astype(np.float32) for name, shape in shapes.items()}

    def centred(axis_name):
        tx = oc.centralize(axis_name=axis_name)
        return lambda grads: tx.update(grads, tx.init(grads))[0]

    mapped = jax.shard_map(centred("data"), mesh=mesh_of("auto"), in_specs=(specs,), out_specs=specs)
    compiled = jax.jit(mapped).lower(grads).compile()
    expected = jax.jit(centred(None))(grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), compiled(grads), expected
    )
    np.testing.assert_array_equal(expected["alone"], grads["alone"])
    assert len(collectives(compiled)["all-reduce"]) <= 2


def test_unchecked_shard_map_takes_every_leaf_for_split():
    """With check_vma=False, as under pmap, largest moduli and means run over all of axis_name."""
    grads = {"w": np.arange(16.0, dtype=np.float32).reshape(8, 2)}
    for make in (oc.centralize, functools.partial(oc.adaptive_value_clip, 0.5)):

        def two(grads, make=make, **kwargs):
            tx = make(**kwargs)
            _, state = tx.update(grads, tx.init(grads))
            return tx.update(jax.tree.map(lambda x: x * x, grads), state)

        mapped = jax.shard_map(
            functools.partial(two, axis_name="data"),
            mesh=mesh_of("auto"),
            in_specs=({"w": P("data")},),
            out_specs=({"w": P("data")}, P()),
            check_vma=False,
        )
        assert_same(jax.jit(mapped)(grads), jax.jit(two)(grads), rtol=1e-5)


def by_hand_over_data(tx, mesh, manual, **options):
    """An update in a shard_map that takes the axis `data` alone."""
    return jax.shard_map(
        lambda grads: tx.update(grads, tx.init(grads)),
        mesh=mesh,
        in_specs=(manual,),
        out_specs=(manual, P()),
        axis_names={"data"},
        **options,
    )


@pytest.mark.skipif(OLD_JAX, reason="JAX 0.7 cannot constrain shardings where only some axes are manual")
def test_some_axes_manual_and_others_automatic():
    """Where shard_map takes only some axes, axis_name names these; the compiler sees to the others."""
    mesh, layout = mesh_of("auto"), LAYOUTS["mixed"]
    manual = jax.tree.map(
        lambda spec: P(*(a if a == "data" else None for a in spec)), layout, is_leaf=is_spec
    )
    tx = METHODS["layer"](axis_name="data")
    mapped = by_hand_over_data(tx, mesh, manual)
    expected = on_one_device("layer")(GRADS, tx.init(PARAMS), PARAMS)
    assert_same(jax.jit(mapped)(put(GRADS, mesh, layout)), expected)


@pytest.mark.skipif(OLD_JAX, reason="JAX 0.7 cannot constrain shardings where only some axes are manual")
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", KNOWN)
def test_some_axes_manual_and_others_known(kind, check_vma):
    """Where shard_map takes only some axes, both are summed over at once.

    The manual axes are those of axis_name, and types tell of the others; or specs name both.
    """
    layout = {"dense": {"kernel": P("data", "model"), "bias": P("data")}}
    split = {"explicit": {"axis_name": "data"}, "told": {"specs": layout}}
    mesh, tx = mesh_of(kind), METHODS["layer"](**split[kind])
    grads = {"dense": {"kernel": GRADS["head"]["kernel"], "bias": GRADS["embed"]["table"][:, 0]}}
    manual = jax.tree.map(lambda spec: P("data"), layout, is_leaf=is_spec)
    mapped = by_hand_over_data(tx, mesh, manual, check_vma=check_vma)
    alone = METHODS["layer"]()
    sharded = put(grads, mesh, layout)
    compiled = jax.jit(mapped).lower(sharded).compile()
    assert_same(compiled(sharded), jax.jit(alone.update)(grads, alone.init(grads)))
    assert len(collectives(compiled)["all-reduce"]) == 2  # for the kernel and for the bias


@pytest.mark.skipif(OLD_JAX, reason="JAX 0.7 cannot constrain shardings where only some axes are manual")
@pytest.mark.parametrize("method", ["layer", "unit"])
def test_one_axis_explicit_and_another_automatic(method):
    """A mesh may have axes of both kinds: those that types tell of are summed over first."""
    kinds = AxisType.Explicit, AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds, devices=jax.devices("cpu"))
    tx, grads = METHODS[method](), put(GRADS, mesh, LAYOUTS["mixed"])
    assert_same(
        jax.jit(tx.update)(grads, tx.init(grads)), on_one_device(method)(GRADS, tx.init(PARAMS), PARAMS)
    )


@pytest.mark.parametrize("specs", ["fsdp", "tensor"])
def test_specs_that_are_not_how_leaves_lie_move_leaves_and_change_nothing(specs):
    """Under jit an array is what it is, however it is split: the compiler brings it to where specs say."""
    tx, mesh = METHODS["unit"](specs=LAYOUTS[specs]), mesh_of("auto")
    grads, params = (put(tree, mesh, LAYOUTS["mixed"]) for tree in (GRADS, PARAMS))
    compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
    found = compiled(grads, tx.init(params), params)
    assert_same(found, on_one_device("unit")(GRADS, METHODS["unit"]().init(PARAMS), PARAMS))


MISFITS = [
    (
        {"a": P("data"), "b": P("data")},
        r"clip_by_global_norm: leaf 'b' of shape \(6,\) cannot be split as its specification, .*'data'.*, "
        "says: dimension 0 does not divide by 4 devices",
    ),
    (
        {"a": P("data", "model"), "b": P()},
        r"leaf 'a' of shape \(8,\) cannot be split as .* says: it has 1 dimensions",
    ),
    ({"a": P("data")}, "specs has none for leaf 'b', among 'a'"),
]


@pytest.mark.parametrize(("specs", "text"), MISFITS, ids=["uneven", "dimensions", "missing"])
def test_specs_that_do_not_fit_a_leaf_under_jit_are_an_error(specs, text):
    """The leaf is named, and what does not fit."""
    tx, mesh = oc.clip_by_global_norm(1.0, specs=specs), mesh_of("auto")
    grads = put({"a": jnp.ones(8), "b": jnp.ones(6)}, mesh, {"a": P("data"), "b": P()})
    with pytest.raises(ValueError, match=text):
        jax.jit(tx.update)(grads, tx.init(grads))


@pytest.mark.parametrize("axes", [(AxisType.Explicit,) * 2, (AxisType.Explicit, AxisType.Auto)], ids=str)
def test_specs_beside_explicit_axes_change_nothing(axes):
    """Types tell of explicit axes anyway; what specs say of automatic ones is used."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=axes, devices=jax.devices("cpu"))
    tx, grads = METHODS["unit"](specs=LAYOUTS["mixed"]), put(GRADS, mesh, LAYOUTS["mixed"])
    if OLD_JAX and AxisType.Auto in axes:
        pytest.skip("JAX 0.7 cannot constrain shardings where only some axes are manual")
    compiled = jax.jit(tx.update).lower(grads, tx.init(grads)).compile()
    expected = on_one_device("unit")(GRADS, METHODS["unit"]().init(PARAMS), PARAMS)
    assert_same(compiled(grads, tx.init(grads)), expected)
    assert len(collectives(compiled)["all-reduce"]) == AXIS_SETS["mixed"]
    assert set(collectives(compiled)) == {"all-reduce"}


def test_methods_that_leave_it_to_the_compiler_take_specs_under_jit():
    """What measures no groups, or whole matrices, is as right with specs as without."""
    layout = {"w": P("data", "model"), "b": P("model")}
    grads = {"w": GRADS["head"]["kernel"], "b": GRADS["embed"]["table"][0]}
    sharded = put(grads, mesh_of("auto"), layout)
    for build in (
        lambda **kw: oc.adaptive_value_clip(**kw),
        lambda **kw: oc.centralize(**kw),
        lambda **kw: oc.rescale_by_norm(0.1, norm=oc.norms.spectral(30), **kw),
    ):
        tx, alone = build(specs=layout), build()
        found = jax.jit(tx.update)(sharded, tx.init(sharded))
        assert_same(found, jax.jit(alone.update)(grads, alone.init(grads)), rtol=1e-5)


@pytest.mark.parametrize("specs", [P("model"), None])
def test_examples_of_split_parameters_under_jit(specs):
    """The specs are those of the parameters; the batch, split over another axis, stays where it is."""
    mesh, (tx, alone) = mesh_of("auto"), (oc.clip_per_example(1.0, specs=s) for s in (specs, None))
    examples = {"w": GRADS["layers"]["kernel"]}
    params = {"w": PARAMS["layers"]["kernel"][0]}
    sharded = put(examples, mesh, {"w": P("data", "model")})
    compiled = jax.jit(tx.update).lower(sharded, tx.init(params)).compile()
    found, expected = compiled(sharded, tx.init(params)), alone.update(examples, alone.init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, expected)
    if not OLD_JAX or specs is None:  # JAX 0.7 makes the batch's axis manual too
        assert max(sum(sizes) for sizes in collectives(compiled).values()) <= 2 * examples["w"][0].size


@pytest.mark.parametrize("kind", MESHES)
def test_the_largest_singular_value_is_that_of_the_whole(kind):
    """A norm that is not made of its parts' norms is measured of whole leaves, however they are split."""
    grads = {"w": GRADS["head"]["kernel"]}
    sharded = put(grads, mesh_of(kind), {"w": P("data", "model")})
    measure = jax.jit(lambda tree: oc.group_norms(tree, norm=oc.norms.spectral(30)))
    expected = np.linalg.norm(np.float64(grads["w"]), ord=2)
    np.testing.assert_allclose(measure(sharded)["w"], expected, rtol=1e-3)


@pytest.mark.parametrize("kind", MESHES)
def test_clipping_each_example_leaves_the_batch_split(kind):
    """Under vmap over a split batch, each device clips its own examples: no entry of a gradient moves."""
    if OLD_JAX and kind == "explicit":
        pytest.skip("JAX 0.7 cannot vmap a loop over an explicitly split axis")

    def clip(examples):
        groups = oc.groups.stacked(oc.groups.leaf(), "layers")
        return jax.vmap(lambda grads: oc.rescale_tree(grads, 0.5, groups=groups))(examples)

    scales = np.linspace(0.01, 1, 8, dtype=np.float32)
    examples = jax.tree.map(lambda x: np.multiply.outer(scales, x), GRADS)
    split = jax.tree.map(lambda x: P("data", *[None] * (x.ndim - 1)), examples)
    compiled = jax.jit(clip).lower(put(examples, mesh_of(kind), split)).compile()
    assert_same(compiled(put(examples, mesh_of(kind), split)), clip(examples))
    assert sum(sum(sizes) for sizes in collectives(compiled).values()) <= 1  # whether any is to be read again


@pytest.mark.parametrize("kind", MESHES)
def test_sharded_training_step_in_scan(kind):
    """Clipping in front of an optimizer keeps the types of parameters and state from step to step."""
    mesh, layout = mesh_of(kind), LAYOUTS["mixed"]
    tx = optax.chain(oc.clip_by_layerwise_norm(1.0), optax.sgd(0.1, momentum=0.9))

    @jax.jit
    def train(params, grads):
        def step(carry, scale):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda g: scale * g, grads), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.array([1.0, 10.0, 0.01]))[0]

    expected, _ = train(PARAMS, GRADS)
    with jax.set_mesh(mesh):
        params, state = train(put(PARAMS, mesh, layout), put(GRADS, mesh, layout))
    assert_same(params, expected, rtol=1e-5)
    assert oc.metrics(state)["clip/clipped_fraction/whole"] == np.float32(2 / 3)


NORMS = {
    "unit": METHODS["unit"],
    "linf": lambda **kw: oc.rescale_by_norm(0.1, groups=oc.groups.layer(), norm=oc.norms.linf(), **kw),
    "lp": lambda **kw: oc.rescale_by_norm(0.1, norm=oc.norms.lp(4), **kw),
}


@pytest.mark.parametrize("kind", ["auto", *KNOWN])
@pytest.mark.parametrize("method", NORMS)
def test_derivatives_are_those_of_one_device(kind, method):
    """The derivative through a clip does not depend on how leaves are split."""

    def derivative(grads, **options):
        def loss(grads):
            tx = NORMS[method](**options)
            updates, _ = tx.update(grads, tx.init(grads))
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(updates))

        return jax.jit(jax.grad(loss))(grads)

    sharded = derivative(put(GRADS, mesh_of(kind), LAYOUTS["mixed"]), **telling(kind))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), sharded, derivative(GRADS)
    )


@pytest.mark.parametrize("kind", ["auto", *KNOWN])
def test_norms_of_sharded_arrays_outside_jit(kind):
    """The norms of sharded arrays are right outside jit as well."""
    sharded = put(GRADS, mesh_of(kind), LAYOUTS["mixed"])
    found = oc.group_norms(sharded, oc.groups.unit(), **telling(kind))
    assert_same(found, oc.group_norms(GRADS, oc.groups.unit()))


RECORD_GROUPS = {
    "leaf": oc.groups.leaf(),
    "whole": oc.groups.whole(),
    "unit": oc.groups.unit(),
    "stacked": oc.groups.stacked(oc.groups.layer(), "layers"),
}
RECORDED = {  # what is not finite, and entries in leaves that are split and that are replicated
    "ordinary": GRADS,
    "small": jax.tree.map(lambda x: np.float32(1e-25) * x, GRADS),
    "one NaN": spiked(GRADS, "embed/table", np.nan),
    "three": spiked(
        spiked(spiked(GRADS, "layers/bias", np.inf), "head/scale", np.nan), "head/kernel", np.nan
    ),
}


def record(groups, **options):
    return oc.record(RECORD_GROUPS[groups], capacity=2, stretches=2, params=True, **options)


@functools.cache
def recorded_on_one_device(groups):
    tx = record(groups)
    return (
        jax.jit(lambda g, s, p: tx.update(g, s, p, value=jnp.float32(0.5)))
        .lower(GRADS, tx.init(PARAMS), PARAMS)
        .compile()
    )


def all_reduces(compiled):
    """How many all-reduces there are; there is nothing else."""
    kinds = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", compiled.as_text())
    assert set(kinds) == {"all-reduce"}
    return len(kinds)


@pytest.mark.parametrize("groups", RECORD_GROUPS)
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("auto", "fsdp"), ("auto", "tensor"), ("auto", "mixed"), ("explicit", "mixed"), ("told", "mixed")],
)
def test_a_recording_of_sharded_updates_equals_that_of_one_device(kind, layout, groups):
    """Norms, counts of what is not finite, and all else; updates come out as they went in."""
    tx, mesh = record(groups, **telling(kind)), mesh_of(kind)
    grads, params = (put(tree, mesh, LAYOUTS[layout]) for tree in (GRADS, PARAMS))
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=jnp.float32(0.5)))
    compiled = update.lower(grads, tx.init(params), params).compile()
    assert_same(tx.init(params), record(groups).init(PARAMS))
    for values in RECORDED.values():
        expected, state = recorded_on_one_device(groups)(values, record(groups).init(PARAMS), PARAMS)
        updates, sharded = compiled(put(values, mesh, LAYOUTS[layout]), tx.init(params), params)
        assert_same(sharded, state)
        assert_same(updates, expected, rtol=0)
    if groups in ("leaf", "whole"):
        # Of updates, of parameters, and of counts, in a loop that is entered where a norm is not finite.
        assert 3 <= all_reduces(compiled) <= 3 * AXIS_SETS[layout]


@pytest.mark.parametrize("groups", ["leaf", "whole"])
def test_recording_in_shard_map_equals_that_of_one_device(groups):
    """With axis_name, a leaf that is split is counted over its parts, and a replicated one once."""
    layout = LAYOUTS["mixed"]
    tx = record(groups, axis_name=("data", "model"))

    def step(grads, state, params):
        return tx.update(grads, state, params, value=jnp.float32(0.5))

    mapped = jax.shard_map(
        step, mesh=mesh_of("auto"), in_specs=(layout, P(), layout), out_specs=(layout, P())
    )
    compiled = jax.jit(mapped).lower(GRADS, tx.init(PARAMS), PARAMS).compile()
    for values in RECORDED.values():
        expected, state = recorded_on_one_device(groups)(values, record(groups).init(PARAMS), PARAMS)
        updates, sharded = compiled(values, tx.init(PARAMS), PARAMS)
        assert np.isnan(sharded.start).all()
        assert_same(sharded._replace(start=0), state._replace(start=0))
        assert_same(updates, expected, rtol=0)
    assert 3 <= all_reduces(compiled) <= 3 * AXIS_SETS["mixed"]


def test_recording_under_pmap_counts_all_parts():
    """Under pmap every leaf is split over the axis, and the state is the same on all devices."""
    tx = oc.record(capacity=2, axis_name="data")
    grads = {"a": np.ones((8, 4), np.float32), "b": np.ones((8, 2), np.float32)}
    grads["a"][5, 1:3] = np.nan
    devices = jax.devices("cpu")[:8]
    _, state = jax.pmap(lambda g: tx.update(g, tx.init(g)), "data", devices=devices)(grads)
    for k in range(8):
        own = jax.tree.map(lambda x: np.asarray(x)[k], state)  # noqa: B023
        np.testing.assert_allclose(own.norm[0], [np.nan, 4])
        assert own.entries.tolist() == own.first_entries.tolist() == [2, 0]
        assert own.nonfinite.tolist() == [1, 0]


@pytest.mark.parametrize("kind", MESHES)
def test_recording_in_a_sharded_scan(kind):
    """A recording, its losses too, keeps its types from step to step, and is that of one device."""
    layout = LAYOUTS["mixed"]
    tx = optax.chain(record("leaf"), optax.sgd(0.1))

    @jax.jit
    def train(params, grads):
        def step(carry, scale):
            params, state = carry
            loss = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
            scaled = jax.tree.map(lambda g: scale * g, grads)
            updates, state = tx.update(scaled, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.array([1.0, jnp.nan, 0.1]))[0][1]

    expected = oc.History.from_state(train(PARAMS, GRADS), PARAMS)
    with jax.set_mesh(mesh_of(kind)):
        state = train(*(put(tree, mesh_of(kind), layout) for tree in (PARAMS, GRADS)))
    found = oc.History.from_state(state, PARAMS)
    for field in ("norms", "loss", "params", "start"):
        assert_same(getattr(found, field), getattr(expected, field), rtol=1e-5)
    assert found.first_nonfinite() == expected.first_nonfinite()


@pytest.mark.parametrize("kind", MESHES)
def test_a_recording_begun_outside_the_mesh_goes_on_inside(kind):
    """A state from init outside jit and outside set_mesh is taken inside, with a loss or without."""
    tx, params = oc.record(capacity=2, stretches=2), put(PARAMS, mesh_of(kind), LAYOUTS["mixed"])
    state = tx.init(params)
    for loss in ({}, {"value": 0.5}):
        with jax.set_mesh(mesh_of(kind)):
            found = jax.jit(lambda g, s, loss=loss: tx.update(g, s, **loss)[1])(params, state)
        assert_same(found.norm, tx.update(PARAMS, tx.init(PARAMS))[1].norm)
