"""Results as tables for the terminal, as Markdown and as JSON."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.results import Row
from benchmarks.suites import SUITES
from benchmarks.timing import Spread

START, END = "<!-- results -->", "<!-- end of results -->"
TITLES = {
    "step": "A training step with AdamW",
    "alone": "The clip alone",
    "compile": "Tracing and compiling the clip",
    "memory": "Peak temporary memory, over the bytes of the gradients",
}
COLOURS = {"met": "green", "missed": "red", "unclear": "yellow"}


def columns(suite: str) -> list[str]:
    """The heads of a suite's numbers."""
    if suite == "memory":
        return ["temporary", "target"]
    return ["ms", "÷ peer's", *["÷ no clipping"] * (suite == "step"), "target"]


def cells(row: Row) -> list[str]:
    """A row's numbers as text, under `columns`."""
    target = "" if row.target is None or row.verdict is None else f"{row.verdict} (≤ {row.target:.3g})"
    if row.suite == "memory":
        return [f"{row.value:.3f}", target]
    ratios = [_spread(row.ratio), *[_spread(row.over_none)] * (row.suite == "step")]
    return [f"{1e3 * row.value:,.4g}" if row.value < 1 else f"{1e3 * row.value:,.0f}", *ratios, target]


def _spread(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for the terminal for each suite."""
    made = []
    for suite, some in _by_suite(rows).items():
        table = Table("", title=TITLES[suite], title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for head in columns(suite):
            table.add_column(head, justify="left" if head == "target" else "right", no_wrap=True)
        for what, section in itertools.groupby(some, lambda row: (row.tree, row.dtype, row.case)):
            table.add_row(", ".join(what), style="bold")
            for row in section:
                table.add_row(f"  {row.method}", *cells(row), style=COLOURS.get(row.verdict or ""))
            table.add_section()
        made.append(table)
    return made


def sentence(environment: Mapping[str, Any]) -> str:
    """What was measured where, in one line."""
    return "; ".join(f"{name}: {value}" for name, value in environment.items()) + "."


def markdown(rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    """The environment and all tables."""
    parts = [sentence(environment)]
    for suite, some in _by_suite(rows).items():
        heads = columns(suite)
        lines = [["tree", "dtype", "case", "method", *heads]]
        lines += [["---"] * 4 + ["---:"] * (len(heads) - 1) + ["---"]]
        lines += [[row.tree, row.dtype, row.case, row.method, *cells(row)] for row in some]
        parts += [f"### {TITLES[suite]}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def write_markdown(path: Path, text: str) -> None:
    """Writes the text to a file, or between the two marks of a file that has them."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, start, rest = old.partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        text = f"{before}{start}\n\n{text}\n{end}{after}"
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, rows: Sequence[Row], environment: Mapping[str, Any]) -> None:
    """Writes all that was measured."""
    plain = [
        {key: value._asdict() if isinstance(value, Spread) else value for key, value in row._asdict().items()}
        for row in rows
    ]
    text = json.dumps({"environment": environment, "rows": plain}, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _by_suite(rows: Sequence[Row]) -> dict[str, list[Row]]:
    suites = {suite: [row for row in rows if row.suite == suite] for suite in SUITES}
    return {suite: some for suite, some in suites.items() if some}
