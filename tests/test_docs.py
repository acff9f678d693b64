"""The documentation names everything that is public, with examples and formulas, and its links lead somewhere."""

import inspect
import re
from pathlib import Path

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
