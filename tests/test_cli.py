"""The command line: what it prints, for people and for programs, and how it fails."""

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import optaxclip as oc
from optaxclip._cli import _policies, app

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ["embed/table", "layer/kernel", "layer/bias", "head/kernel"]


@pytest.fixture(scope="module")
def history():
    """Three hundred updates of which some spike as a whole, and one is not finite in one group."""
    norms = np.exp(0.2 * np.random.default_rng(0).standard_normal((300, 4)))
    norms[[50, 120, 250]] *= 100
    norms[200, 1] = np.nan
    return oc.History(NAMES, norms, loss=np.linspace(3, 1, 300))


@pytest.fixture(scope="module")
def files(history, tmp_path_factory):
    """The recording as a saved file, as CSV and as JSON lines, the logs with names that say nothing."""
    folder = tmp_path_factory.mktemp("files")
    history.save(folder / "run.npz")
    rows = zip(history.loss, history.norms, strict=True)
    lines = [
        {"it": k, "cost": loss, **dict(zip(NAMES, norms, strict=True))}
        for k, (loss, norms) in enumerate(rows)
    ]
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(*arguments, code=0, **env):
    """What a command prints."""
    found = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "160", "NO_COLOR": "1"} | env)
    assert found.exit_code == code, found.output
    return found


def parsed(*arguments):
    """What a command prints as JSON, which has no word for what is not finite."""

    def refuse(word):
        raise AssertionError(word)

    return json.loads(run(*arguments, "--json").stdout, parse_constant=refuse)


LOG = ["--columns", ",".join(NAMES), "--step", "it", "--loss", "cost"]
KINDS = {"run.npz": [], "log.csv": LOG, "log.jsonl": LOG}


@pytest.mark.parametrize("name", KINDS)
def test_all_kinds_of_files_hold_the_same(files, history, name):
    """A saved recording, CSV and JSON lines are told apart by what is in them."""
    unnamed = files / f"{name}.copy"
    unnamed.write_bytes((files / name).read_bytes())
    for file in (files / name, unnamed):
        found = parsed("show", file, *KINDS[name])
        assert found["updates"] == 300
        assert found["steps"] == [0, 299]
        assert [group["name"] for group in found["groups"]] == NAMES
        assert found["whole"]["largest"] == pytest.approx(np.nanmax(history.whole))
        assert found["whole"]["nonfinite"] == 1
        assert found["groups"][0]["entries"] is None
        assert found["first_nonfinite"]["step"] == 200
        assert found["first_nonfinite"]["names"] == ["layer/kernel"]


def test_columns_are_found_by_a_pattern_or_by_names(files):
    """A pattern's group is the name; the step and the loss are found by their usual names."""
    path = files / "other.csv"
    path.write_text("step,loss,g/a,g/b,lr\n0,2,1,2,9\n1,1,3,4,9\n")
    found = parsed("show", path, "--columns", "g/(.+)")
    assert [group["name"] for group in found["groups"]] == ["a", "b"]
    found = parsed("show", path, "--columns", "g/a", "--columns", "g/b")
    assert [group["largest"] for group in found["groups"]] == [3, 4]
    assert found["norm"] == "l2"
    assert parsed("show", path, "--columns", "g/(.+)", "--norm", "l1")["whole"]["largest"] == 7


def test_groups_are_put_together(files):
    """By layer, or by the first keys."""
    for groups in ("layer", "depth:1"):
        found = parsed("show", files / "run.npz", "--groups", groups)
        assert sorted(group["name"] for group in found["groups"]) == ["embed", "head", "layer"]


@pytest.mark.parametrize("width", [30, 60, 80, 160])
def test_the_table_fits_the_terminal(files, width):
    """Columns are left out before numbers are cut."""
    text = run("show", files / "run.npz", COLUMNS=str(width)).stdout
    assert all(len(line) <= max(width, 40) for line in text.splitlines())
    assert "largest" in text
    assert "…" not in text or width == 30  # there only names are cut
    assert ("90 %" in text) == (width >= 80)
    assert "not finite: first at update 200, in" in " ".join(text.split())


