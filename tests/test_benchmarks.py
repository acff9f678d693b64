"""The benchmarks run, and what they can tell without a clock holds: temporary memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typer.testing import CliRunner
from versions import OLD_JAX

from benchmarks import (
    c_loop,
    char_model,
    methods,
    programs,
    pytorch,
    references,
    report,
    results,
    runs,
    spikes,
    spikes_report,
    suites,
    targets,
    timing,
    trees,
)
from benchmarks.__main__ import app

PROMISED = {
    "mlp": (10, 1.0e6),
    "gpt2": (148, 124.4e6),
    "gpt2_stacked": (16, 124.4e6),
    "small_1000": (1000, 1.0e6),
    "small_2000": (2000, 2.0e6),
    "large_10000": (10_000, 10.0e6),
    "one_leaf": (1, 100.0e6),
    "leaves_300": (300, 0.3e6),
    "mixed_300": (300, 1.85e6),
}
TINY = trees.Tree("tiny", {"dense": {"kernel": (16, 8), "bias": (8,)}})
# A perceptron with leaves large enough that temporary memory is more than a few vectors of scalars.
SMALL_MLP = trees.Tree("small_mlp", {f"dense_{k}": {"kernel": (256, 128), "bias": (4096,)} for k in range(2)})


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    """Optax's AdamW mixes dtypes: no strict promotion in this file."""


@pytest.mark.parametrize("name", trees.ALL)
def test_trees_have_their_leaves_and_entries(name):
    """The trees are those that the results speak of."""
    leaves, entries = PROMISED[name]
    specs = jax.tree.leaves(trees.specs(trees.ALL[name], "bfloat16"))
    assert len(specs) == trees.ALL[name].leaves == leaves
    assert sum(spec.size for spec in specs) == trees.ALL[name].entries == pytest.approx(entries, rel=0.01)
    assert trees.ALL[name].nbytes("bfloat16") == sum(spec.size * 2 for spec in specs)


def test_one_command_measures_everything(tmp_path, monkeypatch):
    """A quick run prints its tables, and writes every field of every row, a page and a figure."""
    monkeypatch.setitem(trees.ALL, "tiny", TINY)
    monkeypatch.setattr(suites, "MODELS", {"small": char_model.Shape(8, 1, 2, 4, 2)})
    page, picture = tmp_path / "page.md", tmp_path / "page.png"
    page.write_text("Before\n<!-- results -->\nold\n<!-- end of results -->\nAfter\n")
    options = ["--trees", "tiny", "--methods", "global", "--dtype", "float32,mixed", "--quick"]
    files = ["--json", str(tmp_path / "all.json"), "--markdown", str(page), "--figure", str(picture)]
    done = CliRunner().invoke(app, options + files, catch_exceptions=False, env={"COLUMNS": "150"})
    assert done.exit_code == 0
    assert "optax_global" in done.stdout
    rows, environment = report.read_json(tmp_path / "all.json")
    assert {"device", "cores", "load", "rounds", "left out", "jax", "optax", "torch", "C", "date"} <= set(
        environment
    )
    cases = {(row.suite, row.dtype, row.case) for row in rows if row.method == "global"}
    assert cases == {
        *(("step", dtype, case) for dtype in ("float32", "mixed") for case in suites.CASES),
        *(("alone", "float32", case) for case in suites.CASES),
        *(("compile", "float32", case) for case in ("trace", "compile", "total")),
        *((suite, "float32", case) for suite in suites.COUNTED for case in ("step", "alone")),
        *((suite, "mixed", "step") for suite in suites.COUNTED),
        ("train", "float32", "whole"),
    }
    timed = [row for row in rows if row.suite not in suites.COUNTED]
    assert all((row.ratio is None) == (row.against is None) for row in timed)
    beside = {(row.suite, row.against) for row in rows if row.method == "global"}
    assert {("step", "none"), ("step", "optax_global"), ("alone", "identity"), ("train", "none")} <= beside
    text = page.read_text()
    assert text.startswith("Before\n<!-- results -->")
    assert text.endswith("<!-- end of results -->\nAfter\n")
    assert "| tiny | mixed | clips | none, " in text
    assert "old" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--trees", "--methods", "--suites", "--dtype"])
