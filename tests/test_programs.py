"""What compiled programs do, by count, which no noise changes: reads, kernels, memory, collectives."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from typer.testing import CliRunner
from versions import OLD_JAX, before

import optaxclip as oc
from benchmarks import hlo, layouts, methods, network, programs, scaling, trees
from benchmarks.scaling import Case

# Leaves too large to be merged, and large enough that a vector with a number per unit is little.
LARGE = trees.Tree("large", {f"dense_{k}": {"kernel": (1024, 128), "bias": (8192,)} for k in range(2)})
SMALL = trees.Tree("small", {f"layer_{k}": {"scale": (1000,), "bias": (1000,)} for k in range(50)})
# Leaves of equal shape with many rows beside one of a single row, as in a transformer.
WIDE = trees.Tree("wide", {"norm": {"scale": (4096,)}, "mlp": {"gate": (2048, 1024), "up": (2048, 1024)}})
STACKED = trees.Tree(
    "stacked",
    {"layers": {"query": (4, 512, 512), "out": (4, 512, 512)}, "head": {"kernel": (512, 4096)}},
    "^layers",
)
TWICE = trees.Tree("twice", {f"layer_{k}": {"scale": (1000,), "bias": (1000,)} for k in range(100)})
TREES = {tree.name: tree for tree in (LARGE, SMALL, TWICE, WIDE, STACKED)}
GROUPED = ["global", "layerwise", "leafwise"]
ROWS = [
    *[(name, "large") for name in GROUPED],
    *[(name, "wide") for name in ("leafwise", "unitwise", "adaptive")],
    *[(name, "stacked") for name in ("layerwise", "leafwise", "unitwise", "adaptive")],
]
TELEMETRY = ["zclip", "adagc", "record", "record_clip"]
NEW_XLA = pytest.mark.skipif(before(jax, 0, 10), reason="older compilers write more to memory")
FIXED = 52  # kernels for decisions and statistics, however many leaves
GROUPS = {"global": 0, "layerwise": 1 / 2, "leafwise": 1}  # more than one, for each leaf


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    """Optax's AdamW mixes dtypes: no strict promotion in this file."""


@functools.cache
def compiled(program, name, tree, dtype):
    made = getattr(programs, program)(methods.ALL[name], TREES[tree], dtype)
    return made.compiled()


@functools.cache
def reads(program, name, tree, dtype):
    """How many kernels in the entry, in loops and in branches read a gradient: a set over leaves."""
    module = hlo.parse(compiled(program, name, tree, dtype))
    gradients = hlo.arguments(module, "grads")
    assert len(gradients) == TREES[tree].leaves
    return {tuple(map(len, hlo.reads(module, one).values())) for one in gradients}


def temporary(program, name, tree, dtype):
    nbytes = TREES[tree].nbytes(dtype)
    return programs.temporary_bytes(compiled(program, name, tree, dtype)) / nbytes


def held(name, tree, dtype):
    """How large the state is, beside the gradients."""
    state = jax.eval_shape(
        methods.ALL[name].build(TREES[tree]).init, trees.specs(TREES[tree], trees.GRADS[dtype])
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / TREES[tree].nbytes(dtype)


def test_reads_are_followed_into_loops_and_branches():
    """A kernel counts where it runs; an argument that a loop only hands on is not read by it."""

    def run(x, y, z):
        def body(carry):
            k, total, y = carry
            return k + 1, total + jnp.sum(jnp.sin(x + total)), y

        _, total, y = lax.while_loop(lambda carry: carry[0] < 3, body, (0, x[0], y))
        picked = lax.cond(total > 0, lambda z: jnp.sum(jnp.cos(z)), lambda z: total, z)
        return total, jnp.sum(y), picked

    shape = jax.ShapeDtypeStruct((10_000,), jnp.float32)
    module = hlo.parse(jax.jit(run).lower(shape, shape, shape).compile())
    counts = [
        {where: len(own) for where, own in hlo.reads(module, one).items()}
        for name in "xyz"
        for one in hlo.arguments(module, name)
    ]
    assert counts[0]["loop"] == 1
    assert counts[1]["loop"] == counts[1]["branch"] == 0 < counts[1]["entry"]
    assert counts[2] == {"entry": 0, "loop": 0, "branch": 1}
    assert hlo.launches(module) <= sum(one.opcode not in hlo.FREE for one, _ in hlo.running(module))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "tree"), ROWS)
