"""Norms that others logged: metrics dicts, CSV and JSON lines of any framework."""

import csv
import functools
import itertools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import optaxclip as oc

NUMBERS = st.floats(0, allow_nan=False) | st.just(np.nan)
READERS = {"csv": oc.History.from_csv, "jsonl": oc.History.from_jsonl}

# What Lightning's CSVLogger writes: training and validation in lines of their own, with the same step.
LIGHTNING = """\
epoch,grad_2.0_norm/fc.0.bias,grad_2.0_norm/fc.0.weight,grad_2.0_norm_total,lr-Adam,step,train_loss,val_loss
,,,,0.001,49,,
0,3.0,4.0,5.0,,49,0.5,
0,,,,,49,,0.9
0,6.0,nan,nan,,99,inf,
1,,,,,99,,0.7
"""
# A chart of W&B, downloaded: the run before the name, and the band around each curve.
CHART = """\
"Step","good-fog-3 - grad_norm/a.w","good-fog-3 - grad_norm/a.w__MIN","good-fog-3 - grad_norm/a.w__MAX",\
"good-fog-3 - grad_norm/b.w","good-fog-3 - grad_norm/b.w__MIN","good-fog-3 - grad_norm/b.w__MAX"
"0","3","3","3","4","4","4"
"10","6","6","6","8","8","8"
"""
# A run of W&B, exported with its API and pandas.
RUN = """\
,_runtime,_step,_timestamp,train/loss,gradient_norms/a.w,gradient_norms/b.w,lr
0,1.5,0,1700000000.1,2.5,3.0,4.0,0.1
1,2.5,1,1700000001.1,2.0,,,0.1
2,3.5,2,1700000002.1,1.5,6.0,8.0,0.1
"""
OLMO = """\
{"_step": 0, "grad/blocks.0.w.norm": 3.0, "grad/blocks.0.w.max": 1.0, "optim/total_grad_norm": 5.0}
{"_step": 1, "grad/blocks.0.w.norm": NaN, "grad/blocks.0.w.max": NaN, "optim/total_grad_norm": NaN}
"""
COMPOSER = '{"l2_norm/grad/fc.weight": 3.0, "l2_norm/grad/global": 3.0, "l2_norm/param/fc.weight": 9}\n'
TRAINER = """\
{"loss": 2.5, "grad_norm": 3.0, "learning_rate": 5e-05, "epoch": 0.1, "step": 10}
{"eval_loss": 2.4, "eval_runtime": 1.5, "eval_samples_per_second": 100.0, "epoch": 0.1, "step": 10}
{"loss": 2.3, "grad_norm": 4.0, "learning_rate": 4e-05, "epoch": 0.2, "step": 20}
{"train_runtime": 9.5, "train_loss": 2.4, "total_flos": 1e12, "epoch": 0.2, "step": 20}
"""


