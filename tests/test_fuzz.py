"""Whatever trees, paths, patterns, files and arguments come: an answer, or one clear error."""

import contextlib
import functools
import importlib.util
import io
import itertools
import json
import re
import signal
import struct
import sys
import tracemalloc
import zipfile
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings, strategies as st
from typer.testing import CliRunner

import optaxclip as oc
from optaxclip import _partition, _patterns
from optaxclip._cli import app

GROUPS = {
    "whole": oc.groups.whole(),
    "layer": oc.groups.layer(),
    "leaf": oc.groups.leaf(),
    "depth": oc.groups.depth(2),
    "unit": oc.groups.unit(),
    "regex": oc.groups.regex({r"\1": "^([^/]+)/", "rest": ""}),
    "labels": oc.groups.labels(lambda path, leaf: path[-1:] or "none"),
}
KEYS = (
    st.text(max_size=4)
    | st.integers(-9, 9)
    | st.sampled_from(["", "/", "a/b", "value", "é", "\0", "#2", "\ud800"])
)
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "complex64", "int8", "bool", "uint32", "float0"]


def leaf(dtype, shape):
    return jax.ShapeDtypeStruct(shape, jax.dtypes.float0 if dtype == "float0" else jnp.dtype(dtype))


LEAVES = st.builds(leaf, st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=5).map(tuple))
TREES = st.recursive(
    LEAVES | st.none() | st.floats(width=32) | st.integers(),
    lambda below: (
        st.lists(below, max_size=3)
        | st.tuples(below, below)
        | st.dictionaries(
            st.text(max_size=4) | st.sampled_from(["", "/", "a/b", "value", "0"]), below, max_size=3
        )
        | st.dictionaries(st.integers(-9, 9), below, max_size=3)
    ),
    max_leaves=12,
)


def measurable(tree):
    """How many entries belong to some group, counted without the package."""
    total = 0
    for x in jax.tree.leaves(tree):
        dtype = getattr(x, "dtype", None)
        if isinstance(x, float):
            total += 1
        elif dtype is not None and dtype != jax.dtypes.float0 and jnp.issubdtype(dtype, jnp.inexact):
            total += int(np.prod(x.shape))
    return total


@pytest.mark.parametrize("name", GROUPS)
@given(tree=TREES)
@settings(max_examples=60)
def test_any_tree_is_taken_apart(name, tree):
    """Each entry of a floating leaf is in one row, names are unique, and the text has all groups."""
    part = _partition.partition(GROUPS[name], tree)
    assert part.table.sizes.sum() == measurable(tree)
    assert len(set(part.table.names)) == len(part.table.names) == len(part.table.sizes)
    text = oc.describe(GROUPS[name], tree)
    assert all(group in text for group in part.table.spans if group.isprintable())


@pytest.mark.parametrize("name", GROUPS)
@given(keys=st.lists(st.lists(KEYS, min_size=1, max_size=4), min_size=1, max_size=5))
def test_any_paths_have_names(name, keys):
    """Leaves with the same keys joined by slashes are told apart, and none is lost."""
    tree = {}
    for path in keys:
        tree.setdefault(repr(path), {str(path[0]): [{str(path[-1]): leaf("float32", (2,))}]})
    part = _partition.partition(GROUPS[name], list(tree.values()))
    assert len(set(part.paths)) == len(part.paths) == len(tree)


@pytest.mark.parametrize("name", GROUPS)
def test_thousands_of_leaves_are_described(name):
    """Three thousand of them, in a hundred blocks."""
    tree = {
        f"block_{k}": {f"dense_{j}": {"kernel": leaf("bfloat16", (4, 8)), "bias": leaf("float32", (8,))}}
        for k in range(100)
        for j in range(1)
    }
    tree |= {f"layer_{k}": [leaf("float32", (3,))] * 28 for k in range(100)}
    part = _partition.partition(GROUPS[name], tree)
    assert len(part.paths) == 3000
    assert part.table.sizes.sum() == 100 * (40 + 84)
    assert oc.describe(GROUPS[name], tree)