def test_an_unknown_name_is_an_error_that_lists_the_known(option):
    """A misspelt option fails before anything is measured."""
    done = CliRunner().invoke(app, [option, "nonsense"], env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert "'nonsense' is none of" in done.output


@pytest.mark.parametrize("case", suites.CASES)
def test_gradients_are_clipped_at_every_call_or_never(case):
    """Between two calls clipped gradients grow back, and others stay as they are."""
    method = methods.ALL["leafwise"]
    compiled = programs.alone(method, TINY, "float32").compiled()
    grads = trees.normal(TINY, "float32", seed=1, size=suites.CASES[case])
    clipping = runs.Clipping(grads, case == "clips", TINY, method, None, compiled)
    del grads
    before = jax.tree.map(jnp.copy, clipping.grads)
    assert clipping.measure(4) > 0
    assert int(clipping.state.step) == 4
    assert clipping.state.clipped.tolist() == ([4, 4] if case == "clips" else [0, 0])
    if case == "clips":
        assert jnp.allclose(clipping.state.norm, methods.LIMIT * runs.REGROWTH)
    else:
        assert jax.tree.all(jax.tree.map(jnp.array_equal, clipping.grads, before))


@pytest.mark.parametrize("name", ["global", "record"])
def test_gradients_grow_only_where_a_method_makes_them_smaller(name):
    """Else they would overflow after some calls."""
    method, before = methods.ALL[name], trees.normal(TINY, "float32", seed=1)
    clip = method.build(TINY)
    after, _ = clip.update(before, clip.init(before))
    assert (optax.tree.norm(after) < optax.tree.norm(before)) == method.clips


def test_ratios_are_paired_by_round():
    """A round in which everything takes long weighs no more than any other."""
    spread = timing.spread([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert spread == timing.Spread(median=2.0, low=2.0, high=2.5, fastest=2.0)


@pytest.fixture(scope="module")
def temporary():
    """Temporary memory over the bytes of the gradients, compiled once for each program."""
    known = {}

    def of(program, name, dtype):
        if (program, name, dtype) not in known:
            compiled = getattr(programs, program)(methods.ALL[name], SMALL_MLP, dtype).compiled()
            known[program, name, dtype] = programs.temporary_bytes(compiled) / SMALL_MLP.nbytes(dtype)
        return known[program, name, dtype]

    return of


@pytest.mark.parametrize("program", ["step", "alone"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["global", "layerwise", "leafwise"])
def test_temporary_memory_is_no_more_than_optaxs(temporary, program, dtype, name):
    """Neither a clipped AdamW step nor the clip alone needs more memory than with Optax's global clipping."""
    if OLD_JAX and dtype == "bfloat16":
        pytest.skip("older compilers write more to memory")
    slack = 0.02  # of the gradients: vectors with a number per group
    assert temporary(program, name, dtype) <= temporary(program, "optax_global", dtype) + slack


@pytest.fixture(params=["float32", "bfloat16"])
def gradients(request):
    """A tree whose leaves end within a chunk or are many, with its entries in float64."""
    shapes = {"dense": {"kernel": (3, c_loop.CHUNK), "bias": (c_loop.CHUNK + 77,), "scale": (5,)}}
    grads = trees.normal(trees.Tree("odd", shapes), request.param, seed=0)
    return grads, jax.tree.map(lambda x: np.array(x, np.float64), grads)


def assert_scaled(grads, before, factors, slack=0.0):
    """Each entry is the one before times its leaf's factor, rounded once."""
    for grad, old, factor in zip(*map(jax.tree.leaves, (grads, before, factors)), strict=True):
        half = float(jnp.finfo(grad.dtype).eps) / 2
        np.testing.assert_allclose(np.array(grad, np.float64), old * factor, rtol=half + slack + 1e-5)


@pytest.mark.skipif(c_loop.unavailable() is not None, reason="no C compiler")
@pytest.mark.parametrize("share", [0.1, 10.0], ids=["clips", "idle"])
def test_the_loop_in_c_clips_by_the_global_norm(gradients, share):
    """What the clip is held against does the same work: NumPy's norm in float64, and every entry scaled."""
    grads, before = gradients
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(before)))
    assert c_loop.Loop(grads, threads=2)(share * norm) == pytest.approx(norm, rel=1e-6)
    assert_scaled(grads, before, jax.tree.map(lambda x: min(share, 1.0), before))


def test_without_a_compiler_a_reason_takes_the_loops_place(monkeypatch):
    """No compiler is no error: the results say so."""
    monkeypatch.setattr(c_loop.shutil, "which", lambda name: None)
    monkeypatch.setattr(c_loop, "library", c_loop.library.__wrapped__)
    assert c_loop.version() == c_loop.unavailable() == "no C compiler"


@pytest.mark.skipif(pytorch.unavailable() is not None, reason="no PyTorch")
@pytest.mark.parametrize("each", [False, True], ids=["global", "leafwise"])
def test_pytorch_clips_jaxs_arrays(gradients, each):
    """PyTorch writes into the arrays that it is given, by one norm or by each leaf's."""
    grads, before = gradients
    pytorch.Clip(grads, threads=2, each=each)(2.0)  # which it rounds to the gradients' dtype before use
    norms = jax.tree.map(lambda x: np.sqrt(np.sum(x**2)), before)
    if not each:
        norms = jax.tree.map(lambda x: np.sqrt(sum(n**2 for n in jax.tree.leaves(norms))), norms)
    rounded = 2 * float(jnp.finfo(grads["dense"]["bias"].dtype).eps)
    assert_scaled(grads, before, jax.tree.map(lambda n: min(2 / n, 1.0), norms), slack=rounded)


def test_targets_are_of_rows_that_are_measured():
    """Every target names methods, trees, dtypes and suites that there are."""
    for target in targets.ALL:
        assert target.suite in suites.SUITES
        assert set(target.trees or ()) <= set(trees.ALL)
        assert set(target.dtypes or ()) <= set(trees.GRADS)
        known = methods.ALL.keys() | set(references.NAMES)
        assert {*target.methods, target.against or "none"} <= known
        for name in target.methods:
            measured = *results.BASELINES.get(target.suite, ()), *methods.ALL[name].against, None
            assert target.against in measured


def test_a_row_is_held_against_its_target():
    """A median within the target meets it; one beyond does not, unless the quartiles reach it."""
    setting = results.Setting(trees.ALL["gpt2"], "float32")
    for own, verdict in (([1.1, 1.1, 1.1], "met"), ([1.1, 1.1, 1.3, 1.3], "unclear"), ([1.2] * 3, "missed")):
        seconds = {"none": [1.0] * len(own), "global": own}
        rows = results.compared("step", "clips", setting, [methods.ALL["global"]], seconds)
        (row,) = (row for row in rows if row.against == "none")
        assert (row.target, row.verdict) == (1.15, verdict)


def test_the_runs_with_spikes_are_compared_in_a_table_and_a_figure(tmp_path):
    """Two methods on a tiny model: one does not survive the NaN, and the other does."""
    page, picture = tmp_path / "page.md", tmp_path / "spikes.png"
    options = ["--methods", "none,zclip", "--steps", "100", "--seeds", "1", "--width", "8", "--rounds", "1"]
    files = ["--markdown", str(page), "--figure", str(picture)]
    done = CliRunner().invoke(spikes.app, options + files, catch_exceptions=False, env={"COLUMNS": "120"})
    assert done.exit_code == 0
    lines = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["zclip", "none"]
    assert "| not finite |" in lines[1]
    assert "| all |" in lines[1]
    assert "not finite" not in lines[0]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_spikes_and_lost_steps_are_counted_from_the_losses():
    """A loss far above the median before is a spike; steps are lost until the loss is back."""
    losses = np.full(100, 2.0)
    losses[60:64] = 3.0
    assert spikes_report.spike_share(losses) == pytest.approx(4 / 75)
    assert spikes_report.steps_lost(losses, 59) == 4
    assert spikes_report.steps_lost(np.where(np.arange(100) > 59, np.nan, losses), 59) is None


def test_an_unknown_method_is_an_error_that_lists_the_known():
    done = CliRunner().invoke(spikes.app, ["--methods", "zlcip"], env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert "'zlcip' is none of none, clip_by_value" in done.output