def test_nothing_is_cut_in_a_pipe(files):
    """Without a terminal and its width."""
    command = [sys.executable, "-m", "optaxclip", "compare", files / "run.npz", "-p", "global:1"]
    env = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=env)
    assert "rows apart by" in found.stdout
    assert found.stderr == ""


def test_advice_is_printed_and_as_json(files, history):
    """The same as `History.advise` gives; the code is in one line even where that is narrow."""
    advice = history.advise(budget=0.1, optimizer="adam")
    options = ["--budget", "0.1", "--optimizer", "adam"]
    found = parsed("advise", files / "run.npz", *options)
    assert found["policy"] == advice.policy
    assert found["code"] == advice.code
    assert found["reasons"] == list(advice.reasons)
    assert found["limit"] == advice.limit
    assert found["interval"] == (None if advice.interval is None else list(advice.interval))
    assert len(found["comparison"]) == len(advice.comparison.rows)
    for width in ("40", "200"):
        text = run("advise", files / "run.npz", *options, COLUMNS=width).stdout
        assert advice.code in text
        assert " ".join(advice.reasons[0].split()) in " ".join(text.split())
        assert "spikes cut by" in text


def test_policies_are_compared(files, history):
    """As `History.compare` does; below each other where there is no room for a table."""
    forms = ["none", "global:1.0", "mine=layerwise:0.5", "zclip", "oc.adagc(slack=1.1)"]
    arguments = [x for form in forms for x in ("-p", form)]
    found = parsed("compare", files / "run.npz", *arguments)
    made = {"none": np.inf, "global:1.0": oc.clip_by_global_norm(1.0), "mine": oc.clip_by_layerwise_norm(0.5)}
    made |= {"zclip": oc.zclip(), "oc.adagc(slack=1.1)": oc.adagc(slack=1.1)}
    expected = history.compare(made)
    assert [row["name"] for row in found["policies"]] == list(made)
    for got, want in zip(found["policies"], expected.rows, strict=True):
        assert got == {k: None if v != v else v for k, v in want._asdict().items()}
    assert found["steps"] == 300
    assert found["ordinary"] == expected.ordinary
    wide = run("compare", files / "run.npz", *arguments, COLUMNS="200").stdout
    narrow = run("compare", files / "run.npz", *arguments, COLUMNS="50").stdout
    assert max(map(len, narrow.splitlines())) <= 50 < max(map(len, wide.splitlines()))
    for cell in expected.cells()[2][1:]:
        assert cell in narrow
        assert cell in wide


def test_without_policies_those_of_the_advice_are_compared(files, history):
    """They need no thought."""
    found = parsed("compare", files / "run.npz")
    assert [row["name"] for row in found["policies"]] == [
        row.name for row in history.advise().comparison.rows
    ]


CALM = np.exp(0.5 * np.random.default_rng(2).standard_normal((300, 1)))
UNWEIGHED = {
    "short": (CALM[:20], "The recording has 20 steps, 20 with a norm that is finite"),
    "clipped": (np.minimum(CALM, 1), "these updates have been clipped or normalised already"),
    "ended": ([*CALM[:20], [np.inf]], "run.npz' has too few ordinary steps to choose policies by."),
}


@pytest.mark.parametrize("kind", UNWEIGHED)
def test_without_policies_it_is_said_why_none_can_be_chosen(tmp_path, kind):
    """For the reason that the advice has; policies of one's own are compared all the same."""
    norms, why = UNWEIGHED[kind]
    oc.History(["w"], norms).save(tmp_path / "run.npz")
    said = run("compare", tmp_path / "run.npz", code=1).stderr
    assert said.startswith("optaxclip: '")
    assert said.count("\n") == 1
    assert said.partition(why)[2].endswith(" Name some: -p global:1.0.\n")
    run("compare", tmp_path / "run.npz", "-p", "global:1")


