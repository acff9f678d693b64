"""The example of per-example clipping with noise runs, and shows what it says it shows."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {"width": 16, "batch": 32, "steps": 250, "noise-multiplier": 1.0}
POLICIES = [
    "none",
    "flat",
    "per layer, uniform",
    "per layer, by size",
    "adaptive",
    "adaptive per layer",
]


@pytest.fixture(scope="module")
def example():
    """The module, under the promotion rules that a user has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield importlib.import_module("private_sgd")


@pytest.fixture(scope="module")
def output(example):
    """What a small but real setting prints."""
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than training here
    found = CliRunner().invoke(example.app, options, env={"COLUMNS": "140"})
    jax.config.update("jax_disable_most_optimizations", False)
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture(scope="module")
def rows(output):
    """The cells of the table, by policy."""
    lines = [line.strip("│").split("│") for line in output.splitlines() if line.startswith("│")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def share(cell):
    return float(cell.removesuffix("%")) / 100


def test_every_policy_has_a_row_and_learns_to_read(rows):
    """Without noise all policies read most digits, and with this little noise too."""
    assert list(rows) == POLICIES
    for name, (_, _, plain, noisy) in rows.items():
        assert share(plain) > 0.8
        assert noisy == "–" if name == "none" else share(noisy) > 0.75


def test_the_table_tells_the_limits_apart(rows):
    """Fixed limits are those of the equation; adaptive ones leave about half of the examples."""
    limits = {name: cells[0] for name, cells in rows.items()}
    assert limits["none"] == "–"
    assert limits["flat"] == "1"
    assert limits["per layer, uniform"] == "hidden 0.71, output 0.71"
    hidden, head = 64 * 16 + 16, 16 * 10 + 10
    by_size = [f"{np.sqrt(n / (hidden + head)):.2g}" for n in (hidden, head)]
    assert limits["per layer, by size"] == f"hidden {by_size[0]}, output {by_size[1]}"
    assert limits["adaptive"] != "1"
    clipped = {name: share(cells[1]) for name, cells in rows.items()}
    assert clipped["none"] == 0
    assert clipped["flat"] > 0.2
    for name in ("adaptive", "adaptive per layer"):
        assert clipped[name] == pytest.approx(0.5, abs=0.06)


def test_no_privacy_is_claimed(output, example):
    """What is printed, the help and the module all say so."""
    said = " ".join(output.split())
    assert "No privacy is claimed: nothing accounts for what is spent" in said
    assert "would need noise too" in said
    assert "64 – 16 – 10 units, tanh" in said
    assert "NOT private" in example.__doc__
    help_ = CliRunner().invoke(example.app, ["--help"], env={"COLUMNS": "140"}).output
    assert "This is not private training" in help_


def test_the_noise_has_the_standard_deviation_that_it_says(example):
    """The difference of two updates with and without noise is Gaussian, of σ ‖limits‖ / B in every entry."""
    setting = example.Setting(width=200, batch=8, steps=1, learning_rate=1.0, noise_multiplier=3.0)
    data = example.load(0)
    params = example.initial(setting, 64)
    clip = example.policies(setting)["per layer, by size"].clip
    train = example.trainer(setting, clip, data)
    batches = jnp.arange(8, dtype=jnp.int32)[None]
    (plain, limits, _), (noisy, _, _) = (train(params, batches, jnp.float32(x)) for x in (0.0, 3.0))
    np.testing.assert_allclose(np.linalg.norm(limits), setting.limit, rtol=1e-6)
    noise = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64).ravel(), plain, noisy)
    for leaf in (noise["hidden"]["kernel"], noise["output"]["kernel"]):
        scale = 3.0 * setting.limit / 8
        assert leaf.std() == pytest.approx(scale, rel=4 / np.sqrt(2 * leaf.size))
        assert abs(leaf.mean()) < 4 * scale / np.sqrt(leaf.size)


def test_without_a_multiplier_there_is_no_noise_even_without_a_limit(example):
    assert float(example.noise_scale(jnp.float32(0), jnp.float32([np.inf]), 8)) == 0
    assert float(example.noise_scale(jnp.float32(2), jnp.float32([3.0, 4.0]), 5)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width=0"], "'--width'"),
        (["--batch=0"], "'--batch'"),
        (["--steps=many"], "'--steps'"),
        (["--limit=inf"], "'--limit': inf is not a positive, finite number"),
        (["--learning-rate=-0.1"], "'--learning-rate': -0.1 is not a positive, finite number"),
        (["--noise-multiplier=nan"], "'--noise-multiplier': nan is not a positive, finite number"),
        (["--rate=0"], "'--rate': 0.0 is not a positive, finite number"),
        (["--target=1.5"], "'--target': 1.5 is not from 0 to 1"),
        (["--seed=-1"], "'--seed'"),
    ],
)
def test_a_bad_option_is_named(example, options, message):
    """A bad value ends with one sentence that names the option, before anything is trained."""
    found = CliRunner().invoke(example.app, options, env={"COLUMNS": "400"})
    assert found.exit_code == 2
    assert re.search(re.escape(f"Invalid value for {message}"), found.output)


def test_it_runs_as_a_script():
    """Without installation of the example, and with an error in place of a traceback."""
    command = [sys.executable, EXAMPLES / "private_sgd.py", "--limit=-1"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 2
    assert "'--limit': -1.0 is not a positive, finite number" in found.stderr
    assert "Traceback" not in found.stderr
