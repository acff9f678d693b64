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
    found = CliRunner().invoke(example.app, [*options, f"--output={folder}"], env={"COLUMNS": "120"})
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
    none = rows.pop("none")
    assert 1 < none["first_nonfinite_step"] < 50
    assert none["test_accuracy"] == 0
    assert none["final_loss"] is None
    for row in rows.values():
        assert row["first_nonfinite_step"] is None
        assert row["test_accuracy"] > 0.6
        assert row["final_loss"] < 1.5
