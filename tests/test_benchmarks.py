"""The benchmarks run, and what they can tell without a clock holds: temporary memory."""

import functools
import shlex
import types
from typing import NamedTuple

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
    environment,
    files,
    hlo,
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
    variants,
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
# A leaf large enough not to be held against a program that does nothing.
WIDE = trees.Tree("wide", {"dense": {"kernel": (256, 64)}})
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
    device = environment.describe()["device"]
    page.write_text(f"Before\n<!-- results: {device} -->\nold\n<!-- end of results: {device} -->\nAfter\n")
    options = ["--trees", "tiny", "--methods", "global", "--dtype", "float32,mixed", "--quick"]
    options += ["--json", str(tmp_path / "all.json"), "--markdown", str(page), "--figure", str(picture)]
    done = CliRunner().invoke(app, options, catch_exceptions=False, env={"COLUMNS": "150"})
    assert done.exit_code == 0
    assert "optax_global" in done.stdout
    ((where, rows),) = files.read_json(tmp_path / "all.json")
    made_with = {"device", "cores", "load", "jax", "optax", "optaxclip", "torch", "C", "commit", "date"}
    assert made_with | {"command", "rounds", "left out"} <= set(where)
    cases = {(row.suite, row.dtype, row.case) for row in rows if row.method == "global"}
    assert cases == {
        *(("step", dtype, case) for dtype in ("float32", "mixed") for case in suites.CASES),
        *(("alone", "float32", case) for case in suites.CASES),
        *(("compile", "float32", case) for case in ("trace", "compile", "total")),
        *((suite, "float32", case) for suite in suites.COUNTED for case in ("step", "alone")),
        *((suite, "mixed", "step") for suite in suites.COUNTED),
        *(("ablations", "float32", case) for case in suites.ABLATED),
        ("train", "float32", "whole"),
    }
    timed = [row for row in rows if row.suite not in suites.COUNTED and not row.case.startswith("memory")]
    assert all((row.ratio is None) == (row.against is None) for row in timed)
    beside = {(row.suite, row.against) for row in rows if row.method == "global"}
    assert {("step", "none"), ("step", "optax_global"), ("alone", "identity"), ("train", "none")} <= beside
    text = page.read_text()
    assert text.startswith(f"Before\n<!-- results: {device} -->")
    assert text.endswith(f"<!-- end of results: {device} -->\nAfter\n")
    assert "| tiny | mixed | clips | none, " in text
    assert "old" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def made(device, command, ratio, cases):
    """A run that measured global clipping in some cases of a step."""
    head = "step", "tiny", "float32"
    spread = timing.Spread(ratio, ratio, ratio, ratio)
    rows = []
    for case in cases:
        rows.append(results.Row(*head, case, "none", None, 1.0, None, 3, None, None))
        rows.append(results.Row(*head, case, "global", None, ratio, None, 3, None, None))
        rows.append(results.Row(*head, case, "global", "none", ratio, spread, 3, None, None))
    return files.Run({"device": device, "command": command}, rows)


def test_runs_at_different_times_are_put_together_for_each_device(tmp_path):
    """A page has a block for each device; a case is of one run, the last, and its line says of which."""
    runs = {
        "old": made("cpu: a", "old", 1.25, ["clips", "idle"]),
        "new": made("cpu: a", "new", 1.5, ["idle"]),
        "other": made("gpu: b", "other", 1.75, ["clips"]),
    }
    for name, run in runs.items():
        files.write_json(tmp_path / name, [run])
        assert files.read_json(tmp_path / name) == [run]
    page, everything = tmp_path / "page.md", tmp_path / "all.json"
    page.write_text("Before\n\n<!-- results: cpu: a -->\ngone\n<!-- end of results: cpu: a -->\nAfter\n")
    chosen = ",".join(str(tmp_path / name) for name in runs)
    options = ["--merge", chosen, "--markdown", str(page), "--json", str(everything)]
    for _ in range(2):  # the second time nothing changes
        done = CliRunner().invoke(app, options, catch_exceptions=False)
        assert done.exit_code == 0
        text = page.read_text()
        assert [line for line in text.splitlines() if line and not line.startswith(("####", "| ---"))] == [
            "Before",
            "<!-- results: cpu: a -->",
            "### cpu: a",
            "Run 1: device: cpu: a; command: old.",
            "Run 2: device: cpu: a; command: new.",
            "| tree | dtype | case | run | over | global |",
            "| tiny | float32 | clips | 1 | none, 1 s | 1.25 (1.25–1.25) |",
            "| tiny | float32 | idle | 2 | none, 1 s | 1.50 (1.50–1.50) |",
            "<!-- end of results: cpu: a -->",
            "<!-- results: gpu: b -->",
            "### gpu: b",
            "device: gpu: b; command: other.",
            "| tree | dtype | case | over | global |",
            "| tiny | float32 | clips | none, 1 s | 1.75 (1.75–1.75) |",
            "<!-- end of results: gpu: b -->",
            "After",
        ]
    assert [run.environment["command"] for run in files.read_json(everything)] == ["old", "new", "other"]
    for options, error in (
        (["--merge", str(tmp_path / "none")], "there is no file"),
        (
            ["--merge", chosen, "--figure", str(tmp_path / "a.png")],
            "a figure is of one device, not of cpu: a",
        ),
    ):
        done = CliRunner().invoke(app, options, env={"COLUMNS": "400", "NO_COLOR": "1"})
        assert done.exit_code == 2
        assert error in done.output


