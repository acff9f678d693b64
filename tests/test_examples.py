"""The examples run, and show what they say they show."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {"depth": 8, "width": 32, "gain": 2.0, "learning-rate": 0.05, "steps": 200}
POLICIES = ["none", "value", "global", "layerwise", "leafwise", "agc"]


@pytest.fixture(scope="module")
def example():
    """The module, under the promotion rules that a user has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield importlib.import_module("exploding_mlp")


@pytest.fixture(scope="module")
def run(example, tmp_path_factory):
    """What a small but real setting prints, and the folder it writes to."""
    folder = tmp_path_factory.mktemp("examples") / "new" / "folder"
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than training here
    found = CliRunner().invoke(example.app, [*options, f"--output={folder}"], env={"COLUMNS": "120"})
    jax.config.update("jax_disable_most_optimizations", False)
    assert found.exit_code == 0, found.output
    return found.output, folder


@pytest.fixture(scope="module")
def rows(run):
    """The numbers of the table, by policy."""
    numbers = json.loads((run[1] / "exploding_mlp.json").read_text(encoding="utf-8"))
    assert numbers["setting"] == {"limit": 1.0, "seed": 0} | {
        name.replace("-", "_"): value for name, value in SMALL.items()
    }
    return numbers["policies"]


def test_the_table_has_all_policies_and_the_setting(run):
    """Each policy has a row, and what was trained is printed below."""
    output, _ = run
    table = output[output.index("┃") : output.index("Setting:")]
    assert [line.split("│")[1].split()[0] for line in table.splitlines() if line.startswith("│")] == POLICIES
    assert "8 layers of width 32, ReLU, gain 2; SGD with learning rate 0.05" in " ".join(output.split())


def test_no_clipping_dies_and_clipping_trains(rows):
    """The same network that is soon NaN without clipping reads most digits under every other policy."""
    none = rows["none"]
    assert 1 < none["first_nonfinite_step"] < 50
    assert none["test_accuracy"] == 0
    assert none["final_loss"] is None
    for row in (rows[name] for name in POLICIES[1:]):
        assert row["first_nonfinite_step"] is None
        assert row["test_accuracy"] > 0.6
        assert row["final_loss"] < 1.5


def test_the_rows_tell_the_policies_apart(rows):
    """Global clipping keeps the direction, finer clipping bends it; what is clipped is counted."""
    assert rows["global"]["mean_cosine"] == pytest.approx(1, abs=1e-5)
    for finer in ("value", "layerwise", "leafwise", "agc"):
        assert 0.2 < rows[finer]["mean_cosine"] < 0.999
    for name in POLICIES[1:]:
        assert 0.1 < rows[name]["clipped_share"] <= 1
    assert rows["none"]["clipped_share"] == 0


def test_the_picture_is_a_png(run):
    """The figure is written into the folder, which is made."""
    picture = (run[1] / "exploding_mlp.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000


def test_the_conclusion_follows_the_numbers(run, rows, example):
    """What is said below the table comes from the table."""
    best = max(POLICIES[1:], key=lambda name: rows[name]["test_accuracy"])
    died = rows["none"]["first_nonfinite_step"]
    results = {name: example.Result(**row | {"test_accuracy": 0.95}) for name, row in rows.items()}
    dead = {name: row._replace(test_accuracy=0.0) for name, row in results.items()}
    assert f"no longer finite at step {died};" in " ".join(run[0].split())
    assert "does not need it" in example.conclusion(results)
    assert "no clipping policy gets past 90%" in example.conclusion(dead)
    said = example.conclusion(results | {"none": dead["none"], "value": dead["value"]})
    assert "4 of 5 clipping policies" in said
    assert "(global, layerwise, leafwise, agc)" in said
    raised = {best: results[best]._replace(test_accuracy=0.99)}
    assert f"Best with this seed: {best}, 99.0%" in example.conclusion(dead | raised)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depth=1"], "'--depth'"),
        (["--gain=nan"], "'--gain': nan is not a positive, finite number"),
        (["--learning-rate=-0.1"], "'--learning-rate': -0.1 is not a positive, finite number"),
        (["--limit=inf"], "'--limit': inf is not a positive, finite number"),
        (["--steps=many"], "'--steps'"),
        ([f"--output={__file__}"], "'--output'"),
    ],
)
def test_a_bad_option_is_named(example, options, message):
    """A bad value ends with one sentence that names the option, before anything is trained."""
    found = CliRunner().invoke(example.app, options, env={"COLUMNS": "400"})
    assert found.exit_code == 2
    assert f"Invalid value for {message}" in found.output


def test_it_runs_as_a_script():
    """Without installation of the example, and with an error in place of a traceback."""
    command = [sys.executable, EXAMPLES / "exploding_mlp.py", "--gain=-1"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 2
    assert "'--gain': -1.0 is not a positive, finite number" in found.stderr
    assert "Traceback" not in found.stderr