def test_a_hundred_thousand_leaves_are_described():
    """In a time that grows with their number, not with its square; each is a group of its own."""
    tree = {f"block_{k}": {f"dense_{j}": leaf("float32", (2,)) for j in range(100)} for k in range(1000)}
    with within(240):
        part = _partition.partition(oc.groups.leaf(), tree)
        text = oc.describe(oc.groups.leaf(), tree)
    assert len(set(part.paths)) == len(part.table.names) == 100_000
    assert part.table.sizes.sum() == 200_000
    assert "block_999/dense_99" in text


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("last", ["kernel", "value"])
def test_paths_hundreds_deep_are_read(name, last):
    """As deep as JAX itself flattens a tree: at 2,000 it raises a `SystemError`."""
    tree = {last: leaf("float32", (2,))}
    for k in range(900):
        tree = {f"b{k % 3}": tree}
    part = _partition.partition(GROUPS[name], tree)
    assert part.table.sizes.tolist() == [2]
    assert part.paths[0].count("/") >= 899


@pytest.mark.parametrize("name", GROUPS)
def test_paths_given_as_names_may_be_thousands_deep(name):
    """A name is text, whatever its length."""
    if name in ("whole", "labels"):
        pytest.skip("takes no such names here")
    made = {
        "layer": oc.groups.layer,
        "leaf": oc.groups.leaf,
        "depth": lambda **kw: oc.groups.depth(2, **kw),
        "unit": oc.groups.unit,
        "regex": lambda **kw: oc.groups.regex({"deep": "^(?:[^/]+/)*kernel$"}, **kw),
    }[name](names=["a/" * 5000 + "kernel"])
    assert len(_partition.partition(made, [leaf("float32", ())]).table.names) == 1


# Arrays. Structures are few, since each is another compilation; values are drawn.

ARRAYS = {
    "dtypes": {
        "float8": jnp.zeros((2, 3), jnp.float8_e4m3fn),
        "bfloat16": jnp.zeros(4, jnp.bfloat16),
        "float16": jnp.zeros((3, 1), jnp.float16),
        "float32": jnp.zeros((2, 0, 3)),
        "complex64": jnp.zeros(3, jnp.complex64),
        "int8": jnp.arange(-3, 3, dtype=jnp.int8),
        "uint32": jnp.array(2**32 - 1, jnp.uint32),
        "bool": jnp.array([True, False]),
        "float0": np.zeros((2, 2), jax.dtypes.float0),
        "key": jax.random.key(0),
        "none": None,
    },
    "keys": {
        "": jnp.zeros(2),
        "/": {"": jnp.zeros((2, 2)), "value": jnp.zeros(())},
        "a/b": {"c": jnp.zeros(1)},
        "a": {"b/c": jnp.zeros(3), "b": {"c": jnp.zeros((1, 2)), "#2": [jnp.zeros(2), ()]}},
        "\0": {"é": (jnp.zeros(1), {"whole": jnp.zeros(2)})},
    },
    "list": [jnp.zeros(()), [jnp.zeros(3), jnp.zeros((0,))], {7: jnp.zeros(2), -1: jnp.zeros((2, 1))}],
    "scalar": jnp.zeros(()),
    "nothing": {"a": jnp.zeros(0, jnp.int32), "b": [None, jnp.array(True)]},
}
ENTRIES = st.floats(width=32, allow_subnormal=False) | st.sampled_from([0.0, 1e-3, 1.0, -300.0, 3e38])
TX = oc.rescale_by_norm(1.0, groups=oc.groups.leaf()), oc.record(capacity=2, stretches=2)


@functools.cache
def updated(name):
    """One program for a structure: the new update, the state before and after, and the numbers to log."""
    tx = optax.chain(*reversed(TX))

    def run(tree):
        before = tx.init(tree)
        tree, state = tx.update(tree, before, tree)
        return tree, before, state, oc.metrics(state, tree, oc.groups.leaf())

    return jax.jit(run)


def is_measured(x):
    return x.dtype != jax.dtypes.float0 and jnp.issubdtype(x.dtype, jnp.inexact) and x.size > 0