def test_a_run_says_which_commit_and_command_it_is_of(monkeypatch):
    """Of a copy that is no repository an environment variable tells the commit."""
    monkeypatch.setattr(environment.sys, "orig_argv", ["/some/python", "-m", "benchmarks", "--trees", "a b"])
    command = environment.describe()["command"]
    assert command == "python -m benchmarks --trees 'a b'"
    assert shlex.split(str(command))[-1] == "a b"
    monkeypatch.setattr(environment, "_git", lambda *words: "")
    monkeypatch.delenv("COMMIT", raising=False)
    assert environment.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc")
    assert environment.commit() == "abc"
    monkeypatch.setattr(environment, "_git", lambda *words: {"rev-parse": "def", "status": " M a"}[words[0]])
    assert environment.commit() == "def, changed"


def test_waiting_threads_spin_as_long_as_one_says(monkeypatch):
    """A short time, unless the variable is set already."""
    for given, wanted in ((None, "1000"), ("7", "7")):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        if given is not None:
            monkeypatch.setenv("GOMP_SPINCOUNT", given)
        environment.shorten_spins()
        assert environment.os.environ["GOMP_SPINCOUNT"] == wanted


def test_elsewhere_than_on_the_cpu_the_limit_is_a_copy(monkeypatch):
    """Both the clip and the step are held against an array of as many bytes; so are ours, in GB/s."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(c_loop, "Loop", None)
    monkeypatch.setitem(trees.ALL, "wide", WIDE)
    plan = suites.Plan(
        ("alone", "step"), methods.selected(["global"]), rounds=2, compile_rounds=1, seconds=0.0
    )
    rows = suites.run(WIDE, "bfloat16", plan)
    beside = {(row.suite, row.against) for row in rows if row.method == "global"}
    assert {("alone", "copy"), ("step", "copy"), ("step", "none")} <= beside
    assert not any(row.method == "c_loop" for row in rows)
    shown = {(suite, part.baseline) for suite in ("alone", "step") for part in report.sections(suite, rows)}
    assert shown == {("alone", "copy"), ("step", "none"), ("step", "copy")}
    text = report.markdown([files.Run({"device": "gpu"}, rows)])
    assert text.count(" GB/s |") == 4
    assert references.versions()["C"] == "on the CPU only"
    one = programs.copied("step", WIDE, "mixed").args[0]
    grads, params = 2 * WIDE.entries, 4 * WIDE.entries
    assert 2 * one.size * one.dtype.itemsize == 2 * grads + 6 * params
    assert programs.moved_bytes("alone", WIDE, "bfloat16") == 3 * grads


def test_an_asynchronous_operation_counts_once():
    """Its start, and not what it is waited for by."""
    text = """HloModule one

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %s = (f32[4]{0}, f32[4]{0}, u32[]) copy-start(f32[4]{0} %x)
  %d = f32[4]{0} copy-done((f32[4]{0}, f32[4]{0}, u32[]) %s)
  ROOT %n = f32[4]{0} negate(f32[4]{0} %d)
}
"""
    assert hlo.launches(hlo.parse(types.SimpleNamespace(as_text=lambda: text))) == 2


class Clip(NamedTuple):
    """What the compiled clip has in its text, and how many kernels outside of loops read a gradient."""

    conditionals: int
    loops: int
    shifts: int
    reads: int
    memory: float


@functools.cache
def clip(name, dtype):
    jax.clear_caches()
    every = methods.ALL | variants.ALL
    compiled = programs.alone(every[name], SMALL_MLP, dtype).compiled()
    jax.clear_caches()  # or the library would be traced as it was patched
    text, module = compiled.as_text(), hlo.parse(compiled)
    counts = (text.count(f" {opcode}(") for opcode in ("conditional", "while", "shift-right-logical"))
    reads = hlo.reads(module, hlo.arguments(module, "grads")[0])["entry"]
    memory = programs.temporary_bytes(compiled) / SMALL_MLP.nbytes(dtype)
    return Clip(*counts, len(reads), memory)


# How the compiled clip, without something, differs from the library's.
LEFT_OUT = {
    "global_no_barrier": ("bfloat16", lambda whole, part: part.memory > whole.memory + 1),
    "global_no_conditional": ("float32", lambda whole, part: whole.conditionals > part.conditionals == 0),
    "global_no_loop": ("float32", lambda whole, part: whole.loops > part.loops == 0),
    "global_scaled_reads": ("float32", lambda whole, part: (whole.reads, part.reads) == (2, 1)),
    "global_converted": ("bfloat16", lambda whole, part: whole.shifts > part.shifts == 0),
    "unitwise_no_conditional": ("float32", lambda whole, part: whole.conditionals > part.conditionals == 0),
}


@pytest.mark.skipif(OLD_JAX, reason="older compilers write more to memory")
@pytest.mark.parametrize("name", LEFT_OUT)
def test_ablations_leave_out_what_they_say(name):
    """Else the numbers would be of something else."""
    dtype, differs = LEFT_OUT[name]
    whole, part = clip(variants.ALL[name].against[0], dtype), clip(name, dtype)
    assert differs(whole, part), (whole, part)


def test_ablations_clip_like_the_library():
    """They differ in how, not in what: for ordinary gradients the numbers are the same."""
    jax.clear_caches()
    grads = trees.normal(SMALL_MLP, "float32", seed=0)
    plain = methods.ALL["global"].build(SMALL_MLP)
    wanted, _ = jax.jit(plain.update)(grads, plain.init(grads))
    for name, method in variants.ALL.items():
        if name.startswith("global"):
            jax.clear_caches()
            tx = method.build(SMALL_MLP)
            found, _ = jax.jit(tx.update)(grads, tx.init(grads))
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)
    jax.clear_caches()


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
@pytest.mark.parametrize("name", ["foreach", "loop", "leafwise"])
def test_pytorch_clips_jaxs_arrays(gradients, name):
    """PyTorch writes into the arrays that it is given, by one norm or by each leaf's."""
    grads, before = gradients
    own, each = pytorch.Gradients(grads, threads=2), name == "leafwise"
    # The limit is rounded to the gradients' dtype before use.
    own.clip_each(2.0) if each else own.clip(2.0, foreach=name == "foreach")
    norms = jax.tree.map(lambda x: np.sqrt(np.sum(x**2)), before)
    if not each:
        norms = jax.tree.map(lambda x: np.sqrt(sum(n**2 for n in jax.tree.leaves(norms))), norms)
    rounded = 2 * float(jnp.finfo(grads["dense"]["bias"].dtype).eps)
    assert_scaled(grads, before, jax.tree.map(lambda n: min(2 / n, 1.0), norms), slack=rounded)


