"""Hooks of MkDocs: what stands outside of `docs/` becomes pages, formulas become MathML, names links.

Links are written so that they work on GitHub and in an editor; here they are turned into those of the site.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[2]

# Files outside of docs/ that are pages of the site, and where.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
CODE_FILES = [path for folder in ("examples", "benchmarks") for path in sorted((ROOT / folder).glob("*.*"))]
SHOWN = {
    str(path.relative_to(ROOT)): f"source/{path.relative_to(ROOT)}.md"
    for path in CODE_FILES
    if path.suffix in (".py", ".c")
}
PLACES = {**PAGES, **SHOWN, "README.md": "index.md"}

HIDDEN = "---\nsearch: { exclude: true }\n---\n\n"

LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
CODE = re.compile(r"<code>(?:oc\.|optaxclip\.)?([\w.]+)(\([^<]*\))?</code>")
MODULE = re.compile(r">_(groups|norms|responses)<")  # as modules are called inside, in signatures
PICTURE = re.compile(r'<img [^>]*src="([^"]+)"[^>]*>')
LINKED = re.compile(r"<(a|autoref|h[1-6])\b.*?</\1>", re.S)


def _public() -> set[str]:
    """Every public name, without the methods of classes."""
    lines = (ROOT / "tests" / "api.txt").read_text(encoding="utf-8").splitlines()
    names = {line.partition("(")[0] for line in lines}
    return {name for name in names if name.partition(".")[0].islower() or "." not in name}


NAMES = _public()


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that stand outside, and the sources of scripts, which the search leaves out."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for source, page in SHOWN.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        back = (
            "[Gallery](../../gallery.md)"
            if source.startswith("examples")
            else "[Benchmarks](../../benchmarks.md)"
        )
        shown = f"{HIDDEN}# {source}\n\n{back}\n\n````{Path(source).suffix[1:]}\n{text}````\n"
        files.append(File.generated(config, page, content=shown, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links between files become links between pages; doctests are coloured as such."""
    del kwargs
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def moved(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        place = PLACES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if place is None:
            return match[1]  # MkDocs will say that there is no such page
        return posixpath.relpath(place, posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown).replace("```python\n>>>", "```pycon\n>>>")


def on_page_content(content: str, **kwargs: Any) -> str:
    """Formulas for browsers as they are, without a script; public names as links to the reference."""
    del kwargs
    content = FORMULA.sub(_mathml, content)
    content = PICTURE.sub(r'<a href="\1">\g<0></a>', content)  # to be looked at in full
    content = MODULE.sub(r">\1<", content)
    parts, end = [], 0
    for linked in LINKED.finditer(content):
        parts += [CODE.sub(_reference, content[end : linked.start()]), linked[0]]
        end = linked.end()
    return "".join([*parts, CODE.sub(_reference, content[end:])])


def _mathml(match: re.Match) -> str:
    display = "block" if match[1] == "div" else "inline"
    made = latex2mathml.converter.convert(html.unescape(match[2]).strip(), display=display)
    return f'<{match[1]} class="formula">{made}</{match[1]}>'


def _reference(match: re.Match) -> str:
    if match[1] not in NAMES:
        return match[0]
    return f'<autoref identifier="optaxclip.{match[1]}">{match[0]}</autoref>'
