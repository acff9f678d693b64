"""Outputs in the gallery are what the examples print, as far as that can be told without training."""

import importlib
import importlib.util
import io
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import typer
from rich.console import Console

import optaxclip as oc
from optaxclip._cli import app as cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- (\w+) -->\n\n```text\n(.*?)```\n\n<!-- end of \1 -->", PAGE, re.S))
WRITTEN = {"exploding_mlp": ("png", "json", "npz"), "exploding_tensor": ("png", "npz")}
COMMANDS = [
    line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()
]
PROPOSED = [
    line for block in BLOCKS.values() for line in block.splitlines() if line.startswith("  optaxclip ")
]


@pytest.fixture(scope="module")
def load():
    """Imports an example, under the promotion rules that a user has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield importlib.import_module


@pytest.fixture(scope="module")
def figures():
    """`docs/figures.py`, which writes the outputs."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(name, rows=slice(None)):
    """The cells of the tables in a block, row by row."""
    lines = [line for line in BLOCKS[name].splitlines() if line.startswith("│")][rows]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def number(cell):
    return float(cell.removesuffix("%")) / (100 if cell.endswith("%") else 1)


def printed(*shown):
    """What the console of `docs/figures.py` makes of it."""
    console = Console(file=io.StringIO(), width=100)
    console.print(*shown, sep="\n", highlight=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_every_output_has_its_place(figures):
    """Those that the script writes, and no others."""
    assert set(BLOCKS) == {*figures.PRINTING, *figures.DRAWING}
    assert set(re.findall(r"<!-- end of (\w+) -->", PAGE)) == set(BLOCKS)


def test_the_table_of_exploding_gradients_is_that_of_its_numbers(load):
    """Title, heads, the limits of the policies, the setting, and what is concluded."""
    module = load("exploding_mlp")
    results = {
        name: module.Result(
            limit=limit,
            test_accuracy=number(accuracy),
            final_loss=number(loss),
            first_nonfinite_step=None if died == "never" else int(died),
            clipped_share=number(share),
            mean_cosine=number(cosine),
        )
        for name, limit, accuracy, loss, died, share, cosine in cells("exploding_mlp")
    }
    setting = module.Setting()
    policies = module.policies(setting, module.initial(setting, 64))
    assert [(name, row.limit) for name, row in results.items() if name != "advised"] == [
        (name, policy.limit) for name, policy in policies.items()
    ]
    said = f"Setting: {setting}.", module.conclusion(results)
    assert printed(module.table(results), *said) in BLOCKS["exploding_mlp"]


def test_the_tables_of_one_exploding_tensor_are_those_of_its_numbers(load):
    """As of the other; the second has the tensors, by name."""
    module, setting = load("exploding_tensor"), load("exploding_tensor").Setting()
    params = module.initial(setting.scale, 0)
    policies = module.policies(setting, len(params))
    results = {}
    for name, limit, loss, spread, embedding, others in cells("exploding_tensor", slice(len(policies) + 1)):
        mean, half = number(loss), number(spread.removeprefix("±"))
        results[name] = module.Result(limit, (mean - half, mean + half), number(embedding), number(others))
    assert [(name, row.limit) for name, row in results.items() if name != "advised"] == [
        (name, policy.limit) for name, policy in policies.items()
    ]
    advice = SimpleNamespace(policy=re.search(r"count from 0: (\w+)", BLOCKS["exploding_tensor"])[1])
    said = printed(module.table(results), f"Setting: {setting}.", module.conclusion(results, advice))
    version = r"Python 3\.\d+'s library"  # of which text the example is made
    shown = " ".join(re.sub(version, "Python", BLOCKS["exploding_tensor"]).split())
    assert " ".join(re.sub(version, "Python", said).split()) in shown
    names = tuple(oc.group_norms(params))
    assert tuple(row[0] for row in cells("exploding_tensor", slice(len(results), None))) == names
    ones = np.ones((1, len(names)))
    lengths = module.lengths(oc.History(names, ones, start=ones[0]), 1.0)
    assert lengths.title in shown
    for column in lengths.columns:
        assert all(part in shown for part in str(column.header).split("\n"))


def test_the_table_of_per_example_clipping_is_that_of_its_numbers(load):
    """With the notes below it."""
    module, setting, results = load("private_sgd"), load("private_sgd").Setting(), {}
    for name, limits, clipped, plain, noisy in cells("private_sgd"):
        by_group = (limit.rpartition(" ") for limit in limits.replace("–", "inf").split(", "))
        limits = {group or "whole": float(c) for group, _, c in by_group}
        runs = [module.Run(limits, number(clipped), number(x.replace("–", "0"))) for x in (plain, noisy)]
        results[name] = runs
    assert list(results) == list(module.policies(setting))
    assert (
        printed(module.table(results, setting), f"Setting: {setting}.", *module.NOTES)
        in BLOCKS["private_sgd"]
    )


def test_the_live_tables_are_those_of_their_numbers(load):
    """Layers that the network has, the largest norm first."""
    module, shown = load("live_table"), BLOCKS["live_table"]
    steps = [(int(k), float(loss)) for k, loss in re.findall(r"^step (\d+), loss (\S+)", shown, re.M)]
    assert [k for k, _ in steps] == [100, 200, 300]
    rows = cells("live_table")
    assert {name for name, *_ in rows} <= set(module.initial())
    each = len(rows) // len(steps)
    for i, (k, loss) in enumerate(steps):
        logs = {}
        for name, norm, after, share in rows[i * each : (i + 1) * each]:
            logs[f"clip/norm_before/{name}"] = float(norm)
            logs[f"clip/norm_after/{name}"] = float(after)
            logs[f"clip/clipped_fraction/{name}"] = number(share.removesuffix(" of steps"))
        assert printed(module.table(k, loss, logs)) in shown


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_proposed_is_what_the_example_prints(load, monkeypatch, name):
    """The files that it writes, and the commands, at its own learning rate."""
    monkeypatch.setattr("shutil.which", lambda program: program)
    paths = [Path("out", f"{name}.{kind}") for kind in WRITTEN[name]]
    console = Console(file=io.StringIO(), width=100)
    load("terminal").written(paths, load(name).Setting().learning_rate, console)
    assert BLOCKS[name].endswith(console.file.getvalue())


@pytest.mark.parametrize("name", WRITTEN)
def test_what_was_advised_is_a_transformation(name):
    """The one line of code among the output."""
    (code,) = re.findall(r"^oc\..*$", BLOCKS[name], re.M)
    assert isinstance(eval(code, {"oc": oc}), optax.GradientTransformation)


def parsed(app, words):
    """Raises if the command line does not take the words; runs nothing."""
    command = typer.main.get_command(app)
    if hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("command", words)


def test_commands_are_taken(figures):
    """In blocks of the page and in outputs: scripts are there, options are known, and figures have names."""
    parts = [part for line in COMMANDS + PROPOSED for part in line.split("#")[0].split("&&")]
    kinds = set()
    for words in map(shlex.split, parts):
        program, *words = words
        kinds.add((program, words[0] if words[0] == "-m" else words[0].partition("/")[0]))
        if program == "optaxclip":
            parsed(cli, words)
        elif words[0] == "-m":
            parsed(importlib.import_module(words[1]).app, words[2:])
        elif program == "python":
            assert (ROOT / words[0]).is_file()
            assert words[0] != "docs/figures.py" or set(words[1:]) <= set(figures.TASKS)
    assert kinds >= {("python", "examples"), ("python", "docs"), ("python", "-m"), ("optaxclip", "show")}