def test_a_clip_reads_each_gradient_twice(name, tree, dtype):
    """Once for its norm and once to scale it; a loop, not entered as a rule, would measure it once more.

    Where all leaves have several rows, the norm is taken in the loop.
    """
    in_loop = tree == "stacked" and name in ("unitwise", "adaptive")
    assert reads("alone", name, tree, dtype) == {(1 if in_loop else 2, 1, 0)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize(("name", "tree"), ROWS)
def test_in_a_step_a_clip_adds_one_read(name, tree, dtype):
    """Scaling is part of the kernels in which AdamW reads the gradients anyway: only the norm is added.

    The loop would measure them once more if the norm overflowed.
    """
    ((entry, loop, branch),) = reads("step", name, tree, dtype)
    ((without, _, _),) = reads("step", "none", tree, dtype)
    assert (loop, branch) == (1, 0)
    assert entry <= without + 1


def accessed(program, name, tree, dtype):
    """The bytes that all kernels read and write, those of a loop once, over those of the gradients."""
    nbytes = compiled(program, name, tree, dtype).cost_analysis()["bytes accessed"]
    return nbytes / TREES[tree].nbytes(dtype)


@NEW_XLA
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize(("name", "tree"), ROWS)
def test_nothing_else_is_read_or_written(name, tree, dtype):
    """But numbers for each row, and the parameters where limits are relative to them, in the loop as well."""
    like = 2 if dtype == "mixed" else 1  # how large the parameters are
    more = 2 * like * (name == "adaptive") + 24 * held(name, tree, dtype) + 0.01
    if dtype != "mixed":
        assert accessed("alone", name, tree, dtype) <= 4 + more
    assert accessed("step", name, tree, dtype) <= accessed("step", "none", tree, dtype) + 2 + more
    assert more < 0.6 + 2 * like * (name == "adaptive")


@NEW_XLA
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "tree"), ROWS)
def test_a_clip_needs_no_memory(name, tree, dtype):
    """The clip alone allocates at most a hundredth of the gradients, and some numbers for each row."""
    assert temporary("alone", name, tree, dtype) <= 0.01 + 3 * held(name, tree, dtype)


@NEW_XLA
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TELEMETRY)
def test_telemetry_needs_no_memory(name, dtype):
    """Nor do a limit that remembers norms and a recording, in front of AdamW, but copies of their states."""
    assert temporary("step", name, "large", dtype) <= 0.01 + 3 * held(name, "large", dtype) < 0.25


@NEW_XLA
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize(("name", "tree"), ROWS)
def test_a_clipped_step_needs_no_memory(name, tree, dtype):
    """Nor does AdamW behind a clip: scaled gradients are rounded where AdamW reads them."""
    without = temporary("step", "none", tree, dtype)
    assert temporary("step", name, tree, dtype) <= without + 0.01 + 3 * held(name, tree, dtype)


@NEW_XLA
def test_what_is_counted_as_memory_is_seen_where_it_is_used():
    """Optax's clip makes AdamW write all gradients once more, and twice in bfloat16."""
    assert temporary("step", "optax_global", "large", "float32") > 0.9
    assert temporary("step", "optax_global", "large", "bfloat16") > 1.9


