"""The examples run, and show what they say they show."""

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner

import optaxclip as oc
from optaxclip._cli import app as cli

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {"depth": 8, "width": 32, "gain": 2.0, "learning-rate": 0.05, "steps": 200}
POLICIES = ["none", "value", "global", "layerwise", "leafwise", "agc", "advised"]
TENSOR = {"scale": 100.0, "learning-rate": 0.02, "steps": 200, "seeds": 2}


@pytest.fixture(scope="module")
def load():
    """Imports an example, under the promotion rules that a user has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield importlib.import_module


@pytest.fixture(scope="module")
def example(load):
    """The main example's module."""
    return load("exploding_mlp")


@pytest.fixture(scope="module")
def tensor(load):
    """The module of the example with one exploding tensor."""
    return load("exploding_tensor")


def called(module, setting, folder):
    """What a small but real setting prints."""
    options = [f"--{name}={value}" for name, value in setting.items()]
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than training here
    found = CliRunner().invoke(module.app, [*options, f"--output={folder}"], env={"COLUMNS": "120"})
    jax.config.update("jax_disable_most_optimizations", False)
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture(scope="module")
def run(example, tmp_path_factory):
    """What the main example prints, and the folder it writes to."""
    folder = tmp_path_factory.mktemp("examples") / "new" / "folder"
    return called(example, SMALL, folder), folder


@pytest.fixture(scope="module")
def tensor_run(tensor, tmp_path_factory):
    """What the example with one exploding tensor prints, and the folder it writes to."""
    folder = tmp_path_factory.mktemp("examples") / "tensor"
    return called(tensor, TENSOR, folder), folder


@pytest.fixture(scope="module")
def rows(run):
    """The numbers of the table, by policy."""
    numbers = json.loads((run[1] / "exploding_mlp.json").read_text(encoding="utf-8"))
    assert numbers["setting"] == {"limit": 1.0, "seed": 0} | {
        name.replace("-", "_"): value for name, value in SMALL.items()
    }
    return numbers["policies"]


def first_cells(output):
    """The first cell of each row of the table above the setting."""
    table = output[output.index("┃") : output.index("Setting:")]
    return [line.split("│")[1].split()[0] for line in table.splitlines() if line.startswith("│")]


def test_the_table_has_all_policies_and_the_setting(run):
    """Each policy has a row, and what was trained is printed below."""
    output, _ = run
    assert first_cells(output) == POLICIES
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


def test_the_advice_is_of_the_run_without_clipping(run, rows):
    """The recording holds what came before the first step that is not finite, and leads to the advice."""
    output, folder = run
    advice = json.loads((folder / "exploding_mlp.json").read_text(encoding="utf-8"))["advice"]
    recording = oc.History.load(folder / "exploding_mlp.npz")
    assert len(recording) == SMALL["steps"]
    assert recording.first_nonfinite().step == rows["none"]["first_nonfinite_step"] - 1
    assert recording.advise(learning_rate=SMALL["learning-rate"]).code == advice["code"]
    assert advice["policy"] in ("global", "layerwise")  # all layers explode: none is to be clipped alone
    assert f"count from 0: {advice['policy']} ──" in output
    assert f"\n{advice['code']}\n" in output
    said = " ".join(output.split())
    assert all(reason in said for reason in (advice["reasons"][0][:60], advice["reasons"][-1][:60]))


@pytest.mark.parametrize("name", ["exploding_mlp", "exploding_tensor"])
def test_the_commands_that_are_printed_work(run, tensor_run, name):
    """What is proposed at the end shows, plots and advises on the recording that was written."""
    output, folder = run if name == "exploding_mlp" else tensor_run
    lines = output.split("Written:")[1].splitlines()
    assert all(Path(path.strip()).is_file() for path in lines[0].split(","))
    commands = [shlex.split(line.split("optaxclip ", 1)[1]) for line in lines if line.startswith("  ")]
    assert [command[0] for command in commands] == ["show", "plot", "advise"]
    for command in commands:
        found = CliRunner().invoke(cli, command, env={"COLUMNS": "80"})
        assert found.exit_code == 0, found.output
    assert (folder / f"{name}_norms.html").read_text(encoding="utf-8").startswith("<!")


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
    assert "5 of 6 clipping policies" in said
    assert "(global, layerwise, leafwise, agc, advised)" in said
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


def test_one_tensor_is_found_and_clipped_alone(tensor_run):
    """The recording of the run without clipping leads to the embeddings by itself."""
    output, folder = tensor_run
    recording = oc.History.load(folder / "exploding_tensor.npz")
    advice = recording.advise(learning_rate=TENSOR["learning-rate"])
    assert advice.policy == "outliers"
    assert f"\n{advice.code}\n" in output
    limit = recording.replay(advice.transformation()).limit
    assert limit.shape[1] == 1
    assert "'embedding': '^embedding/table$'" in advice.code
    assert (folder / "exploding_tensor.png").read_bytes().startswith(b"\x89PNG")


def test_the_advice_beats_what_holds_back_all_tensors(tensor_run):
    """The others keep their gradients, which global and layerwise clipping cut, and the loss is lowest."""
    output, _ = tensor_run
    assert first_cells(output) == ["none", "global", "layerwise", "advised"]
    table = output[output.index("┃") : output.index("Setting:")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]
    loss = {row[0]: float(row[2]) for row in cells}
    others = {row[0]: float(row[5].rstrip("%")) for row in cells}
    assert min(loss, key=loss.__getitem__) == "advised"
    assert max(loss, key=loss.__getitem__) == "none"
    assert others["none"] == others["advised"] == 100
    assert max(others["global"], others["layerwise"]) < 50
    assert f"ends at a loss of {loss['advised']:.3f}" in " ".join(output.split())


def test_the_words_follow_the_advice(tensor):
    """Without an exploding tensor none is spoken of."""
    rows = {name: tensor.Result("", (2.0, 2.2), 1.0, 1.0) for name in ("none", "global", "advised")}
    quiet = oc.History(["a/kernel"], [[1.0]] * 10).advise()
    said = tensor.conclusion(rows, quiet)
    assert said.startswith("The advice is 'undecided': to clip no tensor alone.")
    assert "2.100" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale=0"], "'--scale': 0.0 is not a positive, finite number"),
        (["--learning-rate=nan"], "'--learning-rate': nan is not a positive, finite number"),
        (["--seeds=0"], "'--seeds'"),
    ],
)
def test_a_bad_option_of_the_second_example_is_named(tensor, options, message):
    """As in the first example."""
    found = CliRunner().invoke(tensor.app, options, env={"COLUMNS": "400"})
    assert found.exit_code == 2
    assert f"Invalid value for {message}" in found.output