def test_a_recording_without_groups_is_looked_at_like_any_other(tmp_path):
    """As of a tree of integers, of which nothing is measured."""
    tx, tree = oc.record(capacity=2), {"ids": np.arange(3)}
    path = tmp_path / "run.npz"
    oc.History.from_state(tx.update(tree, tx.init(tree))[1], tree).save(path)
    assert parsed("show", path)["groups"] == []
    assert "The recording has no groups" in run("advise", path).stdout
    assert "The recording has no groups" in run("compare", path, code=1).stderr
    assert len(parsed("compare", path, "-p", "leafwise:1")["policies"]) == 1
    for name in ("x.png", "x.html"):
        run("plot", path, "-o", tmp_path / name)


@pytest.mark.parametrize("name", ["norms.png", "norms.svg", "norms.html"])
def test_the_figure_is_written(files, tmp_path, name):
    """In the format of its name; a page has the advice too."""
    path = tmp_path / name
    advice = ["--advice" if name.endswith("html") else "--no-advice"]
    found = parsed("plot", files / "run.npz", "-o", path, "--limit", 3, *advice)
    assert found == {"written": str(path)}
    start = path.read_bytes()[:100]
    assert {"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!doctype html>"}[name.split(".")[1]] in start
    if name.endswith("html"):
        with_limit = path.read_text()
        assert "Advice: " in with_limit
        run("plot", files / "run.npz", "-o", path)
        assert path.read_text() != with_limit
        run("plot", files / "run.npz", "-o", path, "--no-advice")
        assert "Advice: " not in path.read_text()


ONE = np.exp(np.random.default_rng(1).standard_normal((20, 3)))
FORMS = {
    "none": (float("inf"), None),
    "global:0.5": (0.5, oc.groups.whole()),
    "layerwise:0.5": (0.5, oc.groups.layer()),
    "leafwise:0.5": (0.5, oc.groups.leaf()),
    "depth:1:0.5": (0.5, oc.groups.depth(1)),
    "regex:a/(?:w|v):0.5": (0.5, oc.groups.regex({"x": "a/(?:w|v)", None: ".*"})),
    r"regex:^(a)/\w$:0.5": (0.5, oc.groups.regex({"x": "^a/", None: ".*"})),
    r"tight = regex:(\w)/\1|b\b:0.5": (0.5, oc.groups.regex({"x": "b", None: ".*"})),
    "tight = regex:b:0.5": (0.5, oc.groups.regex({"x": "b", None: ".*"})),
    "autoclip:20": (oc.autoclip(20.0), None),
    "zclip:2": (oc.zclip(z=2.0), None),
    "adagc:1.1": (oc.adagc(1.1), None),
    "oc.rescale_by_norm(oc.limits.ema(2.0), groups=oc.groups.leaf())": (oc.limits.ema(2.0), oc.groups.leaf()),
    "oc.clip_by_groupwise_norm(0.5, oc.groups.regex({'x': 'b', None: '.*'}))": (
        0.5,
        oc.groups.regex({"x": "b", None: ".*"}),
    ),
    "optaxclip.clip_by_groupwise_norm(max_norm=0.5, groups=oc.groups.layer())": (0.5, oc.groups.layer()),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_stand_for_policies(form):
    """Each replays as what it stands for."""
    history = oc.History(["a/w", "a/v", "b/w"], ONE)
    limit, groups = FORMS[form]
    _, made = _policies.policy(form)
    expected = history.replay(limit, groups) if groups is not None else history.replay(limit)
    np.testing.assert_array_equal(history.replay(made).norm_after, expected.norm_after)


@pytest.mark.parametrize(
    "form",
    [
        *("", "nonsense", "global", "global:", "global:x", "global:-1", "global:nan", "none:1", "regex:(:1"),
        *(
            "depth:-1:1",
            "depth:a:1",
            "zclip:1:2",
            "mine=",
            "oc.clip_by_global_norm()",
            "oc.clip_by_global_norm(-1)",
        ),
        *("oc.groups.leaf()", "oc.History.load('x')", "oc.History('a', 1)", "oc._policies.policy('none')"),
        *("__import__('os').system('true')", "oc.clip_by_global_norm.__globals__['x']()", "open('x')(1)"),
        *(
            "(lambda: 1)()",
            "[x for x in (1,)](0)",
            "oc.clip_by_global_norm(**{'max_norm': 1})",
            "oc.zclip(" * 9,
        ),
        *("oc.record().update(1)", "oc.limits.np.zeros(3)", "oc.clip_by_global_norm(x := 1)", "(" * 5000),
    ],
)
def test_what_is_no_policy_is_refused(form):
    """With the forms that are, and without being run."""
    with pytest.raises(ValueError, match=r"Pass none, global:LIMIT, ") as error:
        _policies.policy(form)
    assert len(str(error.value)) < 6000


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("global", "global needs a limit: global:1.0. Pass none"),
        ("leafwise:", "leafwise needs a limit: leafwise:1.0. Pass none"),
        ("depth:1", "depth needs a number of keys and a limit: depth:1:0.5. Pass none"),
        ("regex:embed", "regex needs a pattern and a limit: regex:embed:0.1. Pass none"),
        ("none:1", "none takes none. Pass none"),
        ("zclip:1:2", "could not convert string to float: '1:2'. Pass none"),
        ("autoclip:0.9", "percentiles are of 100: 90 rather than 0.9. Pass none"),
        ("regex:[:0.1", "Mend it. Pass none"),
    ],
)
def test_what_is_wrong_with_a_policy_is_said(form, why):
    """And what it should look like, in one sentence."""
    with pytest.raises(ValueError, match=rf"{re.escape(why)}, global:LIMIT, "):
        _policies.policy(form)