@pytest.mark.skipif(pytorch.unavailable() is not None, reason="no PyTorch")
def test_pytorch_takes_steps_of_adamw_like_optaxs():
    """What a step in PyTorch is measured by is the same optimizer, in the same precision."""
    grads = trees.normal(TINY, "float32", seed=0)
    own = pytorch.Gradients(jax.tree.map(jnp.copy, grads), threads=2)
    training = pytorch.Training(own)
    params = jax.tree.unflatten(jax.tree.structure(grads), [jnp.array(x.detach()) for x in own.params])
    training.measure(lambda: None, 2)
    state = programs.ADAMW.init(params)
    for _ in range(2):
        updates, state = programs.ADAMW.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for ours, theirs in zip(jax.tree.leaves(params), own.params, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(pytorch.unavailable() is not None, reason="no PyTorch")
@pytest.mark.parametrize("package", pytorch.PACKAGES.values())
def test_packages_for_pytorch_clip_at_every_call_or_never(package):
    """Their own classes see gradients that keep their size, above the limit or far below."""
    if pytorch.unavailable(package) is not None:
        pytest.skip(f"no {package}")
    for grows in (True, False):
        grads = trees.normal(TINY, "float32", seed=0, size=1.0 if grows else 2.0**-24)
        before = jax.tree.map(np.array, grads)
        own = pytorch.Gradients(grads, threads=2)
        packaged = pytorch.Packaged(package, own, grows)
        known = float(sum((p.grad**2).sum() for p in own.params)) ** 0.5
        assert packaged.measure(3) > 0
        norm = float(sum((p.grad**2).sum() for p in own.params)) ** 0.5
        assert norm == pytest.approx(known, rel=0.5)  # without clipping 64 times as large
        if package == "zclip" and not grows:  # the other one always multiplies
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), grads, before)


def test_targets_are_of_rows_that_are_measured():
    """Every target names methods, trees, dtypes and suites that there are."""
    for target in targets.ALL:
        assert target.suite in suites.SUITES
        assert set(target.trees or ()) <= set(trees.ALL)
        assert set(target.dtypes or ()) <= set(trees.GRADS)
        known = methods.ALL.keys() | {*references.NAMES, "none"}
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
