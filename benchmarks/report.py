"""Results as tables for the terminal, as Markdown and as JSON."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from benchmarks import methods, references, results, targets, trees
from benchmarks.results import Row
from benchmarks.timing import Spread

START, END = "<!-- results -->", "<!-- end of results -->"
TITLES = {
    "step": "A training step with AdamW, over the same without clipping",
    "alone": "The clip alone",
    "compile": "Tracing and compiling the clip, over Optax's global clipping",
    "memory": "Peak temporary memory, over the bytes of the gradients",
    "launches": "Kernels",
    "train": "A whole training step of a transformer, over the same without clipping",
}
COLOURS = {"met": "green", "missed": "red", "unclear": "yellow"}
COLUMNS = (*methods.ALL, *references.NAMES)
TINY_LEAVES = 10_000  # entries to a leaf; below, calling a program with so many leaves is the limit


class Section(NamedTuple):
    """What was measured together: a tree, dtypes and a case, beside one baseline.

    Attributes:
      head: the tree, the dtypes and the case.
      baseline: what the ratios are over; None where there is none.
      values: seconds, memory or kernels, by method.
      rows: the rows to show: the ratios, or the values where there is no baseline.
    """

    head: tuple[str, str, str]
    baseline: str | None
    values: dict[str, float]
    rows: dict[str, Row]


def sections(suite: str, rows: Sequence[Row]) -> Iterator[Section]:
    """The sections of a suite, in the order in which they were measured."""
    own = [row for row in rows if row.suite == suite]
    for head, some in itertools.groupby(own, lambda row: (row.tree, row.dtype, row.case)):
        section = list(some)
        values = {row.method: row.value for row in section if row.against is None}
        known = [name for name in results.BASELINES.get(suite, ()) if name in values]
        if "identity" in known and _tiny(head[0]):
            known = ["identity"]
        baseline = known[0] if known else None
        yield Section(head, baseline, values, {row.method: row for row in section if row.against == baseline})


def _tiny(tree: str) -> bool:
    return tree in trees.ALL and trees.ALL[tree].entries < TINY_LEAVES * trees.ALL[tree].leaves


def cell(row: Row | None) -> str:
    """What is shown of a row: its ratio, or the value."""
    if row is None:
        return ""
    if row.ratio is not None:
        return f"{row.ratio.median:.2f} ({row.ratio.low:.2f}–{row.ratio.high:.2f})"
    if row.suite == "memory":
        return f"{row.value:.3f}"
    return f"{row.value:,.0f}" if row.suite == "launches" else time(row.value)


def time(seconds: float) -> str:
    """Seconds or milliseconds, to three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def tables(rows: Sequence[Row]) -> list[Table]:
    """Tables for the terminal: one for each suite, and the targets."""
    made = []
    for suite in _suites(rows):
        table = _table(TITLES[suite], "", "", "", "target")
        for section in sections(suite, rows):
            over = f"over {section.baseline}" if section.baseline else ""
            table.add_row(", ".join(section.head), "", over, style="bold")
            for name, value in section.values.items():
                row = section.rows.get(name)
                if suite not in results.BASELINES:
                    numbers = cell(row), ""
                else:
                    numbers = time(value), cell(row) if section.baseline else ""
                reach = f"{row.verdict} (≤ {row.target:.4g})" if row and row.target is not None else ""
                style = COLOURS.get(row.verdict or "") if row else None
                table.add_row(f"  {name}", *numbers, reach, style=style)
            table.add_section()
        made.append(table)
    reached = _table("Targets", *REACHED)
    for line in reaching(rows):
        reached.add_row(*line)
    return [*made, reached] if reached.rows else made


def _table(title: str, *heads: str) -> Table:
    table = Table("", title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for head in heads:
        wraps = head == REACHED[-1]
        table.add_column(head, justify="left" if head in ("target", *REACHED) else "right", no_wrap=not wraps)
    return table


REACHED = ("over", "reach", "met", "not met")


def reaching(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Each target that was measured: the work, and what stands under `REACHED`."""
    for target in targets.ALL:
        own = [row for row in rows if target.holds_for(*row[:6])]
        if not own:
            continue
        limits = sorted({row.target for row in own if row.target is not None})
        met = sum(row.verdict == "met" for row in own)
        rest = [
            f"{row.tree} {row.dtype} {row.case} {row.method} {cell(row)}" + "?" * (row.verdict == "unclear")
            for row in own
            if row.verdict != "met"
        ]
        reach = ", ".join(f"{limit:.4g}" for limit in limits)
        yield target.work, target.against or "", f"≤ {reach}", f"{met} of {len(own)}", "; ".join(rest)


def sentence(environment: Mapping[str, Any]) -> str:
    """What was measured where, in one line."""
    return "; ".join(f"{name}: {value}" for name, value in environment.items()) + "."


def markdown(rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    """The environment, the targets, and a table for each suite: trees and cases down, methods across."""
    parts = [sentence(environment)]
    lines = [["work", *REACHED], ["---"] * 5, *map(list, reaching(rows))]
    if len(lines) > 2:
        parts += ["### Targets", _pipes(lines)]
    for suite in _suites(rows):
        shown = [part for part in sections(suite, rows) if part.head[2] not in ("trace", "compile")]
        names = [name for name in COLUMNS if any(name in part.rows for part in shown)]
        timed = suite in results.BASELINES
        lines = [["tree", "dtype", "case", *["over"] * timed, *names]]
        lines += [["---"] * (3 + timed) + ["---:"] * len(names)]
        for part in shown:
            over = f"{part.baseline}, {time(part.values[part.baseline])}" if part.baseline else ""
            lines.append([*part.head, *[over] * timed, *(cell(part.rows.get(name)) for name in names)])
        parts += [f"### {TITLES[suite]}", _pipes(lines)]
    return "\n\n".join(parts) + "\n"


def _pipes(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def read_json(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """What `write_json` wrote."""
    read = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**row | {"ratio": Spread(**row["ratio"]) if row["ratio"] else None}) for row in read["rows"]]
    return rows, read["environment"]


def _suites(rows: Sequence[Row]) -> list[str]:
    measured = {row.suite for row in rows}
    return [suite for suite in TITLES if suite in measured]
