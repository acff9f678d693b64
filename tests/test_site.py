"""The documentation has all that is public, with examples, shapes, formulas and sources; links lead on."""

import dataclasses
import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import jax
import pytest

import optaxclip as oc

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
REFERENCE = [page for page in PAGES if page.parent == ROOT / "docs" / "api"]
CODE = re.compile(r"^```.*?^```", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]*)\)")
NAMES = [
    line.partition("(")[0] for line in (ROOT / "tests" / "api.txt").read_text(encoding="utf-8").splitlines()
]


def named(name):
    """The object of a public name."""
    found = oc
    for part in name.split("."):
        found = getattr(found, part)
    return found


def of_class(name):
    """Whether a name with a dot is that of a method or a property, which is documented with its class."""
    return "." in name and inspect.isclass(named(name.partition(".")[0]))


PUBLIC = sorted({name for name in NAMES if not of_class(name)})
MEMBERS = sorted({name for name in NAMES if of_class(name)})
CLASSES = [name for name in PUBLIC if inspect.isclass(named(name))]
CALLED = [name for name in PUBLIC + MEMBERS if name not in CLASSES and callable(named(name))]

# By which leaves are in a group there is nothing to reckon, nor where numbers are found, moved or shown. What
# advice goes by, and what is compared, is in words in `docs/choosing.md`.
WITHOUT_FORMULA = {
    *("groups.depth", "groups.labels", "groups.layer", "groups.leaf", "groups.regex"),
    *("describe", "metrics", "record", "RecordState"),
    *("Groups", "Leaf", "Leaf.shape", "Member", "History"),
    *("History.from_csv", "History.from_jsonl", "History.from_metrics", "History.from_state"),
    *("History.load", "History.save", "History.table", "History.plot", "History.to_html"),
    *("History.first_nonfinite", "History.advise", "Advice", "Advice.transformation", "Rule"),
    *(
        "History.compare",
        "Comparison",
        "Comparison.cells",
        "Comparison.table",
        "Comparison.title",
        "Replay.clipped",
    ),
}

# What is this library's own: a few groupings, and whatever describes, logs and records, with its types.
WITHOUT_REFERENCE = {
    *("groups.depth", "groups.measured_only", "groups.regex", "describe", "metrics", "record"),
    *("RecordState", "History", "Advice", "Comparison", "Replay"),
    *("Groups", "Leaf", "Member", "Norm", "Limit", "Response", "Context", "Table"),
}

SHAPE = re.compile(r"`\((\w+(, \w+)*,?)?\)`")
ARRAYS = re.compile(r"Array|ndarray|GradientTransformation|Stats")


def doc(name):
    """The docstring of a public name."""
    return inspect.getdoc(named(name)) or ""


def pointed(name):
    """The docstring, and of a class or member that of the name in "See `name`." too, if it says so."""
    own = doc(name)
    others = re.findall(r"\bSee `([\w.]+)`\.", own) if name in CLASSES + MEMBERS else []
    return "\n".join([own, *map(doc, others)])


def section(text, title):
    """The lines below the title of a section."""
    found = re.search(rf"^{title}:\n((?:  .*\n|\n)*)", text + "\n", re.M)
    return found.group(1) if found else ""


def entries(name):
    """What the docstring says of each argument or attribute."""
    text = section(doc(name), "Attributes" if name in CLASSES else "Args")
    return dict(re.findall(r"^  (\w+): ((?:.*\n)(?:   .*\n)*)", text, re.M))


def arguments(name):
    """The arguments of a function or method, or the public fields of a class."""
    value = named(name)
    if name not in CLASSES:
        return [own for own in inspect.signature(value).parameters if own != "self"]
    fields = getattr(value, "_fields", None) or [own.name for own in dataclasses.fields(value)]
    return [own for own in fields if not own.startswith("_")]


def anchors(page):
    """What headings are called in links, as GitHub and the site have it."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    """Links within the repository, and pictures; the site's own build checks those between its pages."""
    for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        name, _, heading = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.is_file(), f"{target} in {page.name}"
        assert not heading or heading in anchors(place), f"{target} in {page.name}"


def test_every_public_name_is_in_the_reference_once():
    """No name is missing, none is there twice, and none is made up."""
    shown = [
        name
        for page in REFERENCE
        for name in re.findall(r"^::: optaxclip\.(\S+)$", page.read_text(encoding="utf-8"), re.M)
    ]
    handed_out = [f"history.{name}" for name in oc.history.__all__ if name not in PUBLIC]
    assert sorted(shown) == sorted(PUBLIC + handed_out)