@NEW_XLA
def test_float32_handed_on_is_not_written():
    """With `out_dtype`, bfloat16 gradients go into AdamW's kernels as they are read, and nowhere else."""
    optimizer = optax.chain(oc.rescale_by_norm(1.0, out_dtype=jnp.float32), programs.ADAMW)

    def run(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, grads = trees.specs(LARGE, "float32"), trees.specs(LARGE, "bfloat16")
    step = jax.jit(run, donate_argnums=(0, 1)).lower(params, jax.eval_shape(optimizer.init, params), grads)
    assert programs.temporary_bytes(step.compile()) <= 0.01 * LARGE.nbytes("bfloat16")


@NEW_XLA
@pytest.mark.parametrize("name", GROUPED)
def test_small_leaves_are_copied_once(name):
    """Leaves of up to 4,095 entries are put together to be measured: one copy, of their own size.

    In bfloat16 XLA writes the bits of each first.
    """
    assert temporary("alone", name, "small", "float32") <= 1.02
    assert temporary("alone", name, "small", "bfloat16") <= 2.05
    assert reads("alone", name, "small", "float32") == {(2, 0, 0)}


@NEW_XLA
@pytest.mark.parametrize("name", GROUPED)
def test_kernels_for_small_leaves(name):
    """One kernel scales a leaf, few measure them all, and each of several groups costs another, of a number.

    Optax's global clip takes four for each leaf.
    """
    found, twice = (
        hlo.launches(hlo.parse(compiled("alone", name, tree, "float32"))) for tree in ("small", "twice")
    )
    each = 1 + 1 / 64 + GROUPS[name]
    assert found <= each * SMALL.leaves + FIXED
    assert twice - found <= each * SMALL.leaves + 1


def allowed(layout, grouping):
    """Whether rows of a grouping lie on different devices, so that their norms are gathered."""
    kernel = layouts.LAYOUTS[layout].kernel
    return grouping == "unit" and len(kernel) > 1 and kernel[1] is not None


@functools.cache
def counted(mode, layout, grouping, method="clip", size=None):
    size = size or (64 if grouping in layouts.MANY_ROWS else 8)
    return scaling.counted(Case(mode, layout, grouping, method, size))


@pytest.mark.parametrize("grouping", ["whole", "leaf", "unit", "stacked"])
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_few_small_all_reduces_for_any_grouping(layout, grouping):
    """An update sends a number per leaf or row of a leaf, and gathers norms of units alone, if split.

    XLA reduces a leaf whose dimensions are split over different axes over one axis after the other.
    """
    row = counted("jit", layout, grouping)
    assert row.all_reduces <= layouts.LAYOUTS[layout].under_jit
    assert row.reduced <= 2 * 4 * max(row.leaves * (row.groups if grouping == "stacked" else 1), row.groups)
    assert row.all_gathers <= (1 if allowed(layout, grouping) else 0)
    assert row.gathered <= 4 * row.groups
    assert row.others == row.rare == 0


@pytest.mark.parametrize(
    ("mode", "layout", "grouping"),
    [
        (mode, layout, grouping)
        for mode in ("explicit", "specs")
        for layout in layouts.LAYOUTS
        for grouping in layouts.GROUPINGS
    ]
    + [
        ("shard_map", layout, grouping)
        for layout in ("mixed", "both")
        for grouping in ("whole", "leaf", "stacked")
    ],
)
def test_one_number_for_each_group_where_axes_are_known(mode, layout, grouping):
    """By axis_name, specs or type, each set of axes sends a number per group, however many leaves there are.

    So do units that are split over devices: their norms are summed into place, and not gathered.
    """
    row = counted(mode, layout, grouping)
    assert row.all_reduces == layouts.LAYOUTS[layout].axis_sets
    assert row.reduced <= row.all_reduces * 4 * row.groups
    assert row.all_gathers == row.others == row.rare == 0


@pytest.mark.parametrize(
    ("mode", "layout"), [("jit", "fsdp"), ("explicit", "fsdp"), ("explicit", "tensor"), ("specs", "tensor")]
)
def test_a_million_groups_cost_one_all_reduce(mode, layout):
    """The number of collectives does not grow with that of groups."""
    row = counted(mode, layout, "unit", size=1_000_000)
    assert (row.groups, row.all_reduces, row.all_gathers) == (1_000_001, 1, 0)
    assert row.reduced <= 4 * row.groups + 4


@pytest.mark.parametrize("mode", ["explicit", "specs"])
def test_many_leaves_cost_one_all_reduce_where_it_is_known_how_they_are_split(mode):
    """The number of collectives does not grow with that of leaves, as it does where XLA merges them."""
    row = counted(mode, "fsdp", "whole", size=300)
    assert (row.leaves, row.all_reduces, row.reduced) == (300, 1, 4)
    assert counted("jit", "fsdp", "whole", size=300).all_reduces == 2


@pytest.mark.parametrize("mode", ["explicit", "specs", "shard_map"])
def test_small_parts_are_measured_together(mode):
    """What a device has of leaves is merged where that is small, as small leaves are on one device."""
    module = hlo.parse(scaling.compiled(Case(mode, "fsdp", "whole", "clip", 80)))
    assert hlo.launches(module) <= 80 + 80 / 64 + FIXED


@pytest.mark.parametrize("mode", ["jit", "explicit", "specs", "shard_map"])
def test_what_makes_factors_is_in_no_kernel_that_scales(mode):
    """On a mesh, too, a leaf adds a kernel of few instructions: many would be compiled for each leaf anew."""

    def instructions(leaves):
        module = hlo.parse(scaling.compiled(Case(mode, "fsdp", "leaf", "clip", leaves)))
        return sum(len(one.instructions) for one in module.computations.values())

    assert instructions(80) - instructions(40) <= 50 * 40


@pytest.mark.parametrize(
    ("method", "all_reduces", "rare"),
    [("clip, limits.ema", 1, 0), ("clip, limits.relative", 2, 0), ("record, clip", 2, 1)],
)
def test_what_limits_and_recordings_add(method, all_reduces, rare):
    """A limit that follows the norms costs nothing; one more all-reduce measures parameters, or records.

    What counts entries that are not finite is in a loop that is entered only where there are some.
    """
    row = counted("jit", "fsdp", "leaf", method)
    assert (row.all_reduces, row.all_gathers, row.rare) == (all_reduces, 0, rare)


@pytest.mark.skipif(OLD_JAX, reason="the text of older programs names no axes")
def test_collectives_say_how_many_devices_take_part():
    """Leaves split over one axis are summed by the devices along it, not by all."""
    case = Case("jit", "fsdp", "leaf", "clip", 4)
    (found,) = hlo.collectives(hlo.parse(scaling.compiled(case)))
    assert found == hlo.Collective("all-reduce", 4, 16, layouts.MESH["data"], False, "loop")


def test_the_model_is_nccls_tree():
    """Two nodes of eight: the launch, seven steps within and one between, there and back, and the bytes."""
    expected = 6.8 + 2 * (7 * 0.6 + 1 * 5.0) + 2 * 4000 / 50_000
    assert network.all_reduce(network.GPU, 16, 4000) == pytest.approx(expected)
    assert network.all_reduce(network.GPU, 8, 4) == pytest.approx(6.8 + 2 * 7 * 0.6, rel=1e-3)
    assert network.all_reduce(network.GPU, 1, 4) == 0


def test_the_model_of_a_torus_is_bound_by_hops_or_by_bytes():
    """A thousand chips are three axes of ten, and more than a pod has are not one torus."""
    assert network.all_reduce(network.TPU, 1000, 4) == pytest.approx(30.0)
    assert network.all_reduce(network.TPU, 8, 54e6) == pytest.approx(200.0)
    assert math.isnan(network.all_reduce(network.TPU, 10_000, 4))


def test_one_command_counts_and_estimates(tmp_path, monkeypatch):
    """It prints tables, and writes every count as JSON and the tables between the marks of a page."""
    monkeypatch.setattr(scaling, "SIZES", {"whole": 4})
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- results -->\nold\n<!-- end of results -->\nAfter\n")
    files = ["--json", str(tmp_path / "all.json"), "--markdown", str(page)]
    options = ["--layouts", "fsdp", *files]
    done = CliRunner().invoke(scaling.app, options, catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "Collectives in a clipped update, counted" in done.stdout
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert [(row["case"]["mode"], row["all_reduces"], row["reduced"]) for row in rows] == [
        ("jit", 1, 16),
        ("specs", 1, 4),
        ("explicit", 1, 4),
        ("jit", 1, 16),
        ("shard_map", 1, 4),
    ]
    text = page.read_text()
    assert text.startswith("Before\n<!-- results -->")
    assert text.endswith("<!-- end of results -->\nAfter\n")
    assert "| jit | fsdp | whole | `optax.clip_by_global_norm` | 4 | 1 | 1 | 16 | 0 | 0 | 0 |" in text
    assert "| one call of FSDP2's `clip_grad_norm_` for each group | 1,000 |" in text
    assert "old" not in text


def test_an_unknown_layout_is_an_error_that_lists_the_known():
    done = CliRunner().invoke(scaling.app, ["--layouts", "fdsp"], env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert "'fdsp' is none of fsdp, tensor, mixed, both, data" in done.output