def test_names_in_a_log_may_be_of_layers(tmp_path):
    """What `metrics` logged by layer is advised on and replayed by layer, never by leaf."""
    path, names = tmp_path / "layers.jsonl", ["blocks/0", "blocks/1", "head", "(root)"]
    norms = np.exp(0.2 * np.random.default_rng(0).standard_normal((300, 4)))
    for k in range(4):
        norms[20 + 13 * k :: 80, k] *= 100
    lines = [{f"clip/norm_before/{n}": x for n, x in zip(names, row, strict=True)} for row in norms]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    taken_for_leaves, found = parsed("advise", path), parsed("advise", path, "--rows", "layer")
    assert taken_for_leaves["policy"] == "leafwise"
    assert found["policy"] == "layerwise"
    assert found["code"].startswith("oc.clip_by_layerwise_norm(oc.limits.per_group({'blocks/0': ")
    assert not any("leaf" in row["name"] for row in found["comparison"])
    rows = parsed("compare", path, "--rows", "layer", "-p", "layerwise:0.1", "-p", "global:0.1")["policies"]
    assert rows[0]["spread"] > 1
    groups = parsed("show", path, "--rows", "layer", "--groups", "layer")["groups"]
    assert sorted(group["name"] for group in groups) == sorted(names)
    why = run("compare", path, "--rows", "layer", "-p", "leafwise:0.1", code=1).stderr
    assert "a layer whose leaves were not logged" in why


def test_advice_without_a_comparison_says_why(tmp_path):
    """After its reasons, as `str` of it does."""
    oc.History(["w"], UNWEIGHED["ended"][0]).save(tmp_path / "run.npz")
    said = run("advise", tmp_path / "run.npz").stdout
    assert said.endswith("\n\nNo comparison: only 20 steps are ordinary.\n")