def test_every_page_of_the_reference_is_in_its_table():
    """`docs/api/index.md` links them all."""
    listed = set(LINK.findall((ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")))
    assert {page.name for page in REFERENCE} == listed | {"index.md"}


@pytest.mark.parametrize("name", PUBLIC + MEMBERS)
def test_every_public_name_has_an_example(name):
    """A doctest with an output; a property may have that of its class, a class that of where it points."""
    text = pointed(name) if name in CLASSES else doc(name)
    if name not in CLASSES and not callable(named(name)):
        head, _, own = name.partition(".")
        text += pointed(head) if re.search(rf">>> .*\.{own}\b", pointed(head)) else ""
    assert any(example.want for example in doctest.DocTestParser().get_examples(text))


@pytest.mark.parametrize("name", CALLED + CLASSES)
def test_every_argument_and_attribute_is_described(name):
    """By its name, or all of them elsewhere: "as in `from_csv`"."""
    same = re.search(r"all else as in `(\w+)`", doc(name))
    listed = entries(f"{name.partition('.')[0]}.{same.group(1)}" if same else name)
    assert [own for own in arguments(name) if own not in listed] == []


@pytest.mark.parametrize("name", CALLED + CLASSES)
def test_every_array_has_a_shape(name):
    """What is an array says so with its shape, as `(rows,)`, or where to see it; so does what comes out.

    A transformation names its state, whose fields are attributes of a class.
    """
    told = {
        own: SHAPE.search(said) or re.search(r"\b([Ss]ee|[Aa]s in|[Ll]ikewise|tree|structure)\b", said)
        for own, said in entries(name).items()
    }
    types = getattr(named(name), "__annotations__", {})
    arrays = {own for own, said in entries(name).items() if "an array" in said}
    if name in CLASSES:
        arrays |= {own for own in arguments(name) if ARRAYS.search(str(types[own]))}
    assert [own for own in sorted(arrays) if not told[own]] == []
    if ARRAYS.search(str(types.get("return", ""))):
        returned = section(doc(name), "Returns")
        states = {*CLASSES, "scale_by_stable_adam", "optax.EmptyState"} & {
            *re.findall(r"`([\w.]+)`", returned)
        }
        assert SHAPE.search(returned) or states


@pytest.mark.parametrize("name", PUBLIC + MEMBERS)
def test_every_name_with_mathematics_has_a_formula(name):
    """As TeX between two dollars, or one; the exceptions have none."""
    text = re.sub(r"`[^`\n]*`|^(>>>|\.\.\.).*$", "", pointed(name), flags=re.M)
    assert bool(re.search(r"\$[^$]+\$", text)) != (name in WITHOUT_FORMULA)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_with_a_source_has_a_reference(name):
    """With a link; the exceptions have none. Members have those of their class."""
    sources = re.findall(r"^References:\n(?:  .*\n)+", pointed(name) + "\n", re.M)
    assert any("](https://" in source for source in sources) != (name in WITHOUT_REFERENCE)


def test_exceptions_are_names():
    """None is left over from a name that has gone."""
    assert {*PUBLIC, *MEMBERS} >= WITHOUT_FORMULA
    assert {*PUBLIC} >= WITHOUT_REFERENCE


def block(page, name):
    """What a script wrote into a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]


def test_every_example_is_in_the_gallery():
    """With its command, and its source as a link; modules that examples share are none."""
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "examples").glob("*.py")):
        if "__main__" in path.read_text(encoding="utf-8"):
            assert f"python examples/{path.name}" in gallery
            assert f"(../examples/{path.name})" in gallery


@pytest.mark.parametrize(("name", "title"), [("exploding_mlp", "all"), ("exploding_tensor", "one")])
def test_numbers_in_the_essay_are_those_of_the_runs(name, title):
    """Tables in `global-or-layer.md` have what the examples printed, as the gallery has it."""
    printed = block("gallery.md", name)
    essay = (ROOT / "docs" / "global-or-layer.md").read_text(encoding="utf-8").lower()
    (section,) = re.findall(rf"\n## {title} tensors? explodes?\n(.*?)\n## ", essay, re.S)
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 4
    for row in rows:
        for number in re.findall(r"\d+(?:\.\d+)?(?: %)?", row.split("|", 2)[2]):
            assert re.search(rf"(?<![\d.]){re.escape(number.replace(' ', ''))}", printed), row


def test_the_table_of_spikes_is_what_the_script_finds():
    """`python docs/figures.py spike` writes the table in `global-or-layer.md`."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rows = figures.spike_rows(figures.spiked())
    written = [line for line in block("global-or-layer.md", "spike").splitlines() if line.startswith("| ")][
        2:
    ]
    assert len(rows) == len(written) == 6
    for row, line in zip(rows, written, strict=True):
        ours, theirs = ([cell.strip() for cell in text.split("|")[1:-1]] for text in (row, line))
        assert ours[:2] == theirs[:2]
        assert [float(x) for x in ours[2:]] == pytest.approx([float(x) for x in theirs[2:]], abs=0.02)
