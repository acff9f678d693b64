"""The benchmark of the advice, with a policy given in its place: what it trains, keeps and reports."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from typer.testing import CliRunner

import optaxclip as oc
from benchmarks import advice, advice_grid, advice_report, advice_tasks
from benchmarks.advice_grid import Cell
from benchmarks.advice_report import Outcome, Taken

TINY = advice_tasks.calm(steps=20)
SETTING = advice.QUICK._replace(seeds=2)


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    """Optax's schedules mix dtypes: no strict promotion in this file."""


def fixed(task) -> Any:
    """An advice of a global norm of 1, whatever the task."""
    del task
    given = SimpleNamespace(
        policy="global",
        limit=1.0,
        code="oc.clip_by_global_norm(1.0)",
        reasons=("It was asked for.",),
        transformation=lambda: oc.clip_by_global_norm(1.0),
    )
    return lambda params, batches: given


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The cache of `outcome`."""
    return tmp_path_factory.mktemp("advice") / "grid.json"


@pytest.fixture(scope="module")
def outcome(path):
    """A tiny task with its grid, and `fixed`."""
    return advice.compare(TINY, SETTING, advice_grid.Cache(path), fixed, lambda: None)


def test_an_advice_that_is_in_the_grid_ends_as_its_cell(outcome):
    """Both start from the same weights, see the same batches and are judged alike."""
    (cell,) = [cell for cell in outcome.cells if str(cell) == "global 1"]
    np.testing.assert_allclose([taken.final for taken in outcome.taken], cell.finals, rtol=1e-4)
    assert len(outcome.cells) == 10
    assert outcome.best.median < np.median(outcome.start)


def test_the_grid_equals_training_one_by_one(outcome):
    """Batching over limits and seeds, and limits that are traced, change nothing but rounding."""
    (cell,) = [cell for cell in outcome.cells if str(cell) == "leafwise 0.1"]
    tx = optax.chain(oc.clip_by_leafwise_norm(oc.limits.budget(0.1)), TINY.update_rule())
    params, _, losses = advice_grid.train(TINY, tx, TINY.init(1), TINY.batches(1))
    assert losses.shape == (20,)
    np.testing.assert_allclose(TINY.evaluate(params), cell.finals[1], rtol=1e-4)


def test_a_grid_that_is_known_is_not_trained_again(outcome, path, monkeypatch):
    """A cache in a file gives the same cells, and a task that changed does not find its own."""
    monkeypatch.setattr(advice_grid, "finals", lambda *args: pytest.fail("trained again"))

    def cells(task):
        return advice.compare(task, SETTING, advice_grid.Cache(path), None, lambda: None).cells

    assert cells(TINY) == outcome.cells
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        cells(TINY._replace(learning_rate=0.04))


def judged(final, finals):
    """An outcome of one seed that starts at a loss of 2, with these losses in the grid."""
    cells = [Cell("none", None, [finals[0]]), *(Cell("global", 1.0, [loss]) for loss in finals[1:])]
    taken = Taken(0, "global", 1.0, "oc.clip_by_global_norm(1.0)", [], final)
    return Outcome(TINY, [2.0], cells, [taken], 0.0)


@pytest.mark.parametrize(
    ("final", "finals", "verdict"),
    [
        (1.019, [1.5, 1.0], "reached"),
        (0.9, [1.5, 1.0], "reached"),
        (1.03, [1.5, 1.0], "missed"),
        (np.inf, [1.5, 1.0], "diverged"),
        (2.1, [1.5, 1.0], "diverged"),
        (2.1, [np.inf, 2.08], "reached"),
    ],
)
def test_an_advice_is_judged_by_the_best_of_the_grid(final, finals, verdict):
    """Two per cent are allowed; ending worse than at the start is a divergence if some policy does not."""
    assert judged(final, finals).verdict == verdict


def test_reports_have_every_loss_and_every_advice(outcome, tmp_path):
    """JSON has all of it, with null for a loss that is not finite; the page and the figure have each task."""
    page, data = tmp_path / "choosing.md", tmp_path / "all.json"
    page.write_text("Before\n<!-- results -->\nold\n<!-- end of results -->\nAfter\n")
    outcomes = [outcome, judged(np.inf, [np.inf, 1.0])]
    advice_report.write_markdown(page, outcomes, "some", {"jax": "0"})
    advice_report.write_json(data, outcomes, "some", {"jax": "0"})
    text = page.read_text()
    assert text.startswith("Before\n<!-- results -->")
    assert "old" not in text
    assert "| `calm` | sgd |" in text
    assert "diverged in 1." in text
    first, second = json.loads(data.read_text())["tasks"]
    assert first["advice"][1]["code"] == "oc.clip_by_global_norm(1.0)"
    assert first["advice"][1]["reasons"] == ["It was asked for."]
    assert len(first["grid"]) == 10
    assert second["advice"][0]["final"] is None
    picture = tmp_path / "advice.png"
    advice_report.figure(outcomes).savefig(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_the_grid_of_each_task(outcome, path):
    """Without advice; a grid that is known is read from the cache, if that is of these settings."""
    options = ["--tasks", "calm", "--quick", "--steps", "20", "--grid-only", "--grid-cache", str(path)]
    done = CliRunner().invoke(advice.app, options, catch_exceptions=False, env={"COLUMNS": "150"})
    assert done.exit_code == 0
    cell = next(cell for cell in outcome.cells if str(cell) == "layerwise 10")
    assert f"{cell.finals[0]:.3f}" in done.stdout
    assert "within" in done.stdout


def test_an_unknown_task_is_an_error_that_lists_the_known():
    done = CliRunner().invoke(advice.app, ["--tasks", "clam"], env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert "'clam' is none of deep, recurrent" in done.output


@pytest.mark.parametrize("name", advice_tasks.TASKS)
def test_tasks_come_from_their_seeds(name):
    """Parameters and batches are the same for the same seed and others for another; the loss is finite."""
    task = advice_tasks.TASKS[name](steps=8)
    params, batches = task.init(3), task.batches(3)
    same = jax.tree.map(np.array_equal, (params, batches), (task.init(3), task.batches(3)))
    assert jax.tree.all(same)
    assert not jax.tree.all(jax.tree.map(np.array_equal, params, task.init(4)))
    assert not jax.tree.all(jax.tree.map(np.array_equal, batches, task.batches(4)))
    assert {len(leaf) for leaf in jax.tree.leaves(batches)} == {8}
    assert np.isfinite(task.loss(params, jax.tree.map(lambda x: x[0], batches)))
    assert np.isfinite(task.evaluate(params))
