"""A page about a `History` that stands by itself: figure, table and advice in one file, without scripts."""

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optaxclip.history import _plot
from optaxclip.history._tables import COLUMNS, Line, heading, lines, notes, printable, text

MOST = 1000  # groups in the table; a browser scrolls through these without effort

STYLE = """
:root { color-scheme: light dark; --line: #8886; --bad: #b00020; --soft: #8882 }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80 } }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 90rem; padding: 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2rem }
pre { background: var(--soft); border-radius: .4rem; overflow-x: auto; padding: .8rem }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)) }
.figures img { background: #fff; border-radius: .4rem; height: auto; width: 100% }
.scroll { max-height: 80vh; overflow: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td:first-child { max-width: 28rem; overflow-wrap: anywhere; white-space: normal }
thead th { background: Canvas; position: sticky; top: 0 }
.bad { color: var(--bad) } .whole { font-weight: bold }
"""


def write(history: Any, path: str | os.PathLike, advice: Any = None, limits: Any = None) -> None:
    """Writes the page; it replaces a file that is there."""
    Path(path).write_text(page(history, advice, limits), encoding="utf-8")


def page(history: Any, advice: Any = None, limits: Any = None) -> str:
    """The page. What comes from the recording is escaped, and figures are images, which run no scripts."""
    found = lines(history, MOST)
    title = html.escape(heading(history))
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Even if something slipped through: nothing is loaded, and nothing runs.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        f"<pre>{_escaped(text(history))}</pre>",
    ]
    if advice is not None:
        parts += [
            f"<h2>Advice: {_escaped(advice.policy)}</h2>",
            f"<pre><code>{_escaped(advice.code)}</code></pre>",
            f"<pre>{_escaped(str(advice))}</pre>",
        ]
    pictures = [_image(figure) for figure in _plot.figures(history, limits, advice)]
    if pictures:
        parts += ["<h2>Figures</h2>", '<div class="figures">', *pictures, "</div>"]
    parts += ["<h2>Groups</h2>", _table([*found.groups, found.whole])]
    parts += [f"<p>{_escaped(' '.join(notes(history, found)))}</p>", "</body>\n</html>\n"]
    return "\n".join(parts)


def _escaped(said: str) -> str:
    return "\n".join(html.escape(printable(line)) for line in said.split("\n"))


def _image(figure: Any) -> str:
    from matplotlib import rc_context

    file = io.BytesIO()
    # The same recording gives the same file; letters are drawn, since fonts differ from reader to reader.
    with rc_context({"svg.hashsalt": "optaxclip", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode("ascii")
    (axes, *_) = figure.axes
    alt = html.escape(printable(axes.get_title("left")))
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'


def _table(rows: Sequence[Line]) -> str:
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in ("group", *(c[0] for c in COLUMNS)))
    made = ['<div class="scroll"><table>', f"<thead><tr>{heads}</tr></thead>", "<tbody>"]
    for line in rows:
        kind = "whole" if line is rows[-1] else "bad" if line.nonfinite else ""
        cells = "".join(f"<td>{html.escape(cell(line))}</td>" for _, cell, _ in COLUMNS)
        made.append(f'<tr class="{kind}"><td>{_escaped(line.name)}</td>{cells}</tr>')
    return "\n".join([*made, "</tbody></table></div>"])