def filled(tree, numbers):
    """The tree with numbers in place of the entries that belong to a group."""

    def one(x):
        if not is_measured(x):
            return x
        with np.errstate(over="ignore"):  # what a narrow dtype has no room for is infinite
            own = np.float32([next(numbers) for _ in range(x.size)]).reshape(x.shape)
            return jnp.asarray(own * (0.6 + 0.8j) if jnp.iscomplexobj(x) else own, x.dtype)

    return jax.tree.map(one, tree)


def norm_of(x):
    return np.linalg.norm(np.asarray(x, np.complex128 if jnp.iscomplexobj(x) else np.float64))


def bits(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


@pytest.mark.parametrize("name", ARRAYS)
@given(numbers=st.lists(ENTRIES, min_size=1, max_size=24))
@settings(max_examples=60)
def test_any_arrays_keep_their_kind_and_none_is_lost(name, numbers):
    """Through a clip, metrics, a recording and its history: a leaf is measured, or comes out as it was."""
    tree = filled(ARRAYS[name], itertools.cycle(numbers))
    out, before, state, logged = updated(name)(tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    assert jax.tree.map(kind, state) == jax.tree.map(kind, before)
    expected = []
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(out), strict=True):
        assert kind(new) == kind(old)
        norm = norm_of(old) if is_measured(old) else 0.0
        if is_measured(old):
            expected.append(norm)
        if norm <= 1 - 1e-6:
            assert bits(new) == bits(old)
        elif np.isfinite(norm):
            assert norm_of(new) <= 1 + 2 * float(jnp.finfo(old.dtype).eps)
        else:
            assert np.isnan(np.asarray(new, np.complex64)).all()
    seen = [value for key, value in logged.items() if key.startswith("clip/norm_before/")]
    history = oc.History.from_state(state, tree)
    assert len(seen) == len(expected) + 1
    for measured in seen[: len(expected)], history.norms[0]:
        same_norms(measured, expected)


def kind(x):
    return x.shape, x.dtype


def same_norms(measured, expected):
    """In any order; NaN and infinite ones are alike, and those beyond float32 are its largest number."""
    a, b = (np.nan_to_num(np.float64(x), nan=np.inf, posinf=np.inf) for x in (measured, expected))
    b = np.where(b < np.inf, np.minimum(b, float(np.finfo(np.float32).max)), b)
    np.testing.assert_allclose(np.sort(a), np.sort(b), rtol=1e-5, atol=1e-27)


# Patterns.

EXPONENTIAL = [
    *("(a+)+$", "(a|aa)+$", "(a|a)*b", "([a-z]+_?)+$", "(.*/)*x", "(x*)*", "(a?a)*b", r"(\w+\d*)+$"),
    *(
        "(?:a+){20}!",
        "((ab)+)+c",
        "([^/]+)*$",
        "(.+)+",
        "(a+b?)*c",
        "(?:(?:x|y|xy))*z",
        "(é+)+$",
        "(?i:(a+)+)",
    ),
    *(r"^(?:[^ab]|A)*$", "^(?:(?:a?){9}){9}$", "^(?:(?:[ab]{0,9}){9}){9}$", "^(?:a?a?a?a?){9}$"),
    *(r"^(?:(?:\d*)?/)*$", "^(?:(?:a*)?b)*$", "^(x?)(?:(?(1)a*|b))*$", "^(?:.|é)*!$", r"^(?:éé|\w)*$"),
    *("(?i)^(?:[`-c]d|[@-C]d)*$", "(?i)^(?:[à-ü]d|Éd)*$", "(?i)^(?:k|\u212aa?)*$", "(?i)^(?:İa?|i)*$"),
    *(r"(?a)^(?:\W\W|ß)*$", r"(?a:^(?:\W\W|ß)*$)", r"(?a)^(?:(?u:\w\w)|ß)*$", r"^(?:²a|\Da)*$"),
    *("(?s)^(?:.a|\na)*$", r"^(?:(?!b)(?:\b|\B)a)*$", "^(?>(?:a|aa)*b)", "^(?=(?:a|aa)*b)", "(?:a?)*"),
]
HARMLESS = [
    *("(?:[^/]+/)*kernel$", r"(\d+)(/\d+)*$", r"block_(\d+)", "^(.*/)?attn/(q|k|v)_proj", ".*", "", "(a++)+"),
    *("(?:layer|lin)*x", r"(?:\w+\.)*\w+", r"layers?/(\d+)/.*kernel", "(?>a+)+", "(?:ab?)*", "(a)(?(1)b|c)*"),
    *(r"(\w|\d)+!", "(?=x)(y)(?!z)", r"(?P<k>[a-z_]+)(?:_(?P=k))?", "(?:a+){3}"),
    *("([A-Z][a-z]*)+", r"([A-Z][a-z]+)+_\d+", r"(?:Layer_\d+/|layer_\d+/)*w", "(?:conv|Conv)+"),
    *("(?:层/|块/)*", r"(?:²a|\da)*", r"(?:\w+\W)*", "(?i)(?:[a-z]+[^a-z])*", "(?i)(?:kernel|scale|İ)*"),
    *(
        r"(?a)(?:[^\W\d]+[ß²\d])*",
        r"(?u:(?:\s|\d)+_)*",
        "(?:.*\n)*",
        "(?:ab?)*b",
        "x(?!)|y",
        "(?:(?>a+)|b)*",
    ),
    *("(?:[^/]*/){1,12}w$", "(?:(?:a|a)++b)*", "(?i:k)*K", "(a)(?:(?(1)b)c)*"),
]


@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_patterns_that_may_take_for_ever_are_refused(pattern):
    """Wherever a user can pass one, before any path is looked at, with what to do."""
    match = r"repeats what can match the same text in several ways, .* Make the next character decide: "
    made = {
        "groups.regex": lambda: oc.groups.regex({"x": pattern}),
        "groups.unit": lambda: oc.groups.unit({pattern: 0}),
        "groups.stacked": lambda: oc.groups.stacked(oc.groups.leaf(), pattern),
        "centralize": lambda: oc.centralize({pattern: 0}),
        "clip_by_spectral_norm": lambda: oc.clip_by_spectral_norm(1.0, axes={pattern: 0}),
    }
    for where, make in made.items():
        with pytest.raises(ValueError, match=rf"^{where}: the pattern .* {match}"):
            make()


def test_columns_of_logs_are_not_looked_for_for_ever(tmp_path):
    """Names of columns come with a file."""
    (tmp_path / "log.csv").write_text(f"{'a' * 60}!,b\n1,2\n")
    with pytest.raises(ValueError, match=r"columns='\(a\+\)\+\$' repeats what can match"):
        oc.History.from_csv(tmp_path / "log.csv", columns="(a+)+$")
    with pytest.raises(TypeError, match=r"columns=re.compile\(b'\(b\)'\) is of type bytes\. Pass a str\."):
        oc.History.from_csv(tmp_path / "log.csv", columns=re.compile(b"(b)"))


@pytest.mark.parametrize("pattern", HARMLESS)
def test_patterns_that_do_not_are_taken(pattern):
    assert oc.groups.regex({"x": pattern})


@pytest.mark.parametrize(
    "pattern", ["(" * 5000, "a{99999999999999}", "(?:" * 400 + "a" + ")*" * 400, "[", r"(?P<1>x)"]
)
def test_what_the_compiler_refuses_is_one_error(pattern):
    with pytest.raises(ValueError, match=r"^groups.regex: the pattern .* does not compile: .* Mend it\."):
        oc.groups.regex({"x": pattern})


def test_without_the_parser_whatever_compiles_is_taken(monkeypatch):
    """It is private to Python: one that lacks it can import the package, and use its patterns."""
    monkeypatch.setitem(sys.modules, "re._parser", None)
    spec = importlib.util.spec_from_file_location("without", _patterns.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    assert without.compiled("here", "it", "(a+)+$").search("a")
    with pytest.raises(ValueError, match=r"^here: it does not compile: "):
        without.compiled("here", "it", "[")


def test_what_a_later_parser_adds_may_be_anything(monkeypatch):
    """A part that is not known may begin with any character, or be empty."""
    known = _patterns.parse
    monkeypatch.setattr(_patterns, "parse", lambda *args: [("NEW", 1), *known(*args)])
    assert _patterns.compiled("here", "it", "(?:ab?)*c")
    monkeypatch.setattr(
        _patterns, "parse", lambda *args: [("MAX_REPEAT", (0, 99, [*known(*args), ("NEW", None)]))]
    )
    with pytest.raises(ValueError, match="repeats what can match"):
        _patterns.compiled("here", "it", "ab?")


@contextlib.contextmanager
def within(seconds):
    """Ends what would take for ever; the time is a hundred times what it should take."""

    def ended(number, frame):
        raise AssertionError("it takes too long")

    old = signal.signal(signal.SIGALRM, ended)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


PIECES = [
    "a",
    "b",
    "/",
    ".",
    "[ab]",
    "[^/]",
    r"\w",
    "(",
    "(?:",
    ")",
    "|",
    "*",
    "+",
    "?",
    "*?",
    "{2,}",
    "^",
    "$",
]
PATHS = ["a" * 36 + "!", "a/" * 18 + "!", "ab" * 18 + "!", "aab/" * 9 + "\0", "b" * 36]


@given(pieces=st.lists(st.sampled_from(PIECES), min_size=3, max_size=9))
@example(pieces=["(", "a", "|", "b", "|", "a", "b", ")", "+"])
@settings(max_examples=400)
def test_what_is_taken_ends(pieces):
    """A pattern that is not refused finds out about a path at once, or in the power of its repetitions."""
    try:
        found = _patterns.compiled("here", "it", "".join(pieces))
    except ValueError:
        return
    with within(20):
        for path in PATHS:
            found.search(path)


MANY = [chr(0x4E00 + k) for k in range(1000)]


@pytest.mark.parametrize(
    "pattern",
    [
        "".join(f"(?:{c}b)?" for c in MANY),
        f"(?:{'b|'.join(MANY)})*",
        "".join(f"(?:{c}" for c in MANY[:150]) + ")*" * 150,
        "".join(f"(?:{c}b|" for c in MANY[:150]) + "a" + ")" * 150 + "*",
        "[a-z]+/" * 1000,
    ],
    ids=["optional", "choices", "loops in loops", "choices in choices", "long"],
)
def test_long_and_deep_patterns_are_looked_through_once(pattern):
    """The check itself takes no exponential time."""
    with within(20):
        assert _patterns.compiled("here", "it", pattern)


TIMES = {"*": (0, 99), "+": (1, 99), "?": (0, 1), "{0,3}": (0, 3), "{9}": (9, 9)}
ONE = ["a", "b", "A", "é", "ß", ".", "/", "[^a]", "[ab]", "[^ab]", "[@-B]", "[à-ü]", r"\w", r"\W", r"\d", "1"]
TEXTS = ["a", "b", "A", "é", "ß", "/", "1", "ab", "Aa", "aé", "ßa", "aab", "a/"]


def some(random, depth):
    """A pattern as a tree: a set of characters, two in a row, a choice of two, or how often one comes."""
    kind = random.choice(["one", "then", "or", *TIMES]) if depth else "one"
    if kind == "one":
        return random.choice(ONE)
    return kind, *(some(random, depth - 1) for _ in range(1 if kind in TIMES else 2))


def shown(tree):
    if isinstance(tree, str):
        return tree
    kind, *parts = map(shown, tree)
    if kind == "then":
        return "".join(parts)
    return f"(?:{parts[0]}){kind}" if kind in TIMES else f"(?:({parts[0]})|({parts[1]}))"


def ends(tree, text, at, flags, steps):
    """Where a match may end, in the order in which one tries again; each try takes a step."""
    if next(steps, None) is None:
        raise TimeoutError

    def again(part, count, at):
        least, most = TIMES[tree[0]]
        if count < most:
            for end in ends(part, text, at, flags, steps):
                if end > at or count < least:
                    yield from again(part, count + 1, end)
        if count >= least:
            yield at

    if isinstance(tree, str):
        yield from [at + 1] if at < len(text) and re.fullmatch(tree, text[at], flags) else []
    elif tree[0] in TIMES:
        yield from again(tree[1], 0, at)
    elif tree[0] == "or":
        for part in tree[1:]:
            yield from ends(part, text, at, flags, steps)
    else:
        for middle in ends(tree[1], text, at, flags, steps):
            yield from ends(tree[2], text, middle, flags, steps)


def is_long(tree, flags):
    """Whether all that a failing match tries is more than a loop without open choices would."""
    try:
        for text in TEXTS:
            list(ends(tree, (text * 30)[:30], 0, flags, iter(range(30000))))
    except TimeoutError:
        return True
    return False


@pytest.mark.parametrize("flags", [0, re.IGNORECASE, re.ASCII, re.IGNORECASE | re.ASCII])
def test_loops_that_are_taken_try_few_ways(flags):
    """Counted, by a matcher that tries what Python's does; many of those refused try too many."""
    random = Random(int(flags))
    taken = refused = 0
    while taken < 150:
        tree = ("*", some(random, 4))
        try:
            _patterns.compiled("here", "it", re.compile(f"^{shown(tree)}!$", flags))
        except ValueError:
            refused += refused < 20 and is_long(tree, flags)
        else:
            taken += 1
            assert not is_long(tree, flags), shown(tree)
    assert refused == 20


# Files.

HISTORY = oc.History(["a/w", "b/w"], np.arange(1.0, 9).reshape(4, 2), loss=np.ones(4))
READERS = {"npz": oc.History.load, "csv": oc.History.from_csv, "jsonl": oc.History.from_jsonl}
LOG = "step,loss,a.w,b.w\n0,1,1,2\n1,1,3,4\n"
LINES = '{"step":0,"a.w":1,"b.w":2}\n{"step":1,"a.w":3,"b.w":4}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("fuzz")
    HISTORY.save(found / "good.npz")
    return found


def read(folder, kind, data):
    """A recording, or None where one error names the file; nothing else."""
    path = folder / f"fuzzed.{kind}"
    path.write_bytes(data)
    try:
        return READERS[kind](path)
    except ValueError as error:
        said = str(error)
    where = {"npz": "load", "csv": "from_csv", "jsonl": "from_jsonl"}[kind]
    assert said.startswith(f"History.{where}: {str(path)!r}")
    assert len(said) < 5000
    return None


def altered(data, edits):
    """Bytes replaced, put in, taken out and repeated."""
    for kind, at, new in edits:
        at %= len(data) + 1
        if kind == "cut":
            data = data[:at]
        elif kind == "put":
            data = data[:at] + new + data[at:]
        elif kind == "over":
            data = data[:at] + new + data[at + len(new) :]
        else:
            data = data[:at] + data[at // 2 :]
    return data


WORDS = [
    b"nan",
    b"-1",
    b"1e999",
    b'"',
    b"\n",
    b",",
    b"{",
    b"[",
    b"\0",
    b"\xff",
    b"NaN",
    b"null",
    b"\r",
    b"9" * 400,
    b"_",
]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["cut", "put", "over", "repeat"]),
        st.integers(0, 10**6),
        st.binary(max_size=4) | st.sampled_from(WORDS),
    ),
    max_size=4,
)