def written(tmp_path, text, name="log"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def of_csv(tmp_path, text, **options):
    return oc.History.from_csv(written(tmp_path, text), **options)


def of_jsonl(tmp_path, text, **options):
    return oc.History.from_jsonl(written(tmp_path, text), **options)


def holds(history, names, norms, steps, loss=None):
    assert history.names == tuple(names)
    np.testing.assert_array_equal(history.norms, norms)
    np.testing.assert_array_equal(history.steps, steps)
    assert (history.loss is None) == (loss is None)
    if loss is not None:
        np.testing.assert_array_equal(history.loss, loss)


def test_a_log_of_lightning(tmp_path):
    """Totals, rates and validation are no norms, and lines without norms are no steps."""
    history = of_csv(tmp_path, LIGHTNING)
    holds(history, ["fc/0/bias", "fc/0/weight"], [[3, 4], [6, np.nan]], [49, 99], [0.5, np.inf])
    assert history.regroup(oc.groups.layer()).names == ("fc/0",)


def test_a_chart_of_wandb(tmp_path):
    holds(of_csv(tmp_path, CHART), ["a/w", "b/w"], [[3, 4], [6, 8]], [0, 10])


def test_a_run_of_wandb(tmp_path):
    holds(of_csv(tmp_path, RUN), ["a/w", "b/w"], [[3, 4], [6, 8]], [0, 2], [2.5, 1.5])


def test_a_log_of_olmo(tmp_path):
    holds(of_jsonl(tmp_path, OLMO), ["blocks/0/w"], [[3], [np.nan]], [0, 1])


def test_a_log_of_composer(tmp_path):
    holds(of_jsonl(tmp_path, COMPOSER), ["fc/weight"], [[3]], [0])


def test_a_log_of_the_trainer_of_transformers(tmp_path):
    """Where there is nothing but the total, that is taken."""
    holds(of_jsonl(tmp_path, TRAINER), ["grad_norm"], [[3], [4]], [10, 20], [2.5, 2.3])


def test_plain_columns(tmp_path):
    """Every column of numbers, but those that loggers write beside norms; text is none."""
    log = "step,epoch,lr,loss,val_acc,time,note,fc.weight,fc.bias,grad_norm,x_total\n"
    log += "0,0,0.1,2,0.5,1.5,start,3,4,5,5\n2,0,0.1,1,0.6,2.5,,6,8,10,10\n"
    holds(of_csv(tmp_path, log), ["fc/weight", "fc/bias"], [[3, 4], [6, 8]], [0, 2], [2, 1])


BESIDE = {  # what loggers write beside the only norm, and its name and numbers
    "transformers in W&B": (
        "train/global_step,run - train/grad_norm\n10,3\n20,4\n",
        "train/grad_norm",
        [10, 20],
    ),
    "an export of W&B": (
        "_step,train/loss,train/grad_norm,train/global_step,train/entropy\n1,2,3,10,0.5\n2,2,4,20,0.4\n",
        "train/grad_norm",
        [1, 2],
    ),
    "Lightning in W&B": (
        "_step,trainer/global_step,grad_2.0_norm_total\n1,10,3\n2,20,4\n",
        "grad_2/0_norm_total",
        [1, 2],
    ),
    "TensorBoard": ("Wall time,Step,Value\n1654943296.2,0,3.0\n1654943297.2,5,4.0\n", "Value", [0, 5]),
    "W&B, relative time": ("Relative Time (Process),r - grad_norm\n0.5,3\n1.5,4\n", "r - grad_norm", [0, 1]),
    "other figures": ("step,loss,grad_norm,entropy,kl\n1,2,3,0.5,7\n2,2,4,0.4,8\n", "grad_norm", [1, 2]),
}


@pytest.mark.parametrize("log", BESIDE)
def test_the_only_norm_is_told_from_steps_clocks_and_figures(tmp_path, log):
    """A step or a clock taken for a norm would be most of it, and advice about nothing."""
    text, name, steps = BESIDE[log]
    found = of_csv(tmp_path, text)
    assert [row.split(" - ")[-1] for row in found.names] == [name.split(" - ")[-1]]
    np.testing.assert_array_equal(found.norms, [[3], [4]])
    np.testing.assert_array_equal(found.steps, steps)


@functools.cache
def logged():
    """What a loop collects of a run of two steps."""
    grads = {"a": {"w.x": jnp.array([3.0, 4.0])}, "b": {"w": jnp.array([6.0, 8.0])}}
    tx = optax.chain(oc.clip_by_leafwise_norm(1.0), optax.sgd(0.1))
    update = jax.jit(tx.update)
    state, found = tx.init(grads), []
    for scale in (1.0, 2.0):
        _, state = update({k: {n: x * scale for n, x in v.items()} for k, v in grads.items()}, state)
        found.append(
            {**oc.metrics(state, grads, oc.groups.leaf()), "loss": jnp.float32(scale), "at": 10 * scale}
        )
    return found


def test_a_list_of_metrics():
    """The whole is left out, since it is made of the others; dots in names stay."""
    found = logged()
    history = oc.History.from_metrics(found)
    holds(history, ["a/w.x", "b/w"], [[5, 10], [10, 20]], [0, 1])
    np.testing.assert_allclose(history.whole, [row["clip/norm_before/whole"] for row in found], rtol=1e-6)
    history = oc.History.from_metrics(iter(found), statistic="norm_after", loss="loss", step="at")
    np.testing.assert_allclose(history.norms, np.ones((2, 2)), rtol=1e-6)
    holds(history, history.names, history.norms, [10, 20], [1, 2])


def test_metrics_in_files_read_as_they_do_in_lists(tmp_path):
    """The same names and norms, by way of JSON lines and of CSV."""
    found = [{k: float(v) for k, v in row.items()} for row in logged()]
    expected = oc.History.from_metrics(found, loss="loss")
    lines = "".join(json.dumps(row) + "\n" for row in found)
    with open(tmp_path / "log.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(found[0]))
        table.writeheader()
        table.writerows(found)
    for history in (of_jsonl(tmp_path, lines), oc.History.from_csv(tmp_path / "log.csv")):
        holds(history, expected.names, expected.norms, expected.steps, expected.loss)


def test_metrics_of_the_whole_alone():
    """They are a recording of one group; prefixes and separators are those of `metrics`."""
    history = oc.History.from_metrics([{"t|norm_before|whole": 2.0}], prefix="t", separator="|")
    holds(history, ["whole"], [[2]], [0])


def test_metrics_of_layers_stay_layers():
    """A name is a group's, whatever it has below it."""
    rows = [{"clip/norm_before/block_0": 3.0, "clip/norm_before/block_1": np.float32(4)}]
    history = oc.History.from_metrics(rows)
    holds(history, ["block_0", "block_1"], [[3, 4]], [0])
    assert history.regroup(oc.groups.leaf()).names == ("block_0", "block_1")


ONE = {"clip/norm_before/a": 1.0}
WRONG_METRICS = {
    "none": ([], {}, ValueError, "no key starts with 'clip/norm_before/' among no dicts"),
    "other": (
        [{"loss": 1.0}],
        {},
        ValueError,
        "no key starts with 'clip/norm_before/' among 'loss'. Pass prefix=",
    ),
    "type": ([ONE, None], {}, TypeError, "entry 1 is of type NoneType. Pass dicts of oc.metrics"),
    "missing": (
        [ONE, {}],
        {},
        ValueError,
        "entry 1 lacks 'clip/norm_before/a', entry 0 has 'clip/norm_before/a'",
    ),
    "null": ([ONE, {"clip/norm_before/a": None}], {}, ValueError, "entry 1 lacks 'clip/norm_before/a'"),
    "more": (
        [ONE, {**ONE, "clip/norm_before/b": 1.0}],
        {},
        ValueError,
        "entry 1 has 'clip/norm_before/b', entry 0",
    ),
    "loss": ([ONE], {"loss": "loss"}, ValueError, "entry 0 lacks 'loss'"),
    "step": ([ONE, ONE], {"step": "clip/norm_before/a"}, ValueError, "steps must be whole numbers"),
    "text": ([{"clip/norm_before/a": "much"}], {}, TypeError, "norms is no array of numbers"),
    "vector": ([{"clip/norm_before/a": np.ones(2)}], {}, ValueError, r"norms has shape \(1, 1, 2\)"),
}


@pytest.mark.parametrize("kind", WRONG_METRICS)
def test_wrong_metrics_are_one_clear_error(kind):
    rows, options, error, match = WRONG_METRICS[kind]
    with pytest.raises(error, match=match):
        oc.History.from_metrics(rows, **options)


def test_columns_may_be_a_regular_expression(tmp_path):
    """Its one group is the name; the norms of other things are left alone."""
    log = "n,g[a.w],g[b.w],p[a.w]\n0,3,4,9\n1,6,8,9\n"
    history = of_csv(tmp_path, log, columns=r"^g\[(.+)\]$", step="n")
    holds(history, ["a/w", "b/w"], [[3, 4], [6, 8]], [0, 1])


def test_columns_may_be_a_list(tmp_path):
    """In the order that is asked for, also those that would not have been guessed."""
    history = of_csv(tmp_path, LIGHTNING, columns=["grad_2.0_norm/fc.0.weight", "grad_2.0_norm/fc.0.bias"])
    holds(history, ["fc/0/weight", "fc/0/bias"], [[4, 3], [np.nan, 6]], [49, 99], [0.5, np.inf])
    assert of_csv(tmp_path, "a,epoch\n1,2\n", columns=["epoch"]).names == ("epoch",)


def test_names_with_slashes_keep_their_dots(tmp_path):
    """They are paths already."""
    holds(of_csv(tmp_path, "a/w.x,b.y\n3,4\n"), ["a/w.x", "b.y"], [[3, 4]], [0])


def test_lines_of_a_step_complete_one_another(tmp_path):
    """As loggers write them that write each value by itself; the last loss counts."""
    log = '{"step":1,"grad_norm/a":3}\n{"step":1,"loss":9}\n{"step":1,"loss":8}\n{"step":1,"grad_norm/b":4}\n'
    log += '{"step":2,"loss":7}\n{"step":3,"grad_norm/b":8,"grad_norm/a":6}\n'
    holds(of_jsonl(tmp_path, log), ["a", "b"], [[3, 4], [6, 8]], [1, 3], [8, np.nan])


def test_without_steps_each_line_with_norms_is_one(tmp_path):
    holds(
        of_jsonl(tmp_path, '{"a":3}\n{"loss":1}\n{"a":4,"loss":2}\n'), ["a"], [[3], [4]], [0, 1], [np.nan, 2]
    )


VALUES = {"nan": np.nan, "NaN": np.nan, "inf": np.inf, "Infinity": np.inf, "+inf": np.inf, "1e400": np.inf}


@pytest.mark.parametrize("text", VALUES)
def test_values_that_are_not_finite(tmp_path, text):
    """In CSV, in the strings of JSON, and as its tokens."""
    holds(of_csv(tmp_path, f"a,b\n{text},1\n"), ["a", "b"], [[VALUES[text], 1]], [0])
    holds(of_jsonl(tmp_path, f'{{"a":"{text}","b":1}}'), ["a", "b"], [[VALUES[text], 1]], [0])
    if text in ("NaN", "Infinity", "1e400"):
        holds(of_jsonl(tmp_path, f'{{"a":{text},"b":1}}'), ["a", "b"], [[VALUES[text], 1]], [0])


def test_minus_infinity_is_no_norm_and_may_be_a_loss(tmp_path):
    holds(of_jsonl(tmp_path, '{"a":1,"loss":-Infinity}'), ["a"], [[1]], [0], [-np.inf])
    with pytest.raises(ValueError, match="line 2: -inf in column 'a' is no norm: it is negative"):
        of_csv(tmp_path, "a\n-inf\n")


FORMS = {
    "bom": b"\xef\xbb\xbfstep,a.w,b.w\n0,3,4\n1,6,8\n",
    "crlf": b"step,a.w,b.w\r\n0,3,4\r\n1,6,8\r\n",
    "blank": b"\n  \nstep,a.w,b.w\n\n0,3,4\n,,\n1,6,8\n\n",
    "quoted": b'"step","a.w","b.w"\n"0","3","4"\n"1","6","8"',
    "semicolon": b"step;a.w;b.w\n0;3;4\n1;6;8\n",
    "tab": b"step\ta.w\tb.w\n0\t3\t4\n1\t6\t8\n",
    "bar": b"step|a.w|b.w\n0|3|4\n1|6|8\n",
    "spaces": b'step, "a.w", b.w\n0, 3, 4\n1, 6 , 8\n',
    "index": b",step,a.w,b.w\n0,0,3,4\n1,1,6,8\n",
    "comments": b'step,a.w,b.w,note\n0,3,4,"two\nlines, ""quoted"""\n1,6,8,\n',
    "float": b"step,a.w,b.w\n0.0,3.,4e0\n1.0,+6,0.8e1\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_csv_in_any_form(tmp_path, form):
    holds(of_csv(tmp_path, FORMS[form]), ["a/w", "b/w"], [[3, 4], [6, 8]], [0, 1])


def test_json_lines_in_any_form(tmp_path):
    """A byte order mark, ends of lines of Windows, blank lines, nulls, and values that are no numbers."""
    log = b'\xef\xbb\xbf{"a":3,"b":null,"note":[1,{}],"on":true}\r\n\r\n  \n{"a":4,"c":null}'
    holds(of_jsonl(tmp_path, log), ["a"], [[3], [4]], [0, 1])


def test_the_delimiter_can_be_given(tmp_path):
    history = of_csv(tmp_path, "a,x;b,x\n3;4\n", delimiter=";")
    holds(history, ["a,x", "b,x"], [[3, 4]], [0])
    with pytest.raises(ValueError, match=r"History.from_csv: delimiter is '::'\. Pass a character, or None"):
        of_csv(tmp_path, "a\n", delimiter="::")


@pytest.mark.parametrize("reader", READERS)
@given(
    rows=st.lists(st.tuples(NUMBERS, NUMBERS, st.floats()), min_size=1, max_size=5),
    start=st.integers(0, 2**40),
)
def test_numbers_come_back_to_the_bit(tmp_path_factory, reader, rows, start):
    """As Python writes them, in either kind of file."""
    path = tmp_path_factory.mktemp("logs") / "log"
    dicts = [{"step": start + k, "a/x": a, "b/x": b, "loss": loss} for k, (a, b, loss) in enumerate(rows)]
    with open(path, "w", newline="") as file:
        if reader == "csv":
            table = csv.DictWriter(file, list(dicts[0]))
            table.writeheader()
            table.writerows(dicts)
        else:
            file.writelines(json.dumps(row) + "\n" for row in dicts)
    history = READERS[reader](path)
    losses = np.array([loss for *_, loss in rows])
    unknown = np.isnan(losses).all()
    holds(
        history,
        ["a/x", "b/x"],
        [row[:2] for row in rows],
        start + np.arange(len(rows)),
        None if unknown else losses,
    )


WRONG_CSV = {
    "empty": (b"", {}, "is empty. Pass a log with a line of names"),
    "blank": (b"\n\n \n", {}, "is empty"),
    "numbers": (b"0,3,4\n1,6,8\n", {}, "begins with numbers. Put a line with the names"),
    "nothing": (b"step,a\n", {}, "no column holds norms, among 'step', 'a'. Pass columns="),
    "no norms": (b"step,loss,note\n0,1,x\n", {}, "no column holds norms, among 'step', 'loss', 'note'"),
    "twice": (b"a,b,a\n1,2,3\n", {}, "has two columns 'a'"),
    "short": (b"step,a,b\n0,3,4\n1,6\n", {}, "line 3 has 2 cells among 3 columns. Mend the line"),
    "long": (b"step,a,b\n\n0,3,4,5\n", {}, "line 3 has 4 cells among 3 columns"),
    "text": (
        b"a\n1\n2\n1_000\n",
        {},
        "line 4: '1_000' in column 'a' is no number. Mend it, or pass columns=",
    ),
    "comma": (b"a;b\n1,5;2\n", {"columns": ["a"]}, "line 2: '1,5' in column 'a' is no number"),
    "loss": (b"a,loss\n1,low\n", {}, "line 2: 'low' in column 'loss' is no number"),
    "negative": (b"a,b\n1,2\n3,-4\n", {}, "line 3: -4 in column 'b' is no norm: it is negative"),
    "missing": (b"a,b,c\n1,2,3\n4,,\n", {}, "line 3: the step has 1 of 3 norms, not 'b', 'c'. Pass columns="),
    "back": (
        b"step,a\n5,1\n\n3,1\n",
        {},
        "line 4: step 3 comes after step 5. Sort the lines, or cut the log",
    ),
    "again": (b"step,a\n5,1\n5,2\n", {}, "line 3: 'a' comes twice in one step, before in line 2"),
    "no step": (b"step,a\n5,1\n,2\n", {}, "line 3 has norms and no 'step'"),
    "half": (b"step,a\n0.5,1\n", {}, "line 2: 'step' is 0.5. Steps are whole numbers from 0"),
    "infinite": (b"step,a\ninf,1\n", {}, "line 2: 'step' is inf"),
    "before": (b"step,a\n-1,1\n", {}, "line 2: 'step' is -1"),
    "column": (b"a,b\n1,2\n", {"columns": ["a", "c"]}, "no column 'c' among 'a', 'b'. Pass one as columns="),
    "step name": (b"a,b\n1,2\n", {"step": "n"}, "no column 'n' among 'a', 'b'. Pass one as step="),
    "loss name": (b"a,b\n1,2\n", {"loss": "l"}, "no column 'l' among 'a', 'b'. Pass one as loss="),
    "pattern": (b"a,b\n1,2\n", {"columns": "("}, r"columns='\(' does not compile"),
    "groups": (b"a,b\n1,2\n", {"columns": "(a)(b)"}, "has 2 groups. Put parentheses around the name"),
    "no match": (b"a,b\n1,2\n", {"columns": "c(.*)"}, "no column holds norms, among 'a', 'b'"),
    "no cell": (b"a,b\n,2\n", {"columns": ["a"]}, "has no line with norms"),
    "runs": (b"r - grad_norm/a,s - grad_norm/a\n1,2\n", {}, "columns 'r - .*' and 's - .*' both hold 'a'"),
    "order": (b"grad_inf_norm/a\n1\n", {}, "column 'grad_inf_norm/a' holds linf norms, and norm is 'l2'"),
    "norm": (b"a\n1\n", {"norm": "l0"}, "there is no norm 'l0'"),
    "utf-16": ("a,b\n1,2\n".encode("utf-16"), {}, "line 1 is no UTF-8 text"),
    "latin": (b"a,b\n1,2\n3,4 \xe9\n", {}, "line 3 is no UTF-8 text"),
    "field": (b'a,note\n1,x\n2,"' + b"x" * 2**18, {}, "line 3: field larger than field limit"),
    "header": (b"a" * 2**18 + b",b\n", {}, "line 1: field larger than field limit"),
    "name": (b"grad/" * 10**4 + b",a\n1,2\n", {}, "'grad/grad/.*/'... has 50000 characters. Give it one of"),
    "line": (b"a,b\n" + b"1," * 2**23 + b"\n", {}, "line 2 has more than 16777216 bytes"),
}
WRONG_JSONL = {
    "empty": (b"", {}, "no column holds norms, among "),
    "cut": (b'{"a":1}\n{"a":', {}, "line 2 is no JSON: .* Mend it; if writing was cut off, delete it"),
    "list": (b"[1,2]\n", {}, "line 1 is no object. Pass a log of one object a line"),
    "number": (b'{"a":1}\n7\n', {}, "line 2 is no object"),
    "deep": (b'{"a":' + b"[" * 10**5, {}, "line 1 is no JSON"),
    "text": (b'{"a":1}\n{"a":[1]}\n', {}, "line 2: 'list' in column 'a' is no number"),
    "true": (b'{"a":1}\n{"a":true}\n', {}, "line 2: 'bool' in column 'a' is no number"),
    "missing": (b'{"a":1,"b":2}\n{"a":1}\n', {}, "line 2: the step has 1 of 2 norms, not 'b'"),
    "back": (b'{"step":1,"a":1}\n{"step":0,"loss":2}\n', {}, "line 2: step 0 comes after step 1"),
    "digits": (b'{"step":' + b"9" * 10**5 + b',"a":1}', {}, "line 1: 'step' is inf"),
    "column": (b'{"a":1}\n', {"columns": ["b"]}, "no column 'b' among 'a'"),
    "name": (b'{"a":1}\n{"' + b"grad/" * 10**4 + b'":2}', {}, "has 50000 characters. Give it one of"),
    "latin": (b'{"a":1}\n{"\xe9":2}\n', {}, "line 2 is no UTF-8 text"),
}
WRONG = [("csv", kind) for kind in WRONG_CSV] + [("jsonl", kind) for kind in WRONG_JSONL]


@pytest.mark.parametrize(("reader", "kind"), WRONG)
def test_wrong_logs_are_one_clear_error(tmp_path, reader, kind):
    """It names the file, and the line where there is one."""
    content, options, match = {"csv": WRONG_CSV, "jsonl": WRONG_JSONL}[reader][kind]
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=match) as caught:
        READERS[reader](path, **options)
    if kind != "norm":
        assert str(caught.value).startswith(f"History.from_{reader}: {str(path)!r}")


@pytest.mark.parametrize("reader", READERS)
def test_files_that_are_not_there_raise_what_opening_them_does(tmp_path, reader):
    with pytest.raises(FileNotFoundError):
        READERS[reader](tmp_path / "nothing")


def test_columns_are_names(tmp_path):
    with pytest.raises(TypeError, match=r"columns has 3\. Pass the names of columns"):
        of_csv(tmp_path, "a\n1\n", columns=[3])


def test_other_norms_are_said(tmp_path):
    """A log that says which norm it holds must agree with `norm=`."""
    assert of_csv(tmp_path, "grad_inf_norm/a\n1\n", norm="linf").norm == "linf"
    assert of_csv(tmp_path, "grad_3.0_norm/a\n1\n", norm="lp(3.0)").norm == "lp(3.0)"


def test_logs_take_memory_for_their_numbers_alone(tmp_path):
    """Lines are read one by one, and columns of text leave nothing behind."""
    names = [f"note_{k}" for k in range(100)]
    row = ",".join(itertools.repeat("x" * 20, len(names)))
    path = written(tmp_path, "a," + ",".join(names) + "\n" + f"1,{row}\n" * 500)
    tracemalloc.start()
    try:
        history = oc.History.from_csv(path, columns=["a"])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert history.norms.shape == (500, 1)
    assert most < path.stat().st_size / 10
