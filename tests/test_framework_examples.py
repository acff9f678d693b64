"""The short examples run: with each framework, and with a live table."""

import importlib
import io
import re
from pathlib import Path

import jax
import pytest
from rich.console import Console

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# What is trained, with what; and a group that its user would know by this name.
FRAMEWORKS = {
    "flax_nnx": ("flax", r"blocks/1: 2 leaves, 4,160 entries"),
    "flax_linen": ("flax", r"blocks/Dense_0: 2 leaves, 16,640 entries, 4 norms"),
    "equinox_mlp": ("equinox", r"layers/2/weight: 1 leaf, 640 entries, 10 norms"),
    "haiku_mlp": ("haiku", r"mlp/~/linear_2: 2 leaves, 650 entries"),
    "keras_mlp": ("keras", r"mlp/hidden_1: 2 leaves, 4,160 entries"),
}


def in_gallery(name):
    """The groups that the gallery shows of an example; those that it names as clipped are among them."""
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    groups, _, rest = page.split(f"<!-- {name} -->\n\n```text\n")[1].partition("```")[0].partition("loss: ")
    clipped = re.findall(r"^(.+?)(?:\[\d+\])?: clipped in", rest, re.M)
    assert len(clipped) == 3
    assert all(f"\n{group}: " in groups for group in clipped)
    return groups


@pytest.fixture(scope="module")
def load():
    """Imports an example, under the promotion rules that a user has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.setenv("KERAS_BACKEND", "jax")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield importlib.import_module


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_example_trains_and_says_which_layers_were_clipped(load, capsys, name):
    """The loss falls; groups have the names of the framework; the worst of them are last."""
    framework, group = FRAMEWORKS[name]
    pytest.importorskip(framework)
    load(name).main(steps=60)
    said = capsys.readouterr().out
    assert group in said
    assert said.partition("loss: ")[0] == in_gallery(name)
    first, last = map(float, re.search(r"loss: (\S+) at first, (\S+) in the end", said).groups())
    assert first > 2 > 1 > last
    shares = [int(share) for share in re.findall(r": clipped in (\d+)% of all steps", said)]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 30


@pytest.mark.parametrize(("terminal", "tables"), [(False, 1), (True, 4)], ids=["log", "terminal"])
def test_a_live_table_shows_the_worst_layers(load, terminal, tables):
    """Redrawn in place at a terminal, every ten steps; elsewhere printed, with no control codes."""
    file = io.StringIO()
    load("live_table").main(steps=40, console=Console(file=file, force_terminal=terminal, width=80))
    said = file.getvalue()
    assert len(set(re.findall(r"step \d+, loss", said))) == tables
    assert ("\x1b" in said) == terminal
    rows = re.findall(r"│ (layer_\d+) +│ (\S+) +│ (\S+) +│ \d+% of steps", said)[-5:]
    norms = [float(norm) for _, norm, _ in rows]
    assert len(set(rows)) == 5
    assert norms == sorted(norms, reverse=True)
    assert all(float(after) <= 0.5 for _, _, after in rows)


def test_a_layer_that_is_not_finite_is_worst_of_all(load):
    """A NaN stands above every number."""
    logs = {}
    for name, norm in (("a", 1.0), ("b", float("nan")), ("c", 9.0), ("whole", 9.0)):
        logs |= {
            f"clip/norm_before/{name}": norm,
            f"clip/norm_after/{name}": norm,
            f"clip/clipped_fraction/{name}": 0,
        }
    shown = load("live_table").table(3, 0.5, logs, worst=2)
    assert list(shown.columns[0].cells) == ["b", "c"]