@pytest.mark.parametrize("kind", READERS)
@given(edits=EDITS)
@settings(max_examples=150)
def test_altered_files_are_read_or_refused(folder, kind, edits):
    """Never another error, and what is read is a recording that can be looked at."""
    start = {"npz": (folder / "good.npz").read_bytes(), "csv": LOG.encode(), "jsonl": LINES.encode()}[kind]
    found = read(folder, kind, altered(start, edits))
    if found is not None:
        assert str(found)
        assert found.norms.shape == (len(found), len(found.names))


@pytest.mark.parametrize("kind", READERS)
@given(
    data=st.binary(max_size=200)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
@settings(max_examples=100)
def test_any_bytes_are_read_or_refused(folder, kind, data):
    read(folder, kind, data)


@pytest.mark.parametrize("kind", READERS)
def test_foreign_formats_are_refused(folder, kind):
    """Pickles, archives of NumPy's objects, arrays, images, and the other kinds."""
    with_objects = io.BytesIO()
    np.savez(with_objects, header=np.array([{"a": 1}], object), norms=np.array([print], object))
    plain = io.BytesIO()
    np.save(plain, np.ones(3))
    zipped = io.BytesIO()
    zipfile.ZipFile(zipped, "w").close()
    foreign = [
        with_objects.getvalue(),
        plain.getvalue(),
        b"\x89PNG\r\n\x1a\n",
        b"\x80\x04\x95cos\nsystem\n.",
        zipped.getvalue(),
    ]
    foreign += [{"npz": LOG, "csv": '{"a":1}', "jsonl": LOG}[kind].encode()]
    for data in foreign:
        assert read(folder, kind, data) is None


def declared(data, size):
    """A zip whose directory and members say that they are of another size."""
    out = bytearray(data)
    for mark, at in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        place = out.find(mark)
        while place >= 0:
            struct.pack_into("<I", out, place + at, size)
            place = out.find(mark, place + 4)
    return bytes(out)


@pytest.mark.parametrize("size", [0, 1, 2**31 - 1, 2**32 - 2])
def test_declared_sizes_take_no_memory(folder, size):
    """Nothing is made room for that is not there."""
    data = declared((folder / "good.npz").read_bytes(), size)
    tracemalloc.start()
    try:
        assert read(folder, "npz", data) is None
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**21


HUGE = {
    "a line": ("csv", b"a," * 2**24),
    "a cell": ("csv", b"a\n" + b"9" * 2**18),
    "a quoted cell": ("csv", b'a\n"' + b"9\n" * 2**20),
    "a number": ("jsonl", b'{"a":' + b"9" * 2**20 + b"}"),
    "a key in each line": ("jsonl", b"".join(b'{"k%d":1}\n' % k for k in range(3000))),
    "depth": ("jsonl", b'{"a":' + b"[" * 10**6),
}


@pytest.mark.parametrize("kind", HUGE)
def test_logs_take_memory_in_proportion(folder, kind):
    """A line of many bytes is refused; many columns in few lines, and many lines of few, are no matrix."""
    reader, data = HUGE[kind]
    tracemalloc.start()
    try:
        read(folder, reader, data)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**22 + 8 * max(len(data), 2**17)


# The command line.

COMMANDS = ["show", "plot", "compare", "advise", "nonsense", "--help", "--version"]
FLAGS = [
    "--most",
    "--columns",
    "--step",
    "--loss",
    "--norm",
    "--groups",
    "--json",
    "-p",
    "--budget",
    "--limit",
]
FLAGS += ["--optimizer", "--learning-rate", "-o", "-h", "--", "--unknown"]
VALUES = [
    "0",
    "-1",
    "nan",
    "1e400",
    "",
    "leaf",
    "layer",
    "depth:2",
    "depth:",
    "l2",
    "lp(3)",
    "lp(",
    "(a+)+$",
    "(.+)",
]
VALUES += [
    "sgd",
    "none",
    "global:1",
    "regex:(:1",
    "zclip:1:2",
    "oc.adagc()",
    "a,b",
    "\ud800",
    "é",
    "x" * 300,
    "loss",
]
CONTENTS = {
    "log.csv": LOG,
    "log.jsonl": LINES,
    "odd.jsonl": json.dumps({"grad_norm/\ud800": 1.0, "grad_norm/[bold]": 2.0}) + "\n",
    "empty.csv": "",
    "words.csv": "a,b\nx,y\n",
}
FILES = [*CONTENTS, "good.npz", "missing", "."]


@given(
    words=st.lists(st.sampled_from(FLAGS) | st.sampled_from(VALUES) | st.sampled_from(FILES), max_size=5),
    command=st.sampled_from(COMMANDS),
    file=st.sampled_from(FILES),
)
@settings(max_examples=250)
def test_any_arguments_get_an_answer(folder, command, file, words):
    """Exit codes are 0, 1 or 2, errors are text, and none is unexpected."""
    for name, text in CONTENTS.items():
        if not (folder / name).exists():
            (folder / name).write_text(text)
    arguments = [command, *(str(folder / x) if x in FILES else x for x in (file, *words))]
    if command == "plot" and "-o" in words:  # only into the folder
        arguments = [
            str(folder / "x.html") if k and arguments[k - 1] == "-o" else x for k, x in enumerate(arguments)
        ]
    found = CliRunner().invoke(app, arguments, env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert found.exception is None or isinstance(found.exception, SystemExit), arguments
    assert found.exit_code in (0, 1, 2), arguments
    assert "Traceback" not in found.output
    assert "optaxclip: unexpected" not in found.output, (arguments, found.output)