def damaged(folder, files):
    """Files that hold no norms."""
    saved = (files / "run.npz").read_bytes()
    return {
        "missing.npz": None,
        "cut.npz": saved[: len(saved) // 2],
        "foreign.npz": b"PK\x03\x04 and no more",
        "empty.csv": b"",
        "binary.csv": bytes(range(256)),
        "words.csv": b"step,name\n0,a\n1,b\n",
        "ragged.jsonl": b'{"step": 0, "grad_norm/a": 1}\n{"step": 1, ',
        "nested.jsonl": b'{"a": ' * 2000,
        "list.json": b"[1, 2]",
    }


def test_bad_files_get_one_line(files, tmp_path):
    """On stderr, with the file's name, and never a traceback; the exit code is 1."""
    for name, content in damaged(tmp_path, files).items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for command in (["show"], ["advise"], ["compare", "-p", "none"], ["plot", "-o", tmp_path / "x.png"]):
            found = run(*command, tmp_path / name, code=1)
            assert found.stdout == ""
            assert found.stderr.startswith("optaxclip: ")
            assert found.stderr.count("\n") == 1
            assert name in found.stderr
            assert "unexpected" not in found.stderr


def test_a_log_may_begin_as_a_zip_does(files):
    """The letters PK are the name of a column."""
    path = files / "pk.csv"
    path.write_text("PK,step,grad_norm/a\n1,0,3\n1,1,4\n")
    assert parsed("show", path)["whole"]["largest"] == 4


@pytest.mark.parametrize("option", ["--columns", "--step", "--loss"])
def test_an_unknown_column_is_named_among_the_known(files, option):
    """In one line."""
    found = run("show", files / "log.csv", *LOG, option, "nonsense", code=1)
    assert found.stderr.count("\n") == 1
    assert "'nonsense'" in found.stderr
    assert "'it'" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "--groups", "depth:x"], "'depth:x' is none of leaf, layer, depth:K"),
        (["show", "--step", "it"], "--step: a saved recording has its own"),
        (["show", "--most", "0"], "--most"),
        (["compare", "-p", "nonsense:1"], "there is no policy 'nonsense'"),
        (["plot", "-o", "x.nonsense"], "'x.nonsense' ends in none of"),
        (["plot"], "--output"),
        (["advise", "--optimizer", "lion"], "--optimizer"),
        (["advise", "--budget", "0.9"], "--budget"),
        (["advise", "--lr", "0"], "0.0 is not above 0."),
        (["advise", "--learning-rate", "nan"], "nan is not above 0."),
        (["compare", "--rows", "layer", "-p", "none"], "--rows: a saved recording has its own"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_usage_is_told_from_a_bad_file(files, arguments, message):
    """The exit code is 2."""
    command, *rest = arguments
    found = run(command, files / "run.npz", *rest, code=2)
    assert message in " ".join(found.stderr.replace("│", " ").split())
    assert "Traceback" not in found.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "-p", "regex:nonsense:1"],  # no group
        ["compare", "-p", "oc.adaptive_grad_clip(0.1)"],  # no norms of parameters
        ["compare", "-p", "oc.clip_by_value(0.1)"],  # no norms at all
        ["plot", "-o", "/nowhere/x.png"],
    ],
)
def test_what_a_recording_cannot_give_is_one_line(files, arguments):
    """The exit code is 1."""
    command, *rest = arguments
    found = run(command, files / "run.npz", *rest, code=1)
    assert found.stderr.startswith("optaxclip: ")
    assert found.stderr.count("\n") == 1
    assert "unexpected" not in found.stderr


def test_names_from_a_log_cannot_command_the_terminal(files):
    """No escapes, no markup."""
    path = files / "evil.csv"
    path.write_text('step,"\x1b[31m[bold]red[/bold]",b\n0,1,2\n1,2,3\n')
    text = run("show", path, TERM="xterm").stdout
    assert "\x1b" not in text
    assert "?[31m[bold]red[/bold]" in text


