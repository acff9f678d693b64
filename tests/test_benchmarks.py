"""The benchmarks run, and what they can tell without a clock holds: temporary memory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import methods, programs, results, spikes, spikes_report, suites, timing, trees
from benchmarks.__main__ import app

PROMISED = {
    "mlp": (10, 1.0e6),
    "gpt2": (148, 124.4e6),
    "gpt2_stacked": (16, 124.4e6),
    "small_2000": (2000, 2.0e6),
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
    """A quick run prints its tables, and writes every field of every row as JSON and as Markdown."""
    monkeypatch.setitem(trees.ALL, "tiny", TINY)
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- results -->\nold\n<!-- end of results -->\nAfter\n")
    options = ["--trees", "tiny", "--methods", "global", "--quick"]
    files = ["--json", str(tmp_path / "all.json"), "--markdown", str(page)]
    done = CliRunner().invoke(app, options + files, catch_exceptions=False)
    assert done.exit_code == 0
    assert "optax_global" in done.stdout
    written = json.loads((tmp_path / "all.json").read_text())
    assert {
        "device",
        "cores",
        "load",
        "rounds",
        "left out",
        "python",
        "jax",
        "jaxlib",
        "optax",
        "optaxclip",
        "date",
    } <= set(written["environment"])
    rows = written["rows"]
    assert all(set(row) == set(results.Row._fields) for row in rows)
    cases = {(row["suite"], row["case"]) for row in rows}
    assert cases == {
        *(("step", case) for case in suites.CASES),
        *(("alone", case) for case in suites.CASES),
        *(("compile", case) for case in ("trace", "compile", "total")),
        *(("memory", case) for case in ("step", "alone")),
    }
    ours = [row for row in rows if row["method"] == "global"]
    assert len(ours) == len(cases)
    assert all(row["against"] == "optax_global" and row["reference"] >= 0 for row in ours)
    assert all(set(row["ratio"]) == set(timing.Spread._fields) for row in ours if row["suite"] != "memory")
    assert all(row["over_none"] for row in ours if row["suite"] == "step")
    text = page.read_text()
    assert text.startswith("Before\n<!-- results -->")
    assert text.endswith("<!-- end of results -->\nAfter\n")
    assert "| tiny | float32 | clips | global |" in text
    assert "old" not in text


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
    clipping = suites.Clipping(TINY, "float32", suites.CASES[case], method, None, compiled)
    before = jax.tree.map(jnp.copy, clipping.grads)
    assert clipping.measure(4) > 0
    assert int(clipping.state.step) == 4
    assert clipping.state.clipped.tolist() == ([4, 4] if case == "clips" else [0, 0])
    if case == "clips":
        assert jnp.allclose(clipping.state.norm, methods.LIMIT * suites.REGROWTH)
    else:
        assert jax.tree.all(jax.tree.map(jnp.array_equal, clipping.grads, before))


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
    assert temporary(program, name, dtype) <= temporary(program, "optax_global", dtype) + results.SLACK


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
