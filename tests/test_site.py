"""The documentation has everything that is public, with examples and formulas; its links lead somewhere."""

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
REFERENCE = [page for page in PAGES if page.parent.name == "api"]
CODE = re.compile(r"^```.*?^```", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]*)\)")
NAMES = [
    line.partition("(")[0] for line in (ROOT / "tests" / "api.txt").read_text(encoding="utf-8").splitlines()
]

# What only names, prints, remembers or passes on has no equation.
WITHOUT_FORMULA = {
    *(name for name in NAMES if name.startswith("groups.")),
    *("describe", "metrics", "record", "limits.constant", "limits.per_group", "limits.schedule"),
}


def named(name):
    """The object of a public name."""
    found = oc
    for part in name.split("."):
        found = getattr(found, part)
    return found


# Fields and methods of classes are documented with them.
PUBLIC = sorted(
    {name for name in NAMES if not inspect.isclass(named(name.partition(".")[0])) or "." not in name}
)
FUNCTIONS = [name for name in PUBLIC if not inspect.isclass(named(name))]


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
    assert sorted(shown) == PUBLIC


def test_every_page_of_the_reference_is_in_its_table():
    """`docs/api/index.md` links them all."""
    listed = set(LINK.findall((ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")))
    assert {page.name for page in REFERENCE} == listed | {"index.md"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_an_example_and_says_what_it_takes(name):
    """The example runs as a doctest; arguments are in the docstring by name."""
    text = inspect.getdoc(named(name)) or ""
    assert ">>> " in text
    for argument in inspect.signature(named(name)).parameters:
        assert re.search(rf"^  {argument}: ", text, re.M), argument


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - WITHOUT_FORMULA))
def test_every_method_norm_limit_and_response_has_a_formula(name):
    """As TeX between two dollars, or one."""
    assert re.search(r"\$[^$]+\$", inspect.getdoc(named(name)) or "")


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