def test_help_teaches():
    """As a program of its own: what files there are, examples, and exit codes."""
    env = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "optaxclip", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=env)
    for said in ("optaxclip advise run.npz", "log.csv --columns", "Exit codes", "compare", "plot", "show"):
        assert said in found.stdout
    assert "\x1b" not in found.stdout
    for command in ("show", "plot", "compare", "advise"):
        said = " ".join(run(command, "--help").stdout.replace("│", " ").split())
        assert f"optaxclip {command} " in said
        assert "A name in a log is taken for a leaf unless this says layer." in said
    assert "zclip[:Z] (with its cap of 1)" in " ".join(run("compare", "--help").stdout.split())
    assert run("--version").stdout.strip() == oc.__version__


def test_a_missing_package_is_named(monkeypatch, capsys):
    """In one line, with what to install, and exit code 2."""
    main = importlib.import_module("optaxclip.__main__").main
    for module in ("_cli", "_cli._app", "_cli._terminal"):
        monkeypatch.delitem(sys.modules, f"optaxclip.{module}", raising=False)
    monkeypatch.delattr(oc, "_cli", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 2
    assert capsys.readouterr().err == "optaxclip: there is no typer. pip install typer\n"


@pytest.mark.parametrize("name", ["x.png", "x.html"])
def test_a_plot_without_matplotlib_says_what_to_install(files, tmp_path, monkeypatch, name):
    """In one line, with the exit code of a missing package."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = run("plot", files / "run.npz", "-o", tmp_path / name, code=2)
    said = "optaxclip: History.plot: there is no matplotlib. Install it: pip install matplotlib.\n"
    assert found.stderr == said
    assert found.stderr.count("\n") == 1


def test_policies_have_names_of_their_own(files):
    """Of two with the same, one would be missing from the table."""
    found = run("compare", files / "run.npz", "-p", "a=global:1", "-p", "a=layerwise:1", code=2)
    assert "'a' is the name of several. Put NAME= before one." in " ".join(
        found.output.replace("│", "").split()
    )


def test_each_policy_is_in_the_json_once(files):
    found = parsed("compare", files / "run.npz", "-p", "global:1")
    assert "rows" not in found
    assert len(found["policies"]) == 1


def test_a_picture_of_advice_says_what_was_assumed(files, tmp_path):
    """The limit in it depends on the optimizer, and a picture has no room for reasons."""
    assumed = "The advised limit: Taken: SGD, with a learning rate that is not known"
    assert assumed in run("plot", files / "run.npz", "-o", tmp_path / "a.png").stdout
    for more in (["--optimizer", "adam"], ["--no-advice"]):
        assert "Taken" not in run("plot", files / "run.npz", "-o", tmp_path / "b.png", *more).stdout
    assert "Taken" not in run("plot", files / "run.npz", "-o", tmp_path / "c.html").stdout


@pytest.fixture
def examples(monkeypatch):
    """The modules of the folder, under the promotion rules that a user has."""
    monkeypatch.syspath_prepend(EXAMPLES)
    jax = pytest.importorskip("jax")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield importlib.import_module


def test_metrics_are_logged_as_json_lines_and_read_back(examples, tmp_path):
    """The example's log has a line for each step, and a bad batch every fifty steps."""
    path = tmp_path / "log.jsonl"
    examples("log_jsonl").main(path, steps=120)
    found = parsed("show", path)
    assert found["updates"] == 120
    assert [group["name"] for group in found["groups"]] == ["hidden/bias", "hidden/kernel", "output/kernel"]
    assert found["whole"]["largest_step"] in (49, 99)
    assert "loss: " in run("show", path).stdout
    assert run("advise", path).stdout


def test_metrics_are_logged_to_tensorboard(examples, tmp_path):
    """The example writes a file of events with all curves."""
    pytest.importorskip("tensorboardX")
    examples("log_tensorboard").main(tmp_path, steps=3)
    (events,) = tmp_path.glob("*/events.out.tfevents.*")
    for key in (b"clip/norm_before/hidden/kernel", b"clip/factor/whole", b"loss"):
        assert events.read_bytes().count(key) == 3
